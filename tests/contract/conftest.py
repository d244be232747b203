"""Each cloud in turn, played by its stand-in on a clock that only waiting moves."""

from __future__ import annotations

import pytest

from orchestrator import providers
from tests.cloud import Stand
from tests.contract.clouds import CLOUDS, Rented
from tests.orchestrator.providers.loopback import Time


@pytest.fixture(params=CLOUDS)
def rented(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rented:
    """Each cloud in turn."""
    kind = CLOUDS[request.param]
    cloud: Stand = request.getfixturevalue(kind.fixture)
    time = Time()
    time.install(monkeypatch)
    monkeypatch.setattr(cloud.core, "clock", lambda: time.now)
    return Rented(kind, providers.open(request.param), cloud, time)

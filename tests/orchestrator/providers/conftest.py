"""What tests of providers share: a scripted server, a clock that only waiting moves, and a cloud that asks there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.providers.lambda_cloud import LambdaCloud
from orchestrator.providers.vast import VastCloud
from tests.orchestrator.providers.loopback import Server, Time

KEY = "secret_k3y-Value.0123456789"


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that answers as its script says."""
    with Server().running() as made:
        yield made


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """The project's clock, moved by waiting alone."""
    made = Time()
    made.install(monkeypatch)
    return made


@pytest.fixture
def cloud(server: Server, time: Time, monkeypatch: pytest.MonkeyPatch) -> LambdaCloud:
    """Lambda Cloud as played by the server."""
    monkeypatch.setenv("GPU_LAMBDA_URL", server.url)
    return LambdaCloud(KEY)


@pytest.fixture
def vast(server: Server, time: Time, monkeypatch: pytest.MonkeyPatch) -> VastCloud:
    """Vast.ai as played by the server, which is a registry of images, too."""
    monkeypatch.setenv("GPU_VAST_URL", server.url)
    monkeypatch.setenv("GPU_REGISTRY_URL", server.url)
    return VastCloud(KEY)

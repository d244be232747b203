"""A stand-in for the clouds, with the faults that real ones have: `Cloud` is one that runs, and what it has cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cloud.faults import Fault as Fault
from tests.cloud.lambda_cloud import LambdaCloud as LambdaCloud
from tests.cloud.machines import Machine, SshMachines, need_machines
from tests.cloud.server import Server as Server
from tests.cloud.timings import Timings as Timings


@dataclass
class Cloud:
    """A stand-in that runs."""

    core: LambdaCloud
    """What it is: instances, bills, faults, calls."""
    url: str
    """For GPU_LAMBDA_URL."""
    machines: SshMachines | None

    @property
    def key(self) -> str:
        """For LAMBDA_API_KEY."""
        return self.core.key

    def machine(self, instance_id: str) -> Machine:
        """The computer behind an instance that has booted."""
        assert self.machines is not None, "light_cloud has no machines: take cloud"
        return self.machines.all[instance_id]

    def fault(self, what: str, **how: object) -> Fault:
        """Have something go wrong from now on; `how` are the fields of `Fault`."""
        return self.core.faults.add(Fault(what, **how))  # type: ignore[arg-type]


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """A fixture: a stand-in whose instances are real machines; the environment of the test names it."""
    need_machines()
    core = LambdaCloud()
    with SshMachines(tmp_path / "cloud") as machines:
        core.machines = machines
        with Server(core) as server:
            _announce(monkeypatch.setenv, server, machines.port)
            yield Cloud(core, server.url, machines)


def light_cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """A fixture: a stand-in whose instances are nothing but words; the environment of the test names it."""
    core = LambdaCloud()
    with Server(core) as server:
        _announce(monkeypatch.setenv, server, 22)
        yield Cloud(core, server.url, None)


def _announce(say: Callable[[str, str], None], server: Server, port: int) -> None:
    say("GPU_LAMBDA_URL", server.url)
    say("LAMBDA_API_KEY", server.core.key)
    say("GPU_LAMBDA_SSH_PORT", str(port))

"""Stand-ins for the clouds, with the faults that real ones have: `Cloud` and `Vast` are two that run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cloud.core import Core
from tests.cloud.faults import Fault as Fault
from tests.cloud.lambda_cloud import LambdaCloud as LambdaCloud
from tests.cloud.machines import Machine, need_machines
from tests.cloud.machines import SshMachines as SshMachines
from tests.cloud.server import Server as Server
from tests.cloud.timings import Timings as Timings
from tests.cloud.vast_cloud import VastCloud as VastCloud
from tests.cloud.vast_machines import Container, need_containers
from tests.cloud.vast_machines import Containers as Containers


class Stand:
    """What every stand-in that runs has."""

    core: Core
    """What it is: instances, bills, faults, calls."""
    url: str

    @property
    def key(self) -> str:
        """The account's."""
        return self.core.key

    def fault(self, what: str, **how: object) -> Fault:
        """Have something go wrong from now on; `how` are the fields of `Fault`."""
        return self.core.faults.add(Fault(what, **how))  # type: ignore[arg-type]


@dataclass
class Cloud(Stand):
    """A stand-in for Lambda that runs."""

    core: LambdaCloud
    url: str
    """For GPU_LAMBDA_URL."""
    machines: SshMachines | None

    def machine(self, instance_id: str) -> Machine:
        """The computer behind an instance that has booted."""
        assert self.machines is not None, "light_cloud has no machines: take cloud"
        return self.machines.all[instance_id]


@dataclass
class Vast(Stand):
    """A stand-in for Vast that runs."""

    core: VastCloud
    url: str
    """For GPU_VAST_URL."""
    machines: Containers | None

    def machine(self, instance_id: str) -> Container:
        """The container behind an instance that has started."""
        assert self.machines is not None, "light_vast has no machines: take vast_cloud"
        return self.machines.all[instance_id]


@dataclass
class Both:
    """Both stand-ins, on one server."""

    lambda_cloud: Cloud
    vast: Vast


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
    """A fixture: a stand-in for Lambda whose instances are real machines; the environment of the test names it."""
    need_machines()
    core = LambdaCloud()
    with SshMachines(tmp_path / "cloud") as machines:
        core.machines = machines
        with Server(core) as server:
            announce(monkeypatch.setenv, server, machines.port)
            yield Cloud(core, server.url, machines)


def light_cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """A fixture: a stand-in for Lambda whose instances are nothing but words; the environment of the test names it."""
    core = LambdaCloud()
    with Server(core) as server:
        announce(monkeypatch.setenv, server)
        yield Cloud(core, server.url, None)


def vast_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vast]:
    """A fixture: a stand-in for Vast whose instances are real containers; the environment of the test names it."""
    need_containers()
    core = VastCloud()
    with Containers(tmp_path / "vast") as machines:
        core.machines = machines
        with Server(core) as server:
            announce(monkeypatch.setenv, server)
            yield Vast(core, server.url, machines)


def light_vast(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vast]:
    """A fixture: a stand-in for Vast whose instances are nothing but words; the environment of the test names it."""
    core = VastCloud()
    with Server(core) as server:
        announce(monkeypatch.setenv, server)
        yield Vast(core, server.url, None)


def both_clouds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    """A fixture: both stand-ins with real machines, on one server; the environment of the test names them."""
    need_machines()
    need_containers()
    one, other = LambdaCloud(), VastCloud()
    with contextlib.ExitStack() as stack:
        one.machines = stack.enter_context(SshMachines(tmp_path / "cloud"))
        other.machines = stack.enter_context(Containers(tmp_path / "vast"))
        server = stack.enter_context(Server(one, others=[other]))
        announce(monkeypatch.setenv, server, one.machines.port)
        yield Both(Cloud(one, one.url, one.machines), Vast(other, other.url, other.machines))


def light_both(monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    """A fixture: both stand-ins without machines, on one server; the environment of the test names them."""
    one, other = LambdaCloud(), VastCloud()
    with Server(one, others=[other]) as server:
        announce(monkeypatch.setenv, server)
        yield Both(Cloud(one, one.url, None), Vast(other, other.url, None))


def announce(say: Callable[[str, str], None], server: Server, port: int = 22) -> None:
    """Say where the clouds of a server are; `port` is where Lambda's machines let people in."""
    for core in server.cores:
        name = core.place.strip("/").upper()
        say(f"GPU_{name}_URL", core.url)
        say(f"{name}_API_KEY", core.key)
        if isinstance(core, LambdaCloud):
            say("GPU_LAMBDA_SSH_PORT", str(port))

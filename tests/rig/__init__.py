"""Machines over SSH for tests, with the faults that real ones have: `Sshd`, the `Proxy` before one, and the `Wire`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import netns, sshd
from tests.rig.netns import Wire
from tests.rig.proxy import Proxy, Reachable
from tests.rig.sshd import Sshd

__all__ = ["Proxy", "Reachable", "Sshd", "Wire", "machine_room", "need_sshd", "need_wires", "proxies", "wires"]


def need_sshd() -> None:
    """Skip the test, saying what to type, where there is no sshd or no /proc to find its processes in."""
    if sshd.sshd_program() is None:
        pytest.skip("no sshd here. Type: apt-get install openssh-server")
    if not Path("/proc/self/environ").exists():
        pytest.skip("the machines of the rig are followed through /proc, which only Linux has")


def need_wires() -> None:
    """Skip the test, saying why, where there can be no network namespaces."""
    need_sshd()
    if reason := netns.why_not():
        pytest.skip(reason)


def machine_room(tmp_path: Path) -> Iterator[Callable[..., Sshd]]:
    """A fixture: makes started machines, `make(name="m1", **options of Sshd)`; at the end nothing of them is alive."""
    need_sshd()
    with contextlib.ExitStack() as room:

        def make(name: str = "m1", **options: Any) -> Sshd:
            return room.enter_context(Sshd(tmp_path / "machines" / name, **options))

        yield make


def proxies() -> Iterator[Callable[[Reachable], Proxy]]:
    """A fixture: makes started proxies, `make(target)`; at the end their threads have ended."""
    with contextlib.ExitStack() as room:
        yield lambda target: room.enter_context(Proxy(target))


def wires(tmp_path: Path) -> Iterator[Callable[..., Wire]]:
    """A fixture: makes machines on wires of their own, `make(name="w1")`; at the end nothing of them is left."""
    need_wires()
    with contextlib.ExitStack() as room:
        yield lambda name="w1": room.enter_context(Wire(tmp_path / "wires" / name))

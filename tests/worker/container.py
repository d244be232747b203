"""A container that is a folder: its start text run by a real shell, its watchdog, its agent, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs import durable, rundir
from orchestrator import agents, machines, onstart
from orchestrator.providers.base import GuardOrder
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import container_cloud, machine
from tests.worker.container_cloud import KEY, OWN, ContainerCloud
from worker import processes

MARKER = "gpu-20261121t120000-0123456789ab"
HOST_KEYS = "/etc/ssh/"
"""Where the text looks for the host key; a test has another folder."""
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8Yt0yZ5cVnBoCxAq2RyKfiVhC7p1hTt2b0nS4Zb7Qx"
PACE = 0.02
"""Of all that the watchdog waits for: what takes ten seconds on a machine takes a fifth of one here."""
QUICK = PACE / 4
"""Where the pauses are many."""
SOURCE = Path(__file__).parent.parent.parent / "worker" / "watchdog.py"
# A Python whose clock is as far ahead as a file says.
_CLOCK = """#!{python} -I
import sys, time
real = time.time
def wall():
    with open({ahead!r}) as file:
        return real() + float(file.read() or 0)
time.time = wall
_, _, code, *more = sys.argv
sys.argv = ["-c", *more]
exec(code)
"""
Child = subprocess.Popen[bytes]


class Container:
    """A container's folder, and what runs in it."""

    def __init__(self, folder: Path, cloud: ContainerCloud) -> None:
        self.folder = folder
        self.cloud = cloud
        self.home = folder / "home"
        self.root = self.home / ".gpu"
        self.path = [str(Path(sys.executable).parent), "/usr/bin", "/bin"]
        self.places = {HOST_KEYS: f"{folder}/ssh/"}
        """What paths in the text are here."""
        self.env = {"CONTAINER_API_KEY": KEY, "CONTAINER_ID": OWN}
        self.before = ""
        """What the shell does before it comes to the text."""
        self.settings: dict[str, Any] = {}
        self._children: list[Child] = []
        for name in ("home", "terminals", "processes", "ssh"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.host_key = folder / "ssh" / "ssh_host_ed25519_key.pub"
        self.host_key.write_text(f"{HOST_KEY} root@container\n", encoding="ascii")

    def text(self, **changes: Any) -> str:
        """The start text for this container; the settings are those of its first start, and what is given."""
        order = GuardOrder(MARKER, self.cloud.url, "", time.time(), "root", grace_s=5.0)
        known = {"terminals": str(self.folder / "terminals"), "processes": str(self.folder / "processes")}
        self.settings = {**onstart.settings(order), **known, "pace": PACE, **self.settings, **changes}
        return onstart.script(self.settings)

    def start(self, shell: str = "/bin/sh", **changes: Any) -> None:
        """Do what is done at a container's start; returns when the text has, while the watchdog goes on."""
        text = self.before + self.text(**changes)
        for place, here in self.places.items():
            text = text.replace(place, here)
        (self.folder / "onstart.sh").write_text(text, encoding="ascii")
        environment = {"PATH": ":".join(self.path), "HOME": str(self.home), **self.env}
        with (self.folder / "log").open("ab") as log:
            words = [shell, str(self.folder / "onstart.sh")]
            done = subprocess.Popen(words, cwd="/", env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        assert done.wait(30) is not None

    def start_source(self, python: str = sys.executable, program: str | None = None, **changes: Any) -> Child:
        """Start the watchdog without its text: from its source, or from what is given; returns its process."""
        self.text(**changes)
        words = [python, "-I", str(SOURCE)] if program is None else [python, "-I", "-c", program]
        environment = {"HOME": str(self.home), "PATH": "/usr/bin:/bin", **self.env}
        with (self.folder / "log").open("ab") as log:
            told = [*words, json.dumps(self.settings)]
            child = subprocess.Popen(told, cwd="/", env=environment, stdout=log, stderr=log, start_new_session=True)
        self._children.append(child)
        return child

    def log(self) -> str:
        """What the container has printed."""
        return (self.folder / "log").read_text(encoding="utf-8")

    def set_clock(self, ahead_s: float) -> None:
        """Have the container's wall clock that far ahead; before its first start, then at any time."""
        ahead = self.folder / "ahead"
        durable.replace_whole(ahead, str(ahead_s).encode(), synced=False)
        if not (self.folder / "bin").exists():
            (self.folder / "bin").mkdir()
            program = self.folder / "bin" / "python3"
            program.write_text(_CLOCK.format(python=sys.executable, ahead=str(ahead)), encoding="utf-8")
            program.chmod(0o755)
            self.path.insert(0, str(program.parent))

    def pids(self) -> list[int]:
        """The processes of this container."""
        mark = f"HOME={self.home}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def armed(self) -> list[int]:
        """The processes of watchdogs, and the shells that start them again."""
        return [pid for pid in self.pids() if b"zlib.decompress" in words(pid)]

    def watchdog(self) -> int:
        """The process of the watchdog that has the lock."""
        return int(self.seen(lambda view: view["pid"] in self.pids())["pid"])

    def power_off(self) -> None:
        """Kill all that runs here, as the end of a container does; its files stay."""

        def is_off() -> bool:
            processes.kill(self.pids(), signal.SIGKILL)
            return not self.pids()

        until(is_off)
        for child in self._children:
            child.wait()

    def view(self) -> dict[str, Any]:
        """What the watchdog last wrote down, which is never a part of a document."""
        found: dict[str, Any] = durable.load_json(self.root / "guard" / "status.json") or {}
        return found

    def seen(self, condition: Callable[[dict[str, Any]], Any], within_s: float = 30.0) -> dict[str, Any]:
        """What the watchdog wrote down, once it is as wanted."""
        found: dict[str, Any] = until(lambda: (view := self.view()) and condition(view) and view, within_s)
        return found

    def have_machine(self) -> None:
        """Let this container be the machine that this computer is."""
        if not self.root.exists():
            durable.have_folder(machines.this_computer().root)
            self.root.symlink_to(machines.this_computer().root)

    def have_agent(self) -> str:
        """Have the code installed now on this container; returns its name."""
        self.have_machine()
        store = Path(os.environ["GPU_HOME"]) / "agents"
        name = agents.keep(store)
        machines.this_computer().push_agent(store, name)
        return name

    def running(self, counting_run: Callable[..., Run], **params: Any) -> rundir.Run:
        """A real run that goes on here, with rows."""
        self.have_machine()
        run = counting_run(count=100_000, pace_s=0.01, **params)
        machines.this_computer().push_agent(Path(os.environ["GPU_HOME"]) / "agents", run.record.agent)
        machine.start(run)
        there = machine.there(run)
        until(lambda: there.attempt(1).rows.exists() and there.attempt(1).rows.stat().st_size)
        return there


@contextlib.contextmanager
def contained(folder: Path) -> Iterator[Container]:
    """A container and its cloud while the block lasts; at its end, no call was about another machine."""
    with container_cloud.serving() as cloud:
        box = Container(folder / "container", cloud)
        try:
            yield box
        finally:
            box.power_off()
        assert all(path.endswith(f"/{OWN}/") for _, _, path, _ in cloud.calls)


def words(pid: int) -> bytes:
    """The words of a process; empty when it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""

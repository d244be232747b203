"""Other programs, run with a deadline and without the settings of the Python around them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Protocol

from worker import processes

_TICK_S = 0.05
_LEAVE_OUT = ("VIRTUAL_ENV", "CONDA_PREFIX", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIREMENT")


class Asker(Protocol):
    """Whoever waits for the work that is done here."""

    def say(self, text: str) -> None:
        """Hears how it goes."""
        ...

    def tick(self) -> None:
        """Called again and again while something is waited for; what it raises ends that, and the waiting."""
        ...


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """The variables for installers and interpreters: nothing of a surrounding Python, no writing outside of a venv."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key not in _LEAVE_OUT}
    safe = {"PYTHONNOUSERSITE": "1", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return kept | safe | (more or {})


@dataclass(frozen=True)
class Program:
    """A program to run without input, and for how long at most."""

    words: list[str]
    deadline_s: float
    out: int = subprocess.DEVNULL
    """Descriptor for all it says."""
    env: dict[str, str] | None = None
    data: bytes = b""
    """Its standard input."""
    held: tuple[int, ...] = ()
    """Descriptors it keeps open: a lock lasts for as long as it runs."""

    def run(self, asker: Asker) -> int:
        """The exit code; 127 when it cannot be started, 124 after the deadline.

        It is killed with its group at the deadline, when `tick` raises, and (on Linux) when this process dies.
        """
        with tempfile.TemporaryFile() as source:
            source.write(self.data)
            source.seek(0)
            try:
                child = self._start(source.fileno())
            except OSError:
                return 127
        try:
            return self._waited(child, asker)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def _start(self, source: int) -> subprocess.Popen[bytes]:
        parent = os.getpid()

        def begin() -> None:
            os.setpgid(0, 0)
            processes.die_with_parent(parent)

        return subprocess.Popen(
            self.words,
            stdin=source,
            stdout=self.out,
            stderr=self.out,
            env=environment() if self.env is None else self.env,
            cwd="/",
            pass_fds=self.held,
            preexec_fn=begin,
        )

    def _waited(self, child: subprocess.Popen[bytes], asker: Asker) -> int:
        deadline = time.monotonic() + self.deadline_s
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(_TICK_S)
            asker.tick()
            if time.monotonic() >= deadline:
                return 124


def ran(words: list[str], deadline_s: float, asker: Asker, more: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit code and the whole output of a program, see `Program`; `more` are variables for it."""
    with tempfile.TemporaryFile() as out:
        code = Program(words, deadline_s, out.fileno(), environment(more)).run(asker)
        out.seek(0)
        return code, out.read().decode("utf-8", "replace")

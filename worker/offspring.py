"""A program with all that it starts: it dies when we do, whatever kills us, and is ended whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from worker import processes

MARK = "GPU_OFFSPRING"
"""Environment variable by which all that one such program started is found, whatever group or session it went to."""
_POLL_S = 0.05
_KILLED_WITHIN_S = 10.0


class Offspring:
    """A program in a session of its own. To be started by a thread that lives as long as it is to live."""

    def __init__(self, words: Sequence[str], env: dict[str, str], **pipes: Any) -> None:
        """OSError when it cannot be started; `pipes` as for Popen."""
        self._mark = f"{os.getpid()}-{secrets.token_hex(8)}"
        me = os.getpid()
        self.process = subprocess.Popen(
            list(words),
            env={**env, MARK: self._mark},
            start_new_session=True,
            preexec_fn=lambda: processes.die_with_parent(me),
            **pipes,
        )

    def how_it_ended(self) -> str:
        """In words; empty while it lives."""
        code = self.process.poll()
        return "" if code is None else processes.ending(code)

    def pids(self) -> list[int]:
        """What is alive of it and of what it started (Linux; elsewhere only itself)."""
        found = processes.marked(self._mark, MARK)
        return found or ([self.process.pid] if self.process.poll() is None else [])

    def end(self, grace_s: float, tick: Callable[[], None] = lambda: None) -> list[int]:
        """TERM to its group, KILL to all of it after the grace; returns what would not die. May be called twice."""
        if not self.pids():
            return []
        self._signal(signal.SIGTERM)
        self._gone_within(grace_s, tick)
        self._signal(signal.SIGKILL)
        self._gone_within(_KILLED_WITHIN_S, tick)
        return self.pids()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            processes.kill(self.pids())

    def _gone_within(self, seconds: float, tick: Callable[[], None]) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (self.process.poll() is None or self.pids()):
            tick()
            time.sleep(_POLL_S)

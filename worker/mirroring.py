"""The supervisor's side of a mirror: a child that copies, watched and started again; it never holds up the run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import durable, rundir
from worker import processes
from worker.order import Order

_AGAIN_S = 10.0
_SILENCE_S = 60.0
"""At the end of a run a mirror may take as long as bytes flow; after so long without news it is left as it is."""
_END_MAX_S = 1800.0
_TRIES_MAX = 3
_TICK_S = 0.2


class Mirroring:
    """Keeps one child that copies; without a mirror in the order, every call does nothing."""

    def __init__(self, run: rundir.Run, order: Order) -> None:
        self.run = run
        self.order = order
        self._child: subprocess.Popen[bytes] | None = None
        self._again_at = 0.0

    def tick(self) -> None:
        """Have a child that copies; one that ended, or was swept up with an attempt, is started again after a while."""
        if not self.order.mirror or (self._child and self._child.poll() is None):
            return
        if time.monotonic() >= self._again_at:
            self._again_at = time.monotonic() + _AGAIN_S
            self._child = self._start()

    def said(self) -> dict[str, Any]:
        """What status.json says of it: `mirror` with its news, or nothing where there is none."""
        if not self.order.mirror:
            return {}
        return {"mirror": {"target": self.order.mirror, **durable.load_news(self.run.mirror)}}

    def finish(self, tick: Callable[[], None]) -> str:
        """Copy what is left, the seal last, for as long as bytes flow; words about what is wrong, or nothing."""
        if not self.order.mirror:
            return ""
        self._end()
        for _ in range(_TRIES_MAX):
            code = self._copied_once(tick)
            if code == 0:
                return ""
            if code is None:
                return f"The mirror {self.order.mirror} took too long; what was copied until then is there."
        failed = str(durable.load_news(self.run.mirror).get("failed", ""))
        return f"The mirror {self.order.mirror} does not have all of it: {failed or 'it could not be started'}."

    def _copied_once(self, tick: Callable[[], None]) -> int | None:
        """How a child ended that copies what there is; None when no bytes have flowed for too long."""
        self._child = self._start("once")
        if self._child is None:
            return 1
        deadline = time.monotonic() + _END_MAX_S
        known, heard_at = self._news(), time.monotonic()
        while self._child.poll() is None:
            tick()
            if self._news() != known:
                known, heard_at = self._news(), time.monotonic()
            if time.monotonic() >= min(deadline, heard_at + _SILENCE_S):
                self._end()
                return None
            time.sleep(_TICK_S)
        return self._child.returncode

    def _news(self) -> int:
        """What changes while bytes flow: the child's time in the system and its news."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = self._child.pid if self._child else 0
            lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
            return int(lines[0].split()[1]) + int(lines[1].split()[1])
        return 0

    def _start(self, *words: str) -> subprocess.Popen[bytes] | None:
        """A child in a session of its own, which the kernel ends with this process; None when it cannot be started."""
        me = os.getpid()
        is_hub = self.order.mirror.startswith("hf://")
        python = self.order.python if is_hub else sys.executable  # the Hub's client is in the run's environment
        entry = str(Path(self.order.agent) / "worker" / "__main__.py")
        env = self.order.environment(os.environ) | {processes.RUN_MARK: str(self.run.folder)}
        try:
            with durable.opened(self.run.mirror_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log:
                return subprocess.Popen(
                    [python, "-I", "-X", "utf8", entry, "mirror", *self._what(), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=env,
                    start_new_session=True,
                    preexec_fn=lambda: processes.die_with_parent(me),  # this process has one thread, so this is safe
                )
        except OSError:
            return None

    def _what(self) -> list[str]:
        name = self.order.machine if rundir.is_safe_name(self.order.machine) else "machine"
        return [str(self.run.folder), self.order.mirror, name]

    def _end(self) -> None:
        if self._child and self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a file system that does not answer
                self._child.wait(1.0)

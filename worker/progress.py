"""News of a worker for its supervisor: the phase it is in, and how many rows, or steps, are done."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from jobs import durable

_INTERVAL_S = 0.5


class Progress:
    """Replaces progress.json at most twice a second, unsynced: a lost one, or one not written, costs nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved_at = 0.0
        self._said: dict[str, Any] = {"phase": "starting", "rows_before": 0, "rows_total": None, "rows_synced": 0}

    def phase(self, words: str) -> None:
        """Say what is being done now; written at once."""
        print(words, flush=True)  # noqa: T201 -- the worker's log is its standard output
        self._said["phase"] = words
        self._save()

    def expect(self, total: int, before: int) -> None:
        """Say how many rows there will be, and how many of them there are already."""
        self._said.update(rows_total=total, rows_before=before)

    def rows(self, synced: int) -> None:
        """Say how many rows of this attempt are on the disk."""
        self._said["rows_synced"] = synced
        if time.monotonic() - self._saved_at >= _INTERVAL_S:
            self._save()

    def steps(self, done: int, total: int, words: str, eta_s: float) -> None:
        """Say how many steps of a training are done, of how many, and how it goes in a few words."""
        self._said.update(steps_done=done, steps_total=total, words=words, eta_s=eta_s)
        if time.monotonic() - self._saved_at >= _INTERVAL_S:
            self._save()

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        with contextlib.suppress(OSError):
            durable.save_json(self._path, self._said, synced=False)

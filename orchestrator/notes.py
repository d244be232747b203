"""Notes of a run: what its user wrote about it, a durable line each, in a file of its folder that only grows."""

from __future__ import annotations

import contextlib
import os

from jobs import durable, locks, rows
from orchestrator import clock
from orchestrator.errors import ConfigError, UsageError
from orchestrator.runs import Run

MOST_CHARS = 10_000
_WAIT_S = 10.0


def add(run: Run, text: str) -> None:
    """Append a note; once this returns, a power cut does not lose it. UsageError, ConfigError when nothing was noted.

    One writer at a time, also while another process follows the run. What a crash left of a line is set aside.
    """
    if not text.strip() or len(text) > MOST_CHARS:
        raise UsageError(
            f"A note has 1 to {MOST_CHARS} characters, this one {len(text.strip())}. Nothing was noted.",
            f'Such as: gpu note {run.run_id} "with the new prompt"',
        )
    at, text = clock.now(), text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    line = rows.encode({"key": at, "error": None, "at": at, "text": text})
    home = run.home
    try:
        with locks.held(home.notes_lock, _WAIT_S):
            rows.repair(home.notes)
            with durable.opened(home.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
                durable.append(descriptor, line, os.fstat(descriptor).st_size)
                durable.sync(descriptor)
            durable.sync_folder(home.folder)
    except TimeoutError:
        raise ConfigError(f"Another process writes a note of {run.run_id}. Nothing was noted.", "Again.") from None


def read(run: Run) -> list[dict[str, str]]:
    """Every note, oldest first: `at` and `text`; damaged lines are passed over."""
    found = []
    for _, line in rows.whole_lines(run.home.notes):
        with contextlib.suppress(rows.BadRow):
            row = rows.decode(line)
            found.append({"at": str(row.get("at")), "text": str(row.get("text"))})
    return found

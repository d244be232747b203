"""The curves of a training at home, those of all its attempts in one folder, as TensorBoard wants them."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from jobs import rows, rundir


def show(home: rundir.Home) -> Path | None:
    """Have `tensorboard/` in the run's folder, each attempt's file under a name by when it began; None without any.

    TensorBoard reads them in this order, and each takes the place of what earlier ones have from its first step on.
    The same files under a second name: they grow as the copies do.
    """
    found = [attempt for copy in home.copies() for attempt in copy.attempts() if attempt.curves.is_file()]
    for number, attempt in enumerate(sorted(found, key=_began), start=1):
        shown = home.curves / f"{attempt.curves.name}.{number:04d}"
        with contextlib.suppress(FileNotFoundError):
            if shown.samefile(attempt.curves):
                continue
        home.curves.mkdir(exist_ok=True)
        shown.unlink(missing_ok=True)
        try:
            os.link(attempt.curves, shown)
        except OSError:  # not every disk has links
            shutil.copyfile(attempt.curves, shown)
    return home.curves if found else None


def _began(attempt: rundir.Attempt) -> tuple[str, int]:
    """When an attempt's first step was done, or that it has not done one."""
    first: Any = next((line for _, line in rows.whole_lines(attempt.steps)), None)
    with contextlib.suppress(rows.BadRow):
        return (str(rows.decode(first).get("at")) if first else "~", attempt.number)
    return ("~", attempt.number)

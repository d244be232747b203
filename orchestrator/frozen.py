"""A run that is kept as it was made: its rows read-only once it is done, with digests that tell of any change since."""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path
from typing import Any

from jobs import durable, rundir, spec
from jobs.rundir import Home
from orchestrator import clock
from orchestrator.runs import Run

_MAY_WRITE = 0o222


def keep(run: Run) -> None:
    """Freeze what a sealed run has made, if its job wants that; once it is frozen nothing is done."""
    if run.record.state != "sealed" or not run.job().get("frozen") or run.home.frozen.exists():
        return
    files = [path for path in (run.home.rows, run.home.noise, run.home.selections) if path.exists()]
    for path in files:
        _lock(path)
    facts = {path.name: {"bytes": path.stat().st_size, "sha256": rundir.file_sha256(path)} for path in files}
    durable.save_json(run.home.frozen, {"at": clock.now(), "digest": spec.digest(facts), "files": facts})
    _lock(run.home.frozen)


def _lock(path: Path) -> None:
    """Take everybody's right to write a file; who may read it stays."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_MAY_WRITE)


def told(home: Home) -> dict[str, Any] | None:
    """When a run was frozen, its digest, and which of its files are not what they were then; None for any other run."""
    if not home.frozen.exists():
        return None
    known = durable.load_news(home.frozen)
    files = known.get("files")
    if not isinstance(files, dict) or spec.digest(files) != known.get("digest"):
        return {"at": None, "digest": None, "changed": [home.frozen.name]}
    changed = [name for name, facts in files.items() if _facts(home, name) != facts]
    return {"at": str(known.get("at")), "digest": str(known["digest"]), "changed": changed}


def _facts(home: Home, name: str) -> dict[str, Any] | None:
    """Size and digest of a file of a run now; None where there is none."""
    if not rundir.is_safe_name(name):
        return None
    path = home.folder / name
    with contextlib.suppress(OSError, ValueError):
        return {"bytes": path.stat().st_size, "sha256": rundir.file_sha256(path)}
    return None


def in_words(label: str, known: dict[str, Any] | None) -> str:
    """What there is to say of a run that was changed since it was frozen; nothing of any other."""
    if known is None or not known["changed"]:
        return ""
    since = f" at {known['at']}" if known["at"] else ""
    names = ", ".join(known["changed"])
    return f"{label} was changed since it was frozen{since}: {names} is not what was made. Its numbers prove nothing."

"""How long this machine has been idle, at one look: rows, GPUs, people and transfers; and what is not home yet."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import rundir
from worker import devices, processes, steady
from worker.acknowledged import Acknowledged
from worker.outs import Outs

TERMINALS = Path("/dev/pts")
WORKING_PERCENT = 3
"""A GPU that computes for less of the time only shows its desktop, or is asked how it is."""
_GROWS_WITH_WORK = (
    "rows.jsonl",
    "noise.jsonl",
    "selections.jsonl",
    "steps.jsonl",
    "log.txt",
    "progress.json",
    "env.json",
    "failure.json",
)
"""Files of an attempt that change because work gets on. Not status.json: it has a heartbeat, also of a worker that
hangs."""
_OUR_WORK = ("exec", "put", "take", "adopt", "stage", "project", "build", "environment", "fetch", "check", "rescore")
"""Agent commands that are work of their own, for as long as they run. Not `pull`, `state` and the like: a laptop that
only looks does not use the machine."""
_TRANSFERS = ("rsync", "scp", "sftp-server")
_SAMPLE_S = 0.3
_AHEAD_S = 5.0
"""A time further ahead than this was noted before the clock was set back, and says nothing."""
_WHY_MAX = 8


@dataclass(frozen=True, order=True)
class Sign:
    """Something that was use of the machine, so long ago."""

    age_s: float
    words: str


def look(root: Path, terminals: Path = TERMINALS) -> dict[str, Any]:
    """`idle_s`, `why` (the last uses, newest first), `unpulled` (run ids); and `token`, which changes with progress.

    Progress is what grows, not what is alive: a worker that hangs is idle.
    """
    runs = [rundir.Run(path) for path in _folders(root / "runs")]
    signs = [_since_start(), *_transfers(), *_own_work(root), *_gpus(), *_people(terminals)]
    token = [0, 0]
    for run in runs:
        for path, facts in _progress(run):
            age_s = time.time() - facts.st_mtime
            token = [max(token[0], facts.st_mtime_ns), token[1] + facts.st_size]
            if age_s >= -_AHEAD_S:
                signs.append(Sign(max(age_s, 0.0), f"{run.folder.name}: {path} grew"))
    signs.sort()
    said: dict[str, Sign] = {}
    for sign in signs:  # of a run, the newest is enough
        said.setdefault(sign.words.partition(":")[0], sign)
    return {
        "idle_s": round(signs[0].age_s, 1),
        "why": [f"{sign.words} {_ago(sign.age_s)}" for sign in list(said.values())[:_WHY_MAX]],
        "unpulled": [run.folder.name for run in runs if next(Acknowledged(run).missing(), None)],
        "token": f"{token[0]}.{token[1]}",
    }


def _ago(seconds: float) -> str:
    if seconds < 1:
        return "now"
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in folder.iterdir() if rundir.is_safe_name(path.name) and path.is_dir())
    return []


def _since_start() -> Sign:
    """The start of this machine: somebody wanted it."""
    return Sign(steady.since_boot(), "machine: it was started")


def _progress(run: rundir.Run) -> Iterator[tuple[str, os.stat_result]]:
    """Every file of a run that changes because work gets on; the job itself is the first."""
    paths = [(run.job.name, run.job)]
    for attempt in run.attempts():
        paths += [(name, attempt.folder / name) for name in _GROWS_WITH_WORK]
    for folder in run.folders():
        paths.append((folder.name, folder / rundir.MANIFEST))
    for name, path in paths:
        with contextlib.suppress(OSError):
            yield name, path.lstat()
    yield from Outs(run).find(lambda *_: None).items()


def _gpus() -> Iterator[Sign]:
    """GPUs that compute now. Memory that is held says nothing: a worker that hangs holds it too."""
    for device, percent in devices.utilisation().items():
        if percent >= WORKING_PERCENT:
            yield Sign(0.0, f"GPU {device}: it computes ({percent} %)")


def _people(terminals: Path) -> Iterator[Sign]:
    """When somebody last typed at each terminal there is, or opened it: logins, `gpu ssh`, an editor's terminal.

    A terminal that was left open ages like everything else. Our own connections have none.
    """
    with contextlib.suppress(OSError):
        for path in sorted(terminals.iterdir()):
            if path.name.isdigit():
                with contextlib.suppress(OSError):
                    age_s = time.time() - path.stat().st_atime  # the kernel's own: moved by what is read from it
                    if age_s >= -_AHEAD_S:
                        yield Sign(max(age_s, 0.0), f"terminal {path.name}: somebody typed")


def _own_work(root: Path) -> Iterator[Sign]:
    """Commands of the laptop here that are work: `gpu exec`, files that come, an environment that is made."""
    below = str(root / "agent")
    for words in processes.commands().values():
        entry = next((at for at, word in enumerate(words) if word.endswith("/worker/__main__.py")), None)
        if entry is not None and words[entry].startswith(below) and words[entry + 1 : entry + 2]:
            verb = words[entry + 1]
            if verb in _OUR_WORK:
                yield Sign(0.0, f"{verb}: a command of the laptop runs")


def _transfers() -> Iterator[Sign]:
    """Files that somebody copies just now; a connection through which nothing flows is none."""
    before = {pid: _moved(pid) for pid, words in processes.commands().items() if words and _name(words) in _TRANSFERS}
    if before:
        time.sleep(_SAMPLE_S)
        if any(_moved(pid) > moved >= 0 for pid, moved in before.items()):
            yield Sign(0.0, "transfer: files are copied")


def _name(words: list[str]) -> str:
    return words[0].rpartition("/")[2]


def _moved(pid: int) -> int:
    """Bytes a process has read and written, -1 when it may not be asked."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    except (OSError, ValueError, IndexError):
        return -1


def main(words: list[str]) -> int:
    """Answer with one look at the machine whose folder is the first word, as a JSON line."""
    answer = look(Path(words[0]), Path(words[1]) if words[1:] else TERMINALS)
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0

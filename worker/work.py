"""The worker's process: runs the story of a job, and turns every ending into words the supervisor can pass on."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from jobs import durable, rundir
from worker import processes
from worker.failures import DiskFull, WorkerFailure
from worker.ranks import Ranks

_STOPPED = 128 + signal.SIGTERM
_GAVE_UP = 10
_PARENT_POLL_S = 1.0
_WORDS_MAX = 4000
"""Characters of a failure that travel home; the log has all of it."""


def begin(verb: str, words: list[str]) -> int:
    """Work on an attempt, assist in one, or check a job."""
    if verb == "check":
        return check(sys.stdin.buffer, sys.stdout.buffer)
    folder, *numbers = words
    return (main if verb == "work" else assist)(folder, *map(int, numbers))


def main(folder: str, number: int) -> int:
    """Work on attempt `number` of the run in `folder`; exit code 0 when everything asked for is done and durable."""
    run = rundir.Run(Path(folder))
    attempt = run.attempt(number)
    signal.signal(signal.SIGTERM, _stop)
    _follow_parent()
    job = durable.load_json(run.job)
    try:
        _story(job).work(run, attempt, job)
    except WorkerFailure as failure:
        return _give_up(run, attempt, failure)
    except OSError as error:
        if not durable.is_full(error):
            raise
        return _give_up(run, attempt, _disk_full(run))
    return 0


def assist(folder: str, number: int, rank: int) -> int:
    """Take part in attempt `number` as one of several processes; the one that started it says how, and writes."""
    order = json.load(sys.stdin.buffer)
    processes.die_with_parent(order["parent"])
    signal.signal(signal.SIGTERM, _stop)
    _follow_parent()
    run = rundir.Run(Path(folder))
    attempt = run.attempt(number)
    together = Ranks(rank, order["size"], attempt.folder / "ranks", order["wait_s"])
    try:
        _story(order["job"]).assist(run, order["job"], together)
    except WorkerFailure as failure:
        return _give_up(run, attempt, failure)
    return 0


def check(source: BinaryIO, out: BinaryIO) -> int:
    """Do everything a job does before it generates, and answer with what was found, as one JSON line."""
    job = json.load(source)
    try:
        answer = _story(job).check(job)
    except WorkerFailure as failure:
        answer = {"failed": _words(failure)}
    out.write(json.dumps(answer).encode() + b"\n")
    return 0


def _story(job: dict[str, Any]) -> Any:
    return importlib.import_module(f"worker.{job['story']}")


def _stop(*_: object) -> None:
    """End through every context manager, so that rows are synced: the first TERM only, a second must not break that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(_STOPPED)


def _give_up(run: rundir.Run, attempt: rundir.Attempt, failure: WorkerFailure) -> int:
    try:
        durable.save_json(attempt.failure, _words(failure))
    except OSError:
        run.reserve.unlink(missing_ok=True)
        durable.save_json(attempt.failure, _words(failure))
    with contextlib.suppress(OSError):  # the log may lie on the disk that is full
        print(failure.message, failure.hint, sep="\n", flush=True)  # noqa: T201
    return _GAVE_UP


def _words(failure: WorkerFailure) -> dict[str, str]:
    message, hint = (
        text if len(text) <= _WORDS_MAX else text[:_WORDS_MAX] + "…" for text in (failure.message, failure.hint)
    )
    return {"kind": failure.kind, "message": message, "hint": hint}


def _disk_full(run: rundir.Run) -> DiskFull:
    return DiskFull(
        f"No space is left on the disk that holds {run.folder}. Every row counted so far is safe.",
        "Free some space there, then resume the run.",
    )


def _follow_parent() -> None:
    """End when the supervisor ends, where the kernel cannot be asked to see to it (anywhere but Linux)."""
    if platform.system() == "Linux":
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent != 1:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()

"""Runs that several machines share, made of a light story that honours shares as an evaluation does."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import durable, rows, rundir, shares, spec
from orchestrator import agents, config, runs, tenancy
from orchestrator.providers.base import Need
from orchestrator.rentals import Caps
from orchestrator.renting import Wish
from orchestrator.runs import Record, Run
from orchestrator.shares import COVERED
from tests.journeys import hurried
from tests.rig import Sshd

STORY = '''
"""A story for tests: makes the rows of its share at a given pace, after settling what it resolved."""
import hashlib, os, sys, time
from jobs import durable, rows, shares
from worker.failures import ConfigFailure, OutOfExpectation
from worker.progress import Progress

def row(job, name, sample):
    digest = hashlib.sha256(f"{name} {sample}".encode()).hexdigest()
    return {"key": shares.row_key(job, name, sample), "error": None, "example_id": name, "sample_index": sample,
            "completion": digest, "answer": digest[:4], "target": digest[:4], "score": 1.0, "answers": {}, "scores": {},
            "tokens_in": 1, "tokens_out": 1, "finish_reason": "stop", "subject": None, "seed": int(digest[:8], 16),
            "at": "2026-01-01T00:00:00.000Z"}

def work(run, attempt, job):
    params = job["params"]
    progress = Progress(attempt.progress)
    progress.phase("starting")
    ids = [f"e{number}" for number in range(params["count"])]
    known = durable.load_json(run.resolved)
    if params.get("refuse"):
        raise ConfigFailure("the dataset is not one", "take another")
    while known is None and params.get("hold") and not os.path.exists(params["hold"]):
        time.sleep(0.05)
    if not run.examples.exists():
        durable.save_json(run.examples, {"ids": ids})
    if known is None:
        durable.save_json(run.resolved, {"fingerprint": "one", "identity": {}, "weights": [], "by": str(run.folder)})
    done = rows.Index()
    for path in run.row_files():
        rows.index(path, done)
    mine = shares.chosen(job, ids)
    todo = [(name, sample) for name in mine for sample in range(params["samples"])
            if not done.keys.get(shares.row_key(job, name, sample))]
    progress.expect(total=len(mine) * params["samples"], before=len(mine) * params["samples"] - len(todo))
    progress.phase("tallying")
    with rows.Appender(attempt.rows) as out:
        for made, (name, sample) in enumerate(todo):
            if params.get("unexpected_after") == made and params.get("expect"):
                raise OutOfExpectation("the score is not what was expected", "look")
            if params.get("crash_after") == made and mine[0] == "e0":
                sys.exit(7)
            out.append(row(job, name, sample))
            progress.rows(out.synced)
            print("row", name, sample, flush=True)
            if not os.path.exists(params["calm"]):
                time.sleep(params["pace_s"])
    progress.phase("done")
'''
WAITS = {"crew.PATIENCE_S": 2.0, "crew._HEARD_S": 0.5}
"""A machine that does not answer is given up within seconds: a test has no minutes."""
Make = Callable[..., Run]


def snapshot() -> str:
    """The name of a snapshot of the worker's code that has the story in it."""
    files = agents.sources() | {"worker/tallying.py": STORY.encode()}
    name = agents.digest(files)
    agents.write(files, config.state_folder() / "agents" / name)
    return name


def shared(boxes: list[str], count: int, *, pace_s: float = 0.0, samples: int = 1, **params: Any) -> Run:
    """A run of the story that these machines share; with one of them a run of its own."""
    record, job = _asked(count, pace_s=pace_s, samples=samples, **params)
    record.machine = boxes[0]
    if len(boxes) > 1:
        record.machines, record.boxes = len(boxes), list(boxes)
    return runs.create(record, job)


def rented(machines: int, caps: Caps, count: int, *, pace_s: float = 0.0, **params: Any) -> Run:
    """A run of the story for which so many machines are to be rented, and given back."""
    record, job = _asked(count, pace_s=pace_s, samples=1, **params)
    record.machine = tenancy.name_for(record.run_id)
    record.rents = tenancy.document(Wish(Need(gpu="A10", count=1), caps))
    record.machines, record.terminate = machines, True
    return runs.create(record, job)


def _asked(count: int, *, pace_s: float, samples: int, **params: Any) -> tuple[Record, dict[str, Any]]:
    run_id = runs.new_run_id("tallying", None)
    given = {"count": count, "pace_s": pace_s, "samples": samples, "split": "s", "model": "none", "expect": None}
    job = {"schema": spec.SCHEMA, "run_id": run_id, "job": "tallying", "story": "tallying", "task": "t"}
    job |= {"params": {**given, "calm": str(Path.cwd() / "calm"), **params}, "limit": None}
    return Record(run_id, "tallying", "local", snapshot(), sys.executable, str(Path.cwd()), "2026-01-01"), job


def gpu(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """What came of `gpu WORDS`."""
    return hurried.gpu(*words, waits={**WAITS, **how.pop("waits", {})}, **how)


def started(*words: str) -> subprocess.Popen[str]:
    """`gpu WORDS`, running."""
    return hurried.begun(*words, waits=WAITS)


def with_wait(command: subprocess.Popen[str], seconds: float) -> None:
    """Let a command run for so long, if it does."""
    deadline = time.monotonic() + seconds
    while command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def lines(path: Path) -> list[dict[str, Any]]:
    """Every row of a file, as often as it stands there."""
    return [rows.decode(line) for _, line in rows.whole_lines(path)]


def made_on(box: Sshd, run: Run) -> list[str]:
    """The keys of all rows that a machine has made of a run, as often as it has."""
    folders = (box.home / ".gpu" / "runs").glob(f"{run.run_id}*")
    attempts = [attempt for folder in sorted(folders) for attempt in rundir.Run(folder).attempts()]
    return [row["key"] for attempt in attempts for row in lines(attempt.rows)]


def essence(run: Run) -> list[tuple[str, ...]]:
    """What of each row must not depend on who made it, sorted; asserts that no key stands twice."""
    found = lines(run.home.rows)
    assert len(found) == len({row["key"] for row in found}), "a key stands twice"
    names = ("key", "completion", "answer", "answers", "score", "scores", "finish_reason", "tokens_in", "tokens_out")
    return sorted(tuple(repr(row[name]) for name in (*names, "seed")) for row in found)


def expected(count: int, samples: int = 1) -> list[tuple[str, str]]:
    """Key and completion of every row of the story, as one machine makes them."""
    pairs = [(f"e{number}", sample) for number in range(count) for sample in range(samples)]
    return sorted((f"t/s/{name}#{sample}", _digest(name, sample)) for name, sample in pairs)


def result(name: str) -> dict[str, Any]:
    """The row of an example, with all that a row has."""
    facts = {"answer": "4", "target": "4", "score": 1.0, "answers": {}, "scores": {}, "tokens_in": 1, "tokens_out": 1}
    known = {"example_id": name, "sample_index": 0, "completion": "4", "finish_reason": "stop", "subject": None}
    return {"key": f"t/s/{name}#0", "error": None, **known, **facts, "seed": 1, "at": "2026-01-01T00:00:00.000Z"}


def _digest(name: str, sample: int) -> str:
    return hashlib.sha256(f"{name} {sample}".encode()).hexdigest()


def assert_whole(run: Run, count: int, samples: int = 1) -> None:
    """The run is done: every row that one machine makes, the same, each once."""
    run.reload()
    assert run.record.state == "sealed", (run.record, [share.record for share in runs.shares(run)])
    found = lines(run.home.rows)
    assert sorted((row["key"], row["completion"]) for row in found) == expected(count, samples)
    assert (run.record.rows_home, run.record.rows_total) == (count * samples, count * samples)
    assert durable.load_json(run.home.summary)["n_rows"] == count * samples


def disjoint(run: Run) -> bool:
    """Whether no example belongs to two shares that are at work, or done, as far as their records say now.

    The newest is read first: a share is given to others only once its own record says that it has ended.
    """
    taken: list[str] = []
    ids = [f"e{number}" for number in range(run.job()["params"]["count"])]
    numbers = sorted((runs.number_of(path.parent.name) for path in run.home.parts.glob("*/run.json")), reverse=True)
    for number in numbers:
        share = runs.open_folder(run.home.parts / f"{run.run_id}.{number}")
        if share.record.state in COVERED:
            taken += shares.chosen(share.job(), ids)
    return len(taken) == len(set(taken))


def kill(box: Sshd, run: Run, who: str, number: int = signal.SIGKILL) -> None:
    """Signal the supervisor or the worker of the newest share on a machine."""
    for folder in sorted((box.home / ".gpu" / "runs").glob(f"{run.run_id}.*"))[-1:]:
        there = rundir.Run(folder)
        pids = durable.load_news(there.attempt(there.last_attempt()).pids) if there.last_attempt() else {}
        if who in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[who]["pid"], number)

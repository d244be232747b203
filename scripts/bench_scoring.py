"""Tasks that take long to score: how much sooner their runs end for scoring beside the engine, not in turns with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from bench_run import gpu_with
from figures import Figure, show

from jobs import durable, rows, rundir
from worker import tiny

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
JOBS = {
    "eval-humaneval": ["--limit", "10", "--set", "samples=10", "--set", "batch_size=4", "--set", "max_new_tokens=192"],
    "eval-math": ["--limit", "60", "--set", "samples=2", "--set", "batch_size=4", "--set", "max_new_tokens=192"],
}
IN_TURN = """


class _InTurn(Scoring):
    def __init__(self, make, keep, threads):
        self._make, self._keep = make, keep

    def put(self, *answer):
        self._keep(self._make(*answer))

    def __exit__(self, *_):
        pass


Scoring = _InTurn
"""
"""Goes to the end of the worker's story: it scores as it did before, while the engine waits."""


def main() -> Iterator[Figure | str]:
    """A figure for each job; both ways in turns, the same seeds and so the same rows."""
    trained = tiny.ensure(ROOT / "build" / "models", print)
    with tempfile.TemporaryDirectory(prefix="bench-scoring-", dir=ROOT / "build") as scratch, contextlib.chdir(scratch):
        machine = Path(scratch) / "state" / "machines" / "local"
        os.environ.update(GPU_HOME=str(Path(scratch) / "state"))
        shutil.copytree(trained, machine / "models" / trained.name)
        for job, words in JOBS.items():
            pairs = [
                (seconds("in-turn", job, words, machine), seconds("beside", job, words, machine)) for _ in range(ROUNDS)
            ]
            before_s, after_s = (statistics.median(each) for each in zip(*pairs, strict=True))
            said = f"{before_s:.1f} s in its turn, {after_s:.1f} s beside it; {ROUNDS} rounds"
            yield Figure(f"{job}, scored beside the engine", before_s / after_s, "times", said, at_least=1)


def seconds(way: str, job: str, words: list[str], machine: Path) -> float:
    """From the loaded model to the last row."""
    command = [sys.executable, str(Path(__file__).resolve()), way, "run", job, "-q", *words, "--set", "dtype=float64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    attempt = rundir.Run(machine / "runs" / done.stdout.split()[0]).attempt(1)
    times = [row["at"] for row in rows.read([attempt.rows])] + [durable.load_json(attempt.env)["generating_since"]]
    first, *_, last = sorted(map(datetime.fromisoformat, times))
    return (last - first).total_seconds()


if __name__ == "__main__":
    if sys.argv[1:2] in (["in-turn"], ["beside"]):
        gpu_with(IN_TURN if sys.argv.pop(1) == "in-turn" else "")
    sys.exit(show(main()))

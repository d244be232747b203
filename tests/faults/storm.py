"""Kills a run at random moments, again and again, and carries it on with `gpu resume` until it is sealed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jobs import durable, rows, rundir
from orchestrator import machines, runs
from orchestrator.runs import Run

GPU = [sys.executable, "-m", "orchestrator.cli"]
SAME = ("key", "completion", "answer", "answers", "score", "scores", "finish_reason", "tokens_in", "tokens_out", "seed")
"""What of a row must be the same in an interrupted and an uninterrupted run."""
_DEADLINE_S = 1800.0
_POLL_S = 0.01


@dataclass
class Storm:
    """A seeded series of kills of one run; `hits` counts what was killed."""

    words: list[str]
    total: int
    kills: int
    seed: int
    hits: Counter[str] = field(default_factory=Counter)

    def run(self) -> Run:
        """Start the run, kill it until all kills are spent, and carry it on to its end."""
        chance = random.Random(self.seed)
        goals = sorted(chance.randrange(self.total) for _ in range(self.kills))
        deadline = time.monotonic() + _DEADLINE_S
        command = self._start(["run", *self.words])
        found = self._found(command)
        while time.monotonic() < deadline:
            if command.poll() is not None:
                found.reload()
                if command.returncode == 0 and found.record.state == "sealed":
                    assert not goals, f"{len(goals)} kills were left when the run ended"
                    return found
                command = self._start(["resume", found.run_id])
            if goals and written(found) >= goals[0]:
                time.sleep(chance.random() * 0.3)
                self._kill(found, command, chance.choice(("worker", "supervisor", "laptop", "all")))
                goals.pop(0)
            time.sleep(_POLL_S)
        raise AssertionError("the run did not end in time")

    def _start(self, words: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*GPU, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _found(self, command: subprocess.Popen[bytes]) -> Run:
        """The run the command has made; known once its folder is remembered."""
        before = time.monotonic()
        while time.monotonic() < before + 60:
            with contextlib.suppress(StopIteration):
                return next(runs.remembered())
            assert command.poll() is None, "the command ended before it made a run"
            time.sleep(_POLL_S)
        raise AssertionError("no run was made")

    def _kill(self, run: Run, command: subprocess.Popen[bytes], victim: str) -> None:
        self.hits[victim] += 1
        if victim in ("laptop", "all"):
            command.kill()
            command.wait()
        attempts = on_machine(run).attempts()
        pids = durable.load_json(attempts[-1].pids) if attempts else None
        for name in ("supervisor", "worker"):
            if pids and victim in (name, "all"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[name]["pid"], signal.SIGKILL)


def on_machine(run: Run) -> rundir.Run:
    """The run's folder where it runs."""
    return rundir.Run(machines.this_computer().root / "runs" / run.run_id)


def written(run: Run) -> int:
    """How many rows all attempts have written so far."""
    return sum(
        attempt.rows.read_bytes().count(b"\n") for attempt in on_machine(run).attempts() if attempt.rows.exists()
    )


def essence(run: Run, same: tuple[str, ...] = SAME) -> Iterator[tuple[str, ...]]:
    """What must not depend on interruptions, of every final row, sorted; asserts that no key stands twice.

    Likelihoods are told to a millionth: they move in their last digits with the batch.
    """
    lines = [rows.decode(line) for _, line in rows.whole_lines(run.home.rows)]
    assert len(lines) == len({row["key"] for row in lines}), "a key stands twice"
    for row in sorted(lines, key=lambda row: row["key"]):
        yield tuple(repr(_rounded(row[name])) for name in same)


def _rounded(value: object) -> object:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


def uninterrupted(words: list[str]) -> Run:
    """The same run without kills, in another state folder."""
    done = subprocess.run([*GPU, "run", *words, "-q"], capture_output=True, text=True, check=False, timeout=_DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return runs.open_folder(Path("results") / done.stdout.split()[0])

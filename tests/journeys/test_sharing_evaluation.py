"""The main job on several machines at once: its rows, choices and numbers are those of one machine."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import rows
from orchestrator import runs
from orchestrator.runs import Run
from tests.conftest import free_copy
from tests.journeys.sharers import gpu, started
from tests.rig import Sshd
from tests.waiting import until

Box = Callable[..., Sshd]
EXACT = ("eval-gsm8k", "--set", "dtype=float64", "--set", "device=cpu", "--set", "reranker=rank.py:score")
SAME = ("key", "completion", "answer", "answers", "score", "scores", "finish_reason", "tokens_in", "tokens_out", "seed")
RANK = "def score(problem, candidates):\n    return [float(len(text)) for text in candidates]\n"


@pytest.fixture
def ready(box: Box, models: Path, trained: None) -> Callable[[str], Sshd]:
    """Makes machines that have the built-in model, as this computer has: nothing is trained."""

    def make(name: str) -> Sshd:
        made = box(name)
        (made.home / ".gpu").mkdir(exist_ok=True)
        free_copy(models, made.home / ".gpu" / "models")
        return made

    return make


def essence(run: Run) -> list[tuple[Any, ...]]:
    """What of each row and choice must not depend on who made it."""
    made = [rows.decode(line) for _, line in rows.whole_lines(run.home.rows)]
    chosen = [rows.decode(line) for _, line in rows.whole_lines(run.home.selections)]
    assert len(made) == len({row["key"] for row in made})
    assert len(chosen) == len({row["key"] for row in chosen})
    named = [tuple(repr(row[name]) for name in SAME) for row in made]
    return sorted(named) + sorted((row["key"], row["sample_index"], repr(row["scores"])) for row in chosen)


def alone(*words: str) -> Run:
    """The same on this computer, undisturbed."""
    done = gpu("run", *EXACT, *words, "--on", "local", "-q", timeout=280)
    assert done.returncode == 0, done.stderr
    return runs.find(done.stdout.split()[0])


def numbers(run: Run) -> dict[str, Any]:
    """What the summary counts."""
    found = json.loads(run.home.summary.read_text())
    return {name: found[name] for name in ("n_examples", "n_rows", "scored", "metrics", "selection", "fingerprint")}


@pytest.mark.slow
def test_two_machines_evaluate_as_one(ready: Callable[[str], Sshd]) -> None:
    """Rows, the re-ranker's choices, every number and the fingerprint are those of a run of one machine."""
    Path("rank.py").write_text(RANK)
    for name in ("a", "b"):
        ready(name)
    done = gpu("run", *EXACT, "--limit", "7", "--on", "a", "--on", "b", timeout=200)
    assert done.returncode == 0, done.stderr
    run, one = runs.find(None), alone("--limit", "7")
    assert essence(run) == essence(one)
    assert numbers(run) == numbers(one)
    assert len(runs.shares(run)) == 2
    assert [run.home.summary.exists(), run.home.report.exists()] == [True, True]


@pytest.mark.slow
def test_two_machines_make_a_baseline_as_one(ready: Callable[[str], Sshd]) -> None:
    """Five parts divided among two machines: every row once, the numbers and the noise of one machine, and frozen."""
    for name in ("a", "b"):
        ready(name)
    words = ("baseline", "--set", "dtype=float64", "--set", "device=cpu", "--set", "noise=3", "--limit", "4")
    done = gpu("run", *words, "--on", "a", "--on", "b", timeout=280)
    assert done.returncode == 0, done.stderr
    run = runs.find(None)
    calm = gpu("run", *words, "--on", "local", "-q", timeout=280)
    assert calm.returncode == 0, calm.stderr
    one = runs.find(calm.stdout.split()[0])
    found, whole = (json.loads(each.home.summary.read_text()) for each in (run, one))
    assert len(runs.shares(run)) == 2
    assert [rows.index(each.home.rows).good for each in (run, one)] == [20, 20]
    assert {row["key"] for row in rows.read([run.home.rows])} == {row["key"] for row in rows.read([one.home.rows])}
    assert found["fingerprint"] == whole["fingerprint"]
    for name, entry in whole["metrics"].items():
        assert found["metrics"][name]["value"] == pytest.approx(entry["value"]), name
    assert found["noise"]["n"] == whole["noise"]["n"] == 15
    assert found["frozen"]["changed"] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lost", list(itertools.combinations(range(4), 2)), ids=str)
def test_four_machines_evaluate_as_one_any_two_of_them_lost(
    ready: Callable[[str], Sshd], lost: tuple[int, int]
) -> None:
    """Whichever two of four machines go down in the midst of it, the evaluation is that of one machine."""
    Path("rank.py").write_text(RANK)
    boxes = [ready(name) for name in "abcd"]
    on = [word for name in "abcd" for word in ("--on", name)]
    command = started("run", *EXACT, "--limit", "120", "--set", "batch_size=4", *on)
    for at, number in enumerate(lost):
        until(lambda at=at: home() >= 60 + 60 * at or command.poll() is not None, 200)
        boxes[number].power_off()
    try:
        _, said = command.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        command.kill()
        raise
    assert command.returncode == 0, said
    assert essence(runs.find(None)) == essence(alone("--limit", "120"))


def home() -> int:
    """How many rows of the only run are home."""
    found = list(runs.remembered())
    return rows.index(found[0].home.rows).good if found else 0

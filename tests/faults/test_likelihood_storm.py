"""Tasks that weigh choices and read texts, killed at random moments: their rows are those of an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import durable
from orchestrator import runs
from orchestrator.runs import Run
from tests.faults import storm

ROWS, KILLS = 500, 2
BEFORE = 150
"""All kills come before so many rows: a run must not end before them."""
CHOSEN = ("key", "subject", "prompt", "choices", "logliks", "answers", "scores", "score", "target", "tokens_in")
READ = ("key", "subject", "prompt", "loglik", "tokens", "words", "bytes", "score", "tokens_in")
JOBS = {"eval-mmlu": CHOSEN, "eval-arc": CHOSEN, "eval-hellaswag": CHOSEN, "eval-perplexity": READ}


def numbers(run: Run) -> dict[str, float]:
    """The metrics as the summary has them, to a millionth."""
    return {name: round(entry["value"], 6) for name, entry in durable.load_json(run.home.summary)["metrics"].items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", JOBS)
def test_a_killed_run_ends_as_if_nothing_had_happened(trained: None, job: str) -> None:
    """Worker, supervisor, laptop or all are killed twice: rows and metrics stay the same, each row once."""
    words = [job, "--set", "dtype=float64", "--set", "device=cpu", "--set", "batch_size=1"]
    calm = storm.uninterrupted(words)
    other = Path("results").rename("calm")
    calm = runs.open_folder(other / calm.run_id)
    (runs.config.state_folder() / "runs").rename("calm-book")
    series = storm.Storm(words, BEFORE, KILLS, seed=7)
    found = series.run()
    assert sum(series.hits.values()) == KILLS
    assert found.record.rows_home == ROWS
    assert list(storm.essence(found, JOBS[job])) == list(storm.essence(calm, JOBS[job]))
    assert numbers(found) == numbers(calm)

"""The main job under fire: killed at random moments, its final rows are those of an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import data_folder
from tests.faults import storm

EXACT = ["eval-gsm8k", "--set", "dtype=float64", "--set", "device=cpu"]


def assert_same(words: list[str], total: int, kills: int, seed: int) -> None:
    expected = storm.uninterrupted(words)
    other = Path("results").rename("calm")
    expected = storm.runs.open_folder(other / expected.run_id)
    (storm.runs.config.state_folder() / "runs").rename("calm-book")
    series = storm.Storm(words, total, kills, seed)
    found = series.run()
    assert sum(series.hits.values()) == kills
    assert list(storm.essence(found)) == list(storm.essence(expected))
    assert found.record.rows_home == total


def test_a_killed_evaluation_ends_as_if_nothing_had_happened(trained: None) -> None:
    """Worker, supervisor, laptop or all killed at 4 random moments: rows stay the same, each once."""
    assert_same([*EXACT, "--limit", "60"], total=300, kills=4, seed=20)


@pytest.mark.parametrize(
    ("job", "total"),
    [
        ("eval-prompts", 100),
        pytest.param("eval-math", 100, marks=pytest.mark.slow),
        pytest.param("eval-humaneval", 60, marks=pytest.mark.slow),
        pytest.param("eval-generation", 80, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_every_job_that_grades_what_was_generated_can_be_killed(trained: None, job: str, total: int) -> None:
    """Killed at 2 random moments, each such job ends with the rows of a run that was left alone."""
    samples = {"eval-math": 5, "eval-humaneval": 20, "eval-generation": 5, "eval-prompts": 20}[job]
    words = [job, *EXACT[1:], "--set", f"samples={samples}", "--set", "temperature=0.7", "--limit", "20"]
    assert_same(words, total=total, kills=2, seed=5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_kills_on_generated_problems(trained: None, seed: int) -> None:
    """24 kills over all 500 generated problems, 5 samples each, change nothing in any row."""
    assert_same(EXACT, total=2500, kills=24, seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_on_all_of_gsm8k(trained: None) -> None:
    """24 kills over the 1,319 real test problems, 5 samples each, change nothing in any row."""
    path = data_folder("gsm8k") / "test.jsonl"
    words = [*EXACT, "--set", f"dataset={path}", "--set", "max_new_tokens=64"]
    assert_same(words, total=6595, kills=24, seed=3)

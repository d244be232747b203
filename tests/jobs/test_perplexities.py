"""Perplexities of texts that were read: rows without a score that are whole all the same."""

from __future__ import annotations

import random
from math import exp, isclose, log
from typing import Any

import pytest

from jobs import metrics, perplexities


def row(name: str, loglik: float | None, tokens: int = 10, error: str | None = None) -> dict[str, Any]:
    """A row of a text that was read, four tokens a word and two bytes a token."""
    counts = {"tokens": tokens, "words": tokens / 4, "bytes": 2 * tokens}
    return {"example_id": name, "sample_index": 0, "error": error, "score": None, "loglik": loglik, **counts}


def test_all_likelihood_is_divided_by_all_units() -> None:
    """A text counts by its length; the four metrics are those of the formulas, and nothing is left to select."""
    found = metrics.summarise([row("a", -20.0, 10), row("b", -60.0, 20)])
    values = {name: entry["value"] for name, entry in found["metrics"].items()}
    assert list(values) == ["token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"]
    assert isclose(values["token_perplexity"], exp(80 / 30))
    assert isclose(values["word_perplexity"], exp(80 / 7.5))
    assert isclose(values["byte_perplexity"], exp(80 / 60))
    assert isclose(values["bits_per_byte"], 80 / 60 / log(2))
    assert found["selection"] == {}


def test_a_text_without_score_is_whole_and_one_with_an_error_is_not() -> None:
    """What was read counts as scored though its score is null; an error counts as unscored, and in no perplexity."""
    found = metrics.summarise([row("a", -20.0), row("b", None, error="too large"), row("c", -20.0, error="odd")])
    assert (found["n_rows"], found["scored"], found["unscored"], found["unscored_examples"]) == (3, 1, 2, 2)
    assert found["metrics"]["token_perplexity"]["n"] == 1
    assert found["metrics"]["token_perplexity"]["stderr"] is None


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 0, -3, 10**400, 1e-300])
def test_numbers_that_cannot_be_are_no_reading(value: Any) -> None:
    """A machine may send anything: a count that is none, or no more than nothing, makes a row unscored."""
    assert perplexities.reading({**row("a", -1.0), "tokens": value}) is None
    assert metrics.summarise([{**row("a", -1.0), "tokens": value}])["unscored"] == 1


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Over 1,000 simulated sets of 40 texts of uneven length, 92 to 98 in 100 intervals contain the true perplexity."""
    dice = random.Random(3)
    hits = 0
    for _ in range(1000):
        lengths = [dice.randrange(5, 200) for _ in range(40)]
        rows = [row(str(n), sum(dice.gauss(-2.0, 1.0) for _ in range(size)), size) for n, size in enumerate(lengths)]
        low, high = metrics.summarise(rows)["metrics"]["token_perplexity"]["ci95"]
        hits += low <= exp(2.0) <= high
    assert 0.92 <= hits / 1000 <= 0.98


def test_subjects_count_alike_in_the_macro_average() -> None:
    """`micro` counts examples alike, `macro` subjects; a run of one subject has neither."""
    rows = [
        {"example_id": f"{n}", "sample_index": 0, "error": None, "score": score, "scores": {}, "subject": subject}
        for n, (subject, score) in enumerate([("a", 1.0)] * 6 + [("b", 0.0)] * 2)
    ]
    found = metrics.summarise(rows)["metrics"]
    assert (found["micro"]["value"], found["macro"]["value"]) == (0.75, 0.5)
    assert (found["micro"]["n"], found["macro"]["n"]) == (8, 8)
    assert "macro" not in metrics.summarise(rows[:6])["metrics"]

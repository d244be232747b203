"""The noise of a run, from the rows that were made twice."""

from __future__ import annotations

from math import log
from typing import Any

import pytest

from jobs import flips


def row(key: str, score: float | None, said: str = "a", error: str | None = None) -> dict[str, Any]:
    """A row of a completion."""
    return {"key": key, "score": score, "completion": said, "error": error, "batch_size": 4}


def test_flips_and_changed_answers_are_counted() -> None:
    """A score that moved is a flip, another text a change; rows that failed, or were made once, are not compared."""
    first = [row("a", 1.0), row("b", 1.0), row("c", 0.0), row("d", None, error="x"), row("e", 1.0), row("f", 0.5)]
    second = [row("a", 0.0, "b"), row("b", 1.0, "b"), row("c", 0.0), row("d", 1.0), row("e", None, error="x")]
    second += [row("f", 0.75)]
    found = flips.summarise(first, second)
    assert found == {"n": 4, "flips": 2, "changed": 2, "squares": 1.0625, "batch_size": 4}
    assert flips.summarise(first, []) is None
    assert flips.total([found, found]) == {"n": 8, "flips": 4, "changed": 4}


def test_likelihoods_of_texts_flip_beyond_their_last_digits() -> None:
    """A text's bits per byte that move in the last digits are the same; what moves more is noise of that size."""
    text = {"error": None, "score": None, "tokens": 5, "words": 3, "bytes": 10, "key": "a"}
    same, moved = (
        flips.summarise([{**text, "loglik": -20.0}], [{**text, "loglik": -20.0 - by}]) for by in (1e-7, 0.01)
    )
    assert same is not None
    assert moved is not None
    assert (same["flips"], same["squares"], moved["flips"]) == (0, 0.0, 1)
    assert moved["squares"] == pytest.approx((0.01 / log(2) / 10) ** 2)

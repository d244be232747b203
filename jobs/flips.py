"""What measuring the noise of a run came to: how many scores and answers changed when the same was asked again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import fsum
from typing import Any

from jobs import perplexities

_SAME = 1e-9
"""Scores closer than this are one score."""
_SAME_RATE = 1e-6
"""Likelihoods of a text, in bits for each byte, closer than this are one: the last digits move with every batch."""


def summarise(first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The `noise` of summary.json from final rows and those that were made again; None where none was.

    `n` rows were compared, `flips` of them scored otherwise, `changed` gave another answer; `squares` is the sum of the
    squared differences of the scores (of texts that were read: of their bits per byte), which the noise floor is of.
    """
    again = {str(row.get("key")): row for row in second if row.get("error") is None}
    if not again:
        return None
    pairs = [(row, again[str(row.get("key"))]) for row in first if str(row.get("key")) in again]
    told = [(row, other) for row, other in pairs if _number(row) is not None and _number(other) is not None]
    moved = [_moved(row, other) for row, other in told]
    return {
        "n": len(told),
        "flips": sum(abs(each) > 0 for each in moved),
        "changed": sum(_answer(row) != _answer(other) for row, other in told),
        "squares": fsum(each * each for each in moved),
        "batch_size": next(iter(again.values())).get("batch_size"),
    }


def total(found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The noise of several parts together, as far as it can be added up."""
    noises = list(found)
    return {name: sum(noise[name] for noise in noises) for name in ("n", "flips", "changed")}


def _moved(row: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far apart the numbers of two rows are; 0 where that is no more than arithmetic's last digits."""
    difference = (_number(other) or 0.0) - (_number(row) or 0.0)
    return 0.0 if abs(difference) <= (_SAME if row.get("score") is not None else _SAME_RATE) else difference


def _number(row: Mapping[str, Any]) -> float | None:
    """What a row is measured by: its score, or the bits that a byte of its text takes."""
    if row.get("error") is not None:
        return None
    read = perplexities.reading(row)
    if read is not None:
        return read.bits_per_byte
    score = row.get("score")
    return float(score) if isinstance(score, (int, float)) else None


def _answer(row: Mapping[str, Any]) -> Any:
    """The text of a completion, or the choice that was taken; None of a text that was read."""
    return row.get("completion") if row.get("completion") is not None else row.get("prediction")

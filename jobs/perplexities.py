"""Perplexities of texts that were read, from their rows: by token, word and byte, and bits per byte.

A row of a text that was read has `loglik`, `tokens`, `words` and `bytes`, and `score` is null without an error: there
is nothing to be right about. Such a row is whole. It counts as scored, and it is final like any row without error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, fsum, inf, log, sqrt
from typing import Any, NamedTuple

_MOST = 1e15
"""No number of a text is larger; what is counted is at least 1. A machine may send anything."""


class Reading(NamedTuple):
    """What a row says of its text: the log-likelihood (natural), and what the text consists of."""

    loglik: float
    tokens: float
    words: float
    bytes: float

    @property
    def bits_per_byte(self) -> float:
        """How many bits the model takes for a byte of this text; less is better."""
        return -self.loglik / log(2) / self.bytes


def reading(row: Mapping[str, Any]) -> Reading | None:
    """What a row says of a text that was read; None for any other row, and for one whose numbers cannot be."""
    values = [row.get(name) for name in Reading._fields]
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if row.get("error") is not None or len(numbers) < len(values) or not all(abs(each) < _MOST for each in numbers):
        return None
    return Reading(*numbers) if min(numbers[1:]) >= 1 else None


def entries(found: Sequence[Reading], student_t_95: Callable[[int], float]) -> dict[str, dict[str, Any]]:
    """Every metric of these texts, as an entry of summary.json: all likelihood over all tokens, words or bytes.

    A text counts by its length, as in lm-evaluation-harness. Standard errors are those of a ratio over texts, carried
    to the perplexity by its slope; intervals are Student's t of the logarithm. One text alone has neither.
    """
    if not found:
        return {}
    per_token, per_word, per_byte = (_rate(found, unit) for unit in (1, 2, 3))
    spread = student_t_95(len(found) - 1) if len(found) > 1 else inf

    def entry(rate: tuple[float, float | None], shown: Callable[[float], float], slope: float | None) -> dict[str, Any]:
        value, error = shown(rate[0]), rate[1]
        if error is None:
            return {"value": value, "stderr": None, "ci95": [None, None], "n": len(found)}
        ends = [shown(rate[0] - spread * error), shown(rate[0] + spread * error)]
        return {"value": value, "stderr": error * (slope or value), "ci95": ends, "n": len(found)}

    return {
        "token_perplexity": entry(per_token, _exp, None),
        "word_perplexity": entry(per_word, _exp, None),
        "byte_perplexity": entry(per_byte, _exp, None),
        "bits_per_byte": entry(per_byte, lambda nats: nats / log(2), 1 / log(2)),
    }


def _rate(found: Sequence[Reading], unit: int) -> tuple[float, float | None]:
    """Nats per unit over all texts, and the standard error of that ratio."""
    units, n = fsum(text[unit] for text in found), len(found)
    rate = fsum(-text.loglik for text in found) / units
    if n < 2:
        return rate, None
    squares = fsum((-text.loglik - rate * text[unit]) ** 2 for text in found)
    return rate, sqrt(squares * n / (n - 1)) / units


def _exp(nats: float) -> float:
    """The exponential, as large as JSON can say."""
    return exp(min(nats, 709.0))

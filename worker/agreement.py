"""Whether two ways of evaluating agree, item by item: prompts, answers, scores and log-likelihoods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LOGLIK_MOST = 1e-3
"""Nats that a choice's log-likelihoods may lie apart where numbers have 32 bits or more."""
NOTHING_FOUND = "[invalid]"
"""What the harness calls an answer that its pattern did not find."""


@dataclass(frozen=True)
class Compared:
    """One example, by both."""

    example_id: str
    same: dict[str, bool]
    """Of `prompt`, `answer`, `score`, `loglik` and `text`, those there are to compare."""
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    apart: float | None = None
    """The most that two log-likelihoods of it differ by, in nats."""

    @property
    def agrees(self) -> bool:
        """Whether all that counts is the same; a text may differ where the same answers are found in it."""
        return all(same for name, same in self.same.items() if name != "text")


def chosen(row: Mapping[str, Any], item: Mapping[str, Any], rules: Sequence[str], most: float = math.inf) -> Compared:
    """An example whose choices were weighed; `rules` are those that both have."""
    logliks = [float(each[0]) for each in item["found"]]
    theirs = {
        "answer": max(range(len(logliks)), key=logliks.__getitem__),
        "scores": {rule: float(item["scores"][rule]) for rule in rules},
        "logliks": logliks,
    }
    if row.get("error") is not None:
        return Compared(str(row["example_id"]), {"answer": False, "score": False}, {"error": row["error"]}, theirs)
    given = list(row["logliks"])
    apart = max(abs(one - other) for one, other in zip(given, logliks, strict=True))
    scores = {rule: float(row["scores"][rule]) for rule in rules}
    asked = [[row["prompt"], f" {choice}"] for choice in row["choices"]]
    same = {
        "prompt": [each[:2] for each in item["asked"]] == asked,
        "answer": row["prediction"] == theirs["answer"],
        "score": scores == theirs["scores"],
        "loglik": apart <= most,
    }
    ours = {"answer": row["prediction"], "scores": scores, "logliks": given}
    return Compared(str(row["example_id"]), same, ours, theirs, apart)


def generated(
    row: Mapping[str, Any], items: Mapping[str, Mapping[str, Any]], rules: Mapping[str, str], prompt: str
) -> Compared:
    """An example whose completion was scored; `items` are the harness's by filter, `rules` our name of each filter."""
    first = next(iter(items.values()))
    theirs = {
        "text": first["said"][0][0],
        "answers": {rules[name]: str(item["found"][0]) for name, item in items.items()},
        "scores": {rules[name]: float(item["scores"]["exact_match"]) for name, item in items.items()},
    }
    if row.get("error") is not None:
        return Compared(str(row["example_id"]), {"answer": False, "score": False}, {"error": row["error"]}, theirs)
    ours = {
        "text": row["completion"],
        "answers": {rule: row["answers"][rule] or NOTHING_FOUND for rule in rules.values()},
        "scores": {rule: float(row["scores"][rule]) for rule in rules.values()},
    }
    same = {
        "prompt": first["asked"][0][0] == prompt,
        "answer": ours["answers"] == theirs["answers"],
        "score": ours["scores"] == theirs["scores"],
        "text": ours["text"] == theirs["text"],
    }
    return Compared(str(row["example_id"]), same, ours, theirs)


def document(found: Sequence[Compared]) -> dict[str, Any]:
    """The counts, and every example that does not agree, or is not the same text."""
    apart = [each.apart for each in found if each.apart is not None]
    named = dict.fromkeys(name for each in found for name in each.same)
    return {
        "n": len(found),
        "agree": all(each.agrees for each in found),
        "same": {name: sum(each.same.get(name, False) for each in found) for name in named},
        "max_loglik_difference": max(apart, default=None),
        "disagreements": [
            {"example_id": each.example_id, "differs": differs, "ours": each.ours, "theirs": each.theirs}
            for each in found
            if (differs := [name for name, same in each.same.items() if not same])
        ],
    }

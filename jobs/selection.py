"""Best of n: what each way of picking one of an example's samples scores, from rows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import comb
from typing import Any, NamedTuple

from jobs import perplexities
from jobs.perplexities import Reading

PASS_AT = tuple(digit * 10**zeros for zeros in range(5) for digit in (1, 2, 5))
"""The k of pass@k that are reported, as far as an example has that many samples."""


class Candidate(NamedTuple):
    """What counting needs of one row; its texts are left out."""

    sample_index: int
    answer: str | None
    score: float | None
    scores: tuple[float | None, ...] = ()
    """By rule, in the order of `Examples.rules`; shorter where a rule was first seen in a later row."""
    finish_reason: str | None = None
    generated: bool = False
    failed: bool = False
    reading: Reading | None = None
    """Of a text that was read: it has a likelihood in place of a score."""

    @property
    def is_whole(self) -> bool:
        """Whether there is what the row is to have: a score, or a likelihood."""
        return self.score is not None or self.reading is not None


@dataclass
class Group:
    """One example's candidates by sample index, and the subject and level it is counted under."""

    subject: str | None = None
    level: str | None = None
    candidates: dict[int, Candidate] = field(default_factory=dict)

    def has_whole(self) -> bool:
        """Whether any candidate has what it is to have."""
        return any(candidate.is_whole for candidate in self.candidates.values())

    def scored(self) -> list[Candidate]:
        """The candidates that have a score, lowest sample index first."""
        return [self.candidates[index] for index in sorted(self.candidates) if self.candidates[index].score is not None]


@dataclass
class Examples:
    """Rows grouped by example, in the order in which the examples first come."""

    groups: dict[str, Group] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row in. Of a sample's rows the first without error is final; a row with an error has no score."""
        group = self.groups.get(row["example_id"])
        if group is None:
            group = self.groups[row["example_id"]] = Group(row.get("subject"), row.get("level"))
        known = group.candidates.get(row["sample_index"])
        failed = row.get("error") is not None
        if known is not None and (failed or not known.failed):
            return
        scores = row.get("scores") or {}
        self.rules += [rule for rule in scores if rule not in self.rules]
        group.candidates[row["sample_index"]] = Candidate(
            sample_index=row["sample_index"],
            answer=row.get("answer"),
            score=None if failed else row.get("score"),
            scores=() if failed else tuple([scores.get(rule) for rule in self.rules]),
            finish_reason=row.get("finish_reason"),
            generated=not failed and row.get("completion") is not None,
            failed=failed,
            reading=perplexities.reading(row),
        )

    def scored(self) -> dict[str, list[Candidate]]:
        """Every example's scored candidates; examples of which nothing was scored are left out."""
        found = {example_id: group.scored() for example_id, group in self.groups.items()}
        return {example_id: candidates for example_id, candidates in found.items() if candidates}


def group(rows: Iterable[Mapping[str, Any]], rules: Sequence[str] = ()) -> Examples:
    """The rows grouped by example, in one pass that keeps no texts; rules not named are taken from the rows."""
    examples = Examples(rules=list(rules))
    for row in rows:
        examples.add(row)
    return examples


# Each selector takes an example's scored candidates (at least one, any order) and gives a value between 0 and 1.


def first(candidates: Sequence[Candidate]) -> float:
    """The score of the sample with the lowest index among those scored."""
    return _score(min(candidates, key=_index))


def mean(candidates: Sequence[Candidate]) -> float:
    """The expected score of a sample drawn at random."""
    return sum(map(_score, candidates)) / len(candidates)


def majority(candidates: Sequence[Candidate]) -> float:
    """The expected score of the answer given most often, ties broken at random; 0.0 when no sample has an answer.

    Samples without an answer do not vote. No tie is broken by order, so the value does not depend on it.
    """
    votes = Counter(candidate.answer for candidate in candidates if candidate.answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    # Tied answers have equally many votes, so their mean is the mean over all samples that voted for one of them.
    return mean([each for each in candidates if each.answer is not None and votes[each.answer] == most])


def oracle(candidates: Sequence[Candidate]) -> float:
    """The best score among the samples: what a perfect re-ranker would reach."""
    return max(map(_score, candidates))


SELECTORS: dict[str, Callable[[Sequence[Candidate]], float]] = {
    "first": first,
    "mean": mean,
    "majority": majority,
    "oracle": oracle,
}


def chosen(candidates: Sequence[Candidate], sample_index: int | None) -> float | None:
    """The score of the sample a re-ranker took; None where it took none, or one that has no score."""
    return next((each.score for each in candidates if each.sample_index == sample_index), None)


def pass_at(candidates: Sequence[Candidate], k: int) -> float | None:
    """The chance that of k samples drawn without replacement one scores 1.0; None with fewer than k samples."""
    if k > len(candidates):
        return None
    return pass_at_k(len(candidates), sum(candidate.score == 1.0 for candidate in candidates), k)


@lru_cache(maxsize=4096)
def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - correct, k) / C(n, k) of Chen et al. 2021 (arXiv:2107.03374)."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def _index(candidate: Candidate) -> int:
    return candidate.sample_index


def _score(candidate: Candidate) -> float:
    if candidate.score is None:
        raise ValueError(f"sample {candidate.sample_index} has no score")
    return candidate.score

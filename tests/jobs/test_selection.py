"""Ways of picking one of n samples: their values, their order, and what unscored rows do to them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from math import isclose
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import selection
from jobs.selection import Candidate


def candidates(*pairs: tuple[str | None, float]) -> list[Candidate]:
    """Candidates with these answers and scores, numbered in order."""
    return [Candidate(index, answer, score) for index, (answer, score) in enumerate(pairs)]


def row(example: str, sample: int, score: float | None, **more: Any) -> dict[str, Any]:
    """A row as far as counting looks at it."""
    return {"example_id": example, "sample_index": sample, "score": score, "error": None, "answer": "1", **more}


pairs = st.tuples(st.sampled_from(["1", "2", "3", None]), st.floats(0, 1))
any_candidates = st.lists(pairs, min_size=1, max_size=12).map(lambda drawn: candidates(*drawn))
right_or_wrong = st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=12).map(
    lambda answers: candidates(*((answer, float(answer == "1")) for answer in answers))
)


def test_each_selector_on_one_example() -> None:
    """With answers 7 7 8 9 9, of which 9 is right, each way gives what one can work out by hand."""
    five = candidates(("7", 0.0), ("7", 0.0), ("8", 0.0), ("9", 1.0), ("9", 1.0))
    values = {name: pick(five) for name, pick in selection.SELECTORS.items()}
    assert values == {"first": 0.0, "mean": 0.4, "majority": 0.5, "oracle": 1.0}
    assert selection.chosen(five, 3) == 1.0
    assert selection.chosen(five, 0) == 0.0


def test_no_vote_counts_as_wrong_and_none_never_wins() -> None:
    """Samples without an answer do not vote; an example without any vote has a majority of 0.0."""
    assert selection.majority(candidates((None, 0.0), (None, 0.0), ("9", 1.0))) == 1.0
    assert selection.majority(candidates((None, 0.0), (None, 0.0))) == 0.0


@given(any_candidates)
def test_majority_is_the_expectation_over_ways_to_break_ties(drawn: list[Candidate]) -> None:
    """The value is the average over every order in which a first-come vote could meet the tied answers."""
    answers = sorted({each.answer for each in drawn if each.answer is not None})
    outcomes = []
    for order in itertools.permutations(answers) if answers else ():
        votes = Counter(each.answer for each in drawn)
        winner = max(order, key=lambda answer: votes[answer])  # the first of equals, as a plain vote takes it
        of_winner = [each.score for each in drawn if each.answer == winner]
        outcomes.append(sum(score or 0.0 for score in of_winner) / len(of_winner))
    expected = sum(outcomes) / len(outcomes) if answers else 0.0
    assert isclose(selection.majority(drawn), expected, abs_tol=1e-12)


@given(any_candidates, st.randoms(use_true_random=False))
def test_order_of_rows_changes_nothing(drawn: list[Candidate], source: random.Random) -> None:
    """Every selector gives the same value for the same candidates in any order."""
    shuffled = drawn.copy()
    source.shuffle(shuffled)
    for pick in selection.SELECTORS.values():
        assert isclose(pick(shuffled), pick(drawn), abs_tol=1e-12)


@given(any_candidates)
def test_nothing_beats_the_oracle(drawn: list[Candidate]) -> None:
    """Every way of picking lies between the worst sample, or 0.0, and the oracle."""
    best = selection.oracle(drawn)
    for pick in selection.SELECTORS.values():
        assert 0.0 <= pick(drawn) <= best + 1e-12
    assert all((selection.chosen(drawn, each.sample_index) or 0.0) <= best for each in drawn)


@given(right_or_wrong)
def test_pass_at_k_joins_mean_and_oracle(drawn: list[Candidate]) -> None:
    """With scores of 0 and 1, pass@1 is the mean, pass@n the oracle, and it never falls as k grows."""
    chances = [selection.pass_at(drawn, k) for k in range(1, len(drawn) + 1)]
    assert isclose(chances[0] or 0.0, selection.mean(drawn), abs_tol=1e-12)
    assert chances[-1] == selection.oracle(drawn)
    assert chances == sorted(chances, key=lambda chance: chance or 0.0)
    assert selection.pass_at(drawn, len(drawn) + 1) is None


@given(right_or_wrong, st.integers(1, 4))
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(drawn: list[Candidate], k: int) -> None:
    """pass@k is the share of all k-subsets of the samples in which one is right."""
    subsets = list(itertools.combinations(drawn, k))
    if subsets:
        hits = sum(any(each.score == 1.0 for each in subset) for subset in subsets)
        assert isclose(selection.pass_at(drawn, k) or 0.0, hits / len(subsets), abs_tol=1e-12)


def test_pass_at_k_agrees_with_published_values() -> None:
    """With 2 of 5 right, pass@1, pass@2 and pass@5 are 0.4, 0.7 and 1.0, not 1 - (1 - p)^k."""
    assert [round(selection.pass_at_k(5, 2, k), 12) for k in (1, 2, 5)] == [0.4, 0.7, 1.0]


def test_unscored_rows_are_left_out_and_an_example_of_them_too() -> None:
    """A row with an error or without a score counts for nothing; an example of such rows has no candidates."""
    examples = selection.group(
        [
            row("a", 0, None, error="out of memory"),
            row("a", 1, 1.0),
            row("b", 0, None, error="out of memory"),
            row("c", 0, None),
            row("d", 0, 1.0, error="an error is never a score"),
        ]
    )
    assert {name: [each.sample_index for each in found] for name, found in examples.scored().items()} == {"a": [1]}
    assert list(examples.groups) == ["a", "b", "c", "d"]


def test_the_first_row_without_error_is_final() -> None:
    """Of a sample's several rows the first without error counts, whatever came before or after it."""
    rows = [row("a", 0, None, error="x"), row("a", 0, 1.0), row("a", 0, 0.0), row("a", 0, None, error="y")]
    assert [each.score for each in selection.group(rows).scored()["a"]] == [1.0]
    assert selection.group(rows[:1]).scored() == {}


def test_a_re_rankers_choice_may_be_missing() -> None:
    """No choice, or the choice of a sample that was not scored, has no value."""
    (found,) = selection.group([row("a", 0, 1.0), row("a", 1, None, error="x")]).scored().values()
    assert [selection.chosen(found, index) for index in (0, 1, None)] == [1.0, None, None]


def test_first_is_the_lowest_index_scored() -> None:
    """`first` follows sample indexes, not the order of rows, and passes over samples that were not scored."""
    rows = [row("a", 2, 0.0), row("a", 1, 1.0), row("a", 0, None, error="x")]
    assert selection.first(selection.group(rows).scored()["a"]) == 1.0


def test_a_candidate_without_score_is_refused() -> None:
    """A selector given an unscored candidate raises rather than count it as wrong."""
    with pytest.raises(ValueError, match="sample 0 has no score"):
        selection.mean([Candidate(0, "1", None)])

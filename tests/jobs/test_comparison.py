"""Paired comparisons: exact tests against values worked out otherwise, and what must hold of any two runs."""

from __future__ import annotations

import itertools
from math import isclose, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import comparison

SCORES = st.dictionaries(st.sampled_from("abcdefghij"), st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1)
BINARY = st.dictionaries(st.sampled_from("abcdefghij"), st.sampled_from([0.0, 1.0]), min_size=1)


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 0.03125), (15, 5, 0.0413894653)])
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int, p: float) -> None:
    """As R's binom.test(gained, gained + lost) has it, from either side."""
    assert comparison.mcnemar(gained, lost) == pytest.approx(p)
    assert comparison.mcnemar(lost, gained) == pytest.approx(p)


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_counts_every_outcome_as_far_from_the_middle(gained: int, lost: int) -> None:
    """The same as adding up the outcomes of all coin tosses one by one."""
    flips = gained + lost
    far = [
        heads
        for heads in (sum(tosses) for tosses in itertools.product((0, 1), repeat=min(flips, 10)))
        if abs(2 * heads - flips) >= abs(gained - lost)
    ]
    if flips <= 10:
        assert comparison.mcnemar(gained, lost) == pytest.approx(len(far) / 2**flips)


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5]), min_size=1, max_size=9))
def test_sign_flips_come_near_to_trying_all_signs(differences: list[float]) -> None:
    """The drawn p-value is within four standard errors of the one over every choice of signs."""
    signs = list(itertools.product((-1, 1), repeat=len(differences)))
    far = [
        one
        for one in signs
        if abs(sum(s * d for s, d in zip(one, differences, strict=True))) >= abs(sum(differences)) - 1e-9
    ]
    exact = len(far) / len(signs)
    assert comparison.sign_flip(differences) == pytest.approx(exact, abs=4 * sqrt(0.25 / 10_000) + 2e-4)


def test_holm_multiplies_the_smallest_the_most_and_never_falls() -> None:
    """The textbook example: four p-values, ordered, times 4, 3, 2, 1, and no later one below an earlier one."""
    found = comparison.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert comparison.holm({"a": 0.7, "b": 0.9}) == pytest.approx({"a": 1.0, "b": 1.0})


@given(SCORES, SCORES)
def test_only_examples_that_both_scored_count(before: dict[str, float], after: dict[str, float]) -> None:
    """The difference is that of the means over them; nothing in common is no difference but an error."""
    both = before.keys() & after.keys()
    if not both:
        with pytest.raises(ValueError, match="in common"):
            comparison.paired(before, after)
        return
    found = comparison.paired(before, after)
    assert found.n == len(both)
    assert isclose(found.difference, sum(after[name] - before[name] for name in both) / found.n, abs_tol=1e-9)
    assert set(found.gained) == {name for name in both if after[name] > before[name]}
    assert set(found.lost) == {name for name in both if after[name] < before[name]}


@given(BINARY, BINARY)
def test_turned_around_only_the_sign_changes(before: dict[str, float], after: dict[str, float]) -> None:
    """Which run is named first decides nothing but the sign."""
    if before.keys() & after.keys():
        there, back = comparison.paired(before, after), comparison.paired(after, before)
        assert (there.p_value, there.test) == (back.p_value, "mcnemar")
        assert isclose(there.difference, -back.difference, abs_tol=1e-12)
        assert set(there.gained) == set(back.lost)


def test_the_interval_is_that_of_the_paired_differences() -> None:
    """Eight examples, three up and one down: worked out by hand."""
    before = dict.fromkeys("abcdefgh", 0.0) | {"d": 1.0}
    after = dict.fromkeys("abc", 1.0) | dict.fromkeys("defgh", 0.0)
    found = comparison.paired(before, after)
    stderr = sqrt((3 * 0.75**2 + 1.25**2 + 4 * 0.25**2) / 7 / 8)
    assert found.stderr == pytest.approx(stderr)
    assert (found.low, found.high) == pytest.approx((0.25 - 1.959964 * stderr, 0.25 + 1.959964 * stderr))


def test_the_noise_floor_is_nearly_never_exceeded_by_runs_that_differ_by_chance_alone() -> None:
    """5 of 50 flipped: two runs of 400 examples differ by less than 3.1 points in 95 of 100 cases."""
    assert comparison.noise_floor(5, 50, 400) == pytest.approx(1.959964 * sqrt(0.1 / 400))
    assert comparison.noise_floor(0, 50, 400) == 0.0

"""The interval that may be looked at all the time: its coverage, its edges, and how soon it tells a wrong score."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.sequential import ConfidenceSequence, Expectation

RUNS = 2000
LENGTH = 500
STREAMS: dict[str, tuple[float, Callable[[random.Random], float]]] = {
    "half": (0.5, lambda source: float(source.random() < 0.5)),
    "rare": (0.05, lambda source: float(source.random() < 0.05)),
    "often": (0.9, lambda source: float(source.random() < 0.9)),
    "means of five": (0.36, lambda source: sum(source.random() < 0.36 for _ in range(5)) / 5),
    "thirds": (0.4, lambda source: source.choice((0.0, 0.0, 1 / 3, 2 / 3, 1.0))),
    "uniform": (0.5, lambda source: source.random()),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.first(2)
def test_the_truth_is_hardly_ever_excluded_at_any_time(name: str) -> None:
    """Over 2,000 streams of 500, the share in which the truth is ever excluded is at most 1 %, give or take chance."""
    truth, draw = STREAMS[name]
    source = random.Random(name)
    missed = 0
    for _ in range(RUNS):
        sequence = ConfidenceSequence(alpha=0.01)
        for _ in range(LENGTH):
            sequence.add(draw(source))
            if sequence.excludes(truth):
                missed += 1
                break
    margin = 2.6 * (0.01 * 0.99 / RUNS) ** 0.5  # a true 1 % would be above it once in 200
    assert missed / RUNS <= 0.01 + margin


@given(st.lists(st.floats(0, 1), max_size=40), st.floats(0, 1))
def test_the_interval_is_what_is_not_excluded(values: list[float], mean: float) -> None:
    """The interval holds the observed mean, lies in [0, 1], and its edges are where exclusion begins."""
    sequence = ConfidenceSequence()
    for value in values:
        sequence.add(value)
    low, high = sequence.interval()
    assert 0.0 <= low <= high <= 1.0
    assert sequence.n == len(values)
    if values:
        assert low <= sum(values) / len(values) + 1e-9
        assert high >= sum(values) / len(values) - 1e-9
    if min(abs(mean - low), abs(mean - high)) > 1e-9:
        assert sequence.excludes(mean) is not (low < mean < high)


def test_ends_are_reached_only_where_they_are_possible() -> None:
    """All wrong leaves 0 possible and excludes 1, all right the other way, and nothing seen leaves all."""
    assert ConfidenceSequence().interval() == (0.0, 1.0)
    for value, open_end in ((0.0, 0), (1.0, 1)):
        sequence = ConfidenceSequence()
        for _ in range(50):
            sequence.add(value)
        interval = sequence.interval()
        assert interval[open_end] == value
        assert 0.05 < abs(interval[1 - open_end] - value) < 0.2


def test_one_observation_gives_the_interval_worked_out_by_hand() -> None:
    """After a single 1 the martingale is 1/(2p), so that at alpha = 0.01 every mean up to 0.005 is excluded."""
    sequence = ConfidenceSequence(0.01)
    sequence.add(1.0)
    assert sequence.interval() == (pytest.approx(0.005, abs=1e-9), 1.0)


def test_more_certainty_is_a_wider_interval() -> None:
    """A smaller alpha gives an interval that contains that of a larger one."""
    wide, narrow = ConfidenceSequence(0.001), ConfidenceSequence(0.1)
    for number in range(60):
        wide.add(number % 2)
        narrow.add(number % 2)
    assert wide.interval()[0] < narrow.interval()[0] < 0.5 < narrow.interval()[1] < wide.interval()[1]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_an_observation_outside_the_range_is_refused(value: float) -> None:
    """What is not between 0 and 1 would void the guarantee, and is refused."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        ConfidenceSequence().add(value)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_is_a_probability(alpha: float) -> None:
    """An alpha of 0 or 1 promises nothing and is refused."""
    with pytest.raises(ValueError, match="alpha"):
        ConfidenceSequence(alpha)


def stops_after(truth: float, samples: int, source: random.Random, limit: int = LENGTH) -> int:
    """After how many examples a run with this accuracy is known to lie outside 0.55..0.70; `limit` if it never is."""
    expected = Expectation.parse("0.55..0.70")
    sequence = ConfidenceSequence()
    for _ in range(limit):
        sequence.add(sum(source.random() < truth for _ in range(samples)) / samples)
        if expected.violated_by(sequence.interval()):
            return sequence.n
    return limit


def test_a_run_far_below_its_expectation_is_stopped_early() -> None:
    """A score of 0.36 where 0.55..0.70 was expected is told after some dozens of examples, of 1,319."""
    source = random.Random(36)
    assert statistics.median(stops_after(0.36, 1, source) for _ in range(41)) <= 110


def test_a_run_within_its_expectation_is_left_alone() -> None:
    """Over 100 runs at the very edge of the range, none or one is stopped."""
    source = random.Random(55)
    assert sum(stops_after(0.55, 1, source, limit=120) < 120 for _ in range(100)) <= 1


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("0.55..0.70", 0.55, 0.7), (" .5 .. 1 ", 0.5, 1.0), ("0..0", 0.0, 0.0), ("1..1.0", 1.0, 1.0)],
)
def test_an_expectation_is_read(text: str, low: float, high: float) -> None:
    """Two shares with two dots between are a range."""
    assert Expectation.parse(text) == Expectation(low, high)


@pytest.mark.parametrize(
    "text",
    ["", "0.5", "0.5...0.6", "0.5-0.6", "55..70", "0.7..0.55", "-0.1..0.5", "0.5..", "a..b", "0.5..1.5", "nan..1"],
)
def test_what_is_no_range_is_refused_with_words(text: str) -> None:
    """Anything else is a ValueError that says how a range is written, or which ends it may have."""
    with pytest.raises(ValueError, match="an expected range"):
        Expectation.parse(text)


def test_only_an_interval_wholly_outside_violates() -> None:
    """An interval that touches the range at one point does not violate it."""
    expected = Expectation(0.55, 0.7)
    assert [expected.violated_by(each) for each in ((0.1, 0.54), (0.1, 0.55), (0.7, 0.9), (0.71, 0.9), (0.0, 1.0))] == [
        True,
        False,
        False,
        True,
        False,
    ]

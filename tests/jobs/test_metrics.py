"""Estimates, intervals, the share of the oracle gap closed, and the blocks of summary.json."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from math import isclose, sqrt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import metrics, selection


def row(example: int, sample: int, score: float | None, **more: Any) -> dict[str, Any]:
    """A row of rows.jsonl with all that counting looks at, and a text that it does not."""
    return {
        "key": f"gsm8k/test/{example}#{sample}",
        "error": None if score is not None else "out of memory",
        "example_id": str(example),
        "sample_index": sample,
        "subject": None,
        "completion": None if score is None else "so it is",
        "finish_reason": None if score is None else "stop",
        "answer": None if score is None else str(score),
        "score": score,
        "scores": {} if score is None else {"numeric": score, "strict": 0.0},
        **more,
    }


def choices(**chosen: int | None) -> dict[str, dict[str, Any]]:
    """Lines of selections.jsonl: the sample taken for each example (`e1=0`), None for an error."""
    return {
        name[1:]: {
            "example_id": name[1:],
            "reranker": "energy",
            "sample_index": sample,
            "error": "it raised" if sample is None else None,
        }
        for name, sample in chosen.items()
    }


TWO = [row(1, 0, 0.0), row(1, 1, 1.0), row(2, 0, 1.0), row(2, 1, 1.0), row(3, 0, 0.0), row(3, 1, 0.0)]


@given(st.lists(st.floats(0, 1).map(lambda drawn: round(drawn, 6)), min_size=2, max_size=30))
def test_the_estimate_is_mean_and_standard_error(values: list[float]) -> None:
    """Value and standard error are the mean and the sample standard deviation over sqrt(n); the interval holds it."""
    found = metrics.estimate(values)
    assert isclose(found.value, statistics.fmean(values), abs_tol=1e-12)
    assert isclose(found.stderr or 0.0, statistics.stdev(values) / sqrt(len(values)), abs_tol=1e-9)
    assert found.low is not None
    assert found.high is not None
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.low < found.high


def test_known_intervals() -> None:
    """Wilson's interval for 8 of 10 and Student's for three values are those of the textbooks."""
    eight = metrics.estimate([1.0] * 8 + [0.0] * 2)
    assert (round(eight.low or 0, 4), round(eight.high or 0, 4)) == (0.4902, 0.9433)
    three = metrics.estimate([0.4, 0.5, 0.6])
    assert isclose((three.high or 0) - 0.5, 4.302653 * 0.1 / sqrt(3), rel_tol=1e-6)
    assert metrics.estimate([1.0]).stderr is None
    with pytest.raises(ValueError, match="no values"):
        metrics.estimate([])


@pytest.mark.parametrize(("degrees", "point"), [(1, 12.7062), (3, 3.1824), (4, 2.7764), (9, 2.2622), (120, 1.9799)])
def test_students_t_matches_the_tables(degrees: int, point: float) -> None:
    """The 95 % points of Student's t are those printed in tables."""
    assert isclose(metrics.student_t_95(degrees), point, abs_tol=1e-3)


@pytest.mark.parametrize("samples", [1, 5])
def test_intervals_cover_the_truth_about_as_often_as_they_say(samples: int) -> None:
    """Over 2,000 simulated runs of 60 examples, 93 to 97 in 100 intervals contain the truth."""
    source = random.Random(5)
    hits = 0
    for _ in range(2000):
        found = metrics.estimate([sum(source.random() < 0.6 for _ in range(samples)) / samples for _ in range(60)])
        hits += (found.low or 0.0) <= 0.6 <= (found.high or 0.0)
    assert 0.93 <= hits / 2000 <= 0.97


def test_samples_of_one_example_are_not_independent() -> None:
    """Five equal samples of every example leave the standard error where one sample of each had it."""
    single = [row(example, 0, float(example % 3 == 0)) for example in range(30)]
    five = [{**each, "sample_index": sample} for each in single for sample in range(5)]
    one, many = (metrics.summarise(rows)["metrics"]["numeric"] for rows in (single, five))
    assert one["stderr"] == many["stderr"]
    assert one["ci95"] == many["ci95"]


def test_the_blocks_of_the_summary() -> None:
    """A small run gives every entry of the two blocks with the values one can work out by hand."""
    found = metrics.summarise(iter(TWO), choices(e1=1, e2=0, e3=0))
    assert {name: entry["value"] for name, entry in found["selection"].items()} == {
        "first": 1 / 3,
        "mean": 0.5,
        "majority": 0.5,
        "oracle": 2 / 3,
        "energy": 2 / 3,
    }
    assert {name: round(entry["value"], 12) for name, entry in found["metrics"].items()} == {
        "numeric": 0.5,
        "strict": 0.0,
        "pass@1": 0.5,
        "pass@2": round(2 / 3, 12),
        "finish_length": 0.0,
        "no_answer": 0.0,
        "oracle_gap_closed": 1.0,
    }
    assert {key: found[key] for key in ("n_examples", "n_rows", "scored", "unscored", "unscored_examples")} == {
        "n_examples": 3,
        "n_rows": 6,
        "scored": 6,
        "unscored": 0,
        "unscored_examples": 0,
    }
    for block in ("metrics", "selection"):
        assert all(set(entry) == {"value", "stderr", "ci95", "n"} for entry in found[block].values())


def test_an_error_is_never_a_zero() -> None:
    """Rows with an error change no mean; what they leave without any score is counted and left out."""
    failed = [row(1, 2, None), row(4, 0, None)]
    plain, with_failures = metrics.summarise(TWO), metrics.summarise([*failed, *TWO])
    assert with_failures["selection"] == plain["selection"]
    assert with_failures["metrics"] == plain["metrics"]
    assert (with_failures["n_examples"], with_failures["n_rows"]) == (4, 8)
    assert (with_failures["scored"], with_failures["unscored"], with_failures["unscored_examples"]) == (6, 2, 1)


def test_no_rows_at_all_give_nulls() -> None:
    """A run without rows has a summary whose selection entries hold nulls."""
    found = metrics.summarise([])
    assert found["n_examples"] == 0
    assert found["selection"]["mean"] == {"value": None, "stderr": None, "ci95": [None, None], "n": 0}


def test_subjects_cut_off_and_answerless_completions_are_counted() -> None:
    """Accuracy by subject, the share of cut-off completions and that of completions without an answer are metrics."""
    rows = [
        row(1, 0, 1.0, subject="algebra"),
        row(2, 0, 0.0, subject="algebra", finish_reason="length", answer=None),
        row(3, 0, 1.0, subject="geometry", finish_reason="length"),
        row(4, 0, None, subject="geometry"),
    ]
    found = metrics.summarise(rows)["metrics"]
    assert found["subject/algebra"]["value"] == 0.5
    assert (found["subject/geometry"]["value"], found["subject/geometry"]["n"]) == (1.0, 1)
    assert isclose(found["finish_length"]["value"], 2 / 3)
    assert isclose(found["no_answer"]["value"], 1 / 3)


def test_likelihood_rows_have_no_completion_metrics() -> None:
    """Rows without completion and finish reason have their rules counted, and no shares of completions."""
    rows = [
        {"example_id": "a", "sample_index": 0, "score": 1.0, "error": None, "scores": {"acc": 1.0, "acc_norm": 0.0}},
        {"example_id": "b", "sample_index": 0, "score": 0.0, "error": None, "scores": {"acc": 0.0}},
    ]
    found = metrics.summarise(rows)["metrics"]
    assert set(found) == {"acc", "acc_norm"}
    assert (found["acc"]["value"], found["acc_norm"]["value"], found["acc_norm"]["n"]) == (0.5, 0.0, 1)


def test_rules_may_be_named() -> None:
    """Rules that are named come in their order, also those that no row has."""
    assert list(metrics.summarise(TWO, {}, ("strict", "numeric", "mine"))["metrics"])[:3] == [
        "strict",
        "numeric",
        "mine",
    ]


def test_pass_at_k_leaves_out_examples_with_fewer_samples() -> None:
    """An example with fewer than k scored samples does not count for pass@k, and n says so."""
    found = metrics.summarise([*TWO, row(4, 0, 1.0), row(4, 1, None)])["metrics"]
    assert (found["pass@1"]["n"], found["pass@2"]["n"]) == (4, 3)
    assert isclose(found["pass@2"]["value"], 2 / 3)


def test_a_re_ranker_that_failed_on_an_example_is_not_charged_for_it() -> None:
    """Examples a re-ranker made no choice for are left out of its value, and n says so."""
    found = metrics.summarise(TWO, choices(e1=0, e2=0, e3=None))
    assert (found["selection"]["energy"]["value"], found["selection"]["energy"]["n"]) == (0.5, 2)
    assert found["metrics"]["oracle_gap_closed"]["value"] == -1.0
    raised = {"1": {**choices(e1=0)["1"], "error": "it raised after all"}}
    assert metrics.summarise(TWO, raised)["selection"]["energy"]["n"] == 0
    nothing = metrics.summarise(TWO, choices(e1=None))
    assert nothing["selection"]["energy"]["value"] is None
    assert nothing["metrics"]["oracle_gap_closed"]["value"] is None


def test_a_re_rankers_name_cannot_hide_a_selector() -> None:
    """A re-ranker called like one of our selectors stands beside it under another name."""
    lines = {name: {**line, "reranker": "mean"} for name, line in choices(e1=1).items()}
    found = metrics.summarise(TWO, lines)["selection"]
    assert (found["mean"]["value"], found["re-ranker mean"]["value"]) == (0.5, 1.0)


def test_the_gap_closed_and_its_interval() -> None:
    """Halfway from chance to oracle is 0.5; the interval holds it, shrinks with more examples, and is repeatable."""
    few, many = (metrics.gap_closed([1.0, 0.0] * n, [0.5, 0.5] * n, [1.0, 0.5] * n) for n in (10, 1000))
    assert few is not None
    assert many is not None
    assert few.value == many.value == 0.0
    half = metrics.gap_closed([0.75] * 8 + [0.5, 1.0], [0.5] * 10, [1.0] * 10)
    assert half is not None
    assert isclose(half.value, 0.5)
    assert (half.low or 0.0) < 0.5 < (half.high or 0.0) <= 1.0
    assert half == metrics.gap_closed([0.75] * 8 + [0.5, 1.0], [0.5] * 10, [1.0] * 10)
    assert (many.high or 0) - (many.low or 0) < ((few.high or 0) - (few.low or 0)) / 5


def test_without_a_gap_there_is_no_share_of_it() -> None:
    """Where no sample is better than another nothing can be won, and one example alone has no interval."""
    mean = sum([0.35] * 3) / 3
    assert mean < 0.35  # by rounding alone
    assert metrics.gap_closed([0.35] * 3, [mean] * 3, [0.35] * 3) is None
    assert metrics.gap_closed([1.0, 1.0], [0.5, 1.0], [1.0, 1.0]) == metrics.Estimate(1.0, None, None, None, 2)


def test_the_bootstrap_has_the_spread_of_the_delta_method() -> None:
    """The bootstrapped standard error is, within a tenth, what the delta method gives for a ratio of means."""
    source = random.Random(3)
    shares = [source.choice((0.2, 0.4, 0.6, 0.8)) for _ in range(2000)]
    taken = [float(source.random() < share + 0.1) for share in shares]
    found = metrics.gap_closed(taken, shares, [1.0] * 2000)
    assert found is not None
    assert found.stderr is not None
    gap = 1.0 - statistics.fmean(shares)
    residuals = [got - share - found.value * (1.0 - share) for got, share in zip(taken, shares, strict=True)]
    assert isclose(found.stderr, statistics.stdev(residuals) / sqrt(2000) / gap, rel_tol=0.1)


def test_a_hundred_thousand_rows_are_counted_while_they_stream() -> None:
    """20,000 examples of five samples, given one by one, are summarised within 3 s of processor time."""
    source = random.Random(1)
    spent = 0.0

    def stream() -> Iterator[dict[str, Any]]:
        nonlocal spent
        for example in range(20_000):
            for sample in range(5):
                started = time.process_time()
                made = row(example, sample, float(source.random() < 0.6), subject=str(example % 7))
                spent += time.process_time() - started
                yield made

    picks = {
        str(example): {"reranker": "energy", "sample_index": example % 5, "error": None} for example in range(20_000)
    }
    started = time.process_time()
    found = metrics.summarise(stream(), picks)
    assert time.process_time() - started - spent <= 3.0
    assert found["n_rows"] == 100_000
    assert abs(found["selection"]["energy"]["value"] - 0.6) < 0.02
    assert set(selection.SELECTORS) < set(found["selection"])

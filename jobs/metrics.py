"""Estimates with their uncertainty, and the metric and selection blocks of summary.json, counted from rows alone."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Any

from jobs import perplexities, selection
from jobs.selection import Candidate, Examples

Z_95 = 1.959963984540054
"""The two-sided 95 % point of the normal distribution."""
_T_95 = {1: 12.706205, 2: 4.302653, 3: 3.182446}  # Student's t, degrees of freedom too few for the series below
_BOOTSTRAP_DRAWS = 2000
_BOOTSTRAP_WEIGHTS = 500_000  # random numbers at most per bootstrap, about half a second
_BOOTSTRAP_DRAWS_MIN = 200
_Entry = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over examples, its standard error, and its 95 % interval; None where n is too small to tell."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int
    """How many examples the value is a mean over."""


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of per-example values between 0 and 1; ValueError without any.

    The standard error is the sample standard deviation (n - 1) over sqrt(n): an example counts once however many
    samples it has, so samples of one example are never taken for independent. The interval is Wilson's (1927) where
    the values are all 0 or 1, else Student's t, cut to [0, 1]. Where the sample shows no spread at all it is Wilson's
    too, whose variance p(1 - p) is the largest that values between 0 and 1 with mean p can have.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to estimate a mean from")
    mean = fsum(values) / n
    stderr = standard_error(values, mean)
    if min(values) == max(values) or all(value in (0.0, 1.0) for value in values):
        low, high = wilson(mean, n)
    else:
        half = student_t_95(n - 1) * (stderr or 0.0)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return Estimate(mean, stderr, low, high, n)


def estimate_of_any(values: Sequence[float]) -> Estimate:
    """The mean of per-example values of any size, with Student's interval; ValueError without any."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to estimate a mean from")
    mean = fsum(values) / n
    stderr = standard_error(values, mean)
    if stderr is None:
        return Estimate(mean, None, None, None, n)
    half = student_t_95(n - 1) * stderr
    return Estimate(mean, stderr, mean - half, mean + half, n)


def standard_error(values: Sequence[float], mean: float) -> float | None:
    """That of the mean of values: their sample standard deviation (n - 1) over sqrt(n); None of fewer than two."""
    n = len(values)
    return sqrt(fsum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval (1927) for a share of n."""
    spread = Z_95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = sqrt(max(share * (1 - share), 0.0) * spread + spread**2 / 4) / (1 + spread)
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def student_t_95(degrees: int) -> float:
    """The two-sided 95 % point of Student's t, within 0.001 (Abramowitz and Stegun 26.7.5)."""
    if degrees in _T_95:
        return _T_95[degrees]
    z, v = Z_95, degrees
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def gap_closed(reranked: Sequence[float], means: Sequence[float], oracles: Sequence[float]) -> Estimate | None:
    """The share of what can be won over a random sample that a re-ranker wins: (reranked - mean) / (oracle - mean).

    Each sequence has one value per example. None when nothing can be won. Negative where the re-ranker is worse than
    chance. Standard error and interval are those of a Bayesian bootstrap (Rubin 1981) over examples, always drawn
    with the same seed; without two examples on which something can be won they are None.
    """
    pairs = Counter(  # rounded, so that a rounding error is no gap
        (round(won - base, 12), round(best - base, 12))
        for won, base, best in zip(reranked, means, oracles, strict=True)
    )
    to_win = fsum(gap * count for (_, gap), count in pairs.items())
    if to_win <= 0:
        return None
    value = fsum(won * count for (won, _), count in pairs.items()) / to_win
    if sum(count for (_, gap), count in pairs.items() if gap > 0) < 2:
        return Estimate(value, None, None, None, len(means))
    draws = sorted(_bootstrapped_ratios(pairs))
    centre = fsum(draws) / len(draws)
    stderr = sqrt(fsum((draw - centre) ** 2 for draw in draws) / (len(draws) - 1))
    tail = round(0.025 * len(draws))
    return Estimate(value, stderr, min(value, draws[tail]), max(value, draws[-1 - tail]), len(means))


def _bootstrapped_ratios(pairs: Mapping[tuple[float, float], int]) -> list[float]:
    """Ratios of the weighted sums under random weights of the examples.

    Every example's weight is exponential; the weights of equal examples add up to one gamma variate, so the cost
    follows the number of distinct pairs, a dozen where scores are 0 or 1, and not the number of examples.
    """
    source = random.Random(0)  # noqa: S311 — statistics, not secrets
    ordered = sorted(pairs.items())
    ratios = []
    for _ in range(max(_BOOTSTRAP_DRAWS_MIN, min(_BOOTSTRAP_DRAWS, _BOOTSTRAP_WEIGHTS // len(ordered)))):
        won = to_win = 0.0
        for (win, gap), count in ordered:
            weight = source.gammavariate(count, 1.0) if count > 1 else source.expovariate(1.0)
            won += weight * win
            to_win += weight * gap
        ratios.append(won / to_win)
    return ratios


def summarise(
    rows: Iterable[Mapping[str, Any]],
    selections: Mapping[str, Mapping[str, Any]] | None = None,
    rules: Sequence[str] = (),
) -> dict[str, Any]:
    """The counts, `metrics` and `selection` of summary.json, each entry `{value, stderr, ci95: [low, high], n}`.

    `rows` is read once and its texts are not kept. `selections`: example id → its line of selections.jsonl. Rules
    that are not named are taken from the rows. An example of which nothing was scored is counted in
    `unscored_examples` and left out of every mean: an error is never a zero. An entry over no examples holds nulls.
    Of texts that were read the metrics are perplexities; they leave nothing to select.
    """
    examples = selection.group(rows, rules)
    scored = examples.scored()
    candidates = [each for group in examples.groups.values() for each in group.candidates.values()]
    whole = sum(candidate.is_whole for candidate in candidates)
    readings = [candidate.reading for candidate in candidates if candidate.reading is not None]
    picks = _picks(scored, selections or {})
    return {
        "n_examples": len(examples.groups),
        "n_rows": len(candidates),
        "scored": whole,
        "unscored": len(candidates) - whole,
        "unscored_examples": sum(not group.has_whole() for group in examples.groups.values()),
        "metrics": {
            **_metrics(examples, scored),
            **_gaps(scored, picks),
            **perplexities.entries(readings, student_t_95),
        },
        "selection": {}
        if readings and not scored
        else {
            **{name: _entry([pick(each) for each in scored.values()]) for name, pick in selection.SELECTORS.items()},
            **{name: _entry(list(picked.values())) for name, picked in picks.items()},
        },
    }


def _metrics(examples: Examples, scored: Mapping[str, list[Candidate]]) -> dict[str, _Entry]:
    """Accuracy by each rule, pass@k, shares of cut-off and answerless completions, accuracy by subject and level."""
    found = {rule: _entry(_means(examples, _by_rule(place))) for place, rule in enumerate(examples.rules)}
    generated = any(each.generated for group in examples.groups.values() for each in group.candidates.values())
    samples = max(map(len, scored.values()), default=0) if generated else 0
    for k in selection.PASS_AT:
        if k <= samples:
            chances = [selection.pass_at(candidates, k) for candidates in scored.values()]
            found[f"pass@{k}"] = _entry([chance for chance in chances if chance is not None])
    for name, share in (("finish_length", _cut_off), ("no_answer", _answerless)):
        values = _means(examples, share)
        if values:  # tasks that compare likelihoods generate nothing
            found[name] = _entry(values)
    return found | _by_kind(examples, scored)


def _by_kind(examples: Examples, scored: Mapping[str, list[Candidate]]) -> dict[str, _Entry]:
    """Accuracy by level and by subject; over all with a subject, `micro` counts examples alike, `macro` subjects."""
    kinds: dict[str, dict[str, list[float]]] = {"level": defaultdict(list), "subject": defaultdict(list)}
    for example_id, candidates in scored.items():
        group = examples.groups[example_id]
        for kind, name in (("subject", group.subject), ("level", group.level)):
            if name is not None:
                kinds[kind][name].append(selection.mean(candidates))
    subjects = kinds["subject"]
    averages = {}
    if len(subjects) > 1:
        averages = {
            "micro": _entry([value for values in subjects.values() for value in values]),
            "macro": _as_entry(_macro([estimate(values) for values in subjects.values()])),
        }
    named = {f"{kind}/{name}": _entry(found[name]) for kind, found in kinds.items() for name in sorted(found)}
    return averages | named


def _macro(found: Sequence[Estimate]) -> Estimate:
    """The mean of the subjects' means; no standard error where a subject has too few examples for one."""
    value = fsum(each.value for each in found) / len(found)
    n = sum(each.n for each in found)
    errors = [each.stderr for each in found if each.stderr is not None]
    if len(errors) < len(found):
        return Estimate(value, None, None, None, n)
    stderr = sqrt(fsum(error**2 for error in errors)) / len(found)
    return Estimate(value, stderr, max(0.0, value - Z_95 * stderr), min(1.0, value + Z_95 * stderr), n)


def _picks(
    scored: Mapping[str, list[Candidate]], selections: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """By re-ranker, the score of the sample it took for each example; what it could not choose for is left out."""
    found: dict[str, dict[str, float]] = {}
    for example_id, line in selections.items():
        name = str(line.get("reranker") or "re-ranker")
        picked = found.setdefault(f"re-ranker {name}" if name in selection.SELECTORS else name, {})
        if line.get("error") is None:
            score = selection.chosen(scored.get(example_id, ()), line.get("sample_index"))
            if score is not None:
                picked[example_id] = score
    return found


def _gaps(scored: Mapping[str, list[Candidate]], picks: Mapping[str, Mapping[str, float]]) -> dict[str, _Entry]:
    """What each re-ranker wins of what can be won, over the examples it chose for."""
    found = {}
    for name, picked in picks.items():
        candidates = [scored[example_id] for example_id in picked]
        closed = gap_closed(
            list(picked.values()), list(map(selection.mean, candidates)), list(map(selection.oracle, candidates))
        )
        found["oracle_gap_closed" if len(picks) == 1 else f"oracle_gap_closed/{name}"] = _as_entry(closed)
    return found


def _means(examples: Examples, value: Callable[[Candidate], float | None]) -> list[float]:
    """The mean over each example's samples of what has a value; examples without any are left out."""
    found = []
    for group in examples.groups.values():
        values = [each for each in map(value, group.candidates.values()) if each is not None]
        if values:
            found.append(sum(values) / len(values))
    return found


def _by_rule(place: int) -> Callable[[Candidate], float | None]:
    return lambda candidate: candidate.scores[place] if place < len(candidate.scores) else None


def _cut_off(candidate: Candidate) -> float | None:
    return None if candidate.finish_reason is None else float(candidate.finish_reason == "length")


def _answerless(candidate: Candidate) -> float | None:
    return float(candidate.answer is None) if candidate.generated else None


def _entry(values: Sequence[float]) -> _Entry:
    return _as_entry(estimate(values) if values else None)


def _as_entry(found: Estimate | None) -> _Entry:
    if found is None:
        return {"value": None, "stderr": None, "ci95": [None, None], "n": 0}
    return {"value": found.value, "stderr": found.stderr, "ci95": [found.low, found.high], "n": found.n}

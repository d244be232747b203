"""Two runs on the same examples: paired differences, exact tests, flips, and a correction for many comparisons."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, fsum, inf, sqrt

from jobs.metrics import Z_95, standard_error

_DRAWS = 10_000
_WEIGHTS = 5_000_000  # random numbers at most per comparison: some seconds
_DRAWS_MIN = 1_000


@dataclass(frozen=True)
class Paired:
    """How a run differs from another one on the examples that both scored; None where there are too few to tell."""

    n: int
    """Examples that both scored."""
    before: float
    after: float
    """The mean score of each over those examples."""
    difference: float
    """`after - before`."""
    stderr: float | None
    low: float | None
    high: float | None
    """The 95 % interval of the difference."""
    p_value: float
    test: str
    """How the p-value was found: `mcnemar` where every score is 0 or 1, else `sign-flip`."""
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    """The examples that scored higher, and lower, than before."""


def paired(before: Mapping[str, float], after: Mapping[str, float]) -> Paired:
    """Compare scores, or any other numbers, by example; ValueError when no example has both.

    The interval is the normal one of the paired differences, with their sample standard deviation (n - 1) over sqrt(n);
    the p-value belongs to the null hypothesis that neither run is better on these examples.
    """
    names = [name for name in before if name in after]
    if not names:
        raise ValueError("the runs have no scored example in common")
    n = len(names)
    differences = {name: round(after[name] - before[name], 12) for name in names}  # rounding errors are no flips
    mean = fsum(differences.values()) / n
    stderr = standard_error(list(differences.values()), mean)
    half = None if stderr is None else Z_95 * stderr
    gained = tuple(name for name in names if differences[name] > 0)
    lost = tuple(name for name in names if differences[name] < 0)
    values = {score[name] for score in (before, after) for name in names}
    is_binary, edge = values <= {0.0, 1.0}, 1.0 if min(values) >= 0 and max(values) <= 1 else inf
    return Paired(
        n=n,
        before=fsum(before[name] for name in names) / n,
        after=fsum(after[name] for name in names) / n,
        difference=mean,
        stderr=stderr,
        low=None if half is None else max(-edge, mean - half),
        high=None if half is None else min(edge, mean + half),
        p_value=mcnemar(len(gained), len(lost)) if is_binary else sign_flip(list(differences.values())),
        test="mcnemar" if is_binary else "sign-flip",
        gained=gained,
        lost=lost,
    )


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact p-value of McNemar's test: the binomial one of `gained` against `lost` at one half.

    The sum of the probabilities of all outcomes as far from the middle as this one; 1.0 when nothing flipped.
    """
    flips = gained + lost
    tail = sum(comb(flips, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**flips) if flips else 1.0


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p-value of a paired permutation test: how often random signs give a mean as far from zero.

    Always drawn with the same seed; the identity counts among the draws, so that the value is never 0 (Phipson and
    Smyth 2010). Differences of 0 change nothing, and equal ones are drawn together.
    """
    sizes = Counter(abs(each) for each in differences if each)
    if not sizes:
        return 1.0
    seen = abs(fsum(differences)) - 1e-9
    source = random.Random(0)  # noqa: S311 — statistics, not secrets
    draws = max(_DRAWS_MIN, min(_DRAWS, _WEIGHTS // len(sizes)))
    far = 0
    for _ in range(draws):
        total = fsum(size * (2 * source.getrandbits(count).bit_count() - count) for size, count in sizes.items())
        far += abs(total) >= seen
    return (far + 1) / (draws + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted by Holm's step-down method (1979): the chance of even one false alarm stays as promised."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def noise_floor(flips: float, repeated: int, n: int) -> float:
    """How far apart two equal runs over `n` examples may come, with 95 % certainty, when nothing but chance differs.

    `flips` of the `repeated` examples scored otherwise when they were run again; each flip goes either way, so that
    the difference of two means has the variance flips / repeated / n. Without any flip it is 0. Where scores are not
    only 0 and 1, `flips` is the sum of the squared differences.
    """
    return Z_95 * sqrt(flips / repeated / n)

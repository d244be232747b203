"""An interval for a mean that may be looked at after every observation, and the range a user expects it in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf, lgamma, log

_HALVINGS = 50  # 2**-50: finer than any score
_RANGE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*\.\.\s*([0-9]*\.?[0-9]+)\s*")


class ConfidenceSequence:
    """Intervals that contain the true mean at all times at once, with probability 1 - alpha.

    For observations between 0 and 1 whose expectation, given those before, is one unknown mean: independent draws, in
    an order that has nothing to do with their values. So feed examples in dataset order: in order of completion, short
    answers come first, and they are right more often.

    Test martingale (Robbins 1970): the likelihood ratio of q against p, mixed over q with the Jeffreys prior
    Beta(1/2, 1/2). With s the sum and f = n - s it is B(s + 1/2, f + 1/2) / B(1/2, 1/2) / (p**s * (1 - p)**f), and by
    Ville's inequality it ever reaches 1/alpha at the true p with probability alpha at most. For values between 0 and 1
    too: (q/p)**x * ((1 - q)/(1 - p))**(1 - x) is convex in x, so it lies below its chord, whose expectation is 1.
    """

    def __init__(self, alpha: float = 0.01) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {alpha!r}")
        self._log_limit = -log(alpha)
        self._sum = 0.0
        self.n = 0

    def add(self, value: float) -> None:
        """Count one observation in; ValueError unless it lies between 0 and 1."""
        if not 0 <= value <= 1:
            raise ValueError(f"an observation must lie between 0 and 1, not {value!r}")
        self._sum += value
        self.n += 1

    def excludes(self, mean: float) -> bool:
        """Whether a mean between 0 and 1 is outside the interval."""
        return self._log_martingale(mean) >= self._log_limit

    def interval(self) -> tuple[float, float]:
        """The lowest and the highest mean not excluded now; (0, 1) before the first observation."""
        if self.n == 0:
            return 0.0, 1.0
        centre = self._sum / self.n
        return self._edge(centre, 0.0), self._edge(centre, 1.0)

    def _edge(self, inside: float, outside: float) -> float:
        """Where exclusion begins between the observed mean and an end; the martingale only grows on the way."""
        if not self.excludes(outside):
            return outside
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            if self.excludes(middle):
                outside = middle
            else:
                inside = middle
        return outside

    def _log_martingale(self, p: float) -> float:
        s, f = self._sum, max(self.n - self._sum, 0.0)
        if (p <= 0 and s > 0) or (p >= 1 and f > 0):
            return inf
        mixture = lgamma(s + 0.5) + lgamma(f + 0.5) - lgamma(self.n + 1) - 2 * lgamma(0.5)
        return mixture - (s * log(p) if s else 0.0) - (f * log(1 - p) if f else 0.0)


@dataclass(frozen=True)
class Expectation:
    """The range in which a user expects a mean score, both ends included; ValueError unless 0 <= low <= high <= 1."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"an expected range goes from one share up to another, from 0 to 1, not {self.low:g}..{self.high:g}"
            )

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """The range written as `0.55..0.70`; ValueError saying what is wrong."""
        found = _RANGE.fullmatch(text)
        if found is None:
            raise ValueError(f"an expected range is two shares with two dots between, such as 0.55..0.70, not {text!r}")
        return cls(float(found[1]), float(found[2]))

    def violated_by(self, interval: tuple[float, float]) -> bool:
        """Whether an interval (low, high) lies wholly outside the range."""
        low, high = interval
        return high < self.low or low > self.high

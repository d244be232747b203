"""How a benchmark prints: one aligned line a figure, judged by its target, with the baseline measured beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured figure; `baseline` says in words what was measured beside it. At most one of the targets is set."""

    name: str
    value: float
    unit: str
    baseline: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def missed(self) -> bool:
        """Whether the figure is beyond its target."""
        over = self.at_most is not None and self.value > self.at_most
        return over or (self.at_least is not None and self.value < self.at_least)

    def line(self) -> str:
        """Name, value, unit, target, verdict and baseline, aligned with those of every other figure."""
        target = "" if self.at_least is None else f">= {number(self.at_least)}"
        target = target if self.at_most is None else f"<= {number(self.at_most)}"
        verdict = "MISSED" if self.missed else "ok" if target else ""
        start = f"{self.name:<50} {number(self.value):>7} {self.unit:<7} {target:>8}  {verdict:<6}"
        return f"{start}  {self.baseline}".rstrip()


def number(value: float) -> str:
    """Three significant digits, and every digit before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show(lines: Iterable[Figure | str]) -> int:
    """Print each figure as it comes, and remarks as they stand; the exit code: 1 when a target was missed."""
    code = 0
    for line in lines:
        print(line if isinstance(line, str) else line.line(), flush=True)
        code |= isinstance(line, Figure) and line.missed
    return code

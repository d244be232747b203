"""Watches the score while rows come in, and stops a run that surely lies outside what its user expected."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from jobs import durable, rows, rundir, suites
from jobs.sequential import ConfidenceSequence, Expectation
from worker.asking import Item
from worker.failures import OutOfExpectation

_ALPHA = 0.01
"""The chance to stop a run that is as expected."""
_SHOWN = 5
_SHOWN_CHARACTERS = 300


class Watch:
    """Takes rows as they finish; counts whole examples in dataset order only, since short answers finish first.

    A run that was stopped by its expectation and then resumed has been looked at: it is not stopped again.
    """

    def __init__(self, expect: str | None, run: rundir.Run, items: Sequence[Item], among: int = 1) -> None:
        """`among`: how many watches look at parts of one run; the chance that any of them errs is that of one."""
        self._expected = Expectation.parse(expect) if expect and not _stopped_before(run) else None
        self._order = list(dict.fromkeys(item.example.id for item in items))
        self._samples = len(items) // max(len(self._order), 1)
        self._scores: dict[str, list[float | None]] = defaultdict(list)
        self._next = 0
        self._sequence = ConfidenceSequence(_ALPHA / among)
        self._shown: list[str] = []
        task = suites.task_of(items[0].key) if items else ""
        if self._expected:
            for row in rows.read(run.row_files()):
                if row["error"] is None and suites.task_of(row["key"]) == task:
                    self._take(row)

    def see(self, row: rows.Row) -> None:
        """Count one new row in; raises OutOfExpectation once the interval lies wholly outside the expected range."""
        if self._expected is None:
            return
        self._take(row)
        low, high = self._sequence.interval()
        if self._expected.violated_by((low, high)):
            raise self._failure(low, high)

    def _failure(self, low: float, high: float) -> OutOfExpectation:
        assert self._expected is not None
        shown = "\n".join(self._shown)
        return OutOfExpectation(
            f"After {self._next} problems the score lies between {low:.3f} and {high:.3f} (99 % sequential interval), "
            f"outside the expected {self._expected.low:g}..{self._expected.high:g}. Every row so far is kept. "
            f"{len(self._shown)} answers:\n{shown}",
            "Look at them and at the first prompt in the log. Go on all the same: gpu resume. Or mend it and run anew.",
        )

    def _take(self, row: rows.Row) -> None:
        if len(self._shown) < _SHOWN and row["error"] is None:
            self._shown.append(f"- {row['key']} ({row['score']}): {_said(row)[:_SHOWN_CHARACTERS]!r}")
        self._scores[row["example_id"]].append(row["score"])
        while self._next < len(self._order) and len(self._scores[self._order[self._next]]) >= self._samples:
            scored = [score for score in self._scores.pop(self._order[self._next]) if score is not None]
            self._next += 1
            if scored:
                self._sequence.add(sum(scored) / len(scored))


def _said(row: rows.Row) -> str:
    """The completion, or the choice that was taken."""
    return str(row["choices"][row["answer"]] if "choices" in row else row["completion"])


def _stopped_before(run: rundir.Run) -> bool:
    failures = [durable.load_json(attempt.failure) for attempt in run.attempts()]
    return any(failure and failure["kind"] == OutOfExpectation.kind for failure in failures)

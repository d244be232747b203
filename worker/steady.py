"""The time for one who must not be fooled: goes on through suspends and resets of the clock, mended by the provider."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from worker import processes

_DRIFT_S = 2.0
"""The wall clock is followed as long as it differs by less since the last look: that is its usual correction."""
_BELIEVED_S = 5.0
"""The date of an answer is whole seconds, and some are spent on the way."""


def since_boot() -> float:
    """Seconds since the start of the machine, those it was suspended for among them where the system counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass
class Clock:
    """Seconds since 1970 that never go back."""

    epoch: float
    """The time at `mark`."""
    mark: float
    """What `since_boot` was then."""

    @classmethod
    def begun(cls, at_least: float, saved: dict[str, Any]) -> Clock:
        """A clock that goes on from what an earlier one saved, in this boot or before; never before `at_least`."""
        mark = since_boot()
        if saved.get("boot_id") == processes.boot_id() and _is_number(saved.get("epoch"), saved.get("mark")):
            return cls(saved["epoch"] + max(mark - saved["mark"], 0.0), mark)
        known = saved["epoch"] if _is_number(saved.get("epoch")) else 0.0
        return cls(max(time.time(), at_least, known), mark)

    def saved(self) -> dict[str, Any]:
        """What `begun` goes on from."""
        return {"epoch": self.now(), "mark": since_boot(), "boot_id": processes.boot_id()}

    def now(self) -> float:
        """The time, as far as this machine knows by itself."""
        mark = since_boot()
        known, wall = self.epoch + mark - self.mark, time.time()
        if 0 <= wall - known <= _DRIFT_S:
            known = wall
        self.epoch, self.mark = known, mark
        return known

    def latest(self) -> float:
        """The time, should the wall clock be right: one that is ahead may have slept with all of its machine."""
        return max(self.now(), time.time())

    def believe(self, provider: float | None) -> None:
        """Take over the time by which a provider has just answered, if it differs; it is the one who counts money."""
        if provider is not None and abs(provider - self.now()) > _BELIEVED_S:
            self.epoch, self.mark = provider, since_boot()


def _is_number(*values: object) -> bool:
    return all(isinstance(value, (int, float)) for value in values)

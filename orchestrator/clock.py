"""The time, from one place, so that tests can bring their own."""

from __future__ import annotations

import time
from datetime import datetime

from jobs import times


def now() -> str:
    """The time as every file of a run has it: UTC, ISO 8601."""
    return times.now()


def parse(text: str) -> datetime:
    """The moment an ISO 8601 text names."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def monotonic() -> float:
    """Seconds that never go back."""
    return time.monotonic()


def sleep(seconds: float) -> None:
    """Wait so long; every loop that waits for something elsewhere has a deadline of its own."""
    time.sleep(seconds)


def timestamp() -> float:
    """Seconds since 1970, UTC: for what is compared across processes."""
    return time.time()

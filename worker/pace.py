"""Rows of an attempt counted as they grow, and the pace they come at."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from jobs import rows

_PACE_S = 60.0


@dataclass
class Pace:
    """Rows counted from the attempt's file, and how fast they come."""

    path: Path
    offset: int = 0
    rows: int = 0
    good: int = 0
    """Those without an error: what counts as getting on."""
    points: deque[tuple[float, int]] = field(default_factory=deque)
    """(seconds, rows) of the last `_PACE_S`, oldest first."""

    def update(self) -> None:
        """Count the whole lines that are new since the last call."""
        for offset, line in rows.whole_lines(self.path, self.offset):
            self.offset = offset + len(line) + 1
            self.rows += 1
            with contextlib.suppress(rows.BadRow):
                self.good += rows.head(line)[1]
        now_s = time.monotonic()
        while len(self.points) > 1 and (now_s - self.points[1][0] > _PACE_S or self.points[1][1] == 0):
            self.points.popleft()
        self.points.append((now_s, self.rows))

    def rows_per_second(self) -> float | None:
        """Rows per second over the last minute, from the last look that saw none; None before there is a pace."""
        if self.rows == 0 or self.points[0][1] == self.points[-1][1]:
            return None
        (began_s, before), (now_s, after) = self.points[0], self.points[-1]
        return round((after - before) / (now_s - began_s), 3)

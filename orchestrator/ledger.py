"""What was rented and what it cost: a file that only grows, synced, one line per opening and closing of a cost."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs import durable, locks, rows
from orchestrator import clock, config
from orchestrator.errors import ConfigError

_LOCK_WAIT_S = 30.0


@dataclass(frozen=True)
class Lease:
    """One instance as the ledger knows it."""

    marker: str
    """Unique to the paid request."""
    machine: str
    """What it is called here."""
    provider: str
    price_usd_per_hour: float
    opened_at: float
    """Seconds since 1970; when it was asked for, which is never later than its first billed minute."""
    closed_at: float | None = None
    """When the provider said, twice, that it is gone; None: it costs money."""
    instance_id: str = ""
    what: str = ""
    """Kind and region, in words."""

    def hours(self, until: float | None = None) -> float:
        """How long it has cost money, in hours; up to `until` (seconds since 1970) while it does."""
        end = self.closed_at if self.closed_at is not None else (until or clock.timestamp())
        return max(end - self.opened_at, 0.0) / 3600

    def usd(self, until: float | None = None) -> float:
        """An estimate that rounds up: each started minute is a whole one."""
        return usd(self.hours(until), self.price_usd_per_hour)


def usd(hours: float, price_usd_per_hour: float) -> float:
    """What so long costs where each started minute is billed, in USD."""
    return math.ceil(round(hours * 60, 6)) / 60 * price_usd_per_hour


def path() -> Path:
    """The ledger of this state folder."""
    return config.state_folder() / "ledger.jsonl"


def open_lease(lease: Lease) -> None:
    """Note that something costs money from now on. The same marker twice is one lease."""
    _append(
        f"{lease.marker}/opened",
        machine=lease.machine,
        provider=lease.provider,
        price_usd_per_hour=lease.price_usd_per_hour,
        opened_at=lease.opened_at,
        instance_id=lease.instance_id,
        what=lease.what,
    )


def close_lease(marker: str, closed_at: float) -> None:
    """Note that it costs money no more; the first closing of a marker counts, and only after its opening."""
    if any(lease.marker == marker for lease in leases()):
        _append(f"{marker}/closed", closed_at=closed_at)


def leases() -> list[Lease]:
    """Everything that was ever rented from here, oldest first; lines that a power cut damaged are passed over."""
    opened: dict[str, Lease] = {}
    for row in _rows():
        marker, _, event = str(row["key"]).rpartition("/")
        if event == "opened" and marker not in opened:
            names = ("machine", "provider", "price_usd_per_hour", "opened_at", "instance_id", "what")
            opened[marker] = Lease(marker, **{name: row[name] for name in names})
        elif event == "closed" and marker in opened and opened[marker].closed_at is None:
            opened[marker] = Lease(**{**vars(opened[marker]), "closed_at": row["closed_at"]})
    return list(opened.values())


def _rows() -> Iterator[rows.Row]:
    yield from rows.read([path()])


def _append(key: str, **facts: object) -> None:
    """Append one line, durable when this returns, unless a line of that key is there."""
    line = rows.encode({"key": key, "error": None, "at": clock.now(), **facts})
    durable.have_folder(path().parent)
    try:
        with locks.held(path().with_suffix(".lock"), _LOCK_WAIT_S):
            rows.repair(path())
            if any(row["key"] == key for row in _rows()):
                return
            with durable.opened(path(), os.O_WRONLY | os.O_CREAT) as descriptor:
                durable.append(descriptor, line, os.lseek(descriptor, 0, os.SEEK_END))
                durable.sync(descriptor)
            durable.sync_folder(path().parent)
    except TimeoutError:
        raise ConfigError(f"{path()} is held by another process. Nothing was noted.", "Try again.") from None

"""What was rented and what it cost: a file that only grows, synced, one line per opening, change and end of a cost."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    """From its opening on."""
    opened_at: float
    """Seconds since 1970; when it was asked for, which is never later than its first billed minute."""
    closed_at: float | None = None
    """When the provider said, twice, that it is gone; None: it costs money."""
    instance_id: str = ""
    what: str = ""
    """Kind and region, in words."""
    changes: tuple[tuple[float, float], ...] = ()
    """Since when (seconds since 1970) it has cost how many USD an hour, where that has changed; the oldest first."""

    @property
    def price_now(self) -> float:
        """What it costs now, in USD an hour, or cost last."""
        return self.changes[-1][1] if self.changes else self.price_usd_per_hour

    def hours(self, until: float | None = None) -> float:
        """How long it has cost money, in hours; up to `until` (seconds since 1970) while it does."""
        end = self.closed_at if self.closed_at is not None else (until or clock.timestamp())
        return max(end - self.opened_at, 0.0) / 3600

    def usd(self, until: float | None = None) -> float:
        """An estimate that rounds up: each started minute is a whole one."""
        return self.usd_within(self.opened_at, self.closed_at or until or clock.timestamp())

    def usd_within(self, begun: float, ended: float) -> float:
        """The same of what it cost between two moments (seconds since 1970)."""
        ended = ended if self.closed_at is None else min(ended, self.closed_at)
        spells = [(self.opened_at, self.price_usd_per_hour), *self.changes]
        ends = [*(since for since, _ in spells[1:]), math.inf]
        return sum(
            usd(max(min(end, ended) - max(since, begun), 0.0) / 3600, price)
            for (since, price), end in zip(spells, ends, strict=True)
        )

    def priced(self, since: float, price_usd_per_hour: float) -> Lease:
        """The same lease at another price from then on, whatever it was said to cost after that."""
        if since <= self.opened_at:
            return replace(self, price_usd_per_hour=price_usd_per_hour, changes=())
        kept = (change for change in self.changes if change[0] < since)
        return replace(self, changes=(*kept, (since, price_usd_per_hour)))


def usd(hours: float, price_usd_per_hour: float) -> float:
    """What so long costs where each started minute is billed, in USD."""
    return math.ceil(round(hours * 60, 6)) / 60 * price_usd_per_hour


def shown(usd: float, digits: int = 2) -> str:
    """An amount of USD for a person, rounded up to the cent: what was spent is never told as less."""
    return f"{math.ceil(round(usd * 10**digits, 6)) / 10**digits:.{digits}f}"


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


def change_price(marker: str, price_usd_per_hour: float, since: float = 0.0) -> None:
    """Note what it costs from then on (seconds since 1970; its opening), whatever was noted of the time after that."""
    lease, number = find(marker), sum(str(row["key"]).startswith(f"{marker}/price/") for row in _rows())
    if lease is None or lease.closed_at is not None:
        return
    begun = lease.changes[-1][0] if lease.changes else lease.opened_at
    if lease.price_now != price_usd_per_hour or (since < begun and lease.changes):
        _append(f"{marker}/price/{number}", price_usd_per_hour=price_usd_per_hour, since=since)


def find(marker: str) -> Lease | None:
    """The lease of that marker; None when there is none."""
    return next((lease for lease in leases() if lease.marker == marker), None)


def close_lease(marker: str, closed_at: float) -> None:
    """Note that it costs money no more; the first closing of a marker counts, and only after its opening."""
    if find(marker) is not None:
        _append(f"{marker}/closed", closed_at=closed_at)


def leases() -> list[Lease]:
    """Everything that was ever rented from here, oldest first; lines that a power cut damaged are passed over."""
    opened: dict[str, Lease] = {}
    for row in _rows():
        marker, _, event = str(row["key"]).partition("/")
        if event == "opened" and marker not in opened:
            names = ("machine", "provider", "price_usd_per_hour", "opened_at", "instance_id", "what")
            opened[marker] = Lease(marker, **{name: row[name] for name in names})
        elif event == "closed" and marker in opened and opened[marker].closed_at is None:
            opened[marker] = replace(opened[marker], closed_at=row["closed_at"])
        elif event.startswith("price/") and marker in opened and opened[marker].closed_at is None:
            opened[marker] = opened[marker].priced(row["since"], row["price_usd_per_hour"])
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

"""The laptop's records of rented machines: what was asked for and what came of it, on the disk before each act."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from jobs import durable, locks, spec
from orchestrator import clock, ledger, machines
from orchestrator.errors import ConfigError, UsageError
from orchestrator.providers.base import Instance, Need, Offer

ENDED = ("gone", "lost", "refused")
"""States in which nothing of it costs money any more, as far as its provider says."""
_LOCK_WAIT_S = 5.0


@dataclass(frozen=True)
class Caps:
    """What a rented machine may cost; None: no limit, which must have been typed."""

    max_hours: float | None = 12.0
    idle_minutes: float | None = 30.0
    budget_usd: float | None = None

    def hours(self, price_usd_per_hour: float) -> float | None:
        """How long it may run at that price, in whole minutes of a budget; None: for ever."""
        has_end = self.budget_usd is not None and price_usd_per_hour
        bought = math.floor((self.budget_usd or 0.0) / price_usd_per_hour * 60) / 60 if has_end else None
        return min((limit for limit in (self.max_hours, bought) if limit is not None), default=None)

    def less(self, spent: Iterable[ledger.Lease]) -> Caps:
        """What is left of them after these; 0.0 where that is nothing."""
        leases = list(spent)
        hours, usd = sum(lease.hours() for lease in leases), round(sum(lease.usd() for lease in leases), 4)
        return replace(
            self,
            max_hours=None if self.max_hours is None else max(self.max_hours - hours, 0.0),
            budget_usd=None if self.budget_usd is None else max(self.budget_usd - usd, 0.0),
        )


@dataclass(frozen=True)
class Terms:
    """On what terms a machine is rented."""

    need: Need
    caps: Caps
    guard: str
    """Who ends it when its time is over."""
    python: str | None = None
    """The interpreter asked for with --python."""


@dataclass
class Record:
    """What rental.json says. `state`: planned, launching, booting, ready, stopped, stopping, or an ended one.

    `stopped`: its disk is kept and billed, and nothing runs. `launching` from before the paid request until its outcome
    is known: an instance with the marker may exist.
    """

    name: str
    provider: str
    need: dict[str, Any]
    caps: dict[str, Any]
    made_at: str
    state: str = "planned"
    raw_state: str | None = None
    marker: str = ""
    """Of the newest paid request."""
    lease: str = ""
    """What the ledger calls its cost, where that is not its marker: another lease has that."""
    offer: dict[str, Any] = field(default_factory=dict)
    """What that request was for."""
    price_usd_per_hour: float | None = None
    """Of the instance, by its provider's own word; None: as it was offered."""
    asked_at: float | None = None
    """When it was sent, in seconds since 1970."""
    instance_id: str | None = None
    user: str = ""
    host: str | None = None
    port: int = 22
    launched_at: str | None = None
    ready_at: str | None = None
    gone_at: float | None = None
    deadline: float | None = None
    """When it is given back whatever happens, in seconds since 1970; None: never."""
    unhealthy_at: float | None = None
    """Since when its provider calls it unhealthy and it does not answer, in seconds since 1970."""
    kept_until: float | None = None
    """After a failed run: idle or not, it is left alone until then, and given back after; None: it is not kept so."""
    guard: str = "laptop"
    key_name: str = ""
    """Of its public key in the account."""
    account: str = ""
    """Which account key it was rented with, as a digest."""
    clouds: list[str] = field(default_factory=list)
    """Where it may be rented; empty: at `provider` alone, which else is where it was asked for last."""
    tried: list[dict[str, str]] = field(default_factory=list)
    """Offers that came to nothing: `offer`, `why`, and `place` where a machine was no good."""
    python: str | None = None
    """The interpreter asked for with --python."""
    guard_seen: dict[str, Any] = field(default_factory=dict)
    """What a guard on the machine said last: `alive`, `deadline`, `at` (seconds since 1970), `phase`, `error`."""
    unattended: bool = False
    """Whether its launch was told not to wait: that it boots, and nobody looks, is meant."""
    is_told: bool = False
    """Whether it was said that most of its budget is spent."""
    failure: str = ""


@dataclass
class Rental:
    """A rented machine: its folder here, and where it stands."""

    folder: Path
    record: Record

    @property
    def name(self) -> str:
        """What it is called here."""
        return self.record.name

    def save(self, **changes: Any) -> None:
        """Change the record and put it on the disk, durably, before anything is done because of it."""
        changed = replace(self.record, **changes)
        durable.save_json(_path(self.folder), asdict(changed))
        self.record = changed

    def note(self, **changes: Any) -> None:
        """The same for what has happened already; a disk that takes nothing must not keep a machine from its end."""
        try:
            self.save(**changes)
        except OSError:
            self.record = replace(self.record, **changes)

    def reload(self) -> None:
        """Read the record again: another process of ours may have gone on with it."""
        self.record = _load_record(_path(self.folder))

    @property
    def price_usd_per_hour(self) -> float | None:
        """Of the machine it is, or was asked to be."""
        told, offered = self.record.price_usd_per_hour, self.record.offer.get("price_usd_per_hour")
        price = offered if told is None else told
        return float(price) if price is not None else None

    @property
    def price_now(self) -> float | None:
        """What it costs just now: of one that is stopped, as far as that is told, its disk alone."""
        lease = ledger.find(self._lease) if self.record.state == "stopped" else None
        return self.price_usd_per_hour if lease is None else lease.price_now

    @property
    def _lease(self) -> str:
        """What the ledger calls the cost of its newest request."""
        return self.record.lease or self.record.marker

    def usd(self) -> float:
        """What it has cost so far, all of its instances, in USD; an estimate that rounds up."""
        return round(sum(lease.usd() for lease in self.leases()), 4)

    @property
    def may_cost(self) -> bool:
        """Whether something of it may cost money now."""
        return self.record.state in ("launching", "booting", "ready", "stopped", "stopping")

    def offer(self) -> Offer:
        """What the newest request was for."""
        return Offer(**self.record.offer)

    def caps(self) -> Caps:
        """Its limits."""
        return Caps(**self.record.caps)

    def need(self) -> Need:
        """What was asked for."""
        return Need(**self.record.need)

    def exists(self, instance_id: str) -> None:
        """Take over that the newest request has become an instance: its cost is in the ledger before it is believed."""
        self.costs(instance_id)
        self.save(state="booting", instance_id=instance_id, launched_at=clock.now())

    def costs(self, instance_id: str) -> None:
        """Note in the ledger that an instance costs money, from when it was asked for."""
        record = self.record
        ledger.open_lease(
            ledger.Lease(
                self._lease,
                record.name,
                record.provider,
                price_usd_per_hour=float(record.offer["price_usd_per_hour"]),
                opened_at=float(record.asked_at or clock.timestamp()),
                instance_id=instance_id,
                what=self.in_words(),
            )
        )

    def costs_as(self, found: Instance) -> None:
        """Take over what its provider says that its instance costs: in the ledger, then in the record.

        Its first word counts from the request on, and may bring the end that a budget buys nearer. While it is stopped
        only its disk costs, unless it would wake by itself; one that was woken by others has cost its price since.
        """
        told, record, now = found.price_usd_per_hour, self.record, clock.timestamp()
        if told and told != record.price_usd_per_hour:
            ledger.change_price(self._lease, told, 0.0 if record.price_usd_per_hour is None else now)
            self.save(price_usd_per_hour=told, deadline=self._end_at(told))
        if found.spot or self.offer().spot or (lease := ledger.find(self._lease)) is None:
            return
        charged, price = found.charged_usd_per_hour, self.price_usd_per_hour or 0.0
        is_less = charged is not None and charged < price  # one that has ended by itself may be charged as before
        if found.state == "stopped" and is_less and record.state != "booting":  # a start is seen late
            ledger.change_price(self._lease, charged or 0.0, now)
        elif found.state in ("booting", "ready") and lease.changes and lease.price_now < price:
            ledger.change_price(self._lease, price, lease.changes[-1][0])

    def _end_at(self, price_usd_per_hour: float) -> float | None:
        """Its deadline, or, where that is sooner, when its budget is spent at that price."""
        caps, record = self.caps(), self.record
        if caps.budget_usd is None or record.deadline is None or record.asked_at is None:
            return record.deadline
        hours = caps.less(lease for lease in self.leases() if lease.marker != self._lease).hours(price_usd_per_hour)
        return record.deadline if hours is None else min(record.deadline, record.asked_at + hours * 3600)

    def wakes(self, at: float) -> None:
        """Note that it costs its whole price again from then on (seconds since 1970): it was started."""
        ledger.change_price(self._lease, self.price_usd_per_hour or 0.0, at)

    def is_gone(self, state: str = "gone", why: str = "") -> None:
        """Take over that the provider said, twice, that the instance is gone: it costs no more."""
        now = clock.timestamp()
        ledger.close_lease(self._lease, now)
        self.save(state=state, gone_at=now, failure=why, raw_state=None)

    def leases(self) -> list[ledger.Lease]:
        """What of the ledger this machine has cost; an earlier one of the same name is another."""
        made_at, newest = clock.parse(self.record.made_at).timestamp(), self._lease
        mine = [lease for lease in ledger.leases() if lease.machine == self.name]
        return [lease for lease in mine if lease.opened_at >= made_at or lease.marker == newest]

    def caps_left(self) -> Caps:
        """Its limits, less what machines have taken that were given back because they were no good."""
        return self.caps().less(self.leases())

    def in_words(self) -> str:
        """Kind and region."""
        offer = self.record.offer
        return f"{offer.get('type_name', '?')} in {offer.get('region') or '?'}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the one process that launches or gives back this machine; the record is read anew inside.

        On a disk that takes no lock nobody can launch, and an end may be asked for by several.
        """
        try:
            lock = locks.take(self._lock, _LOCK_WAIT_S)
        except OSError:
            self.reload()
            yield
            return
        try:
            if lock is None or not self._is_mine(lock):
                raise ConfigError(
                    f"Another command launches or gives back {self.name} just now. Nothing was changed.",
                    f"Wait for it, or look where it stands: gpu status {self.name}",
                )
            self.reload()
            yield
        finally:
            if lock is not None:
                os.close(lock)

    @property
    def _lock(self) -> Path:
        return self.folder / "rental.lock"

    def _is_mine(self, lock: int) -> bool:
        """Whether the lock is that of the folder as it is now: another machine of the name may have its place."""
        try:
            return os.path.samestat(os.fstat(lock), self._lock.stat())
        except FileNotFoundError:
            return False


def _path(folder: Path) -> Path:
    return folder / "rental.json"


def _load_record(path: Path) -> Record:
    document = durable.load_news(path)
    known = {entry.name for entry in fields(Record)}
    try:
        record = Record(**{name: value for name, value in document.items() if name in known})
        if record.offer:
            Offer(**record.offer)
        Caps(**record.caps)
        Need(**record.need)
    except TypeError:
        raise ConfigError(
            f"{path} is damaged: it is not the record of a rented machine, which may go on costing money.",
            "See what your account has: gpu audit",
        ) from None
    return record


def known() -> list[Rental]:
    """Every machine that was rented from here and not cleaned away, by name."""
    found = []
    for path in sorted((machines.folder(machines.LOCAL).parent).glob("[!.]*/rental.json")):
        try:
            found.append(Rental(path.parent, _load_record(path)))
        except ConfigError as error:  # one damaged record must not hide all others
            print(f"Passed over: {error.message}", file=sys.stderr)  # noqa: T201
    return found


def find(name: str) -> Rental | None:
    """The rented machine of that name; None when the name is of a box of one's own, or nothing."""
    path = _path(machines.folder(name))
    return Rental(path.parent, _load_record(path)) if path.is_file() else None


def price_usd_per_hour(name: str) -> float:
    """What the machine of that name costs; 0 for one that is not rented."""
    rental = find(name)
    return (rental.price_usd_per_hour or 0.0) if rental else 0.0


def is_gone(name: str) -> bool:
    """Whether a machine was rented and is no more, by its provider's own word."""
    rental = find(name)
    return rental is not None and rental.record.state in ENDED


def choose(name: str | None) -> Rental:
    """The rented machine that is meant: the one named, else the only one that may cost money. UsageError else."""
    if name is not None:
        found = find(name)
        if found is None:
            names = [rental.name for rental in known()]
            raise UsageError(f"There is no rented machine {name!r}: {spec.nearest(name, names)}", "See: gpu status")
        return found
    open_ones = [rental for rental in known() if rental.record.state not in ENDED]
    if len(open_ones) != 1:
        shown = ", ".join(rental.name for rental in open_ones) or "none"
        raise UsageError(f"Say which rented machine; there are: {shown}.", "See: gpu status")
    return open_ones[0]


def create(name: str, provider: str, terms: Terms, **found: Any) -> Rental:
    """Make the folder of a machine that is to be rented; UsageError when the name is taken by one that is not gone.

    `found`: fields of the record of one that is rented already, and costs money. ConfigError when it cannot be
    written: what is not remembered is not rented.
    """
    machines.check_name(name)
    try:
        return _create(name, provider, terms, found)
    except OSError as error:
        where = error.filename or machines.folder(name)
        raise ConfigError(
            f"The record of {name} cannot be written: {where}: {error.strerror}. Nothing was rented.",
            "Set GPU_HOME to a folder you can write to, or free some space.",
        ) from None


def _create(name: str, provider: str, terms: Terms, found: dict[str, Any]) -> Rental:
    with machines.locked():
        folder = machines.folder(name)
        old = find(name)
        if (folder / "machine.json").is_file() and old is None:
            raise UsageError(f"There is a machine {name} already. Nothing was rented.", "Choose another name.")
        if old is not None and old.record.state not in ENDED:
            raise UsageError(
                f"There is a rented machine {name} already; it is {old.record.state}. Nothing was rented.",
                f"Go on with it: gpu wait {name}. For another one: gpu launch OTHERNAME …",
            )
        if old is not None:
            with old.locked():  # who has just ended it may not be done with its folder
                machines.remove(name)
        durable.have_folder(folder)
        need, caps = asdict(terms.need), asdict(terms.caps)
        record = Record(name, provider, need, caps, clock.now(), python=terms.python, guard=terms.guard, **found)
        rental = Rental(folder, record)
        if record.instance_id is not None:
            rental.costs(record.instance_id)
        rental.save()
    return rental

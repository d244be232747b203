"""What may cost money without anybody meaning it: requests without an answer, machines forgotten or past their caps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator import clock, guarding, ledger, machines, market, rentals, returning
from orchestrator.errors import GpuError, MayCost, UsageError
from orchestrator.providers.base import Instance, Need, Offer, Provider, marked_at
from orchestrator.rentals import Caps, Rental, Terms

_SAME_MAX = 100
Say = Callable[[str], None]


@dataclass
class Findings:
    """What one account has, compared with what is remembered here."""

    unresolved: list[Rental] = field(default_factory=list)
    """Paid requests without an answer, and ends that were begun, at which no command is just now."""
    orphans: list[Instance] = field(default_factory=list)
    past_cap: list[Rental | Instance] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Take over what another account has."""
        self.unresolved += other.unresolved
        self.orphans += other.orphans
        self.past_cap += other.past_cap

    def count(self) -> int:
        """How many there are."""
        return len(self.unresolved) + len(self.orphans) + len(self.past_cap)

    def __bool__(self) -> bool:
        return self.count() > 0

    def document(self) -> dict[str, Any]:
        """As `gpu audit --json` gives it."""
        return {
            "unresolved": [_of_rental(rental) for rental in self.unresolved],
            "orphans": [_of_instance(instance) for instance in self.orphans],
            "past_cap": [
                _of_rental(entry) if isinstance(entry, Rental) else _of_instance(entry) for entry in self.past_cap
            ],
        }


def _of_rental(rental: Rental) -> dict[str, Any]:
    record = rental.record
    return {
        "name": record.name,
        "provider": record.provider,
        "marker": record.marker,
        "instance_id": record.instance_id,
        "state": record.state,
        "price_usd_per_hour": rental.price_usd_per_hour,
        "deadline": guarding.moment(record.deadline),
    }


def _of_instance(instance: Instance) -> dict[str, Any]:
    return {
        "name": instance.tags.get("gpu-name"),
        "provider": None,
        "marker": instance.marker,
        "instance_id": instance.instance_id,
        "state": instance.raw_state,
        "price_usd_per_hour": instance.price_usd_per_hour,
        "deadline": guarding.moment(_deadline(instance)),
    }


def _deadline(instance: Instance) -> float | None:
    """Of an instance's tags: seconds since 1970; None: none, or none that can be read."""
    told = instance.tags.get("gpu-deadline", "")
    return float(told) if told.isdigit() else None


def look(provider: Provider, *, past_cap_only: bool = False) -> Findings:
    """Compare what the account has with what is remembered here; changes nothing."""
    listed = [entry for entry in provider.instances() if entry.marker and entry.state not in ("gone", "stopping")]
    mine = [rental for rental in rentals.known() if rental.record.provider == provider.name and rental.may_cost]
    found = Findings()
    for rental in mine:
        if guarding.is_past(rental):
            found.past_cap.append(rental)
        elif _is_left(rental) and not _is_at_work(rental):
            found.unresolved.append(rental)
    now = clock.timestamp()
    for entry in listed:
        if any(_is_of(entry, rental) for rental in mine):
            continue
        deadline = _deadline(entry)
        (found.past_cap if deadline is not None and now >= deadline else found.orphans).append(entry)
    return Findings(past_cap=found.past_cap) if past_cap_only else found


def _is_of(entry: Instance, rental: Rental) -> bool:
    """Whether a record's machine is this instance, or may turn out to be."""
    return entry.marker == rental.record.marker and rental.record.instance_id in (None, entry.instance_id)


def _is_left(rental: Rental) -> bool:
    """Whether something was begun and not ended: a request, the way up to ready (unless nobody was to wait), an end."""
    record = rental.record
    return record.state in ("launching", "stopping") or (record.state == "booting" and not record.unattended)


def _is_at_work(rental: Rental) -> bool:
    """Whether a command of ours is at it just now."""
    from jobs import locks

    return locks.is_held(rental.folder / "rental.lock")


def fix(provider: Provider, found: Findings, say: Say) -> list[GpuError]:
    """End what was found; returns what went wrong. What bears no marker of ours is never touched."""
    errors: list[GpuError] = []
    late: list[tuple[Rental | Instance, bool]] = [(entry, True) for entry in found.past_cap]
    forgotten: list[Rental | Instance] = [*found.unresolved, *found.orphans]
    for entry, is_late in (*late, *((entry, False) for entry in forgotten)):
        with _kept(errors):
            _end(provider, entry, say, discard=is_late)
    return errors


@contextlib.contextmanager
def _kept(errors: list[GpuError]) -> Any:
    try:
        yield
    except GpuError as error:
        errors.append(error)
    except OSError as error:
        errors.append(MayCost(f"{error.filename or 'The state folder'}: {error.strerror}. What was found goes on."))


def _end(provider: Provider, entry: Rental | Instance, say: Say, *, discard: bool) -> None:
    rental = entry if isinstance(entry, Rental) else rebuild(provider, entry)
    with rental.locked():
        provider = market.account_of(rental)
        if discard:
            returning.at_deadline(rental, provider, say)
        else:
            returning.end(rental, provider, say)


def rebuild(provider: Provider, instance: Instance) -> Rental:
    """The record, by which it is ended, of an instance of ours that nobody here remembers: from marker and tags alone.

    It is made in one piece: with half of it, a command that is typed next could rent a machine in its name.
    """
    marker = instance.marker
    if marker is None:
        raise UsageError(f"{instance.instance_id} bears no marker of ours. It is not touched.")
    name = _free_name(instance.tags.get("gpu-name", ""), marker)
    terms = Terms(Need(), Caps(None, None, None), instance.tags.get("gpu-guard", "laptop"))
    return rentals.create(
        name,
        provider.name,
        terms,
        state="stopping",
        marker=marker,
        lease=_free_lease(marker, instance.instance_id),
        offer=asdict(_offer(provider, instance)),
        asked_at=marked_at(marker),
        instance_id=instance.instance_id,
        raw_state=instance.raw_state,
        account=provider.account,
        deadline=_deadline(instance),
        key_name=next((key for key in instance.key_names if key.startswith("gpu-2")), ""),
    )


def _free_lease(marker: str, instance_id: str) -> str:
    """What the ledger is to call the cost of an instance whose marker stands there for another, or for one closed."""
    is_taken = any(
        lease.marker == marker and (lease.instance_id != instance_id or lease.closed_at is not None)
        for lease in ledger.leases()
    )
    return f"{marker}+{instance_id}" if is_taken else ""


def _free_name(name: str, marker: str) -> str:
    """What it was called, if that can be a name and is free here; else its marker, with a number if need be."""
    with contextlib.suppress(UsageError):
        machines.check_name(name)
        if not machines.folder(name).exists():
            return name
    numbered = [marker, *(f"{marker}-{number}" for number in range(2, _SAME_MAX))]
    return next((free for free in numbered if not machines.folder(free).exists()), marker)


def _offer(provider: Provider, instance: Instance) -> Offer:
    return Offer(
        provider=provider.name,
        offer_id=f"{instance.type_name}@{instance.region}",
        type_name=instance.type_name,
        gpu=None,
        count=0,
        vram_gb=None,
        vcpus=None,
        ram_gb=None,
        disk_gb=None,
        region=instance.region,
        price_usd_per_hour=instance.price_usd_per_hour or 0.0,
    )

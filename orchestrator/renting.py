"""From what was typed to a rented machine: what is asked for, what it may cost, and the launch itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator import gpus, guarding, launching, ledger, machines, market, money, offers, rentals
from orchestrator.errors import ConfigError, GpuError, NoCapacity, Refused, UsageError
from orchestrator.providers.base import Need, Offer, Provider
from orchestrator.rentals import ENDED, Caps, Rental, Terms

if TYPE_CHECKING:
    from orchestrator.preflight import Preflight

_SLUG = re.compile(r"[^a-z0-9]+")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What a user typed about a machine to be rented."""

    need: Need
    caps: Caps
    provider: str | None = None
    python: str | None = None
    wait_capacity: bool = False


def wish(how: dict[str, Any]) -> Wish:
    """What a command that rents was asked: one GPU unless it is said, and caps."""
    asked = market.need(how)
    caps = Caps(how["max_hours"], how["idle_minutes"], how["budget"])
    one = asked if asked.count is not None else replace(asked, count=1)
    return Wish(one, caps, how["provider"], how["python"], how["wait_capacity"])


def plan(asked: Wish, say: Say | None = None) -> tuple[Provider, Offer]:
    """The cloud and the offer that a launch would begin with, checked against every limit; nothing is rented.

    While capacity is to be waited for, the cheapest offer that fits, had or not. `say`: told of a cloud that does not
    answer.
    """
    found = market.accounts(asked.provider)
    fitting = _fitting(asked, market.listed(found, asked.need, say))
    clouds = {offer.provider: offer for offer in reversed(fitting)}  # the cheapest of each
    refusals: list[Refused] = []
    for name in dict.fromkeys(offer.provider for offer in fitting):
        account = next(entry for entry in found if entry.name == name)
        market.check_clock(account)
        try:
            money.check(clouds[name], asked.caps, account)
        except Refused as error:
            refusals.append(error)
            continue
        if say is not None:
            for refusal in refusals:
                say(f"{refusal.message} Another cloud is asked.")
        return account, clouds[name]
    raise refusals[0]


def plan_for(looked: Preflight, asked: Wish, say: Say) -> tuple[Provider, Offer]:
    """The same for a job that was looked at: where its memory in training is known, which GPUs it fits on is said.

    Raises ConfigError when it fits on none of the kind that was asked for, with what would make it fit.
    """
    training = looked.training
    if training is None:
        return plan(asked, say)
    need = replace(Need(count=asked.need.count), hours=asked.need.hours)
    offered = market.listed(market.accounts(asked.provider), need)
    for line in training.among(offered):
        say(line)
    most = max((one.vram_gb or 0.0 for one in offered if offers.is_called(one, asked.need.gpu or "")), default=0.0)
    if most and most < gpus.VRAM_SLACK * (looked.needed_vram_gb or 0.0):
        raise ConfigError(
            f"{training.line()} The largest {asked.need.gpu} there is has {most:g} GB. Nothing was rented.",
            training.hint(most * 1e9),
        )
    return plan(asked, say)


def _fitting(asked: Wish, offered: Sequence[Offer]) -> list[Offer]:
    """The offers a launch may begin with. A region without any is one that has none free: it can be waited for."""
    try:
        return offers.suitable(offered, asked.need, had_or_not=asked.wait_capacity)
    except NoCapacity:
        if not asked.wait_capacity or asked.need.region is None:
            raise
        return offers.suitable(offered, replace(asked.need, region=None), had_or_not=True)


def in_words(asked: Wish, account: Provider, offer: Offer) -> list[str]:
    """What a launch means, in plain words: what, what it costs at most, and who ends it."""
    most = money.at_most(offer.price_usd_per_hour, asked.caps)
    hours = asked.caps.hours(offer.price_usd_per_hour)
    limit = "NO LIMIT: it costs until you end it"
    if hours is not None and most is not None:
        limit = f"at most {hours:.2f} h, {ledger.shown(most)} USD"
    idle = asked.caps.idle_minutes
    idle_words = "not ended when idle" if idle is None else f"ended after {idle:g} idle minutes, once its rows are home"
    hard = "No deadline ends it." if hours is None else "At the hard deadline it is ended with whatever is on it."
    guard = guarding.explained(account.guard or guarding.chosen())
    is_open = account.guard is None and not guarding.is_chosen()
    return [
        *market.overridden([account], asked.need),
        f"Rent {offers.in_words(offer)}: {limit}; {idle_words}.",
        f"{hard} Guard: {guard}." + (" Choose another: gpu guard setup" if is_open else ""),
    ]


def default_name(asked: Wish, offer: Offer) -> str:
    """What a machine is called when nobody says: after its GPU, so that the same launch twice is noticed."""
    words = asked.need.gpu or offer.gpu or offer.type_name
    return _SLUG.sub("-", words.lower()).strip("-")[:40] or "machine"


def check_name(name: str) -> None:
    """Raise UsageError unless a machine of that name can be rented now."""
    machines.check_name(name)
    if rentals.find(name) is not None or (machines.folder(name) / "machine.json").is_file():
        raise UsageError(f"There is a machine {name} already. Nothing was rented.", "Type the same command again.")


def rent(name: str, asked: Wish, account: Provider) -> Rental:
    """Make the record of a machine that is to be rented: from here on it can be gone on with. Nothing is asked yet."""
    terms = Terms(asked.need, asked.caps, account.guard or guarding.chosen(), asked.python)
    clouds = [cloud.name for cloud in market.accounts(asked.provider)]
    return rentals.create(name, account.name, terms, clouds=clouds)


def ensure_ready(name: str, say: Say, *, wait_capacity: bool = False) -> None:
    """Go on with a rented machine until it is ready; nothing for any other machine. **May spend money.**"""
    rental = rentals.find(name)
    if rental is None or rental.record.state == "ready":
        return
    with rental.locked():
        if rental.record.state in ENDED:
            raise gone(rental)
        launching.launch(rental, say, wait_capacity=wait_capacity)
        if rental.record.state in ENDED:
            raise gone(rental)


def gone(rental: Rental) -> GpuError:
    """The error of a machine that is no more."""
    why = f" {rental.record.failure}" if rental.record.failure else ""
    return ConfigError(
        f"{rental.name} is {rental.record.state}.{why}", "Rent another one: gpu launch, or gpu resume RUN --gpu …"
    )


def costs() -> dict[str, Any]:
    """The document of `gpu cost --json`."""
    from orchestrator import runs

    leases, stopped = ledger.leases(), {it.name for it in rentals.known() if it.record.state == "stopped"}
    of_machines: dict[str, dict[str, Any]] = {}
    for lease in leases:
        entry = of_machines.setdefault(
            lease.machine,
            {"name": lease.machine, "provider": lease.provider, "hours": 0.0, "usd": 0.0, "open": False}
            | {"price_now_usd_per_hour": 0.0, "stopped": lease.machine in stopped},
        )
        entry["hours"] = round(entry["hours"] + lease.hours(), 4)
        entry["usd"] = round(entry["usd"] + lease.usd(), 4)
        entry["open"] = entry["open"] or lease.closed_at is None
        entry["price_now_usd_per_hour"] += lease.price_now if lease.closed_at is None else 0.0
    of_runs = []
    for run in runs.remembered():
        usd, rows = run.cost_usd(), run.record.rows_home
        per_1000 = round(usd / rows * 1000, 6) if rows else None
        of_runs.append({"run_id": run.run_id, "usd": round(usd, 4), "rows": rows, "usd_per_1000_rows": per_1000})
    total = round(sum(entry["usd"] for entry in of_machines.values()), 4)
    return {"machines": list(of_machines.values()), "runs": of_runs, "total_usd": total}


def go_on(rental: Rental, say: Say, *, wait_capacity: bool, until_rented: bool) -> None:
    """Go on with a launch until the machine is ready, or only until something is rented. **Spends money.**

    Raises ConfigError when it is given back instead, because that had begun.
    """
    with rental.locked():
        rental.save(unattended=until_rented)
        while rental.record.state in ("planned", "launching") or (
            not until_rented and rental.record.state not in ("ready", *ENDED)
        ):
            launching.advance(rental, say, wait_capacity=wait_capacity)
        if rental.record.state in ENDED:
            raise gone(rental)


def left(rental: Rental) -> str:
    """What Ctrl-C leaves: whether something costs money, and the two commands that go on, or give it back."""
    if not rental.may_cost:
        return f"\nLeft {rental.name} as it is; nothing is rented."
    price = rental.price_usd_per_hour or 0.0
    carry_on = "" if rental.record.state == "stopping" else f"Carry on:       gpu wait {rental.name}\n"
    return (
        f"\nLeft {rental.name} as it is; it MAY COST {ledger.shown(price)} USD/h.\n"
        f"{carry_on}Give it back:   gpu terminate {rental.name}"
    )

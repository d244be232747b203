"""The machines rented for a run that several share: budget, hours and their number hold for all of them together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator import clock, guarding, inventory, ledger, market, rentals, renting, returning, runs, tenancy
from orchestrator.errors import GpuError, MayCost
from orchestrator.rentals import ENDED, Caps, Rental
from orchestrator.renting import Wish
from orchestrator.runs import Run

SPARE_MAX = 3
"""How many machines may be rented for a run, one after the other, beyond those that share it."""
Say = Callable[[str], None]


def document(wish: Wish) -> dict[str, Any]:
    """A wish as the run's record keeps it, with when it was agreed to: its hours begin with the first machine then."""
    return {**tenancy.document(wish), "agreed_at": clock.timestamp()}


def part_of(wish: Wish, machines: int) -> Wish:
    """What each of so many machines may cost at first, where their budget is one."""
    budget = wish.caps.budget_usd
    return replace(wish, caps=replace(wish.caps, budget_usd=None if budget is None else budget / machines))


def of(run: Run) -> list[Rental]:
    """Every machine that was rented for the run and is remembered, oldest first."""
    found = [rental for rental in rentals.known() if _number(run, rental.name)]
    return sorted(found, key=lambda rental: _number(run, rental.name))


def live(run: Run) -> list[Rental]:
    """Those of them that may cost money, or are about to."""
    return [rental for rental in of(run) if rental.record.state not in ENDED]


def _number(run: Run, name: str) -> int:
    """Which of the run's machines has that name: NAME, NAME-2, NAME-3…; 0 for none of them."""
    found = re.fullmatch(re.escape(tenancy.name_for(run.run_id)) + r"(?:-([1-9][0-9]*))?", name)
    return int(found[1] or 1) if found else 0


def _leases(run: Run) -> list[ledger.Lease]:
    return [lease for lease in ledger.leases() if _number(run, lease.machine)]


def begin(run: Run, to_come: int) -> str | None:
    """Make the record of one more machine for the run, and return its name; None when its caps allow none.

    It may cost what is left of the budget, divided by `to_come`: how many are to be rented now, this one included.
    Nobody is asked but for offers. Raises GpuError.
    """
    wish = tenancy.wish(run)
    caps = caps_left(run, wish.caps, to_come) if wish else None
    if wish is None or caps is None:
        return None
    account, _ = renting.plan(replace(wish, caps=caps))
    used = {_number(run, name) for name in _names(run)}
    number = next(number for number in range(1, len(used) + 2) if number not in used)
    name = tenancy.name_for(run.run_id) + ("" if number == 1 else f"-{number}")
    renting.rent(name, replace(wish, caps=caps), account)
    return name


def _names(run: Run) -> set[str]:
    """The names that machines of the run have, or have had."""
    legs = [leg["machine"] for part in (run, *runs.shares(run)) for leg in part.record.legs]
    return {*(rental.name for rental in of(run)), *(lease.machine for lease in _leases(run)), *legs}


def caps_left(run: Run, caps: Caps, to_come: int) -> Caps | None:
    """What one more machine may cost of what all may cost; None when nothing is left, or when there were enough."""
    agreed_at = float(run.record.rents.get("agreed_at") or 0.0)
    leases = [lease for lease in _leases(run) if lease.opened_at >= agreed_at]
    if len({lease.machine for lease in leases} | {rental.name for rental in live(run)}) >= _most(run):
        return None
    hours, budget = caps.max_hours, caps.budget_usd
    if hours is not None and leases:
        hours -= (clock.timestamp() - min(lease.opened_at for lease in leases)) / 3600
    if budget is not None:
        budget = (budget - _bound(run)) / max(to_come, 1)
    if any(limit is not None and limit <= 0 for limit in (hours, budget)):
        return None
    return replace(caps, max_hours=hours, budget_usd=budget)


def _most(run: Run) -> int:
    return run.record.machines + SPARE_MAX


def _bound(run: Run) -> float:
    """What of the budget is spent, or is what a machine that there is may spend."""
    going = {rental.name: rental for rental in live(run)}
    spent = sum(lease.usd() for lease in _leases(run) if lease.machine not in going)
    return spent + sum(map(_may_spend, going.values()))


def _may_spend(rental: Rental) -> float:
    """What a machine that there is may cost until its end: without a budget of its own, until its deadline."""
    budget, deadline = rental.caps().budget_usd, rental.record.deadline
    if budget is None:
        left_h = math.inf if deadline is None else max(deadline - clock.timestamp(), 0.0) / 3600
        return rental.usd() + left_h * (rental.price_usd_per_hour or 0.0)
    return max(rental.usd(), budget)


def shorten(run: Run, name: str) -> None:
    """Have a machine that waited long for its capacity end with the others: the hours are those of the run."""
    rental, wish = rentals.find(name), tenancy.wish(run)
    if rental is None or wish is None or wish.caps.max_hours is None:
        return
    agreed_at = float(run.record.rents.get("agreed_at") or 0.0)
    began = [lease.opened_at for lease in _leases(run) if lease.opened_at >= agreed_at]
    until = min(began, default=clock.timestamp()) + wish.caps.max_hours * 3600
    if rental.record.deadline is not None and rental.record.deadline > until + 60:
        with rental.locked():
            rental.save(deadline=until)


def give_back(run: Run, name: str, say: Say) -> None:
    """Give one of the run's machines back, unless another run is on it. Raises MayCost while it may cost money."""
    rental = rentals.find(name)
    if rental is None or rental.record.state in ENDED:
        return
    ours = {run.run_id, *(share.run_id for share in runs.shares(run))}
    if others := [run_id for run_id in inventory.not_home(name) if run_id not in ours]:
        say(f"{name} is kept: {', '.join(others)} is there too.")
        return
    try:
        with rental.locked():
            returning.give_back(rental, market.account_of(rental), say)
    except GpuError as error:
        raise MayCost(error.message, error.hint) from None
    for line in returning.receipt(rental):
        say(line)


def after(run: Run, say: Say) -> None:
    """Give all of the run's machines back, if that was asked for and it has ended; after a failure once time is over.

    Each is tried. Raises MayCost while one may still cost money.
    """
    left = live(run)
    if not run.record.terminate or run.record.state not in runs.ENDED or not left:
        return
    minutes = run.record.keep_on_failure_minutes if run.record.state != "sealed" else 0.0
    if minutes:
        _keep(left, minutes, say)
    failures = []
    for rental in left:
        try:
            give_back(run, rental.name, say)
        except MayCost as error:
            failures.append(error)
    if failures:
        raise MayCost(" ".join(error.message for error in failures), failures[0].hint)


def _keep(left: list[Rental], minutes: float, say: Say) -> None:
    """Wait before machines are given back, so that somebody can look; the deadline holds if this process dies."""
    until = clock.timestamp() + minutes * 60
    for rental in left:
        with rental.locked():
            rental.save(deadline=min(until, rental.record.deadline or until))
        say(f"{rental.name} is kept until {guarding.moment(rental.record.deadline)}: gpu ssh {rental.name}")
    while (time_left := until - clock.timestamp()) > 0:
        clock.sleep(min(time_left, 5.0))

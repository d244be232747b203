"""The machines rented for a run that several share: budget, hours and their number hold for all of them together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

from jobs import locks
from orchestrator import clock, guarding, inventory, ledger, market, rentals, renting, returning, runs, tenancy
from orchestrator.errors import GpuError, MayCost
from orchestrator.rentals import ENDED, Caps, Rental
from orchestrator.renting import Wish
from orchestrator.runs import Run

SPARE_MAX = 3
"""How many machines may be rented for a run, one after the other, beyond those that share it."""
Say = Callable[[str], None]


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


def costing(run: Run) -> list[Rental]:
    """The machines of the run that may cost money: those rented for it, and those rented before that it was given."""
    given = [rental for name in run.record.boxes if (rental := rentals.find(name)) is not None]
    return [
        *live(run),
        *(rental for rental in given if rental.record.state not in ENDED and not _number(run, rental.name)),
    ]


def _number(run: Run, name: str) -> int:
    """Which of the run's machines has that name: NAME, NAME-2, NAME-3…; 0 for none of them."""
    found = re.fullmatch(re.escape(tenancy.name_for(run.run_id)) + r"(?:-([1-9][0-9]*))?", name)
    return int(found[1] or 1) if found else 0


def _leases(run: Run) -> list[ledger.Lease]:
    return [lease for lease in ledger.leases() if _number(run, lease.machine)]


def _leases_since(run: Run) -> list[ledger.Lease]:
    """Those since its caps were agreed to."""
    return [lease for lease in _leases(run) if lease.opened_at >= float(run.record.rents.get("since") or 0.0)]


def begin(run: Run, to_come: int) -> str | None:
    """Make the record of one more machine for the run, and return its name; None when its caps allow none.

    It may cost what is left of the budget, divided by `to_come`: how many are to be rented now, this one included.
    Nobody is asked but for offers. Raises GpuError.
    """
    wish = tenancy.wish(run)
    caps = caps_left(run, wish.caps, to_come) if wish else None
    if wish is None or caps is None:
        return None
    asked, account = tenancy.planned(replace(wish, caps=caps), is_new=not _leases(run))
    used = {_number(run, name) for name in _names(run)}
    number = next(number for number in range(1, len(used) + 2) if number not in used)
    name = tenancy.name_for(run.run_id) + ("" if number == 1 else f"-{number}")
    renting.rent(name, asked, account)
    return name


def _names(run: Run) -> set[str]:
    """The names that machines of the run have, or have had."""
    legs = [leg["machine"] for part in (run, *runs.shares(run)) for leg in part.record.legs]
    return {*(rental.name for rental in of(run)), *(lease.machine for lease in _leases(run)), *legs}


def caps_left(run: Run, caps: Caps, to_come: int) -> Caps | None:
    """What one more machine may cost of what all may cost; None when nothing is left, or when there were enough."""
    leases = _leases_since(run)
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
    spent = sum(lease.usd() for lease in _leases_since(run) if lease.machine not in going)
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
    began = [lease.opened_at for lease in _leases_since(run)]
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
    try:
        if others := [run_id for run_id in inventory.not_home(name) if run_id not in ours]:
            say(f"{name} is kept: {', '.join(others)} is there too.")
            return
        with rental.locked():
            returning.give_back(rental, market.account_of(rental), say)
    except GpuError as error:
        rental.reload()
        raise returning.goes_on(rental, error) from None
    for line in returning.receipt(rental):
        say(line)


def let_go(run: Run, name: str, say: Say) -> None:
    """End a machine on its way up that has nothing to do, or say that it goes on costing. Raises MayCost."""
    rental = rentals.find(name)
    if rental is None or run.record.terminate or not rental.may_cost:
        say("the others have done its part; it is given back")
        give_back(run, name, say)
    else:
        say(f"the others have done its part; it is kept, and goes on costing. Give it back: gpu terminate {name}")


def after(run: Run, say: Say, failure: GpuError | None = None, *, waits: bool = True) -> None:
    """Give all of the run's machines back, if that was asked for and it has ended; after a failure once time is over.

    `failure`: what the command ended with; a run that it kept from beginning has ended, too. `waits`: until the time
    after a failure is over. Each is tried. Raises MayCost while one may still cost money.
    """
    if not run.record.terminate or isinstance(failure, MayCost):
        return
    if run.record.state not in runs.ENDED and (failure is None or run.record.state == "running"):
        return
    minutes = run.record.keep_on_failure_minutes if run.record.state != "sealed" else 0.0
    failures: list[GpuError] = []
    for rental in costing(run):
        try:
            if not (minutes and tenancy.is_kept(rental, minutes, say, waits=waits)):
                give_back(run, rental.name, say)
        except GpuError as error:
            failures.append(error)
    if failures:
        raise MayCost(" ".join(error.message for error in failures), failures[0].hint)


def end_in_turn(run: Run, say: Say) -> None:
    """What `after` does, without waiting: for cron. Nothing while the run is followed, or gone on with anew."""
    finished_at = run.record.finished_at
    if finished_at is None or locks.is_held(run.home.lock):
        return
    begun = [rental for rental in costing(run) if clock.parse(rental.record.made_at) > clock.parse(finished_at)]
    if not begun and not any(locks.is_held(rental.folder / "rental.lock") for rental in costing(run)):
        after(run, say, waits=False)


def left(run: Run) -> str:
    """What the run's machines go on costing, and how that is ended; empty when they cost nothing."""
    found = [rental for rental in costing(run) if rental.may_cost]
    if not found:
        return ""
    names, price = ", ".join(rental.name for rental in found), sum(rental.price_now or 0.0 for rental in found)
    until = max(rental.record.deadline or math.inf for rental in found)
    end = "one has no end" if math.isinf(until) else f"the last deadline is {guarding.moment(until)}"
    words = f"{names} GO ON COSTING {ledger.shown(price)} USD/h; {end}."
    if run.record.state not in runs.ENDED:
        words += f" Carry on there: gpu resume {run.run_id}."
    return f"{words} Give them back: gpu terminate NAME, or --all"

"""A run that rents its own machine: ready before it starts, another when it vanishes, given back when it is home."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from orchestrator import clock, guarding, inventory, journey, ledger, market, notices, rentals, renting, returning
from orchestrator.errors import DeadlineOver, GpuError, MachineGone, MayCost, NotReachable
from orchestrator.providers.base import Need
from orchestrator.rentals import ENDED, Caps, Rental
from orchestrator.renting import Wish
from orchestrator.runs import ENDED as ENDED_RUNS
from orchestrator.runs import Run

_MACHINES_MAX = 4
"""How many machines one command rents for a run, one after the other, before it gives up."""
_NAME_MAX = 56
_MOST = 0.8
"""Of its time, or budget: then it is said."""
Say = Callable[[str], None]


def name_for(run_id: str) -> str:
    """What the machine that is rented for a run is called: as the run, without its date."""
    return run_id.partition("-")[2][-_NAME_MAX:].strip("-._") or "machine"


def next_name(run: Run) -> str:
    """What a further machine of the run is called."""
    base, taken = name_for(run.run_id), {rental.name for rental in rentals.known()}
    return next(f"{base}-{number}" for number in range(2, len(taken) + 3) if f"{base}-{number}" not in taken)


def document(asked: Wish) -> dict[str, Any]:
    """A wish as the run's record keeps it, so that another machine can be rented by it."""
    return asdict(asked)


def wish(run: Run) -> Wish | None:
    """What was asked of the machine, or machines, that are rented for a run; None: it runs on what there is."""
    kept = run.record.rents
    if not kept:
        return None
    return Wish(Need(**kept["need"]), Caps(**kept["caps"]), kept["provider"], kept["python"], kept["wait_capacity"])


def begin(run: Run, name: str) -> bool:
    """Make the record of a machine the run will have, unless its budget is spent; whether there is one now.

    One that came to nothing is asked for anew; one that the run has worked on is not. Nobody is asked but for offers.
    """
    left = _left(run)
    if left is None:
        return False
    rental = rentals.find(name)
    is_new = rental is None and all(leg["machine"] != name for leg in run.record.legs)
    if is_new or (rental is not None and rental.record.state == "refused"):
        account, _ = renting.plan(left)
        renting.rent(name, left, account)
    return True


def _left(run: Run) -> Wish | None:
    """What may still be rented for the run: its wish with what is left of its budget; None when that is nothing."""
    asked = wish(run)
    if asked is None or asked.caps.budget_usd is None:
        return asked
    base = name_for(run.run_id)
    names = [lease for lease in ledger.leases() if lease.machine == base or lease.machine.startswith(f"{base}-")]
    left = asked.caps.budget_usd - sum(lease.usd() for lease in names)
    return replace(asked, caps=replace(asked.caps, budget_usd=left)) if left > 0 else None


def carry(run: Run, go: Callable[[], None], say: Say) -> None:
    """Have the run's machine ready, and take `go` with the run there; when the machine vanishes, on another one.

    **May spend money**, within the caps the run was started with. Raises GpuError.
    """
    for _ in range(_MACHINES_MAX):
        if run.record.state == "planned":
            begin(run, run.record.machine)
        if run.record.state not in ENDED_RUNS:
            renting.ensure_ready(run.record.machine, say, wait_capacity=bool(run.record.rents.get("wait_capacity")))
        try:
            go()
        except MachineGone as error:
            journey.machine_is_gone(run, run.record.machine)
            notices.tell("machine_lost", run_id=run.run_id, machine=run.record.machine, message=error.message)
        except DeadlineOver as error:
            end_in_time(run, error, say)
            return
        except NotReachable as error:
            if not give_up(run, error, say):
                raise
        run.reload()
        is_lost = run.record.state == "lost" and rentals.is_gone(run.record.machine)
        if not is_lost or not run.record.rents or not elsewhere(run, say):
            return


def end_in_time(run: Run, error: DeadlineOver, say: Say) -> None:
    """Stop the run and give its machine back: its time is over."""
    say(f"{error.message} The run is stopped, and its machine given back.")
    rental = rentals.find(run.record.machine)
    if rental is not None:
        end_machine(rental, say)
    notices.tell("guard_fired", run_id=run.run_id, machine=run.record.machine, message=error.message)
    run.reload()


def end_machine(rental: Rental, say: Say) -> None:
    """End a machine whose time is over; what is on it is stopped and brought home as far as that can be done."""
    with rental.locked():
        returning.at_deadline(rental, market.account_of(rental), say)


class Meter:
    """Watches the deadline and the budget of a rented machine while a run on it is followed."""

    def __init__(self, name: str) -> None:
        self._rental = rentals.find(name)

    def __call__(self) -> None:
        """Look at the clock. Raises DeadlineOver."""
        rental = self._rental
        if rental is None or rental.record.deadline is None or rental.record.asked_at is None:
            return
        now, record = clock.timestamp(), rental.record
        deadline, asked_at = record.deadline or now, record.asked_at or now
        if now >= deadline:
            raise DeadlineOver(f"{rental.name} is past its deadline of {guarding.moment(deadline)}.")
        if not record.is_told and now - asked_at > _MOST * (deadline - asked_at):
            record.is_told = True
            with contextlib.suppress(GpuError), rental.locked():  # the record is read anew inside
                rental.save(is_told=True)
            notices.tell("budget_80", machine=rental.name, deadline=guarding.moment(deadline), usd=rental.usd())


def give_up(run: Run, error: NotReachable, say: Say) -> bool:
    """End a machine rented for this run that does not answer, and has not for minutes; whether that was done."""
    rental = rentals.find(run.record.machine)
    if rental is None or not run.record.rents or rental.record.state != "ready":
        return False
    say(f"{error.message} It is given back, and the run goes on elsewhere.")
    with rental.locked():
        returning.end(rental, market.account_of(rental), say)
        rental.save(state="lost", failure="it did not answer any more")
    return True


def elsewhere(run: Run, say: Say) -> bool:
    """Have a run whose own machine is gone go on on another one, within its caps; whether it may."""
    name = next_name(run)
    if not begin(run, name):
        say(f"{run.record.machine} is gone, and nothing more is rented for {run.run_id}: its budget is spent.")
        return False
    say(f"{run.record.machine} is gone; {run.record.rows_home} rows are home. Going on on another machine.")
    journey.move(run, journey.Wish(machine=name, take_over=True))
    return True


def tell_end(run: Run) -> None:
    """Tell the notify command how a run ended."""
    if run.record.state in ENDED_RUNS:
        event = "run_done" if run.record.state == "sealed" else "run_failed"
        facts = {"state": run.record.state, "rows_home": run.record.rows_home, "usd": round(run.cost_usd(), 4)}
        notices.tell(event, run_id=run.run_id, machine=run.record.machine, **facts)


def after(run: Run, say: Say) -> None:
    """Give the run's machine back, if that was asked for and the run has ended; after a failure once its time is over.

    Raises MayCost while it may still cost money.
    """
    rental = rentals.find(run.record.machine)
    if rental is None or not run.record.terminate or rental.record.state in ENDED:
        return
    if run.record.state not in ENDED_RUNS:
        return
    minutes = run.record.keep_on_failure_minutes if run.record.state != "sealed" else 0.0
    if minutes:
        _keep(rental, minutes, say)
    if others := [name for name in inventory.not_home(rental.name) if name != run.run_id]:
        say(f"{rental.name} is kept: {', '.join(others)} is there too.")
        return
    try:
        with rental.locked():
            returning.give_back(rental, market.account_of(rental), say)
    except GpuError as error:
        raise MayCost(error.message, error.hint) from None
    for line in returning.receipt(rental):
        say(line)


def _keep(rental: Rental, minutes: float, say: Say) -> None:
    """Wait before a machine is given back, so that somebody can look; the deadline holds if this process dies."""
    until = clock.timestamp() + minutes * 60
    with rental.locked():
        rental.save(deadline=min(until, rental.record.deadline or until))
    say(f"{rental.name} is kept until {guarding.moment(rental.record.deadline)}: gpu ssh {rental.name}")
    while (left := (rental.record.deadline or until) - clock.timestamp()) > 0:
        clock.sleep(min(left, 5.0))

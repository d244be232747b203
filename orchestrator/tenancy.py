"""A run that rents its own machine: ready before it starts, another when it vanishes, given back when it is home."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from jobs import locks
from orchestrator import clock, guarding, inventory, journey, ledger, market, notices, rentals, renting, returning
from orchestrator.errors import DeadlineOver, GpuError, MachineGone, MayCost, NoCapacity, NotReachable
from orchestrator.providers.base import Need, Provider
from orchestrator.rentals import ENDED, Caps, Rental
from orchestrator.renting import Wish
from orchestrator.runs import ENDED as ENDED_RUNS
from orchestrator.runs import Run

_MACHINES_MAX = 4
"""How many machines one command rents for a run, one after the other, before it gives up."""
_TRIES_MAX = 6
"""How often a machine may cease to answer and come back."""
_SURE_S = 300.0
"""After so long without an answer, beside all that was waited before, a machine whose provider answers is dead."""
_NAME_MAX = 56
_LOOK_S = 5.0
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
    """A wish as the run's record keeps it, so that another machine can be rented by it; its caps count from now on."""
    return {**asdict(asked), "since": clock.timestamp()}


def wish(run: Run) -> Wish | None:
    """What was asked of the machine, or machines, that are rented for a run; None: it runs on what there is."""
    kept = run.record.rents
    if not kept:
        return None
    return Wish(Need(**kept["need"]), Caps(**kept["caps"]), kept["provider"], kept["python"], kept["wait_capacity"])


def begin(run: Run, name: str) -> bool:
    """Make the record of a machine the run will have, unless its caps are used up; whether there is one now.

    One that came to nothing is asked for anew; one that the run has worked on is not. Nobody is asked but for offers.
    """
    left = _left(run)
    if left is None:
        return False
    rental = rentals.find(name)
    is_new = rental is None and all(leg["machine"] != name for leg in run.record.legs)
    if is_new or (rental is not None and rental.record.state == "refused"):
        asked, account = planned(left, is_new=not run.record.legs)
        renting.rent(name, asked, account)
    return True


def planned(asked: Wish, *, is_new: bool) -> tuple[Wish, Provider]:
    """A wish that some offer fits, and whose it is: a run that was outbid takes a machine at a fixed price, too."""
    try:
        return asked, renting.plan(asked)[0]
    except NoCapacity:
        if is_new or not asked.need.spot:
            raise
        fixed = replace(asked, need=replace(asked.need, spot=False, bid_usd_per_hour=None))
        return fixed, renting.plan(fixed)[0]


def _left(run: Run) -> Wish | None:
    """What may still be rented for the run: its wish with what is left of its caps; None when that is nothing."""
    asked = wish(run)
    if asked is None:
        return None
    base, since = name_for(run.run_id), run.record.rents.get("since", 0.0)
    mine = [lease for lease in ledger.leases() if lease.machine == base or lease.machine.startswith(f"{base}-")]
    caps = asked.caps.less(lease for lease in mine if lease.opened_at >= since)
    return None if 0.0 in (caps.max_hours, caps.budget_usd) else replace(asked, caps=caps)


def carry(run: Run, go: Callable[[], None], say: Say) -> None:
    """Have the run's machine ready, and take `go` with the run there; when the machine vanishes, on another one.

    **May spend money**, within the caps the run was started with. Raises GpuError.
    """
    for others in reversed(range(_MACHINES_MAX)):
        _carry_there(run, go, say)
        run.reload()
        name = run.record.machine
        if run.record.state in ("sealed", "failed", "stopped") or not rentals.is_gone(name):
            return
        if is_lost(name):
            notices.tell("machine_lost", run_id=run.run_id, machine=name, message=f"{name} is gone.")
            if others and run.record.rents and elsewhere(run, say):
                continue
        break
    if run.record.state not in ENDED_RUNS:
        raise MachineGone(f"{name} is gone. Nothing is rented for {run.run_id}.", f"gpu resume {run.run_id} --gpu …")


def _carry_there(run: Run, go: Callable[[], None], say: Say) -> None:
    """Take `go` with the run on the machine it has; returns when that is done, or the machine is no more."""
    for _ in range(_TRIES_MAX):
        if run.record.state == "planned":
            begin(run, run.record.machine)
        if run.record.state not in ENDED_RUNS:
            renting.ensure_ready(run.record.machine, say, wait_capacity=bool(run.record.rents.get("wait_capacity")))
            take_up(run.record.machine)
        try:
            go()
        except DeadlineOver as error:
            end_in_time(run, error, say)
        except GpuError as error:
            if not rentals.is_gone(run.record.machine) and not is_dead(run, error, say):
                trouble = error
                run.reload()
                continue
            journey.machine_is_gone(run, run.record.machine, say)
        return
    raise trouble


def is_lost(name: str) -> bool:
    """Whether a rented machine has vanished: not one that somebody ended, nor one that its guard ended in time."""
    rental = rentals.find(name)
    if rental is None or rental.record.state != "lost":
        return False
    return rental.record.deadline is None or clock.timestamp() < rental.record.deadline


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
        if guarding.is_past(rental):
            raise DeadlineOver(f"{rental.name} is past its deadline of {guarding.moment(rental.record.deadline)}.")
        tell_most_spent(rental)


def tell_most_spent(rental: Rental) -> None:
    """Tell the notify command, once, that most of a machine's time, or budget, is spent; whoever looks first."""
    record = rental.record
    if record.is_told or record.deadline is None or record.asked_at is None:
        return
    if clock.timestamp() - record.asked_at <= _MOST * (record.deadline - record.asked_at):
        return
    with contextlib.suppress(GpuError), rental.locked():  # the record is read anew inside; held, it is told later
        if rental.record.is_told or not rental.may_cost:
            return
        rental.note(is_told=True)
        facts = {"deadline": guarding.moment(record.deadline), "usd": rental.usd()}
        notices.tell("budget_80", machine=rental.name, **facts)


def is_dead(run: Run, error: GpuError, say: Say) -> bool:
    """Whether a machine rented for this run answers nobody, while its provider does; then it is ended.

    False when it answers again. Raises `error`, which made one ask, when that is none of it, or cannot be known: a
    computer that is cut off reaches neither, and unreachable is not dead.
    """
    rental, is_silent = rentals.find(run.record.machine), isinstance(error, NotReachable)
    if rental is None or not is_silent or not run.record.rents or rental.record.state != "ready":
        raise error
    until = clock.monotonic() + _SURE_S
    while clock.monotonic() < until:
        try:
            provider = market.account_of(rental)
            found = provider.get(rental.record.instance_id or "")
        except GpuError:
            raise error from None
        if found is None or inventory.reach(rental.name) is None:
            return False
        clock.sleep(_LOOK_S)
    say(f"{error.message} It is given back, and the run goes on elsewhere.")
    with rental.locked():
        returning.end(rental, provider, say)
        rental.save(state="lost", failure="it did not answer any more")
    return True


def elsewhere(run: Run, say: Say) -> bool:
    """Have a run whose own machine is gone go on on another one, within its caps; whether it may."""
    name = next_name(run)
    if not begin(run, name):
        say(f"{run.record.machine} is gone, and nothing more is rented for {run.run_id}: its caps are used up.")
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


def after(run: Run, say: Say, failure: GpuError | None = None, *, waits: bool = True) -> None:
    """Give the run's machine back, if that was asked for and the run has ended; after a failure once its time is over.

    `failure`: what the command ended with; a run that it kept from beginning has ended, too. Raises MayCost while the
    machine may still cost money.
    """
    rental = rentals.find(run.record.machine)
    if rental is None or not run.record.terminate or rental.record.state in ENDED or isinstance(failure, MayCost):
        return
    if run.record.state not in ENDED_RUNS and (failure is None or run.record.state == "running"):
        return
    minutes = run.record.keep_on_failure_minutes if run.record.state != "sealed" else 0.0
    try:
        if minutes and is_kept(rental, minutes, say, waits=waits):
            return
        if others := [name for name in inventory.not_home(rental.name) if name != run.run_id]:
            say(f"{rental.name} is kept: {', '.join(others)} is there too.")
            return
        with rental.locked():
            returning.give_back(rental, market.account_of(rental), say)
    except GpuError as error:
        rental.reload()
        raise returning.goes_on(rental, error) from None
    for line in returning.receipt(rental):
        say(line)


def left(run: Run) -> str:
    """What the run's machine goes on costing, and how that is ended; empty when it costs nothing."""
    rental = rentals.find(run.record.machine)
    if rental is None or not rental.may_cost:
        return ""
    price, until = rental.price_now or 0.0, guarding.moment(rental.record.deadline)
    end = f"its deadline is {until}" if until else "it has no end"
    words = f"{rental.name} GOES ON COSTING {ledger.shown(price)} USD/h; {end}."
    if run.record.state not in ENDED_RUNS:
        words += f" Carry on there: gpu resume {run.run_id}."
        words += " It is given back once the run has ended and was looked at." if run.record.terminate else ""
    return f"{words} Give it back: gpu terminate {rental.name}"


def is_kept(rental: Rental, minutes: float, say: Say, *, waits: bool) -> bool:
    """Whether a machine is still left alone after a failure, so that somebody can look; `waits`: until that is over.

    It is over before its time at the hard deadline, and when a run is taken up there again.
    """
    if rental.record.kept_until is None:
        with rental.locked():
            rental.save(kept_until=clock.timestamp() + minutes * 60)
        ends_at = min(rental.record.kept_until or 0.0, rental.record.deadline or math.inf)
        say(f"{rental.name} is kept until {guarding.moment(ends_at)}: gpu ssh {rental.name}")
    until = rental.record.kept_until or 0.0
    while rental.record.kept_until == until and clock.timestamp() < until and not guarding.is_past(rental):
        if not waits:
            return True
        clock.sleep(min(until - clock.timestamp(), _LOOK_S))
        rental.reload()
    return rental.record.kept_until != until


def take_up(name: str) -> None:
    """Keep a machine for its failed run no longer: a run goes on there."""
    rental = rentals.find(name)
    if rental is not None and rental.record.kept_until is not None:
        with rental.locked():
            rental.save(kept_until=None)


def end_in_turn(run: Run, say: Say) -> None:
    """What `after` does, without waiting: for cron. Nothing for a machine that has only the name of the run's."""
    rental, finished_at = rentals.find(run.record.machine), run.record.finished_at
    if rental is None or finished_at is None or locks.is_held(rental.folder / "rental.lock"):
        return
    if clock.parse(rental.record.made_at) <= clock.parse(finished_at):
        after(run, say, waits=False)

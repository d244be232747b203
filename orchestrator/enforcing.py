"""The caps of rented machines as any command here enforces them: past its deadline, or idle with all rows home."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator import (
    clock,
    fleet,
    guarding,
    idleness,
    inventory,
    journey,
    market,
    notices,
    outcome,
    rentals,
    returning,
    runs,
    tenancy,
    vanishing,
)
from orchestrator.errors import GpuError
from orchestrator.rentals import Rental
from orchestrator.runs import Run

Say = Callable[[str], None]


def enforce(say: Say, *spared: str | None) -> list[GpuError]:
    """Give back every machine whose time is over, and every one that is idle, once all of its rows are home.

    `spared`: machines that a command is about to use; idle or not, they stay. Returns what went wrong: one machine
    in trouble does not keep the others from being ended.
    """
    errors = []
    for rental in rentals.known():
        try:
            if guarding.is_past(rental):
                say(f"{rental.name} is past its deadline of {guarding.moment(rental.record.deadline)}")
                notices.tell("guard_fired", machine=rental.name, deadline=guarding.moment(rental.record.deadline))
                with rental.locked():
                    returning.at_deadline(rental, market.account_of(rental), say)
            elif rental.record.state == "ready" and rental.name not in spared and (why := _why_over(rental)):
                say(f"{rental.name} {why}")
                notices.tell("guard_fired", machine=rental.name, message=f"{rental.name} {why}")
                with rental.locked():
                    returning.stop_runs(rental)  # a worker that hangs is idle, too
                    returning.give_back(rental, market.account_of(rental), say)
        except (GpuError, OSError) as error:
            errors.append(returning.goes_on(rental, error))
    return errors


def _why_over(rental: Rental) -> str:
    """Why a machine is given back before its deadline, once its rows are home; empty when it is not."""
    if (until := rental.record.kept_until) is not None:
        return "" if clock.timestamp() < until else f"was kept until {guarding.moment(until)}, after its run failed"
    why = idleness.too_long(rental)
    return f"is idle: {why}" if why else ""


def _go_on(rental: Rental, say: Say) -> None:
    """Look once for what an unanswered request made; carry to its end what a command began to give back."""
    if rental.record.state == "launching":
        outcome.take_over(rental, market.account_of(rental))
    elif rental.record.state == "stopping":
        returning.end(rental, market.account_of(rental), say)


def _is_gone(rental: Rental, say: Say) -> bool:
    """Whether a machine that was ready does not answer, because it is no more."""
    is_silent = rental.record.state == "ready" and inventory.reach(rental.name) is not None
    return is_silent and vanishing.is_gone(rental.name, say)


def step(say: Say) -> list[GpuError]:
    """One step of everything, for cron: caps enforced, unanswered requests looked for, rows of runs brought home."""
    errors = enforce(say)
    for rental in rentals.known():
        try:
            if rental.record.state in ("booting", "ready", "stopped"):
                tenancy.tell_most_spent(rental)
            if rental.record.state in ("launching", "stopping"):
                with rental.locked():
                    _go_on(rental, say)
            elif _is_gone(rental, say):
                say(f"{rental.name} is gone, by its provider's own word")
                notices.tell("machine_lost", machine=rental.name, message=f"{rental.name} is gone.")
        except (GpuError, OSError) as error:
            errors.append(returning.goes_on(rental, error))
    for run in runs.remembered():
        try:
            _look_at(run, say)
        except GpuError as error:
            errors.append(error)
    return errors


def _look_at(run: Run, say: Say) -> None:
    """Bring home what a run has made since; of one that has ended, tell, and give its machine back if that is due."""
    had_ended = run.record.state in runs.ENDED
    if not had_ended or not runs.is_settled(run):
        journey.refresh(run)
        say(f"{run.run_id} is {run.record.state}; {run.record.rows_home} rows are home")
    if not had_ended:
        tenancy.tell_end(run)
    if run.record.terminate and run.record.state in runs.ENDED:
        (fleet if run.record.machines else tenancy).end_in_turn(run, say)

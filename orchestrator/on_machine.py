"""What the laptop asks the guard of a rented machine, and tells it: how idle it is, until when, and what is home."""

from __future__ import annotations

import contextlib
from typing import Any

from jobs import spec
from orchestrator import clock, guarding, machines, rentals, transport
from orchestrator.delivery import prepared_agent
from orchestrator.errors import BadAnswer, ConfigError, GpuError
from orchestrator.home import Arrivals
from orchestrator.rentals import Rental
from orchestrator.runs import Run
from orchestrator.transport import Machine

_LOOK_DEADLINE_S = 90.0
_ACKNOWLEDGE_DEADLINE_S = 120.0
_ROUNDS_MAX = 1000
"""Each round takes half a minute: more work than this is none that a machine can do."""


def idle(machine: Machine, agent: str) -> dict[str, Any]:
    """How idle the machine is: `idle_s`, `why`, and `unpulled`, the runs with results not known to be home."""
    answer = transport.ask(machine, transport.root_words(machine, agent, "idle"), deadline_s=_LOOK_DEADLINE_S)
    if type(answer.get("idle_s")) not in (int, float) or not isinstance(answer.get("unpulled"), list):
        raise BadAnswer(f"{machine.name} did not say how idle it is: {str(answer)[:200]}")
    return answer


def view(machine: Machine, agent: str) -> dict[str, Any]:
    """How the machine's guard stands: `alive`, and, where one was ever armed, `phase`, `deadline`, `last_error`…"""
    return _guard_said(machine, transport.ask(machine, transport.root_words(machine, agent, "guard")))


def read_back(rental: Rental) -> dict[str, Any]:
    """How a rented machine's own guard stands now, noted on its record; whoever calls holds its lock."""
    with machines.at(rental.name) as machine:
        told = view(machine, prepared_agent(machine))
    deadline, error = told.get("deadline"), told.get("last_error")
    seen: dict[str, Any] = {
        "alive": told["alive"],
        "answered": bool(told.get("answered_at")),
        "phase": str(told.get("phase") or ""),
        "at": clock.timestamp(),
    }
    seen |= {"deadline": deadline if type(deadline) in (int, float) else None, "error": str(error or "")[:300]}
    rental.save(guard_seen=seen)
    return seen


def move_deadline(machine: Machine, agent: str, deadline: float) -> dict[str, Any]:
    """Have the guard end the machine at another time, seconds since 1970; returns `view`, with the time it will be.

    Durable there once it returns. ConfigError when the machine takes no such time.
    """
    words = transport.root_words(machine, agent, "deadline")
    answer = transport.ask(machine, words, spec.canonical({"deadline": deadline}))
    if "error" in answer:
        raise ConfigError(f"{machine.name} does not take {deadline} for a deadline; it stays as it was.")
    return _guard_said(machine, answer)


def _guard_said(machine: Machine, answer: dict[str, Any]) -> dict[str, Any]:
    if type(answer.get("alive")) is not bool:
        raise BadAnswer(f"{machine.name} did not say how its guard stands: {str(answer)[:200]}")
    return answer


def tell_home(run: Run, machine: Machine, arrivals: Arrivals) -> None:
    """Tell a machine with a guard of its own what is home, so that it may end when idle; untold, it is kept."""
    rental = rentals.find(machine.name)
    if rental is not None and rental.record.guard in guarding.ON_MACHINE and rental.record.state == "ready":
        with contextlib.suppress(GpuError):
            acknowledge(run, machine, arrivals)


def acknowledge(run: Run, machine: Machine, arrivals: Arrivals) -> list[str]:
    """Tell the machine what of a run is durable at home, so that idleness may end it; may be repeated.

    Returns the names that it could not confirm: they differ there, and a pull brings them anew.
    """
    told = spec.canonical(arrivals.durable())
    words = transport.agent_words(machine, run.record.agent, "acknowledge", run.run_id)
    for _ in range(_ROUNDS_MAX):
        answer = transport.ask(machine, words, told, _ACKNOWLEDGE_DEADLINE_S)
        if not isinstance(answer.get("refused"), list):
            break
        if not answer.get("more"):
            return [str(name) for name in answer["refused"]]
    raise BadAnswer(f"{machine.name} did not confirm what of {run.run_id} is home: {str(answer)[:200]}")

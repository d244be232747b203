"""How long a rented machine has done nothing, by its own word; what is not home there is brought home first."""

from __future__ import annotations

from orchestrator import machines, on_machine
from orchestrator.delivery import prepared_agent
from orchestrator.errors import GpuError
from orchestrator.rentals import Rental


def too_long(rental: Rental) -> str:
    """Why a machine counts as idle for longer than its cap, in words; empty when it does not, or cannot be asked."""
    minutes = rental.caps().idle_minutes
    if minutes is None:
        return ""
    try:
        with machines.at(rental.name) as machine:
            agent = prepared_agent(machine)
            idle_s = float(on_machine.idle(machine, agent)["idle_s"])
    except GpuError:  # unreachable is not idle
        return ""
    if idle_s < minutes * 60:
        return ""
    return f"nothing happened there for {idle_s / 60:.0f} minutes; its cap is {minutes:g}"

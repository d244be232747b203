"""How long a rented machine has done nothing, by its own word; what is not home there is brought home first."""

from __future__ import annotations

from orchestrator import machines, transport
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
            told = transport.ask(machine, transport.root_words(machine, agent, "idle"))
    except GpuError:  # unreachable is not idle
        return ""
    idle_s = told.get("idle_s")
    if not isinstance(idle_s, (int, float)) or idle_s < minutes * 60:
        return ""
    return f"nothing happened there for {idle_s / 60:.0f} minutes; its cap is {minutes:g}"

"""How long a rented machine has done nothing, by its own word; what is not home there is brought home first."""

from __future__ import annotations

from orchestrator import clock, machines, on_machine, runs
from orchestrator.delivery import prepared_agent
from orchestrator.errors import GpuError
from orchestrator.rentals import Rental


def too_long(rental: Rental) -> str:
    """Why a machine counts as idle for longer than its cap, in words; empty when it does not, or cannot be asked.

    It is asked only when it may be: ready for longer than that, and no run seen at work on it since.
    """
    minutes = rental.caps().idle_minutes
    if minutes is None or not _may_be(rental, minutes * 60):
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


def _may_be(rental: Rental, limit_s: float) -> bool:
    """Whether nothing that is remembered here rules out that the machine was idle for so long."""
    noted = [run.home.record.stat().st_mtime for run in runs.everywhere() if run.record.machine == rental.name]
    ready_at = clock.parse(rental.record.ready_at).timestamp() if rental.record.ready_at else 0.0
    return clock.timestamp() - max(ready_at, *noted, 0.0) >= limit_s

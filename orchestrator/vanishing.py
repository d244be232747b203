"""Rented machines that vanish: gone by their provider's word, twice, outbid, or unhealthy for too long, and ended."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator import clock, market, rentals, rescue, returning
from orchestrator.errors import GpuError
from orchestrator.providers.base import Provider
from orchestrator.rentals import ENDED, Rental

_TWICE_S = 5.0
_UNHEALTHY_S = 300.0
_OUTBID = "somebody bid more, and it was stopped; it was given back"


def is_gone(name: str, say: Callable[[str], None] = lambda _: None) -> bool:
    """Whether a machine that does not answer is surely no more. False for one that is not rented: who would know?

    One that was outbid is ended, once what can be copied from its disk has been; so is one whose end was begun.
    """
    rental = rentals.find(name)
    if rental is None:
        return False
    if rental.record.state in ENDED:
        return True
    if rental.record.state not in ("ready", "stopping") or rental.record.instance_id is None:
        return False
    try:
        with rental.locked():
            return _is_gone(rental, say)
    except GpuError:  # what cannot be asked is not known to be gone
        return False


def _is_gone(rental: Rental, say: Callable[[str], None]) -> bool:
    if rental.record.state in ENDED:
        return True
    provider = market.account_of(rental)
    if rental.record.state == "stopping":  # whoever began its end has died
        is_outbid = rescue.is_waiting(rental.name)
        returning.end(rental, provider, say)
        if is_outbid:
            rental.save(state="lost", failure=_OUTBID)
        return True
    for _ in range(2):
        found = provider.get(rental.record.instance_id or "")
        if found is not None:
            rental.costs_as(found)
        if found is not None and found.state == "unhealthy" and _for_long(rental):
            returning.end(rental, provider, say)
            rental.save(state="lost", failure="its provider called it unhealthy, and it did not answer")
            return True
        if found is not None and found.state == "stopped":
            return _is_lost_by_stop(rental, provider, say)
        if found is not None and found.state != "gone":
            if found.state == "ready" and rental.record.unhealthy_at is not None:
                rental.save(unhealthy_at=None)
            return False
        clock.sleep(_TWICE_S)
    rental.is_gone("lost", "its provider says that it is no more")
    returning.tidy(rental, provider, say)
    return True


def _is_lost_by_stop(rental: Rental, provider: Provider, say: Callable[[str], None]) -> bool:
    """Whether a machine that its provider calls stopped is lost: a spot machine was outbid, and would wake by itself.

    Any other one was stopped by its guard, with rows that are not home; it can be started again.
    """
    if not rental.offer().spot:
        rental.save(state="stopped", raw_state="stopped")
        return False
    returning.end(rental, provider, say)
    rental.save(state="lost", failure=_OUTBID)
    return True


def _for_long(rental: Rental) -> bool:
    """Whether it was first seen so long ago; that stands in the record, for cron is another process each time."""
    if rental.record.unhealthy_at is None:
        rental.save(unhealthy_at=clock.timestamp())
    return clock.timestamp() - (rental.record.unhealthy_at or 0.0) > _UNHEALTHY_S

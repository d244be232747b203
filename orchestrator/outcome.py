"""What became of a paid request that got no answer: looked for by its marker, never asked again."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator import clock, ledger
from orchestrator.errors import AuthRejected, LaunchUnknown, ProviderDown, RateLimited, Refused
from orchestrator.providers.base import Provider
from orchestrator.rentals import Rental

SETTLED_S = 180.0
"""After so long, an instance that a request made stands in its provider's list."""
_NOTHING_AFTER_S = 600.0
"""A request whose instance is in no list after so long made none: it may wait for its turn and its answer for 300 s."""
_LOOK_EVERY_S = 10.0
_TWICE_S = 5.0
_ASKS_MAX = 6
"""So often the end of a second instance is asked for; what is left then is for an audit."""
Say = Callable[[str], None]


def settle(rental: Rental, provider: Provider, say: Say) -> None:
    """Find out what became of a request that got no answer; LaunchUnknown when the list stays without it.

    Long after, when two lists are without it, it has made nothing: the machine is `planned` again.
    """
    asked_at = rental.record.asked_at or 0.0
    until = asked_at + SETTLED_S
    while not is_found(rental, provider, has_time=clock.timestamp() < until):
        left = until - clock.timestamp()
        if left <= 0:
            if clock.timestamp() < asked_at + _NOTHING_AFTER_S:
                raise unknown(rental, provider, "no instance with that marker is listed")
            clock.sleep(_TWICE_S)
            if not is_found(rental, provider):
                rental.is_gone("planned")
            return
        say(f"  not listed yet; looking for {left:.0f} s more")
        clock.sleep(min(_LOOK_EVERY_S, left + 0.1))


def is_found(rental: Rental, provider: Provider, *, has_time: bool = False) -> bool:
    """Take the instance over, if there is one; LaunchUnknown when that cannot be asked.

    `has_time`: it will be asked again, so that a provider out of order just now has shown nothing.
    """
    try:
        return take_over(rental, provider)
    except (AuthRejected, Refused) as error:
        raise unknown(rental, provider, error.message) from None
    except (ProviderDown, RateLimited) as error:
        if not has_time:
            raise unknown(rental, provider, error.message) from None
        return False


def unknown(rental: Rental, provider: Provider, why: str) -> LaunchUnknown:
    """The error of a request whose outcome is not known."""
    price = rental.price_usd_per_hour or 0.0
    return LaunchUnknown(
        f"The request {rental.record.marker} for {rental.in_words()} got no answer: {why.rstrip('.')}. "
        f"An instance that comes up late would cost {ledger.shown(price)} USD/h. Look at {provider.dashboard}",
        f"It is looked for by every command that follows. In ten minutes: gpu wait {rental.name}, or gpu audit --fix",
    )


def take_over(rental: Rental, provider: Provider) -> bool:
    """Look for the marker of the newest request; the instance that bears it is this machine from now on.

    Of several, which no single request should make, one is kept and the others are asked to end until they do.
    """
    for _ in range(_ASKS_MAX):
        found = [entry for entry in provider.instances() if entry.marker == rental.record.marker]
        live = [entry for entry in found if entry.state not in ("gone", "stopping")]
        if not found:
            return False
        kept, *others = sorted(live or found, key=lambda entry: entry.instance_id)
        if not others or not live:
            break
        for other in others:
            provider.terminate(other.instance_id)
        clock.sleep(_LOOK_EVERY_S)
    rental.exists(kept.instance_id)
    rental.costs_as(kept)
    return True

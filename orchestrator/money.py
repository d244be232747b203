"""What may be spent: the limits of the config file, checked before each launch, and what a machine costs at most."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs import locks
from orchestrator import clock, config, keys, ledger, rentals
from orchestrator.errors import ConfigError, Refused, UsageError
from orchestrator.providers.base import Offer, Provider
from orchestrator.rentals import Caps

_LOCK_WAIT_S = 30.0


@dataclass(frozen=True)
class Limits:
    """What the config file allows, under `limits`; None: no limit."""

    usd_per_hour: float | None = None
    """Of one machine."""
    usd_per_machine: float | None = None
    """Over its whole life."""
    usd_per_month: float | None = None
    """Of all machines together, in a calendar month (UTC)."""


def limits() -> Limits:
    """The limits of the config file. Raises ConfigError for what cannot be one: no limit is passed over in silence."""
    given = settings().get("limits", {})
    known = Limits.__dataclass_fields__
    if not isinstance(given, dict) or not set(given) <= set(known):
        raise ConfigError(
            f"`limits` in {keys.user_config()} must be among {', '.join(known)}. Nothing was rented.", "Mend the file."
        )
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ConfigError(f"`limits.{name}` in {keys.user_config()} is not a number of USD. Nothing was rented.")
    return Limits(**given)


def settings() -> dict[str, Any]:
    """The user config file; empty when there is none. ConfigError when it is damaged."""
    try:
        found = json.loads(keys.user_config().read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{keys.user_config()} cannot be read: {error.strerror}.", "Make it readable.") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{keys.user_config()} is damaged: it is no JSON object.", "Mend or remove the file.")
    return found


def check(offer: Offer, caps: Caps, provider: Provider) -> None:
    """Raise unless a machine of that offer may be rented with those caps. A prepaid account is asked what is left."""
    price, boot_minutes = offer.price_usd_per_hour, provider.boot_minutes[offer.count > 1]
    if caps.budget_usd is not None and caps.budget_usd < price * boot_minutes / 60:
        raise UsageError(
            f"A budget of {caps.budget_usd:.2f} USD buys {int(caps.budget_usd / price * 60)} minutes of "
            f"{offer.type_name} at {ledger.shown(price)} USD/h, and it usually takes {boot_minutes:.0f} minutes to "
            "boot. Nothing was rented.",
            "Raise --budget, or choose a cheaper machine: gpu offers",
        )
    if caps.max_hours is not None and caps.max_hours <= 0:
        raise UsageError("The hours of --max-hours are used up. Nothing was rented.", "Raise --max-hours.")
    most = at_most(price, caps)
    _check_credit(provider.credit(), most, price * boot_minutes / 60, offer)
    bounds = limits()
    _check_limit("usd_per_hour", bounds.usd_per_hour, price, f"{offer.type_name} costs {ledger.shown(price)} USD/h")
    words = "could cost without end" if most is None else f"could cost up to {ledger.shown(most)} USD by its caps"
    _check_limit("usd_per_machine", bounds.usd_per_machine, most, f"{offer.type_name} {words}")
    if bounds.usd_per_month is not None:
        spent = this_month()
        others = to_come()
        total = None if most is None or others is None else spent + others + most
        more = "without end" if others is None else f"up to {ledger.shown(others)}"
        spent_words = f"{ledger.shown(spent)} USD are spent this month, {more} by what is rented already"
        words = f"{spent_words}, and {offer.type_name} {words}"
        _check_limit("usd_per_month", bounds.usd_per_month, total, words)


def _check_credit(left: float | None, most: float | None, least: float, offer: Offer) -> None:
    """Raise Refused unless a prepaid account pays for a machine until its deadline; without one, for its boot."""
    wanted = least if most is None else most
    if left is not None and left < wanted:
        raise Refused(
            f"The account at {offer.provider} has {max(left, 0.0):.2f} USD left; {offer.type_name} may cost "
            f"{ledger.shown(wanted)} USD by its caps, and is stopped in the middle when the credit is over. "
            "Nothing was rented.",
            "Add credit there" + (", or lower --budget or --max-hours." if left >= least else "."),
        )


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Be the one process that checks limits and notes what it is about to rent: two would both find room for one."""
    try:
        with locks.held(config.state_folder() / "limits.lock", _LOCK_WAIT_S):
            yield
    except TimeoutError:
        raise ConfigError("Other commands rent machines all the time. Nothing was rented.", "Try again.") from None


def _check_limit(name: str, limit: float | None, value: float | None, words: str) -> None:
    if limit is not None and (value is None or value > limit):
        how = "Take a cheaper one (--max-price)" if name == "usd_per_hour" else "Lower --budget or --max-hours"
        raise ConfigError(
            f"{words}; `limits.{name}` allows {limit:.2f} USD. Nothing was rented.",
            f"{how}, or raise the limit in {keys.user_config()}",
        )


def at_most(price_usd_per_hour: float, caps: Caps) -> float | None:
    """What a machine can cost until its deadline, in USD; None: it has none."""
    hours = caps.hours(price_usd_per_hour)
    return None if hours is None else ledger.usd(hours, price_usd_per_hour)


def to_come() -> float | None:
    """What machines that are rented now may still cost until their deadlines, in USD; None: one has no deadline."""
    total, now = 0.0, clock.timestamp()
    for rental in rentals.known():
        if rental.may_cost:
            if rental.record.deadline is None:
                return None
            left_h = max(rental.record.deadline - now, 0.0) / 3600
            total += ledger.usd(left_h, rental.price_usd_per_hour or 0.0)
    return total


def this_month() -> float:
    """What machines rented from here have cost in this calendar month (UTC), in USD; an estimate that rounds up."""
    now = clock.timestamp()
    start = clock.parse(clock.now()[:8] + "01T00:00:00Z").timestamp()
    total = 0.0
    for lease in ledger.leases():
        total += lease.usd_within(start, now)
    return total

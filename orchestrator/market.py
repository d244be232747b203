"""The clouds that are asked: for their offers, side by side, and, of a machine, the account it was rented in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from orchestrator import providers
from orchestrator.errors import ConfigError, GpuError, ProviderError, UsageError
from orchestrator.providers.base import Need, Offer, Provider

if TYPE_CHECKING:  # offers are listed without it
    from orchestrator.rentals import Rental

_SKEW_MAX_S = 300.0


def need(how: dict[str, Any]) -> Need:
    """The need that the options of a command say; of any number of GPUs unless it is said."""
    return Need(
        gpu=how["gpu"],
        type_name=how["type_name"],
        count=how["count"],
        min_vram_gb=how["min_vram"],
        max_price_usd_per_hour=how["max_price"],
        region=how["region"],
        disk_gb=how["disk"],
        spot=how["spot"] or how["bid"] is not None,
        bid_usd_per_hour=how["bid"],
        filters=how["filters"],
        hours=_hours(how),
    )


def _hours(how: dict[str, Any]) -> float | None:
    """How long a machine is needed, as far as what was typed says so."""
    hours: float | None = how.get("max_hours")
    return hours


def accounts(name: str | None) -> list[Provider]:
    """The clouds to be asked: the one named, else every one with a key here. ConfigError when there is none."""
    if name is not None:
        return [providers.open(name)]
    found = [account for name in providers.names() if (account := providers.open_if_any(name)) is not None]
    if not found:
        names = providers.names()
        providers.open(names[0])  # says which key is missing, and where to get one
    return found


def seen() -> list[Offer]:
    """What is offered by the clouds with a key here, for a look only: nothing where there is none, or none answers."""
    with contextlib.suppress(GpuError):
        found = [account for name in providers.names() if (account := providers.open_if_any(name)) is not None]
        return listed(found, Need()) if found else []
    return []


def clouds_of(rental: Rental) -> list[Provider]:
    """The accounts that a machine may be rented in: those there were when it was asked for, and still are."""
    names = rental.record.clouds or [rental.record.provider]
    found = [account for name in names if (account := providers.open_if_any(name)) is not None]
    return found or [providers.open(rental.record.provider)]


def account_of(rental: Rental) -> Provider:
    """The account a machine was rented in. ConfigError when the key found here is surely, or maybe, another account's.

    There its instance is not known, which would read as gone. A newer key of the same account shows what it left.
    """
    account, record = providers.open(rental.record.provider), rental.record
    if record.account in ("", account.account) or record.state == "planned":
        return account
    if record.key_name in account.key_names() or any(entry.marker == record.marker for entry in account.instances()):
        return account
    raise ConfigError(
        f"{rental.name} was rented with another account key than the one found here, whose account knows nothing of "
        "it. Whether it still costs money cannot be told with this key.",
        f"Set the key it was rented with, then again. Or look there yourself: {account.dashboard}",
    )


def _knowing(found: Sequence[Provider], need: Need) -> list[Provider]:
    """The clouds that know every filter of a need; UsageError when none does."""
    able = [account for account in found if set(need.filters) <= set(account.filters)]
    if not able:
        known = "; ".join(f"{account.name}: {', '.join(account.filters) or 'none'}" for account in found)
        raise UsageError(f"No cloud can be asked for {', '.join(need.filters)}. Nothing was rented.", f"Known: {known}")
    return able


def overridden(found: Sequence[Provider], need: Need) -> list[str]:
    """Which defaults that protect a need does not keep, in lines for a person."""
    return [f"{account.name}: {words}" for account in _knowing(found, need) for words in account.overridden(need)]


def check_clock(account: Provider) -> None:
    """Raise ConfigError when this computer's clock is not that of its provider, which counts the money."""
    skew_s = account.skew_s
    if skew_s is not None and abs(skew_s) > _SKEW_MAX_S:
        how = "behind" if skew_s > 0 else "ahead of"
        raise ConfigError(
            f"This computer's clock is {abs(skew_s) / 60:.0f} minutes {how} that of {account.name}: deadlines and "
            "budgets would be wrong by as much. Nothing was rented.",
            "Set the clock (sudo timedatectl set-ntp true), then type the same command again.",
        )


def listed(found: Sequence[Provider], need: Need, say: Callable[[str], None] | None = None) -> list[Offer]:
    """The offers of several clouds, asked side by side. One that does not answer is an error only when all do not.

    `say`: told of one that does not, since what is cheapest there is not known then.
    A cloud that does not know a filter is not asked: what it has cannot be said to fit.
    """
    found = _knowing(found, need)
    with ThreadPoolExecutor(max(len(found), 1), thread_name_prefix="offers") as pool:
        answers = [pool.submit(account.offers, need) for account in found]
    offered, errors = [], []
    for answer in answers:
        try:
            offered += answer.result()
        except ProviderError as error:
            errors.append(error)
    if errors and not offered:
        raise errors[0]
    if say:
        for failure in errors:
            say(f"Looked at without it: {failure.message} {failure.hint}")
    return offered

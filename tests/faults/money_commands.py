"""What a user types in a storm around money, as the command line does it, without its printing and asking."""

from __future__ import annotations

import os
from collections.abc import Callable

from orchestrator import audit, enforcing, inventory, market, providers, rentals, renting, returning
from orchestrator.errors import GpuError, MayCost
from orchestrator.providers.base import Need, Provider
from orchestrator.rentals import ENDED, Caps
from orchestrator.renting import Wish
from tests.faults.money_clouds import NAME

SPOT_VARIABLE = "GPU_STORM_SPOT"
"""Set: what is launched is bid for."""
HOURS = 2.0
"""Until the machine's deadline."""


def _quiet(_: str) -> None:
    """Say nothing."""


def _enforced() -> None:
    enforcing.enforce(_quiet)


def _launch(*, until_rented: bool = False) -> None:
    _enforced()
    wish = Wish(Need(gpu="A100", spot=SPOT_VARIABLE in os.environ), Caps(max_hours=HOURS))
    account, _ = renting.plan(wish)
    renting.go_on(renting.rent(NAME, wish, account), _quiet, wait_capacity=False, until_rented=until_rented)


def _rent() -> None:
    """`gpu launch --no-wait`."""
    _launch(until_rented=True)


def _wait() -> None:
    _enforced()
    rental = rentals.choose(None)
    if rental.record.state in ENDED:
        raise renting.gone(rental)
    renting.go_on(rental, _quiet, wait_capacity=False, until_rented=False)


def _again() -> None:
    """What a user does after a launch that died: go on with it, or type it again where nothing is left of it."""
    (_wait if any(rental.record.state not in ENDED for rental in rentals.known()) else _launch)()


def _terminate() -> None:
    errors = []
    for rental in rentals.known():
        if rental.record.state not in ENDED:
            try:
                with rental.locked():
                    returning.give_back(rental, providers.open(rental.record.provider), _quiet)
            except GpuError as error:
                errors.append(error)
    if errors:
        raise max(errors, key=lambda error: error.exit_code)


def _audit(*, past_cap_only: bool = False) -> None:
    errors = []
    for account in market.accounts(None):
        try:
            errors += _audited(account, past_cap_only=past_cap_only)
        except GpuError as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda error: error.exit_code)


def _audited(account: Provider, *, past_cap_only: bool) -> list[GpuError]:
    found = audit.look(account, past_cap_only=past_cap_only)
    errors = audit.fix(account, found, _quiet) if found else []
    if found and audit.look(account, past_cap_only=past_cap_only):
        errors.append(MayCost("something was found, and is still there"))
    return errors


def _status() -> None:
    inventory.refresh(None)
    inventory.documents(None)


def _cron() -> None:
    if errors := enforcing.step(_quiet):
        raise errors[0]


COMMANDS: dict[str, Callable[[], None]] = {
    "launch": _launch,
    "rent": _rent,
    "wait": _wait,
    "again": _again,
    "status": _status,
    "cron": _cron,
    "terminate": _terminate,
    "audit": _audit,
    "reap": lambda: _audit(past_cap_only=True),
}
JOURNEY = ("launch", "status", "terminate")
"""Every effect of these is a place to die."""

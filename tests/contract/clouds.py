"""The clouds that the contract is held against: what plays each, in what they differ, and how each method asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.errors import GpuError, LaunchUnknown, NotReturned, ProviderDown
from orchestrator.providers.base import Need, Offer, Order, Provider, State, new_marker
from tests.cloud import Stand
from tests.orchestrator.providers.loopback import Time

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T"
OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60U"
PAID = "^launch$"
"""Found in the paid call of every cloud, as its stand-in names it."""


@dataclass(frozen=True)
class Kind:
    """What plays a cloud, and what it does not do as the others; everything else is the same for all."""

    fixture: str
    key_variable: str
    address_variable: str
    lets_in: Callable[[Any, float], list[str]]
    """The public keys that an instance of the stand-in lets in now."""
    absent_id: str
    """An id that no instance has."""
    powered_off: State
    """What a machine is by its provider's word that has power no more."""
    asks_nobody: frozenset[str] = frozenset()
    """Methods that are answered here: nothing is asked for them, so nothing can go wrong."""
    asks_as_anybody: frozenset[str] = frozenset()
    """Methods for which the key does not matter."""
    account_has_keys: bool = True
    """Whether public keys are put into the account; else into each instance alone."""
    lists_what_is_taken: bool = True
    """Whether offers that cannot be had just now are listed too."""
    is_prepaid: bool = False
    price_digits: int | None = None
    """To how many digits behind the point its offers round their prices; None: they do not."""
    storage_word: str = "models"
    """Found in the line about what was stored under that name."""
    key_refusals: tuple[object, ...] = (None,)
    """The forms in which a key is refused."""
    tells_host_key: bool = False


CLOUDS = {
    "lambda": Kind(
        "light_cloud",
        "LAMBDA_API_KEY",
        "GPU_LAMBDA_URL",
        lets_in=lambda instance, now: [instance.public_key],
        absent_id="0" * 32,
        powered_off="unhealthy",
        asks_nobody=frozenset({"admit", "host_key", "stop", "start", "gate", "credit"}),
    ),
    "vast": Kind(
        "light_vast",
        "VAST_API_KEY",
        "GPU_VAST_URL",
        lets_in=lambda instance, now: list(instance.lets_in(now)),
        absent_id="999999999",
        powered_off="stopped",
        asks_nobody=frozenset({"ensure_key", "key_names", "remove_key"}),
        asks_as_anybody=frozenset({"offers"}),
        account_has_keys=False,
        lists_what_is_taken=False,
        is_prepaid=True,
        price_digits=6,
        storage_word="volume [0-9]+ .*month",
        key_refusals=(None, 401, 403, "page"),
        tells_host_key=True,
    ),
}


@dataclass
class Rented:
    """A cloud, and the stand-in that plays it on a clock that only waiting moves."""

    kind: Kind
    account: Provider
    cloud: Stand
    time: Time
    offered: Offer | None = field(default=None)
    """What was rented last."""

    def offer(self) -> Offer:
        """The cheapest machine with one GPU that is free."""
        found = [offer for offer in self.account.offers(Need()) if offer.available and offer.count == 1]
        return min(found, key=lambda offer: offer.price_usd_per_hour)

    def order(self) -> Order:
        """An order with a new marker, and a key that is let in."""
        name = self.account.ensure_key(KEY, "gpu-tests")
        tags = {"gpu-name": "box", "gpu-deadline": "1800007200", "gpu-guard": "container"}
        return Order(new_marker("2027-01-15T08:00:00Z"), name, "#!/bin/sh\n", tags)

    def rent(self) -> str:
        """The id of a machine that is rented now, and has appeared."""
        self.offered = self.offer()
        instance_id = self.account.launch(self.offered, self.order())
        self.time.advance(5)
        return instance_id

    def about(self, price_usd: float) -> Any:
        """What equals a price that was offered, as exactly as this cloud offers."""
        digits = self.kind.price_digits
        return price_usd if digits is None else pytest.approx(price_usd, abs=10**-digits)

    def paid_calls(self) -> int:
        """How many paid requests came."""
        return self.cloud.core.count("launch")

    def one(self) -> str:
        """The id of the machine that is there."""
        instance_id: str = self.cloud.core.ours()[0].instance_id
        return instance_id


ASKING: dict[str, Callable[[Rented], object]] = {
    "offers": lambda it: it.account.offers(Need()),
    "ensure_key": lambda it: it.account.ensure_key(OTHER_KEY, "other"),
    "key_names": lambda it: it.account.key_names(),
    "remove_key": lambda it: it.account.remove_key("gpu-tests"),
    "get": lambda it: it.account.get(it.one()),
    "instances": lambda it: it.account.instances(),
    "terminate": lambda it: it.account.terminate(it.one()),
    "storage": lambda it: it.account.storage(),
    "check_key": lambda it: it.account.check_key(),
    "admit": lambda it: it.account.admit(it.one(), OTHER_KEY),
    "host_key": lambda it: it.account.host_key(it.one()),
    "stop": lambda it: it.account.stop(it.one()),
    "gate": lambda it: it.account.gate(it.one(), "/root/.gpu/runs"),
    "start": lambda it: it.account.start(it.one()),
    "credit": lambda it: it.account.credit(),
}
"""Every method that asks some cloud, but for launch, each asked of an account that has one machine."""
OF_NOBODY = {"overridden", "start_script"}
"""Methods for which no cloud is asked."""
CHANGING = {"terminate", "stop", "start"}
"""Methods that change the machine."""
TROUBLE: dict[str, type[GpuError]] = {"terminate": NotReturned, "start": LaunchUnknown}
"""What it is called when no answer comes to a request that was sent; of all others ProviderDown."""


def trouble(method: str) -> type[GpuError]:
    """The error of a method whose request was sent, and not answered."""
    return TROUBLE.get(method, ProviderDown)


def asked() -> list[tuple[str, str]]:
    """Each cloud with each method for which it is asked."""
    return [(cloud, what) for cloud, kind in CLOUDS.items() for what in ASKING if what not in kind.asks_nobody]


def answered_here() -> list[tuple[str, str]]:
    """Each cloud with each method for which it is not."""
    return [(cloud, what) for cloud, kind in CLOUDS.items() for what in sorted(kind.asks_nobody)]


def asked_with_key() -> list[tuple[str, str]]:
    """Each cloud with each method for which the account's key is looked at."""
    return [(cloud, what) for cloud, what in asked() if what not in CLOUDS[cloud].asks_as_anybody]

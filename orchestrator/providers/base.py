"""What every cloud provides: offers, one paid request, honest answers about what exists; nothing in here waits."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import ClassVar, Literal, Protocol

MARKER_TAG = "gpu-marker"
"""Where a cloud has tags, the marker stands there too: a name can be changed on a dashboard."""
_MARKER = re.compile(r"gpu-[0-9]{8}t[0-9]{6}-[0-9a-f]{12}")
State = Literal["booting", "ready", "unhealthy", "stopped", "stopping", "gone", "unknown"]
"""Of an instance, as its provider sees it; one it has no word for here is `unknown`, and counts as costing money."""


@dataclass(frozen=True)
class Need:
    """What is asked of a machine; None: anything."""

    gpu: str | None = None
    """As typed: `A100`, `h100`, `RTX 4090`."""
    type_name: str | None = None
    """The provider's own name of a kind of machine."""
    count: int | None = 1
    """GPUs."""
    min_vram_gb: float | None = None
    """Of each GPU."""
    max_price_usd_per_hour: float | None = None
    """Of the whole machine."""
    region: str | None = None
    disk_gb: float | None = None
    spot: bool = False


@dataclass(frozen=True)
class Offer:
    """A machine that may be had, with everything that is known of it; None: unknown."""

    provider: str
    offer_id: str
    type_name: str
    gpu: str | None
    """The GPU's name without its memory, such as `A100 SXM4`; None: it has none."""
    count: int
    vram_gb: float | None
    """Of each GPU."""
    vcpus: int | None
    ram_gb: float | None
    disk_gb: float | None
    region: str | None
    price_usd_per_hour: float
    """Of the whole machine."""
    spot: bool = False
    available: bool = True
    reliability: float | None = None
    machine_id: str | None = None
    architecture: str = "x86_64"

    def place(self) -> str:
        """Where it stands, as far as that is known: what is no good there is not looked for there again."""
        return f"{self.provider}/{self.machine_id or self.region}"


@dataclass(frozen=True)
class Order:
    """What is sent along with a paid request."""

    marker: str
    """Unique to this one request; the instance bears it as its name."""
    key_name: str
    """Of the account's public key that is let in, as `ensure_key` returned it."""
    start_script: str = field(repr=False)
    """What the machine does at its first boot (cloud-init)."""
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Instance:
    """A machine as its provider sees it."""

    instance_id: str
    marker: str | None
    """The marker of ours that it bears; None: it is not ours, and never touched."""
    state: State
    raw_state: str
    user: str
    host: str | None
    port: int
    type_name: str
    region: str | None
    price_usd_per_hour: float | None
    key_names: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)


def new_marker(at: str) -> str:
    """A name that no other request bears: when it is made (ISO 8601, UTC), and 48 random bits."""
    day, time = at[:10].replace("-", ""), at[11:19].replace(":", "")
    return f"gpu-{day}t{time}-{os.urandom(6).hex()}"


def marked_at(marker: str) -> float:
    """When a marker was made, which stands in it; seconds since 1970."""
    return datetime.strptime(marker[4:19], "%Y%m%dt%H%M%S").replace(tzinfo=UTC).timestamp()


def marker_of(name: str | None, tags: dict[str, str]) -> str | None:
    """The marker of ours among an instance's tags, or else its name; None when it bears none."""
    return next((text for text in (tags.get(MARKER_TAG), name) if text and _MARKER.fullmatch(text)), None)


class Provider(Protocol):
    """One cloud, with one account's key. Every method asks at most a few times and never waits for a change.

    Raises ProviderDown (nothing happened), RateLimited (nothing happened), AuthRejected, Refused; and of `launch` alone
    NoCapacity (nothing was rented) and LaunchUnknown (it may have been: look for the marker, never ask again).
    """

    name: ClassVar[str]
    dashboard: ClassVar[str]
    """Where a person looks at the account's instances."""
    api_url: str
    """Where its API is, for a guard on a machine."""
    account: str
    """Which key it is asked with: a name made of a digest, which does not give the key."""
    boot_minutes: ClassVar[tuple[float, float]]
    """How long machines with one GPU, and with several, usually take to boot."""

    @property
    def skew_s(self) -> float | None:
        """By how much its clock was ahead of this computer's at its last answer, in seconds; None: it never said."""
        ...

    def offers(self, need: Need) -> list[Offer]:
        """Every machine of the cloud that may fit, had or not; each is checked against the need by the caller."""
        ...

    def ensure_key(self, public_key: str, name: str) -> str:
        """Have a public key in the account; returns the name it has there. The same key twice is the same name."""
        ...

    def key_names(self) -> list[str]:
        """The names of all public keys of the account."""
        ...

    def remove_key(self, name: str) -> None:
        """Take a public key out of the account; absent is success."""
        ...

    def launch(self, offer: Offer, order: Order) -> str:
        """Rent a machine, asked once; returns the instance's id. **Spends money.**"""
        ...

    def get(self, instance_id: str) -> Instance | None:
        """One instance; None only when the provider surely knows of no such thing."""
        ...

    def instances(self) -> list[Instance]:
        """All that may cost money, of everybody who uses the account."""
        ...

    def terminate(self, instance_id: str) -> None:
        """Ask for the end of an instance; absent is success. Returns before it is gone."""
        ...

    def storage(self) -> list[str]:
        """What keeps costing money beside instances, in words: file systems, volumes."""
        ...

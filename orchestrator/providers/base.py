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
    bid_usd_per_hour: float | None = None
    """With `spot`: what is bid for the whole machine; None: a little more than the lowest bid that is taken."""
    filters: dict[str, str] = field(default_factory=dict)
    """What else a cloud can be asked for, in its own words; each overrides a default that protects."""
    hours: float | None = None
    """How long it will be needed, as far as that is known."""


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
    """Of the whole machine, its disk included; of a spot offer, with what is bid."""
    spot: bool = False
    bid_usd_per_hour: float | None = None
    """Of a spot offer: what is bid for it, its disk not included."""
    available: bool = True
    reliability: float | None = None
    machine_id: str | None = None
    architecture: str = "x86_64"
    stopped_usd_per_hour: float | None = None
    """What it costs while it is stopped: its disk. None: it cannot be stopped, or nobody says."""

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
    """What the machine does at its first boot, as `start_script` of its cloud made it."""
    tags: dict[str, str] = field(default_factory=dict)
    """What another computer must know of it; a cloud without tags has them in its label."""
    disk_gb: float | None = None
    """For a cloud where it is chosen; None: what the offer was priced with."""
    image: str | None = None
    """What a container is made from, for a cloud whose machines are containers; None: its usual one."""


@dataclass(frozen=True)
class HostKey:
    """A key pair made here for one machine, so that its first answer is already known to be its own."""

    private: str = field(repr=False)
    """As OpenSSH writes it."""
    public: str
    """Type and key; what follows is passed over."""


@dataclass(frozen=True)
class GuardOrder:
    """What the guard on a machine is told: see worker/guard_settings.py and worker/watchdog.py, which read it."""

    marker: str
    api_url: str
    key: str = field(repr=False)
    """The account's, where the cloud has none with fewer rights; empty where the machine has one of its own."""
    written_at: float
    """Now, seconds since 1970."""
    user: str = "ubuntu"
    """Who owns the runs there; the guard gives up being root and becomes that user."""
    deadline: float | None = None
    """Seconds since 1970."""
    deadline_max: float | None = None
    idle_s: float | None = None
    grace_s: float = 60.0


@dataclass(frozen=True)
class Endpoint:
    """Where SSH answers."""

    host: str
    port: int


@dataclass(frozen=True)
class Gate:
    """Where rsync over SSH reads the disk of a machine that is stopped, with the key that was let into it."""

    endpoint: Endpoint
    user: str
    module: str
    """What rsync calls the disk there."""


@dataclass(frozen=True)
class Instance:
    """A machine as its provider sees it."""

    instance_id: str
    marker: str | None
    """The marker of ours that it bears; None: it is not ours, and never touched."""
    state: State
    raw_state: str
    user: str
    endpoints: tuple[Endpoint, ...]
    """Where SSH may answer, the best way first; empty: not known yet."""
    type_name: str
    region: str | None
    price_usd_per_hour: float | None
    key_names: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    message: str = ""
    """What its provider says of it in words: how far its image is, what went wrong."""
    failure: str = ""
    """Why it will never be ready, when its provider says so."""
    gpu: str | None = None
    """What it has by its provider's word, as offers have it; None: not said."""
    count: int | None = None
    spot: bool | None = None
    """Whether it may be taken away for a higher bid; None: not said."""
    machine_id: str | None = None
    stopped_usd_per_hour: float | None = None
    """What it costs while it is stopped; None: not said."""
    charged_usd_per_hour: float | None = None
    """What it is charged just now, which is less while it is stopped; None: not said."""

    @property
    def host(self) -> str | None:
        """Where SSH answers best."""
        return self.endpoints[0].host if self.endpoints else None

    @property
    def port(self) -> int:
        """Its port there."""
        return self.endpoints[0].port if self.endpoints else 22


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
    let_in_s: ClassVar[float]
    """How long one that is active usually takes to let us in over SSH, in seconds."""
    active_s: ClassVar[tuple[float, float]]
    """After how long one that is not active is given up, in seconds: with one GPU, and with several."""
    guard: ClassVar[str | None]
    """The guard that every machine of this cloud has; None: the one its user chose."""
    takes_host_key: ClassVar[bool]
    """Whether a machine is given the host key that was made for it; else `host_key` tells which it made itself."""
    filters: ClassVar[tuple[str, ...]]
    """What `Need.filters` may name here."""
    can_stop: ClassVar[bool]
    """Whether a machine can be stopped, so that only its disk is billed, and started again."""

    @property
    def skew_s(self) -> float | None:
        """By how much its clock was ahead of this computer's at its last answer, in seconds; None: it never said."""
        ...

    def offers(self, need: Need) -> list[Offer]:
        """Every machine of the cloud that may fit, had or not; each is checked against the need by the caller."""
        ...

    def overridden(self, need: Need) -> list[str]:
        """The defaults that protect and that a need does not keep, in words. UsageError for a filter without sense."""
        ...

    def ensure_key(self, public_key: str, name: str) -> str:
        """Have a public key in the account; returns the name it has there. The same key twice is the same name.

        Where keys are let into each instance alone, by `admit`, nothing is put there, and the name is as given.
        """
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

    def start_script(self, host_key: HostKey, guard: GuardOrder | None) -> str:
        """What a machine is to do at its first boot: take the host key, where it can, and arm its guard."""
        ...

    def admit(self, instance_id: str, public_key: str) -> None:
        """Have a public key let into an instance that is there; may be repeated."""
        ...

    def host_key(self, instance_id: str) -> str | None:
        """The host key (type and key) that an instance has, by its provider's word; None: not known (yet)."""
        ...

    def stop(self, instance_id: str) -> None:
        """Have an instance stopped, its disk kept and billed; absent is success. Refused where nothing can be."""
        ...

    def start(self, instance_id: str) -> None:
        """Have a stopped instance started again; NoCapacity when its GPUs are in other hands. **Spends money.**"""
        ...

    def gate(self, instance_id: str, path: str) -> Gate | None:
        """Have a way opened to a folder on the disk of an instance, which is not started for it; asked once.

        None where no disk can be read.
        """
        ...

    def credit(self) -> float | None:
        """What the account has left to spend, in USD; None: it is billed afterwards."""
        ...

    def check_key(self) -> None:
        """One small read that needs the key. Raises AuthRejected when it is not accepted."""
        ...

    def storage(self) -> list[str]:
        """What keeps costing money beside instances, in words: file systems, volumes."""
        ...

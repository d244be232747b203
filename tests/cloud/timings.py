"""How long everything takes at a stand-in, and what a bill says."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass
class Timings:
    """How long everything takes, in seconds of the stand-in's clock."""

    visibility_delay_s: float = 0.2
    """From launch until it is listed."""
    boot_s: float = 1.0
    """From launch until it is active; at Vast from its first start until it runs."""
    ip_delay_s: float = 0.1
    """From active until it has an address; at Vast until it has its ports."""
    sshd_delay_s: float = 0.3
    """From active until sshd listens."""
    restart_s: float = 0.5
    """Of a reboot; at Vast of every start but the first."""
    term_s: float = 0.5
    """From terminate until it is terminated, and costs nothing any more."""
    linger_s: float = 1.0
    """From terminated until nobody knows of it."""
    key_delay_s: float = 0.2
    """Vast: from attaching a key until it is let in."""
    key_refresh_s: float = 3600.0
    """Vast: how often a container's authorized keys are written anew, with those of the API alone."""
    stop_lag_s: float = 0.2
    """Vast: for how long a stopped container is still shown as it was."""


@dataclass(frozen=True)
class Bill:
    """What one instance cost."""

    instance_id: str
    name: str | None
    began: float
    """Seconds since 1970, as `ended`."""
    ended: float | None
    """None: it still costs money."""
    cents: Fraction
    """As it is charged: in whole minutes begun, or by the second."""

"""What else a machine of Vast.ai can be asked for: the defaults that protect, and how each is overridden."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.providers.base import Need

DISK_GB = 50
"""Rented with a machine when nobody says how much: an environment takes 7 to 12, a model of 7B parameters 15."""
DISK_MIN_GB = 8
_DISK_MAX_GB = 100_000
_BID_MIN_USD, _BID_MAX_USD = 0.001, 128.0
"""What the API takes as a bid, USD an hour for the machine."""
ANY = "any"


@dataclass(frozen=True)
class Filter:
    """One thing that can be asked for by name."""

    default: str
    """Empty: nothing is asked for, or it follows from the rest of the need."""
    says: str
    """What it means, in words."""
    range: tuple[float, float] | None = None
    """Of a number; `any` lifts it."""
    choices: tuple[str, ...] = ()


FILTERS = {
    "verified": Filter("yes", "hosts that Vast.ai has checked", choices=("yes", ANY)),
    "reliability": Filter("0.98", "the share of time that its host was up, at least", (0.0, 1.0)),
    "inet_down": Filter("200", "Mbps down to it, at least", (0.0, 1e6)),
    "cuda": Filter("13.0", "the CUDA version that its driver runs, at least", (0.0, 99.0)),
    "direct_ports": Filter("1", "ports reached without Vast.ai's proxy, at least", (0.0, 65535.0)),
    "arch": Filter("amd64", "its processor", choices=("amd64", "arm64", ANY)),
    "duration": Filter("", "hours for which its host rents it out, at least; else as long as needed", (0.0, 1e5)),
    "disk": Filter("", f"GB of disk rented with it; else --disk, or {DISK_GB}", (DISK_MIN_GB, _DISK_MAX_GB)),
    "image": Filter("", "the image that it runs, such as name:tag or name@sha256:…"),
}
"""`cuda` is what the PyTorch of worker/locks is built for."""
_FIELDS = {
    "reliability": ("reliability", 1),
    "inet_down": ("inet_down", 1),
    "cuda": ("cuda_max_good", 1),
    "direct_ports": ("direct_port_count", 1),
    "duration": ("duration", 3600),
}
"""What the market calls a number, and how many of its units one of ours has."""


@dataclass(frozen=True)
class Wishes:
    """What a need asks for by filters and defaults together."""

    is_verified: bool
    arch: str | None
    """`amd64` or `arm64`; None: any."""
    floors: dict[str, float]
    """The least of each number, by the market's name and in its unit."""
    disk_gb: int
    image: str | None


def wishes(need: Need) -> Wishes:
    """What a need asks for. Raises UsageError for a filter that is not known, or a value that makes no sense."""
    for name in need.filters:
        if name not in FILTERS:
            raise _unknown(name)
    said = {name: _value(name, need.filters.get(name, known.default)) for name, known in FILTERS.items()}
    if said["duration"] is None and "duration" not in need.filters:
        said["duration"] = need.hours
    floors = {field: said[name] * units for name, (field, units) in _FIELDS.items() if said[name] is not None}
    disk_gb = _disk_gb(need, said["disk"])
    _check_bid(need)
    return Wishes(
        said["verified"] == "yes",
        None if said["arch"] == ANY else said["arch"],
        {**floors, "disk_space": float(disk_gb)},
        disk_gb,
        said["image"],
    )


def overridden(need: Need) -> list[str]:
    """The defaults that a need does not keep, each in words; UsageError as `wishes`."""
    wishes(need)
    found = []
    for name, text in need.filters.items():
        known = FILTERS[name]
        usual = need.hours if name == "duration" else _value(name, known.default)
        if _value(name, text) != usual:
            words = f"usually {known.default}: " if known.default else ""
            found.append(f"{name}={text.strip()} ({words}{known.says})")
    return found


def _value(name: str, text: str) -> Any:
    """What a filter's text means: a number, a word, None for nothing asked."""
    known, typed = FILTERS[name], text.strip()
    if not typed and not known.default:
        return None
    if known.choices:
        if typed.lower() not in known.choices:
            raise _odd(name, text, f"one of: {', '.join(known.choices)}")
        return typed.lower()
    if known.range is None:
        return typed
    if typed.lower() == ANY and name != "disk":
        return None
    low, high = known.range
    number = _number(typed)
    if not low <= number <= high:
        raise _odd(name, text, f"a number from {low:g} to {high:g}{'' if name == 'disk' else ', or any'}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _disk_gb(need: Need, typed: float | None) -> int:
    """Whole GB, rounded up. UsageError when two sizes were typed, or one that is not rented out."""
    if typed is not None and need.disk_gb is not None and typed != need.disk_gb:
        raise UsageError(f"Two sizes of disk were typed: {typed:g} and {need.disk_gb:g} GB. Nothing was rented.")
    size = next((one for one in (typed, need.disk_gb) if one is not None), float(DISK_GB))
    if not DISK_MIN_GB <= size <= _DISK_MAX_GB:
        raise UsageError(
            f"Vast.ai rents out disks of {DISK_MIN_GB} to {_DISK_MAX_GB} GB; {size:g} GB were asked for. Nothing was "
            "rented.",
            f"Ask for another: --disk {DISK_GB}. It cannot grow later.",
        )
    return math.ceil(size)


def _check_bid(need: Need) -> None:
    bid = need.bid_usd_per_hour
    if bid is not None and not _BID_MIN_USD <= bid <= _BID_MAX_USD:
        raise UsageError(
            f"Vast.ai takes bids from {_BID_MIN_USD} to {_BID_MAX_USD:g} USD/h; {bid:g} was bid. Nothing was rented."
        )


def _unknown(name: str) -> UsageError:
    close = difflib.get_close_matches(name.lower(), FILTERS, 1, 0.5)
    meant = f" Did you mean {close[0]}?" if close else ""
    return UsageError(f"Vast.ai has no filter {name!r}.{meant} Nothing was rented.", f"There are: {', '.join(FILTERS)}")


def _odd(name: str, text: str, form: str) -> UsageError:
    says = FILTERS[name].says
    return UsageError(f"The filter {name} ({says}) is {form}; not {text!r}. Nothing was rented.")

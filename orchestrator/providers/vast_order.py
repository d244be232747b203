"""The paid request for one machine of Vast.ai: what is in it, and what is wrong with it before it is sent."""

from __future__ import annotations

import math
import re
from typing import Any

from orchestrator.errors import ConfigError, Refused
from orchestrator.providers import images, vast_label
from orchestrator.providers.base import Offer, Order
from orchestrator.providers.vast_errors import TITLE
from orchestrator.providers.vast_filters import DISK_GB, DISK_MIN_GB
from orchestrator.providers.vast_label import LABEL_MAX

SCRIPT_MAX = 4040
"""Bytes that a start script stays below: the limit is told as 4048, 4096 and 16 KB."""

_PUBLIC_KEY = re.compile(r"((?:ssh|ecdsa|sk)-[A-Za-z0-9@.-]+) ([A-Za-z0-9+/]+={0,3})(?: .*)?")


def body(offer: Offer, order: Order) -> dict[str, Any]:
    """The request, its image pinned. Raises Refused for what would not be taken, ProviderDown without a registry.

    It has no secret: whoever has the machine can read all of it.
    """
    label = vast_label.encode(order.marker, order.tags)
    disk_gb = next((size for size in (order.disk_gb, offer.disk_gb) if size is not None), float(DISK_GB))
    if why := _why_not(offer, order, label, disk_gb):
        raise Refused(f"{TITLE} cannot rent {offer.type_name} so: {why}. Nothing was rented.")
    try:
        image = images.pinned(order.image or images.USUAL)
    except ConfigError as error:  # one that was typed is looked at with the offers, before there is a request
        raise Refused(error.message, error.hint) from None
    return {
        "client_id": "me",
        "image": image,
        "env": {},
        "price": offer.bid_usd_per_hour if offer.spot else None,
        "disk": math.ceil(disk_gb),
        "label": label,
        "onstart": order.start_script,
        "runtype": "ssh_direc ssh_proxy",  # as its own client spells it: both ways in
        "cancel_unavail": True,
        "target_state": "running",
    }


def _why_not(offer: Offer, order: Order, label: str, disk_gb: float) -> str:
    """What of an order would not be taken; empty when nothing is wrong with it."""
    if offer.spot and not offer.bid_usd_per_hour:  # without one it would be rented at the fixed price
        return "a spot machine is rented by a bid, and there is none"
    if len(label) > LABEL_MAX:
        return f"a label has at most {LABEL_MAX} signs; this one has {len(label)}"
    if len(order.start_script.encode()) >= SCRIPT_MAX:
        return f"a start script has less than {SCRIPT_MAX} bytes; this one has {len(order.start_script.encode())}"
    if disk_gb < DISK_MIN_GB:
        return f"a disk has at least {DISK_MIN_GB} GB; {disk_gb:g} were asked for"
    return ""


def public_line(public_key: str) -> str:
    """Type and key; ConfigError for anything else, of which nothing is shown: it may be a private one."""
    found = _PUBLIC_KEY.fullmatch(public_key.strip())
    if not found:
        raise ConfigError("That is no public SSH key in one line (ssh-ed25519 AAAA… name). It was not sent.")
    return f"{found[1]} {found[2]}"

"""Which offers fit what is asked: every field checked here again, cheapest first, and why none fits when none does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from orchestrator import gpus, ledger
from orchestrator.errors import NoCapacity, UsageError
from orchestrator.providers.base import Need, Offer

_COUNT = re.compile(r"[0-9]{1,3}x ")
"""Before the GPU in a market's name of a kind of machine."""
_WAIT = "Ask for less, or wait for one: gpu launch … --wait-capacity"


def is_called(offer: Offer, asked: str) -> bool:
    """Whether an offer's GPU is the one that was typed; a memory in the name (`A100 80GB`) counts too."""
    return offer.gpu is not None and gpus.is_called(offer.gpu, offer.vram_gb, asked)


def is_in(offer: Offer, region: str) -> bool:
    """Whether an offer is in the region that was typed, or in a part of it: `US` has `US-Texas` and `us-east-1`."""
    return f"{offer.region or ''}-".lower().startswith(f"{region}-".lower())


_Filter = tuple[str, Callable[[Offer], bool]]


def _filters(need: Need) -> list[_Filter]:
    """Each wish of a need as it was typed, with what keeps it."""
    found: list[_Filter] = [("available now", lambda offer: offer.available)]
    if need.type_name is not None:
        found.append((f"--type {need.type_name}", lambda offer: offer.type_name == need.type_name))
    if need.gpu is not None:
        found.append((f"--gpu {need.gpu}", lambda offer: is_called(offer, need.gpu or "")))
    if need.type_name is None and need.count is not None:
        found.append((f"--count {need.count}", lambda offer: offer.count == need.count))
    if (vram := need.min_vram_gb) is not None:
        found.append((f"--min-vram {vram:g}", lambda offer: (offer.vram_gb or 0) >= vram * gpus.VRAM_SLACK))
    if (price := need.max_price_usd_per_hour) is not None:
        found.append((f"--max-price {price:g}", lambda offer: offer.price_usd_per_hour <= price))
    if need.region is not None:
        found.append((f"--region {need.region}", lambda offer: is_in(offer, need.region or "")))
    if (disk := need.disk_gb) is not None:
        found.append((f"--disk {disk:g}", lambda offer: (offer.disk_gb or 0) >= disk))
    found.append(("--spot" if need.spot else "no --spot", lambda offer: offer.spot == need.spot))
    return found


def suitable(found: Sequence[Offer], need: Need, *, had_or_not: bool = False) -> list[Offer]:
    """Those that fit, cheapest first. Raises UsageError for a name that nothing has, NoCapacity when none fits.

    `had_or_not`: also those that cannot be had just now.
    """
    _check_names(found, need)
    filters = _filters(need)[1:] if had_or_not else _filters(need)
    fitting = [offer for offer in found if all(keeps(offer) for _, keeps in filters)]
    if not fitting:
        is_unknown = need.spot and found and not any(offer.spot for offer in found)
        raise NoCapacity(
            _why_none(found, filters), "Spot machines are Vast.ai's: --provider vast" if is_unknown else _WAIT
        )
    return sorted(fitting, key=lambda offer: (not offer.available, offer.price_usd_per_hour, offer.offer_id))


def _check_names(found: Sequence[Offer], need: Need) -> None:
    """Raise UsageError for a GPU, a type or a region that no offer has, with the nearest one that some have."""
    is_there = any(is_in(offer, need.region or "") for offer in found)
    names_of_gpus = sorted({offer.gpu for offer in found if offer.gpu})
    checks = [
        ("GPU", need.gpu, names_of_gpus, any(is_called(offer, need.gpu or "") for offer in found)),
        ("type of machine", need.type_name, sorted({offer.type_name for offer in found}), None),
        ("region", need.region, sorted({offer.region for offer in found if offer.region}), is_there),
    ]
    for what, asked, names, is_known in checks:
        if asked is None or (is_known if is_known is not None else asked in names):
            continue
        forms = {form.lower(): name for name in names for form in (name.split()[0], name)}  # `A10` of `A10 PCIe`
        close = difflib.get_close_matches(asked.lower(), forms, 1, 0.3)
        near = forms[close[0]] if close else None
        meant = f" Did you mean {near}?" if near else ""
        there_are = f"There are: {_few(names)}"
        if what == "region":  # only regions where something is free are listed
            raise NoCapacity(f"Nothing is offered in the {what} {asked!r} just now.{meant} Nothing was rented.")
        if gpus.named(_COUNT.sub("", asked)):  # no typo: markets list only what is free
            raise NoCapacity(f"No {asked} is offered just now. Nothing was rented.", f"{there_are}. {_WAIT}")
        raise UsageError(f"No offer has the {what} {asked!r}.{meant} Nothing was rented.", there_are)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


def _why_none(found: Sequence[Offer], filters: Sequence[_Filter]) -> str:
    """Which wish leaves nothing, alone, or with which others."""
    if not found:
        return "Nothing is offered at all just now. Nothing was rented."
    alone = [name for name, keeps in filters if not any(keeps(offer) for offer in found)]
    if alone:
        return f"No offer passes {alone[0]!r}, which alone excludes all {len(found)}. Nothing was rented."
    left = list(found)
    for name, keeps in filters:
        before, left = left, [offer for offer in left if keeps(offer)]
        if not left:
            cheapest = min(before, key=lambda offer: offer.price_usd_per_hour)
            return (
                f"No offer passes all of {', '.join(name for name, _ in filters)}: {name!r} excludes the last "
                f"{len(before)}, such as {in_words(cheapest)}. Nothing was rented."
            )
    raise AssertionError("called when nothing is left")


def in_words(offer: Offer) -> str:
    """An offer on one line."""
    gpu = f"{offer.count}x {offer.gpu or 'no GPU'}" + (f" {offer.vram_gb:g} GB" if offer.vram_gb else "")
    where = offer.region or "no region"
    return f"{offer.type_name} ({gpu}) in {where} at {ledger.shown(offer.price_usd_per_hour)} USD/h"


def document(offer: Offer) -> dict[str, Any]:
    """An offer as `gpu offers --json` gives it."""
    return asdict(offer)

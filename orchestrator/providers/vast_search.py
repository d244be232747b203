"""A search of Vast.ai's market: what is asked for, every field of the answers checked again, and all-in prices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator import gpus
from orchestrator.errors import NoCapacity
from orchestrator.providers import vast_answers, vast_filters
from orchestrator.providers.base import Need, Offer
from orchestrator.providers.vast_answers import number, text, whole
from orchestrator.providers.vast_filters import Wishes

LIMIT = 64
"""Offers an answer has at most, whatever is asked (seen in September 2026)."""
_HOURS_A_MONTH = 720
"""By which a price of storage per GB and month becomes one per hour."""
_BID_SHARE = 1.05
"""Of the lowest bid that is taken: a little more, so that the next cent does not outbid it."""
_BID_LEAST_USD = 0.01
_MB_PER_GB = 1000
_MIB_PER_GIB = 1024
_TYPE = re.compile(r"([1-9][0-9]{0,2})x (.{1,60})")
_COUNTRY = re.compile(r"[A-Za-z]{2}(?=-|$)")
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Search:
    """One search, ready to be asked."""

    need: Need
    wishes: Wishes
    names: tuple[str, ...]
    """The GPUs that may be meant, as the market spells them; empty: any."""
    count: int | None
    memory_gb: float | None
    """Of each GPU, at least."""

    def body(self, floor_usd: float | None, without: Collection[str] = ()) -> dict[str, Any]:
        """What is sent, for offers at this price and above, cheapest first, `without` those of these ids."""
        need, wishes = self.need, self.wishes
        asked: dict[str, Any] = {"rentable": {"eq": True}, "rented": {"eq": False}}
        asked |= {"verified": {"eq": True}} if wishes.is_verified else {}
        asked |= {"cpu_arch": {"eq": wishes.arch}} if wishes.arch else {}
        asked |= {field: {"gte": least} for field, least in wishes.floors.items()}
        asked |= {"gpu_name": _among(self.names)} if self.names else {}
        asked |= {"num_gpus": {"eq": self.count}} if self.count is not None else {}
        if self.memory_gb is not None:
            asked["gpu_ram"] = {"gte": math.floor(self.memory_gb * gpus.VRAM_SLACK * _MB_PER_GB)}
        if country := _COUNTRY.match(need.region or ""):
            asked["geolocation"] = {"in": [country[0].upper()]}
        asked |= {"dph_total": {"gte": floor_usd}} if floor_usd is not None else {}
        asked |= {"ask_contract_id": {"notin": [int(one) for one in without]}} if without else {}
        kind = "bid" if need.spot else "on-demand"
        storage = float(wishes.disk_gb)
        return {**asked, "order": [["dph_total", "asc"]], "type": kind, "limit": LIMIT, "allocated_storage": storage}

    def relaxed(self) -> Search:
        """The same for whatever GPU, count and place: what there is, for the reason why nothing fits."""
        need = dataclasses.replace(self.need, region=None, bid_usd_per_hour=None)
        return Search(need, self.wishes, (), None, None)

    def is_over(self, top_usd: float) -> bool:
        """Whether what is dearer than this need not be looked at; of a spot machine it is not what is paid."""
        dearest = self.need.max_price_usd_per_hour
        return dearest is not None and not self.need.spot and top_usd > dearest

    def offers(self, entries: Iterable[Any]) -> list[Offer]:
        """What of the answers can be rented as asked. NoCapacity, naming the lowest, when the bid is too low for all.

        Every field is looked at again: the market has been seen to pass over what it was asked for.
        """
        kept = [entry for entry in entries if isinstance(entry, dict) and self._is_kept(entry)]
        found = [offer for entry in kept if (offer := self._offer(entry)) is not None]
        bid = self.need.bid_usd_per_hour if self.need.spot else None
        lowest = min((least for entry in kept if (least := number(entry, "min_bid")) is not None), default=None)
        if not found and bid is not None and lowest is not None and bid < lowest:
            raise NoCapacity(
                f"The lowest bid that Vast.ai takes for such a machine just now is {lowest:.3f} USD/h; {bid:g} was "
                "bid. Nothing was rented.",
                f"Bid {_bid_usd(lowest):.2f} or more, or wait until the price falls.",
            )
        return found

    def _is_kept(self, entry: dict[str, Any]) -> bool:
        """Whether an entry is as asked; what it does not tell is not taken on trust."""
        wishes = self.wishes
        told = {**entry, "reliability": number(entry, "reliability", "reliability2")}
        checks = (
            entry.get("rentable") is not False,
            entry.get("rented") is not True,
            entry.get("external") is not True,
            text(entry.get("gpu_arch")) in ("", "nvidia"),
            not wishes.is_verified or text(entry.get("verification")) == "verified",
            wishes.arch is None or text(entry.get("cpu_arch")) == wishes.arch,
            all((number(told, field) or 0.0) >= least for field, least in wishes.floors.items()),
            self.count is None or whole(entry, "num_gpus") == self.count,
            self.memory_gb is None or _vram_gb(entry) >= self.memory_gb * gpus.VRAM_SLACK,
            not self.names or self._is_meant(entry),
        )
        return all(checks)

    def _is_meant(self, entry: dict[str, Any]) -> bool:
        """Whether its GPU is one that was asked for."""
        name = text(entry.get("gpu_name"))
        return name in self.names or gpus.is_called(name, _vram_gb(entry), self.need.gpu or "")

    def _offer(self, entry: dict[str, Any]) -> Offer | None:
        """An entry as an offer; None when what must be known of it is not."""
        offer_id, machine_id = (vast_answers.identifier(entry, name) for name in ("id", "machine_id"))
        gpu, count = text(entry.get("gpu_name")), whole(entry, "num_gpus")
        bid = self._bid(entry) if self.need.spot else None
        price = self._price(entry, bid)
        if offer_id is None or not gpu or not count or not price or (self.need.spot and bid is None):
            return None
        ram_mb, share, cores = (number(entry, name) for name in ("cpu_ram", "gpu_frac", "cpu_cores_effective"))
        return Offer(
            provider="vast",
            offer_id=offer_id,
            type_name=vast_answers.kind(count, gpu),
            gpu=gpu,
            count=count,
            vram_gb=round(_vram_gb(entry), 1) or None,
            vcpus=int(cores) if cores else None,
            ram_gb=round(ram_mb / _MB_PER_GB * min(share or 1.0, 1.0), 1) if ram_mb else None,
            disk_gb=float(self.wishes.disk_gb),  # what is rented: the rest of the host's is not to be had
            region=vast_answers.region(entry.get("geolocation")),
            price_usd_per_hour=price,
            spot=self.need.spot,
            bid_usd_per_hour=bid,
            reliability=number(entry, "reliability", "reliability2"),
            machine_id=machine_id,
            architecture=_ARCHITECTURES.get(text(entry.get("cpu_arch")), "x86_64"),
            stopped_usd_per_hour=self._disk_usd(entry),
        )

    def _bid(self, entry: dict[str, Any]) -> float | None:
        """What is bid for a machine; None when that is less than what is taken, or nobody says what is."""
        least, bid = number(entry, "min_bid"), self.need.bid_usd_per_hour
        if least is None or (bid is not None and bid < least):
            return None
        return _bid_usd(least) if bid is None else bid

    def _price(self, entry: dict[str, Any], bid: float | None) -> float | None:
        """USD an hour for all of it, its disk included; None when it is not known. Of two answers, the higher."""
        base, total, disk = number(entry, "dph_base"), number(entry, "dph_total"), self._disk_usd(entry)
        if self.need.spot:
            return None if bid is None or disk is None else _up(bid + disk)
        made = base + disk if base is not None and disk is not None else 0.0
        return _up(max(total or 0.0, made)) or None

    def _disk_usd(self, entry: dict[str, Any]) -> float | None:
        """USD an hour for the disk asked for; None when that is not told."""
        per_gb = number(entry, "storage_cost")
        if per_gb is None:
            return number(entry, "storage_total_cost")
        return _up(per_gb * self.wishes.disk_gb / _HOURS_A_MONTH)


def search(need: Need) -> Search | None:
    """The search for a need; None when nothing there can be meant. UsageError for a filter that makes no sense."""
    wishes = vast_filters.wishes(need)
    count, gpu = need.count, need.gpu
    if need.type_name is not None:
        found = _TYPE.fullmatch(need.type_name)
        if found is None:  # a name of another cloud's
            return None
        count, gpu = int(found[1]), found[2]
    if count == 0:
        return None
    rest, memory = gpus.split(gpu or "")
    if gpu is not None and not gpus.words(rest) and memory is None:
        return None
    known = (gpu,) if need.type_name is not None and gpu in gpus.NAMES else tuple(gpus.named(rest))
    least = max((size for size in (need.min_vram_gb, memory) if size is not None), default=None)
    return Search(need, wishes, known or _forms(rest), count, least)


def top_usd(entries: Iterable[Any]) -> float:
    """The highest price of a page, at which the next one begins."""
    prices = (number(entry, "dph_total") for entry in entries if isinstance(entry, dict))
    return max((price for price in prices if price is not None), default=0.0)


def from_price(entries: Mapping[str, Any], least_usd: float) -> list[str]:
    """The ids of those that cost at least so much: more than a page may cost the same."""
    return [one for one, entry in entries.items() if (number(entry, "dph_total") or 0.0) >= least_usd]


def _vram_gb(entry: dict[str, Any]) -> float:
    """Of each GPU; 0 when it is not told."""
    return (number(entry, "gpu_ram") or 0.0) / _MIB_PER_GIB


def _among(names: tuple[str, ...]) -> dict[str, Any]:
    return {"eq": names[0]} if len(names) == 1 else {"in": list(names)}


def _forms(name: str) -> tuple[str, ...]:
    """A name that is not known, as the market may spell it."""
    plain = " ".join(name.split())
    return tuple(dict.fromkeys(form for form in (plain, plain.upper(), plain.title()) if form))


def _up(usd: float) -> float:
    """A price to six digits, rounded up: nothing costs more than it was offered at."""
    return math.ceil(round(usd * 1e6, 3)) / 1e6


def _bid_usd(least: float) -> float:
    """A little more than the lowest bid that is taken, rounded up to a cent."""
    return max(math.ceil(round(least * _BID_SHARE * 100, 6)) / 100, _BID_LEAST_USD)

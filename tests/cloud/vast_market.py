"""What is on offer at the stand-in for Vast: some hundred offers of realistic machines, good ones and traps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from tests.cloud import vast_catalogue, vast_search
from tests.cloud.answers import Json
from tests.cloud.catalogue import Gpus
from tests.cloud.vast_answers import Refused
from tests.cloud.vast_catalogue import Model

LIMIT = 64
"""Offers in one answer, whatever is asked for."""
_DAY_S = 86400.0
_DEFAULT_DISK_GB = 8.0
_TYPES = ("on-demand", "ondemand", "bid", "reserved")


_STORED = {
    "cuda_vers": None,
    "datacenter": lambda row: row["hosting_type"] == 1,
    "verified": lambda row: row["verification"] == "verified",
    "external": lambda row: bool(row["external"]),
    "geolocation": lambda row: row["geolocation"] and row["geolocation"].rpartition(", ")[2],
    "ubuntu_version": lambda row: row["os_version"],
}
"""Filters that look at something else than the field of their name."""
_NOT_FILTERS = (
    "order",
    "limit",
    "type",
    "allocated_storage",
    "disable_bundling",
    "select_cols",
    "client_id",
    "api_key",
)


@dataclass
class Slot:
    """Some GPUs of one machine that can be rented together."""

    row: Json
    model: Model
    whole: int
    """GPUs of the machine."""
    ask_id: int
    trap: str = ""

    @property
    def machine_id(self) -> int:
        """Which machine it is of."""
        return int(self.row["machine_id"])

    @property
    def gpus(self) -> Gpus:
        """What nvidia-smi shows there."""
        cap = f"{self.model.compute_cap // 100}.{self.model.compute_cap // 10 % 10}"
        return Gpus(self.model.shown, self.row["num_gpus"], self.model.memory_mib, cap)


class Market:
    """All offers, and who has which GPUs."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.slots = [
            Slot(dict(row), model, whole, number, trap) for row, model, whole, number, trap in vast_catalogue.rows()
        ]
        self._next_id = vast_catalogue.FIRST_ID + len(self.slots)
        self._held: dict[int, int] = {}
        """How many GPUs of each machine are in somebody's hands."""

    @functools.cached_property
    def _began(self) -> float:
        """When somebody first looked: until then a test may set the clock."""
        return self._now()

    def slot(self, ask_id: int) -> Slot | None:
        """What can be rented under this id now."""
        return next((it for it in self.slots if it.ask_id == ask_id and self.is_free(it)), None)

    def trap(self, name: str, gpu: str = "RTX 4090") -> Slot:
        """The trap of this name among the offers of a GPU."""
        return next(it for it in self.slots if it.trap == name and it.model.name == gpu)

    def hold(self, slot: Slot) -> None:
        """Have the GPUs in somebody's hands: the machine's other offers have other ids from then on."""
        self._held[slot.machine_id] = self._held.get(slot.machine_id, 0) + slot.row["num_gpus"]
        self._relist(slot.machine_id)

    def release(self, slot: Slot) -> None:
        """Have the GPUs free again, under new ids."""
        self._held[slot.machine_id] -= slot.row["num_gpus"]
        self._relist(slot.machine_id)

    def ends_at(self, slot: Slot) -> float:
        """Until when the host lets it."""
        return self._began + float(slot.row["duration"])

    def row(self, slot: Slot) -> Json:
        """An offer as it stands now, without a disk."""
        left_s = self.ends_at(slot) - self._now()
        ids = {"id": slot.ask_id, "ask_contract_id": slot.ask_id, "bundle_id": slot.machine_id * 10}
        times = {"start_date": self._began - 90 * _DAY_S, "end_date": self.ends_at(slot), "duration": left_s}
        return slot.row | ids | times

    def search(self, query: Json, ignored: frozenset[str] = frozenset()) -> list[Json]:
        """The offers that a query asks for, at most 64; filters named in `ignored` are not honoured."""
        kind = query.get("type", "on-demand")
        if kind not in _TYPES:
            raise Refused("invalid_query", f"type: {kind}")
        disk_gb = vast_search.number(query.get("allocated_storage", _DEFAULT_DISK_GB), "allocated_storage")
        limit = int(vast_search.number(query.get("limit") or LIMIT, "limit"))
        defaults = {"verified": {"eq": True}, "rentable": {"eq": True}, "rented": {"eq": False}}
        filters = {name: it for name, it in (defaults | query).items() if name not in (*_NOT_FILTERS, *ignored)}
        found = []
        for slot in self.slots:
            if self.is_free(slot) and self.ends_at(slot) > self._now():
                row = _offered(self.row(slot), disk_gb, is_bid=kind == "bid")
                if _fits(row, filters):
                    found.append(row)
        return vast_search.ordered(found, query.get("order", [["score", "desc"]]))[: max(0, min(limit, LIMIT))]

    def is_free(self, slot: Slot) -> bool:
        """Whether its GPUs are in nobody's hands."""
        return bool(slot.row["num_gpus"] <= slot.whole - self._held.get(slot.machine_id, 0))

    def _relist(self, machine_id: int) -> None:
        for slot in self.slots:
            if slot.machine_id == machine_id:
                slot.ask_id, self._next_id = self._next_id, self._next_id + 1


def numeric(query: Json) -> frozenset[str]:
    """The filters of a query that compare a number."""
    known = vast_catalogue.rows()[0][0]
    return frozenset(
        name
        for name in query
        if (isinstance(known.get(name), (int, float)) and not isinstance(known[name], bool)) or name == "dph_total"
    )


def _offered(row: Json, disk_gb: float, *, is_bid: bool) -> Json:
    """An offer with its price, on demand or as the least bid that is taken."""
    per_hour = row["min_bid"] if is_bid else row["dph_base"]
    return vast_search.priced(row, disk_gb, per_hour) | {"is_bid": is_bid}


def _fits(row: Json, filters: Json) -> bool:
    """Whether an offer has what the filters ask for; a filter nobody knows is passed over, `id` matches nothing."""
    looked_at = dict(row)
    for name, find in _STORED.items():
        looked_at[name] = find(row) if find else None
    known = {name: it for name, it in filters.items() if name in looked_at and _STORED.get(name, True)}
    return "id" not in filters and vast_search.matches(looked_at, known)

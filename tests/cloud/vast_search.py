"""How the stand-in for Vast looks through rows: the eight operators, order, and what a disk adds to a price."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

from tests.cloud.answers import Json
from tests.cloud.vast_answers import Refused

HOURS_PER_MONTH = 720.0
"""Of the storage's price: `storage_total_cost = storage_cost * GB / 720` fits the published examples."""
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "neq": operator.ne,
    "gt": operator.gt,
    "lt": operator.lt,
    "gte": operator.ge,
    "lte": operator.le,
    "in": lambda value, wanted: value in wanted,
    "notin": lambda value, wanted: value not in wanted,
}


def matches(row: Json, filters: Json) -> bool:
    """Whether a row has what every filter asks for; Refused when a filter cannot be read.

    A row whose value is null matches nothing, not even `neq`: as in SQL.
    """
    return all(_holds(row.get(name), name, wanted) for name, wanted in filters.items())


def _holds(value: Any, name: str, wanted: Any) -> bool:
    if not isinstance(wanted, dict):
        raise Refused("invalid_query", f"{name}: a filter is an object like {{'eq': 1}}")
    if unknown := set(wanted) - set(_OPERATORS):
        raise Refused("invalid_query", f"{name}: unknown operator {min(unknown)}")
    if value is None:
        return False
    try:
        return all(_OPERATORS[word](value, _like(value, other)) for word, other in wanted.items())
    except TypeError:
        raise Refused("invalid_query", f"{name}: cannot be compared with that") from None


def _like(value: Any, other: Any) -> Any:
    """What a value is compared with: numbers may come as texts."""
    if isinstance(other, list):
        return [_like(value, item) for item in other]
    if isinstance(other, str) and isinstance(value, (int, float)):
        with contextlib.suppress(ValueError):
            return {"true": True, "false": False}[other.lower()] if other.lower() in ("true", "false") else float(other)
    return other


def ordered(rows: Iterable[Json], order: Any) -> list[Json]:
    """The rows in an order such as `[["dph_total", "asc"]]`; what is null comes last."""
    found = list(rows)
    if not isinstance(order, list) or not all(isinstance(it, list) and len(it) == 2 for it in order):
        raise Refused("invalid_query", "order: a list of [field, direction]")
    for name, direction in reversed(order):
        has = [row for row in found if row.get(name) is not None and not isinstance(row[name], (dict, list))]
        lacks = [row for row in found if row not in has]
        with contextlib.suppress(TypeError):
            has.sort(key=lambda row: row[name], reverse=direction == "desc")
        found = has + lacks
    return found


def priced(offer: Json, disk_gb: float, per_hour: float) -> Json:
    """What an offer costs with a disk, where its GPUs cost `per_hour`."""
    disk = disk_gb * (offer["storage_cost"] or 0.0) / HOURS_PER_MONTH
    total = per_hour + disk
    running = _prices(per_hour, disk)
    shares = {
        "dlperf_per_dphtotal": (offer["dlperf"] or 0.0) / total,
        "flops_per_dphtotal": (offer["total_flops"] or 0.0) / total,
        "vram_costperhour": per_hour / offer["gpu_total_ram"] if offer["gpu_total_ram"] else None,
        "discounted_dph_total": total,
        "dph_total_adj": total,
        "search": running,
        "instance": _prices(0.0, disk),
    }
    return offer | shares | {"dph_base": per_hour, "storage_total_cost": disk, "dph_total": total}


def _prices(gpu: float, disk: float) -> dict[str, float]:
    names = ("gpuCostPerHour", "diskHour", "totalHour", "discountTotalHour", "discountedTotalPerHour")
    return dict(zip(names, (gpu, disk, gpu + disk, 0, gpu + disk), strict=True))


def current(running: Json, is_charged: bool) -> Json:
    """What is charged of these prices now: all of it, or the disk alone."""
    return running if is_charged else _prices(0.0, running["diskHour"])


def number(value: Any, name: str) -> float:
    """A number of a request, which may come as a text; Refused when it is none."""
    with contextlib.suppress(ValueError, TypeError):
        if not isinstance(value, bool):
            return float(value)
    raise Refused("invalid_args", f"Invalid args: {name} must be a number")

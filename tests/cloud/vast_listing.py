"""How instances are shown and listed at the stand-in for Vast: one, all, and page by page with filters and an order."""

from __future__ import annotations

import base64
import contextlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.cloud import vast_search, vast_shown
from tests.cloud.answers import Answer, Json, as_json
from tests.cloud.core import Request
from tests.cloud.vast_answers import Refused

if TYPE_CHECKING:
    from tests.cloud.vast_cloud import VastCloud

PAGE_MAX = 25
_PAGE_OF_NOTHING = 5
"""What a limit of 0 or less is taken for."""
_COMPUTED = {"dph_total", "num_gpus", "dph_base", "duration", "search", "instance", "ports", "uptime_mins"}
"""Fields that cannot be filtered by."""


def get(cloud: VastCloud, request: Request, number: str) -> Answer:
    """One instance under a plural name; null, or 404 where the knob says so, when there is none."""
    one = cloud.instances.get(str(int(number)))
    if one is None or not one.is_visible(cloud.clock()):
        if cloud.gone_status == 404:
            raise Refused("no_such_instance")
        return as_json(200, {"instances": None})
    return as_json(200, {"instances": vast_shown.shown(one, cloud.clock())})


def everything(cloud: VastCloud, request: Request) -> Answer:
    """All instances, as the older list has them."""
    rows = _rows(cloud)
    return as_json(200, {"instances_found": len(rows), "instances": rows})


def page(cloud: VastCloud, request: Request) -> Answer:
    """One page of instances."""
    asked = {name: values[-1] for name, values in parse_qs(request.query).items()}
    filters = _filters(asked)
    rows = [row for row in _rows(cloud) if vast_search.matches(row, filters)]
    order = _order(asked)
    for column, is_down in reversed(order):
        rows.sort(key=lambda row: _sortable(row.get(column)), reverse=is_down)
    after = _after(asked.get("after_token"), order)
    rest = [row for row in rows if after is None or _place(row, order) > after]
    shown, more = rest[: _limit(asked)], rest[_limit(asked) :]
    columns = _parsed(asked, "select_cols", ["*"])
    cut = [row if "*" in columns else {name: row.get(name) for name in columns} for row in shown]
    found: Json = {
        "success": True,
        "instances_found": len(shown),
        "total_instances": len(rows),
        "label_counts": dict(Counter(row["label"] or "" for row in rows)),
        "next_token": _token(shown[-1], order) if more else None,
        "instances": None if cloud.null_lists and not cut else cut,
    }
    return as_json(200, found)


def _rows(cloud: VastCloud) -> list[Json]:
    now = cloud.clock()
    return [vast_shown.shown(one, now) for one in cloud.living.values() if one.is_visible(now)]


def _parsed(asked: dict[str, str], name: str, usual: Any) -> Any:
    if name not in asked:
        return usual
    with contextlib.suppress(ValueError):
        found = json.loads(asked[name])
        if isinstance(found, type(usual)):
            return found
    raise Refused("invalid_request", f"Error in query parameters: {name}")


def _filters(asked: dict[str, str]) -> Json:
    filters: Json = _parsed(asked, "select_filters", {})
    for name in filters:
        if name in _COMPUTED:
            raise Refused("invalid_request", f"Error in query parameters: {name} is not a valid search key")
    return filters


def _order(asked: dict[str, str]) -> list[tuple[str, bool]]:
    """Columns, and whether each goes down; the id is always the last."""
    found = []
    for one in _parsed(asked, "order_by", []):
        if not isinstance(one, dict) or not isinstance(one.get("col"), str) or one["col"] in _COMPUTED:
            raise Refused("invalid_request", "Error in query parameters: order_by")
        found.append((one["col"], one.get("dir") == "desc"))
    return [it for it in found if it[0] != "id"] + [next((it for it in found if it[0] == "id"), ("id", False))]


def _limit(asked: dict[str, str]) -> int:
    try:
        limit = int(asked.get("limit", PAGE_MAX))
    except ValueError:
        raise Refused("invalid_request", "Error in query parameters: limit") from None
    return min(limit, PAGE_MAX) if limit > 0 else _PAGE_OF_NOTHING


class _Down:
    """A value in an order that goes down."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __lt__(self, other: _Down) -> bool:
        return bool(other.value < self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Down) and bool(self.value == other.value)

    __hash__ = None  # type: ignore[assignment]


def _sortable(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, texts by letters, what is null last."""
    is_number = isinstance(value, (int, float))
    return value is None, float(value) if is_number else 0.0, "" if is_number or value is None else str(value)


def _place(row: Json, order: list[tuple[str, bool]]) -> list[Any]:
    """Where a row stands in an order."""
    keys = [(_sortable(row.get(column)), is_down) for column, is_down in order]
    return [_Down(key) if is_down else key for key, is_down in keys]


def _token(row: Json, order: list[tuple[str, bool]]) -> str:
    values = {column: row.get(column) for column, _ in order}
    return base64.b64encode(json.dumps({"values": values}).encode()).decode()


def _after(token: str | None, order: list[tuple[str, bool]]) -> list[Any] | None:
    if token is None:
        return None
    try:
        return _place(json.loads(base64.b64decode(token, validate=True))["values"], order)
    except (ValueError, KeyError, TypeError):
        raise Refused("invalid_token") from None

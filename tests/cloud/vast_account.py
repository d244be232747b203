"""What an account at the stand-in for Vast can ask for beside instances: itself, offers, and its volumes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from tests.cloud.answers import Answer, Json, as_json
from tests.cloud.core import Request
from tests.cloud.vast_answers import Refused
from tests.cloud.vast_contracts import need_object
from tests.cloud.vast_keys import USER_ID

if TYPE_CHECKING:
    from tests.cloud.vast_cloud import VastCloud


def user(cloud: VastCloud, request: Request) -> Answer:
    """The account; what it may still spend is its credit."""
    keys = cloud.keys.account_publics()
    found = {
        "id": USER_ID,
        "key_id": 8901,
        "email": "someone@example.com",
        "username": "someone",
        "balance": 0,
        "credit": cloud.credit_left(),
        "ssh_key": keys[-1] if keys else "",
        "sid": "stand-in",
        "team": cloud.is_team,
    }
    return as_json(200, found)


def search(cloud: VastCloud, request: Request) -> Answer:
    """The offers that fit, by a body of filters."""
    return _searched(cloud, request, need_object(request))


def search_asks(cloud: VastCloud, request: Request) -> Answer:
    """The same, with the columns that are wanted."""
    order = need_object(request)
    query, columns = order.get("q", {}), order.get("select_cols", ["*"])
    if not isinstance(query, dict):
        raise Refused("invalid_request")
    found = _searched(cloud, request, query)
    if "*" in columns:
        return found
    rows = json.loads(found.body)["offers"]
    return as_json(200, {"offers": [{name: row.get(name) for name in columns} for row in rows]})


def search_by_query(cloud: VastCloud, request: Request) -> Answer:
    """The same, as it was asked years ago."""
    try:
        query = json.loads(parse_qs(request.query).get("q", ["{}"])[-1])
    except ValueError:
        raise Refused("invalid_request") from None
    return _searched(cloud, request, query)


def _searched(cloud: VastCloud, request: Request, query: Json) -> Answer:
    ignored = cloud.ignored_filters(request, query)
    return as_json(200, {"offers": cloud.market.search(query, ignored)})


def volumes(cloud: VastCloud, request: Request) -> Answer:
    """What keeps costing money beside instances."""
    return as_json(200, {"volumes": list(cloud.volumes.values())})


def remove_volume(cloud: VastCloud, request: Request) -> Answer:
    """Have a volume no more."""
    if cloud.volumes.pop(need_object(request).get("id", 0), None) is None:
        raise Refused("no_such_volume")
    return as_json(200, {"success": True})

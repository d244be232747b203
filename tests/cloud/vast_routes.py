"""Every call that the stand-in for Vast understands: its method, its path, what it is, and who answers it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from tests.cloud import vast_account, vast_contracts, vast_keys, vast_listing, vast_results
from tests.cloud.answers import Answer, Json

if TYPE_CHECKING:
    from tests.cloud.vast_cloud import VastCloud

_NUMBER = r"(\d{1,40})"


class Route(NamedTuple):
    """One call."""

    method: str
    path: str
    word: str
    """What it is, in the words that all clouds share; `manage` is one of several by its body."""
    act: Callable[..., Answer]
    threshold_s: float = 0.0
    """Between two of them, where rates are enforced."""


ROUTES = [
    Route("GET", "/users/current/", "account", vast_account.user),
    Route("POST", "/bundles/", "offers", vast_account.search, 6.0),
    Route("GET", "/bundles/", "offers", vast_account.search_by_query, 6.0),
    Route("PUT", "/search/asks/", "offers", vast_account.search_asks, 6.0),
    Route("PUT", f"/asks/{_NUMBER}/", "launch", vast_contracts.launch, 4.5),
    Route("GET", "/v1/instances/", "list", vast_listing.page, 1.0),
    Route("GET", "/instances/", "list", vast_listing.everything, 1.0),
    Route("GET", f"/instances/{_NUMBER}/", "get", vast_listing.get, 2.0),
    Route("DELETE", f"/instances/{_NUMBER}/", "terminate", vast_contracts.terminate, 3.0),
    Route("DELETE", "/instances/", "terminate", vast_contracts.terminate_all, 3.0),
    Route("PUT", f"/instances/{_NUMBER}/", "manage", vast_contracts.manage, 1.0),
    Route("PUT", "/instances/", "manage", vast_contracts.manage_all, 2.0),
    Route("PUT", f"/instances/reboot/{_NUMBER}/", "reboot", vast_contracts.reboot, 1.0),
    Route("PUT", f"/instances/recycle/{_NUMBER}/", "recycle", vast_contracts.recycle, 1.0),
    Route("PUT", f"/instances/bid_price/{_NUMBER}/", "bid", vast_contracts.bid, 5.5),
    Route("PUT", f"/instances/request_logs/{_NUMBER}/", "logs", vast_results.logs, 1.0),
    Route("PUT", f"/instances/command/{_NUMBER}/", "execute", vast_results.execute, 1.5),
    Route("GET", f"/instances/{_NUMBER}/ssh/", "admit", vast_keys.of_instance, 1.0),
    Route("POST", f"/instances/{_NUMBER}/ssh/", "admit", vast_keys.attach, 1.0),
    Route("DELETE", f"/instances/{_NUMBER}/ssh/{_NUMBER}/", "admit", vast_keys.detach, 2.0),
    Route("GET", "/ssh/", "keys", vast_keys.listed, 1.0),
    Route("POST", "/ssh/", "keys", vast_keys.add, 1.0),
    Route("PUT", f"/ssh/{_NUMBER}/", "keys", vast_keys.update, 1.0),
    Route("DELETE", f"/ssh/{_NUMBER}/", "keys", vast_keys.remove, 1.0),
    Route("PUT", "/commands/rsync/", "copy", vast_results.copy, 3.5),
    Route("PUT", "/commands/copy_direct/", "copy", vast_results.copy_direct, 3.5),
    Route("DELETE", "/commands/copy_direct/", "copy", vast_results.cancel_copy, 3.5),
    Route("GET", "/volumes/", "storage", vast_account.volumes, 1.0),
    Route("DELETE", "/volumes/", "storage", vast_account.remove_volume, 1.0),
]
_SCOPED = {"get", "terminate", "start", "stop"}
"""What an instance's own key may do, to that instance."""
_STATES = {"running": "start", "stopped": "stop"}


def find(method: str, path: str) -> tuple[Route, tuple[str, ...]] | None:
    """The call that a method and a path are, and the numbers in the path; None: there is no such thing."""
    for route in ROUTES:
        if route.method == method and (found := re.fullmatch(route.path, path)):
            return route, found.groups()
    return None


def word_of(method: str, path: str, content: Json) -> str:
    """What a call is."""
    if path.startswith("/results/"):
        return "result"
    found = find(method, path if path.endswith("/") else f"{path}/")
    if found is None:
        return ""
    if found[0].word != "manage":
        return found[0].word
    return (
        "label"
        if "label" in content
        else {"running": "start", "stopped": "stop"}.get(str(content.get("state")), "manage")
    )


def is_allowed(cloud: VastCloud, key: str, word: str, numbers: tuple[str, ...]) -> bool | None:
    """Whether a key may do this; None: it is nobody's key."""
    if key == cloud.key:
        return True
    for one in cloud.living.values():
        if one.api_key == key:
            return word in _SCOPED and numbers[:1] == (one.instance_id,)
    return None

"""Documents of Vast.ai as it is known to send them, for tests to change."""

from __future__ import annotations

import copy
from typing import Any

from orchestrator.providers import vast_search
from orchestrator.providers.base import Need, Offer, Order
from tests.orchestrator.providers.loopback import HTML, Asked, Scripted, Server

ID = "12345678"
MARKER = "gpu-20260101t120000-7f3a9c001122"
SCRIPT = "#!/bin/sh\ntouch /root/.no_auto_tmux\necho a long line of a start script\n"
IMAGE = "vastai/base-image@sha256:" + "ab" * 32
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T"
OFFER = Offer("vast", "7654321", "1x RTX 4090", "RTX 4090", 1, 24.0, 16, 64.2, 50.0, "US-California", 0.3104)
BID = Offer("vast", "7654321", "1x RTX 4090", "RTX 4090", 1, 24.0, 16, 64.2, 50.0, "US", 0.17, True, 0.16)
TAGS = {"gpu-deadline": "1767355200", "gpu-guard": "container", "gpu-name": "x"}
LABEL = f"{MARKER}.1767355200c.x"
ORDER = Order(MARKER, MARKER, SCRIPT, TAGS, None, IMAGE)
INSTANCE_KEY = "d15a0f5b7a11c0ffee99"
TOKEN = "df77e27085bd4b3bd5d9024bdefb9e6d"
CREATED = Scripted(200, {"success": True, "new_contract": int(ID), "instance_api_key": INSTANCE_KEY})

ENTRY: dict[str, Any] = {
    "id": 7654321,
    "ask_contract_id": 7654321,
    "machine_id": 88888,
    "host_id": 55555,
    "gpu_name": "RTX 4090",
    "num_gpus": 1,
    "gpu_ram": 24564,
    "gpu_frac": 0.25,
    "gpu_arch": "nvidia",
    "cuda_max_good": 13.0,
    "cpu_arch": "amd64",
    "cpu_cores": 64,
    "cpu_cores_effective": 16.0,
    "cpu_ram": 257000,
    "disk_space": 512.5,
    "inet_down": 900.5,
    "direct_port_count": 42,
    "geolocation": "California, US",
    "dph_base": 0.30,
    "dph_total": 0.3104,
    "min_bid": 0.15,
    "storage_cost": 0.15,
    "storage_total_cost": 0.0104,
    "reliability": 0.998,
    "reliability2": 0.998,
    "verification": "verified",
    "external": None,
    "rentable": True,
    "rented": False,
    "is_bid": False,
    "duration": 2592000.0,
    "hostname": None,
}
"""An offer that passes every default."""

DISK_USD = 0.15 * 50 / 720
"""Of the entry, an hour, for the usual disk."""


def entry(**changes: Any) -> dict[str, Any]:
    """The offer with some of it changed."""
    return {**copy.deepcopy(ENTRY), **changes}


def found(need: Need, *entries: Any) -> list[Offer]:
    """What of these can be rented as asked."""
    search = vast_search.search(need)
    assert search is not None
    return search.offers(entries)


def market(server: Server, *entries: dict[str, Any]) -> None:
    """Have the server sell these: by price from a floor on, without some ids, 64 at most, whatever else is asked."""

    def answer(asked: Asked) -> Scripted:
        floor = asked.body.get("dph_total", {}).get("gte", 0.0)
        without = asked.body.get("ask_contract_id", {}).get("notin", [])
        fitting = [one for one in entries if one["dph_total"] >= floor and one["id"] not in without]
        fitting.sort(key=lambda one: one["dph_total"])
        return Scripted(200, {"offers": fitting[:64]})

    server.usual = answer


INSTANCE: dict[str, Any] = {
    "id": int(ID),
    "machine_id": 88888,
    "label": LABEL,
    "actual_status": "running",
    "intended_status": "running",
    "cur_state": "running",
    "next_state": "running",
    "status_msg": "success, running vastai/base-image_stock/ssh\n",
    "ssh_host": "ssh6.vast.ai",
    "ssh_idx": "6",
    "ssh_port": 15678,
    "public_ipaddr": "203.0.113.42 \n",
    "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "40022"}, {"HostIp": "::", "HostPort": "40022"}]},
    "image_uuid": "vastai/base-image@sha256:ab",
    "image_runtype": "ssh_direc ssh_proxy",
    "extra_env": [["HF_TOKEN", "hf_secret_secret_secret"]],
    "onstart": SCRIPT,
    "jupyter_token": TOKEN,
    "gpu_name": "RTX 4090",
    "num_gpus": 1,
    "is_bid": False,
    "dph_total": 0.3083,
    "storage_total_cost": 0.0083,
    "search": {"gpuCostPerHour": 0.30, "diskHour": 0.0083, "totalHour": 0.3104},
    "geolocation": "California, US",
}


def complaint(code: str, message: str = "It is so.", **more: Any) -> dict[str, Any]:
    """What it says when something is wrong, in its usual form."""
    return {"success": False, "error": code, "msg": message, **more}


NO_ASK = "error 404/3603: no_such_ask Instance type by id 7654321 is not available."
BAD_KEY: dict[str, Scripted] = {
    "404": Scripted(404, complaint("auth_error", "Invalid user key")),
    "404 words alone": Scripted(404, {"msg": "Invalid user key"}),
    "404 session": Scripted(404, {"success": False, "msg": "Session expired. Please log in again."}),
    "404 general code": Scripted(404, complaint("invalid_request", "auth_error: no such user")),
    "401": Scripted(401, complaint("auth_error", "Invalid user key")),
    "401 detail": Scripted(401, {"detail": "Authentication credentials were not provided."}),
    "401 HTML": Scripted(401, HTML),
    "401 empty": Scripted(401, b""),
    "403": Scripted(403, {"msg": "Please log in or sign up"}),
    "403 scope": Scripted(403, complaint("not_authorized", "No permission.")),
    "403 a new code": Scripted(403, complaint("forbidden")),
    "400": Scripted(400, complaint("auth_error")),
    "200": Scripted(200, complaint("auth_error", "Invalid user key")),
}
LIMITED: dict[str, Scripted] = {
    "text": Scripted(429, b"API requests too frequent"),
    "text with threshold": Scripted(429, b"API requests too frequent: endpoint threshold=4.5"),
    "detail": Scripted(429, {"detail": "API requests too frequent endpoint threshold=4.5"}),
    "code": Scripted(429, complaint("rate_limit_exceeded", "API requests too frequent endpoint threshold=3.0")),
    "retry after": Scripted(429, b"slow down", {"Retry-After": "3"}),
    "html": Scripted(429, HTML),
    "empty": Scripted(429, b""),
    "200": Scripted(200, complaint("rate_limit_exceeded", "API requests too frequent")),
    "400 in words": Scripted(400, {"msg": "API requests too frequent endpoint threshold=2.0"}),
}
REFUSED: dict[str, Scripted] = {
    "400": Scripted(400, complaint("invalid_args", "error 400/3467: Invalid args: it is odd")),
    "403 args": Scripted(403, complaint("invalid_args", "error 403/3586: Offer 7 is not your own.")),
    "404 args": Scripted(404, complaint("invalid_id", "Invalid instance id.")),
    "483": Scripted(483, complaint("invalid_request", "Invalid json body")),
    "funds": Scripted(400, complaint("insufficient_credit", "Your account lacks credit.")),
    "billing": Scripted(403, complaint("missing_billing", "Add a card.")),
    "cap": Scripted(402, complaint("spend_rate_limit", "New accounts spend less.")),
    "a new code": Scripted(400, complaint("something_new")),
    "msg alone": Scripted(400, {"msg": "It is so."}),
    "message alone": Scripted(400, {"message": "It is so."}),
    "detail alone": Scripted(405, {"detail": "It is so."}),
    "no reason": Scripted(400, {"success": False}),
    "200": Scripted(200, complaint("invalid_args")),
    "200 error alone": Scripted(200, {"error": "invalid_args", "msg": "It is so."}),
    "no key": Scripted(400, complaint("no_ssh_key_for_vm")),
}
UNCLEAR: dict[str, Scripted] = {
    "500": Scripted(500, complaint("server_error")),
    "500 refusal": Scripted(500, complaint("no_such_ask")),
    "502": Scripted(502, HTML),
    "503": Scripted(503, b""),
    "504": Scripted(504, b"upstream timed out"),
    "408": Scripted(408, complaint("invalid_args")),
    "400 inner": Scripted(400, complaint("server_error")),
    "403 of a gate": Scripted(403, b"error code: 1010"),
    "404 html": Scripted(404, HTML),
    "404 empty": Scripted(404, b""),
    "404 nothing": Scripted(404, {}),
    "404 another cloud's": Scripted(404, {"error": {"code": "global/object-does-not-exist", "message": "No."}}),
    "a list": Scripted(200, []),
    "null": Scripted(200, b"null"),
    "nothing": Scripted(200, {}),
    "empty": Scripted(200, b""),
    "no content": Scripted(204, b""),
    "html": Scripted(200, HTML),
    "not a number": Scripted(200, b'{"success": NaN}'),
    "closed": Scripted(fault="close"),
    "reset": Scripted(fault="reset"),
    "half": Scripted(200, {"success": True, "id": 1, "instances": None, "offers": []}, fault="half"),
}
MOVED: dict[str, Scripted] = {
    str(status): Scripted(status, b"", {"Location": "https://elsewhere.invalid/"}) for status in (301, 302, 307, 308)
}

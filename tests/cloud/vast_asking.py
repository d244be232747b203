"""Requests to the core of the stand-in for Vast, as the tests of it make them."""

from __future__ import annotations

import json
from typing import Any

from tests.cloud.answers import Answer, Unanswered
from tests.cloud.vast_cloud import VastCloud

ORDER = {
    "client_id": "me",
    "image": "pytorch/pytorch:2.4.0-cuda12.4-cudnn9-runtime",
    "env": {"HF_HOME": "/workspace/hf", "-p 8000:8000": "1"},
    "disk": 40,
    "label": "gpu-a",
    "onstart": "touch /root/.no_auto_tmux",
    "runtype": "ssh_direc ssh_proxy",
    "cancel_unavail": True,
}
QUERY = {"gpu_name": {"eq": "RTX 4090"}, "num_gpus": {"eq": 1}, "order": [["dph_total", "asc"]], "limit": 64}
SAFE = {
    "reliability": {"gte": 0.98},
    "direct_port_count": {"gte": 1},
    "cuda_max_good": {"gte": 12.4},
    "inet_down": {"gte": 200},
    "disk_space": {"gte": 40},
    "duration": {"gte": 6 * 3600},
    "cpu_arch": {"eq": "amd64"},
}
"""What leaves every trap out but the dear disk."""

STOPPED, RUNNING = {"state": "stopped"}, {"state": "running"}
HALTED = {"cur_state": "stopped", "intended_status": "stopped", "next_state": "stopped"}


def raw(core: VastCloud, call: str, content: Any = None, key: str | None = None) -> Answer:
    """The answer to `PUT /asks/1/` and the like, as it is."""
    method, _, path = call.partition(" ")
    body = b"" if content is None else json.dumps(content).encode()
    prefix = "/api" if path.startswith("/v1/") else "/api/v0"
    return core.handle(method, f"{prefix}{path}", {"authorization": f"Bearer {key or core.key}"}, body)


def ask(core: VastCloud, call: str, content: Any = None, key: str | None = None) -> tuple[int, Any]:
    """The status, and what the answer says."""
    answer = raw(core, call, content, key)
    return answer.status, json.loads(answer.body)


def said(core: VastCloud, call: str, content: Any = None) -> Any:
    """What the answer says; fails the test when it is a refusal."""
    status, found = ask(core, call, content)
    assert status == 200, found
    return found


def seen(core: VastCloud, call: str, content: Any) -> int | type[Unanswered]:
    """The status of a request, or how it went unanswered."""
    try:
        return raw(core, call, content).status
    except Unanswered as reason:
        return type(reason)


def offers(core: VastCloud, **query: Any) -> list[dict[str, Any]]:
    """What a search finds."""
    return list(said(core, "POST /bundles/", QUERY | query)["offers"])


def best(core: VastCloud, **query: Any) -> int:
    """The id of the cheapest offer that is no trap."""
    return int(offers(core, **SAFE, **query)[0]["id"])


def launch(core: VastCloud, ask_id: int | None = None, **more: Any) -> str:
    """The id of an instance that is made now."""
    return str(said(core, f"PUT /asks/{ask_id or best(core)}/", ORDER | more)["new_contract"])


def shown(core: VastCloud, instance_id: str) -> dict[str, Any]:
    """An instance as the API has it; empty when there is none."""
    return dict(said(core, f"GET /instances/{instance_id}/?owner=me")["instances"] or {})


def status_of(core: VastCloud, instance_id: str) -> str:
    """The word for what an instance is: `null`, or `gone` where there is none."""
    found = shown(core, instance_id)
    return str(found["actual_status"] or "null") if found else "gone"


def end(core: VastCloud, instance_id: str) -> int:
    """Ask for the end of an instance; the status."""
    return raw(core, f"DELETE /instances/{instance_id}/", {}).status


def states(core: VastCloud, instance_id: str) -> dict[str, str]:
    """The three words beside `actual_status`."""
    return {word: shown(core, instance_id)[word] for word in HALTED}


def bid_for(core: VastCloud, factor: float = 1.2) -> str:
    """The id of an interruptible that is made now, for so many times the least bid."""
    offer = offers(core, **SAFE, type="bid")[0]
    return launch(core, offer["id"], price=round(offer["min_bid"] * factor, 4))

"""Requests to the core of the stand-in, as the tests of it make them."""

from __future__ import annotations

import json
from typing import Any

from tests.cloud import LambdaCloud
from tests.cloud.answers import Answer, Unanswered

PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T someone"
ORDER = {"region_name": "us-west-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["mine"], "name": "gpu-a"}
LAUNCH, TERMINATE = "/instance-operations/launch", "/instance-operations/terminate"


def raw(core: LambdaCloud, method: str, path: str, content: Any = None, key: str | None = None) -> Answer:
    """The answer as it is."""
    body = b"" if content is None else json.dumps(content).encode()
    return core.handle(method, f"/api/v1{path}", {"authorization": f"Bearer {key or core.key}"}, body)


def ask(core: LambdaCloud, method: str, path: str, content: Any = None) -> tuple[int, Any]:
    """The status, and the data or the error's code."""
    answer = raw(core, method, path, content)
    found = json.loads(answer.body)
    return answer.status, found["data"] if "data" in found else found["error"]["code"]


def seen(core: LambdaCloud, path: str, content: Any) -> int | type[Unanswered]:
    """The status of a POST, or how it went unanswered."""
    try:
        return raw(core, "POST", path, content).status
    except Unanswered as reason:
        return type(reason)


def launch(core: LambdaCloud, **more: Any) -> str:
    """The id of an instance that is launched now."""
    status, data = ask(core, "POST", LAUNCH, ORDER | more)
    assert status == 200, data
    return str(data["instance_ids"][0])


def status_of(core: LambdaCloud, instance_id: str) -> str:
    """The word for what an instance is, or the HTTP status where there is none."""
    code, data = ask(core, "GET", f"/instances/{instance_id}")
    return str(data["status"]) if code == 200 else str(code)


def end(core: LambdaCloud, *ids: str) -> tuple[int, Any]:
    """Ask for the end of instances."""
    return ask(core, "POST", TERMINATE, {"instance_ids": list(ids)})

"""How answers look when the provider has changed: fields nobody knows, null fields, fields that are missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.cloud.answers import Answer, Json
from tests.cloud.faults import Fault

_NEEDED = ("id", "status", "ssh_key_names", "file_system_names", "region", "instance_type")
_OPTIONAL = ("name", "ip", "private_ip", "hostname", "jupyter_token", "jupyter_url")
_OPTIONAL_LISTS = ("tags", "file_system_mounts", "firewall_rulesets")


def veiled(answer: Answer, faults: list[Fault]) -> Answer:
    """The answer as these faults make it look; one that is not the provider's JSON stays as it is."""
    changes = [_CHANGES[fault.what] for fault in faults if fault.what in _CHANGES]
    if not changes or not answer.body.startswith(b'{"data"'):
        return answer
    content = json.loads(answer.body)
    for change in changes:
        content = everywhere(content, change)
    return answer._replace(body=json.dumps(content).encode())


def everywhere(value: Any, change: Callable[[Json], Json]) -> Any:
    """A value with each object in it changed, the innermost first."""
    if isinstance(value, list):
        return [everywhere(item, change) for item in value]
    if isinstance(value, dict):
        return change({key: everywhere(item, change) for key, item in value.items()})
    return value


def _is_instance(found: Json) -> bool:
    return "instance_type" in found and "status" in found


def _with_more(found: Json) -> Json:
    """More fields for whatever has an identity: a mapping of names to things would gain a thing."""
    return found | {"surprise": {"level": [1, None]}, "z": True} if "id" in found or "name" in found else found


def _with_nulls(found: Json) -> Json:
    nulls = dict.fromkeys((*_OPTIONAL, *_OPTIONAL_LISTS))
    return nulls | found if _is_instance(found) else found


def _bare(found: Json) -> Json:
    return {key: found[key] for key in _NEEDED} if _is_instance(found) else found


def _none_terminated(found: Json) -> Json:
    return found | {"terminated_instances": []} if "terminated_instances" in found else found


_CHANGES: dict[str, Callable[[Json], Json]] = {
    "unknown-fields": _with_more,
    "null-fields": _with_nulls,
    "bare-instances": _bare,
    "nothing-terminated": _none_terminated,
}

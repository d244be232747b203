"""Reads what Lambda Cloud answers: complaints, offers, instances, keys; whatever is odd in them is no crash."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.plain import plain
from orchestrator.providers.base import Endpoint, Instance, Offer, State, marker_of
from orchestrator.providers.client import Complaint

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
"""Of an instance or a key: opaque, but nothing that could change where a path leads."""
ABSENT = ("global/object-does-not-exist", "global/not-found")
UNKNOWN = "global/unknown"
_UNCLEAR = ("global/internal-error", UNKNOWN)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_GPU = re.compile(r"(.+?) *\(([0-9]{1,4}(?:\.[0-9]{1,3})?) ?GB(?: +([^()]+))?\)")
"""Such as `A100 (40 GB SXM4)`, `Tesla V100 (16 GB)`."""
_GRACE = re.compile(r"\bG[HB][0-9]{3}\b")
"""Grace Hopper and Grace Blackwell have ARM processors."""
_ARM = ("arm64", "aarch64")
_COUNT = re.compile(r"([0-9]{1,3})x ")
_NUMBER_MAX = 10**8
_BYTES_MAX = 1e21
_STATES: dict[str, State] = {
    "booting": "booting",
    "active": "ready",
    "unhealthy": "unhealthy",
    "terminating": "stopping",
    "terminated": "gone",
}
"""`preempted` is not here: nothing says that it is billed no longer, so it counts as costing until it is absent."""


def complaint(status: int, document: Any) -> Complaint | None:
    """What the answer says is wrong: an `error` with a code, or no `data` in an answer that says all is well."""
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict) and isinstance(error.get("code"), str):
        code = error["code"]
        words = [text for text in (error.get("message"), error.get("suggestion")) if isinstance(text, str) and text]
        unclear = status < 400 or code in _UNCLEAR or code.startswith("provider/")
        return Complaint(code, " ".join(words) or "it gave no reason", unclear)
    if status < 300 and not (isinstance(document, dict) and "data" in document):
        return Complaint("", "an answer without data", unclear=True)
    return None


def offers(data: Any) -> list[Offer]:
    """Every type in every region that has it free; a type that is nowhere free is one offer, not available."""
    if not isinstance(data, dict):
        return []
    return [offer for name, entry in data.items() for offer in _offers(name, entry)]


def _offers(name: str, entry: Any) -> Iterator[Offer]:
    kind = _object(_object(entry).get("instance_type"))
    price, count = _price_usd(kind.get("price_cents_per_hour")), _count(kind)
    if not _WORD.fullmatch(name) or not price or count is None:
        return
    specs = _object(kind.get("specs"))
    gpu, vram_gb = _gpu(kind, count)
    regions: list[str | None] = [*_regions(_object(entry).get("regions_with_capacity_available"))]
    for region in regions or [None]:
        yield Offer(
            provider="lambda",
            offer_id=f"{name}@{region}" if region else name,
            type_name=name,
            gpu=gpu,
            count=count,
            vram_gb=vram_gb,
            vcpus=_whole(specs.get("vcpus")),
            ram_gb=_whole(specs.get("memory_gib")),  # GiB: 7 % more than it says, as on the dashboard
            disk_gb=_whole(specs.get("storage_gib")),
            region=region,
            price_usd_per_hour=price,
            available=region is not None,
            architecture=_architecture(kind),
        )


def _regions(value: Any) -> list[str]:
    names = [_object(entry).get("name") for entry in _list(value)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and _WORD.fullmatch(name)))


def _price_usd(cents: Any) -> float | None:
    whole = _whole(cents)
    return whole / 100 if whole is not None else None


def _whole(value: Any) -> int | None:
    """The value when it is a number of things, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _NUMBER_MAX:
        return None
    return int(value) if value == int(value) else None


def _count(kind: dict[str, Any]) -> int | None:
    """How many GPUs, 0 for a machine without; None when nothing says so."""
    count = _whole(_object(kind.get("specs")).get("gpus"))
    told = _COUNT.match(_text(kind.get("description")))
    return int(told[1]) if count is None and told and _text(kind.get("gpu_description")) != "N/A" else count


def _gpu(kind: dict[str, Any], count: int) -> tuple[str | None, float | None]:
    """The name of the GPU and its memory in GB; a description in no known form is all name."""
    text = _text(kind.get("gpu_description")) or _COUNT.sub("", _text(kind.get("description")))
    if count == 0 or text == "N/A":
        return None, None
    if found := _GPU.fullmatch(text):
        return " ".join(filter(None, (found[1], found[3]))), float(found[2])
    return text or "unknown", None


def _architecture(kind: dict[str, Any]) -> str:
    told, described = _text(kind.get("architecture")), _text(kind.get("gpu_description"))
    return "aarch64" if told in _ARM or (not told and _GRACE.search(described)) else "x86_64"


def instance(entry: Any, user: str, port: int) -> Instance | None:
    """One instance; None when it has no id that can be used. Its Jupyter token and address are left behind here."""
    found = _object(entry)
    instance_id, kind = found.get("id"), _object(found.get("instance_type"))
    if not isinstance(instance_id, str) or not ID.fullmatch(instance_id):
        return None
    tags = {
        tag["key"]: tag["value"]
        for tag in _list(found.get("tags"))
        if isinstance(tag, dict) and isinstance(tag.get("key"), str) and isinstance(tag.get("value"), str)
    }
    host, raw = _address(found.get("ip")), _text(found.get("status"))
    name = found.get("name")
    return Instance(
        instance_id=instance_id,
        marker=marker_of(name if isinstance(name, str) else None, tags),
        state=_state(raw, host),
        raw_state=raw,
        user=user,
        endpoints=(Endpoint(host, port),) if host else (),
        type_name=_text(kind.get("name")),
        region=_text(_object(found.get("region")).get("name")) or None,
        price_usd_per_hour=_price_usd(kind.get("price_cents_per_hour")),
        key_names=tuple(name for name in _list(found.get("ssh_key_names")) if isinstance(name, str)),
        tags=tags,
    )


def _state(raw: str, host: str | None) -> State:
    """Ours for a state of Lambda's; an active machine without an address yet is still booting."""
    state = _STATES.get(raw, "unknown")
    return "booting" if state == "ready" and host is None else state


def _address(value: Any) -> str | None:
    """The address when it is one: it ends up on a command line of ssh."""
    try:
        return str(ipaddress.ip_address(value)) if isinstance(value, str) and "%" not in value else None
    except ValueError:
        return None


def launched(data: Any) -> str | None:
    """The id of the one instance that was made; None when the answer does not name exactly one."""
    ids = _list(_object(data).get("instance_ids"))
    return ids[0] if len(ids) == 1 and isinstance(ids[0], str) and ID.fullmatch(ids[0]) else None


def account_keys(data: Any) -> list[dict[str, str]]:
    """The public keys of the account that have an id and a name, each with its text (empty when there is none)."""
    return [
        {"id": entry["id"], "name": entry["name"], "public_key": str(entry.get("public_key") or "")}
        for entry in _list(data)
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("id"), str)
        and ID.fullmatch(entry["id"])
    ]


def name_of_key(data: Any) -> str | None:
    """The name of a key that was just taken in, None when the answer has none."""
    name = _object(data).get("name")
    return name if isinstance(name, str) and name else None


def file_system(entry: Any, usd_per_gb_month: float) -> str:
    """A file system in words, with what it costs as far as its size is known."""
    found = _object(entry)
    name, region = _text(found.get("name")) or "without a name", _text(_object(found.get("region")).get("name"))
    size = found.get("bytes_used")
    cost = f"its size is not known, ${usd_per_gb_month:.2f} a GB and month"
    if isinstance(size, (int, float)) and not isinstance(size, bool) and 0 <= size < _BYTES_MAX:
        cost = f"{size / 1e9:.1f} GB, about ${size / 1e9 * usd_per_gb_month:.2f} a month"
    return f"file system {name} ({region or 'region unknown'}): {cost}, until it is deleted"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    """A short text on one line, empty when it is none."""
    return " ".join(plain(value).split())[:100] if isinstance(value, str) else ""

"""Reads what Vast.ai answers: complaints, instances, host keys, volumes; whatever is odd in them is no crash."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from orchestrator.onstart import HOST_KEY_PREFIX
from orchestrator.plain import plain
from orchestrator.providers import vast_label
from orchestrator.providers.base import Endpoint, Instance, State, marker_of
from orchestrator.providers.client import Complaint

ID = re.compile(r"[1-9][0-9]{0,17}")
"""Of an offer or an instance."""
KEY_REFUSED = ("auth_error", "not_authorized")
ABSENT = ("no_such_instance", "not_found")
GONE_OFFER = "no_such_ask"
BAD_PRICE = "invalid_price"
NO_FUNDS = ("missing_billing", "insufficient_credit", "spend_rate_limit")
QUOTA = "search_quota_exceeded"
QUEUED = "required resources are currently unavailable"
"""How it answers a start when the GPUs are in other hands; it would be started whenever they are free."""
_LIMITED = ("rate_limit_exceeded", QUOTA)
_TOO_OFTEN = "api requests too frequent"
_AUTH_WORDS = ("auth_error", "invalid user key", "session expired", "please log in", "authentication credentials")
_TOLD_IN_WORDS = (GONE_OFFER, "no_such_instance", BAD_PRICE, *NO_FUNDS)
"""Codes that may stand in the message behind a general one such as `invalid_args`."""
_CODE = re.compile(r"[a-z][a-z0-9_]{2,60}")
_HOST_KEY = re.compile(
    rf"{re.escape(HOST_KEY_PREFIX)}(ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI[A-Za-z0-9+/]{{43}})(?: [!-~]*)?", re.ASCII
)
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.){1,8}vast\.ai", re.ASCII)
_LOOPBACK_NAME = "localhost"
_NUMBER_MAX = 1e15
_MESSAGE_MAX = 300
_TEXT_MAX = 100
_BOOTING = ("", "created", "loading", "scheduling", "rebooting", "recycling")
_STOPPED = ("stopped", "exited")
_FATAL = (
    *("error", "failed", "failure", "exception", "traceback", "oci runtime", "permission denied"),
    *("pull access denied", "manifest unknown", "unauthorized: authentication", "no such image"),
)
"""What is in a status message when a container will not come up (as Vast.ai's own client judges it)."""
_NO_MANIFEST = re.compile(r"manifest for \S+ not found")
_IMAGE_TROUBLE = re.compile(r"pull|manifest|not found|unauthorized|denied|repository does not exist|no such image")
"""Whether the image is to blame; progress, too, speaks of pulling, so this is asked only of what is fatal."""


def complaint(status: int, document: Any) -> Complaint | None:
    """What the answer says is wrong, in whichever of its forms; None when nothing in it is a complaint."""
    if not isinstance(document, dict):
        return Complaint("", "an answer in no known form", unclear=True) if status < 300 else None
    words = [document[name] for name in ("error", "msg", "message", "detail") if isinstance(document.get(name), str)]
    is_denied = document.get("success") is False
    is_told = "error" in document and isinstance(document["error"], str) and document.get("success") is not True
    if status < 300 and not is_denied and not is_told:
        return None
    if not words and not is_denied:
        return None
    said = " ".join(words).lower()
    code = _code(document.get("error"), said)
    is_limited = code in _LIMITED or _TOO_OFTEN in said
    message = " ".join(words[1:] if len(words) > 1 and words[0] == code else words) or "it gave no reason"
    return Complaint(code, message, unclear=code == "server_error", limited=is_limited)


def _code(error: Any, said: str) -> str:
    """The provider's word for what is wrong: the plainest one, wherever it stands; empty when there is none."""
    if any(word in said for word in _AUTH_WORDS):
        return "auth_error"
    if isinstance(error, str) and error in (*_LIMITED, *NO_FUNDS):
        return error
    told = next((code for code in _TOLD_IN_WORDS if code in said), None)
    return told or (error if isinstance(error, str) and _CODE.fullmatch(error) else "")


def contract(document: Any) -> str | None:
    """The id of the instance that an answer names as made, also beside an error; None when it names none."""
    return identifier(_object(document), "new_contract")


def instance(entry: Any) -> Instance | None:
    """One instance; None when it has no id that can be used. Its token, environment and start script stay behind."""
    found = _object(entry)
    instance_id = identifier(found, "id")
    if instance_id is None:
        return None
    endpoints = tuple(_endpoints(found))
    state, gpu, count = _state(found, bool(endpoints)), text(found.get("gpu_name")) or None, whole(found, "num_gpus")
    name, tags = vast_label.decode(found.get("label"))
    message = one_line(found.get("status_msg"))
    return Instance(
        instance_id=instance_id,
        marker=marker_of(name, {}),
        state=state,
        raw_state=_raw_state(found),
        user="root",
        endpoints=endpoints,
        type_name=kind(count, gpu),
        region=region(found.get("geolocation")),
        price_usd_per_hour=number(_object(found.get("search")), "totalHour") or number(found, "dph_total"),
        tags=tags,
        message=message,
        failure="" if state == "ready" else _failure(found, message),
        gpu=gpu,
        count=count,
        spot=found["is_bid"] if isinstance(found.get("is_bid"), bool) else None,
        machine_id=identifier(found, "machine_id"),
        stopped_usd_per_hour=number(found, "storage_total_cost"),
        charged_usd_per_hour=number(_object(found.get("instance")), "totalHour"),
    )


def _state(found: dict[str, Any], has_endpoint: bool) -> State:
    """Ours for the four states that an instance has: what it is, what it is to be, and those of its contract."""
    actual = text(found.get("actual_status"))
    if text(found.get("cur_state")) == "unloaded":  # its end was accepted; that it is gone is told by its absence
        return "stopping"
    if actual == "offline":
        return "unhealthy"
    if actual in _STOPPED or (_is_halted(found) and actual in (*_BOOTING, "running")):
        return "stopped"
    if actual in _BOOTING:
        return "booting"
    if actual == "running" and text(found.get("intended_status")) == "running":
        return "ready" if has_endpoint else "booting"
    return "unknown"


def _is_halted(found: dict[str, Any]) -> bool:
    """Whether it is to be stopped: outbid, out of credit, at its contract's end, or told so."""
    return text(found.get("intended_status")) == "stopped"


def _raw_state(found: dict[str, Any]) -> str:
    actual = text(found.get("actual_status")) or "null"
    return f"{actual}, to be stopped" if _is_halted(found) and actual not in _STOPPED else actual


def _failure(found: dict[str, Any], message: str) -> str:
    """Why a container never comes up, when its message is one that is known to be fatal; else empty."""
    said = message.lower()
    name = re.split("[:@]", text(found.get("image_uuid")).lower())[0]
    rest = said.replace(name, "") if name else said  # an image may be called anything
    if text(found.get("actual_status")) == "running" or said.startswith("success"):
        return ""
    if not any(word in rest for word in _FATAL) and not _NO_MANIFEST.search(said):
        return ""
    is_image = _IMAGE_TROUBLE.search(rest.replace("permission denied", ""))
    return f"its image cannot be had: {message}" if is_image else message


def _endpoints(found: dict[str, Any]) -> Iterator[Endpoint]:
    """Where SSH may answer: on the host itself, then through the proxy; an address of one never with a port of both."""
    mapped = _object(found.get("ports")).get("22/tcp")
    ports = [_port(_object(entry).get("HostPort")) for entry in mapped] if isinstance(mapped, list) else []
    direct, port = _address(found.get("public_ipaddr")), next((one for one in ports if one), None)
    if direct and port:
        yield Endpoint(direct, port)
    proxy, port = _proxy(found.get("ssh_host")), _port(found.get("ssh_port"))
    if proxy and port:
        jupyter = "jupyter" in text(found.get("image_runtype"))  # there the port told is the notebook's
        if port + jupyter < 65536:
            yield Endpoint(proxy, port + jupyter)


def _address(value: Any) -> str | None:
    """An address when it is one that a host can have: it ends up on a command line of ssh."""
    try:
        found = ipaddress.ip_address(value.strip()) if isinstance(value, str) and "%" not in value else None
    except ValueError:
        return None
    return str(found) if found and not (found.is_unspecified or found.is_multicast) else None


def _proxy(value: Any) -> str | None:
    """A name of Vast.ai's own, or an address."""
    name = value.strip().lower() if isinstance(value, str) else ""
    return name if _HOST.fullmatch(name) or name == _LOOPBACK_NAME else _address(name)


def _port(value: Any) -> int | None:
    """A port, told as a number or as text."""
    digits = str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    return int(digits) if re.fullmatch(r"[1-9][0-9]{0,4}", digits, re.ASCII) and int(digits) < 65536 else None


def gate(document: Any) -> Endpoint | None:
    """Where the disk of a machine can be copied from; None when no such place is told."""
    host, port = _proxy(_object(document).get("src_addr")), _port(_object(document).get("src_port"))
    return Endpoint(host, port) if host and port else None


def host_key(log: bytes) -> str | None:
    """The host key (type and key) that a start script told in a log; None when none is told, or more than one."""
    lines = (line.strip() for line in log.decode("utf-8", "replace").splitlines())
    found = {match[1] for line in lines if (match := _HOST_KEY.fullmatch(line))}
    return found.pop() if len(found) == 1 else None


def volume(entry: Any) -> str:
    """A volume in words, with what it costs as far as that is known."""
    found = _object(entry)
    hourly, size = number(found, "storage_total_cost"), number(found, "disk_space")
    cost = "its price is not known" if hourly is None else f"about ${hourly * 720:.2f} a month"
    gb = "" if size is None else f" ({size:g} GB)"
    return f"volume {identifier(found, 'id') or 'without an id'}{gb}: {cost}, until it is deleted"


def kind(count: int | None, gpu: str | None) -> str:
    """What a kind of machine is called; empty when that is not known."""
    return f"{count}x {gpu}" if count and gpu else ""


def region(value: Any) -> str | None:
    """A place such as `California, US` in one word, the country first: `US-California`; None when it is not told."""
    if not isinstance(value, str):
        return None
    ascii_only = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
    parts = ["-".join(re.findall("[A-Za-z0-9]+", part)) for part in ascii_only.split(",")]
    return "-".join(part for part in reversed(parts) if part)[:_TEXT_MAX] or None


def number(found: dict[str, Any], *names: str) -> float | None:
    """The first of these that is told, when it is a number that makes sense; else None."""
    value = next((found[name] for name in names if found.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _NUMBER_MAX:
        return None
    return float(value)


def whole(found: dict[str, Any], name: str) -> int | None:
    """The same for a number of things."""
    value = number(found, name)
    return int(value) if value is not None and value == int(value) else None


def text(value: Any) -> str:
    """A short text on one line, empty when it is none."""
    return " ".join(plain(value).split())[:_TEXT_MAX] if isinstance(value, str) else ""


def one_line(value: Any) -> str:
    """A message on one line."""
    return " ".join(plain(value).split())[:_MESSAGE_MAX] if isinstance(value, str) else ""


def identifier(found: dict[str, Any], name: str) -> str | None:
    """An id as text: it is told as a number, and sometimes as text. None when it is none."""
    value = found.get(name)
    digits = str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    return digits if ID.fullmatch(digits) else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

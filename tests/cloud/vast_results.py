"""Logs and commands at the stand-in for Vast: they are asked for, and what came of it is fetched elsewhere."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.cloud.answers import Answer, Json, as_json
from tests.cloud.core import Request
from tests.cloud.vast_answers import Refused
from tests.cloud.vast_contracts import need_object

if TYPE_CHECKING:
    from tests.cloud.vast_cloud import VastCloud
    from tests.cloud.vast_instance import VastInstance

COMMANDS = ("ls", "rm", "du")
_COMMAND_MAX = 512
_LATE = 20
_FORM = re.compile(r"/results/([0-9a-f]{64})\.log")
_DENIED = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{text}</Message></Error>'


@dataclass
class Result:
    """What can be fetched."""

    text: str
    refusals: int
    """So many fetches are refused first: it is not there yet."""


def logs(cloud: VastCloud, request: Request, number: str) -> Answer:
    """Have a container's log written to where it can be fetched."""
    one = cloud.instances.get(str(int(number)))
    if one is None or not one.is_visible(cloud.clock()):
        raise Refused("invalid_id")
    order: Json = request.content
    lines = cloud.log_of(one).splitlines()
    if order.get("daemon_logs") == "true":
        lines = [f"kaalia: container C.{one.number} of {one.order.get('image')}"]
    if order.get("filter"):
        lines = [line for line in lines if re.search(str(order["filter"]), line)]
    if order.get("tail"):
        lines = lines[-int(order["tail"]) :]
    url = kept(cloud, "".join(f"{line}\n" for line in lines))
    return as_json(200, {"success": True, "result_url": url, "msg": "Logs are uploaded, wait a few seconds."})


def execute(cloud: VastCloud, request: Request, number: str) -> Answer:
    """Run one of a few commands on a container's disk, stopped or not."""
    command = need_object(request, "invalid_args").get("command")
    one = cloud.known(number)
    words = _words(command)
    if not words or words[0] not in COMMANDS or len(str(command)) > _COMMAND_MAX:
        raise Refused("invalid_args", "Invalid command given.")
    cloud.touch(one)
    text = cloud.machines.execute(one, words) if cloud.machines else ""
    told = "Command is executing, wait a few seconds and then view the result_url"
    found = {"success": True, "writeable_path": "/workspace", "result_url": kept(cloud, text), "msg": told}
    return as_json(200, found)


def _words(command: object) -> list[str]:
    try:
        return shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []


def kept(cloud: VastCloud, text: str) -> str:
    """The address at which a text can be fetched."""
    name = hashlib.sha256(f"{cloud.random.random()}".encode()).hexdigest()
    cloud.results[name] = Result(text, cloud.result_refusals)
    return f"{cloud.url}/results/{name}.log"


def postpone(cloud: VastCloud, answer: Answer, detail: int | None) -> None:
    """Have the result that an answer tells of come later."""
    for name, result in cloud.results.items():
        if name.encode() in answer.body:
            result.refusals += _LATE if detail is None else detail


def fetched(cloud: VastCloud, request: Request) -> Answer:
    """A result as a store of files gives it: it wants no key, and is offended by one."""
    if "authorization" in request.headers:
        return _denied(400, "InvalidArgument", "Only one auth mechanism allowed")
    found = _FORM.fullmatch(request.path)
    result = cloud.results.get(found[1]) if found else None
    if result is None or result.refusals > 0:
        if result is not None:
            result.refusals -= 1
        return _denied(403, "AccessDenied", "Access Denied")
    return Answer(200, {"Content-Type": "binary/octet-stream"}, result.text.encode())


def _denied(status: int, code: str, text: str) -> Answer:
    return Answer(status, {"Content-Type": "application/xml"}, _DENIED.format(code=code, text=text).encode())


def copy(cloud: VastCloud, request: Request) -> Answer:
    """Open a way to copy between a container's disk and the computer that asks."""
    order = need_object(request)
    source, target = _side(cloud, order, "src"), _side(cloud, order, "dst")
    if (source is None) == (target is None):
        raise Refused("invalid_args", "Invalid src_id.")
    one = source or target
    assert one is not None
    side = "src" if source else "dst"
    cloud.touch(one)
    place = cloud.machines.gate() if cloud.machines else one.proxy
    return as_json(200, {"success": True, f"{side}_addr": place.host, f"{side}_port": place.port})


def copy_direct(cloud: VastCloud, request: Request) -> Answer:
    """Copy from one container's disk to another's; the official client asks so for `local`, too."""
    order = need_object(request)
    source, target = _side(cloud, order, "src"), _side(cloud, order, "dst")
    if source is None or target is None:
        return copy(cloud, request)
    cloud.touch(target)
    if cloud.machines:
        cloud.machines.copy(source, str(order["src_path"]), target, str(order["dst_path"]))
    told = "Remote to Remote copy initiated - check instance status bar for progress updates (~30 seconds delayed)."
    return as_json(200, {"success": True, "msg": told})


def cancel_copy(cloud: VastCloud, request: Request) -> Answer:
    """Nothing is under way any more."""
    if _side(cloud, need_object(request), "dst") is None:
        raise Refused("invalid_args", "Invalid dst_id.")
    return as_json(200, {"success": True})


def _side(cloud: VastCloud, order: Json, side: str) -> VastInstance | None:
    """The instance on one side of a copy: `C.123` or 123; None: the computer that asks."""
    if f"{side}_path" not in order and side == "src":
        raise Refused("invalid_args", "Invalid src_path.")
    named = order.get(f"{side}_id")
    if named in (None, "local"):
        return None
    number = str(named).removeprefix("C.")
    if not number.isdecimal():
        raise Refused("invalid_args", f"Invalid {side}_id.")
    one = cloud.instances.get(number)
    if one is None or not one.is_visible(cloud.clock()):
        raise Refused("no_such_user")
    return one

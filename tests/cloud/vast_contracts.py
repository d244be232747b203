"""What can be asked of contracts at the stand-in for Vast: to be made, stopped, started, named, bid for, and ended."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from tests.cloud import vast_ordering
from tests.cloud.answers import Answer, Json, as_json
from tests.cloud.core import Request
from tests.cloud.faults import FOREVER, Fault
from tests.cloud.vast_answers import UNAVAILABLE, Refused, no_such_ask
from tests.cloud.vast_instance import VastInstance
from tests.cloud.vast_market import Slot

if TYPE_CHECKING:
    from tests.cloud.vast_cloud import VastCloud

LABEL_MAX = 1024
_BID_MIN, _BID_MAX = 0.001, 32.0
"""USD an hour, for each GPU the most."""
_STATES = ("running", "stopped")


def launch(cloud: VastCloud, request: Request, ask: str) -> Answer:
    """Take an offer: it is nobody else's from then on."""
    order = need_object(request)
    vast_ordering.check(order)
    slot = cloud.market.slot(int(ask))
    if slot is None or not slot.row["rentable"]:
        raise no_such_ask(int(ask), cloud.gone_offer_status)
    if vast_ordering.disk_gb(order) > slot.row["disk_space"]:
        raise Refused("invalid_args", "error 400/3467: Invalid args: 'disk' exceeds what is available", ask_id=int(ask))
    if cloud.credit_left() <= 0:
        raise Refused("insufficient_credit", ask_id=int(ask))
    if order.get("vm") and not cloud.keys.account:
        raise Refused("no_ssh_key_for_vm", ask_id=int(ask))
    found = {fault.what: fault for fault in cloud.faults.every("launch", request)}
    price = vast_ordering.bid(order)
    if "gpu-taken" in found and order.get("cancel_unavail", price is None):
        raise no_such_ask(int(ask), 410)
    one = make(cloud, order, slot, found)
    if "doubled" in found:
        make(cloud, order, slot, found)
    if "refused-yet-made" in found:
        code = found["refused-yet-made"].detail or "invalid_price"
        raise Refused(code, status=400, ask_id=int(ask), new_contract=one.number)
    if price is not None and price < slot.row["min_bid"]:
        raise Refused("invalid_price", ask_id=int(ask), new_contract=one.number)
    told: Json = {"success": True, "new_contract": one.number}
    return as_json(200, told | ({} if "no-instance-key" in found else {"instance_api_key": one.api_key}))


def make(cloud: VastCloud, order: Json, slot: Slot, faults: dict[str, Fault]) -> VastInstance:
    """A contract that exists from now on."""
    number = cloud.new_number()
    key = hashlib.sha256(f"{cloud.key}/{number}".encode()).hexdigest()
    places = (cloud.machines or cloud.words).places()
    now = cloud.clock()
    offer = cloud.market.row(slot)
    one = VastInstance(str(number), order, slot, offer, cloud.market, cloud.timings, now, key, *places)
    one.faults, one.name = faults, order.get("label")
    one.bid = vast_ordering.bid(order)
    if "wrong-type" in faults:
        one.bid = None if one.bid is not None else offer["dph_base"]
    one.image_error = vast_ordering.image_error(order)
    one.wants = order.get("target_state") != "stopped" and "refused-yet-made" not in faults
    if one.bid is not None and one.bid < offer["min_bid"]:
        one.lost_by = "outbid"
    if "gpu-taken" in faults:
        one.taken_until = now + faults["gpu-taken"].seconds
    one.keys = [cloud.keys.attached(public) for public in cloud.keys.account_publics()]
    cloud.instances[one.instance_id] = one
    cloud.living[one.instance_id] = one
    cloud.settle()
    return one


def terminate(cloud: VastCloud, request: Request, number: str) -> Answer:
    """End a contract, for good."""
    one = cloud.known(number)
    _end(cloud, request, one)
    return as_json(200, {"success": True, "msg": f"destroying instance {one.number}."})


def terminate_all(cloud: VastCloud, request: Request) -> Answer:
    """End several contracts."""
    for one in [cloud.known(number) for number in _numbers(request.content, "instance_ids")]:
        _end(cloud, request, one)
    return as_json(200, {"success": True})


def _end(cloud: VastCloud, request: Request, one: VastInstance) -> None:
    found = {fault.what: fault for fault in cloud.faults.every("terminate", request)}
    cloud.touch(one)
    if "terminate-ignored" in found or one.ending_at is not None:
        return
    one.faults |= found
    one.end(cloud.clock() + (found["terminate-late"].seconds if "terminate-late" in found else 0.0))


def manage(cloud: VastCloud, request: Request, number: str) -> Answer:
    """Start, stop or label."""
    order, one = need_object(request), cloud.known(number)
    if "label" in order:
        return _label(cloud, one, order["label"])
    return as_json(200, {"success": True} | _set_state(cloud, one, order.get("state")))


def manage_all(cloud: VastCloud, request: Request) -> Answer:
    """Start or stop several."""
    order = need_object(request)
    for one in [cloud.known(number) for number in _numbers(order, "ids")]:
        _set_state(cloud, one, order.get("state"))
    return as_json(200, {"success": True})


def _label(cloud: VastCloud, one: VastInstance, label: Any) -> Answer:
    if not isinstance(label, str):
        raise Refused("invalid_args", "label must be a string")
    if len(label) > LABEL_MAX:
        raise Refused("label_too_long")
    cloud.touch(one)
    one.name = label
    return as_json(200, {"success": True, "msg": f"label for {one.number} set to '{label}'"})


def _set_state(cloud: VastCloud, one: VastInstance, state: Any) -> Json:
    if state not in _STATES:
        raise Refused("invalid_args", "state must be running or stopped")
    cloud.touch(one)
    now = cloud.clock()
    if state == "stopped":
        one.wants = False
        if one.boot_from is not None:
            one.lose(now)
        one.lost_by = ""
        return {}
    if one.boot_from is not None:
        return {}
    if cloud.credit_left() <= 0:
        raise Refused("insufficient_credit")
    one.wants, one.lost_by = True, ""
    cloud.settle()
    return {} if one.boot_from is not None else {"msg": UNAVAILABLE}


def reboot(cloud: VastCloud, request: Request, number: str) -> Answer:
    """Stop the container and start it again; its GPUs stay its own."""
    return _again(cloud, number, "rebooting")


def recycle(cloud: VastCloud, request: Request, number: str) -> Answer:
    """Make another container of the image: what was on its disk is gone."""
    return _again(cloud, number, "recycling")


def _again(cloud: VastCloud, number: str, word: str) -> Answer:
    one = cloud.known(number)
    if one.boot_from is None:
        raise Refused("invalid_args", "invalid instance_id")
    cloud.touch(one)
    one.again(cloud.clock(), word)
    return as_json(200, {"success": True})


def bid(cloud: VastCloud, request: Request, number: str) -> Answer:
    """Bid another price."""
    order, one = need_object(request), cloud.known(number)
    price = order.get("price")
    most = _BID_MAX * one.offer["num_gpus"]
    if isinstance(price, bool) or not isinstance(price, (int, float)) or not _BID_MIN <= price <= most:
        raise Refused("invalid_args", f"Please set a bid price >= {_BID_MIN}.")
    if one.bid is None:
        raise Refused("invalid_args", "An on-demand instance has no bid.")
    cloud.touch(one)
    one.rebid(cloud.clock(), float(price))
    return as_json(200, {"success": True})


def need_object(request: Request, error: str = "invalid_request") -> Json:
    """The JSON object that a request brings; refused when it is none."""
    if not request.content and request.body.strip() != b"{}":
        raise Refused(error, "Invalid json body")
    return request.content


def _numbers(order: Json, name: str) -> list[str]:
    found = order.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(it, int) for it in found):
        raise Refused("invalid_args", f"{name}: a list of instance ids")
    return [str(it) for it in found]


def outbid(one: VastInstance, now: float, price: float | None, seconds: float | None) -> None:
    """Somebody bids `price` (a little more) for what an instance has, for so long (for ever)."""
    price = (one.bid or 0.0) * 1.1 + 0.001 if price is None else price
    one.outbid(now, price, FOREVER if seconds is None else seconds)

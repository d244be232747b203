"""The stand-in for Vast does what each fault says, and nothing else goes wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cloud import Clock, Fault
from tests.cloud.answers import Closed, CutShort, Hangs, NotSent
from tests.cloud.vast_asking import (
    ORDER,
    RUNNING,
    STOPPED,
    ask,
    best,
    end,
    launch,
    offers,
    raw,
    said,
    seen,
    shown,
    status_of,
)
from tests.cloud.vast_cloud import VastCloud
from tests.cloud.vast_instance import VastInstance

LOST = {
    "lost-502": 502,
    "lost-closed": Closed,
    "lost-hang": Hangs,
    "lost-half": CutShort,
    "lost-empty": 200,
    "null-data": 200,
}
FAILED = {
    "failed": 502,
    "error": 500,
    "closed": Closed,
    "hang": Hangs,
    "not-sent": NotSent,
    "empty": 200,
    "proxy-page": 200,
    "redirect": 301,
    "success-false": 200,
    "msg-only": 400,
    "plain-text": 500,
    "rate-limited-json": 429,
    "rate-limited-text": 429,
    "rate-limited-detail": 429,
    "bad-key": 404,
    "inactive": 403,
    "no-capacity": 404,
    "quota": 400,
    "no-credit": 400,
}


def made(vast: VastCloud, clock: Clock, *faults: Fault, **order: Any) -> VastInstance:
    """An instance with faults, up for a second."""
    for fault in faults:
        vast.faults.add(fault)
    name = launch(vast, **order)
    clock.advance(2)
    said(vast, "GET /instances/")
    return vast.instances[name]


@pytest.mark.parametrize("what", LOST)
def test_a_lost_answer_is_of_a_launch_that_was_made(vast: VastCloud, what: str) -> None:
    """The instance exists and costs money although its answer is lost; what arrives does not tell the id."""
    vast.faults.add(Fault(what, when="launch"))
    assert seen(vast, f"PUT /asks/{best(vast)}/", ORDER) == LOST[what]
    assert len(vast.still_billing()) == 1
    if isinstance(LOST[what], int):
        vast.faults.add(Fault(what, when="launch"))
        answer = raw(vast, f"PUT /asks/{best(vast)}/", ORDER)
        assert vast.ours()[1].instance_id.encode() not in answer.body
    launch(vast)
    assert set(vast.per_name()) == {"gpu-a"}


@pytest.mark.parametrize("what", FAILED)
def test_a_failed_launch_makes_nothing(vast: VastCloud, what: str) -> None:
    """Nothing exists after it, whatever the client saw, and the offer is still there."""
    vast.faults.add(Fault(what, when="launch"))
    ask_id = best(vast)
    assert seen(vast, f"PUT /asks/{ask_id}/", ORDER) == FAILED[what]
    assert vast.instances == {}
    assert launch(vast, ask_id)


@pytest.mark.parametrize("retry_after", [None, 3])
@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("rate-limited-json", '{"success": false, "error": "rate_limit_exceeded"'),
        ("rate-limited-detail", '{"detail": "API requests too frequent endpoint'),
        ("rate-limited-text", "API requests too frequent"),
    ],
)
def test_a_limit_has_three_forms(vast: VastCloud, what: str, text: str, retry_after: int | None) -> None:
    """429 as JSON of either kind or as plain text, with and without Retry-After, on the calls named, and no others."""
    vast.faults.add(Fault(what, when="^list$", times=2, detail=retry_after))
    assert raw(vast, "GET /ssh/").status == 200
    found = [raw(vast, "GET /v1/instances/") for _ in range(3)]
    assert [it.status for it in found] == [429, 429, 200]
    assert found[0].headers.get("Retry-After") == (None if retry_after is None else "3")
    assert found[0].body.decode().startswith(text)


def test_refusals_say_why(vast: VastCloud, clock: Clock) -> None:
    """Each refusal has its code, or the form it was asked to have."""
    call = f"PUT /asks/{best(vast)}/"
    for what, detail, wanted in [
        ("bad-key", None, (404, "auth_error")),
        ("bad-key", 401, (401, "auth_error")),
        ("inactive", None, (403, "missing_billing")),
        ("quota", None, (400, "spend_rate_limit")),
        ("no-credit", None, (400, "insufficient_credit")),
        ("no-capacity", 410, (410, "no_such_ask")),
        ("no-capacity", 400, (400, "invalid_args")),
        ("error", None, (500, "server_error")),
        ("error", "no_such_instance", (404, "no_such_instance")),
    ]:
        vast.faults.add(Fault(what, when="launch", detail=detail))
        status, found = ask(vast, call, ORDER)
        assert (status, found["error"]) == wanted
    vast.faults.add(Fault("bad-key", detail="page"))
    assert raw(vast, call, ORDER).body.startswith(b"<")
    vast.faults.add(Fault("success-false", detail="Not now."))
    assert ask(vast, call, ORDER) == (200, {"success": False, "msg": "Not now."})
    vast.faults.add(Fault("msg-only", detail=403))
    assert ask(vast, call, ORDER) == (403, {"msg": "Something went wrong."})
    vast.faults.add(Fault("search-quota", detail=60))
    answer = raw(vast, "POST /bundles/", {})
    assert (json.loads(answer.body)["error"], answer.headers["X-RateLimit-Reset"]) == (
        "search_quota_exceeded",
        str(int(clock()) + 60),
    )
    assert vast.instances == {}


@pytest.mark.parametrize("code", ["invalid_price", "invalid_args"])
def test_a_refusal_may_have_made_a_contract(vast: VastCloud, clock: Clock, code: str) -> None:
    """400 names a contract that exists, does not run, and costs its disk until it is destroyed."""
    vast.faults.add(Fault("refused-yet-made", detail=code))
    status, found = ask(vast, f"PUT /asks/{best(vast)}/", ORDER)
    assert (status, found["error"]) == (400, code)
    name = str(found["new_contract"])
    clock.advance(600)
    assert shown(vast, name)["cur_state"] == "stopped"
    assert vast.cents() > 0
    assert end(vast, name) == 200


def test_two_of_one_request_cost_money_both(vast: VastCloud) -> None:
    """A request that makes two has them billed both, and its answer names one."""
    vast.faults.add(Fault("doubled"))
    first = launch(vast)
    assert [one.instance_id == first for one in vast.still_billing()] == [True, False]
    assert vast.per_name() == {"gpu-a": 2}


def test_an_answer_without_the_instance_s_key(vast: VastCloud) -> None:
    """`instance_api_key` may be missing from the answer."""
    vast.faults.add(Fault("no-instance-key"))
    assert set(said(vast, f"PUT /asks/{best(vast)}/", ORDER)) == {"success", "new_contract"}


def test_gpus_that_are_taken_meanwhile(vast: VastCloud, clock: Clock) -> None:
    """With cancel_unavail 410 and nothing is made; without it a contract that waits, its disk billed."""
    for cancel in ({"cancel_unavail": True}, {"cancel_unavail": False}):
        vast.faults.add(Fault("gpu-taken", seconds=60))
        status, found = ask(vast, f"PUT /asks/{best(vast)}/", ORDER | cancel)
        assert (status, len(vast.ours())) == ((410, 0) if cancel["cancel_unavail"] else (200, 1))
    name = str(found["new_contract"])
    clock.advance(59)
    found = shown(vast, name)
    assert (found["actual_status"], found["cur_state"], found["intended_status"]) == (None, "stopped", "running")
    clock.advance(3)
    assert status_of(vast, name) == "running"


def test_what_is_hidden_is_null_and_found_later(vast: VastCloud, clock: Clock) -> None:
    """It is in no list for so long; hidden wholly it cannot be ended either, and goes on costing money."""
    vast.faults.add(Fault("invisible", seconds=30))
    vast.faults.add(Fault("invisible", seconds=30, detail="wholly", after=1))
    names = [launch(vast), launch(vast)]
    clock.advance(29)
    assert [status_of(vast, name) for name in names] == ["gone", "gone"]
    assert said(vast, "GET /v1/instances/")["instances"] == []
    assert [end(vast, name) for name in names] == [200, 404]
    clock.advance(2)
    assert [status_of(vast, name) for name in names] == ["gone", "running"]
    assert [one.instance_id for one in vast.still_billing()] == names[1:]


TIMELINES: dict[str, tuple[dict[str, Any], dict[float, str]]] = {
    "boot-unhealthy": ({}, {0.9: "loading", 1.1: "exited", 900: "exited"}),
    "boot-stuck": ({"seconds": 50}, {1.1: "loading", 50: "loading", 51.1: "running"}),
    "boot-fails": ({}, {1.1: "loading", 9000: "loading"}),
    "boot-created": ({}, {1.1: "created", 9000: "created"}),
    "goes-unhealthy": ({"seconds": 10, "detail": 5}, {10.9: "running", 11.1: "offline", 16.1: "running"}),
    "offline": ({"seconds": 10, "detail": 5}, {10.9: "running", 11.1: "offline", 16.1: "running"}),
    "unknown": ({"seconds": 10, "detail": 5}, {10.9: "running", 11.1: "unknown", 16.1: "running"}),
    "exited": ({"seconds": 10}, {10.9: "running", 11.1: "exited", 9000: "exited"}),
    "frozen": ({"seconds": 10}, {10.9: "running", 11.1: "frozen"}),
    "vanishes": ({"seconds": 10}, {10.9: "running", 11.1: "gone"}),
    "odd-status": ({"detail": "rebalancing"}, {0.9: "loading", 1.1: "rebalancing"}),
}


@pytest.mark.parametrize("what", TIMELINES)
def test_an_instance_s_fault_shows_in_its_timeline(vast: VastCloud, clock: Clock, what: str) -> None:
    """The instance is what the fault says at each moment, and costs money until it ends."""
    how, moments = TIMELINES[what]
    vast.faults.add(Fault(what, **how))
    name, began = launch(vast), clock()
    for at, wanted in moments.items():
        clock.now = began + at
        assert status_of(vast, name) == wanted, at
    assert (vast.bills()[0].ended is not None) == (what == "vanishes")
    spared = launch(vast)
    clock.advance(2)
    assert status_of(vast, spared) == "running"


def test_a_container_that_cannot_start_says_why(vast: VastCloud, clock: Clock) -> None:
    """An error of OCI with `created`, one of the image with `loading`, or the words of the fault."""
    for what, detail, word in [
        ("boot-created", None, "OCI runtime create failed"),
        ("boot-created", "failed to inject CDI devices\n", "CDI"),
        ("boot-fails", None, "manifest unknown"),
        ("boot-fails", "unauthorized: authentication required\n", "unauthorized"),
    ]:
        one = made(vast, clock, Fault(what, detail=detail))
        assert word in shown(vast, one.instance_id)["status_msg"]
        assert not one.is_charged(clock())


def test_offline_is_not_charged(vast: VastCloud, clock: Clock) -> None:
    """While its host is away an instance costs its disk alone; while its state is unknown, all of it."""
    away = made(vast, clock, Fault("offline", seconds=3600, detail=1800), disk=8)
    unknown = made(vast, clock, Fault("unknown", seconds=3600, detail=1800), disk=8)
    clock.advance(7200)
    paid = [one.spells[0].usd_per_hour * (clock() - one.spells[0].began) / 3600 for one in (away, unknown)]
    disks = [one.disk_usd_per_hour * (clock() - one.created_at) / 3600 for one in (away, unknown)]
    assert away.usd(clock()) == pytest.approx(paid[0] - away.usd_per_hour / 2 + disks[0])
    assert unknown.usd(clock()) == pytest.approx(paid[1] + disks[1])


def test_a_dead_container_is_brought_back_by_a_reboot(vast: VastCloud, clock: Clock) -> None:
    """What has exited has no processes, and runs again after a reboot."""
    one = made(vast, clock, Fault("exited"))
    assert not one.runs(clock())
    said(vast, f"PUT /instances/reboot/{one.instance_id}/", {})
    clock.advance(1)
    assert status_of(vast, one.instance_id) == "running"
    assert one.runs(clock())


def test_outbid_by_fault(vast: VastCloud, clock: Clock) -> None:
    """An interruptible is stopped so long after it ran, and comes back so much later; on demand nothing happens."""
    fault = Fault("outbid", seconds=100, detail=50, times=2)
    vast.faults.add(fault)
    offer = offers(vast, type="bid", reliability={"gte": 0.98})[0]
    bidder, safe = launch(vast, offer["id"], price=offer["min_bid"]), launch(vast)
    clock.advance(100)
    assert status_of(vast, bidder) == "running"
    clock.advance(2)
    found = shown(vast, bidder)
    assert {found[word] for word in ("actual_status", "cur_state", "intended_status", "next_state")} == {"stopped"}
    assert (status_of(vast, safe), fault.times) == ("running", 0)
    clock.advance(50)
    assert status_of(vast, bidder) == "running"
    clock.advance(5000)
    assert status_of(vast, bidder) == "running"


def test_a_stopped_one_may_have_to_wait(vast: VastCloud, clock: Clock) -> None:
    """Its GPUs are in other hands once it is stopped: started, it waits until they are free; a stop cancels that."""
    one = made(vast, clock, Fault("start-queued", seconds=60))
    name = one.instance_id
    said(vast, f"PUT /instances/{name}/", STOPPED)
    assert "queued" in said(vast, f"PUT /instances/{name}/", RUNNING)["msg"]
    clock.advance(30)
    assert (status_of(vast, name), shown(vast, name)["intended_status"]) == ("stopped", "running")
    said(vast, f"PUT /instances/{name}/", STOPPED)
    clock.advance(60)
    assert status_of(vast, name) == "stopped"
    said(vast, f"PUT /instances/{name}/", RUNNING)
    clock.advance(1)
    assert status_of(vast, name) == "running"


def test_what_is_delivered_is_not_what_was_ordered(vast: VastCloud, clock: Clock) -> None:
    """Interruptible though on demand was asked for and the reverse, dearer, or another GPU: the API says so."""
    on_demand = made(vast, clock, Fault("wrong-type"))
    assert shown(vast, on_demand.instance_id)["is_bid"]
    vast.outbid(on_demand.instance_id)
    assert not on_demand.runs(clock())
    offer = offers(vast, type="bid")[-1]
    vast.faults.add(Fault("wrong-type"))
    bidder = launch(vast, offer["id"], price=offer["min_bid"])
    clock.advance(2)
    assert (shown(vast, bidder)["is_bid"], shown(vast, bidder)["dph_base"] > offer["min_bid"]) == (False, True)
    dear = made(vast, clock, Fault("wrong-price", detail=3))
    assert shown(vast, dear.instance_id)["dph_base"] == pytest.approx(3 * dear.offer["dph_base"])
    other = made(vast, clock, Fault("delivers-gpu"))
    found = shown(vast, other.instance_id)
    assert (found["gpu_name"], found["gpu_ram"], other.gpus.name) == ("RTX 3060", 12288, "NVIDIA GeForce RTX 3060")


PORTS: dict[Any, Any] = {None: None, "list": [8080], "empty": {}, "value-null": {"22/tcp": None}}


def test_ports_come_in_every_form(vast: VastCloud, clock: Clock) -> None:
    """Null, a list, empty, with a null value, without the port of SSH, or late."""
    for detail, wanted in PORTS.items():
        one = made(vast, clock, Fault("odd-ports", detail=detail))
        assert shown(vast, one.instance_id)["ports"] == wanted
    one = made(vast, clock, Fault("no-direct"))
    assert list(shown(vast, one.instance_id)["ports"]) == ["8000/tcp"]
    one = made(vast, clock, Fault("no-ip", seconds=60))
    found = shown(vast, one.instance_id)
    assert ("ports" in found, found["ssh_host"], found["ssh_port"]) == (False, None, None)
    clock.advance(60)
    found = shown(vast, one.instance_id)
    assert ("ports" in found, found["ssh_host"]) == (True, one.proxy.host)


def test_keys_may_be_late_or_denied(vast: VastCloud, clock: Clock) -> None:
    """Attached keys may take longer, and every key may be denied at first."""
    late = made(vast, clock, Fault("keys-late", seconds=30))
    denied = made(vast, clock, Fault("publickey-denied", seconds=30))
    assert late.lets_in(clock()) == denied.lets_in(clock()) == []
    clock.advance(31)
    assert len(late.lets_in(clock())) == len(denied.lets_in(clock())) == 1
    slow = made(vast, clock, Fault("sshd-late", seconds=30))
    assert slow.sshd_at > clock() + 20


def test_a_result_may_be_late(vast: VastCloud, clock: Clock) -> None:
    """So many fetches more are refused."""
    one = made(vast, clock, Fault("result-late", detail=3))
    url = said(vast, f"PUT /instances/request_logs/{one.instance_id}/", {})["result_url"]
    found = [vast.handle("GET", url.removeprefix(vast.url), {}).status for _ in range(5)]
    assert found == [403, 403, 403, 403, 200]


def test_ends_can_go_wrong_in_every_way(vast: VastCloud, clock: Clock) -> None:
    """An end may come late, not at all, slowly, or unanswered; money is counted until it truly comes."""
    names = {
        what: launch(vast) for what in ("terminate-late", "terminate-ignored", "terminate-slow", "nothing-terminated")
    }
    clock.advance(10)
    for what, name in names.items():
        vast.faults.add(Fault(what, seconds=30))
        status, found = ask(vast, f"DELETE /instances/{name}/", {})
        assert (status, found["success"], "msg" in found) == (200, True, what != "nothing-terminated")
    clock.advance(2)
    assert [shown(vast, name).get("cur_state") for name in names.values()] == ["running", "running", "unloaded", None]
    clock.advance(30)
    assert [status_of(vast, name) for name in names.values()] == ["gone", "running", "gone", "gone"]
    last = names["terminate-ignored"]
    assert [one.instance_id for one in vast.still_billing()] == [last]
    for what, detail, wanted in (("rate-limited-json", None, 429), ("failed", 500, 500), ("success-false", None, 200)):
        vast.faults.add(Fault(what, when="terminate", detail=detail))
        assert end(vast, last) == wanted
        assert vast.still_billing()
    vast.faults.add(Fault("lost-closed", when="terminate"))
    with pytest.raises(Closed):
        end(vast, last)
    clock.advance(1)
    assert vast.still_billing() == []

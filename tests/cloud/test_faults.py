"""The stand-in does what each fault says, and nothing else goes wrong."""

from __future__ import annotations

import email.utils
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Clock, Fault, LambdaCloud
from tests.cloud.answers import Closed, CutShort, Hangs, NotSent
from tests.cloud.asking import LAUNCH, ORDER, ask, end, launch, raw, seen, status_of
from tests.cloud.fault_kinds import KINDS

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
}


@pytest.mark.parametrize("what", LOST)
def test_a_lost_answer_is_of_a_launch_that_was_made(core: LambdaCloud, what: str) -> None:
    """The instance exists and costs money although its answer is lost, and the next launch is answered."""
    core.faults.add(Fault(what, when="launch"))
    assert seen(core, LAUNCH, ORDER) == LOST[what]
    assert len(core.still_billing()) == 1
    launch(core)


@pytest.mark.parametrize("what", FAILED)
def test_a_failed_launch_makes_nothing(core: LambdaCloud, what: str) -> None:
    """Nothing exists after it, whatever the client saw."""
    core.faults.add(Fault(what, when="launch", times=2))
    assert seen(core, LAUNCH, ORDER) == FAILED[what]
    assert core.instances == {}
    if isinstance(FAILED[what], int):
        answer = raw(core, "POST", LAUNCH, ORDER)
        assert answer.body.startswith(b"<") == (what in ("failed", "proxy-page", "redirect"))
        assert ("Location" in answer.headers) == (what == "redirect")


@pytest.mark.parametrize("what", ["lost-502", "lost-empty", "null-data", "lost-half"])
def test_a_lost_answer_does_not_tell_the_id(core: LambdaCloud, what: str) -> None:
    """What arrives of the answer, if anything, does not have the instance's id in it."""
    core.faults.add(Fault(what, when="launch"))
    try:
        body = raw(core, "POST", LAUNCH, ORDER).body
    except CutShort as short:
        body = short.answer.body[: len(short.answer.body) // 2]
    assert core.ours()[0].instance_id.encode() not in body


@pytest.mark.parametrize("retry_after", [None, 3])
@pytest.mark.parametrize(("what", "start"), [("rate-limited-json", b"{"), ("rate-limited-text", b"Too")])
def test_any_call_can_be_limited(core: LambdaCloud, what: str, start: bytes, retry_after: int | None) -> None:
    """429 as JSON or plain text, with and without Retry-After, on whichever call is named, so often as is said."""
    core.faults.add(Fault(what, when="GET /instances", times=2, after=1, detail=retry_after))
    assert ask(core, "GET", "/ssh-keys")[0] == 200
    found = [raw(core, "GET", "/instances") for _ in range(4)]
    assert [it.status for it in found] == [200, 429, 429, 200]
    assert found[1].headers.get("Retry-After") == (None if retry_after is None else "3")
    assert found[1].body.startswith(start)


def test_refusals_of_the_account_and_of_capacity(core: LambdaCloud) -> None:
    """A bad key, an inactive account, no capacity in one region only, and a quota are told by their codes."""
    core.faults.add(Fault("no-capacity", where={"region_name": "us-west-1"}, times=None))
    assert ask(core, "POST", LAUNCH, ORDER) == (400, "instance-operations/launch/insufficient-capacity")
    launch(core, region_name="us-east-1")
    for what, wanted in {
        "quota": (400, "global/quota-exceeded"),
        "bad-key": (401, "global/invalid-api-key"),
        "inactive": (403, "global/account-inactive"),
    }.items():
        core.faults.clear()
        core.faults.add(Fault(what))
        assert ask(core, "POST", LAUNCH, ORDER) == wanted
    assert len(core.ours()) == 1


@pytest.mark.parametrize(("named", "count"), [(None, 1), ("both", 2)])
def test_two_of_one_request_cost_money_both(core: LambdaCloud, named: str | None, count: int) -> None:
    """A request that makes two has them billed both, whether its answer names one or both."""
    core.faults.add(Fault("doubled", detail=named))
    status, data = ask(core, "POST", LAUNCH, ORDER)
    assert (status, len(data["instance_ids"])) == (200, count)
    assert core.per_name() == {"gpu-a": 2}
    assert len(core.still_billing()) == 2


def test_what_is_hidden_wholly_cannot_be_ended_yet(core: LambdaCloud, clock: Clock) -> None:
    """An instance that even terminate does not know goes on costing money; once it is shown it can be ended."""
    core.faults.add(Fault("invisible", seconds=30, detail="wholly"))
    name = launch(core)
    assert end(core, name)[0] == 404
    clock.advance(31)
    assert end(core, name)[0] == 200


TIMELINES: dict[str, tuple[dict[str, Any], dict[float, str]]] = {
    "invisible": ({"seconds": 30}, {1: "404", 30.1: "404", 30.3: "active"}),
    "boot-unhealthy": ({}, {0.9: "booting", 1.1: "unhealthy", 900: "unhealthy"}),
    "boot-stuck": ({}, {0.9: "booting", 9000: "booting"}),
    "goes-unhealthy": ({"seconds": 10, "detail": 5}, {10.9: "active", 11.1: "unhealthy", 16.1: "active"}),
    "vanishes": ({"seconds": 10}, {10.9: "active", 11.1: "404"}),
    "preempted": ({"seconds": 10}, {10.9: "active", 11.1: "preempted", 13: "404"}),
    "odd-status": ({"detail": "rebalancing"}, {0.9: "booting", 1.1: "rebalancing"}),
}


@pytest.mark.parametrize("what", TIMELINES)
def test_an_instance_s_fault_shows_in_its_timeline(core: LambdaCloud, clock: Clock, what: str) -> None:
    """The instance is what the fault says at each moment, and costs money until it ends."""
    how, moments = TIMELINES[what]
    core.faults.add(Fault(what, **how))
    name, began = launch(core), clock()
    for at, wanted in moments.items():
        clock.now = began + at
        assert status_of(core, name) == wanted, at
    assert (core.bills()[0].ended is not None) == (what in ("vanishes", "preempted"))
    spared = launch(core)
    clock.advance(2)
    assert status_of(core, spared) == "active"


def test_an_instance_without_an_address(core: LambdaCloud, clock: Clock) -> None:
    """It is active, and has no `ip` until later."""
    core.faults.add(Fault("no-ip", seconds=60))
    name = launch(core)
    clock.advance(2)
    found = ask(core, "GET", f"/instances/{name}")[1]
    assert (found["status"], "ip" in found) == ("active", False)
    clock.advance(60)
    assert "ip" in ask(core, "GET", f"/instances/{name}")[1]


def test_terminating_can_go_wrong_in_every_way(core: LambdaCloud, clock: Clock) -> None:
    """An end may come late, not at all, slowly, unlisted or unanswered; money is counted until it truly comes."""
    clock.advance(10)
    names = {
        what: launch(core) for what in ("terminate-late", "terminate-ignored", "terminate-slow", "nothing-terminated")
    }
    clock.advance(10)
    for what, name in names.items():
        core.faults.add(Fault(what, seconds=30))
        status, data = end(core, name)
        assert status == 200
        assert len(data["terminated_instances"]) == (what != "nothing-terminated")
    clock.advance(2)
    seen = {what: status_of(core, name) for what, name in names.items()}
    assert list(seen.values()) == ["active", "active", "terminating", "404"]
    clock.advance(30)
    assert {status_of(core, name) for name in names.values()} == {"404", "active"}
    assert [it.instance_id for it in core.still_billing()] == [names["terminate-ignored"]]
    last = names["terminate-ignored"]
    for code, status in {
        "global/unknown": 400,
        "global/internal-error": 500,
        "global/object-does-not-exist": 404,
    }.items():
        core.faults.add(Fault("error", when="terminate", detail=code))
        assert end(core, last) == (status, code)
        assert core.still_billing()
    core.faults.add(Fault("lost-closed", when="terminate"))
    with pytest.raises(Closed):
        end(core, last)
    clock.advance(1)
    assert core.still_billing() == []


def test_answers_of_another_version(core: LambdaCloud, clock: Clock) -> None:
    """Unknown fields, null fields and missing fields change how an instance looks, and not what it is."""
    name = launch(core)
    clock.advance(0.5)
    plain = ask(core, "GET", f"/instances/{name}")[1]
    for what in ("unknown-fields", "null-fields", "bare-instances"):
        core.faults.add(Fault(what, times=2))
        found = ask(core, "GET", f"/instances/{name}")[1]
        assert (found["id"], found["status"]) == (name, "booting")
        if what == "unknown-fields":
            assert set(found) > set(plain)
            assert set(ask(core, "GET", "/instance-types")[1]) == set(core.catalogue.types)
        elif what == "null-fields":
            assert found["ip"] is None
            assert found["tags"] is None
            assert ask(core, "GET", "/instances")[1][0]["ip"] is None
        else:
            assert "actions" not in found
            assert "name" not in found
        core.faults.clear()
    assert ask(core, "GET", f"/instances/{name}")[1] == plain


def test_the_provider_s_clock_can_be_wrong(core: LambdaCloud, clock: Clock) -> None:
    """The Date header is the stand-in's time, and with the fault so much ahead."""
    core.faults.add(Fault("clock-skew", after=1, times=None, detail=-600))
    for wanted in (0, -600, -600):
        sent = email.utils.parsedate_to_datetime(raw(core, "GET", "/instances").headers["Date"])
        assert sent.timestamp() - clock() == wanted


def test_a_fault_nobody_knows_is_refused() -> None:
    """A misspelt fault is an error at once, not a test in which nothing goes wrong."""
    with pytest.raises(ValueError, match="there are: rate-limited-json"):
        Fault("rate-limited")


def test_every_fault_is_tried_somewhere() -> None:
    """Each word of the list stands in a test of the stand-in."""
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [what for what in KINDS if f'"{what}"' not in text] == []

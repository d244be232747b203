"""What becomes of contracts at the stand-in for Vast: their states, their bids, and what they cost by the second."""

from __future__ import annotations

import pytest

from tests.cloud import Clock
from tests.cloud.vast_answers import UNAVAILABLE
from tests.cloud.vast_asking import (
    HALTED,
    ORDER,
    RUNNING,
    SAFE,
    STOPPED,
    ask,
    best,
    bid_for,
    end,
    launch,
    offers,
    said,
    shown,
    states,
    status_of,
)
from tests.cloud.vast_cloud import VastCloud
from tests.cloud.vast_instance import DELETED_AFTER_S

# --- what becomes of an instance -------------------------------------------------------------------------------------


def test_its_way_up_is_told_in_words(vast: VastCloud, clock: Clock) -> None:
    """Hidden, null, created, loading with the image's progress, running, and only later with ports."""
    name = launch(vast)
    seen: list[tuple[str, str]] = []
    for _ in range(60):
        found = shown(vast, name)
        word = str(found.get("actual_status")) if found else "hidden"
        message = str(found.get("status_msg")).strip()
        if (word, message) not in seen:
            seen.append((word, message))
        clock.advance(0.025)
    words = [word for word, _ in seen]
    assert list(dict.fromkeys(words)) == ["hidden", "created", "loading", "running"]
    progress = [message for word, message in seen if word == "loading"]
    assert progress[0].startswith("Pulling from pytorch/pytorch")
    assert any("Downloading" in message for message in progress)
    assert progress[-1].startswith("Digest: sha256:")
    vast.timings.visibility_delay_s = 0.0
    assert status_of(vast, launch(vast)) == "null"


def test_a_direct_port_is_had_for_the_asking(vast: VastCloud, clock: Clock) -> None:
    """Only a runtype with ssh_direc has ports; with jupyter the proxy's port is one higher than is said."""
    names = [launch(vast, runtype=it) for it in ("ssh_proxy", "ssh_direct", "jupyter_direc ssh_direc ssh_proxy")]
    clock.advance(2)
    found = [shown(vast, name) for name in names]
    assert ["ports" in it for it in found] == [False, True, True]
    told = [it["ssh_port"] - vast.instances[str(it["id"])].proxy.port for it in found]
    assert told == [0, 0, -1]


def test_stop_and_start(vast: VastCloud, clock: Clock) -> None:
    """Stopped it gives its GPUs back and lags in what it shows; started it has them again, if they are free."""
    name = launch(vast)
    clock.advance(2)
    machine = {"machine_id": {"eq": vast.instances[name].slot.machine_id}}
    assert offers(vast, **machine, num_gpus={"gte": 1}) == []
    assert said(vast, f"PUT /instances/{name}/", STOPPED) == {"success": True}
    assert (status_of(vast, name), states(vast, name)) == ("running", HALTED)
    clock.advance(0.3)
    assert (status_of(vast, name), "ports" in shown(vast, name)) == ("stopped", False)
    assert len(offers(vast, **machine, num_gpus={"gte": 1})) == 1
    assert said(vast, f"PUT /instances/{name}/", RUNNING) == {"success": True}
    seen = [status_of(vast, name)]
    for _ in range(2):
        clock.advance(0.3)
        seen.append(status_of(vast, name))
    assert seen == ["stopped", "loading", "running"]
    said(vast, f"PUT /instances/{name}/", STOPPED)
    other = launch(vast, offers(vast, **machine, num_gpus={"gte": 1})[0]["id"])
    assert said(vast, f"PUT /instances/{name}/", RUNNING) == {"success": True, "msg": UNAVAILABLE}
    clock.advance(3600)
    assert states(vast, name) == {"cur_state": "stopped", "intended_status": "running", "next_state": "running"}
    end(vast, other)
    clock.advance(1)
    assert status_of(vast, name) == "running"


def test_reboot_keeps_the_container_and_recycle_does_not(vast: VastCloud, clock: Clock) -> None:
    """Both are transient, keep the GPUs and go on being charged; the second pulls the image anew."""
    name = launch(vast)
    clock.advance(2)
    one = vast.instances[name]
    for word, passing, containers in (("reboot", "rebooting", 1), ("recycle", "recycling", 2)):
        said(vast, f"PUT /instances/{word}/{name}/", {})
        assert (status_of(vast, name), one.is_charged(clock()), one.containers) == (passing, True, containers)
        clock.advance(1.1)
        assert status_of(vast, name) == "running"
    assert (one.starts, len(one.spells)) == (3, 1)
    said(vast, f"PUT /instances/{name}/", STOPPED)
    assert ask(vast, f"PUT /instances/reboot/{name}/", {})[0] == 400


def test_many_are_stopped_and_ended_at_once(vast: VastCloud, clock: Clock) -> None:
    """The calls for several do to each what those for one do; one that is not there spoils the call."""
    names = [launch(vast) for _ in range(3)]
    clock.advance(2)
    said(vast, "PUT /instances/", {"state": "stopped", "ids": [int(name) for name in names[:2]]})
    clock.advance(1)
    assert [status_of(vast, name) for name in names] == ["stopped", "stopped", "running"]
    assert ask(vast, "DELETE /instances/", {"instance_ids": [int(names[0]), 1]})[0] == 404
    said(vast, "DELETE /instances/", {"instance_ids": [int(name) for name in names[:2]]})
    clock.advance(1)
    assert [one.instance_id for one in vast.still_billing()] == names[2:]


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        ({"image": "acme/no-such:1"}, "manifest for acme/no-such:1 not found"),
        ({"image": "acme/private:1"}, "pull access denied for acme/private"),
        ({"image": "acme/private:1", "image_login": "-u me -p x docker.io"}, ""),
    ],
)
def test_an_image_that_cannot_be_had(vast: VastCloud, clock: Clock, order: dict[str, str], wanted: str) -> None:
    """It loads for ever and says why in Docker's words; with a login it comes up. Only its disk costs money."""
    name = launch(vast, **order)
    clock.advance(600)
    assert status_of(vast, name) == ("loading" if wanted else "running")
    assert wanted in shown(vast, name)["status_msg"]
    one = vast.instances[name]
    assert one.is_charged(clock()) != bool(wanted)
    assert shown(vast, name)["instance"]["gpuCostPerHour"] == (0 if wanted else pytest.approx(one.usd_per_hour))


# --- bids ------------------------------------------------------------------------------------------------------------


def test_a_bid_that_is_too_low_is_refused_and_yet_made(vast: VastCloud, clock: Clock) -> None:
    """400 names the contract it made: it is stopped, its disk costs money, and a higher bid starts it."""
    offer = offers(vast, **SAFE, type="bid")[0]
    status, found = ask(vast, f"PUT /asks/{offer['id']}/", ORDER | {"price": offer["min_bid"] / 2})
    assert (status, found["success"], found["error"]) == (400, False, "invalid_price")
    name = str(found["new_contract"])
    clock.advance(3600)
    assert states(vast, name) == HALTED
    assert float(vast.cents()) == pytest.approx(offer["storage_cost"] * 40 / 720 * 100)
    said(vast, f"PUT /instances/bid_price/{name}/", {"client_id": "me", "price": offer["min_bid"]})
    clock.advance(2)
    assert status_of(vast, name) == "running"
    end(vast, name)
    clock.advance(1)
    assert vast.still_billing() == []


def test_a_higher_bid_takes_it_away(vast: VastCloud, clock: Clock) -> None:
    """The outbid one is stopped at once, keeps its disk, costs that alone, and comes back when its bid is highest."""
    name = bid_for(vast)
    clock.advance(2)
    one = vast.instances[name]
    assert (shown(vast, name)["is_bid"], shown(vast, name)["dph_base"]) == (True, one.bid)
    vast.outbid(name, seconds=600)
    assert states(vast, name) == HALTED
    assert not one.runs(clock())
    clock.advance(599)
    assert (status_of(vast, name), shown(vast, name)["instance"]["gpuCostPerHour"]) == ("stopped", 0)
    clock.advance(2)
    assert (status_of(vast, name), one.starts) == ("running", 2)
    vast.outbid(name, price=0.9)
    clock.advance(5000)
    assert said(vast, f"PUT /instances/{name}/", RUNNING)["msg"] == UNAVAILABLE
    said(vast, f"PUT /instances/bid_price/{name}/", {"client_id": "me", "price": 0.9})
    clock.advance(1)
    assert status_of(vast, name) == "stopped"
    said(vast, f"PUT /instances/bid_price/{name}/", {"client_id": "me", "price": 0.91})
    clock.advance(1)
    assert status_of(vast, name) == "running"


def test_who_was_stopped_by_hand_stays_so(vast: VastCloud, clock: Clock) -> None:
    """An outbid instance that its owner stops does not come back by itself, nor does one that was destroyed."""
    names = [bid_for(vast), bid_for(vast)]
    clock.advance(2)
    for name in names:
        vast.outbid(name, seconds=60)
    said(vast, f"PUT /instances/{names[0]}/", STOPPED)
    end(vast, names[1])
    clock.advance(600)
    assert [status_of(vast, name) for name in names] == ["stopped", "gone"]


def test_bids_have_their_bounds(vast: VastCloud, clock: Clock) -> None:
    """A bid below 0.001, above 32 for a GPU, or for what is on demand is refused; one below the floor loses."""
    name, other = bid_for(vast), launch(vast)
    clock.advance(2)
    for price in (0.0005, 33, "1", None, True):
        assert ask(vast, f"PUT /instances/bid_price/{name}/", {"price": price})[1]["error"] == "invalid_args"
    assert ask(vast, f"PUT /instances/bid_price/{other}/", {"price": 1})[0] == 400
    said(vast, f"PUT /instances/bid_price/{name}/", {"price": 0.001})
    assert states(vast, name) == HALTED
    vast.outbid(other)
    assert states(vast, other)["cur_state"] == "running"


# --- money -----------------------------------------------------------------------------------------------------------


def test_bills_are_by_the_second(vast: VastCloud, clock: Clock) -> None:
    """The disk costs from its making until its end, the GPUs while they run, whatever else becomes of it."""
    name = launch(vast)
    one = vast.instances[name]
    gpu, disk = one.usd_per_hour, one.offer["storage_cost"] * 40 / 720
    clock.advance(1 + 1800)
    said(vast, f"PUT /instances/{name}/", STOPPED)
    clock.advance(1799)
    assert float(vast.cents()) == pytest.approx(100 * (gpu / 2 + disk))
    assert said(vast, "GET /users/current/")["credit"] == pytest.approx(250 - gpu / 2 - disk)
    end(vast, name)
    assert len(vast.still_billing()) == 1
    clock.advance(3600)
    (bill,) = vast.bills()
    assert (bill.name, bill.ended) == ("gpu-a", pytest.approx(bill.began + 3600.5))
    assert float(bill.cents) == pytest.approx(100 * (gpu / 2 + disk * 3600.5 / 3600))
    assert vast.still_billing() == []
    assert said(vast, "GET /users/current/")["credit"] == pytest.approx(250 - float(bill.cents) / 100)


def test_credit_runs_out(vast: VastCloud, clock: Clock) -> None:
    """At the moment nothing is left all instances are stopped, nothing new is made or started, and later they go."""
    name = launch(vast)
    one = vast.instances[name]
    vast.credit = (one.usd_per_hour + one.disk_usd_per_hour) / 2
    clock.advance(1700)
    assert status_of(vast, name) == "running"
    clock.advance(200)
    assert states(vast, name) == HALTED
    assert one.spells[0].ended == pytest.approx(one.created_at + 1800, abs=2)
    assert ask(vast, f"PUT /asks/{best(vast)}/", ORDER)[1]["error"] == "insufficient_credit"
    assert ask(vast, f"PUT /instances/{name}/", RUNNING)[1]["error"] == "insufficient_credit"
    vast.credit += 10
    assert said(vast, f"PUT /instances/{name}/", RUNNING) == {"success": True}


def test_what_is_out_of_credit_is_deleted_in_the_end(vast: VastCloud, clock: Clock) -> None:
    """Two days after it was stopped for want of credit an instance is gone."""
    vast.credit = 0.01
    name = launch(vast)
    clock.advance(3600)
    assert states(vast, name) == HALTED
    clock.advance(DELETED_AFTER_S)
    assert status_of(vast, name) == "gone"
    assert vast.still_billing() == []


def test_a_host_s_time_ends(vast: VastCloud, clock: Clock) -> None:
    """When the host's contract is over its instances are stopped, cannot be started, and go two days later."""
    name = launch(vast, vast.market.trap("short").ask_id)
    clock.advance(5399)
    assert status_of(vast, name) == "running"
    clock.advance(2)
    assert states(vast, name) == HALTED
    clock.advance(DELETED_AFTER_S)
    assert status_of(vast, name) == "gone"


def test_foreign_instances_are_not_billed_to_us_and_watched(vast: VastCloud, clock: Clock) -> None:
    """Other people's instances are listed, run, and cost us nothing; whoever changes one is told of."""
    theirs = vast.add_foreign("gpu-a2")
    unnamed = vast.add_foreign(None)
    ours = launch(vast)
    clock.advance(2)
    listed = {row["id"]: row for row in said(vast, "GET /v1/instances/")["instances"]}
    assert set(listed) == {theirs.number, unnamed.number, int(ours)}
    assert (listed[theirs.number]["actual_status"], listed[unnamed.number]["label"]) == ("running", None)
    assert [one.instance_id for one in vast.still_billing()] == [ours]
    end(vast, ours)
    assert vast.touched_foreign == []
    said(vast, f"PUT /instances/{unnamed.number}/", {"label": "mine"})
    end(vast, theirs.instance_id)
    assert vast.touched_foreign == [unnamed.instance_id, theirs.instance_id]


def test_a_doubled_launch_is_seen(vast: VastCloud) -> None:
    """Two launches under one label are counted, also when an instance is labelled otherwise later."""
    renamed = launch(vast)
    launch(vast)
    said(vast, f"PUT /instances/{renamed}/", {"label": "else"})
    assert vast.per_name() == {"gpu-a": 2}
    assert vast.count("launch") == 2
    assert vast.count("label", "PUT") == 1


def test_labels_have_a_limit(vast: VastCloud) -> None:
    """1,024 characters can be set later, 256 at once; more is refused."""
    name = launch(vast, label="x" * 256)
    said(vast, f"PUT /instances/{name}/", {"label": "y" * 1024})
    assert ask(vast, f"PUT /instances/{name}/", {"label": "y" * 1025})[1]["error"] == "label_too_long"
    assert ask(vast, f"PUT /instances/{name}/", {"state": "paused"})[0] == 400

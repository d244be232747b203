"""The stand-in for Vast: its keys, its timeline, its bids, its lists, and what everything costs by the second."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.cloud import Clock, Fault, control
from tests.cloud.answers import Failure
from tests.cloud.asking import PUBLIC_KEY
from tests.cloud.vast_answers import UNAVAILABLE
from tests.cloud.vast_asking import ORDER, SAFE, ask, best, end, launch, offers, raw, said, shown, status_of
from tests.cloud.vast_cloud import VastCloud
from tests.cloud.vast_instance import DELETED_AFTER_S

OTHER = PUBLIC_KEY.replace("ICN+", "IDN+")
STOPPED, RUNNING = {"state": "stopped"}, {"state": "running"}
HALTED = {"cur_state": "stopped", "intended_status": "stopped", "next_state": "stopped"}


def bid_for(vast: VastCloud, factor: float = 1.2) -> str:
    """The id of an interruptible that is made now, for so many times the least bid."""
    offer = offers(vast, **SAFE, type="bid")[0]
    return launch(vast, offer["id"], price=round(offer["min_bid"] * factor, 4))


def states(vast: VastCloud, name: str) -> dict[str, str]:
    """The three words beside `actual_status`."""
    return {word: shown(vast, name)[word] for word in HALTED}


# --- who may ask -----------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_a_404_that_is_no_absence(vast: VastCloud) -> None:
    """404 with `auth_error` unless the knob has it 401 or a page of 403; without a key 403; offers need none."""
    name = launch(vast)
    for call in (f"GET /instances/{name}/", f"DELETE /instances/{name}/", "GET /users/current/"):
        assert ask(vast, call, key="wrong") == (
            404,
            {"success": False, "error": "auth_error", "msg": "Invalid user key"},
        )
    assert vast.handle("GET", "/api/v0/users/current/", {}).status == 403
    assert vast.handle("GET", f"/api/v0/users/current/?api_key={vast.key}", {}).status == 403
    vast.bad_key_as = 401
    assert ask(vast, "GET /users/current/", key="wrong")[0] == 401
    vast.bad_key_as = "page"
    answer = raw(vast, "GET /users/current/", key="wrong")
    assert (answer.status, answer.body[:1]) == (403, b"<")
    assert vast.still_billing()


def test_an_instance_s_own_key_is_for_itself(vast: VastCloud, clock: Clock) -> None:
    """It shows, stops, starts and destroys its own instance and nothing else, and is nobody's key afterwards."""
    name, other = launch(vast), launch(vast)
    clock.advance(2)
    key = vast.instances[name].api_key
    mine, theirs = f"/instances/{name}/", f"/instances/{other}/"
    assert ask(vast, f"GET {mine}", key=key)[1]["instances"]["id"] == int(name)
    assert [ask(vast, f"PUT {mine}", it, key)[0] for it in (STOPPED, RUNNING)] == [200, 200]
    for call, body in {
        f"GET {theirs}": None,
        f"DELETE {theirs}": {},
        f"PUT {mine}": {"label": "x"},
        "GET /v1/instances/": None,
        "GET /ssh/": None,
        "GET /users/current/": None,
        "DELETE /instances/": {"instance_ids": [int(name)]},
        f"PUT /asks/{best(vast)}/": ORDER,
    }.items():
        status, found = ask(vast, call, body, key)
        assert (status, found["error"]) == (403, "not_authorized"), call
    assert ask(vast, f"DELETE {mine}", {}, key)[0] == 200
    clock.advance(1)
    assert ask(vast, f"GET {mine}", key=key)[1]["error"] == "auth_error"
    assert [one.instance_id for one in vast.still_billing()] == [other]


def test_paths_end_in_a_slash(vast: VastCloud) -> None:
    """A read without it is answered, a write without it is redirected, and elsewhere there is a page of HTML."""
    name = launch(vast)
    assert ask(vast, "GET /users/current")[0] == 200
    answer = raw(vast, f"PUT /instances/{name}", {"label": "x"})
    assert (answer.status, answer.headers["Location"]) == (301, f"{vast.url}/api/v0/instances/{name}/")
    assert vast.instances[name].name == "gpu-a"
    assert raw(vast, "GET /nonsense/").status == 404


def test_rates_are_enforced_where_wanted(vast: VastCloud, clock: Clock) -> None:
    """With the knob on, each call has its own pace, told in `detail`; another call may be made at once."""
    name = launch(vast)
    vast.enforces_rates = True
    assert [ask(vast, f"GET /instances/{name}/")[0] for _ in range(2)] == [200, 429]
    assert ask(vast, f"GET /instances/{name}/")[1] == {"detail": "API requests too frequent endpoint threshold=2.0"}
    assert ask(vast, "GET /v1/instances/")[0] == 200
    clock.advance(2)
    assert ask(vast, f"GET /instances/{name}/")[0] == 200
    ask_id = vast.market.slots[0].ask_id
    made = [ask(vast, f"PUT /asks/{ask_id}/", ORDER)[0]]
    clock.advance(4.4)
    made.append(ask(vast, f"PUT /asks/{ask_id}/", ORDER)[0])
    assert made == [200, 429]


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
    assert status_of(vast, other) == "running"


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


# --- lists -----------------------------------------------------------------------------------------------------------


def page(vast: VastCloud, **query: Any) -> dict[str, Any]:
    """One page of the list."""
    words = {name: it if isinstance(it, str) else json.dumps(it) for name, it in query.items()}
    return dict(said(vast, f"GET /v1/instances/?{urlencode(words)}"))


def test_lists_come_page_by_page(vast: VastCloud, clock: Clock) -> None:
    """At most 25 on one page, each instance on exactly one, in the order asked for, also while some of them go."""
    lone = [slot.ask_id for slot in vast.market.slots if slot.whole == 1 and not slot.trap]
    names = [launch(vast, ask_id, label=f"n{number % 7}") for number, ask_id in enumerate(lone[:60])]
    clock.advance(1)
    assert [page(vast, limit=it)["instances_found"] for it in (7, 25, 26, 0, -3)] == [7, 25, 25, 5, 5]
    for order in ([], [{"col": "id", "dir": "desc"}], [{"col": "label", "dir": "desc"}, {"col": "id", "dir": "asc"}]):
        found: list[int] = []
        token: dict[str, str] = {}
        while True:
            part = page(vast, order_by=order, limit=25, **token)
            found += [row["id"] for row in part["instances"]]
            if part["next_token"] is None:
                break
            token = {"after_token": part["next_token"]}
        assert sorted(found) == sorted(int(name) for name in names)
        assert len(found) == part["total_instances"] == 60
    first = page(vast, limit=25)
    for name in names[20:30]:
        end(vast, name)
    clock.advance(1)
    second = page(vast, limit=25, after_token=first["next_token"])
    assert [row["id"] for row in second["instances"]] == [int(name) for name in names[30:55]]


def test_lists_are_filtered_and_cut(vast: VastCloud, clock: Clock) -> None:
    """By label as by other stored fields, counted by label, with the columns asked for; what is computed is not."""
    names = [launch(vast, label=label) for label in ("gpu-a", "gpu-b", "gpu-b")]
    vast.add_foreign(None)
    clock.advance(1.2)
    found = page(vast, select_filters={"label": {"eq": "gpu-b"}})
    assert [row["id"] for row in found["instances"]] == [int(name) for name in names[1:]]
    assert found["label_counts"] == {"gpu-b": 2}
    assert page(vast)["label_counts"] == {"gpu-a": 1, "gpu-b": 2, "": 1}
    assert page(vast, select_filters={"actual_status": {"neq": "running"}})["instances"] == []
    cut = page(vast, select_cols=["id", "none"], limit=1)["instances"]
    assert cut == [{"id": min(one.number for one in vast.instances.values()), "none": None}]
    for wrong in ("select_filters", "order_by", "limit", "after_token"):
        assert ask(vast, f"GET /v1/instances/?{wrong}=%7Bx")[0] == 400
    rows = said(vast, "GET /instances/?owner=me")
    assert rows["instances_found"] == 4


# --- keys and logs ---------------------------------------------------------------------------------------------------


def test_keys_are_of_the_account_or_of_an_instance(vast: VastCloud, clock: Clock) -> None:
    """Those of the account reach what is made later; attached ones are let in after a while; each only once."""
    before = launch(vast)
    assert ask(vast, "POST /ssh/", {"ssh_key": f"{PUBLIC_KEY} again"})[0] == 400
    said(vast, "POST /ssh/", {"ssh_key": OTHER})
    after = launch(vast)
    clock.advance(2)
    one = vast.instances[before]
    assert one.lets_in(clock()) == [PUBLIC_KEY]
    assert vast.instances[after].lets_in(clock()) == [PUBLIC_KEY, OTHER]
    said(vast, f"POST /instances/{before}/ssh/", {"ssh_key": OTHER})
    assert "already" in ask(vast, f"POST /instances/{before}/ssh/", {"ssh_key": OTHER})[1]["msg"]
    assert one.lets_in(clock()) == [PUBLIC_KEY]
    clock.advance(0.3)
    assert one.lets_in(clock()) == [PUBLIC_KEY, OTHER]
    vast.plain_key_lists = True
    keys = said(vast, f"GET /instances/{before}/ssh/")["ssh_keys"]
    said(vast, f"DELETE /instances/{before}/ssh/{keys[0]['id']}/")
    assert one.lets_in(clock()) == [OTHER]
    assert ask(vast, f"DELETE /instances/{before}/ssh/1/")[1]["error"] == "no_such_ssh_key"
    for wrong in ("", "not a key", 7):
        assert ask(vast, f"POST /instances/{before}/ssh/", {"ssh_key": wrong})[0] == 400


def test_the_account_s_keys_have_several_forms(vast: VastCloud) -> None:
    """A list or an object; none is a 404 or an empty list; a team's key cannot add any; new ones may reach all."""
    name = launch(vast)
    vast.keys_in_object = True
    assert len(said(vast, "GET /ssh/")["ssh_keys"]) == 1
    vast.keys_reach_all = True
    said(vast, "POST /ssh/", {"ssh_key": OTHER})
    assert [key.public for key in vast.instances[name].keys] == [PUBLIC_KEY, OTHER]
    vast.is_team = True
    assert ask(vast, "POST /ssh/", {"ssh_key": OTHER[:-3]})[1]["error"] == "team_ssh_keys_not_supported"
    vast.keys.account.clear()
    assert ask(vast, "GET /ssh/")[1]["error"] == "not_found"
    vast.no_keys_status = 200
    assert said(vast, "GET /ssh/") == {"ssh_keys": []}


def fetched(vast: VastCloud, url: str, **headers: str) -> tuple[int, str]:
    """What lies at the address of a result."""
    answer = vast.handle("GET", url.removeprefix(vast.url), headers)
    return answer.status, answer.body.decode()


def test_logs_are_fetched_elsewhere(vast: VastCloud, clock: Clock) -> None:
    """The first fetches are refused, one with a key always; then the last lines that match are there."""
    name = launch(vast)
    clock.advance(2)
    vast.instances[name].log = "".join(f"line {number}\n" for number in range(30)) + "key ssh-ed25519 AAAA\n"
    vast.result_refusals = 2
    url = said(vast, f"PUT /instances/request_logs/{name}/", {"tail": "2", "filter": "line"})["result_url"]
    assert fetched(vast, url, Authorization="Bearer x")[0] == 400
    assert [fetched(vast, url)[0] for _ in range(3)] == [403, 403, 200]
    assert fetched(vast, url) == (200, "line 28\nline 29\n")
    url = said(vast, f"PUT /instances/request_logs/{name}/", {"daemon_logs": "true"})["result_url"]
    assert [fetched(vast, url)[0] for _ in range(2)] == [403, 403]
    assert f"C.{name}" in fetched(vast, url)[1]
    assert fetched(vast, f"{vast.url}/results/{'0' * 64}.log")[0] == 403
    assert fetched(vast, f"{vast.url}/results/../x")[0] == 403


@pytest.mark.parametrize("command", ["cat /etc/passwd", "", "ls 'x", "ls " + "x" * 520, None])
def test_only_a_few_commands_are_run(vast: VastCloud, clock: Clock, command: Any) -> None:
    """ls, rm and du are taken; another command is refused."""
    name = launch(vast)
    clock.advance(1)
    found = ask(vast, f"PUT /instances/command/{name}/", {"command": command})
    assert (found[0], found[1]["msg"]) == (400, "Invalid command given.")
    assert ask(vast, f"PUT /instances/command/{name}/", {"command": "du -s /root"})[0] == 200


def test_a_way_to_copy_is_opened(vast: VastCloud, clock: Clock) -> None:
    """One side is the computer that asks, the other an instance, by either form of its id; else it is refused."""
    name = launch(vast)
    clock.advance(1)
    for form in (f"C.{name}", int(name), name):
        asked = {"client_id": "me", "src_id": form, "dst_id": None, "src_path": "/root/x", "dst_path": "x"}
        found = said(vast, "PUT /commands/rsync/", asked)
        assert (found["src_addr"], type(found["src_port"])) == (vast.instances[name].proxy.host, int)
    found = said(vast, "PUT /commands/rsync/", {"src_id": None, "dst_id": name, "src_path": "x", "dst_path": "/x"})
    assert "dst_addr" in found
    for wrong in ({"src_id": "x"}, {"src_id": None}, {"dst_id": name}):
        assert ask(vast, "PUT /commands/rsync/", asked | wrong)[0] == 400
    assert ask(vast, "PUT /commands/rsync/", asked | {"src_id": 1})[1]["error"] == "no_such_user"
    vast.faults.add(Fault("no-copy"))
    assert ask(vast, "PUT /commands/rsync/", asked)[0] == 400


# --- control ---------------------------------------------------------------------------------------------------------


def test_control_sets_knobs_or_says_why_not(vast: VastCloud, clock: Clock) -> None:
    """Faults, timings, knobs and what is to happen are done and reported; what is not understood does nothing."""
    name = bid_for(vast)
    clock.advance(2)
    asked = {"faults": [{"what": "outbid"}], "timings": {"key_delay_s": 7}, "foreign": ["x"], "credit": 3.0}
    said_back = control.apply(vast, asked | {"outbid": {"id": int(name)}, "take": {"id": name, "seconds": 60}})
    assert (said_back["timings"]["key_delay_s"], len(said_back["faults"]), vast.credit) == (7, 1, 3.0)
    assert states(vast, name) == HALTED
    assert len(vast.instances) == 2
    for wrong in ({"faults": [{"what": "preempted"}]}, {"quota": 1}, {"outbid": {"id": 1}}):
        with pytest.raises(Failure):
            control.apply(vast, wrong)
    control.apply(vast, {"log": {"id": name, "text": "hello\n"}, "free": {"id": name}})
    assert vast.log_of(vast.instances[name]) == "hello\n"


def test_the_same_seed_gives_the_same_ids(clock: Clock) -> None:
    """Two stand-ins with one seed name things alike, with another seed otherwise."""
    numbers = [[VastCloud(clock, seed).new_number() for _ in range(1)] for seed in (1, 1, 2)]
    assert numbers[0] == numbers[1] != numbers[2]

"""Who may ask the stand-in for Vast, and for what: its lists, keys, logs, copies and knobs."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.cloud import Clock, Fault, control
from tests.cloud.answers import Failure
from tests.cloud.asking import PUBLIC_KEY
from tests.cloud.fault_kinds import VAST
from tests.cloud.vast_asking import (
    HALTED,
    ORDER,
    RUNNING,
    STOPPED,
    ask,
    best,
    bid_for,
    end,
    launch,
    offers,
    raw,
    said,
    shown,
    states,
)
from tests.cloud.vast_cloud import VastCloud

OTHER = PUBLIC_KEY.replace("ICN+", "IDN+")
# --- who may ask -----------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_a_404_that_is_no_absence(vast: VastCloud) -> None:
    """404 with `auth_error` unless the knob has it 401 or a page of 403; without a key 403; offers need none."""
    name = launch(vast)
    assert vast.handle("POST", "/api/v0/bundles/", {}, b"{}").status == 200
    for call in (f"GET /instances/{name}/", f"DELETE /instances/{name}/", "GET /users/current/", "POST /bundles/"):
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
    vast.null_lists = True
    assert page(vast, select_filters={"label": {"eq": "none"}})["instances"] is None
    assert page(vast, select_filters={"label": {"eq": "gpu-a"}})["instances"] is not None


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


# --- other answers ----------------------------------------------------------------------------------------------------


def test_answers_of_another_version(vast: VastCloud, clock: Clock) -> None:
    """Unknown fields, null fields and missing fields change how an instance looks, and not what it is."""
    name = launch(vast)
    clock.advance(2)
    plain = shown(vast, name)
    for what in ("unknown-fields", "null-fields", "bare-instances"):
        vast.faults.add(Fault(what, times=3))
        found = shown(vast, name)
        assert (found["id"], found["label"], found["actual_status"]) == (int(name), "gpu-a", "running")
        assert found["dph_total"] == plain["dph_total"]
        if what == "unknown-fields":
            assert set(found) > set(plain)
        elif what == "null-fields":
            assert found["ports"] is found["status_msg"] is None
            assert said(vast, "GET /v1/instances/")["instances"][0]["ports"] is None
        else:
            assert set(plain) > set(found)
        assert offers(vast)
        vast.faults.clear()
    vast.faults.add(Fault("clock-skew", detail=-600))
    assert raw(vast, "GET /ssh/").headers["Date"] != raw(vast, "GET /ssh/").headers["Date"]
    assert shown(vast, name) == plain


def test_faults_of_another_cloud_are_refused(vast: VastCloud) -> None:
    """What only the other cloud has is an error at once, not a test in which nothing goes wrong."""
    with pytest.raises(ValueError, match="no fault 'preempted'"):
        vast.faults.add(Fault("preempted"))
    assert "preempted" not in VAST


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

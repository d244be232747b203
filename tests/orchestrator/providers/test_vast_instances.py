"""Instances of Vast.ai: one, all of them, their states, and where they let one in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ProviderDown
from orchestrator.providers import vast_answers
from orchestrator.providers.base import Endpoint, Instance
from orchestrator.providers.vast import VastCloud
from tests.orchestrator.providers.loopback import Asked, Scripted, Server
from tests.orchestrator.providers.playing_vast import ID, INSTANCE, MARKER, SCRIPT, TAGS, TOKEN
from tests.orchestrator.providers.test_lambda_answers import JSON

DIRECT, PROXY = Endpoint("203.0.113.42", 40022), Endpoint("ssh6.vast.ai", 15678)


def parsed(**changes: Any) -> Instance:
    found = vast_answers.instance({**INSTANCE, **changes})
    assert found is not None
    return found


def test_one_instance(vast: VastCloud, server: Server) -> None:
    """An instance has its marker, its ways in, its price and its GPU, and neither token, environment nor script."""
    server.usual = lambda _: Scripted(200, {"instances": INSTANCE})
    found = vast.get(ID)
    assert found == Instance(
        instance_id=ID,
        marker=MARKER,
        state="ready",
        raw_state="running",
        user="root",
        endpoints=(DIRECT, PROXY),
        type_name="1x RTX 4090",
        region="US-California",
        price_usd_per_hour=0.3104,
        tags=TAGS,
        message="success, running vastai/base-image_stock/ssh",
        gpu="RTX 4090",
        count=1,
        spot=False,
        machine_id="88888",
        stopped_usd_per_hour=0.0083,
    )
    assert server.paths() == [f"GET /api/v0/instances/{ID}/?owner=me"]
    shown = repr(vars(found))
    assert not [secret for secret in (TOKEN, "hf_secret", SCRIPT[:12]) if secret in shown]


def test_none_is_only_null(vast: VastCloud, server: Server) -> None:
    """A show that has null where the instance should be says that it is gone; anything else odd says nothing."""
    server.usual = lambda _: Scripted(200, {"instances": None})
    assert vast.get(ID) is None
    document: Any
    for document in ({}, [], [INSTANCE], "x", 0, False, {**INSTANCE, "id": 999}, {**INSTANCE, "id": None}):
        server.usual = lambda _, document=document: Scripted(200, {"instances": document})
        with pytest.raises(ProviderDown, match="something else"):
            vast.get(ID)


@pytest.mark.parametrize(
    ("actual", "intended", "state"),
    [
        (None, "running", "booting"),
        ("created", "running", "booting"),
        ("loading", "running", "booting"),
        ("scheduling", "running", "booting"),
        ("rebooting", "running", "booting"),
        ("recycling", "running", "booting"),
        ("running", "running", "ready"),
        ("running", "stopped", "stopped"),
        (None, "stopped", "stopped"),
        ("created", "stopped", "stopped"),
        ("loading", "stopped", "stopped"),
        ("stopped", "stopped", "stopped"),
        ("stopped", "running", "stopped"),
        ("exited", "running", "stopped"),
        ("exited", "stopped", "stopped"),
        ("offline", "running", "unhealthy"),
        ("offline", "stopped", "unhealthy"),
        ("unknown", "running", "unknown"),
        ("frozen", "frozen", "unknown"),
        ("frozen", "running", "unknown"),
        ("running", "frozen", "unknown"),
        ("running", None, "unknown"),
        ("melted", "running", "unknown"),
        (7, "running", "booting"),
    ],
)
def test_states(actual: Any, intended: Any, state: str) -> None:
    """What it is and what it is to be, together, are one of our states; a word that is not known is `unknown`."""
    found = parsed(actual_status=actual, intended_status=intended)
    assert found.state == state
    assert found.raw_state.startswith(actual if isinstance(actual, str) else "null")


def test_a_state_needs_a_way_in_and_no_end() -> None:
    """Running without a way in is booting still; a contract that was ended is ending, whatever else is told."""
    nowhere = {"ports": None, "ssh_host": None}
    assert parsed(**nowhere).state == "booting"
    assert parsed(**nowhere).endpoints == ()
    assert parsed(cur_state="unloaded").state == "stopping"
    assert parsed(cur_state="unloaded", actual_status=None, intended_status="stopped").state == "stopping"


def test_an_outbid_machine_is_stopped() -> None:
    """All three states of its contract are stopped when it is outbid, though it may seem to run for a while."""
    outbid = {"cur_state": "stopped", "intended_status": "stopped", "next_state": "stopped", "is_bid": True}
    found = parsed(actual_status="running", **outbid)
    assert (found.state, found.spot) == ("stopped", True)
    assert found.raw_state == "running, to be stopped"


FATAL = [
    "Error response from daemon: OCI runtime create failed: runc create failed",
    "docker_build() error writing dockerfile",
    "Error: failed to inject CDI devices: unresolvable CDI devices",
    "GPU error, unable to start instance",
    "Traceback (most recent call last)",
    "PERMISSION DENIED",
]
NO_IMAGE = [
    "manifest for vastai/nothing:latest not found",
    "pull access denied for a/b, repository does not exist or may require authorization",
    "Error response from daemon: pull access denied for a/b",
    "unauthorized: authentication required",
    "failed to pull: manifest unknown",
]
PROGRESS = [
    "2741c81b500d: Pulling fs layer",
    "latest: Pulling from vastai/base-image",
    "e3b0c442: Pull complete\nDownloading [==>   ]  12.3MB/1.2GB",
    "Extracting",
    "",
    None,
    7,
]


@pytest.mark.parametrize("message", [*FATAL, *NO_IMAGE])
@pytest.mark.parametrize("actual", [None, "created", "loading"])
def test_a_container_that_never_comes_up(message: str, actual: str | None) -> None:
    """A message that is known to be fatal says why the machine will never be ready, and if its image is to blame."""
    found = parsed(actual_status=actual, status_msg=f"  {message} \n")
    assert found.failure.endswith(" ".join(message.split()))
    assert found.failure.startswith("its image cannot be had") == (message in NO_IMAGE)
    assert found.message == " ".join(message.split())


@pytest.mark.parametrize("message", PROGRESS)
def test_progress_is_no_failure(message: Any) -> None:
    """How far an image is, though it speaks of pulling, is a message and no failure."""
    found = parsed(actual_status="loading", status_msg=message)
    assert found.failure == ""
    assert found.message == (" ".join(message.split()) if isinstance(message, str) else "")


def test_what_is_no_failure_whatever_is_said() -> None:
    """A machine that runs has not failed; an image may be called anything; success is success."""
    assert parsed(status_msg="error in a log").failure == ""
    named = {"actual_status": "loading", "image_uuid": "me/error-analysis:1"}
    assert parsed(**named, status_msg="1: Pulling from me/error-analysis").failure == ""
    assert parsed(**named, status_msg="success, running me/other_error/ssh").failure == ""
    assert parsed(**named, status_msg="Error: no such image me/error-analysis").failure != ""
    assert len(parsed(actual_status="loading", status_msg="error " * 500).failure) <= 400


@pytest.mark.parametrize(
    ("changes", "endpoints"),
    [
        ({}, (DIRECT, PROXY)),
        ({"ports": None}, (PROXY,)),
        ({"ports": {}}, (PROXY,)),
        ({"ports": [8080]}, (PROXY,)),
        ({"ports": {"22/tcp": None}}, (PROXY,)),
        ({"ports": {"22/tcp": []}}, (PROXY,)),
        ({"ports": {"22/tcp": [None, {"HostPort": "40023"}]}}, (Endpoint("203.0.113.42", 40023), PROXY)),
        ({"ports": {"22/tcp": [{"HostPort": 40024}]}}, (Endpoint("203.0.113.42", 40024), PROXY)),
        ({"ports": {"22/tcp": [{"HostPort": "0"}]}}, (PROXY,)),
        ({"ports": {"22/tcp": [{"HostPort": "70000"}]}}, (PROXY,)),
        ({"ports": {"22/tcp": [{"HostPort": "22; id"}]}}, (PROXY,)),
        ({"ports": {"8000/tcp": [{"HostPort": "40022"}]}}, (PROXY,)),
        ({"public_ipaddr": None}, (PROXY,)),
        ({"public_ipaddr": "-oProxyCommand=id"}, (PROXY,)),
        ({"public_ipaddr": "0.0.0.0"}, (PROXY,)),
        ({"public_ipaddr": "203.0.113.42 203.0.113.43"}, (PROXY,)),
        ({"public_ipaddr": "fe80::1%eth0"}, (PROXY,)),
        ({"ssh_host": "ssh6.vast.ai.evil.example"}, (DIRECT,)),
        ({"ssh_host": "evilvast.ai"}, (DIRECT,)),
        ({"ssh_host": "-x.vast.ai"}, (DIRECT,)),
        ({"ssh_host": "a b.vast.ai"}, (DIRECT,)),
        ({"ssh_host": "ssh6.vast.ai\n"}, (DIRECT, PROXY)),
        ({"ssh_host": "SSH6.vast.ai"}, (DIRECT, PROXY)),
        ({"ssh_host": "127.0.0.1"}, (DIRECT, Endpoint("127.0.0.1", 15678))),
        ({"ssh_host": "localhost"}, (DIRECT, Endpoint("localhost", 15678))),
        ({"ssh_port": None}, (DIRECT,)),
        ({"ssh_port": "15678"}, (DIRECT, PROXY)),
        ({"ssh_port": True}, (DIRECT,)),
        ({"ssh_port": -1}, (DIRECT,)),
        ({"ssh_port": 15677, "image_runtype": "jupyter_direc ssh_direc ssh_proxy"}, (DIRECT, PROXY)),
        ({"ssh_port": 65535, "image_runtype": "jupyter"}, (DIRECT,)),
        ({"ports": None, "ssh_host": None}, ()),
    ],
    ids=str,
)
def test_the_ways_in(changes: dict[str, Any], endpoints: tuple[Endpoint, ...]) -> None:
    """Directly, then through the proxy: an address with its own port, only where both can stand in a command line."""
    assert parsed(**changes).endpoints == endpoints


def test_what_is_not_told_is_unknown() -> None:
    """An instance that is only a number is one: its marker, price, GPU and place are not known, and it may cost."""
    found = vast_answers.instance({"id": int(ID)})
    assert found == Instance(ID, None, "booting", "null", "root", (), "", None, None)
    assert parsed(search=None).price_usd_per_hour == 0.3083
    assert parsed(search={"totalHour": None}, dph_total=None).price_usd_per_hour is None
    assert parsed(label="mine, not theirs").marker is None
    assert parsed(label=f"{MARKER}x").marker is None


def pages(server: Server, listed: list[list[Any]], **more: Any) -> None:
    """Have the server list these, a page each."""

    def answer(asked: Asked) -> Scripted:
        at = int(asked.path.partition("after_token=page")[2] or 0)
        token = f"page{at + 1}" if at + 1 < len(listed) else None
        return Scripted(200, {"success": True, "instances": listed[at], "next_token": token, **more})

    server.usual = answer


def test_all_instances(vast: VastCloud, server: Server) -> None:
    """Everybody's instances are listed, through every page, stopped ones too: their disks cost."""
    others: list[Any] = [{"id": 2, "actual_status": "stopped"}, {"id": 3, "actual_status": "odd"}, {"id": "4"}]
    pages(server, [[INSTANCE], [], others, [INSTANCE]], total_instances=4)
    found = vast.instances()
    assert [(one.instance_id, one.state, one.marker) for one in found] == [
        (ID, "ready", MARKER),
        ("2", "stopped", None),
        ("3", "unknown", None),
        ("4", "booting", None),
    ]
    assert server.paths()[0].startswith("GET /api/v1/instances/?limit=25&order_by=")
    assert len(server.asked) == 4
    for nothing in (None, []):
        pages(server, [nothing], total_instances=0)  # type: ignore[list-item]
        assert vast.instances() == []


def test_a_list_that_is_not_whole_proves_nothing(vast: VastCloud, server: Server) -> None:
    """No list, an entry without an id, fewer than there are, or pages without end: an error, never an empty account."""
    document: Any
    for document in ({}, "x", 0, False, [None], [{"label": MARKER}], [{"id": "../x"}], [INSTANCE, 5], [[]]):
        server.usual = lambda _, document=document: Scripted(200, {"instances": document, "next_token": None})
        with pytest.raises(ProviderDown, match="is not known"):
            vast.instances()
    for listed, total in ((None, 3), ([INSTANCE], 2)):
        document = {"instances": listed, "total_instances": total}
        server.usual = lambda _, document=document: Scripted(200, document)
        with pytest.raises(ProviderDown, match=f"of {total}"):
            vast.instances()
    token: Any
    for token, asked in (("again", 2), ("", 1), (7, 1), ([], 1)):
        server.usual = lambda _, token=token: Scripted(200, {"instances": [], "next_token": token})
        server.asked.clear()
        with pytest.raises(ProviderDown, match="do not end"):
            vast.instances()
        assert len(server.asked) == asked
    server.usual = lambda _: Scripted(200, {"instances": [], "next_token": f"t{len(server.asked)}"})
    server.asked.clear()
    with pytest.raises(ProviderDown, match="do not end"):
        vast.instances()
    assert len(server.asked) == 50


def test_credit_and_volumes(vast: VastCloud, server: Server) -> None:
    """Credit is what is left, even below zero; volumes are told in words, with what they cost a month."""
    for value, left in ((12.5, 12.5), (-3, -3.0), (None, None), ("5", None), (True, None)):
        server.usual = lambda _, value=value: Scripted(200, {"id": 1, "credit": value, "balance": 99})
        assert vast.credit() == left
    vast.check_key()
    volumes = [{"id": 7, "disk_space": 100, "storage_total_cost": 0.0139}, {"id": None}, 5]
    server.usual = lambda _: Scripted(200, {"volumes": volumes})
    first, *rest = vast.storage()
    assert first == "volume 7 (100 GB): about $10.01 a month, until it is deleted"
    assert all("without an id" in words and "not known" in words for words in rest)
    for answer in (Scripted(404, b"<html>"), Scripted(404, {"error": "not_found"}), Scripted(200, {"volumes": None})):
        server.usual = lambda _, answer=answer: answer
        assert vast.storage() == []


@given(st.dictionaries(st.sampled_from(sorted(INSTANCE)), JSON, max_size=8), JSON)
def test_nothing_crashes_on_junk(changes: dict[str, Any], anything: Any) -> None:
    """Whatever is told of an instance, what comes of it can stand in a command line, and costs until it is gone."""
    for entry in ({**INSTANCE, **changes}, anything):
        found = vast_answers.instance(entry)
        if found is None:
            continue
        assert found.instance_id.isdigit()
        assert found.state != "gone"
        for endpoint in found.endpoints:
            assert 0 < endpoint.port < 65536
            assert not set(endpoint.host) - set("0123456789abcdefghijklmnopqrstuvwxyz.:-")
            assert endpoint.host[0] != "-"
        assert "\n" not in found.message + found.failure + found.raw_state + (found.region or "")
        assert found.price_usd_per_hour is None or found.price_usd_per_hour >= 0
    vast_answers.volume(anything)
    vast_answers.contract(anything)


@given(st.sampled_from([200, 204, 301, 400, 401, 403, 404, 410, 429, 483, 500, 503]), JSON)
def test_no_complaint_crashes(status: int, document: Any) -> None:
    """Any document is read as a complaint, or as none."""
    found = vast_answers.complaint(status, document)
    assert found is None or found.message
    assert found is not None or isinstance(document, dict) or status >= 300


@pytest.mark.parametrize(
    ("told", "region"),
    [
        ("California, US", "US-California"),
        ("New York, US", "US-New-York"),
        ("US", "US"),
        ("Île-de-France, FR", "FR-Ile-de-France"),
        (", SE", "SE"),
        ("Sweden, SE; rm -rf /", "SE-rm-rf-Sweden"),
        ("日本", None),
        ("", None),
        (None, None),
        (7, None),
    ],
)
def test_a_place_in_one_word(told: Any, region: str | None) -> None:
    """A place is one word that can be typed, the country first."""
    assert vast_answers.region(told) == region

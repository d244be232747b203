"""Lambda Cloud as its API documents it: what is asked, once or again, and what the answers become."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError, NoCapacity, ProviderDown, Refused
from orchestrator.providers import lambda_cloud
from orchestrator.providers.base import MARKER_TAG, Endpoint, Instance, Need, Offer, Order, new_marker
from orchestrator.providers.lambda_cloud import LambdaCloud
from tests.orchestrator.providers.loopback import HTML, Scripted, Server, Time, error

SPECS = Path(__file__).parents[4] / "shared" / "reference" / "provider_specs"
ID = "0920582c7ff041399e34823a0be62549"
MARKER = "gpu-20260101t120000-7f3a9c001122"
OFFER = Offer("lambda", "gpu_1x_a10@us-west-1", "gpu_1x_a10", "A10", 1, 24.0, 30, 200, 1400, "us-west-1", 0.75)
ORDER = Order(MARKER, "gpu-cli-1a2b", "#cloud-config\nruncmd: []\n", {"gpu-run": "counting"})
LAUNCHED = Scripted(200, {"data": {"instance_ids": [ID]}})
KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T"
INSTANCE: dict[str, Any] = {
    "id": ID,
    "name": MARKER,
    "ip": "198.51.100.2",
    "status": "active",
    "ssh_key_names": ["gpu-cli-1a2b"],
    "file_system_names": [],
    "region": {"name": "us-west-1", "description": "California, USA"},
    "instance_type": {"name": "gpu_1x_a10", "price_cents_per_hour": 75},
    "jupyter_token": "03b7d30d9d3e4d8fa41657bc0d478c1b",
    "jupyter_url": "https://jupyter.example/?token=03b7d30d9d3e4d8fa41657bc0d478c1b",
    "tags": [{"key": MARKER_TAG, "value": MARKER}],
}


def data(document: Any) -> Scripted:
    return Scripted(200, {"data": document})


def spec(name: str) -> Any:
    """A real document of the provider, where a developer has it beside the project."""
    if not (SPECS / name).is_file():
        pytest.skip(f"no provider specifications beside the project: {name}")
    return json.loads((SPECS / name).read_text())


def test_a_launch_asks_for_one_machine_once(cloud: LambdaCloud, server: Server) -> None:
    """The request has the region, the type, one key, no file systems, the marker as name and tag, and no quantity."""
    server.script = [LAUNCHED]
    assert cloud.launch(OFFER, ORDER) == ID
    assert server.paths() == ["POST /api/v1/instance-operations/launch"]
    assert server.asked[0].body == {
        "region_name": "us-west-1",
        "instance_type_name": "gpu_1x_a10",
        "ssh_key_names": ["gpu-cli-1a2b"],
        "file_system_names": [],
        "name": MARKER,
        "tags": [{"key": "gpu-run", "value": "counting"}, {"key": MARKER_TAG, "value": MARKER}],
        "user_data": "#cloud-config\nruncmd: []\n",
    }
    server.script = [LAUNCHED]
    cloud.launch(OFFER, Order(MARKER, "k", "", {MARKER_TAG: "not ours"}))
    assert server.asked[1].body["tags"] == [{"key": MARKER_TAG, "value": MARKER}]
    assert "user_data" not in server.asked[1].body


def test_a_launch_is_what_the_specification_allows(cloud: LambdaCloud, server: Server) -> None:
    """Every field of a launch is one of the published API's, in its form, and none that it requires is missing."""
    api = spec("lambda_openapi_v1.10.0.json")
    path = "/api/v1/instance-operations/launch"
    schema = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    tag = api["components"]["schemas"]["RequestedTagEntry"]["properties"]
    server.script = [LAUNCHED]
    cloud.launch(OFFER, Order(new_marker("2026-01-01T12:00:00Z"), "k", "#!/bin/sh\n"))
    body = server.asked[0].body
    assert set(schema["required"]) <= set(body) <= set(schema["properties"])
    assert len(body["name"]) <= schema["properties"]["name"]["maxLength"]
    for entry in body["tags"]:
        assert re.search(tag["key"]["pattern"], entry["key"])
        assert len(entry["key"]) <= tag["key"]["maxLength"]
        assert len(entry["value"]) <= tag["value"]["maxLength"]


def test_launches_are_twelve_seconds_apart(cloud: LambdaCloud, server: Server, time: Time) -> None:
    """Launches keep the provider's own limit, other calls one second; a launch has three minutes to answer."""
    server.usual = lambda asked: LAUNCHED if "launch" in asked.path else data({})
    for ask in (lambda: cloud.launch(OFFER, ORDER), lambda: cloud.offers(Need()), lambda: cloud.launch(OFFER, ORDER)):
        ask()
    first, read, second = (asked.at for asked in server.asked)
    assert 1 <= read - first < 2
    assert 12 <= second - first < 14
    assert lambda_cloud._LAUNCH_READ_S >= 120


def test_what_cannot_be_rented_is_not_asked_for(cloud: LambdaCloud, server: Server) -> None:
    """An offer without a region, and a start script that is too long, cost no request."""
    with pytest.raises(NoCapacity, match="Nothing was rented"):
        cloud.launch(Offer("lambda", "x", "x", None, 0, None, None, None, None, None, 1.0, available=False), ORDER)
    with pytest.raises(Refused, match="1 MB"):
        cloud.launch(OFFER, Order(MARKER, "k", "#" * 1_000_001))
    assert server.asked == []


def test_offers_that_are_none(cloud: LambdaCloud, server: Server) -> None:
    """An answer that is no catalogue is not read as one without machines."""
    document: Any
    for document in (None, [], "x", 5):
        server.usual = lambda _, document=document: data(document)
        with pytest.raises(ProviderDown, match="no catalogue"):
            cloud.offers(Need(gpu="A10"))
    server.usual = lambda _: data({})
    assert cloud.offers(Need()) == []


def test_one_instance(cloud: LambdaCloud, server: Server) -> None:
    """An instance has its marker, its login and its price, and neither Jupyter's token nor its address."""
    server.usual = lambda _: data(INSTANCE)
    found = cloud.get(ID)
    assert found == Instance(
        instance_id=ID,
        marker=MARKER,
        state="ready",
        raw_state="active",
        user="ubuntu",
        endpoints=(Endpoint("198.51.100.2", 22),),
        type_name="gpu_1x_a10",
        region="us-west-1",
        price_usd_per_hour=0.75,
        key_names=("gpu-cli-1a2b",),
        tags={MARKER_TAG: MARKER},
    )
    assert server.paths() == [f"GET /api/v1/instances/{ID}"]
    assert "jupyter" not in repr(vars(found))
    assert "03b7d30d" not in repr(vars(found))


def test_absent_is_only_what_lambda_says_is_absent(cloud: LambdaCloud, server: Server) -> None:
    """None comes of a 404 with Lambda's own code alone; any other 404, or another's instance, is no proof."""
    for code in ("global/object-does-not-exist", "global/not-found"):
        server.usual = lambda _, code=code: Scripted(404, error(code))
        assert cloud.get(ID) is None
    no_proof = [
        Scripted(404, HTML),
        Scripted(404, b""),
        Scripted(404, {"detail": "Not Found"}),
        Scripted(404, {"success": False, "error": "auth_error"}),
        Scripted(404, error("global/something-else")),
        Scripted(400, error("global/object-does-not-exist")),
        Scripted(500, error("global/object-does-not-exist")),
        data(None),
        data([]),
        data({}),
        data({**INSTANCE, "id": "f" * 32}),
    ]
    for answer in no_proof:
        server.usual = lambda _, answer=answer: answer
        with pytest.raises((ProviderDown, Refused)):
            cloud.get(ID)


def test_all_instances(cloud: LambdaCloud, server: Server) -> None:
    """Everybody's instances are listed, through every page; those that are terminated are not."""
    others = [{"id": "a1", "status": "booting"}, {"id": "b2", "status": "terminated"}, {"id": "c3", "status": "new"}]
    pages = {"": ([INSTANCE], "two"), "?page_token=two": (others, None)}
    server.usual = lambda asked: Scripted(
        200,
        dict(zip(("data", "page_token"), pages[asked.path.removeprefix("/api/v1/instances")], strict=True)),
    )
    found = cloud.instances()
    assert [(one.instance_id, one.state, one.marker) for one in found] == [
        (ID, "ready", MARKER),
        ("a1", "booting", None),
        ("c3", "unknown", None),
    ]


def test_a_list_that_is_not_whole_proves_nothing(cloud: LambdaCloud, server: Server) -> None:
    """No list, an instance without an id, or pages without end are an error, never an empty account."""
    document: Any
    for document in (None, {}, "x", [None], [{"status": "active"}], [{"id": "../x"}], [INSTANCE, 5]):
        server.usual = lambda _, document=document: data(document)
        with pytest.raises(ProviderDown):
            cloud.instances()
    server.usual = lambda _: Scripted(200, {"data": [], "page_token": "again"})
    server.asked.clear()
    with pytest.raises(ProviderDown, match="no whole list"):
        cloud.instances()
    assert len(server.asked) == 2
    server.usual = lambda _: Scripted(200, {"data": [], "page_token": f"t{len(server.asked)}"})
    server.asked.clear()
    with pytest.raises(ProviderDown, match="no whole list"):
        cloud.instances()
    assert len(server.asked) == 50


def test_an_id_cannot_lead_elsewhere(cloud: LambdaCloud, server: Server) -> None:
    """What cannot be an id never becomes a path."""
    for wrong in ("", "..", "a/b", "a?b", "a b", "a\n", "ä", "x" * 129):
        with pytest.raises(Refused, match="cannot be the id"):
            cloud.get(wrong)
        with pytest.raises(Refused, match="cannot be the id"):
            cloud.terminate(wrong)
    assert server.asked == []


def test_the_same_key_is_the_same_name(cloud: LambdaCloud, server: Server) -> None:
    """A key that is there under any name and comment is found by itself; one that is not is sent, without a comment."""
    listed = [
        {"id": "1", "name": "else", "public_key": "ssh-ed25519 AAAAother me"},
        {"id": "2", "name": None, "public_key": KEY_LINE},
        {"id": "3", "name": "theirs", "public_key": f"{KEY_LINE}  somebody@there\n"},
        {"id": "4", "name": "pem", "public_key": "---- BEGIN SSH2 PUBLIC KEY ----"},
        {"id": "5", "name": "none", "public_key": None},
    ]
    server.script = [data(listed)]
    assert cloud.ensure_key(f"{KEY_LINE} me@here\n", "gpu-cli-x") == "theirs"
    assert server.paths() == ["GET /api/v1/ssh-keys"]
    server.script = [data(listed[:1]), data({"id": "9", "name": "gpu-cli-x", "public_key": KEY_LINE})]
    assert cloud.ensure_key(f"{KEY_LINE} me@here\n", "gpu-cli-x") == "gpu-cli-x"
    assert server.asked[-1].body == {"name": "gpu-cli-x", "public_key": KEY_LINE}
    server.script = [data(listed)]
    assert cloud.key_names() == ["else", "theirs", "pem", "none"]


def test_a_name_that_stands_for_two_keys_is_not_taken(cloud: LambdaCloud, server: Server) -> None:
    """A launch names its key: when another key has the same name, an own one is sent."""
    twice = [{"id": "1", "name": "n", "public_key": "ssh-rsa AAAA"}, {"id": "2", "name": "n", "public_key": KEY_LINE}]
    server.script = [data(twice), data({"id": "3", "name": "gpu-cli-x", "public_key": KEY_LINE})]
    assert cloud.ensure_key(KEY_LINE, "gpu-cli-x") == "gpu-cli-x"
    same = [{"id": "1", "name": "n", "public_key": KEY_LINE}] * 2
    server.script = [data(same)]
    assert cloud.ensure_key(KEY_LINE, "gpu-cli-x") == "n"


def test_only_a_public_key_is_sent(cloud: LambdaCloud, server: Server) -> None:
    """A private key, two lines or an empty text never leave this computer, and are not shown."""
    private = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----"
    for text in (private, f"{KEY_LINE}\n{KEY_LINE}", "", "ssh-ed25519", 'command="x" ' + KEY_LINE):
        with pytest.raises(ConfigError) as caught:
            cloud.ensure_key(text, "x")
        assert "b3Blbn" not in str(caught.value)
    assert server.asked == []


@pytest.mark.parametrize(
    "answer",
    [
        Scripted(400, error("global/invalid-parameters")),
        Scripted(400, error("global/duplicate")),
        Scripted(502, HTML),
        Scripted(fault="close"),
        Scripted(200, b""),
    ],
)
def test_a_lost_answer_to_a_key_is_looked_up(cloud: LambdaCloud, server: Server, answer: Scripted) -> None:
    """After any failure the keys are listed again: one that is there counts, one that is not is an error."""
    there = {"id": "3", "name": "gpu-cli-x", "public_key": KEY_LINE}
    server.script = [data([]), answer, data([there])]
    assert cloud.ensure_key(KEY_LINE, "gpu-cli-x") == "gpu-cli-x"
    server.script = [data([]), answer, data([])]
    with pytest.raises((Refused, ProviderDown), match="take the public key gpu-cli-x"):
        cloud.ensure_key(KEY_LINE, "gpu-cli-x")
    assert [path.split()[0] for path in server.paths()] == ["GET", "POST", "GET"] * 2


def test_a_key_is_taken_out(cloud: LambdaCloud, server: Server) -> None:
    """The keys of the name go, no other; what is gone already is success; what cannot go is said."""
    listed = [{"id": "1", "name": "a", "public_key": ""}, {"id": "2", "name": "b", "public_key": ""}]
    server.script = [data(listed), data({})]
    cloud.remove_key("b")
    assert server.paths() == ["GET /api/v1/ssh-keys", "DELETE /api/v1/ssh-keys/2"]
    for code in ("global/object-does-not-exist", "global/not-found"):
        server.script = [data(listed), Scripted(502, HTML), Scripted(404, error(code))]
        cloud.remove_key("b")
    server.script = [data(listed)]
    cloud.remove_key("c")
    server.script = [data(listed), Scripted(400, error("ssh-keys/key-in-use"))]
    with pytest.raises(Refused, match="remove the public key b"):
        cloud.remove_key("b")


def test_file_systems_that_keep_costing(cloud: LambdaCloud, server: Server) -> None:
    """Each file system is named with its size and an estimate of its price; an odd one is named, too."""
    odd = [None, {"name": "b", "bytes_used": -1}, {"name": "c\x1b[2J", "bytes_used": 10**400, "region": {"name": "r"}}]
    server.script = [data([{"name": "a", "region": {"name": "us-west-1"}, "bytes_used": 12_300_000_000}, *odd])]
    unknown = "its size is not known, $0.20 a GB and month, until it is deleted"
    assert cloud.storage() == [
        "file system a (us-west-1): 12.3 GB, about $2.46 a month, until it is deleted",
        f"file system without a name (region unknown): {unknown}",
        f"file system b (region unknown): {unknown}",
        f"file system c (r): {unknown}",
    ]
    assert server.paths() == ["GET /api/v1/file-systems"]


def test_the_environment_leads_elsewhere(server: Server, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's server may have a path before the API's and machines on another port; nonsense is an error."""
    monkeypatch.setenv("GPU_LAMBDA_URL", f"{server.url}/lambda/")
    monkeypatch.setenv("GPU_LAMBDA_SSH_PORT", "2201")
    server.usual = lambda _: data(INSTANCE)
    found = LambdaCloud("some-long-key").get(ID)
    assert found is not None
    assert (server.paths(), found.port) == ([f"GET /lambda/api/v1/instances/{ID}"], 2201)
    for port in ("0", "65536", "x", "-1", "²²"):
        monkeypatch.setenv("GPU_LAMBDA_SSH_PORT", port)
        with pytest.raises(ConfigError, match="GPU_LAMBDA_SSH_PORT"):
            LambdaCloud("some-long-key")
    monkeypatch.delenv("GPU_LAMBDA_SSH_PORT")
    monkeypatch.setenv("GPU_LAMBDA_URL", "http://cloud.lambda.ai")
    with pytest.raises(ConfigError, match="not sent"):
        LambdaCloud("some-long-key")

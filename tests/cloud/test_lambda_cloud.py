"""The stand-in keeps to the published specification, its timeline and its bills."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cloud import Clock, Fault, LambdaCloud, catalogue, control
from tests.cloud.answers import Answer, Failure
from tests.cloud.asking import LAUNCH, ORDER, PUBLIC_KEY, TERMINATE, ask, end, launch, raw

Ask = Callable[..., tuple[int, Any]]


# --- the specification -----------------------------------------------------------------------------------------------


class Specification:
    """The provider's OpenAPI document; every answer is looked up in it."""

    def __init__(self, path: Path) -> None:
        self.document = json.loads(path.read_text(encoding="utf-8"))
        self.seen: set[tuple[str, str, int]] = set()

    def check(self, method: str, path: str, answer: Answer) -> None:
        """Fails the test when this is not an answer to that request by the document."""
        template = next(it for it in self.document["paths"] if _matches(it, f"/api/v1{path}"))
        found = self.document["paths"][template][method.lower()]["responses"][str(answer.status)]
        schema = found["content"]["application/json"]["schema"] | {"components": self.document["components"]}
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(answer.body))
        assert answer.headers["Content-Type"] == "application/json"
        self.seen.add((method, template.removeprefix("/api/v1"), answer.status))


def _matches(template: str, path: str) -> bool:
    ours, theirs = template.split("/"), path.split("/")
    return len(ours) == len(theirs) and all(a == b or a.startswith("{") for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def specification() -> Specification | None:
    found = sorted(catalogue.FIXTURES.glob("lambda_openapi_*.json"))
    return Specification(found[-1]) if found else None


@pytest.fixture
def tour(core: LambdaCloud, specification: Specification | None) -> Ask:
    """Asks, and has every answer looked up in the specification where it lies beside the project."""

    def step(method: str, path: str, content: Any = None, key: str | None = None) -> tuple[int, Any]:
        answer = raw(core, method, path, content, key)
        if specification is not None:
            specification.check(method, path, answer)
        found = json.loads(answer.body)
        return answer.status, found.get("data", found.get("error", {}).get("code"))

    return step


def test_an_instance_s_whole_life_is_as_specified(core: LambdaCloud, clock: Clock, tour: Ask) -> None:
    """From launch to 404 every answer about an instance, of each status on its way, fits the specification."""
    core.account.add_file_system(b'{"name": "fs", "region": "us-west-1"}')
    full = {"file_system_names": ["fs"], "hostname": "h1", "image": {"family": "lambda-stack-22-04"}, "user_data": "#!"}
    full |= {"tags": [{"key": "gpu-marker", "value": "gpu-a"}]}
    _, made = tour("POST", LAUNCH, ORDER | full)
    name, seen = made["instance_ids"][0], []
    for step in (0.1, 0.2, 0.9, 0.2):
        clock.advance(step)
        seen.append(tour("GET", f"/instances/{name}"))
        tour("GET", "/instances")
    assert [code for code, _ in seen] == [404, 200, 200, 200]
    assert [(it["status"], "ip" in it) for _, it in seen[1:]] == [
        ("booting", False),
        ("active", True),
        ("active", True),
    ]
    assert tour("POST", f"/instances/{name}", {"name": "other"})[1]["name"] == "other"
    assert tour("POST", f"/instances/{name}", {"name": 7})[0] == 400
    assert tour("POST", "/instance-operations/restart", {"instance_ids": [name]})[0] == 200
    assert tour("POST", "/instance-operations/restart", {"instance_ids": [name]}) == (409, "global/conflict")
    clock.advance(1)
    assert tour("POST", TERMINATE, {"instance_ids": [name]})[1]["terminated_instances"][0]["status"] == "terminating"
    for wanted in ("terminated", "global/object-does-not-exist"):
        clock.advance(1)
        found = tour("GET", f"/instances/{name}")[1]
        assert found == wanted or found["status"] == wanted
    assert tour("GET", "/instances") == (200, [])


def test_all_other_endpoints_are_as_specified(core: LambdaCloud, tour: Ask) -> None:
    """Keys, file systems, images, regions, types and firewall rules answer as the specification has it."""
    for path in ("/instance-types", "/images", "/regions", "/file-systems", "/firewall-rules"):
        assert tour("GET", path)[0] == 200
    made = tour("POST", "/ssh-keys", {"name": "made here"})[1]
    assert made["private_key"].startswith("-----BEGIN RSA PRIVATE KEY-----")
    assert [sorted(key) for key in tour("GET", "/ssh-keys")[1]] == [["id", "name", "public_key"]] * 2
    assert tour("POST", "/ssh-keys", {"name": "made here", "public_key": PUBLIC_KEY})[0] == 400
    assert tour("POST", "/ssh-keys", {"name": "x", "public_key": "not one"})[0] == 400
    assert tour("DELETE", f"/ssh-keys/{made['id']}") == (200, {})
    assert tour("DELETE", f"/ssh-keys/{made['id']}") == (404, "global/not-found")
    disk = tour("POST", "/filesystems", {"name": "disk", "region": "us-west-1"})[1]
    assert tour("POST", "/filesystems", {"name": "disk", "region": "us-west-1"}) == (400, "global/duplicate")
    assert tour("POST", "/filesystems", {"name": "7", "region": "us-west-1"})[0] == 400
    used = launch(core, file_system_names=["disk"])
    assert tour("DELETE", f"/filesystems/{disk['id']}") == (400, "filesystems/filesystem-in-use")
    assert tour("GET", "/file-systems")[1][0]["is_in_use"]
    core.instances[used].ending_at = 0.0
    assert tour("DELETE", f"/filesystems/{disk['id']}")[1] == {"deleted_ids": [disk["id"]]}
    assert tour("DELETE", f"/filesystems/{disk['id']}")[0] == 404
    rule = {"protocol": "tcp", "port_range": [80, 81], "source_network": "192.0.2.1", "description": "web"}
    assert tour("PUT", "/firewall-rules", {"data": [rule]})[1] == [rule | {"source_network": "192.0.2.1/32"}]
    assert tour("PUT", "/firewall-rules", {"data": [rule | {"protocol": "icmp"}]})[0] == 400
    assert raw(core, "POST", "/file-systems", {"name": "a", "region": "b"}).status == 405


def test_every_refusal_is_as_specified(core: LambdaCloud, tour: Ask) -> None:
    """A wrong key, an inactive account and everything a launch is refused for fit the specification."""
    for path in ("/instances", "/ssh-keys", "/instance-types", "/file-systems", "/images"):
        assert tour("GET", path, key="wrong") == (401, "global/invalid-api-key")
        core.faults.add(Fault("inactive"))
        assert tour("GET", path) == (403, "global/account-inactive")
    for change in ({"region_name": None}, {"ssh_key_names": []}, {"name": "x" * 65}, {"quantity": 2}, {"image": {}}):
        assert tour("POST", LAUNCH, ORDER | change) == (400, "global/invalid-parameters")
    for status in (400, 404):
        core.unknown_status = status
        for change in ({"ssh_key_names": ["no"]}, {"instance_type_name": "no"}, {"region_name": "no"}):
            assert tour("POST", LAUNCH, ORDER | change) == (status, "global/object-does-not-exist")
    full = {"instance_type_name": catalogue.FULL, "region_name": "us-west-2"}
    assert tour("POST", LAUNCH, ORDER | full) == (400, "instance-operations/launch/insufficient-capacity")
    core.quota = 0
    assert tour("POST", LAUNCH, ORDER) == (400, "global/quota-exceeded")
    assert tour("POST", TERMINATE, {"instance_ids": ["no"]}) == (404, "global/object-does-not-exist")
    assert tour("POST", TERMINATE, {})[0] == tour("POST", TERMINATE, {"instance_ids": []})[0] == 400
    assert core.instances == {}


def test_answers_are_looked_up(core: LambdaCloud, specification: Specification | None) -> None:
    """An answer that lacks a field, or has one of another type, does not pass; skipped without the document."""
    if specification is None:
        pytest.skip("no OpenAPI document of the provider beside the project: answers were not looked up")
    launch(core)
    found = json.loads(raw(core, "GET", "/instances").body)["data"] or [core.ours()[0].shown(core.clock())]
    for change in ({"status": "rebalancing"}, {"ip": 7}, {"ssh_key_names": None}, {"actions": {}}):
        wrong = Answer(200, {"Content-Type": "application/json"}, json.dumps({"data": [found[0] | change]}).encode())
        with pytest.raises(jsonschema.ValidationError):
            specification.check("GET", "/instances", wrong)


def test_recorded_answers_serve_as_the_catalogue(core: LambdaCloud, tour: Ask) -> None:
    """The catalogue of recorded answers, where it lies beside the project, is served and launched from."""
    found = catalogue.recorded()
    if found is None:
        pytest.skip("no recorded answers beside the project")
    core.catalogue = found
    types = tour("GET", "/instance-types")[1]
    assert len(types) == 20
    assert len(tour("GET", "/images")[1]) > 100
    name = next(name for name, row in types.items() if row["regions_with_capacity_available"])
    at = types[name]["regions_with_capacity_available"][0]["name"]
    assert tour("POST", LAUNCH, ORDER | {"instance_type_name": name, "region_name": at})[0] == 200
    assert all(catalogue.gpus_of(row["instance_type"]).memory_mib > 15_000 for row in types.values())


# --- the core --------------------------------------------------------------------------------------------------------


def test_all_three_ways_to_show_the_key_are_accepted(core: LambdaCloud) -> None:
    """Bearer, Basic with the key encoded as a user, and Basic with the bare key are let in; nothing else is."""
    encoded = base64.b64encode(f"{core.key}:".encode()).decode()
    for given in (f"Bearer {core.key}", f"Basic {encoded}", f"Basic {core.key}"):
        assert core.handle("GET", "/api/v1/instances", {"Authorization": given}).status == 200
    for given in ("", core.key, f"Bearer {core.key}x", f"Bearer {encoded}"):
        assert core.handle("GET", "/api/v1/instances", {"Authorization": given}).status == 401


def test_the_same_seed_gives_the_same_ids(clock: Clock) -> None:
    """Two stand-ins with one seed name things alike, with another seed otherwise."""
    ids = [[LambdaCloud(clock, seed).new_id() for _ in range(1)] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_rates_are_enforced_where_wanted(core: LambdaCloud, clock: Clock) -> None:
    """With the knob on, a second request within a second and a second launch within 12 s are answered 429."""
    core.enforces_rates = True
    assert [raw(core, "GET", "/instances").status for _ in range(2)] == [200, 429]
    clock.advance(1)
    launch(core)
    for wait_s, wanted in [(0.5, 429), (10.5, 429), (1.0, 200)]:
        clock.advance(wait_s)
        assert raw(core, "POST", LAUNCH, ORDER).status == wanted
    assert core.per_name() == {"gpu-a": 2}


def test_bills_are_exact(core: LambdaCloud, clock: Clock) -> None:
    """An instance costs money from launch until it is terminated, in minutes begun, whatever else becomes of it."""
    began, first = clock(), launch(core)
    second = launch(core, instance_type_name="gpu_8x_h100_sxm5", region_name="us-south-2", name="gpu-b")
    clock.advance(59.6)
    assert end(core, first)[0] == 200
    assert len(core.still_billing()) == 2
    clock.advance(0.6)
    assert [it.instance_id for it in core.still_billing()] == [second]
    clock.advance(3540.3)
    one, other = core.bills()
    assert (one.began, one.ended, one.cents) == (began, pytest.approx(began + 60.1), Fraction(2 * 75, 60))
    assert (other.ended, other.cents) == (None, Fraction(61 * 2392, 60))
    assert core.cents() == one.cents + other.cents
    end(core, second)
    clock.advance(100)
    assert core.still_billing() == []
    assert core.bills()[1].cents == Fraction(61 * 2392, 60)


def test_foreign_instances_are_not_billed_to_us_and_watched(core: LambdaCloud, clock: Clock) -> None:
    """Other people's instances are listed and cost us nothing; whoever ends one is told of."""
    theirs = core.add_foreign("gpu-a2")
    ours = launch(core)
    clock.advance(2)
    assert {it["id"] for it in ask(core, "GET", "/instances")[1]} == {theirs.instance_id, ours}
    assert [it.instance_id for it in core.still_billing()] == [ours]
    end(core, ours)
    assert core.touched_foreign == []
    end(core, theirs.instance_id)
    assert core.touched_foreign == [theirs.instance_id]


def test_a_doubled_launch_is_seen(core: LambdaCloud) -> None:
    """Two launches under one name are counted, also when an instance is renamed later."""
    renamed = launch(core)
    launch(core)
    ask(core, "POST", f"/instances/{renamed}", {"name": "else"})
    assert core.per_name() == {"gpu-a": 2}


def test_control_sets_knobs_or_says_why_not(core: LambdaCloud, clock: Clock) -> None:
    """What is asked of control is done and reported; a word it does not know is refused and nothing is done."""
    said = control.apply(core, {"faults": [{"what": "quota"}], "timings": {"boot_s": 7}, "foreign": ["x"], "quota": 3})
    assert (said["timings"]["boot_s"], len(said["faults"]), core.quota, len(core.instances)) == (7, 1, 3, 1)
    for wrong in ({"faults": [{"what": "nonsense"}]}, {"faults": [{"wat": 1}]}, {"timings": {"x": 1}}, {"clar": True}):
        with pytest.raises(Failure):
            control.apply(core, wrong | {"foreign": ["y"]})
    assert len(core.instances) == 1
    assert control.apply(core, {"clear": True})["faults"] == []

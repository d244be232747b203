"""The stand-in for Vast over sockets and through the adapter, alone and beside the other cloud on one server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import requests

from tests.cloud import Both, Clock, Fault, Server, Vast
from tests.cloud.adapter import CloudAdapter
from tests.cloud.asking import LAUNCH
from tests.cloud.asking import ORDER as LAMBDA_ORDER
from tests.cloud.vast_asking import ORDER, best, launch
from tests.cloud.vast_cloud import VastCloud
from tests.waiting import until

READ_S = 0.3


@dataclass
class Client:
    """A session that speaks to a core, over sockets or not."""

    core: VastCloud
    session: requests.Session
    url: str

    def put(self, path: str, content: object) -> requests.Response:
        """The answer, redirects not followed."""
        url, timeout = f"{self.url}/api/v0{path}", (READ_S, READ_S)
        return self.session.put(url, json=content, timeout=timeout, allow_redirects=False)


@pytest.fixture(params=["sockets", "adapter"])
def client(request: pytest.FixtureRequest, vast: VastCloud) -> Iterator[Client]:
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {vast.key}"
        if request.param == "adapter":
            vast.url = "http://stand-in/vast"
            session.mount("http://stand-in", CloudAdapter(vast))
            yield Client(vast, session, vast.url)
        else:
            with Server(vast, "127.9.8.7") as server:
                yield Client(vast, session, server.url)


SEEN = {
    "not-sent": (requests.ConnectionError, False),
    "closed": (requests.ConnectionError, False),
    "hang": (requests.ReadTimeout, False),
    "lost-closed": (requests.ConnectionError, True),
    "lost-hang": (requests.ReadTimeout, True),
    "lost-half": (requests.exceptions.ChunkedEncodingError, True),
    "lost-502": (502, True),
    "lost-empty": (200, True),
    "redirect": (301, False),
    "success-false": (200, False),
    "rate-limited-text": (429, False),
}


@pytest.mark.parametrize("what", SEEN)
def test_a_client_sees_each_fault_alike(client: Client, what: str) -> None:
    """Over sockets and through the adapter a fault is the same error or status, after or before the effect."""
    wanted, is_done = SEEN[what]
    ask_id = best(client.core)
    client.core.faults.add(Fault(what, when="launch"))
    if isinstance(wanted, int):
        assert client.put(f"/asks/{ask_id}/", ORDER).status_code == wanted
    else:
        with pytest.raises(wanted) as caught:
            client.put(f"/asks/{ask_id}/", ORDER)
        assert type(caught.value) is wanted
    assert len(client.core.still_billing()) == is_done
    assert client.put(f"/asks/{best(client.core)}/", ORDER).json()["new_contract"]


def test_queries_and_results_come_through(client: Client, clock: Clock) -> None:
    """The newer list with its query, and a result at its own address, are answered on both ways."""
    for label in ("gpu-a", "gpu-b"):
        launch(client.core, label=label)
    clock.advance(2)
    query = {"select_filters": json.dumps({"label": {"eq": "gpu-b"}}), "limit": "25"}
    found = client.session.get(f"{client.url}/api/v1/instances/", params=query).json()
    assert [row["label"] for row in found["instances"]] == ["gpu-b"]
    (row,) = found["instances"]
    client.core.instances[str(row["id"])].log = "hello\n"
    url = client.put(f"/instances/request_logs/{row['id']}/", {}).json()["result_url"]
    assert url.startswith(client.url)
    assert client.session.get(url).status_code == 400
    del client.session.headers["Authorization"]
    assert [client.session.get(url).status_code for _ in range(2)] == [403, 200]
    assert client.session.get(url).text == "hello\n"


def test_thousands_of_runs_take_seconds(vast: VastCloud, clock: Clock) -> None:
    """Through the adapter hundreds of lives of instances, five calls each, take a second or two, and leave nothing."""
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {vast.key}"
        session.mount("http://stand-in", CloudAdapter(vast))
        url = "http://stand-in/vast/api/v0"
        for _ in range(200):
            offers = session.post(f"{url}/bundles/", json={"num_gpus": {"eq": 1}, "limit": 3}).json()["offers"]
            name = session.put(f"{url}/asks/{offers[0]['id']}/", json=ORDER).json()["new_contract"]
            clock.advance(2)
            found = session.get(f"{url}/instances/{name}/").json()["instances"]
            assert found["actual_status"] == "running"
            session.delete(f"{url}/instances/{name}/", json={})
            clock.advance(2)
            assert session.get(f"{url}/instances/{name}/").json() == {"instances": None}
    assert vast.still_billing() == []
    assert len(vast.bills()) == 200


def test_one_offer_is_had_by_one_of_many(light_vast: Vast) -> None:
    """Of twenty clients who take one offer at once, one gets it; the others are told that it is gone."""
    ask_id = best(light_vast.core)
    headers = {"Authorization": f"Bearer {light_vast.key}"}

    def take(number: int) -> int:
        order = ORDER | {"label": f"n{number}"}
        return requests.put(f"{light_vast.url}/api/v0/asks/{ask_id}/", json=order, headers=headers).status_code

    with ThreadPoolExecutor(20) as pool:
        found = sorted(pool.map(take, range(20)))
    assert found == [200] + [404] * 19
    assert len(light_vast.core.still_billing()) == 1


def test_the_fixture_names_itself_to_the_program(light_vast: Vast) -> None:
    """The environment has the address and the key; faults are set and reported over HTTP, too."""
    assert (os.environ["GPU_VAST_URL"], os.environ["VAST_API_KEY"]) == (light_vast.url, light_vast.key)
    assert light_vast.url.endswith("/vast")
    place = f"{light_vast.url}/__control"
    said = requests.post(place, json={"faults": [{"what": "outbid"}], "foreign": ["gpu-x"], "gone_status": 404}).json()
    assert [fault["what"] for fault in said["faults"]] == ["outbid"]
    assert requests.post(place, json={"faults": [{"what": "preempted"}]}).status_code == 400
    headers = {"Authorization": f"Bearer {light_vast.key}"}
    assert requests.get(f"{light_vast.url}/api/v0/instances/1/", headers=headers).status_code == 404
    assert light_vast.fault("tmux").what == "tmux"


def test_both_clouds_stand_on_one_server(light_both: Both) -> None:
    """Each at its own place, with its own key, faults and bills; a key of one is nothing at the other."""
    one, other = light_both.lambda_cloud, light_both.vast
    assert (os.environ["GPU_LAMBDA_URL"], os.environ["GPU_VAST_URL"]) == (one.url, other.url)
    assert one.url.rpartition("/")[0] == other.url.rpartition("/")[0]
    one.core.account.add_key(b'{"name": "mine", "public_key": "ssh-ed25519 AAAA"}')
    one.fault("lost-502")
    theirs = {"Authorization": f"Bearer {one.key}"}, {"Authorization": f"Bearer {other.key}"}
    assert requests.post(f"{one.url}/api/v1{LAUNCH}", json=LAMBDA_ORDER, headers=theirs[0]).status_code == 502
    path = f"{other.url}/api/v0/asks/{best(other.core)}/"
    assert requests.put(path, json=ORDER, headers=theirs[0]).status_code == 404
    assert requests.put(path, json=ORDER, headers=theirs[1]).status_code == 200
    assert [len(it.core.still_billing()) for it in (one, other)] == [1, 1]
    assert [it.core.count("launch") for it in (one, other)] == [1, 2]
    assert requests.get(f"{other.url}/__control").json()["per_name"] == {"gpu-a": 1}
    for core in (one.core, other.core):
        core.add_storage("models")
    assert [len(one.core.account.file_systems), len(other.core.volumes)] == [1, 1]


def test_both_clouds_have_machines(both_clouds: Both) -> None:
    """On one server an instance of either cloud is a real machine, and nothing of either is left when it ends."""
    one, other = both_clouds.lambda_cloud, both_clouds.vast
    one.core.account.add_key(b'{"name": "mine", "public_key": "ssh-ed25519 AAAA"}')
    headers = {"Authorization": f"Bearer {one.key}"}
    found = requests.post(f"{one.url}/api/v1{LAUNCH}", json=LAMBDA_ORDER, headers=headers).json()
    first, second = str(found["data"]["instance_ids"][0]), launch(other.core)
    assert one.machines is not None
    assert other.machines is not None
    machines, containers = one.machines.all, other.machines.all
    until(lambda: first in machines and second in containers, 20)
    until(lambda: machines[first].sshd.connections() and containers[second].sshd.connections(), 20)
    assert os.environ["GPU_LAMBDA_SSH_PORT"] == str(one.machines.port)

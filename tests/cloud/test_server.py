"""The stand-in over sockets and through the adapter: a client sees the same, and real `requests` errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests.cloud import Clock, Cloud, Fault, LambdaCloud, Server
from tests.cloud.adapter import CloudAdapter
from tests.cloud.asking import LAUNCH, ORDER, launch
from tests.waiting import until

READ_S = 0.3


@dataclass
class Client:
    """A session that speaks to a core, over sockets or not."""

    core: LambdaCloud
    session: requests.Session
    url: str

    def post(self, path: str, content: object) -> requests.Response:
        """The answer, redirects not followed."""
        url, timeout = f"{self.url}/api/v1{path}", (READ_S, READ_S)
        return self.session.post(url, json=content, timeout=timeout, allow_redirects=False)


@pytest.fixture(params=["sockets", "adapter"])
def client(request: pytest.FixtureRequest, core: LambdaCloud) -> Iterator[Client]:
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {core.key}"
        if request.param == "adapter":
            session.mount("http://stand-in", CloudAdapter(core))
            yield Client(core, session, "http://stand-in/lambda")
        else:
            with Server(core, "127.9.8.7") as server:
                yield Client(core, session, server.url)


SEEN = {
    "not-sent": (requests.ConnectionError, False),
    "closed": (requests.ConnectionError, False),
    "hang": (requests.ReadTimeout, False),
    "lost-closed": (requests.ConnectionError, True),
    "lost-hang": (requests.ReadTimeout, True),
    "lost-half": (requests.exceptions.ChunkedEncodingError, True),
    "lost-502": (502, True),
    "lost-empty": (200, True),
    "failed": (502, False),
    "redirect": (301, False),
    "proxy-page": (200, False),
    "rate-limited-text": (429, False),
}


@pytest.mark.parametrize("what", SEEN)
def test_a_client_sees_each_fault_alike(client: Client, what: str) -> None:
    """Over sockets and through the adapter a fault is the same error or status, after or before the effect."""
    wanted, is_done = SEEN[what]
    client.core.faults.add(Fault(what, when="launch"))
    if isinstance(wanted, int):
        assert client.post(LAUNCH, ORDER).status_code == wanted
    else:
        with pytest.raises(wanted) as caught:
            client.post(LAUNCH, ORDER)
        assert type(caught.value) is wanted
    assert len(client.core.still_billing()) == is_done
    assert client.post(LAUNCH, ORDER).json()["data"]["instance_ids"]


def test_answers_are_the_same_bytes(client: Client) -> None:
    """Status, headers and body come as the core gave them, errors and methods of every kind included."""
    client.core.account.add_file_system(b'{"name": "fs", "region": "us-west-1"}')
    name = next(iter(client.core.account.keys))
    for method, path in [
        ("GET", "/ssh-keys?x=1"),
        ("GET", "/no"),
        ("PUT", "/instances"),
        ("DELETE", f"/ssh-keys/{name}"),
    ]:
        found = client.session.request(method, f"{client.url}/api/v1{path}")
        assert found.status_code == {"/no": 404, "/instances": 405}.get(path, 200)
        assert found.headers["Date"].endswith("GMT")
        assert found.text
    found = client.session.get(f"{client.url}/api/v1/file-systems", headers={"Authorization": "Bearer no"})
    assert (found.status_code, found.json()["error"]["code"]) == (401, "global/invalid-api-key")


def test_a_silent_connect_ends_as_a_time_out(core: LambdaCloud) -> None:
    """Through the adapter an address that swallows packets is a ConnectTimeout, after the time it takes."""
    waited: list[float] = []
    core.faults.add(Fault("not-sent", detail="silent"))
    with requests.Session() as session:
        session.mount("http://stand-in", CloudAdapter(core, waited.append))
        with pytest.raises(requests.ConnectTimeout):
            session.get("http://stand-in/api/v1/instances", timeout=(7, 60))
        core.faults.add(Fault("hang", seconds=20))
        with pytest.raises(requests.ConnectionError):  # the server gives up before the client does
            session.get("http://stand-in/api/v1/instances", timeout=(7, 60))
    assert waited == [7, 20]


def test_thousands_of_runs_take_seconds(core: LambdaCloud, clock: Clock) -> None:
    """Through the adapter a thousand lives of instances, four calls each, take a few seconds, and leave nothing."""
    began = time.monotonic()
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {core.key}"
        session.mount("http://stand-in", CloudAdapter(core))
        url = "http://stand-in/api/v1"
        for _ in range(1000):
            name = session.post(url + LAUNCH, json=ORDER).json()["data"]["instance_ids"][0]
            clock.advance(2)
            assert session.get(f"{url}/instances/{name}").json()["data"]["status"] == "active"
            session.post(f"{url}/instance-operations/terminate", json={"instance_ids": [name]})
            clock.advance(2)
            assert session.get(f"{url}/instances/{name}").status_code == 404
    assert core.still_billing() == []
    assert time.monotonic() - began < 60


def test_many_clients_at_once_are_served(light_cloud: Cloud) -> None:
    """Twenty clients at once get twenty instances, each its own, and all are counted."""
    light_cloud.core.account.add_key(b'{"name": "mine", "public_key": "ssh-ed25519 AAAA"}')
    headers = {"Authorization": f"Bearer {light_cloud.key}"}

    def rent(number: int) -> str:
        found = requests.post(f"{light_cloud.url}/api/v1{LAUNCH}", json=ORDER | {"name": f"n{number}"}, headers=headers)
        return str(found.json()["data"]["instance_ids"][0])

    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(rent, range(20)))
    assert len(set(ids)) == len(light_cloud.core.still_billing()) == 20
    assert set(light_cloud.core.per_name().values()) == {1}


def test_the_fixture_names_itself_to_the_program(light_cloud: Cloud) -> None:
    """The environment has the address, the key and the port; elsewhere than below the prefix there is nothing."""
    assert os.environ["GPU_LAMBDA_URL"] == light_cloud.url
    assert os.environ["LAMBDA_API_KEY"] == light_cloud.key
    assert os.environ["GPU_LAMBDA_SSH_PORT"] == "22"
    assert requests.get(light_cloud.url.removesuffix("/lambda") + "/api/v1/instances").status_code == 404


def test_a_test_in_another_process_sets_faults(light_cloud: Cloud) -> None:
    """POST /__control sets faults and reports; what it does not understand is a 400 that says what."""
    light_cloud.core.account.add_key(b'{"name": "mine", "public_key": "ssh-ed25519 AAAA"}')
    place = f"{light_cloud.url}/__control"
    said = requests.post(place, json={"faults": [{"what": "lost-502"}], "foreign": ["gpu-x"]}).json()
    assert [fault["what"] for fault in said["faults"]] == ["lost-502"]
    assert said["still_billing"] == []
    headers = {"Authorization": f"Bearer {light_cloud.key}"}
    assert requests.post(f"{light_cloud.url}/api/v1{LAUNCH}", json=ORDER, headers=headers).status_code == 502
    assert requests.get(place).json()["per_name"] == {"gpu-a": 1}
    wrong = requests.post(place, json={"faults": [{"what": "nonsense"}]})
    assert (wrong.status_code, "nonsense" in wrong.text) == (400, True)


def test_a_server_leaves_nothing_behind(core: LambdaCloud) -> None:
    """After its block no thread of it is left, though a client hangs and another keeps its connection."""
    before = threading.active_count()
    core.faults.add(Fault("hang", after=1))
    with Server(core) as server, requests.Session() as session, ThreadPoolExecutor(1) as pool:
        session.get(f"{server.url}/api/v1/instances")
        hung = pool.submit(requests.get, f"{server.url}/api/v1/instances", timeout=30)
        until(lambda: len(core.calls) == 2, 5)
        server.__exit__()
        assert isinstance(hung.exception(10), requests.ConnectionError)
    until(lambda: threading.active_count() == before, 5)


def test_it_is_a_program_too(tmp_path: Path) -> None:
    """`python -m tests.cloud` prints what to export, serves both clouds, and at a signal says what they have cost."""
    words = [sys.executable, "-m", "tests.cloud", "--light"]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = dict(child.stdout.readline().split()[1].split("=", 1) for _ in range(5))
        headers = {"Authorization": f"Bearer {said['LAMBDA_API_KEY']}"}
        assert requests.get(f"{said['GPU_LAMBDA_URL']}/api/v1/instances", headers=headers).json() == {"data": []}
        headers = {"Authorization": f"Bearer {said['VAST_API_KEY']}"}
        assert requests.get(f"{said['GPU_VAST_URL']}/api/v0/users/current/", headers=headers).json()["credit"] > 0
        child.send_signal(signal.SIGTERM)
        _, error = child.communicate(timeout=20)
    assert child.returncode == 0
    assert {name: it["calls"] for name, it in json.loads(error).items()} == {"lambda": 1, "vast": 1}


def test_launches_by_hand_are_seen_by_the_core(client: Client) -> None:
    """What the core is asked directly and what comes over HTTP is one account."""
    name = launch(client.core)
    found = client.post("/instance-operations/terminate", {"instance_ids": [name]})
    assert found.json()["data"]["terminated_instances"][0]["id"] == name

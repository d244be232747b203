"""The stand-in for Vast driven by the provider's own client, which knows nothing of stand-ins.

GPU_VAST_CLIENT names an interpreter that imports `vastai` 1.9.1: `scripts/test --all` makes one.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Vast
from tests.cloud.vast_asking import shown
from tests.waiting import until

VERSION = "1.9.1"
Client = Callable[..., Any]


@pytest.fixture
def client(vast_cloud: Vast, tmp_path: Path) -> Client:
    """Runs `vastai --raw WORD...` against the stand-in; what it says, read as JSON where it is JSON."""
    python = os.environ.get("GPU_VAST_CLIENT")
    if not python:
        pytest.skip(f"GPU_VAST_CLIENT does not name an interpreter with vastai {VERSION}")
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "VASTAI_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    environment |= {"VAST_URL": vast_cloud.url, "VAST_API_KEY": vast_cloud.key}
    asked = "import importlib.metadata as it; print(it.version('vastai'))"
    found = subprocess.run([python, "-c", asked], env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == VERSION, found

    def run(*words: Any) -> Any:
        program = "from vastai.cli.main import main; import sys; sys.argv[0] = 'vastai'; main()"
        whole = [python, "-c", program, "--raw", *map(str, words)]
        done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (done.stdout, done.stderr)
        try:
            return json.loads(done.stdout)
        except ValueError:
            return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_the_official_client_rents_uses_and_gives_back(client: Client, vast_cloud: Vast, tmp_path: Path) -> None:
    """Keys, offers; an instance is made, shown, labelled, logged in to, stopped, copied from, started, destroyed."""
    core = vast_cloud.core
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(key)], check=True, stdin=subprocess.DEVNULL)
    public = key.with_suffix(".pub").read_text().strip()
    client("create", "ssh-key", public, "-y")
    (listed,) = client("show", "ssh-keys")
    assert listed["key"] == public
    assert client("show", "user")["credit"] == core.credit

    wanted = "gpu_name=RTX_4090 num_gpus=1 reliability>0.98 geolocation in [US,CA,DE]"
    offers = client("search", "offers", wanted, "-o", "dph")
    prices = [it["dph_total"] for it in offers]
    assert prices == sorted(prices)
    assert {it["gpu_name"] for it in offers} == {"RTX 4090"}
    words = ["--image", "pytorch/pytorch:2.4.0", "--disk", 20, "--ssh", "--direct", "--label", "by-hand"]
    words += ["--env", "-p 8000:8000 -e GREETING=hello", "--onstart-cmd", "echo $GREETING from $VAST_CONTAINERLABEL"]
    made = client("create", "instance", offers[0]["id"], *words)
    name = made["new_contract"]
    assert made["success"]
    until(lambda: shown(core, str(name)).get("actual_status") == "running", 20)
    until(lambda: "ports" in shown(core, str(name)), 20)
    (row,) = client("show", "instances")
    one = client("show", "instance", name)
    assert (row["id"], row["label"], one["id"], one["image_uuid"]) == (name, "by-hand", name, "pytorch/pytorch:2.4.0")
    assert one["extra_env"] == {"-p 8000:8000": "1", "GREETING": "hello"}
    client("label", "instance", name, "otherwise")
    assert shown(core, str(name))["label"] == "otherwise"
    url = str(client("ssh-url", name)).strip().strip('"')
    place = core.instances[str(name)].direct
    assert url == f"ssh://root@{place.host}:{place.port}"
    assert f"hello from C.{name}" in str(client("logs", name))
    words = ["ssh", "-F", "none", "-i", str(key), "-p", str(place.port), "-o", "StrictHostKeyChecking=no"]
    words += ["-o", f"UserKnownHostsFile={tmp_path / 'known'}", f"root@{place.host}"]
    until(lambda: subprocess.run([*words, "echo rows > /workspace/rows"], timeout=30).returncode == 0, 30)

    client("stop", "instance", name)
    until(lambda: shown(core, str(name))["actual_status"] == "stopped", 20)
    client("copy", "-i", str(key), f"C.{name}:/workspace/", f"local:{tmp_path / 'back'}")
    assert (tmp_path / "back" / "rows").read_text() == "rows\n"
    client("start", "instance", name)
    until(lambda: shown(core, str(name))["actual_status"] == "running", 20)
    client("destroy", "instance", name, "-y")
    until(lambda: not shown(core, str(name)), 20)
    assert client("show", "instances") == []
    client("delete", "ssh-key", listed["id"])
    assert core.keys.account == {}
    assert core.still_billing() == []


@pytest.mark.slow
def test_the_official_client_bids(client: Client, vast_cloud: Vast) -> None:
    """An interruptible is searched for, made, bid more for, rebooted, recycled and destroyed."""
    core = vast_cloud.core
    offers = client("search", "offers", "--interruptible", "gpu_name=RTX_3090 num_gpus=1", "-o", "dph")
    bid = round(offers[0]["min_bid"] * 1.1, 4)
    words = ["--image", "pytorch/pytorch:2.4.0", "--disk", 10, "--ssh", "--bid_price", bid]
    name = str(client("create", "instance", offers[0]["id"], *words)["new_contract"])
    until(lambda: shown(core, name).get("actual_status") == "running", 20)
    assert shown(core, name)["is_bid"]
    core.outbid(name, price=bid * 1.2)
    assert shown(core, name)["cur_state"] == "stopped"
    client("change", "bid", name, "--price", round(bid * 1.5, 4))
    until(lambda: shown(core, name)["actual_status"] == "running", 20)
    client("reboot", "instance", name)
    client("recycle", "instance", name)
    client("destroy", "instance", name, "-y")
    until(lambda: not core.still_billing(), 20)
    assert core.per_name() == {None: 1}


@pytest.mark.slow
def test_the_official_client_is_refused(client: Client, vast_cloud: Vast) -> None:
    """A wrong key, an offer that is gone and an instance that is not there are what that client takes them for."""
    core = vast_cloud.core
    assert "404" in str(client("--api-key", "wrong", "show", "user"))
    (taken,) = client("search", "offers", "num_gpus=1", "--limit", 1)
    client("create", "instance", taken["id"], "--image", "x", "--ssh")
    assert "no_such_ask" in str(client("create", "instance", taken["id"], "--image", "x", "--ssh"))
    assert client("show", "instance", 1) == {"instances": None}
    core.gone_status = 404
    assert "Instance with that ID does not exist" in str(client("show", "instance", 1))

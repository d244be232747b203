"""Renting a machine, using it and giving it back, as it is typed: one command after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import clock, machines, rentals
from orchestrator.runs import Run
from tests.cloud import Cloud, Fault, Timings
from tests.journeys.hurried import begun, document, gpu
from tests.waiting import until

OFFER_KEYS = {"provider", "offer_id", "gpu", "count", "vram_gb", "vcpus", "ram_gb", "disk_gb", "region"}
OFFER_KEYS |= {"price_usd_per_hour", "spot", "available", "reliability", "machine_id"}
STATUS_KEYS = {
    "name",
    "provider",
    "instance_id",
    "state",
    "raw_state",
    "gpu",
    "price_now_usd_per_hour",
    "price_usd_per_hour",
    "launched_at",
}
STATUS_KEYS |= {"ssh", "guard", "cost_usd", "runs", "reachable", "last_seen"}
A10 = ("launch", "--gpu", "A10", "-y")


@pytest.fixture
def quick(cloud: Cloud) -> Cloud:
    """A stand-in whose machines boot at once."""
    cloud.core.timings = Timings(boot_s=0.1, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
    return cloud


def billing(cloud: Cloud) -> list[str]:
    return [instance.instance_id for instance in cloud.core.still_billing()]


def test_offers_are_one_document(light_cloud: Cloud) -> None:
    """Every offer has the promised keys, the cheapest first; filters leave what fits, and all of it."""
    found = document("offers")
    assert all(set(entry) >= OFFER_KEYS for entry in found)
    prices = [entry["price_usd_per_hour"] for entry in found if entry["available"]]
    assert prices == sorted(prices)
    assert {entry["gpu"] for entry in found} >= {"A10 PCIe", "A100 SXM4", None}
    assert [entry["available"] for entry in found].count(False) == 1
    fitting = document("offers", "--gpu", "a100", "--max-price", "2", "--region", "us-west-2")
    assert [(entry["gpu"], entry["region"], entry["price_usd_per_hour"]) for entry in fitting] == [
        ("A100 SXM4", "us-west-2", 1.29)
    ]
    assert {entry["count"] for entry in document("offers", "--count", "8")} == {8}
    assert {entry["vram_gb"] for entry in document("offers", "--min-vram", "90")} == {96.0}
    table = gpu("offers", "--gpu", "H100")
    assert table.returncode == 0
    assert "23.92" in table.stdout


def test_from_an_offer_to_the_receipt(quick: Cloud) -> None:
    """A machine is rented, seen, used, given back and counted; nothing of it is left anywhere."""
    launched = gpu("launch", "box", "--gpu", "A10", "--max-hours", "2", "-y")
    assert launched.returncode == 0, launched.stderr
    assert "box is ready" in launched.stdout
    assert "at most 2.00 h, 1.50 USD" in launched.stderr
    (entry,) = document("status")
    assert set(entry) == STATUS_KEYS
    (instance,) = quick.core.ours()
    facts = {"name": "box", "provider": "lambda", "state": "ready", "raw_state": "active", "gpu": "1x A10 PCIe"}
    facts |= {"price_usd_per_hour": 0.75, "instance_id": instance.instance_id, "runs": [], "reachable": True}
    assert facts.items() <= entry.items()
    port = quick.machine(instance.instance_id).sshd.port
    assert entry["ssh"] == {"user": "ubuntu", "host": instance.address, "port": port}
    assert entry["guard"]["armed"]
    assert entry["cost_usd"] > 0
    said = gpu("exec", "box", "--", "sh", "-c", 'echo "$1" "$USER"', "sh", "it's here")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("it's here")
    ended = gpu("terminate", "box", "-y")
    assert ended.returncode == 0, ended.stderr
    assert "box: gpu_1x_a10 in us-east-1" in ended.stdout
    assert "about 0.02 USD" in ended.stdout
    assert billing(quick) == []
    assert quick.core.account.keys == {}
    costs = document("cost")
    (spent,) = costs["machines"]
    assert {"name": "box", "provider": "lambda", "open": False}.items() <= spent.items()
    assert costs["total_usd"] >= float(quick.core.cents()) / 100 - 1e-4
    assert gpu("audit").returncode == 0
    assert gpu("clean", "-y").returncode == 0
    assert not machines.folder("box").exists()
    assert document("cost") == costs, "what was spent is remembered"
    assert document("status") == []


@pytest.mark.slow
def test_the_same_with_the_waits_as_they_are(cloud: Cloud) -> None:
    """Launch and terminate as a user runs them, with the pace that the provider asks for."""
    command = [sys.executable, "-m", "orchestrator.cli"]
    cloud.core.enforces_rates = True
    for words in ([*A10, "--json"], ["terminate", "-y"]):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
    assert len(cloud.core.ours()) == 1
    assert billing(cloud) == []
    assert 429 not in [call.status for call in cloud.core.calls]


@pytest.mark.slow
def test_the_same_launch_twice_at_once_is_one_machine(quick: Cloud) -> None:
    """Two launches without a name rent one machine: the second is told of the first. With names they are two."""
    both = [begun(*A10, "-q") for _ in range(2)]
    said = [command.communicate(timeout=60)[1] for command in both]
    assert sorted(command.returncode for command in both) == [0, 2], said
    assert "There is a rented machine a10 already" in "".join(said)
    assert len(quick.core.ours()) == 1
    both = [begun("launch", name, "--gpu", "A10", "-y", "-q") for name in ("one", "two")]
    said = [command.communicate(timeout=60)[1] for command in both]
    assert [command.returncode for command in both] == [0, 0], said
    assert len(quick.core.ours()) == 3
    assert max(quick.core.per_name().values()) == 1
    assert gpu("terminate", "-y").returncode == 2, "which of three?"
    assert len(billing(quick)) == 3
    assert gpu("terminate", "--all", "-y").returncode == 0
    assert billing(quick) == []


def test_rows_come_home_before_a_machine_goes(quick: Cloud, counting_run: Callable[..., Run]) -> None:
    """While a run works there, terminate refuses and says so; once it has ended, its rows are brought home first."""
    assert gpu(*A10, "--python", sys.executable).returncode == 0
    run = counting_run(on="a10", count=400, pace_s=0.02)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    refused = gpu("terminate", "a10", "-y")
    assert refused.returncode == 20, "it goes on costing"
    assert run.run_id in refused.stderr
    assert "--discard" in refused.stderr
    assert len(billing(quick)) == 1
    assert gpu("stop", run.run_id).returncode == 0
    assert gpu("terminate", "a10", "-y").returncode == 0
    assert billing(quick) == []
    (found,) = document("runs")
    assert found["rows_home"] == found["rows_done"] > 0
    (spent,) = document("cost")["runs"]
    assert spent["rows"] == found["rows_home"]


def test_what_is_not_home_can_be_given_up(quick: Cloud, counting_run: Callable[..., Run]) -> None:
    """With --discard a machine goes although a run works on it; the run is told so, and keeps what is home."""
    assert gpu(*A10, "--python", sys.executable).returncode == 0
    run = counting_run(on="a10", count=400, pace_s=0.02)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    discarded = gpu("terminate", "a10", "-y", "--discard")
    assert discarded.returncode == 0, discarded.stderr
    assert billing(quick) == []
    assert document("runs")[0]["state"] in ("lost", "stopped")
    assert gpu("terminate", "a10", "-y").returncode == 0, "given back already"


def test_what_another_computer_runs_there_is_not_destroyed(quick: Cloud) -> None:
    """A run on the machine that was never begun here cannot be brought home: it is named, and has to be given up."""
    assert gpu(*A10).returncode == 0
    (Path(machines.load("a10").root) / "runs" / "20261120-eval-gsm8k-3f9c").mkdir(parents=True)
    refused = gpu("terminate", "a10", "-y")
    assert refused.returncode == 20, refused.stderr
    assert "20261120-eval-gsm8k-3f9c" in refused.stderr
    assert "--discard" in refused.stderr
    assert len(billing(quick)) == 1
    assert gpu("terminate", "a10", "-y", "--discard").returncode == 0
    assert billing(quick) == []


@pytest.mark.parametrize(
    ("fault", "how", "said"),
    [
        ("boot-unhealthy", {}, "unhealthy"),
        pytest.param("vanishes", {}, "does not list it", marks=pytest.mark.slow),
        ("smi-wrong-gpu", {}, "Tesla T4; A10 PCIe was paid for"),
        ("smi-wrong-memory", {}, "11 GB; 24 GB were paid for"),
        pytest.param("smi-wrong-count", {"detail": 2}, "2 GPUs", marks=pytest.mark.slow),
        pytest.param("smi-missing", {}, "shows no GPU", marks=pytest.mark.slow),
        ("cuda-error", {}, "driver error 802"),
        pytest.param("publickey-denied", {}, "does not let us in", marks=pytest.mark.slow),
    ],
)
@pytest.mark.first(1)
def test_a_machine_that_is_no_good_is_given_back(quick: Cloud, fault: str, how: dict[str, Any], said: str) -> None:
    """What is not what was paid for goes back, with words that say why, and the next offer is tried."""
    quick.fault(fault, **how)
    launched = gpu(*A10, waits={"readiness._GPU_S": 1.5, "readiness._SSH_S": 1.5, "readiness._LISTED_S": 1.5})
    assert launched.returncode == 0, launched.stderr
    assert said in launched.stderr
    bad, good = quick.core.ours()
    assert (bad.order["region_name"], good.order["region_name"]) == ("us-east-1", "us-west-1")
    assert billing(quick) == [good.instance_id]
    assert gpu("exec", "--", "true").returncode == 0
    assert gpu("terminate", "-y").returncode == 0
    assert [entry["open"] for entry in document("cost")["machines"]] == [False]


def test_bad_machines_are_not_tried_without_end(quick: Cloud) -> None:
    """When every machine is no good the launch ends, its exit code says that nothing is rented, and so it is."""
    quick.fault("boot-unhealthy", times=None)
    launched = gpu(*A10)
    assert launched.returncode == 4, launched.stderr
    assert len(quick.core.ours()) == 2, "each offer once"
    assert billing(quick) == []
    again = gpu(*A10)
    assert again.returncode == 4
    assert "already" not in again.stderr


def test_a_typing_error_costs_one_machine(quick: Cloud) -> None:
    """An interpreter that no machine has ends the launch at the first one, which is given back."""
    launched = gpu(*A10, "--python", "/opt/nope", waits={"readiness._ADMITTED_S": 0.5})
    assert launched.returncode == 4, launched.stderr
    assert "/opt/nope on a10 is no Python that runs" in launched.stderr
    assert len(quick.core.ours()) == 1
    assert billing(quick) == []


def test_a_budget_is_that_of_the_launch(quick: Cloud) -> None:
    """What a machine cost that was no good is taken off the budget before the next one is rented."""
    quick.fault("boot-unhealthy")
    launched = gpu(*A10, "--budget", "0.07")
    assert launched.returncode == 2, launched.stderr
    assert "A budget of 0.06 USD buys 4 minutes" in launched.stderr
    assert len(quick.core.ours()) == 1
    assert billing(quick) == []


def test_capacity_is_waited_for_where_it_was_asked(quick: Cloud) -> None:
    """With --wait-capacity a region that has none free is looked at again until it has, and no other is taken."""
    command = begun(*A10, "--region", "us-south-2", "--wait-capacity", waits={"launching._CAPACITY_EVERY_S": 0.2})
    until(lambda: quick.core.count("/instance-types") >= 4)
    assert quick.core.ours() == []
    quick.core.catalogue.capacity["gpu_1x_a10"].append("us-south-2")
    words = command.communicate(timeout=60)[1]
    assert command.returncode == 0, words
    assert "no capacity yet" in words
    assert [instance.order["region_name"] for instance in quick.core.ours()] == ["us-south-2"]
    assert gpu("terminate", "-y").returncode == 0


def test_a_wait_for_capacity_outlasts_its_provider(quick: Cloud) -> None:
    """An hour in which the provider does not answer does not end a night's wait; a refused key does."""
    command = begun(*A10, "--region", "us-south-2", "--wait-capacity", waits={"launching._CAPACITY_EVERY_S": 0.2})
    until(lambda: quick.core.count("/instance-types") >= 3)
    quick.fault("failed", when="instance-types", times=None)
    so_far = quick.core.count("/instance-types")
    until(lambda: quick.core.count("/instance-types") >= so_far + 10)
    quick.core.faults.clear()
    quick.core.catalogue.capacity["gpu_1x_a10"].append("us-south-2")
    words = command.communicate(timeout=60)[1]
    assert command.returncode == 0, words
    assert "cannot be asked just now" in words
    assert gpu("terminate", "-y").returncode == 0


def test_where_a_machine_was_no_good_no_other_is_rented(quick: Cloud) -> None:
    """After a bad machine its region is left out, for other types that would do, too."""
    quick.fault("boot-unhealthy")
    launched = gpu("launch", "box", "--min-vram", "20", "-y")
    assert launched.returncode == 0, launched.stderr
    bad, good = quick.core.ours()
    assert bad.order["region_name"] != good.order["region_name"]
    cheapest = document("offers", "--min-vram", "20", "--count", "1")
    same_place = [entry for entry in cheapest if entry["region"] == bad.order["region_name"]]
    assert len(same_place) > 1, "another type there was to be had"
    assert gpu("terminate", "-y").returncode == 0


def test_an_image_that_ignores_the_host_key_is_said(quick: Cloud) -> None:
    """A first contact that could not be verified is told of, with the fingerprint that is pinned from then on."""
    quick.fault("ignores-host-key")
    launched = gpu(*A10, waits={"admission._KEY_PATIENCE_S": 0.5})
    assert launched.returncode == 0, launched.stderr
    assert "first contact was NOT verified" in launched.stderr
    (instance,) = quick.core.ours()
    server = quick.machine(instance.instance_id).sshd
    assert server.host_fingerprint() in launched.stderr
    assert gpu("exec", "--", "true").returncode == 0
    server.new_host_key()
    server.restart()
    assert gpu("exec", "--", "true").returncode == 3, "another one is refused"
    assert gpu("terminate", "-y").returncode == 0


def test_only_this_user_can_read_what_is_kept(quick: Cloud) -> None:
    """The folder of a rented machine and all that is in it are closed to others."""
    assert gpu(*A10).returncode == 0
    home = Path(os.environ["GPU_HOME"])
    kept = [path for path in home.rglob("*") if path.is_file()]
    assert kept
    assert [path for path in kept if path.stat().st_mode & 0o077 and path.suffix != ".pub"] == []
    assert [path for path in kept if quick.key.encode() in path.read_bytes()] == [], "and the account key is not there"


def test_a_launch_that_returns_early_is_gone_on_with(quick: Cloud) -> None:
    """With --no-wait a machine is rented and no more; wait has it ready, and again does nothing."""
    early = gpu(*A10, "--no-wait", "--json")
    assert early.returncode == 0, early.stderr
    assert json.loads(early.stdout)["state"] == "booting"
    for _ in range(2):
        found = json.loads(gpu("wait", "--json").stdout)
        assert found["state"] == "ready"
    assert len(quick.core.ours()) == 1
    until(lambda: billing(quick))
    assert gpu("terminate", "-y", "--json").returncode == 0
    assert gpu("wait", "a10").returncode == 3, "it is gone"


@pytest.mark.parametrize("fault", ["vanishes", "goes-unhealthy"])
@pytest.mark.first(1)
def test_cron_notices_that_a_machine_is_no_more(quick: Cloud, fault: str) -> None:
    """Nobody works on it: that it vanished, or was unhealthy for long, ends what it costs here, and the cost itself."""
    waits = {"vanishing._TWICE_S": 0.1, "vanishing._UNHEALTHY_S": 0.5}
    assert gpu(*A10).returncode == 0
    (instance,) = quick.core.ours()
    assert gpu("advance", "--all", waits=waits).returncode == 0
    assert len(billing(quick)) == 1
    instance.faults[fault] = Fault(fault, seconds=clock.timestamp() - instance.active_at)
    quick.machine(instance.instance_id).sshd.kill_all()
    for _ in range(2):
        assert gpu("advance", "--all", waits=waits).returncode == 0
        until(lambda: clock.timestamp() > instance.active_at + instance.faults[fault].seconds + 1)
    assert billing(quick) == []
    found = rentals.find("a10")
    assert found is not None
    assert found.record.state == "lost"
    assert not document("cost")["machines"][0]["open"]

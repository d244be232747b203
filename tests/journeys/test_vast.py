"""Containers of other people's machines: rented, used, stopped, outbid and given back; nothing goes on costing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchestrator import clock, guarding, machines, rentals, runs
from orchestrator.rentals import Rental
from tests.cloud import Both, Stand, Timings, Vast
from tests.journeys.hurried import Done, begun, document, gpu
from tests.waiting import until

RTX = ("--gpu", "RTX_4090", "-y", "--environment", "none", "--out", "out/*.jsonl")
LAUNCH = ("launch", "v", "--gpu", "RTX 4090", "-y")
COSTS, USAGE, CONFIG, PROVIDER = 20, 2, 3, 4
_COUNT = """
import os, sys, time
os.makedirs("out", exist_ok=True)
done = len(open("out/rows.jsonl").readlines()) if os.path.exists("out/rows.jsonl") else 0
with open("out/rows.jsonl", "a") as file:
    for index in range(done, int(sys.argv[1])):
        file.write('{"index": %d}\\n' % index)
        file.flush()
        time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own is touched; a project with a program that makes a row every 50 ms."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("count.py").write_text(_COUNT)


@pytest.fixture
def quick(vast_cloud: Vast) -> Vast:
    """A stand-in whose containers start at once."""
    vast_cloud.core.timings = Timings(boot_s=0.2, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
    return vast_cloud


def count(number: int) -> tuple[str, ...]:
    return ("--", sys.executable, "count.py", str(number))


def billing(cloud: Stand) -> list[str]:
    return [instance.instance_id for instance in cloud.core.still_billing()]


def rental(name: str = "v") -> Rental:
    found = rentals.find(name)
    assert found is not None
    return found


def lines_home(run_id: str) -> list[int]:
    path = runs.find(run_id).home.folder / "out" / "out" / "rows.jsonl"
    return [json.loads(line)["index"] for line in path.read_text().splitlines()] if path.exists() else []


def test_from_an_offer_to_the_receipt(quick: Vast) -> None:
    """A container is rented, its host key known from its log, its guard read back, used, and given back."""
    launched = gpu(*LAUNCH, "--max-hours", "2")
    assert launched.returncode == 0, launched.stderr
    for words in ("by the host key that its provider's log tells", "its guard is armed", "by its own word"):
        assert words in launched.stderr
    (entry,) = document("status", "--refresh")
    assert (entry["state"], entry["provider"], entry["ssh"]["user"]) == ("ready", "vast", "root")
    assert entry["guard"] == {"armed": True, "deadline": guarding.moment(rental().record.deadline), "how": "container"}
    said = gpu("exec", "v", "--", "sh", "-c", "echo out; env")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("out\n"), "no banner"
    assert "CONTAINER_API_KEY" not in said.stdout
    assert gpu("terminate", "v", "-y").returncode == 0
    assert billing(quick) == []
    assert not document("cost")["machines"][0]["open"]


def test_no_secret_of_ours_reaches_the_host(quick: Vast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the account's key, nor HF_TOKEN, nor a private key is in any file of the host or body of a request."""
    monkeypatch.setenv("HF_TOKEN", "hf_canary0123456789")
    assert gpu(*LAUNCH).returncode == 0
    done = gpu("run", "--on", "v", "--environment", "none", "--", "sh", "-c", "test ${#HF_TOKEN} = 19")
    assert done.returncode == 0, done.stderr
    own = (machines.folder("v") / "key").read_text().splitlines()[3]
    secrets = [quick.key.encode(), b"hf_canary0123456789", own.encode()]
    there = [path for path in (tmp_path / "vast").rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "onstart.sh" for path in there)
    found = [str(path) for path in there for secret in secrets if secret in path.read_bytes()]
    assert found == []
    (instance,) = quick.core.ours()
    assert [secret for secret in secrets if secret in json.dumps(instance.order).encode()] == []
    assert gpu("terminate", "v", "-y").returncode == 0


@pytest.mark.slow
def test_the_guard_ends_a_container_by_itself(quick: Vast) -> None:
    """With nobody at the laptop, the container's own key ends it at its deadline; the laptop then sees it gone."""
    assert gpu(*LAUNCH, "--max-hours", "0.007").returncode == 0
    until(lambda: not billing(quick), 60)
    assert gpu("terminate", "v", "-y").returncode == 0
    assert rental().record.state == "gone"


@pytest.mark.slow
def test_a_deadline_stands_with_the_container(quick: Vast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stuck while it boots, so that no guard has begun: where only the key is known, what is past its deadline ends."""
    quick.fault("boot-stuck", times=2, seconds=3000.0)
    foreign = quick.core.add_foreign("gpu-20270115t080000-0123456789ab.1.box")
    rents = ("launch", "--gpu", "RTX 4090", "--provider", "vast", "-y", "--no-wait", "-q")
    assert gpu(*rents, "late", "--max-hours", "0.001").returncode == 0
    assert gpu(*rents, "early").returncode == 0
    late, early = quick.core.ours()
    until(lambda: clock.timestamp() > late.created_at + 4.0)
    monkeypatch.setenv("GPU_HOME", str(tmp_path / "elsewhere"))
    (entry,) = json.loads(gpu("audit", "--past-cap", "--json").stdout)["past_cap"]
    assert (entry["name"], entry["instance_id"]) == ("late", late.instance_id)
    assert gpu("audit", "--fix", "--past-cap", "-y").returncode == 0
    assert billing(quick) == [early.instance_id]
    assert rental("late").record.guard == "container"
    assert gpu("audit", "--fix", "-y").returncode == 0
    assert (billing(quick), quick.core.touched_foreign) == ([], [])
    assert foreign.ending_at is None


def outbid(cloud: Vast, number: int = 0) -> None:
    """Have somebody bid more for the instance."""
    cloud.core.outbid(cloud.core.ours()[number].instance_id)


def spot(*words: str) -> tuple[str, ...]:
    return ("run", *RTX, "--spot", "--budget", "3", "--terminate", *words)


def rows_are_home(at_least: int) -> bool:
    known = list(runs.remembered())
    return bool(known) and len(lines_home(known[-1].run_id)) >= at_least


def test_an_outbid_run_goes_on_elsewhere(quick: Vast) -> None:
    """Outbid in the middle, a run goes on on another container from what is home; the first one is destroyed."""
    command = begun(*spot(*count(200)))
    until(lambda: rows_are_home(20), 90)
    outbid(quick)
    _, said = command.communicate(timeout=120)
    assert command.returncode == 0, said
    assert "Going on on another machine" in said
    first, second = quick.core.ours()
    assert first.slot.machine_id != second.slot.machine_id or first.instance_id != second.instance_id
    assert billing(quick) == []
    assert lines_home(runs.find(None).run_id) == list(range(200))
    assert not any(entry["open"] for entry in document("cost")["machines"])


@pytest.mark.slow
def test_where_no_bid_is_taken_a_fixed_price_is(both_clouds: Both) -> None:
    """Outbid, with no other container to bid for, the run goes on at another cloud, and each row is there once."""
    for stand in (both_clouds.vast, both_clouds.lambda_cloud):
        stand.core.timings = Timings(boot_s=0.2, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
    vast = both_clouds.vast
    wish = ["run", "--gpu", "A100", "--spot", "--budget", "5", "--terminate", "-y", "--environment", "none"]
    command = begun(*wish, "--out", "out/*.jsonl", *count(200))
    until(lambda: rows_are_home(20), 90)
    for slot in vast.core.market.slots:
        vast.core.market.hold(slot)
    outbid(vast)
    _, said = command.communicate(timeout=120)
    assert command.returncode == 0, said
    assert len(both_clouds.lambda_cloud.core.ours()) == 1
    assert billing(vast) == billing(both_clouds.lambda_cloud) == []
    assert lines_home(runs.find(None).run_id) == list(range(200))


@pytest.mark.parametrize("when", ["planned", "asked"])
@pytest.mark.first(1)
def test_a_cloud_that_refuses_is_passed_over(both_clouds: Both, when: str) -> None:
    """Without credit at the cheaper cloud the other one is asked, and that is said, unless one cloud was named."""
    vast, other = both_clouds.vast, both_clouds.lambda_cloud
    for stand in (vast, other):
        stand.core.timings = Timings(boot_s=0.2, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
    if when == "planned":
        vast.core.credit = 0.05
    else:
        vast.fault("no-credit", times=None)
    named = gpu("launch", "v", "--gpu", "A100", "--provider", "vast", "-y")
    assert (named.returncode, "credit" in named.stderr) == (PROVIDER, True), named.stderr
    done = gpu("launch", "v", "--gpu", "A100", "-y")
    assert done.returncode == 0, done.stderr
    assert "Another cloud is asked." in done.stderr
    assert (len(vast.core.ours()), len(other.core.ours())) == (0, 1)
    assert gpu("terminate", "v", "-y").returncode == 0
    assert billing(vast) == billing(other) == []


def test_a_bid_is_what_was_typed(quick: Vast) -> None:
    """A bid under the floor is refused with the floor, and one above it is what the instance is rented at."""
    low = gpu("launch", "v", "--gpu", "RTX 4090", "--spot", "--bid", "0.01", "-y")
    assert low.returncode in (USAGE, PROVIDER), low.stderr
    assert quick.core.ours() == []
    assert gpu("launch", "v", "--gpu", "RTX 4090", "--spot", "--bid", "0.6", "-y").returncode == 0
    (instance,) = quick.core.ours()
    assert instance.order["price"] == 0.6
    assert gpu("terminate", "v", "-y").returncode == 0


@pytest.mark.parametrize("fault", ["delivers-gpu", "wrong-type", "wrong-price", "smi-wrong-memory"])
@pytest.mark.first(1)
def test_what_was_not_asked_for_is_destroyed(quick: Vast, fault: str) -> None:
    """Another GPU, or a container that can be taken away where a fixed price was asked for, goes back at once."""
    quick.fault(fault)
    launched = gpu(*LAUNCH)
    assert launched.returncode == 0, launched.stderr
    bad, good = quick.core.ours()
    assert billing(quick) == [good.instance_id]
    assert bad.slot.machine_id != good.slot.machine_id
    assert gpu("terminate", "v", "-y").returncode == 0


def is_said(done: Done, code: int, words: str) -> bool:
    text = " ".join(done.stderr.split())
    return done.returncode == code and words in text and "Traceback" not in text


def test_bad_input_is_named(quick: Vast, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credit, a disk below the minimum, a filter nobody knows, a bad key: one paragraph each, nothing rented."""
    assert is_said(gpu(*LAUNCH, "--disk", "2"), USAGE, "8")
    assert is_said(gpu(*LAUNCH, "--filter", "speed=9"), USAGE, "speed")
    assert is_said(gpu(*LAUNCH, "--filter", "image=nosuch IMAGE"), CONFIG, "image")
    quick.core.credit = 0.05
    poor = gpu(*LAUNCH)
    assert is_said(poor, PROVIDER, "0.05 USD left"), poor.stderr
    monkeypatch.setenv("VAST_API_KEY", "wr0ng-key-0123456789abcdef")
    assert is_said(gpu(*LAUNCH), CONFIG, "key")
    assert quick.core.ours() == []


@pytest.mark.slow
def test_a_container_stopped_when_idle_keeps_its_rows(quick: Vast) -> None:
    """Idle with rows that are not home, a container is stopped, not destroyed; started again, its rows come home."""
    assert gpu(*LAUNCH, "--idle-minutes", "0.25").returncode == 0
    started = gpu("run", "--on", "v", "--environment", "none", "--out", "out/*.jsonl", "--detach", *count(5))
    assert started.returncode == 0, started.stderr
    (instance,) = quick.core.ours()
    until(
        lambda: (
            quick.core.instances[instance.instance_id].lost_by or not quick.core.instances[instance.instance_id].wants
        ),
        90,
    )
    assert billing(quick), "its disk"
    (entry,) = document("status", "--refresh")
    assert (entry["state"], 0 < entry["price_now_usd_per_hour"] < entry["price_usd_per_hour"]) == ("stopped", True)
    assert "v is stopped, and GOES ON COSTING 0.0" in gpu("status").stderr
    assert "its disk, 0.0" in gpu("cost").stdout
    refused = gpu("terminate", "v", "-y")
    assert refused.returncode == COSTS
    assert "gpu wait v" in refused.stderr
    assert gpu("wait", "v").returncode == 0
    assert document("status")[0]["price_now_usd_per_hour"] == entry["price_usd_per_hour"]
    pulled = gpu("pull")
    assert pulled.returncode == 0, pulled.stderr
    assert gpu("terminate", "v", "-y").returncode == 0
    assert lines_home(runs.find(None).run_id) == [0, 1, 2, 3, 4]
    assert billing(quick) == []

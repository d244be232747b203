"""Launches left, killed or never answered, machines forgotten or past their time: all are found and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import clock, journey, rentals
from orchestrator.rentals import Rental
from orchestrator.runs import Run
from tests.cloud import Cloud, Timings
from tests.journeys.hurried import begun, document, gpu
from tests.waiting import until

A10 = ("launch", "--gpu", "A10", "-y")
USAGE, COSTS, INTERRUPTED = 2, 20, 130
LAUNCHES = "/instance-operations/launch"
DASHBOARD = "https://cloud.lambda.ai/instances"
SHORT = {"outcome.SETTLED_S": 1.0, "outcome._NOTHING_AFTER_S": 1.0}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own is touched."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def quick(light_cloud: Cloud) -> Cloud:
    """A stand-in without machines, where everything happens at once."""
    light_cloud.core.timings = Timings(0.05, 0.1, 0.0, 0.0, term_s=0.1)
    return light_cloud


def billing(cloud: Cloud) -> list[str]:
    return [instance.instance_id for instance in cloud.core.still_billing()]


def rental(name: str = "a10") -> Rental:
    found = rentals.find(name)
    assert found is not None
    return found


def state(name: str = "a10") -> str | None:
    found = rentals.find(name)
    return found.record.state if found else None


def said(command: subprocess.Popen[str]) -> str:
    return command.communicate(timeout=60)[1]


def test_ctrl_c_leaves_a_launch_as_it_is(cloud: Cloud) -> None:
    """Interrupted while it boots, a launch says what goes on costing and what to type; wait has the machine ready."""
    cloud.core.timings = Timings(boot_s=600.0)
    command = begun(*A10)
    until(lambda: state() == "booting")
    command.send_signal(signal.SIGINT)
    words = said(command)
    assert command.returncode == INTERRUPTED, words
    for expected in ("MAY COST 0.75 USD/h", "gpu wait a10", "gpu terminate a10"):
        assert expected in words
    (instance,) = cloud.core.ours()
    instance.timings = Timings(boot_s=0.0)
    assert gpu("wait").returncode == 0
    assert gpu("exec", "--", "true").returncode == 0
    assert cloud.core.count(LAUNCHES) == 1
    assert gpu("terminate", "-y").returncode == 0
    assert billing(cloud) == []


def test_ctrl_c_in_the_middle_of_the_paid_request(quick: Cloud) -> None:
    """Interrupted while the provider has not answered, the machine that comes of it is found, and given back."""
    quick.fault("lost-hang", seconds=60.0)
    command = begun(*A10)
    until(lambda: quick.core.instances)
    command.send_signal(signal.SIGINT)
    words = said(command)
    assert command.returncode == INTERRUPTED, words
    assert "MAY COST" in words
    assert (state(), len(billing(quick))) == ("launching", 1)
    assert gpu("terminate", "-y").returncode == 0
    assert billing(quick) == []
    assert quick.core.count(LAUNCHES) == 1


@pytest.mark.parametrize("call", range(8))
@pytest.mark.first(3)
def test_a_launch_that_is_killed_leaves_nothing_that_is_not_found(
    quick: Cloud, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its n-th request, whichever: audit finds what was begun and not ended, and ends it."""
    commands: list[subprocess.Popen[str]] = []
    answer = quick.core.handle

    def handle(*words: Any) -> Any:
        if commands and len(quick.core.calls) == call:
            commands[0].kill()
        return answer(*words)

    monkeypatch.setattr(quick.core, "handle", handle)
    commands.append(begun(*A10))
    words = said(commands[0])
    assert commands[0].returncode == -signal.SIGKILL, words
    commands.clear()
    left = state()
    looked = gpu("audit", "--json")
    found = json.loads(looked.stdout)
    assert looked.returncode == (COSTS if found["unresolved"] else 0)
    assert bool(found["unresolved"]) == (left in ("launching", "booting"))
    assert not found["orphans"]
    assert not found["past_cap"]
    fixed = gpu("audit", "--fix", "-y", waits=SHORT)
    assert fixed.returncode == 0, fixed.stderr
    assert billing(quick) == [] or left == "ready"
    assert gpu("terminate", "--all", "-y").returncode == 0
    assert billing(quick) == []
    assert max(quick.core.per_name().values(), default=1) == 1
    assert gpu(*A10, "--no-wait").returncode == 0, "and the name is free"
    assert len(billing(quick)) == 1


@pytest.mark.parametrize("fault", ["lost-502", "lost-half", "lost-empty", "null-data", "lost-closed"])
def test_a_lost_answer_is_found_by_its_marker(quick: Cloud, fault: str) -> None:
    """A paid request whose answer is lost is never sent again: the machine it made is found and used."""
    quick.fault(fault, when="launch")
    launched = gpu(*A10, "--no-wait", "--json")
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout)["instance_id"] == billing(quick)[0]
    assert quick.core.count(LAUNCHES) == 1


def test_a_request_that_stays_without_an_answer(quick: Cloud) -> None:
    """What cannot be found out ends with its own exit code, the price and the link; it is looked for ever after."""
    quick.fault("lost-502")
    quick.fault("invisible", seconds=6.0)
    unknown = gpu(*A10, waits={"outcome.SETTLED_S": 0.5})
    assert unknown.returncode == COSTS
    for words in ("0.75 USD/h", DASHBOARD, rental().record.marker):
        assert words in unknown.stderr
    assert gpu("audit", "--json").returncode == COSTS
    until(lambda: clock.timestamp() > quick.core.ours()[0].launched_at + 6.1)
    assert gpu("advance", "--all").returncode == 0
    assert state() == "booting"
    assert gpu("terminate", "-y").returncode == 0
    assert billing(quick) == []
    assert quick.core.count(LAUNCHES) == 1


@pytest.mark.parametrize("fault", ["failed", "bad-key"])
def test_no_error_says_that_nothing_is_rented_while_something_may_be(quick: Cloud, fault: str) -> None:
    """The provider fails after the paid request, answered or not: the exit code says that a machine may cost money."""
    quick.fault(fault, when="GET /instances", times=None)
    waits = {"readiness._LISTED_S": 0.5, "returning._PATIENCE_S": 0.5, "outcome.SETTLED_S": 0.5}
    booting = gpu("launch", "one", "--gpu", "A10", "-y", waits=waits)
    quick.fault("lost-502")
    lost = gpu("launch", "two", "--gpu", "A10", "-y", waits=waits)
    for done in (booting, lost):
        assert done.returncode == COSTS, done.stderr
        assert "0.75 USD/h" in done.stderr
        assert DASHBOARD in done.stderr
    assert quick.core.ours()[0].instance_id in booting.stderr
    ended = gpu("terminate", "--all", "-y", waits=waits)
    assert ended.returncode == COSTS
    quick.core.faults.clear()
    assert gpu("terminate", "--all", "-y").returncode == 0
    assert billing(quick) == []


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "what"), [("terminate-ignored", ""), ("bad-key", "terminate"), ("failed", "")])
def test_a_provider_that_never_says_gone(quick: Cloud, fault: str, what: str) -> None:
    """A machine that is not said to be gone is told of: id, price, link and an exit code of its own."""
    assert gpu(*A10, "--no-wait").returncode == 0
    quick.fault(fault, when=what, times=None)
    ended = gpu("terminate", "-y", waits={"returning._PATIENCE_S": 0.5})
    assert ended.returncode == COSTS
    for words in (billing(quick)[0], "0.75 USD/h", DASHBOARD, "gpu terminate a10"):
        assert words in ended.stderr
    assert state() == "stopping"
    assert document("cost")["machines"][0]["open"]
    quick.core.faults.clear()
    assert gpu("terminate", "-y").returncode == 0
    assert billing(quick) == []
    assert not document("cost")["machines"][0]["open"]


def test_another_laptop_finds_what_this_one_lost(quick: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that nobody remembers where the key is used is an orphan there, and can be ended; others' never are."""
    foreign = [quick.core.add_foreign(name) for name in (None, "gpu-mine", "training")]
    assert gpu("launch", "box", "--gpu", "A10", "-y", "--no-wait").returncode == 0
    assert gpu("audit").returncode == 0
    mine = os.environ["GPU_HOME"]
    monkeypatch.setenv("GPU_HOME", str(tmp_path / "elsewhere"))
    looked = gpu("audit", "--json")
    assert looked.returncode == COSTS
    (orphan,) = json.loads(looked.stdout)["orphans"]
    assert {"name": "box", "instance_id": billing(quick)[0], "price_usd_per_hour": 0.75}.items() <= orphan.items()
    asked = gpu("audit", "--fix")
    assert asked.returncode == USAGE, "nobody said yes"
    assert f"orphans: box {orphan['marker']} {orphan['instance_id']} at 0.75 USD/h" in asked.stderr
    assert gpu("audit", "--fix", "--past-cap", "-y").returncode == 0, "it is not past its cap"
    assert len(billing(quick)) == 1
    assert gpu("audit", "--fix", "-y").returncode == 0
    assert billing(quick) == []
    assert quick.core.touched_foreign == []
    assert all(instance.bill(clock.timestamp()).ended is None for instance in foreign)
    assert document("cost")["machines"][0]["name"] == "box"
    monkeypatch.setenv("GPU_HOME", mine)
    assert gpu("terminate", "box", "-y").returncode == 0, "it is gone already"
    assert not document("cost")["machines"][0]["open"]


@pytest.mark.slow
def test_a_deadline_stands_with_the_machine(quick: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the key is known, such as scheduled CI, what is past its deadline is ended, and nothing else."""
    assert gpu("launch", "late", "--gpu", "A10", "-y", "--no-wait", "--max-hours", "0.002").returncode == 0
    assert gpu("launch", "early", "--gpu", "A10", "-y", "--no-wait", "-q").returncode == 0
    late, early = quick.core.ours()
    until(lambda: clock.timestamp() > late.launched_at + 8.0)
    monkeypatch.setenv("GPU_HOME", str(tmp_path / "elsewhere"))
    looked = json.loads(gpu("audit", "--past-cap", "--json").stdout)
    assert [entry["name"] for entry in looked["past_cap"]] == ["late"]
    assert gpu("audit", "--fix", "--past-cap", "-y").returncode == 0
    assert billing(quick) == [early.instance_id]


@pytest.mark.parametrize(
    "words",
    [
        ("launch", "--gpu", "H100", "--dry-run"),
        ("terminate", "other", "-y"),
        ("audit",),
        ("advance", "--all"),
        ("wait", "other"),
    ],
    ids=lambda words: words[0],
)
def test_past_its_deadline_any_command_ends_a_machine(quick: Cloud, words: tuple[str, ...]) -> None:
    """Status warns and asks nobody; each command that enforces caps gives the machine back, and no other."""
    assert gpu(*A10, "--no-wait").returncode == 0
    assert gpu("launch", "other", "--gpu", "H100", "-y", "--no-wait").returncode == 0
    (late, other), calls = billing(quick), len(quick.core.calls)
    rental().save(deadline=clock.timestamp() - 1)
    if words[0] == "wait":
        rental("other").save(state="ready")
    warned = gpu("status")
    assert "a10 IS PAST ITS DEADLINE" in warned.stderr
    assert "gpu terminate a10" in warned.stderr
    assert len(quick.core.calls) == calls
    done = gpu(*words)
    assert done.returncode == 0, done.stderr
    assert late not in billing(quick)
    assert (other in billing(quick)) == (words[0] != "terminate")
    assert state() == "gone"


@pytest.mark.parametrize(("fault", "code"), [("failed", 4), ("bad-key", 3)])
@pytest.mark.parametrize("when", ["ssh-keys", "instance-types"])
def test_a_launch_that_rents_nothing_leaves_its_name_free(quick: Cloud, fault: str, code: int, when: str) -> None:
    """Whatever the provider fails at before the paid request, the same command can be typed again."""
    quick.fault(fault, when=when, times=None, after=int(when == "instance-types"))
    failed = gpu(*A10, "--no-wait")
    assert failed.returncode == code, failed.stderr
    assert state() == "refused"
    quick.core.faults.clear()
    assert gpu(*A10, "--no-wait").returncode == 0
    assert gpu("terminate", "-y").returncode == 0


def test_only_one_command_is_at_a_machine(quick: Cloud) -> None:
    """While one command launches a machine, another that would end it says so and changes nothing."""
    quick.core.timings = Timings(boot_s=600.0)
    command = begun(*A10)
    until(lambda: state() == "booting")
    busy = gpu("terminate", "a10", "-y", waits={"rentals._LOCK_WAIT_S": 0.2})
    assert busy.returncode == 20, "it goes on costing"
    assert "Another command" in busy.stderr
    assert json.loads(gpu("audit", "--json").stdout)["unresolved"] == []
    command.kill()
    said(command)
    assert gpu("terminate", "a10", "-y").returncode == 0
    assert billing(quick) == []


def _full(folder: Path) -> None:
    """Leave no byte on the disk of a folder."""
    with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"\0" * 4096)


@pytest.fixture
def small_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder on a disk of its own of 1 MB; needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here: it needs root")
    monkeypatch.setenv("GPU_HOME", str(folder / "state"))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("is_closed", [True, False], ids=["read-only", "full"])
@pytest.mark.slow
def test_a_disk_that_takes_nothing_keeps_no_machine(quick: Cloud, small_state: Path, is_closed: bool) -> None:
    """With a state folder that is full, or read-only, nothing is rented, and what is rented can be given back."""
    for name in ("one", "two"):
        assert gpu("launch", name, "--gpu", "A10", "-y", "--no-wait").returncode == 0
    rental("two").save(deadline=clock.timestamp() - 1)
    if is_closed:
        subprocess.run(["mount", "-o", "remount,ro", str(small_state)], check=True)
    else:
        _full(small_state)
    ended = gpu("terminate", "one", "-y")
    assert ended.returncode == 1, ended.stderr
    assert "one is gone, by its provider's own word" in ended.stderr
    assert billing(quick) == [], "and what was past its deadline is ended by any command"
    refused = gpu(*A10)
    assert refused.returncode == 3, refused.stderr
    assert "Nothing was rented" in refused.stderr
    assert billing(quick) == []
    if is_closed:
        subprocess.run(["mount", "-o", "remount,rw", str(small_state)], check=True)
    else:
        (small_state / "filler").unlink()
    assert gpu("terminate", "--all", "-y").returncode == 0
    assert [entry["open"] for entry in document("cost")["machines"]] == [False, False]


@pytest.mark.slow
def test_a_deadline_stops_nothing_elsewhere(quick: Cloud, counting_run: Callable[..., Run]) -> None:
    """A machine that a run has left, and that is past its deadline, is ended; the run goes on where it is."""
    assert gpu(*A10, "--no-wait").returncode == 0
    run = counting_run(count=2000, pace_s=0.03)
    journey.set_off(run)
    run.save(former=[{"machine": "a10", "settled": False}])
    rental().save(deadline=clock.timestamp() - 1, state="ready")
    assert gpu("audit").returncode == 0
    assert billing(quick) == []
    journey.refresh(run)
    assert run.record.state == "running"


def test_a_launch_is_over_at_its_deadline(quick: Cloud) -> None:
    """A machine that does not come up is given back when its time is over, by the launch itself; no other is rented."""
    quick.core.timings = Timings(boot_s=600.0)
    launched = gpu(*A10, "--max-hours", "0.001")
    assert launched.returncode == 4, launched.stderr
    assert "its time is over before it is ready" in launched.stderr
    assert len(quick.core.ours()) == 1
    assert billing(quick) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"price_cents_per_hour": 150}, "one at 1.500 USD/h; it was offered at 0.750"),
        ({"name": "gpu_8x_a10"}, "a gpu_8x_a10; gpu_1x_a10 was asked for"),
    ],
)
def test_a_machine_that_is_not_what_was_offered_is_given_back(quick: Cloud, change: dict[str, Any], said: str) -> None:
    """Another kind of machine, or a higher price, than what was asked for is not kept."""
    quick.core.timings = Timings(boot_s=600.0)
    command = begun(*A10)
    (instance,) = until(lambda: quick.core.ours())
    quick.core.timings = Timings(boot_s=600.0, term_s=0.1)
    instance.kind = {**instance.kind, **change}
    until(lambda: len(quick.core.ours()) == 2)
    command.send_signal(signal.SIGINT)
    assert said in command.communicate(timeout=60)[1]
    assert billing(quick) == [quick.core.ours()[1].instance_id]
    assert gpu("terminate", "--all", "-y").returncode == 0


@pytest.mark.parametrize("key", ["", "wrong-key-0123456789"])
def test_without_its_key_a_machine_is_said_to_cost(quick: Cloud, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """With no key, or a wrong one, what cannot be given back or gone on with is named once: id, price and link."""
    assert gpu(*A10, "--no-wait").returncode == 0
    (instance,), mine = billing(quick), os.environ["LAMBDA_API_KEY"]
    monkeypatch.setenv("LAMBDA_API_KEY", key)
    for words in (("terminate", "a10", "-y"), ("wait", "a10")):
        done = gpu(*words)
        assert done.returncode == COSTS, done.stderr
        for said in (instance, "0.75 USD/h", DASHBOARD):
            assert done.stderr.count(said) == 1, done.stderr
    monkeypatch.setenv("LAMBDA_API_KEY", mine)
    assert gpu("terminate", "a10", "-y").returncode == 0

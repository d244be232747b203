"""GPUs shared by runs: claimed whole or not at all, never twice, in the order of the queue, and left free again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import durable, locks, rundir
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import machine
from worker import devices, processes
from worker.failures import ConfigFailure

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc of Linux")
Make = Callable[..., Run]
NVIDIA_SMI = """#!/bin/sh
case "$*" in
    *index,uuid*) cat "{0}/gpus" ;;
    *memory.used*) cat "{0}/memory" ;;
    *compute-apps*) cat "{0}/apps" ;;
esac
exec cat "{0}/more"
"""


class Driver:
    """A machine's GPUs as nvidia-smi tells of them: what it answers lies in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.program = folder / "nvidia-smi"
        self.says(0, [])
        self.program.write_text(NVIDIA_SMI.format(folder), encoding="utf-8")
        self.program.chmod(0o700)

    def says(self, gpus: int, memory: list[int], apps: str = "") -> None:
        """Have so many GPUs, with so many MiB in use."""
        listed = "".join(f"{index}, GPU-{index}abc\n" for index in range(gpus))
        used = "".join(f"{index}, {mib}\n" for index, mib in enumerate(memory))
        for name, text in (("gpus", listed), ("memory", used), ("apps", apps), ("more", "")):
            (self.folder / f".{name}").write_text(text, encoding="utf-8")
            (self.folder / f".{name}").replace(self.folder / name)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver without a GPU, found first on the PATH; CUDA is told nothing."""
    made = Driver(tmp_path / "driver")
    monkeypatch.setenv("PATH", f"{made.folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


@pytest.fixture
def command(counting_agent: str) -> Iterator[Make]:
    """Makes runs of commands; at the end of the test all of them are stopped."""
    made: list[Run] = []

    def make(*words: str) -> Run:
        made.append(machine.make(counting_agent, list(words)))
        return made[-1]

    yield make
    for run in made:
        machine.ask(run, "stop", "0")


def a_run(root: Path, name: str) -> rundir.Run:
    run = rundir.Run(root / "runs" / name)
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def claims(root: Path, name: str, gpus: int | None = None, queue: bool = False) -> devices.Claims:
    return devices.Claims(a_run(root, name), gpus, queue)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (None, ["0", "1", "2"]),
        ("", []),
        ("-1", []),
        ("2,0", ["2", "0"]),
        ("1,7,0", ["1"]),
        ("GPU-2abc, 1", ["2", "1"]),
        ("GPU-2,GPU-0", ["2", "0"]),
        ("1,1,0", ["1"]),
        ("MIG-5", ["MIG-5"]),
        ("MIG-GPU-5/1/0", []),
        ("../x", []),
    ],
)
def test_what_cuda_may_use_is_what_there_is(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, told: str | None, found: list[str]
) -> None:
    """The GPUs for runs are those of the driver, or the ones CUDA_VISIBLE_DEVICES names, as CUDA itself reads it."""
    driver.says(3, [])
    if told is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert devices.visible() == found
    assert devices.count() == len(found)


def test_a_machine_without_an_answer_has_no_gpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nvidia-smi hangs, fails or is absent there is no GPU, and nobody waits for longer than its deadline."""
    driver.says(2, [])
    assert devices.count() == 2
    (driver.folder / "more").unlink()  # it lists two, and then ends with exit code 1
    assert devices.count() == 0
    monkeypatch.setattr(devices, "_ASK_S", 0.1)
    os.mkfifo(driver.folder / "more")
    assert devices.count() == 0
    driver.program.unlink()
    assert devices.count() == 0


def test_gpus_are_claimed_whole_or_not_at_all(driver: Driver, tmp_path: Path) -> None:
    """A claim that cannot have all it wants holds nothing, names who is in the way, and harms nobody."""
    driver.says(3, [])
    first, second, third = (claims(tmp_path, name, number) for name, number in (("a", 2), ("b", 2), ("c", None)))
    assert first.take()
    assert (first.devices, first.waits_for) == (["0", "1"], [])
    assert not second.take()
    assert not third.take()
    assert (second.devices, second.waits_for, third.waits_for) == ([], ["a"], ["a"])
    fourth = claims(tmp_path, "d", 1)
    assert fourth.take()
    assert fourth.devices == ["2"]
    assert not third.take()
    assert third.waits_for == ["a", "d"]
    message, hint = devices.busy(third)
    assert "a, d" in message
    assert "--queue" in hint
    assert "--gpus K" in hint
    first.release()
    assert second.take()
    assert second.devices == ["0", "1"]
    for each in (second, fourth):
        each.release()


@pytest.mark.parametrize(("there", "asked"), [(2, 3), (0, 1), (1, -1)])
def test_more_gpus_than_there_are_is_a_mistake(driver: Driver, tmp_path: Path, there: int, asked: int) -> None:
    """A run that wants more GPUs than its machine has is refused as a matter of configuration."""
    driver.says(there, [])
    with pytest.raises(ConfigFailure, match="asked for"):
        claims(tmp_path, "a", asked)


def test_a_run_that_wants_no_gpu_gets_none(driver: Driver, tmp_path: Path) -> None:
    """With 0 GPUs asked for, nothing is claimed and CUDA is shown none, while another run holds all of them."""
    driver.says(1, [])
    holder, other = claims(tmp_path, "a"), claims(tmp_path, "b", 0, queue=True)
    assert holder.take()
    assert holder.environment() == {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert other.take()
    assert other.environment()["CUDA_VISIBLE_DEVICES"] == ""
    holder.release()


def test_the_queue_is_first_in_first_out(driver: Driver, tmp_path: Path) -> None:
    """Who waits longest is served first; nobody passes, in the queue or from outside, even where GPUs are free."""
    driver.says(2, [])
    holder = claims(tmp_path, "holder", 1)
    assert holder.take()
    large = claims(tmp_path, "large", 2, queue=True)
    small = claims(tmp_path, "small", 1, queue=True)
    outside = claims(tmp_path, "outside", 1)
    assert not large.take()
    assert not small.take()
    assert not outside.take()
    assert (large.waits_for, small.waits_for, outside.waits_for) == (["holder"], ["large"], ["large", "small"])
    holder.release()
    assert not small.take()
    assert large.take()
    assert not small.take()
    assert small.waits_for == ["large"]
    large.release()
    assert small.take()
    small.release()


@pytest.mark.parametrize("whose", ["ticket", "claim"])
def test_what_the_dead_have_left_blocks_nobody(driver: Driver, tmp_path: Path, whose: str) -> None:
    """A ticket or a claim whose owner was killed counts no more, and its files may stay."""
    driver.says(1, [])
    code = (
        "import signal, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from jobs import rundir\n"
        "from worker import devices; claims = devices.Claims(rundir.Run(Path(sys.argv[2])), None, True)\n"
        "print(claims.take(), flush=True); signal.pause()"
    )
    holder = claims(tmp_path, "holder")
    assert whose == "claim" or holder.take()
    words = [sys.executable, "-c", code, str(Path(devices.__file__).parent.parent), str(a_run(tmp_path, "dead").folder)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == str(whose == "claim")
    waiting = claims(tmp_path, "waiting", queue=True)
    assert not waiting.take()
    assert waiting.waits_for == ["dead"]
    child.kill()
    child.wait()
    child.stdout.close()
    holder.release()
    assert waiting.take()
    waiting.release()


def test_a_worker_that_lives_on_keeps_the_claim(driver: Driver, tmp_path: Path) -> None:
    """A process that inherited a claim holds the GPU for as long as it lives, whatever became of the supervisor."""
    driver.says(1, [])
    first, second = claims(tmp_path, "first"), claims(tmp_path, "second")
    assert first.take()
    child = subprocess.Popen(["sleep", "1000"], pass_fds=first.locks)
    first.release()
    assert not second.take()
    assert second.waits_for == ["first"]
    child.kill()
    child.wait()
    assert second.take()
    second.release()


def test_without_a_gpu_runs_share_and_the_queue_waits_for_all_of_them(driver: Driver, tmp_path: Path) -> None:
    """On a machine without GPUs a run is never held up, unless it queues: then until no other run is going on."""
    other = a_run(tmp_path, "other")
    queued, later = claims(tmp_path, "queued", queue=True), claims(tmp_path, "later", queue=True)
    with locks.held(other.run_lock, 0), locks.held(queued.run.run_lock, 0), locks.held(later.run.run_lock, 0):
        assert claims(tmp_path, "shares").take()
        assert not queued.take()
        assert not later.take()
        assert (queued.waits_for, later.waits_for) == (["later", "other"], ["queued"])
        assert not queued.take()
        assert queued.waits_for == ["other"]
    with locks.held(queued.run.run_lock, 0), locks.held(later.run.run_lock, 0):
        assert queued.take()
        assert not later.take()
        assert later.waits_for == ["queued"]
    with locks.held(later.run.run_lock, 0):
        assert later.take()
    assert queued.environment() == {}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.booleans()), max_size=25))
def test_no_gpu_is_ever_claimed_twice(steps: list[tuple[int, int, bool]]) -> None:
    """However runs ask, wait and let go, each GPU has one holder at most, and the queue is served in its order."""
    has_four = mock.patch.object(devices, "visible", return_value=list("0123"))
    with tempfile.TemporaryDirectory() as root, has_four, mock.patch.object(locks, "_PROBE_S", 0.0):
        known: dict[int, devices.Claims] = {}
        line: list[int] = []
        for who, wanted, queue in steps:
            each = known.get(who) or claims(Path(root), f"run-{who}", wanted, queue)
            known[who] = each
            if each.devices:
                each.release()
                del known[who]
                continue
            may_be_served = not line or line[0] == who
            if each.take():
                assert may_be_served
                line = [other for other in line if other != who]
            elif each.queue and who not in line:
                line.append(who)
            if not each.devices and not each.queue:
                del known[who]
            held = [device for claim in known.values() for device in claim.devices]
            assert len(held) == len(set(held)) <= 4
        for each in known.values():
            each.release()


def test_a_busy_machine_refuses_at_once(driver: Driver, command: Make) -> None:
    """A run that finds the GPUs in use fails as `busy`, naming the run that holds them, which goes on undisturbed."""
    driver.says(2, [100, 100])
    holder, refused = command("sleep", "1000"), command("true")
    assert machine.start(holder, gpus=1)["state"] == "running"
    machine.start(refused)
    seal = machine.ended(refused)
    assert (seal.reason, seal.kind, seal.code) == ("failed", "busy", None)
    assert holder.run_id in seal.message
    assert machine.ask(holder, "state")["state"] == "running"
    machine.start(refused, expect_attempt=1, gpus=1)
    assert until(lambda: (found := machine.ask(refused, "state"))["state"] == "ended" and found)["attempt"] == 2
    assert machine.ended(refused).reason == "done"


@linux_only
def test_what_outlives_its_supervisor_keeps_the_gpus(driver: Driver, command: Make) -> None:
    """A child of the command that lives on after its supervisor was killed holds the GPUs for as long."""
    driver.says(1, [100])
    holder, other = command("sh", "-c", "sleep 1000 & exec sleep 1000"), command("true")
    machine.start(holder)
    pids = until(lambda: durable.load_json(machine.there(holder).attempt(1).pids))
    until(lambda: len(processes.marked(str(machine.there(holder).folder))) == 2)
    os.kill(pids["supervisor"]["pid"], signal.SIGKILL)
    until(lambda: len(processes.marked(str(machine.there(holder).folder))) == 1)
    machine.start(other)
    assert machine.ended(other).kind == "busy"
    for pid in processes.marked(str(machine.there(holder).folder)):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not processes.marked(str(machine.there(holder).folder)))
    machine.start(other, expect_attempt=1)
    assert until(lambda: (found := machine.ask(other, "state"))["attempt"] == 2 and found["seal"])["reason"] == "done"


def test_a_queued_run_starts_when_its_turn_comes(driver: Driver, command: Make) -> None:
    """A start returns while its run is queued, status.json says for whom it waits, and it has those GPUs afterwards."""
    driver.says(2, [100, 100])
    holder, queued = command("sleep", "1000"), command("sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    machine.start(holder)
    began = time.monotonic()
    answer = machine.start(queued, queue=True)
    assert time.monotonic() - began < 10, "half of what a start waits for a worker"
    assert (answer["started"], answer["state"], answer["attempt"]) == (True, "running", 1)
    status = until(lambda: durable.load_json(machine.there(queued).attempt(1).status))
    assert (status["state"], status["phase"], status["waits_for"]) == ("queued", "queued", [holder.run_id])
    assert not machine.there(queued).attempt(1).log.exists()
    machine.ask(holder, "stop", "5")
    assert machine.ended(queued).reason == "done"
    assert machine.log(queued) == "0,1\n"


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_queued_run_can_be_stopped(driver: Driver, command: Make, how: str) -> None:
    """A run that waits is stopped without having begun; one whose supervisor is killed while it waits has died."""
    driver.says(1, [100])
    holder, queued = command("sleep", "1000"), command("true")
    machine.start(holder)
    machine.start(queued, queue=True)
    if how == "stop":
        seal = machine.ask(queued, "stop", "5")["seal"]
        assert (seal["reason"], seal["message"]) == ("stopped", "It was stopped before it began.")
    else:
        pids = durable.load_json(machine.there(queued).attempt(1).pids)
        os.kill(pids["supervisor"]["pid"], signal.SIGKILL)
        until(lambda: machine.ask(queued, "state")["state"] == "died")
    assert not machine.there(queued).attempt(1).log.exists()
    assert machine.ask(holder, "state")["state"] == "running"


@linux_only
def test_a_gpu_that_stays_full_is_said(driver: Driver, command: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What still holds memory of a GPU after the end is said in the seal, with the processes the driver knows of."""
    driver.says(2, [100, 100], "77\n78\n")
    run = command("sh", "-c", f"printf '0, 5000\\n1, 100\\n' > {driver.folder}/memory")
    files = machine.there(run).folder.parent.parent / "agent" / run.record.agent / "worker" / "devices.py"
    files.write_text(files.read_text(encoding="utf-8").replace("FREED_WITHIN_S = 10.0", "FREED_WITHIN_S = 0.1"))
    machine.start(run)
    seal = machine.ended(run)
    assert (seal.reason, seal.message) == ("done", "GPU 0 still holds 5000 MiB (pids 77, 78).")


@linux_only
def test_what_keeps_a_gpu_open_is_ended(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of the run that has a GPU's file open is killed; one of another run, or without it, is left alone."""
    driver.says(1, [100])
    device = tmp_path / "nvidia0"
    device.touch()
    monkeypatch.setattr(devices, "_FILES", str(device))
    marked = {**os.environ, processes.RUN_MARK: "ours"}
    other = {**os.environ, processes.RUN_MARK: "another"}
    with device.open() as file:
        ours = subprocess.Popen(["sleep", "1000"], stdin=file, env=marked)
        theirs = subprocess.Popen(["sleep", "1000"], stdin=file, env=other)
    apart = subprocess.Popen(["sleep", "1000"], env=marked)
    until(lambda: {ours.pid, apart.pid} <= set(processes.marked("ours")))
    assert devices.free_again(["0"], {"0": 100}, lambda: processes.marked("ours"), lambda: None) == ""
    assert ours.wait() == -signal.SIGKILL
    for child in (theirs, apart):
        assert child.poll() is None
        child.kill()
        child.wait()


def test_memory_that_is_given_back_late_is_waited_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is free a little later is free: a driver gives memory back some time after a process has ended."""
    driver.says(1, [5000])
    ticks = iter([lambda: None, lambda: driver.says(1, [300])])
    monkeypatch.setattr(devices, "_PAUSE_S", 0.01)
    assert devices.free_again(["0"], {"0": 100}, list, lambda: next(ticks)()) == ""
    assert next(ticks, None) is None

"""Starts, stops and resumes that race each other, and what a crash between two steps leaves: all is carried on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest

from jobs import durable, locks, rows, rundir
from orchestrator import advance, cli, journey, machines, runs, summary, transport
from orchestrator.errors import ConfigError, JobFailed, NotReachable, WorkerLost
from orchestrator.home import Arrivals
from orchestrator.runs import Run
from tests.changed_code import code_with
from tests.waiting import until
from worker import agent, processes

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc of Linux")
Folder = Callable[[Run], rundir.Run]
Make = Callable[..., Run]
GPU = [sys.executable, "-m", "orchestrator.cli"]
PROBLEM = '{{"question": "Tom has {0} apples and buys 2 more. How many now?", "answer": "#### {1}"}}\n'


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=120)


def follow(run: Run) -> None:
    journey.go(run, lambda _frame, _data: None, lambda _: None)


def carry_on(run: Run) -> None:
    """What `gpu resume` does."""
    journey.carry_on(run, journey.Wish())
    follow(run)


def following(run: Run) -> subprocess.Popen[bytes]:
    """A command that follows the run, once it brings rows home."""
    child = subprocess.Popen([*GPU, "resume", run.run_id, "-q"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: good_rows(run.home.rows) >= 3)
    return child


def set_off(run: Run, there: rundir.Run, at_least: int = 3) -> None:
    """Have the run going by itself, with some rows made."""
    journey.set_off(run)
    until(lambda: good_rows(there.attempt(there.last_attempt()).rows) >= at_least)


def good_rows(path: Path) -> int:
    return rows.index(path).good if path.exists() else 0


def keys_at_home(run: Run) -> list[str]:
    return [row["key"] for row in (rows.decode(line) for _, line in rows.whole_lines(run.home.rows))]


def kill(there: rundir.Run, who: str, number: int = signal.SIGKILL) -> None:
    """Send a signal to the supervisor or the worker of the newest attempt."""
    attempt = there.attempt(there.last_attempt())
    os.kill(until(lambda: durable.load_json(attempt.pids))[who]["pid"], number)


def agents_of(run: Run, verb: str) -> list[int]:
    """The agent commands of that verb that are under way for the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0") if path.exists() else []
        if verb.encode() in words and any(word.endswith(run.run_id.encode()) for word in words):
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("number", [1, 2])
def test_an_attempt_folder_left_by_a_crash_is_taken(counting_run: Make, on_machine: Folder, number: int) -> None:
    """A crash between making an attempt's folder and counting the attempt leaves a run that starts all the same."""
    run = counting_run(count=40, pace_s=0.05)
    if number == 2:
        set_off(run, on_machine(run))
        journey.stop(run, 1.0)
    (on_machine(run).folder / "attempts" / f"{number:04d}").mkdir(parents=True)
    carry_on(run)
    assert (run.record.state, run.record.attempt) == ("sealed", number)
    assert len(keys_at_home(run)) == 40


def test_a_supervisor_that_ends_before_an_attempt_is_not_started_for_ever(counting_run: Make) -> None:
    """A supervisor that cannot begin an attempt ends the command, which passes its last words on."""
    run = counting_run()
    begins = "        processes.become_subreaper()\n"
    run.save(agent=code_with("worker/supervisor.py", begins, '        raise SystemExit("too old a kernel")\n'))
    with pytest.raises(JobFailed, match="too old a kernel"):
        follow(run)


@pytest.mark.parametrize("is_followed", [True, False])
def test_a_stop_acts_on_the_run_as_it_is_now(counting_run: Make, on_machine: Folder, is_followed: bool) -> None:
    """A stop that read the record before another command started the run stops it, followed or not."""
    run = counting_run(count=2000, pace_s=0.03)
    read_before = runs.open_folder(run.home.folder)
    if is_followed:
        child = following(run)
    else:
        set_off(run, on_machine(run))
    assert read_before.record.state == "planned"
    journey.stop(read_before, 1.0)
    assert read_before.record.state == "stopped"
    assert not locks.is_held(on_machine(run).run_lock)
    assert keys_at_home(run) == [f"t/s/{index}#0" for index in range(good_rows(on_machine(run).attempt(1).rows))]
    if is_followed:
        assert child.wait(timeout=30) == JobFailed.exit_code


def test_a_run_stopped_before_it_began_stays_stopped(counting_run: Make, on_machine: Folder) -> None:
    """A command that read the record before the run was stopped starts nothing."""
    run = counting_run()
    read_before = runs.open_folder(run.home.folder)
    journey.stop(run, 1.0)
    follow(read_before)
    assert read_before.record.state == "stopped"
    assert not on_machine(run).folder.exists()


@linux_only
def test_a_stop_during_a_start_stops_what_is_started(counting_run: Make, on_machine: Folder) -> None:
    """A stop that comes while the start is under way on the machine waits for it, and then stops the run."""
    run = counting_run(count=2000, pace_s=0.03)
    there = on_machine(run)
    there.folder.mkdir(parents=True)
    slow = locks.take(there.start_lock)
    assert slow is not None
    child = subprocess.Popen([*GPU, "resume", run.run_id, "-q"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: agents_of(run, "start"))
    with ThreadPoolExecutor() as pool:
        run.reload()
        stopping = pool.submit(journey.stop, run, 1.0)
        until(lambda: agents_of(run, "stop"))
        os.close(slow)
        stopping.result(timeout=30)
    assert run.record.state == "stopped"
    assert not locks.is_held(there.run_lock)
    assert child.wait(timeout=30) == JobFailed.exit_code


@linux_only
def test_a_stop_between_two_attempts_is_heard(counting_run: Make, on_machine: Folder, tmp_path: Path) -> None:
    """A stop that comes when the supervisor has not yet counted its attempt ends that attempt, not only the last."""
    gate = tmp_path / "gate"
    gate.touch()
    sweeps = "        processes.kill(processes.marked(str(self.run.folder)))\n"
    waits = f"        while not os.path.exists({str(gate)!r}):\n            time.sleep(0.02)\n"
    run = counting_run(count=2000, pace_s=0.03)
    run.save(agent=code_with("worker/supervisor.py", sweeps, sweeps + waits))
    there, machine = on_machine(run), machines.this_computer()
    set_off(run, there)
    journey.stop(run, 1.0)
    gate.unlink()
    asked_before = there.attempt(1).stop.stat().st_ino
    resuming = subprocess.Popen([*GPU, "resume", run.run_id, "--detach"], stdout=subprocess.DEVNULL)
    until(lambda: locks.is_held(there.run_lock))
    for starter in agents_of(run, "start"):  # which would keep the stop waiting for up to 20 s
        os.kill(starter, signal.SIGKILL)
    assert resuming.wait(timeout=30) == NotReachable.exit_code
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(advance.stop, run, machine, 1.0)
        until(lambda: there.attempt(1).stop.stat().st_ino != asked_before)
        gate.touch()
        answer = stopping.result(timeout=30)
    assert (answer["attempt"], answer["seal"]["reason"]) == (2, "stopped")
    assert not locks.is_held(there.run_lock)


def test_a_stop_after_a_crash_in_the_start_brings_the_rows_home(counting_run: Make, on_machine: Folder) -> None:
    """When the laptop died between the start on the machine and its record of it, a stop brings the rows home."""
    run = counting_run(count=2000, pace_s=0.03)
    set_off(run, on_machine(run))
    run.save(state="pushed", attempt=0)
    journey.stop(run, 1.0)
    assert (run.record.state, run.record.attempt) == ("stopped", 1)
    assert run.record.rows_home == len(keys_at_home(run)) == good_rows(on_machine(run).attempt(1).rows) > 0


def test_setting_off_acts_on_the_run_as_it_is_now(counting_run: Make) -> None:
    """A detached resume that read the record before the run was done leaves it done."""
    run = counting_run(count=5)
    read_before = runs.open_folder(run.home.folder)
    follow(run)
    journey.set_off(read_before)
    assert runs.open_folder(run.home.folder).record == run.record
    assert read_before.record.state == "sealed"


def test_setting_off_beside_a_follower_returns(counting_run: Make) -> None:
    """A detached resume of a run that another command follows returns while that one goes on."""
    run = counting_run(count=2000, pace_s=0.03)
    child = following(run)
    journey.set_off(run)
    assert run.record.state == "running"
    assert child.poll() is None
    child.kill()
    child.wait()


def test_a_stop_beside_a_suspended_follower_says_whom_to_wake(
    counting_run: Make, on_machine: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower that sleeps does not keep a run from being stopped; its pid is named, and a pull does the rest."""
    monkeypatch.setattr(journey, "_PATIENCE_S", 0.2)
    run = counting_run(count=2000, pace_s=0.03)
    child = following(run)
    child.send_signal(signal.SIGSTOP)
    run.reload()
    with pytest.raises(NotReachable, match=f"process {child.pid} "):
        journey.stop(run, 1.0)
    assert not locks.is_held(on_machine(run).run_lock)
    child.kill()
    child.wait()
    journey.refresh(run)
    assert run.record.state == "stopped"
    assert len(keys_at_home(run)) == good_rows(on_machine(run).attempt(1).rows)


def test_a_second_stop_may_have_less_patience(counting_run: Make, on_machine: Folder) -> None:
    """The grace of the last stop counts: one of 0.1 s ends a worker that an earlier one gave five minutes."""
    run = counting_run(count=2000, pace_s=0.03, ignore_term=True)
    set_off(run, on_machine(run))
    words = transport.agent_words(machines.this_computer(), run.record.agent, "stop", run.run_id, "300")
    patient = subprocess.Popen(words)
    until(on_machine(run).attempt(1).stop.exists)
    patient.kill()
    patient.wait()
    answer = advance.stop(run, machines.this_computer(), 0.1)
    assert answer["state"] == "ended"
    assert answer["seal"]["reason"] == "stopped"


def test_stopping_all_does_not_end_at_one_that_fails(counting_run: Make, on_machine: Folder) -> None:
    """`gpu stop --all` stops every run that answers, and fails with the error of the one that did not."""
    first, second = sorted((counting_run(count=2000, pace_s=0.03) for _ in range(2)), key=lambda run: run.run_id)
    for run in (first, second):
        set_off(run, on_machine(run))
    code = first.record.agent
    first.save(agent="0" * 16)
    stopped = gpu("stop", "--all")
    first.save(agent=code)
    assert stopped.returncode == NotReachable.exit_code
    assert f"{second.run_id} is stopped" in stopped.stdout
    assert not locks.is_held(on_machine(second).run_lock)


@linux_only
def test_a_stop_ends_what_a_dead_supervisor_left(
    counting_run: Make, on_machine: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child of the worker that keeps the run's lock after its supervisor was killed is ended by a stop."""
    monkeypatch.setattr(agent, "_STOP_MARGIN_S", 0.5)
    forks = "    if os.fork() == 0:\n        os.setsid()\n        signal.pause()\n"
    run = counting_run(count=2000, pace_s=0.03)
    run.save(agent=code_with("worker/counting.py", "    todo =", f"{forks}    todo ="))
    there = on_machine(run)
    set_off(run, there)
    kill(there, "supervisor")
    until(lambda: len(processes.marked(str(on_machine(run).folder))) == 1)
    assert locks.is_held(there.run_lock)
    assert agent.stop(there, 0.1)["state"] == "died"
    assert processes.marked(str(on_machine(run).folder)) == []


@pytest.mark.parametrize("grace", ["nan", "-1", "inf"])
def test_a_grace_that_is_no_time_is_refused(grace: str) -> None:
    """A stop takes a grace from 0 to a day only: no worker is given for ever, or less than nothing."""
    with pytest.raises(click.BadParameter, match="is not a number of seconds"):
        cli.gpu.main(["stop", "--grace", grace], standalone_mode=False)


def test_a_folder_lost_with_its_supervisor_is_begun_again(counting_run: Make, on_machine: Folder) -> None:
    """With supervisor and folder gone, a resume makes only what is not home, and overwrites no copy."""
    run = counting_run(count=60, pace_s=0.02)
    there = on_machine(run)
    set_off(run, there)
    journey.refresh(run)
    before, copy = run.home.rows.read_bytes(), run.home.machine("local").attempt(1).rows.read_bytes()
    kill(there, "supervisor")
    until(lambda: not locks.is_held(there.run_lock))
    shutil.rmtree(there.folder)
    carry_on(run)
    assert run.record.state == "sealed"
    assert sorted(keys_at_home(run)) == sorted(f"t/s/{index}#0" for index in range(60))
    assert run.home.rows.read_bytes().startswith(before)
    assert good_rows(there.attempt(1).rows) == 60 - before.count(b"\n")
    assert copy in [path.read_bytes() for path in (run.home.folder / "machines").rglob("rows.jsonl*")]


def test_a_run_unknown_to_its_machine_is_lost_not_done(counting_run: Make) -> None:
    """A run that had begun and of which its machine knows nothing is `lost`, with what to type; it never passes."""
    run = counting_run()
    run.save(state="running", attempt=1)
    arrivals = Arrivals.open(run.home, "local")
    assert arrivals is not None
    with arrivals:
        advance.settle(run, arrivals, {"state": "none", "attempt": 0, "seal": None})
    with pytest.raises(WorkerLost) as said:
        advance.raise_if_not_done(run)
    assert f"gpu resume {run.run_id}" in said.value.hint


@pytest.mark.slow
def test_a_lost_folder_does_not_change_what_is_measured(trained: None) -> None:
    """After the machine lost its folder, a resume with another dataset is refused: the first fingerprint stays."""
    data = Path("data.jsonl")
    data.write_text("".join(PROBLEM.format(n, n + 2) for n in range(1, 4)), encoding="utf-8")
    settings = ("--set", "dataset=data.jsonl", "--set", "samples=1", "--set", "max_new_tokens=4")
    assert gpu("run", "eval-gsm8k", "-q", *settings).returncode == 0
    run = runs.find(None)
    before = durable.load_json(run.home.machine("local").resolved)["fingerprint"]
    run.save(state="stopped")
    shutil.rmtree(machines.this_computer().root / "runs" / run.run_id)
    data.write_text("".join(PROBLEM.format(n, n + 2) for n in range(1, 6)), encoding="utf-8")
    refused = gpu("resume", "-q")
    assert refused.returncode == ConfigError.exit_code, refused.stderr
    assert durable.load_json(run.home.machine("local").resolved)["fingerprint"] == before
    assert len(keys_at_home(run)) == 3


def test_a_summary_older_than_the_run_is_made_anew(counting_run: Make, on_machine: Folder) -> None:
    """A summary that a kill kept from being brought up to date is not shown, though the run ended the same way."""
    run = counting_run(count=2000, pace_s=0.03)
    set_off(run, on_machine(run))
    journey.stop(run, 1.0)
    older = durable.load_json(run.home.summary)
    journey.carry_on(run, journey.Wish())
    set_off(run, on_machine(run))
    journey.stop(run, 1.0)
    durable.save_json(run.home.summary, older)
    found = summary.current(run)
    assert found["n_rows"] == run.record.rows_home > older["n_rows"]
    assert durable.load_json(run.home.summary) == found


@pytest.mark.parametrize("missing", ["cwd", "python"])
def test_a_worker_that_cannot_be_started_is_said(
    counting_run: Make, on_machine: Folder, tmp_path: Path, missing: str
) -> None:
    """With its working folder or its Python gone, a run fails at once and names what is missing; mended, it goes on."""
    run = counting_run(count=5)
    right = getattr(run.record, missing)
    run.save(**{missing: str(tmp_path / "not-there")})
    follow(run)
    assert run.record.state == "failed"
    with pytest.raises(ConfigError, match="not-there"):
        advance.raise_if_not_done(run)
    assert len(on_machine(run).attempts()) == 1
    run.save(**{missing: right})
    carry_on(run)
    assert run.record.state == "sealed"


def test_rows_with_errors_are_no_progress(counting_run: Make, on_machine: Folder) -> None:
    """A worker that crashes after rows with errors only is given up after two crashes, not restarted for ever."""
    good, bad = ('"error": None, "example_id"', '"error": "does not fit", "example_id"')
    run = counting_run(crash_after=1)
    run.save(agent=code_with("worker/counting.py", good, bad))
    follow(run)
    assert run.record.state == "failed"
    assert len(on_machine(run).attempts()) == 2


@linux_only
def test_a_signal_without_a_name_is_a_kill_like_any_other(counting_run: Make, on_machine: Folder) -> None:
    """A worker killed by a real-time signal is started again, and the seal of its attempt names the signal."""
    run = counting_run(count=40, pace_s=0.03)
    set_off(run, on_machine(run))
    kill(on_machine(run), "worker", signal.SIGRTMIN + 6)
    follow(run)
    assert run.record.state == "sealed"
    seal = rundir.Seal.load(on_machine(run).attempt(1).exit)
    assert seal is not None
    assert seal.signal == signal.SIGRTMIN + 6

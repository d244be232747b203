"""A run followed from start to home by real processes, with kills in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import durable, rows, rundir
from orchestrator import advance, agents, config, journey, machines
from orchestrator.home import Arrivals
from orchestrator.runs import Run
from tests.waiting import until

Folder = Callable[[Run], rundir.Run]
GPU = [sys.executable, "-m", "orchestrator.cli"]


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=120)


def follow(run: Run) -> None:
    journey.go(run, lambda _frame, _data: None, lambda _: None)


def keys_at_home(run: Run) -> list[str]:
    return [row["key"] for row in (rows.decode(line) for _, line in rows.whole_lines(run.home.rows))]


def assert_home(run: Run, on_machine: rundir.Run, count: int) -> None:
    run.reload()
    assert run.record.state == "sealed"
    keys = keys_at_home(run)
    assert len(keys) == len(set(keys)) == count
    for attempt in on_machine.attempts():
        copy = run.home.machine("local").attempt(attempt.number)
        assert copy.log.read_bytes() == attempt.log.read_bytes()
        seal = rundir.Seal.load(attempt.exit)
        assert seal is not None
        assert copy.rows.read_bytes() == attempt.rows.read_bytes()[: seal.files["rows.jsonl"]["bytes"]]


def test_a_run_comes_home_whole(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """Advanced until it has ended, a run is sealed, with rows and log at home byte for byte and a summary."""
    run = counting_run(count=50)
    follow(run)
    assert_home(run, on_machine(run), 50)
    summary = durable.load_json(run.home.summary)
    assert summary["n_rows"] == 50
    assert summary["selection"]["first"]["value"] == 1.0


def test_a_killed_laptop_process_is_carried_on_by_resume(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """kill -9 of the command that follows a run, several times: `gpu resume` brings everything home, each row once."""
    run = counting_run(count=120, pace_s=0.03)
    for goal in (5, 30, 60):
        child = subprocess.Popen([*GPU, "resume", run.run_id], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda goal=goal: run.home.rows.exists() and rows.index(run.home.rows).good >= goal)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(run.run_id)
    assert_home(run, on_machine(run), 120)


def test_everything_killed_at_once_is_carried_on(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """Worker, supervisor and laptop process all killed: `gpu resume` starts a new attempt that does what is missing."""
    run = counting_run(count=60, pace_s=0.03)
    child = subprocess.Popen([*GPU, "resume", run.run_id], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = on_machine(run).attempt(1)
    until(lambda: rows.index(first.rows).good >= 10)
    known = until(lambda: durable.load_json(first.pids))
    for pid in (child.pid, known["supervisor"]["pid"], known["worker"]["pid"]):
        os.kill(pid, signal.SIGKILL)
    child.wait()
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    run.reload()
    assert run.record.attempt == 2
    assert sorted(keys_at_home(run)) == sorted(f"t/s/{index}#0" for index in range(60))


def test_a_lost_worker_is_said_with_what_to_type(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """When the supervisor dies while a command follows, that command ends with exit code 5 and names the resume."""
    run = counting_run(count=500, pace_s=0.03)
    child = subprocess.Popen([*GPU, "resume", run.run_id], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = on_machine(run).attempt(1)
    known = until(lambda: durable.load_json(first.pids))
    until(lambda: run.home.rows.exists())
    os.kill(known["supervisor"]["pid"], signal.SIGKILL)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 5
    assert f"gpu resume {run.run_id}" in said
    run.reload()
    assert run.record.state == "lost"


def test_two_commands_may_follow_one_run(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """A second `gpu resume` beside the first waits for it; both end well, each row is home once."""
    run = counting_run(count=40, pace_s=0.03)
    children = [subprocess.Popen([*GPU, "resume", run.run_id], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert_home(run, on_machine(run), 40)


def test_stop_brings_the_last_rows_home(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """`gpu stop` ends a detached run; every row it wrote is home, and a resume does the rest."""
    run = counting_run(count=100, pace_s=0.03)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: rows.index(on_machine(run).attempt(1).rows).good >= 5)
    stopped = gpu("stop", run.run_id, "--json")
    assert stopped.returncode == 0, stopped.stderr
    (document,) = json.loads(stopped.stdout)
    assert document["state"] == "stopped"
    assert document["rows_home"] == rows.index(on_machine(run).attempt(1).rows).good
    assert gpu("resume", run.run_id, "-q").returncode == 0
    assert_home(run, on_machine(run), 100)


def test_runs_tells_what_stands_where(counting_run: Callable[..., Run]) -> None:
    """`gpu runs --json` is one document that names state and rows of every run, from any directory."""
    run = counting_run(count=10)
    follow(run)
    os.chdir("/")
    listed = json.loads(gpu("runs", "--json").stdout)
    assert [(entry["run_id"], entry["state"], entry["rows_home"]) for entry in listed] == [(run.run_id, "sealed", 10)]


def test_logs_are_complete_and_harmless(counting_run: Callable[..., Run]) -> None:
    """`gpu logs -f` of a running run prints every line once, to the end."""
    run = counting_run(count=60, pace_s=0.02)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    shown = gpu("logs", run.run_id, "-f", "-n", "100000").stdout
    assert [line for line in shown.splitlines() if line.startswith("row ")] == [f"row {index}" for index in range(60)]


def test_a_machine_that_lost_the_folder_begins_from_what_is_home(
    counting_run: Callable[..., Run], on_machine: Folder
) -> None:
    """With the machine's run folder gone, a resume sends the rows at home along and only the rest is made anew."""
    run = counting_run(count=60, pace_s=0.03)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: rows.index(on_machine(run).attempt(1).rows).good >= 20)
    gpu("stop", run.run_id)
    before = run.home.rows.read_bytes()
    subprocess.run(["rm", "-rf", str(on_machine(run).folder)], check=True)
    assert gpu("resume", run.run_id, "-q").returncode == 0
    run.reload()
    assert run.record.state == "sealed"
    assert run.home.rows.read_bytes().startswith(before), "rows at home are never overwritten"
    assert len(keys_at_home(run)) == len(set(keys_at_home(run))) == 60
    made_here = rows.index(on_machine(run).attempt(1).rows).good
    assert made_here == 60 - before.count(b"\n")


def test_an_interrupt_says_how_to_carry_on(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """Ctrl-C ends the command with 130, leaves the run as it is, and prints how to carry on and how to stop it."""
    run = counting_run(count=300, pace_s=0.03)
    child = subprocess.Popen(
        [*GPU, "resume", run.run_id],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    until(lambda: run.home.rows.exists() and rows.index(run.home.rows).good >= 3)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert f"gpu resume {run.run_id}" in said
    assert f"gpu stop {run.run_id}" in said
    assert "Traceback" not in said
    before = rows.index(on_machine(run).attempt(1).rows).good
    until(lambda: rows.index(on_machine(run).attempt(1).rows).good > before)


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "attempts/0001/../../x", "attempts/1/rows.jsonl", "a"])
def test_a_name_that_points_elsewhere_is_refused(counting_run: Callable[..., Run], name: str) -> None:
    """A file name sent by a machine that is not one of a run's is refused before anything is written."""
    run = counting_run()
    before = sorted(Path.cwd().parent.rglob("*"))
    arrivals = Arrivals.open(run.home, "local")
    assert arrivals is not None
    with arrivals, pytest.raises(Exception, match="not one of a run's"):
        arrivals.take({"whole": name, "bytes": 1, "sha256": ""}, b"x")
    assert [path for path in sorted(Path.cwd().parent.rglob("*")) if path.name != ".lock"] == before


def test_new_code_is_taken_only_when_asked_for(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """A resume keeps the worker code the run began with; `--new-code` takes today's and records both."""
    run = counting_run(count=5)
    began_with = run.record.agent
    follow(run)
    assert run.record.agent == began_with
    run.save(state="stopped")
    journey.carry_on(run, journey.Wish(new_code=True))
    assert run.record.code_changes[0]["from"] == began_with
    assert run.record.agent == run.record.code_changes[0]["to"] != began_with


def test_a_step_done_twice_is_done_once(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """Every step of the journey repeated from an older record leads to the same run: one attempt, each row once."""
    run = counting_run(count=10)
    machine = machines.this_computer()
    arrivals = Arrivals.open(run.home, machine.name)
    assert arrivals is not None
    with arrivals:
        for state in ("planned", "pushed", "planned", "pushed", "running"):
            run.save(state=state)
            advance.advance(run, machine, arrivals, lambda _frame, _data: None)
    assert_home(run, on_machine(run), 10)
    assert len(on_machine(run).attempts()) == 1
    assert config.state_folder().is_dir()


def test_stop_waits_for_the_command_that_follows(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """A stop beside a following `gpu resume` says how the run ended, not that it still runs."""
    run = counting_run(count=500, pace_s=0.03)
    child = subprocess.Popen([*GPU, "resume", run.run_id, "-q"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: run.home.rows.exists() and rows.index(run.home.rows).good >= 3)
    stopped = gpu("stop", run.run_id)
    assert "is stopped" in stopped.stdout, stopped.stdout + stopped.stderr
    assert child.wait(timeout=30) == 10


def test_modules_of_the_user_are_never_run_instead_of_ours(
    counting_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project with its own `worker` package and `select.py`, on PYTHONPATH too, changes nothing and is not run."""
    own = agents.digest(agents.sources())
    script = "import sys; sys.path.insert(0, '.'); from orchestrator import agents as a; print(a.digest(a.sources()))"
    for names in (["worker/__init__.py", "worker/__main__.py"], ["select.py", "contextlib.py"]):
        for name in names:
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text("open('was-run', 'w')\nraise SystemExit(99)\n", encoding="utf-8")
        if "select.py" not in names:  # with those on its path no Python would start
            seen = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
            assert seen.stdout.strip() == own
    run = counting_run(count=5)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    follow(run)
    assert run.record.state == "sealed"
    assert not Path("was-run").exists()

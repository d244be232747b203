"""Machines that a run has left, that were forgotten, or that do not let us in: nothing is lost, nobody is stuck."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs import rows, rundir
from orchestrator import planning, runs, sync
from orchestrator.cli import run as commands
from orchestrator.errors import ConfigError, HostKeyChanged, NotReachable, UsageError
from orchestrator.runs import Run
from tests.rig import Proxy, Reachable, Sshd
from tests.waiting import until

GPU = [sys.executable, "-m", "orchestrator.cli"]
Make = Callable[..., Run]
Box = Callable[..., Sshd]


def gpu(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=120, **how)


def there(box: Sshd, run: Run) -> rundir.Run:
    return rundir.Run(box.home / ".gpu" / "runs" / run.run_id)


def made(box: Sshd, run: Run) -> int:
    return sum(rows.index(attempt.rows).good for attempt in there(box, run).attempts())


def running(box: Sshd, run: Run) -> None:
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: made(box, run) >= 3)


@pytest.mark.slow
def test_a_machine_that_was_never_heard_again_is_not_forgotten(box: Box, counting_run: Make) -> None:
    """Taken over, planned back on the silent machine and moved once more: its own word is needed each time."""
    first = box("first")
    box("second")
    run = counting_run(on="first", count=300, pace_s=0.05)
    running(first, run)
    first.kill_all()
    assert gpu("resume", run.run_id, "--on", "second", "--take-over", "--detach").returncode == 0
    assert gpu("stop", run.run_id).returncode == 0
    assert gpu("resume", run.run_id, "--on", "first").returncode == NotReachable.exit_code
    refused = gpu("resume", run.run_id, "--on", "second")
    assert refused.returncode == NotReachable.exit_code
    assert "unreachable is not dead" in refused.stderr
    first.start()
    assert gpu("pull", run.run_id).returncode == 0
    assert there(first, run).state().state == "ended", "it was found again, and stopped"


def test_a_changed_host_key_can_be_left_by_taking_over(box: Box, counting_run: Make) -> None:
    """A machine that was installed anew refuses everything but --take-over; the run then goes on elsewhere."""
    first, second = box("first"), box("second")
    run = counting_run(on="first", count=20, pace_s=0.05)
    running(first, run)
    first.new_host_key()
    first.restart()
    assert gpu("resume", run.run_id, "--on", "second").returncode == HostKeyChanged.exit_code
    done = gpu("resume", run.run_id, "--on", "second", "--take-over")
    assert done.returncode == 0, done.stderr
    assert "first did not answer" in done.stderr
    assert there(second, run).state().state == "ended"


@pytest.mark.slow
def test_a_forgotten_machine_bricks_no_run(box: Box, counting_run: Make) -> None:
    """What was on a machine that is forgotten can be shown, stopped, reported and carried on elsewhere."""
    first, second = box("first"), box("second")
    done, half, planned = (counting_run(on="first", count=count, pace_s=0.03) for count in (5, 60, 5))
    assert gpu("resume", done.run_id).returncode == 0
    running(first, half)
    assert gpu("stop", half.run_id).returncode == 0
    assert gpu("forget", "first").returncode == 0
    for words in (["logs", done.run_id], ["pull", done.run_id], ["resume", done.run_id], ["report", half.run_id]):
        found = gpu(*words)
        assert found.returncode == 0, (words, found.stderr)
    assert gpu("stop", planned.run_id).returncode == 0
    moved = gpu("resume", half.run_id, "--on", "second")
    assert moved.returncode == 0, moved.stderr
    assert made(first, half) + made(second, half) == 60


def test_forgetting_asks_before_it_gives_rows_up(box: Box, counting_run: Make) -> None:
    """A machine that still runs something, or was left unheard, is forgotten only with --discard."""
    first = box("first")
    run = counting_run(on="first", count=300, pace_s=0.05)
    running(first, run)
    assert gpu("forget", "first").returncode == UsageError.exit_code
    first.kill_all()
    assert gpu("resume", run.run_id, "--on", "local", "--take-over", "--detach").returncode == 0
    assert gpu("forget", "first").returncode == UsageError.exit_code
    assert gpu("forget", "first", "--discard").returncode == 0
    assert gpu("stop", run.run_id).returncode == 0


def test_looking_at_runs_asks_nobody_unless_told(
    box: Box, counting_run: Make, machine_room: Box, proxies: Callable[[Reachable], Proxy]
) -> None:
    """`gpu runs` and `gpu status` open no connection, whatever the records say; with --refresh they do."""
    from orchestrator import enrolment, ssh_config

    server = machine_room("box")
    proxy = proxies(server)
    address = ssh_config.Address(server.user, proxy.address, proxy.port)
    enrolment.add(enrolment.Asked("box", address, server.key, sys.executable))
    run = counting_run(on="box", count=300, pace_s=0.05)
    running(server, run)
    before = proxy.connections
    assert json.loads(gpu("runs", "--json").stdout)[0]["state"] == "running"
    assert gpu("status").returncode == 0
    assert proxy.connections == before
    assert gpu("runs", "--refresh").returncode == 0
    assert proxy.connections > before


def test_one_machine_in_trouble_hides_no_runs(box: Box, counting_run: Make) -> None:
    """With one host key changed, the others are looked at all the same, and the document is whole."""
    first, second = box("first"), box("second")
    runs_made = [counting_run(on=name, count=300, pace_s=0.05) for name in ("first", "second")]
    for server, run in zip((first, second), runs_made, strict=True):
        running(server, run)
    first.new_host_key()
    first.restart()
    shown = gpu("runs", "--refresh", "--json")
    assert shown.returncode == 0
    assert {entry["machine"]: entry["state"] for entry in json.loads(shown.stdout)} == {
        "first": "running",
        "second": "running",
    }
    assert "another host key" in shown.stderr


def test_wishes_hold_for_a_move_too(box: Box, counting_run: Make) -> None:
    """--queue and --new-code are heard when the run goes on elsewhere."""
    first = box("first")
    box("second")
    run = counting_run(on="first", count=200, pace_s=0.03)
    running(first, run)
    assert gpu("stop", run.run_id).returncode == 0
    code = (Path(os.environ["GPU_HOME"]) / "agents" / run.record.agent / "worker" / "counting.py").read_bytes()
    assert code
    gpu("resume", run.run_id, "--on", "second", "--queue", "--new-code", "--detach")
    record = runs.find(run.run_id).record
    assert record.queue
    assert len(record.code_changes) == 1


def test_much_is_sent_elsewhere_only_when_somebody_says_yes(
    box: Box, counting_run: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The size guard stands before a move too: refused, the run stays where it was; with -y it goes."""
    box("second")
    monkeypatch.setattr(sync, "SIZE_GUARD_BYTES", 1000)
    (tmp_path / "rows.jsonl").write_bytes(b"x" * 1001)
    run = counting_run(count=3, dataset=str(tmp_path / "rows.jsonl"))
    asked = CliRunner().invoke(commands.resume, [run.run_id, "--on", "second", "--detach"])
    assert isinstance(asked.exception, UsageError)
    assert runs.find(run.run_id).record.machine == "local"
    sent = CliRunner().invoke(commands.resume, [run.run_id, "--on", "second", "--detach", "-y"])
    assert sent.exit_code == 0, sent.output
    assert runs.find(run.run_id).record.machine == "second"
    assert gpu("resume", run.run_id).returncode == 0


def test_a_run_comes_to_this_computer_only_if_it_can_run_here(
    box: Box, counting_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that needs an environment is refused here, before anything is stopped, when a package is missing."""
    server = box("box")
    run = counting_run(on="box", count=300, pace_s=0.05)
    running(server, run)
    run.reload()
    run.save(environment="train")
    monkeypatch.setattr(planning, "WORKER_PACKAGES", ("torch", "no_such_package"))
    asked = CliRunner().invoke(commands.resume, [run.run_id, "--on", "local", "--take-over"])
    assert isinstance(asked.exception, ConfigError)
    assert "no_such_package" in asked.exception.message
    assert there(server, run).state().state == "running"


def test_ctrl_c_ends_a_push_at_once(
    box: Box, machine_room: Box, proxies: Callable[[Reachable], Proxy], tmp_path: Path
) -> None:
    """Interrupted while much is sent over a slow line, the command ends within seconds and leaves nothing behind."""
    from orchestrator import enrolment, ssh_config

    server = machine_room("box")
    proxy = proxies(server)
    address = ssh_config.Address(server.user, proxy.address, proxy.port)
    enrolment.add(enrolment.Asked("box", address, server.key, sys.executable))
    Path("big.bin").write_bytes(os.urandom(30_000_000))
    proxy.throttle(400_000, ["up"])
    words = [*GPU, "run", "--on", "box", "--environment", "none", "--", "true"]
    command = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    incoming = server.home / ".gpu" / "store" / "incoming"
    until(lambda: incoming.is_dir() and any(path.stat().st_size for path in incoming.iterdir()), 60)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=10)
    assert command.returncode == 130, said

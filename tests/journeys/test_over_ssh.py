"""A run on a machine over SSH: whatever is cut, killed or changed, each row is at home once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rows, rundir
from orchestrator import advance, journey, machines, runs
from orchestrator.errors import NotReachable, UsageError
from orchestrator.runs import Run
from tests.rig import Proxy, Reachable, Sshd
from tests.waiting import until

GPU = [sys.executable, "-m", "orchestrator.cli"]
Make = Callable[..., Run]
Box = Callable[..., Sshd]


def gpu(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=120, **how)


def started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*GPU, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def there(box: Sshd, run: Run) -> rundir.Run:
    return rundir.Run(box.home / ".gpu" / "runs" / run.run_id)


def made_there(box: Sshd, run: Run) -> list[str]:
    paths = [attempt.rows for attempt in there(box, run).attempts()]
    return [row["key"] for path in paths for row in (rows.decode(line) for _, line in rows.whole_lines(path))]


def assert_home(run: Run, count: int, *boxes: Sshd) -> None:
    """Every row once, rows and logs as the machines have them, and nothing of the run alive on any machine."""
    run.reload()
    assert run.record.state == "sealed", run.record
    keys = [row["key"] for row in (rows.decode(line) for _, line in rows.whole_lines(run.home.rows))]
    assert sorted(keys) == sorted({f"t/s/{index}#0" for index in range(count)})
    for box in boxes:
        for attempt in there(box, run).attempts():
            copy = run.home.machine(box.folder.name).attempt(attempt.number)
            assert copy.log.read_bytes() == attempt.log.read_bytes()
        until(lambda box=box: not box.processes(), 10)


def test_a_run_comes_home_whole_over_ssh(box: Box, counting_run: Make) -> None:
    """`gpu resume` of a planned run sends, starts, follows and brings home; nothing stays alive there."""
    there = box("box")
    run = counting_run(on="box", count=50)
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert_home(run, 50, there)
    assert json.loads(gpu("runs", "--json").stdout)[0]["machine"] == "box"


@pytest.mark.parametrize("count", [0, 500, 1500, 2500, 3500, 5000, 8000, 12_000, 20_000])
@pytest.mark.first(3)
def test_a_connection_cut_at_any_byte_starts_the_run_once(
    box: Box, counting_run: Make, proxies: Callable[[Reachable], Proxy], machine_room: Box, count: int
) -> None:
    """However early the connection dies, repeating the command ends with one attempt and all rows."""
    run = counting_run(on="box", count=5)
    server = machine_room("box")
    proxy = proxies(server)
    _add("box", server, proxy)
    proxy.cut_after(count, "up")
    cut = gpu("resume", run.run_id)
    assert cut.returncode in (0, NotReachable.exit_code), cut.stderr
    assert "Socket" not in cut.stderr
    proxy.pass_all()
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert len(there(server, run).attempts()) == 1
    assert_home(run, 5, server)


def _add(name: str, server: Sshd, where: Reachable) -> None:
    from orchestrator import enrolment, ssh_config

    address = ssh_config.Address(server.user, where.address, where.port)
    enrolment.add(enrolment.Asked(name, address, server.key, sys.executable))


def test_following_goes_on_when_sshd_is_restarted(box: Box, counting_run: Make) -> None:
    """Every connection cut and the server away for a while: the command says so, goes on by itself, and is done."""
    server = box("box")
    run = counting_run(on="box", count=60, pace_s=0.05)
    command = started("resume", run.run_id)
    until(lambda: run.home.rows.exists() and rows.index(run.home.rows).good >= 5)
    server.kill_all()
    until(lambda: machines.news("box").get("reachable") is False)
    server.start()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    assert "answers again" in said
    assert len(there(server, run).attempts()) == 1
    assert_home(run, 60, server)


def test_the_log_goes_on_at_the_exact_byte(box: Box, counting_run: Make) -> None:
    """`gpu logs -f` across a cut prints each line once, as the machine has it, and says on one line that it was cut."""
    server = box("box")
    run = counting_run(on="box", count=60, pace_s=0.05)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    command = started("logs", "-f", "-n", "100000", run.run_id)
    until(lambda: run.home.rows.exists() and rows.index(run.home.rows).good >= 10)
    server.kill_all()
    until(lambda: machines.news("box").get("reachable") is False)
    server.start()
    printed, said = command.communicate(timeout=90)
    assert printed == there(server, run).attempt(1).log.read_text()
    assert said.count("Trying again") == 1
    assert_home(run, 60, server)


def test_a_stopped_run_goes_on_elsewhere(box: Box, counting_run: Make) -> None:
    """Stopped on one machine and resumed on another, a run makes only the rows that are missing."""
    first, second = box("first"), box("second")
    run = counting_run(on="first", count=40, pace_s=0.05)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: len(made_there(first, run)) >= 10)
    assert gpu("stop", run.run_id).returncode == 0
    before = set(made_there(first, run))
    done = gpu("resume", run.run_id, "--on", "second")
    assert done.returncode == 0, done.stderr
    assert not before & set(made_there(second, run))
    assert_home(run, 40, first, second)


@pytest.mark.slow
def test_a_run_comes_back_to_a_machine_it_was_on(box: Box, counting_run: Make) -> None:
    """From one machine to another and back: the first one is told what the other made, and makes none of it again."""
    first, second = box("first"), box("second")
    run = counting_run(on="first", count=60, pace_s=0.05)
    for name, server in (("first", first), ("second", second)):
        assert gpu("resume", run.run_id, "--on", name, "--detach").returncode == 0
        before = len(made_there(server, run))
        until(lambda server=server, before=before: len(made_there(server, run)) >= before + 8)
        assert gpu("stop", run.run_id).returncode == 0
    done = gpu("resume", run.run_id, "--on", "first")
    assert done.returncode == 0, done.stderr
    both = made_there(first, run) + made_there(second, run)
    assert len(both) == len(set(both)) == 60
    assert_home(run, 60, first, second)


def test_a_running_run_is_not_started_elsewhere(box: Box, counting_run: Make) -> None:
    """While it runs on one machine, a resume on another is refused, and nothing changes; --take-over stops it first."""
    first, second = box("first"), box("second")
    run = counting_run(on="first", count=300, pace_s=0.05)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    refused = gpu("resume", run.run_id, "--on", "second")
    assert refused.returncode == UsageError.exit_code
    assert "gpu stop" in refused.stderr
    assert not there(second, run).folder.exists()
    assert gpu("resume", run.run_id, "--on", "second", "--take-over", "--detach").returncode == 0
    assert there(first, run).state().state == "ended"
    assert gpu("stop", run.run_id).returncode == 0


def test_unreachable_is_not_dead_and_late_rows_are_merged(box: Box, counting_run: Make) -> None:
    """A machine that does not answer blocks a resume elsewhere until --take-over; what it made late is merged, once."""
    first, second = box("first"), box("second")
    run = counting_run(on="first", count=60, pace_s=0.05)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: len(made_there(first, run)) >= 8)
    first.kill_all()
    refused = gpu("resume", run.run_id, "--on", "second")
    assert refused.returncode == NotReachable.exit_code
    assert "unreachable is not dead" in refused.stderr
    assert not there(second, run).folder.exists()
    assert gpu("resume", run.run_id, "--on", "second", "--take-over", "--detach").returncode == 0
    until(lambda: len(made_there(first, run)) >= 30)
    first.start()
    assert gpu("pull", run.run_id).returncode == 0
    assert there(first, run).state().state == "ended", "what came back to life is stopped"
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert_home(run, 60, first, second)
    copies = {row["key"] for row in rows.read([run.home.machine("first").attempt(1).rows])}
    assert copies == set(made_there(first, run)), "all of its rows are kept"
    assert runs.find(run.run_id).record.former == [{"machine": "first", "settled": True}]


def test_a_reboot_is_noticed_and_mended(box: Box, counting_run: Make) -> None:
    """All processes of the machine gone at once: the run is lost, not running, and a resume makes what is missing."""
    server = box("box")
    run = counting_run(on="box", count=40, pace_s=0.05)
    command = started("resume", run.run_id)
    until(lambda: len(made_there(server, run)) >= 8)
    server.reboot()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 5, said
    assert "gpu resume" in said
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert_home(run, 40, server)


@pytest.mark.slow
def test_a_frozen_machine_is_waited_for(box: Box, counting_run: Make) -> None:
    """Stopped in its tracks and thawed, a machine goes on where it was; nothing was started anew."""
    server = box("box")
    run = counting_run(on="box", count=60, pace_s=0.05)
    command = started("resume", run.run_id)
    until(lambda: len(made_there(server, run)) >= 5)
    server.freeze(jobs=True)
    until(lambda: machines.news("box").get("reachable") is False, 60)
    server.thaw()
    _, said = command.communicate(timeout=120)
    assert command.returncode == 0, said
    assert len(there(server, run).attempts()) == 1
    assert_home(run, 60, server)


@pytest.mark.slow
def test_a_look_at_a_frozen_machine_ends_soon(box: Box, counting_run: Make) -> None:
    """`gpu logs` without -f shows what is home and says that the machine is silent; a script gets its document."""
    server = box("box")
    run = counting_run(on="box", count=300, pace_s=0.05)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: len(made_there(server, run)) >= 3)
    assert gpu("pull", run.run_id).returncode == 0
    server.freeze()
    try:
        began = time.monotonic()
        shown = gpu("logs", run.run_id)
        assert time.monotonic() - began < 30
        assert shown.returncode == 0
        assert "does not answer" in shown.stderr
        looking = started("resume", run.run_id, "--json")
        until(lambda: journey.follower(run) == str(looking.pid), 20)
        looking.send_signal(signal.SIGINT)
        said, _ = looking.communicate(timeout=30)
    finally:
        server.thaw()
    assert looking.returncode == 130
    assert json.loads(said)["run_id"] == run.run_id


def test_a_killed_command_is_carried_on(box: Box, counting_run: Make) -> None:
    """kill -9 of the following command, several times: a resume goes on, each row once, one attempt there."""
    server = box("box")
    run = counting_run(on="box", count=80, pace_s=0.03)
    for goal in (5, 20, 40):
        command = started("resume", run.run_id)
        until(lambda goal=goal: run.home.rows.exists() and rows.index(run.home.rows).good >= goal)
        os.kill(command.pid, signal.SIGKILL)
        command.communicate()
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert len(there(server, run).attempts()) == 1
    assert_home(run, 80, server)


def test_what_escapes_is_gone_after_a_stop(box: Box, counting_run: Make) -> None:
    """A stop leaves nothing alive there, not even what forked twice and made a session of its own."""
    server = box("box")
    run = counting_run(on="box", count=500, pace_s=0.05, escape=True, ignore_term=True)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: len(made_there(server, run)) >= 3)
    assert gpu("stop", "--grace", "1", run.run_id).returncode == 0
    until(lambda: not server.processes(), 10)
    run.reload()
    assert run.record.state == "stopped"
    assert run.record.rows_home == len(made_there(server, run))


def test_two_commands_follow_one_run(box: Box, counting_run: Make) -> None:
    """Two commands that carry on the same run both end well, and it was started once."""
    server = box("box")
    run = counting_run(on="box", count=40, pace_s=0.05)
    commands = [started("resume", run.run_id) for _ in range(2)]
    for command in commands:
        _, said = command.communicate(timeout=90)
        assert command.returncode == 0, said
    assert len(there(server, run).attempts()) == 1
    assert_home(run, 40, server)


def test_two_laptops_follow_one_run(box: Box, counting_run: Make, tmp_path: Path) -> None:
    """A copy of the run's folder on another laptop brings the same rows home, and changes nothing there."""
    server = box("box")
    run = counting_run(on="box", count=30, pace_s=0.05)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    other = tmp_path / "laptop"
    other.mkdir()
    subprocess.run(["cp", "-r", str(run.home.folder), str(other / run.run_id)], check=True)
    subprocess.run(["cp", "-r", os.environ["GPU_HOME"], str(other / "state")], check=True)
    copy = started("resume", str(other / run.run_id))
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    _, said = copy.communicate(timeout=90)
    assert copy.returncode == 0, said
    assert (other / run.run_id / "rows.jsonl").read_bytes() == run.home.rows.read_bytes()
    assert_home(run, 30, server)


def test_a_machine_that_answers_again_is_noted(box: Box, counting_run: Make) -> None:
    """`gpu status` shows from records whether a machine answered last, and asks anew with --refresh."""
    server = box("box")
    assert json.loads(gpu("status", "--json").stdout)[0]["reachable"] is True
    server.kill_all()
    assert json.loads(gpu("status", "--json").stdout)[0]["reachable"] is True
    assert json.loads(gpu("status", "--refresh", "--json").stdout)[0]["reachable"] is False


def test_secrets_stand_nowhere_but_in_the_worker(box: Box, counting_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token reaches the worker's environment alone: no argument, no file on either side, nothing printed."""
    server = box("box")
    monkeypatch.setenv("HF_TOKEN", "canary-hf-0123456789")
    monkeypatch.setenv("MY_SECRET", "canary-my-0123456789")
    monkeypatch.setenv("OTHER", "canary-other-0123456789")
    run = counting_run(on="box", count=200, pace_s=0.05)
    run.save(env_names=["MY_SECRET"])
    done = gpu("resume", run.run_id, "--detach")
    assert done.returncode == 0, done.stderr
    until(lambda: len(made_there(server, run)) >= 2)
    pids = until(lambda: durable.load_json(there(server, run).attempt(1).pids))
    worker = Path(f"/proc/{pids['worker']['pid']}/environ").read_bytes()
    assert b"canary-hf-" in worker
    assert b"canary-my-" in worker
    assert b"canary-other-" not in worker
    for process in server.processes():
        assert b"canary" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert gpu("stop", run.run_id).returncode == 0
    for folder in (server.home, run.home.folder, Path(os.environ["GPU_HOME"])):
        found = [path for path in folder.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
        assert not found
    assert "canary" not in done.stdout + done.stderr


def test_pushed_code_is_taken_once(box: Box, counting_run: Make) -> None:
    """The worker's code that a run began with stays its own there, whatever is installed here later."""
    server = box("box")
    run = counting_run(on="box", count=3)
    journey.go(run, lambda _frame, _data: None, lambda _: None, advance.advance)
    assert [path.name for path in (server.home / ".gpu" / "agent").iterdir() if not path.name.startswith(".")] == [
        run.record.agent
    ]

"""Who ends a rented machine: chosen once in plain words, read back from the machine, and enforced by what is typed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import guarding, keys, machines, rentals, runs
from orchestrator.rentals import Rental
from orchestrator.runs import Run
from tests.cloud import Cloud, Timings
from tests.journeys import hurried
from tests.journeys.hurried import document, gpu
from tests.waiting import until

A10 = ("launch", "--gpu", "A10", "-y")
LONG_AGO = "2026-01-01T00:00:00.000Z"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own is touched."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def quick(cloud: Cloud) -> Cloud:
    """A stand-in whose machines boot at once."""
    cloud.core.timings = Timings(boot_s=0.1, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
    return cloud


def billing(cloud: Cloud) -> list[str]:
    return [instance.instance_id for instance in cloud.core.still_billing()]


def rental(name: str = "a10") -> Rental:
    found = rentals.find(name)
    assert found is not None
    return found


def typed(answers: str, *words: str) -> tuple[int, str]:
    """The exit code of a command at a terminal where that is typed, and what the terminal showed."""
    ours, theirs = pty.openpty()
    command = subprocess.Popen(
        hurried.words(*words), env=hurried.environment(None), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, answers.encode())
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:  # the other side is closed: it has ended
        pass
    os.close(ours)
    return command.wait(60), shown.decode()


def test_a_guard_is_chosen_once_at_the_first_launch(light_cloud: Cloud) -> None:
    """At a terminal the first launch asks who ends machines, in plain words; the next one does not ask again."""
    light_cloud.core.timings = Timings(0.05, 0.1, 0.0, 0.0, term_s=0.1)
    code, shown = typed("reaper\ny\n", "launch", "one", "--gpu", "A10", "--no-wait")
    assert code == 0, shown
    for words in ("You are asked this once", "every process there can read it", "crontab -e"):
        assert words in shown
    assert guarding.chosen() == rental("one").record.guard == "reaper"
    code, shown = typed("y\n", "launch", "two", "--gpu", "A10", "--no-wait")
    assert code == 0, shown
    assert "asked this once" not in shown
    assert gpu("terminate", "--all", "-y").returncode == 0


def test_where_nobody_can_be_asked_the_weakest_guard_is_said(light_cloud: Cloud) -> None:
    """Without a terminal nothing is chosen, and the launch says loudly that nobody ends it, and how to choose."""
    light_cloud.core.timings = Timings(0.05, 0.1, 0.0, 0.0, term_s=0.1)
    launched = gpu(*A10, "--no-wait")
    assert launched.returncode == 0
    assert "with this laptop closed or offline NOBODY does" in launched.stderr
    assert "gpu guard setup" in launched.stderr
    assert not guarding.is_chosen()
    assert gpu("terminate", "--all", "-y").returncode == 0


@pytest.mark.slow
def test_a_guard_on_the_machine_is_read_back_and_holds(quick: Cloud) -> None:
    """Armed by the request that rents, seen alive before the machine counts as ready, and it ends it by itself."""
    assert gpu("guard", "setup", "--how", "on-machine").returncode == 0
    launched = gpu(*A10, "--max-hours", "0.008")
    assert launched.returncode == 0, launched.stderr
    assert "its guard is armed" in launched.stderr
    assert "by its own word" in launched.stdout
    (entry,) = document("status", "--refresh")
    assert entry["guard"] == {"armed": True, "deadline": guarding.moment(rental().record.deadline), "how": "on-machine"}
    assert rental().record.guard_seen["deadline"] == pytest.approx(rental().record.deadline, abs=1.0)
    until(lambda: not billing(quick), 60)
    assert quick.core.count("/instance-operations/terminate") == 1
    assert gpu("terminate", "-y").returncode == 0


def test_a_guard_that_is_not_alive_is_said(quick: Cloud) -> None:
    """A guard that was killed is not called armed: status says since when, and who ends the machine now."""
    assert gpu("guard", "setup", "--how", "on-machine").returncode == 0
    assert gpu(*A10).returncode == 0
    pid = json.loads((Path(machines.load("a10").root) / "guard" / "status.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    status = gpu("status", "--refresh", "--json")
    assert json.loads(status.stdout)[0]["guard"]["armed"] is False
    assert "THAT GUARD WAS NOT ALIVE" in gpu("status").stderr
    assert gpu("terminate", "-y").returncode == 0


@pytest.mark.parametrize("words", [("audit",), ("launch", "--gpu", "H100", "--dry-run"), ("advance", "--all")])
@pytest.mark.first(1)
def test_an_idle_machine_is_ended_by_what_is_typed(quick: Cloud, words: tuple[str, ...]) -> None:
    """Ready for longer than its idle minutes, and idle by its own word, it is given back by any command with caps."""
    assert gpu(*A10, "--idle-minutes", "0.001").returncode == 0
    assert gpu("status").returncode == 0
    assert len(billing(quick)) == 1, "status asks nobody"
    rental().save(ready_at=LONG_AGO)
    done = gpu(*words)
    assert done.returncode == 0, done.stderr
    assert "a10 is idle" in done.stderr
    assert billing(quick) == []


@pytest.mark.slow
def test_the_machine_that_is_about_to_be_used_is_not_idle(quick: Cloud, counting_run: Callable[..., Run]) -> None:
    """A run begun on an idle machine uses it; other idle ones are given back, and rows come home from them first."""
    for name in ("a10", "other"):
        assert gpu("launch", name, "--gpu", "A10", "-y", "--python", sys.executable).returncode == 0
    run = counting_run(on="other", count=20)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: gpu("pull", run.run_id).returncode == 0 and runs.find(run.run_id).record.state == "sealed")
    for name in ("a10", "other"):
        rental(name).save(ready_at=LONG_AGO, caps={**rental(name).record.caps, "idle_minutes": 0.001})
    os.utime(run.home.record, (0, 0))
    done = gpu("run", "--on", "a10", "--environment", "none", "--", "true")
    assert done.returncode == 0, done.stderr
    assert rental("a10").record.state == "ready"
    assert rental("other").record.state == "gone"
    assert gpu("terminate", "--all", "-y").returncode == 0


def test_a_worker_that_hangs_is_idle_too(quick: Cloud, counting_run: Callable[..., Run]) -> None:
    """Its run is stopped, its rows come home, and its machine is given back."""
    assert gpu(*A10, "--python", sys.executable).returncode == 0
    run = counting_run(on="a10", count=5, pace_s=600)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: gpu("pull", run.run_id).returncode == 0 and runs.find(run.run_id).record.rows_home == 1)
    rental().save(ready_at=LONG_AGO, caps={**rental().record.caps, "idle_minutes": 0.001})
    os.utime(run.home.record, (0, 0))
    done = gpu("audit")
    assert done.returncode == 0, done.stderr
    assert billing(quick) == []
    record = runs.find(run.run_id).record
    assert (record.state, record.rows_home) == ("stopped", 1)


def test_a_reaper_that_never_ran_is_not_said_to_guard(light_cloud: Cloud) -> None:
    """A crontab line that was written and not put to use is told of; once it has run, when that was."""
    light_cloud.core.timings = Timings(0.05, 0.1, 0.0, 0.0, term_s=0.1)
    chosen = gpu("guard", "setup", "--how", "reaper")
    assert chosen.returncode == 0
    assert "cron does not see LAMBDA_API_KEY" in chosen.stderr
    keys.store("lambda", light_cloud.key)
    assert "cron does not see" not in gpu("guard", "setup", "--how", "reaper").stderr
    assert gpu(*A10, "--no-wait").returncode == 0
    assert "IT HAS NEVER RUN FROM HERE" in gpu("status").stderr
    line = (Path(os.environ["GPU_HOME"]) / "guard" / "crontab").read_text()
    command = line.split(" ", 5)[5].replace("\\%", "%")
    bare = {name: value for name, value in os.environ.items() if name != "LAMBDA_API_KEY"}
    subprocess.run(["sh", "-c", command], check=True, timeout=60, env=bare)
    shown = gpu("status").stderr
    assert "It ran here last at" in shown
    assert "NEVER" not in shown
    assert gpu("terminate", "--all", "-y").returncode == 0


def test_a_wait_for_capacity_is_one_line(light_cloud: Cloud) -> None:
    """On a terminal each look replaces the last one's line; elsewhere the first one stands, whatever comes after."""
    words = ["launch", "w", "--gpu", "A10", "--region", "us-south-2", "--wait-capacity", "-y", "--no-wait"]
    waits = {"launching._CAPACITY_EVERY_S": 0.1}
    ours, theirs = pty.openpty()
    how = {"env": hurried.environment(waits), "stdin": theirs, "stderr": theirs}
    at_terminal = subprocess.Popen(hurried.words(*words), stdout=subprocess.DEVNULL, **how)
    os.close(theirs)
    elsewhere = hurried.begun(*words[:1], "v", *words[2:], waits=waits)
    until(lambda: light_cloud.core.count("/instance-types") >= 20)
    for command in (at_terminal, elsewhere):
        command.send_signal(signal.SIGINT)
    shown = os.read(ours, 1 << 16).decode()
    assert at_terminal.wait(60) == 130
    os.close(ours)
    assert "no capacity yet (3)" in shown
    assert "\n" not in shown[shown.index("no capacity yet (1)") : shown.index("no capacity yet (3)")]
    assert elsewhere.communicate(timeout=60)[1].count("no capacity yet") == 1

"""However a run with a rented machine ends, its machine is given back as was asked, or is said to go on costing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchestrator import clock, keys, rentals, runs
from tests.cloud import Cloud, Timings
from tests.journeys.hurried import begun, gpu
from tests.waiting import until

A10 = ("--gpu", "A10", "-y", "--environment", "none")
UNUSABLE = ("--environment", "train", "--python", "/usr/bin/python3")
"""An interpreter of the machine that cannot import what a job needs: the run fails before it is started."""
COSTS, PRICE = 20, "0.75 USD/h"
_LINES = "import os, sys, time\nfor n in range(int(sys.argv[1])):\n    print(n, flush=True)\n    time.sleep(0.05)\n"


@pytest.fixture
def quick(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """A stand-in whose machines boot at once, and a program that prints a line every 50 ms."""
    monkeypatch.setenv("HOME", str(tmp_path))
    cloud.core.timings = Timings(boot_s=0.1, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
    Path("lines.py").write_text(_LINES)
    return cloud


def lines(count: int) -> tuple[str, ...]:
    return ("--", sys.executable, "lines.py", str(count))


def billing(cloud: Cloud) -> list[str]:
    return [instance.instance_id for instance in cloud.core.still_billing()]


def newest() -> runs.Run:
    return runs.find(None)


def test_a_run_that_never_begins_gives_its_machine_back(quick: Cloud) -> None:
    """What fails between the machine and the start ends with its own exit code, and --terminate holds all the same."""
    done = gpu("run", "--gpu", "A10", "-y", *UNUSABLE, "--terminate", *lines(1))
    assert done.returncode == 3, done.stderr
    assert "cannot import" in done.stderr or "does not import" in done.stderr or "/usr/bin/python3" in done.stderr
    assert len(quick.core.ours()) == 1
    assert billing(quick) == []


@pytest.mark.slow
def test_a_machine_that_is_left_is_said_to_cost(quick: Cloud) -> None:
    """Without --terminate a machine stays, whether the run failed or not: what it costs is said, even quietly."""
    failed = gpu("run", "-q", "--gpu", "A10", "-y", *UNUSABLE, *lines(1))
    assert failed.returncode == 3, failed.stderr
    done = gpu("run", "-q", *A10, *lines(1))
    assert done.returncode == 0, done.stderr
    for said in (failed.stderr, done.stderr):
        assert PRICE in said
        assert "gpu terminate" in said
    assert len(billing(quick)) == 2
    assert gpu("terminate", "--all", "-y").returncode == 0


def test_ctrl_c_says_what_goes_on_costing(quick: Cloud) -> None:
    """Interrupted while a run is followed, or a machine given back: the price, and how to end it, are said."""
    command = begun("run", *A10, "--terminate", *lines(400))
    until(lambda: any(run.record.state == "running" for run in runs.remembered()), 60)
    command.send_signal(2)
    _, left = command.communicate(timeout=60)
    (name,) = [rental.name for rental in rentals.known()]
    quick.fault("terminate-slow", seconds=600.0)
    ending = begun("terminate", name, "-y", "--discard")
    until(lambda: rentals.choose(name).record.state == "stopping")
    ending.send_signal(2)
    _, interrupted = ending.communicate(timeout=60)
    assert (command.returncode, ending.returncode) == (130, 130)
    for said in (left, interrupted):
        assert PRICE in said
        assert f"gpu terminate {name}" in said


@pytest.mark.slow
def test_cron_gives_back_what_a_detached_run_had(quick: Cloud, tmp_path: Path) -> None:
    """A run that nobody follows is told of once it has ended, and --terminate holds by `gpu advance --all`, once."""
    script = tmp_path / "listen.sh"
    script.write_text(f'#!/bin/sh\ncat >> "{tmp_path}/told.jsonl"\n')
    script.chmod(0o700)
    keys.user_config().write_text(json.dumps({"notify": str(script)}))
    begins = gpu("run", *A10, "--terminate", "--detach", *lines(5))
    assert begins.returncode == 0, begins.stderr
    assert PRICE in begins.stderr
    until(lambda: gpu("advance", "--all").returncode == 0 and newest().record.state == "sealed")
    assert billing(quick) == []
    told = [json.loads(line)["event"] for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert told == ["run_done"]
    assert gpu("launch", newest().record.machine, "--gpu", "A10", "-y", "--no-wait").returncode == 0
    assert gpu("advance", "--all").returncode == 0
    assert len(billing(quick)) == 1, "another machine of the same name is not the run's"


FAILS_FIRST = ("--", "sh", "-c", "[ -e again ] || { touch again; exit 3; }; sleep 1")


@pytest.mark.slow
def test_a_machine_kept_after_a_failure_is_left_alone(quick: Cloud) -> None:
    """Kept for somebody to look, it is not idle; its deadline stays; a run taken up there again has all its time."""
    words = ("--terminate", "--keep-on-failure", "60", "--idle-minutes", "0.001", "--max-hours", "5")
    keeps = begun("run", *A10, *words, *FAILS_FIRST)
    until(lambda: rentals.known() and rentals.known()[0].record.kept_until is not None, 60)
    (rental,) = rentals.known()
    deadline = rental.record.deadline
    assert deadline is not None
    assert deadline > clock.timestamp() + 4 * 3600
    with rental.locked():
        rental.save(ready_at="2026-01-01T00:00:00.000Z")
    for words in (("audit",), ("advance", "--all")):
        assert gpu(*words).returncode == 0
    assert len(billing(quick)) == 1
    done = gpu("resume")
    assert done.returncode == 0, done.stderr
    keeps.communicate(timeout=60)
    assert keeps.returncode == 10
    assert newest().record.state == "sealed"
    assert billing(quick) == []


def test_a_machine_is_kept_no_longer_than_was_asked(quick: Cloud) -> None:
    """Should the command that keeps it die, any other one gives it back when its time is over."""
    keeps = begun("run", *A10, "--terminate", "--keep-on-failure", "60", "--", "false")
    until(lambda: rentals.known() and rentals.known()[0].record.kept_until is not None, 60)
    keeps.kill()
    keeps.communicate()
    (rental,) = rentals.known()
    with rental.locked():
        rental.save(kept_until=clock.timestamp() - 1)
    ended = gpu("audit")
    assert ended.returncode == 0, ended.stderr
    assert "was kept until" in ended.stderr
    assert billing(quick) == []

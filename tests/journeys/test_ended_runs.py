"""However a run with a rented machine ends, its machine is given back as was asked, or is said to go on costing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orchestrator import rentals, runs
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
    """Interrupted while a run is followed, and while a machine is given back: the price, and how to end it, are said."""
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

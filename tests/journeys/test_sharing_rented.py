"""Machines rented for a run that they share: all at work at once, replaced within the caps of the run, given back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import fleet, ledger, runs
from orchestrator.rentals import Caps
from tests.cloud import Cloud, Timings
from tests.journeys import sharers
from tests.journeys.sharers import gpu, rented, started
from tests.waiting import until


@pytest.fixture
def quick(cloud: Cloud) -> Cloud:
    """A stand-in whose machines boot at once."""
    cloud.core.timings = Timings(boot_s=0.1, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
    return cloud


def billing(cloud: Cloud) -> list[str]:
    return [instance.instance_id for instance in cloud.core.still_billing()]


def test_rented_machines_share_a_run_and_are_given_back(quick: Cloud) -> None:
    """Three machines, named as the run, -2 and -3, make its rows side by side; then none of them costs any more."""
    run = rented(3, Caps(budget_usd=3.0), 30, pace_s=0.05)
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    sharers.assert_whole(run, 30)
    base = run.record.machine
    assert [rental.name for rental in fleet.of(run)] == [base, f"{base}-2", f"{base}-3"]
    assert billing(quick) == []
    assert [rental.caps().budget_usd for rental in fleet.of(run)] == [1.0, 1.0, 1.0]
    cost = json.loads(gpu("cost", "--json").stdout)
    (of_run,) = cost["runs"]
    assert 0 < of_run["usd"] <= cost["total_usd"]
    assert of_run["rows"] == 30


def test_a_machine_that_vanishes_is_replaced(quick: Cloud) -> None:
    """What its provider calls gone gives its part to a further machine; all rows are home, nothing goes on costing."""
    quick.fault("vanishes", seconds=6.0)
    run = rented(2, Caps(budget_usd=3.0), 120, pace_s=0.2)
    command = started("resume", run.run_id)
    until(lambda: any(share.record.state == "lost" for share in runs.shares(runs.find(run.run_id))), 90)
    Path("calm").touch()
    _, said = command.communicate(timeout=110)
    assert command.returncode == 0, said
    sharers.assert_whole(run, 120)
    assert billing(quick) == []
    assert len({lease.machine for lease in ledger.leases()}) <= 2 + fleet.SPARE_MAX


def test_a_dry_run_says_what_several_cost(quick: Cloud) -> None:
    """`--machines 3` is said with what all of them cost at most, by one budget; with two examples there are two."""
    words = ("run", "eval-gsm8k", "--gpu", "A10", "--machines", "3", "--budget", "6", "--dry-run")
    done = gpu(*words)
    assert done.returncode == 0, done.stderr
    assert "3 of these at the same time" in done.stderr
    few = gpu(*words, "--limit", "2")
    assert "2 of 3 machines are used" in few.stderr
    assert "2 of these at the same time" in few.stderr
    refused = gpu("run", "--gpu", "A10", "--machines", "2", "-y", "--", "true")
    assert refused.returncode == 2, refused.stderr
    assert quick.core.count("/instance-operations/launch") == 0

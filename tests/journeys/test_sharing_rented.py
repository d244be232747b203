"""Machines rented for a run that they share: all at work at once, replaced within the caps of the run, given back."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from orchestrator import fleet, ledger, runs
from orchestrator.rentals import Caps
from tests.cloud import Cloud, Timings
from tests.journeys import sharers
from tests.journeys.sharers import gpu, rented, shared, started, with_wait
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


@pytest.mark.slow
def test_a_machine_that_is_done_goes_back_while_the_others_work(quick: Cloud) -> None:
    """Of three examples one machine has one: with nothing more for it, it costs nothing while the other goes on."""
    run = rented(2, Caps(budget_usd=3.0), 3, pace_s=6.0)
    command = started("resume", run.run_id)
    until(lambda: len(billing(quick)) == 2, 60)
    until(lambda: len(billing(quick)) == 1, 60)
    assert runs.find(run.run_id).record.state == "running"
    Path("calm").touch()
    _, said = command.communicate(timeout=60)
    assert command.returncode == 0, said
    sharers.assert_whole(run, 3)
    assert billing(quick) == []


@pytest.mark.slow
def test_a_machine_that_boots_for_long_is_not_waited_for(quick: Cloud) -> None:
    """When the others have done its part, one on its way up is given back: the run ends when its rows are home."""
    quick.fault("boot-stuck", after=1, seconds=900.0)
    run = rented(2, Caps(budget_usd=3.0), 20)
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert "the others have done its part; it is given back" in done.stdout + done.stderr
    sharers.assert_whole(run, 20)
    assert len(quick.core.ours()) == 2
    assert billing(quick) == []


@pytest.mark.slow
def test_who_leaves_is_told_of_every_machine_that_goes_on_costing(quick: Cloud) -> None:
    """`--detach` names both machines and their price together; the resume that ends the run gives both back."""
    run = rented(2, Caps(max_hours=1.0), 200, pace_s=0.1)
    left = gpu("resume", run.run_id, "--detach")
    assert left.returncode == 0, left.stderr
    base = run.record.machine
    price = sum(rental.price_usd_per_hour or 0.0 for rental in fleet.live(run))
    assert f"{base}, {base}-2 GO ON COSTING {price:.2f} USD/h; the last deadline is" in left.stderr
    assert len(billing(quick)) == 2
    Path("calm").touch()
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert "COSTING" not in done.stderr
    assert billing(quick) == []


@pytest.mark.slow
def test_machines_that_were_launched_before_are_told_of_and_given_back(quick: Cloud) -> None:
    """Of machines named by `--on`, those that are rented go on costing, which is said; `--terminate` ends them."""
    for name in "ab":
        launched = gpu("launch", name, "--gpu", "A10", "-y")
        assert launched.returncode == 0, launched.stderr
    run = shared(["a", "b"], 200, pace_s=0.1)
    left = gpu("resume", run.run_id, "--detach")
    assert left.returncode == 0, left.stderr
    assert "a, b GO ON COSTING" in left.stderr
    Path("calm").touch()
    done = gpu("resume", run.run_id, "--terminate")
    assert done.returncode == 0, done.stderr
    sharers.assert_whole(run, 200)
    assert "COSTING" not in done.stderr
    assert billing(quick) == []


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_launch_that_is_refused_leaves_its_part_to_the_others(quick: Cloud) -> None:
    """With one machine of three that can be had, that one makes all rows; what was refused is said."""
    quick.fault("quota", after=1, times=None)
    run = rented(3, Caps(budget_usd=3.0), 30)
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert "quota" in done.stderr.lower()
    sharers.assert_whole(run, 30)
    assert len(quick.core.ours()) == 1
    assert billing(quick) == []


@pytest.mark.slow
def test_nothing_can_be_rented(quick: Cloud) -> None:
    """When every launch is refused, the exit code says that nothing is rented, and a later resume does all of it."""
    quick.fault("quota", times=None)
    run = rented(2, Caps(budget_usd=3.0), 10)
    done = gpu("resume", run.run_id)
    assert done.returncode == 4, done.stderr
    quick.core.faults.clear()
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    sharers.assert_whole(run, 10)
    assert billing(quick) == []


@pytest.mark.slow
def test_a_laptop_killed_while_it_rents_leaks_nothing(quick: Cloud) -> None:
    """Killed at seeded moments from the first request on: as many machines as were asked for, all given back."""
    quick.core.timings = Timings(boot_s=1.0, ip_delay_s=0.2, sshd_delay_s=0.2, term_s=0.1)
    run = rented(2, Caps(budget_usd=3.0), 60, pace_s=0.1)
    chance = random.Random(5)
    command = started("resume", run.run_id)
    for _ in range(8):
        with_wait(command, 0.7 + chance.random() * 2.5)
        command.kill()
        command.communicate()
        command = started("resume", run.run_id)
    Path("calm").touch()
    _, said = command.communicate(timeout=110)
    assert command.returncode == 0, said
    sharers.assert_whole(run, 60)
    assert len(quick.core.ours()) == 2
    assert billing(quick) == []
    assert all(lease.closed_at for lease in ledger.leases())


@pytest.mark.slow
def test_hours_are_those_of_the_run(quick: Cloud) -> None:
    """At the deadline all machines end, none is rented in their place, and the rows so far are home."""
    run = rented(2, Caps(max_hours=0.006), 4000, pace_s=0.05)
    done = gpu("resume", run.run_id)
    assert done.returncode == 10, done.stderr
    assert "past its deadline" in done.stderr
    run.reload()
    assert run.record.state == "stopped"
    assert 0 < run.record.rows_home < 4000
    assert len(quick.core.ours()) == 2
    assert billing(quick) == []
    again = gpu("resume", run.run_id)
    assert again.returncode == 5, again.stderr
    assert "nothing more is rented" in again.stderr
    assert len(quick.core.ours()) == 2


@pytest.mark.slow
def test_one_of_its_machines_is_given_back_rows_first(quick: Cloud) -> None:
    """A machine that still works on a share is not given back; what it has is pulled. Discarded, its part is left."""
    run = rented(2, Caps(budget_usd=3.0), 400, pace_s=0.1)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    name = f"{run.record.machine}-2"
    before = run.record.rows_home
    refused = gpu("terminate", name, "-y")
    assert refused.returncode == 20, refused.stderr
    assert f"gpu stop {run.run_id}" in refused.stderr
    run.reload()
    assert run.record.rows_home > before
    assert gpu("terminate", name, "-y", "--discard").returncode == 0
    assert len(billing(quick)) == 1
    Path("calm").touch()
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    sharers.assert_whole(run, 400)
    assert billing(quick) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_command_from_nothing_to_rows_by_several_machines(quick: Cloud) -> None:
    """`gpu run JOB --gpu … --machines 3` for two examples rents two, evaluates, and gives both back."""
    words = ("run", "eval-gsm8k", "--gpu", "A10", "--machines", "3", "--limit", "2", "--set", "samples=1", "-y")
    done = gpu(*words, "--terminate", "--budget", "3", "--python", sys.executable, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 machines are used" in done.stderr
    run = runs.find(None)
    assert (run.record.state, run.record.rows_home) == ("sealed", 2)
    assert len(quick.core.ours()) == 2
    assert billing(quick) == []
    summary = json.loads(run.home.summary.read_text())
    assert summary["n_rows"] == 2
    assert 0 < summary["cost_usd"] < 3

"""A run on two machines over SSH in a storm of cuts, kills, reboots and moves ends as if nothing had happened."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import spec
from orchestrator import agents, config, journey, runs
from orchestrator.runs import Record, Run
from tests.faults import ssh_storm, storm
from tests.faults.ssh_storm import KINDS, SshStorm
from tests.rig import Sshd
from tests.waiting import until

Box = Callable[..., Sshd]


def stormy_run(agent: str, on: str, count: int, calm: Path) -> Run:
    """A planned run of the storm's story."""
    run_id = runs.new_run_id("counting", None)
    params = {"count": count, "model": "none", "calm": str(calm), "pace_s": 0.05}
    job = {"schema": spec.SCHEMA, "run_id": run_id, "job": "counting", "story": "counting", "task": "t"}
    record = Record(run_id, "counting", on, agent, sys.executable, str(Path.cwd()), "2026-01-01")
    return runs.create(record, {**job, "params": params, "limit": None})


@pytest.fixture
def agent() -> str:
    """A snapshot of the worker's code that has the storm's story in it."""
    files = agents.sources() | {"worker/counting.py": ssh_storm.STORY.encode()}
    name = agents.digest(files)
    agents.write(files, config.state_folder() / "agents" / name)
    return name


def assert_weathered(box: Box, agent: str, folder: Path, rounds: int, count: int, seed: int) -> None:
    seed = int(os.environ.get(ssh_storm.SEED_VARIABLE, seed))
    boxes = [box("first"), box("second")]
    calm = folder / "calm"
    run = stormy_run(agent, "first", count, calm)
    hits = SshStorm(run, boxes, calm, rounds, seed).rage()
    assert {kind: hits[kind] >= rounds // len(KINDS) for kind in KINDS} == dict.fromkeys(KINDS, True)
    ssh_storm.assert_nothing_was_lost(run, boxes, count)
    until(lambda: not any(machine.processes() for machine in boxes), 10)
    until(lambda: not ssh_storm.laptop_processes(), 10)
    quiet = stormy_run(agent, "first", count, calm)
    journey.go(quiet, lambda _frame, _data: None, lambda _: None)
    assert list(storm.essence(run)) == list(storm.essence(quiet))


@pytest.mark.slow
def test_twenty_disturbances_change_nothing(box: Box, agent: str, tmp_path: Path) -> None:
    """Machines cut, frozen, rebooted and moved away from, processes killed on both sides: each row is home once."""
    assert_weathered(box, agent, tmp_path, rounds=20, count=2000, seed=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_two_hundred_disturbances_change_nothing(box: Box, agent: str, tmp_path: Path, seed: int) -> None:
    """200 disturbances in a row leave every row at home once, as an uninterrupted run has them."""
    assert_weathered(box, agent, tmp_path, rounds=200, count=20_000, seed=seed)

"""A supervisor over a training that crashes: restarted for as long as it gets further, not for doing the same again."""

from __future__ import annotations

import sys
from pathlib import Path

from jobs import rundir, spec
from orchestrator import advance, agents, config, machines, runs
from orchestrator.home import Arrivals
from orchestrator.runs import Record

STEPPING = '''
"""A story for tests: crashes after steps 1 to 3 of the first attempt, and after the same ones again in the others."""
import sys
from jobs import rows

def work(run, attempt, job):
    with rows.Appender(attempt.steps) as out:
        for step in (1, 2, 3):
            out.append({"key": f"step/{step}", "error": None, "step": step})
    sys.exit(7)
'''


def test_a_training_that_gets_no_further_is_not_restarted_for_ever() -> None:
    """Steps done before count for nothing: two attempts in a row without a new one end the run."""
    files = agents.sources() | {"worker/stepping.py": STEPPING.encode()}
    agent = agents.digest(files)
    agents.write(files, config.state_folder() / "agents" / agent)
    run_id = runs.new_run_id("stepping", None)
    job = {"schema": spec.SCHEMA, "run_id": run_id, "job": "stepping", "story": "stepping", "task": None}
    record = Record(run_id, "stepping", machines.LOCAL, agent, sys.executable, str(Path.cwd()), "2026-01-01")
    run = runs.create(record, {**job, "params": {"model": "none"}, "limit": None})
    arrivals = Arrivals.open(run.home, machines.LOCAL)
    assert arrivals is not None
    with arrivals:
        advance.carry_home(run, machines.this_computer(), arrivals, lambda _frame, _data: None)
    assert run.record.state == "failed"
    attempts = run.home.machine(machines.LOCAL).attempts()
    assert [seal.restarting for seal in map(rundir.Seal.load, (each.exit for each in attempts)) if seal] == [
        True,
        True,
        False,
    ]

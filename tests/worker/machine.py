"""A run on this computer as its machine sees it: made, started and asked without the laptop's journey."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from jobs import durable, rundir, spec
from orchestrator import config, machines, runs, transport
from orchestrator.runs import Record, Run
from tests.waiting import until


def ask(run: Run, verb: str, *more: str, data: bytes = b"") -> dict[str, Any]:
    """The answer of an agent command."""
    machine = machines.this_computer()
    return transport.ask(machine, transport.agent_words(machine, run.record.agent, verb, run.run_id, *more), data)


def make(agent: str, words: list[str], out: tuple[str, ...] = (), folder: str = "") -> Run:
    """A run of a command whose project is an empty folder, already on the machine."""
    run_id = runs.new_run_id("command", None)
    job = {"schema": spec.SCHEMA, "run_id": run_id, "job": "command", "story": "command", "task": None, "limit": None}
    job |= {"command": words, "out": list(out), "folder": folder, "params": {}}
    run = runs.create(Record(run_id, "command", "local", agent, sys.executable, str(Path.cwd()), "2026-01-01"), job)
    machines.this_computer().push_agent(config.state_folder() / "agents", agent)
    durable.have_folder(there(run).work / folder)
    return run


def there(run: Run) -> rundir.Run:
    """The run's folder on the machine."""
    return rundir.Run(machines.this_computer().root / "runs" / run.run_id)


def start(run: Run, expect_attempt: int = 0, **order: Any) -> dict[str, Any]:
    """Start the run, with this Python, the PATH of the tests, and what else the order is to say."""
    known = {
        "expect_attempt": expect_attempt,
        "python": sys.executable,
        "agent": str(machines.this_computer().root / "agent" / run.record.agent),
        "cwd": run.record.cwd,
        "env": {"PATH": os.environ["PATH"]},
        "restarts": run.job()["story"] != "command",
    }
    return ask(run, "start", data=spec.canonical({"job": run.job(), "order": known | order}))


def ended(run: Run, within_s: float = 30.0) -> rundir.Seal:
    """The seal of the run, once it has ended."""
    answer = until(lambda: (found := ask(run, "state"))["state"] == "ended" and found, within_s)
    return rundir.Seal(**answer["seal"])


def log(run: Run) -> str:
    """What the newest attempt printed."""
    return there(run).attempts()[-1].log.read_text(encoding="utf-8")

"""Machines as `gpu status` shows them: from records, asking nobody unless told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs import locks
from orchestrator import machines, runs
from orchestrator.errors import GpuError
from orchestrator.machines import Record
from orchestrator.runs import Run


def document(record: Record, on_it: list[str]) -> dict[str, Any]:
    """A machine as `gpu status --json` gives it. A machine of one's own has no provider and costs nothing here."""
    known = machines.news(record.name)
    return {
        "name": record.name,
        "provider": None,
        "instance_id": None,
        "state": "ready",
        "raw_state": None,
        "gpu": record.gpu,
        "price_usd_per_hour": None,
        "launched_at": None,
        "ssh": {"user": record.user, "host": record.host, "port": record.port},
        "guard": {"armed": False, "deadline": None, "how": None},
        "cost_usd": 0.0,
        "runs": on_it,
        "reachable": known.get("reachable"),
        "last_seen": known.get("last_seen"),
    }


def line(entry: dict[str, Any]) -> list[str]:
    """A machine's line in the table."""
    address = "{user}@{host}:{port}".format(**entry["ssh"])
    answers = {True: "yes", False: "no", None: "?"}[entry["reachable"]]
    words = [entry["name"], entry["state"], address, entry["gpu"] or "-", answers, entry["last_seen"] or "-"]
    return [*words, " ".join(entry["runs"]) or "-"]


def runs_on(name: str) -> list[str]:
    """The ids of the runs whose record names that machine."""
    return [run.run_id for run in runs.remembered() if run.record.machine == name]


def not_home(name: str) -> list[str]:
    """The ids of the runs that may still work on that machine, or have something there that is not home."""
    return [run.run_id for run in runs.remembered() if _is_not_home(run, name)]


def _is_not_home(run: Run, name: str) -> bool:
    if any(entry["machine"] == name and not entry["settled"] for entry in run.record.former):
        return True
    begins = run.record.state == "planned" and locks.is_held(run.home.lock)
    return run.record.machine == name and (begins or run.record.state in ("pushed", "running"))


def ask(record: Record) -> None:
    """Find out whether a machine answers now, by a fresh connection, and remember it."""
    machines.note(record.name, reach(record.name) is None)


def reach(name: str) -> str | None:
    """Why a machine cannot be used now, in words; None when it answers."""
    from orchestrator import ssh

    record = machines.load(name)
    try:
        with ssh.SshMachine(machines.folder(name), Path(record.root), record.python) as machine:
            machine.call(["true"], b"", ssh.CONNECT_S)
    except GpuError as error:
        return error.message
    return None

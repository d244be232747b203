"""Scores existing completions again: the task's rules run in a child process, which needs the standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs import spec, suites
from orchestrator import agents, runs
from orchestrator.errors import ConfigError, UsageError

_DEADLINE_S = 3600.0


@dataclass(frozen=True)
class Fields:
    """The task whose rules are applied, and the fields of a row that hold completion and target."""

    task: str
    completion: str
    target: str


def rescore(what: str, fields: Fields, agree: Callable[[str], None]) -> dict[str, Any]:
    """Every rule's verdicts over a run's rows or a file's lines; raises UsageError, ConfigError.

    Where programs that a model wrote would run here, `agree` is asked first; it raises when the answer is no.
    """
    request = {**asdict(fields), **_rows_of(what, fields.task)}
    answer = _ask(request)
    if answer.get("failed", {}).get("kind") == "consent":
        agree(f"{answer['failed']['message']} Run them?")
        answer = _ask({**request, "allow": True})
    if "failed" in answer:
        kind = UsageError if answer["failed"].get("kind") == "usage" else ConfigError
        raise kind(answer["failed"]["message"], answer["failed"]["hint"])
    return answer


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    words = [sys.executable, "-I", str(agents.INSTALLED / "worker" / "__main__.py"), "rescore"]
    ran = subprocess.run(words, input=spec.canonical(request), capture_output=True, timeout=_DEADLINE_S, check=False)
    try:
        answer: dict[str, Any] = json.loads(ran.stdout)
    except ValueError:
        raise RuntimeError(f"rescoring ended with {ran.returncode}: {ran.stderr[-500:]!r}") from None
    return answer


def _rows_of(what: str, task: str) -> dict[str, Any]:
    """The file of rows that is meant; of a run of several parts only the task's `own` rows."""
    if Path(what).is_file():
        return {"path": str(Path(what).absolute())}
    if what.endswith(".jsonl"):
        raise UsageError(f"There is no file {what}.", "Give the path of a file of JSON lines, or a run.")
    run = runs.find(what)
    parts = suites.tasks(run.job())
    if parts and task not in parts:
        raise UsageError(f"{run.run_id} has no part {task!r}: {spec.nearest(task, parts)}")
    return {"path": str(run.home.rows.absolute()), "own": bool(parts)}

"""A run beside lm-evaluation-harness: is it installed, what must be asked for, and do the two agree, item by item."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import spec
from orchestrator import machines, planning, transport
from orchestrator.errors import ConfigError, UsageError
from orchestrator.runs import Run

VERSION = "0.4.13"
TASKS = ("gsm8k", "arc", "hellaswag", "mmlu")
PYTHON_VARIABLE = "GPU_PARITY_PYTHON"
"""Names an interpreter that imports the harness."""
_SETTINGS = {"dtype": "float32"}  # in fewer bits, the order of additions changes what is likeliest
_GREEDY = {"samples": "1", "temperature": "0"}
_LOOK_DEADLINE_S = 60.0
_DEADLINE_S = 24 * 3600.0
_LOOK = "import importlib.metadata as m; import torch, transformers; print(m.version('lm_eval'))"


def python(given: str | None) -> str:
    """An interpreter that has the harness: the one given, else the one of the environment, else this one.

    ConfigError, with the command that installs it, where that one has it not.
    """
    named = given or os.environ.get(PYTHON_VARIABLE)
    path = str(Path(named).expanduser().absolute()) if named else sys.executable
    version = _version(path)
    if version == VERSION:
        return path
    found = f"is {version} there" if version else "is not installed there, or its torch or transformers is not"
    is_one = named is not None and Path(path).is_file()
    made = path if is_one else "harness/bin/python"
    install = f"{shlex.quote(made)} -m pip install 'lm_eval[hf]=={VERSION}'"
    raise ConfigError(
        f"The reference is lm-evaluation-harness {VERSION} for {path}, and lm_eval {found}. Nothing was started.",
        f"Install it: {install if is_one else f'python3 -m venv harness && {install}'}\n"
        f"Then: gpu verify --harness {shlex.quote(made)} …",
    )


def _version(path: str) -> str | None:
    """The version of the harness that an interpreter has; None for none, and where it is no interpreter."""
    try:
        done = subprocess.run([path, "-I", "-c", _LOOK], capture_output=True, timeout=_LOOK_DEADLINE_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None if done.returncode == 0 else None


def begin(task: str, settings: Mapping[str, str], limit: int) -> Run:
    """A new run of the task on this computer: greedy, and in 32 bits unless that was set.

    UsageError for settings under which the harness would be asked something else.
    """
    job = spec.find(f"eval-{task}", [spec.CATALOG])
    usual = {name: text for name, text in {**_SETTINGS, **_GREEDY}.items() if name in job.parameters}
    asked = planning.Asked(machine=machines.LOCAL, settings={**usual, **settings}, limit=limit)
    document = planning.request(asked, job)
    _refuse_what_differs(document["params"])
    return planning.begin(document, asked, job, lambda _: None)


def _refuse_what_differs(params: Mapping[str, Any]) -> None:
    """Raise UsageError for what cannot be compared; the worker looks again, for runs that were made otherwise."""
    if params.get("temperature") or params.get("samples", 1) != 1:
        raise UsageError("Only greedy completions can be compared: temperature=0, samples=1. Nothing was started.")
    if "temperature" not in params and params.get("chat_template") != "none":
        raise UsageError("Choices are compared with chat_template=none alone. Nothing was started.")
    if params.get("engine") == "openai":
        raise UsageError("engine=openai cannot be compared: the harness loads the model itself. Nothing was started.")


def compare(run: Run, harness: str) -> dict[str, Any]:
    """The agreement, as `gpu verify --json` prints it; the run has ended on this computer. ConfigError, UsageError."""
    if run.record.state != "sealed" or run.record.machine != machines.LOCAL:
        raise UsageError(
            f"{run.run_id} is {run.record.state} on {run.record.machine}; what is verified has ended on this computer.",
            f"Bring it to an end: gpu resume {run.run_id} --on local",
        )
    words = transport.agent_words(machines.this_computer(), run.record.agent, "verify", run.run_id, harness)
    answer = transport.ask(machines.this_computer(), words, deadline_s=_DEADLINE_S)
    if "failed" in answer:
        raise ConfigError(answer["failed"]["message"], answer["failed"]["hint"])
    return {"run_id": run.run_id, **answer}

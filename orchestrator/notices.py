"""News for a command of the user's choice: one JSON document on its standard input; its failure stops nothing."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

from orchestrator import clock, money
from orchestrator.errors import GpuError
from orchestrator.plain import plain

_DEADLINE_S = 20.0


def tell(event: str, **facts: object) -> None:
    """Give the `notify` command of the config file a document: `event`, `at`, and what there is to know.

    Events: capacity_found, run_done, run_failed, budget_80, guard_fired, machine_lost.
    """
    try:
        words = shlex.split(str(money.settings().get("notify") or ""))
    except (GpuError, ValueError) as error:
        _complain(str(error))
        return
    if not words:
        return
    document = json.dumps({"event": event, "at": clock.now(), **facts}).encode() + b"\n"
    try:
        done = subprocess.run(words, input=document, stdout=subprocess.DEVNULL, timeout=_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _complain(f"{words[0]}: {error}")
    else:
        if done.returncode:
            _complain(f"{words[0]} ended with exit code {done.returncode}")


def _complain(why: str) -> None:
    print(plain(f"The notify command could not be told: {why}"), file=sys.stderr)  # noqa: T201 -- notes go to stderr

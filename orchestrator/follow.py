"""The pull loop: rows, log, status and seal come home as they grow, and whoever watches is told."""

from __future__ import annotations

import time
from typing import Any

from jobs import durable, spec
from orchestrator import clock, transport
from orchestrator.errors import NotReachable
from orchestrator.home import Arrivals, News
from orchestrator.runs import Run
from orchestrator.transport import Machine

STREAM_S = 60.0
"""How long one pull keeps sending before a new one takes over."""
CUTS_MAX = 5
"""Pulls in a row that may be cut off before it is said that something is wrong."""
_PAUSE_S = 0.5
RECORD_S = 1.0
"""How often run.json is brought up to date while following."""


def pull(run: Run, machine: Machine, arrivals: Arrivals, wait_s: float, news: News) -> dict[str, Any] | None:
    """One pull: bring home what is new for up to `wait_s` seconds; returns the end frame, None when it was cut."""
    words = transport.agent_words(machine, run.record.agent, "pull", run.run_id)
    request = spec.canonical(arrivals.request(wait_s)) + b"\n"
    recorded_at = clock.monotonic()
    with machine.open(words, request) as stream:
        for frame, data in transport.frames(stream):
            if frame.get("end"):
                note(run, arrivals)
                return frame
            arrivals.take(frame, data)
            news(frame, data)
            if clock.monotonic() - recorded_at >= RECORD_S:
                note(run, arrivals)
                recorded_at = clock.monotonic()
    return None


def follow(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> dict[str, Any]:
    """Pull until the run is not running any more; returns the end frame that says how it stands.

    Raises NotReachable when pulls are cut off again and again.
    """
    cuts = 0
    while cuts < CUTS_MAX:
        end = pull(run, machine, arrivals, STREAM_S, news)
        if end is not None and end["state"] != "running":
            return end
        cuts = 0 if end is not None else cuts + 1
        time.sleep(0 if end is not None else _PAUSE_S * cuts)
    raise NotReachable(
        f"{machine.name} ended {CUTS_MAX} pulls of {run.run_id} in the middle. The run may go on there by itself.",
        f"Look again: gpu resume {run.run_id}",
    )


def note(run: Run, arrivals: Arrivals) -> None:
    """Bring run.json up to date with what is home."""
    changes: dict[str, Any] = {"rows_home": arrivals.rows.good, "rows_damaged": arrivals.rows.corrupt}
    attempts = arrivals.copy.attempts()
    status = durable.load_json(attempts[-1].status) if attempts else None
    if status:
        changes |= {
            "phase": status["phase"],
            "rows_done": max(status["rows_done"], arrivals.rows.good),
            "rows_synced": status["rows_synced"],
            "rows_per_second": status["rows_per_second"],
            "eta_s": status["eta_s"],
            "last_seen": status["heartbeat"],
        }
        if status["rows_total"] is not None:
            changes["rows_total"] = status["rows_total"]
    run.save(**changes)

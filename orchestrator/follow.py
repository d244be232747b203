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


def pull(run: Run, machine: Machine, arrivals: Arrivals, wait_s: float, news: News) -> dict[str, Any]:
    """One pull: bring home what is new for up to `wait_s` seconds; returns the end frame, `{cut}` when it was cut."""
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
        said = stream.last_words()
    return {"cut": said}


def follow(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> dict[str, Any]:
    """Pull until the run is not running any more; returns the end frame that says how it stands.

    Raises NotReachable when pulls are cut off again and again.
    """
    cuts = 0
    while True:
        end = pull(run, machine, arrivals, STREAM_S, news)
        if end.get("state", "running") != "running":
            return end
        cuts = cuts + 1 if "cut" in end else 0
        if cuts == CUTS_MAX:
            raise cut(run, machine, end)
        time.sleep(_PAUSE_S * cuts)


def cut(run: Run, machine: Machine, end: dict[str, Any]) -> NotReachable:
    """The error for a pull that ended in the middle."""
    why = f" Its last words: {end['cut']}" if end["cut"] else ""
    return NotReachable(f"A pull of {run.run_id} from {machine.name} ended in the middle.{why}")


def note(run: Run, arrivals: Arrivals) -> None:
    """Bring run.json up to date with what is home."""
    changes: dict[str, Any] = {"rows_home": arrivals.rows.good, "rows_damaged": arrivals.rows.corrupt}
    attempts = arrivals.copy.attempts()
    status = durable.load_news(attempts[-1].status) if attempts else {}
    if status:
        done = status.get("rows_done")
        changes |= {
            "phase": str(status.get("phase", "")),
            "rows_done": max(done if isinstance(done, int) else 0, arrivals.rows.good),
            "rows_synced": status.get("rows_synced", 0),
            "last_seen": status.get("heartbeat"),
            "rows_total": status.get("rows_total") or run.record.rows_total,
        }
    run.save(**changes)

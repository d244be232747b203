"""Runs that have ended, made in their folders without running: what is asked, what came of it, what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jobs import durable, spec
from orchestrator import planning, runs
from orchestrator.runs import Record, Run

METRICS = {
    "numeric": {"value": 0.66, "stderr": 0.02, "ci95": [0.617, 0.7], "n": 500},
    "subject/addition": {"value": 0.9, "stderr": 0.02, "ci95": [0.85, 0.94], "n": 100},
    "subject/comparison": {"value": 0.216, "stderr": 0.03, "ci95": [0.146, 0.286], "n": 100},
}


def begun(settings: dict[str, str] | None = None, job: str = "eval-gsm8k", **how: Any) -> Run:
    """A run as `gpu run JOB --set …` leaves it before anything starts; `how` is the rest of what was typed."""
    definition = spec.load(spec.CATALOG / f"{job}.toml")
    asked = planning.Asked(**{"machine": "local", "settings": settings or {}, **how})
    return planning.begin(planning.request(asked, definition), asked, definition, lambda _: None)


def ended(run: Run, **summary: Any) -> Run:
    """The same run, sealed, with a summary as if its rows had been counted."""
    run.save(state="sealed", rows_home=500, finished_at="2026-11-20T12:00:00.000Z")
    found = {"state": "sealed", "finished_at": run.record.finished_at, "metrics": METRICS, "cost_usd": 1.25}
    durable.save_json(run.home.summary, {"resolved": {"headline": "numeric"}, **found, **summary})
    return run


def bare(name: str, **params: Any) -> Run:
    """A run made by its records alone, as fast as can be."""
    record = Record(name, "eval-gsm8k", "local", "agent", sys.executable, str(Path.cwd()), "2026-11-20T10:00:00.000Z")
    job = {"job": "eval-gsm8k", "story": "evaluate", "task": "gsm8k", "params": {"model": "tiny", **params}}
    return ended(runs.create(record, job))

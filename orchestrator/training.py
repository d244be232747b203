"""What a training came to, counted from its steps at home: losses, tokens, speed, and the curve for the page."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from typing import Any

from jobs import durable, rows
from orchestrator.runs import Run

CURVE_POINTS = 300
"""More points than this no page shows apart; of each stretch of steps the mean is kept."""
_NUMBERS = ("loss", "tokens", "targets", "tokens_per_second")


def steps(run: Run) -> list[rows.Row]:
    """Each step's line, by its number. Of one done twice, after a kill, the later line counts."""
    found: dict[int, rows.Row] = {}
    for copy in run.home.copies():
        for attempt in copy.attempts():
            for _, line in rows.whole_lines(attempt.steps):
                with contextlib.suppress(rows.BadRow):
                    row = rows.decode(line)
                    if _counts(row) and str(row.get("at")) >= str(found.get(row["step"], {}).get("at", "")):
                        found[row["step"]] = row
    return [found[number] for number in sorted(found)]


def _counts(row: rows.Row) -> bool:
    """Whether a line has what is counted here, in types that can be counted: a machine may send anything."""
    step = row.get("step")
    return type(step) is int and step > 0 and all(_is_number(row.get(name)) for name in _NUMBERS)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def summarise(run: Run) -> dict[str, Any]:
    """The block `training` of summary.json."""
    lines = steps(run)
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines if line["tokens_per_second"] > 0)
    tokens, targets = (sum(int(line[name]) for line in lines) for name in ("tokens", "targets"))
    tested = [line for line in lines if _is_number(line.get("eval_loss"))]
    return {
        "steps_done": max((line["step"] for line in lines), default=0),
        "steps_total": run.record.steps_total,
        "first_loss": lines[0]["loss"] if lines else None,
        "final_loss": lines[-1]["loss"] if lines else None,
        "eval_loss": tested[-1]["eval_loss"] if tested else None,
        **_best(tested),
        "tokens": tokens,
        "targets": targets,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "targets_per_second": round(targets / seconds, 2) if seconds else None,
        "curve": _thinned([[line["step"], line["loss"]] for line in lines]),
        "eval_curve": _thinned([[line["step"], line["eval_loss"]] for line in tested]),
        "verify_resume": _verified(run),
        "tensorboard": str(run.home.curves) if run.home.curves.is_dir() else None,
        "adapter": str(run.home.adapter) if run.home.adapter.is_dir() else None,
        "merged": str(run.home.merged) if run.home.merged.is_dir() else None,
    }


def _verified(run: Run) -> dict[str, Any] | None:
    """What trying out a resume came to, as the machine said; None where it was not asked for."""
    found = [durable.load_news(each.env).get("verify_resume") for copy in run.home.copies() for each in copy.attempts()]
    return next((one for one in found if isinstance(one, dict) and isinstance(one.get("words"), str)), None)


def _best(tested: list[rows.Row]) -> dict[str, Any]:
    """Of a training with `patience`: the step whose adapter it gave, its loss, and whether it ended before the last."""
    step = tested[-1].get("best_step") if tested else None
    losses = [line["eval_loss"] for line in tested if line["step"] == step and type(step) is int]
    return {
        "best_step": step if losses else None,
        "best_eval_loss": losses[0] if losses else None,
        "stopped_early": bool(losses) and tested[-1].get("stops_early") is True,
    }


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """At most CURVE_POINTS points: the last step of each stretch, with the mean of its losses."""
    width = max(1, math.ceil(len(points) / CURVE_POINTS))
    stretches = [points[at : at + width] for at in range(0, len(points), width)]
    return [[stretch[-1][0], sum(loss for _, loss in stretch) / len(stretch)] for stretch in stretches]


def shown(made: Any) -> dict[str, Any] | None:
    """The block for the page, with its curves as lines to draw; None for a run that is no training."""
    if not isinstance(made, dict):
        return None
    curves = [[[float(step), float(loss)] for step, loss in made.get(name) or ()] for name in ("curve", "eval_curve")]
    return defaultdict(lambda: None, {**made, "lines": drawn(curves[0], curves[1])})


def drawn(curve: list[list[float]], other: list[list[float]], width: float = 640, height: float = 200) -> list[str]:
    """Both curves as points of SVG polylines that share their axes, larger losses above."""
    points = [*curve, *other]
    if len(curve) < 2:
        return []
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    across, up = width / max(last - first, 1), height / ((high - low) or 1)
    return [
        " ".join(f"{(step - first) * across:.1f},{height - (loss - low) * up:.1f}" for step, loss in line)
        for line in (curve, other)
        if line
    ]

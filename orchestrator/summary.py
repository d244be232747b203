"""summary.json and report.html of a run, counted from its rows alone; made anew at any time, with the same result."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from jobs import durable, flips, metrics, rows, rundir, suites
from orchestrator import clock, curves, frozen, runs, speeds, training
from orchestrator.runs import Run

_CONFLICTS_MAX = 100
_COUNTS = ("n_examples", "n_rows", "scored", "unscored", "unscored_examples")


def write(run: Run) -> dict[str, Any]:
    """Count the rows at home and put summary.json and report.html into the run's folder; returns the summary."""
    from orchestrator import report

    frozen.keep(run)
    curves.show(run.home)
    document = count(run)
    durable.save_json(run.home.summary, document)
    job = {**run.job(), "machine": runs.machine_names(run), "started_at": run.record.started_at}
    shown = map(_as_of_part, finals(run.home)) if suites.is_suite(job) else finals(run.home)
    report.write(run.home.report, document, shown, choices(run), job)
    return document


def current(run: Run) -> dict[str, Any]:
    """The run's summary; made anew when it is not that of the record."""
    found = durable.load_news(run.home.summary)
    record = run.record
    is_current = (found.get("state"), found.get("finished_at")) == (record.state, record.finished_at)
    return found if is_current else write(run)


def finals(home: rundir.Home) -> Iterator[rows.Row]:
    """Each key's final row; one that does not say which sample of which example it is counts for nothing."""
    return (row for row in rows.read([home.rows]) if _counts(row))


def _counts(row: rows.Row) -> bool:
    """Whether a row says whose it is, in types that can be counted: a machine may send anything."""
    return (
        isinstance(row.get("example_id"), str | int)
        and isinstance(row.get("sample_index"), int)
        and isinstance(row.get("tokens_out"), int | None)
        and isinstance(row.get("score"), int | float | None)
        and isinstance(row.get("completion"), str | None)
        and isinstance(row.get("subject"), str | None)
        and isinstance(row.get("level"), str | None)
        and isinstance(row.get("scores", {}), dict | None)
        and all(isinstance(score, int | float | None) for score in (row.get("scores") or {}).values())
    )


def _as_of_part(row: rows.Row) -> rows.Row:
    """A row as a page over several parts shows it: two parts may have examples of one id."""
    task = suites.task_of(row["key"])
    return {**row, "example_id": f"{task}/{row['example_id']}", "subject": task}


def choices(run: Run) -> dict[str, rows.Row]:
    """What the re-ranker chose, by example."""
    return {str(row.get("example_id")): row for row in rows.read([run.home.selections])}


def count(run: Run) -> dict[str, Any]:
    """The summary as the contract of a run folder has it."""
    job = run.job()
    resolved = _resolved(run)
    tokens_out, seconds = _effort(run)
    return {
        "run_id": run.run_id,
        "job": job["job"],
        "task": job["task"],
        "model": job["params"].get("model"),
        "state": run.record.state,
        **_counted(run, job, resolved),
        "fingerprint": resolved.get("fingerprint"),
        "resolved": resolved,
        "tokens_out": tokens_out,
        "seconds": seconds,
        "tokens_per_second": round(tokens_out / seconds, 2) if seconds else None,
        "rows_damaged": run.record.rows_damaged,
        "conflicts": conflicts(run),
        "cost_usd": round(run.cost_usd() + asked_usd(run), 4),
        "created_at": run.record.created_at,
        "finished_at": run.record.finished_at,
        "machine": runs.machine_names(run),
        **({"frozen": known} if (known := frozen.told(run.home)) else {}),
        **({"training": training.summarise(run)} if job["story"] == "train" else {}),
        **({"speed": speeds.summarise(run)} if job["story"] == "speed" else {}),
    }


def _counted(run: Run, job: dict[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    """The counts and metrics of a run; of several parts those of each, in `parts`, and all together.

    In `metrics` each is called by its task too, `mmlu/acc`, the headlines first; subjects stand in `parts` alone.
    """
    tasks = suites.tasks(job)
    if not tasks:
        return metrics.summarise(finals(run.home), choices(run)) | _noise(run, "")
    found = {task: metrics.summarise(_rows_of(run, task)) for task in tasks}
    for task, part in found.items():
        part |= _noise(run, task)
        part["headline"] = _headline(part["metrics"], (resolved.get("headlines") or {}).get(task))
    named = {
        f"{task}/{name}": entry
        for task, part in found.items()
        for name, entry in part["metrics"].items()
        if not name.startswith(("subject/", "level/"))
    }
    noises = [part["noise"] for part in found.values() if "noise" in part]
    first = {name: named[name] for task, part in found.items() if (name := f"{task}/{part['headline']}") in named}
    return {
        **{name: sum(part[name] for part in found.values()) for name in _COUNTS},
        "metrics": {**first, **named},
        "selection": {},
        **({"noise": flips.total(noises)} if noises else {}),
        "parts": found,
    }


def _noise(run: Run, task: str) -> dict[str, Any]:
    """What came of asking some of it again, of one task or of all: nothing where that was not done."""
    if not run.home.noise.exists():
        return {}
    first, second = (
        (row for row in found if not task or suites.task_of(row["key"]) == task)
        for found in (finals(run.home), filter(_counts, rows.read([run.home.noise])))
    )
    noise = flips.summarise(first, second)
    return {"noise": noise} if noise else {}


def _rows_of(run: Run, task: str) -> Iterator[rows.Row]:
    return (row for row in finals(run.home) if suites.task_of(row["key"]) == task)


def _headline(found: dict[str, Any], name: Any) -> str | None:
    """The metric that stands for a part: its task's own, or else the first there is."""
    return name if name in found else next(iter(found), None)


def _resolved(run: Run) -> dict[str, Any]:
    """What its machine resolved for the run; before that one has, what another one did."""
    first = (run.home.shared, run.home.machine(run.record.machine))
    found = (durable.load_news(copy.resolved) for copy in (*first, *run.home.copies()))
    return next((document for document in found if document), {})


def conflicts(run: Run) -> list[str]:
    """Keys that two machines made different good rows for, at most a hundred; the first to come home counts."""
    copies = run.home.copies()
    if len(copies) < 2:
        return []
    said: dict[str, int] = {}
    found: list[str] = []
    for row in itertools.chain.from_iterable(map(_made_by, copies)):
        if row.get("error") is None and _counts(row):
            answer = hash((row.get("completion"), repr(row.get("prediction")), repr(row.get("score"))))
            if said.setdefault(str(row["key"]), answer) != answer:
                found.append(str(row["key"]))
    return sorted(set(found))[:_CONFLICTS_MAX]


def _made_by(copy: rundir.Run) -> Iterator[rows.Row]:
    """Every sound row that came from a machine, as often as it did."""
    for attempt in copy.attempts():
        for _, line in rows.whole_lines(attempt.rows):
            with contextlib.suppress(rows.BadRow):
                yield rows.decode(line)


def asked_usd(run: Run) -> float:
    """What servers were paid for its completions, in USD, as far as rows tell: those that were replaced, too."""
    return sum(_usd(line) for _, line in rows.whole_lines(run.home.rows) if b'"usd":' in line)


def _usd(line: bytes) -> float:
    with contextlib.suppress(rows.BadRow):
        said = rows.decode(line).get("usd")
        return max(float(said), 0.0) if isinstance(said, int | float) and math.isfinite(said) else 0.0
    return 0.0


def _effort(run: Run) -> tuple[int, float]:
    """Tokens generated, and the seconds from the model being loaded to the last row, added up over attempts."""
    tokens = sum(row.get("tokens_out") or 0 for row in finals(run.home))
    seconds = 0.0
    for copy in run.home.copies():
        for attempt in copy.attempts():
            last = _last_row_at(attempt)
            began = durable.load_news(attempt.env).get("generating_since")
            with contextlib.suppress(ValueError, TypeError):  # no times: that machine made them up
                if last and began:
                    seconds += (clock.parse(last) - clock.parse(str(began))).total_seconds()
    return tokens, round(seconds, 3)


def _last_row_at(attempt: rundir.Attempt) -> str | None:
    """When the last row of an attempt was made; None without rows, or when that one cannot be read."""
    with contextlib.suppress(rows.BadRow):
        for _, line in deque(rows.whole_lines(attempt.rows), maxlen=1):
            return str(rows.decode(line).get("at", ""))
    return None

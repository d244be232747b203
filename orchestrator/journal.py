"""Every run in one table: what was asked, what came of it, its cost and its notes; from summaries, not from rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jobs import durable, suites
from orchestrator import notes, pages, retyping, runs, summary
from orchestrator.plain import plain
from orchestrator.runs import Run

COLUMNS = (
    *("Run", "Date", "Job", "Task", "Dataset", "Model", "Adapter", "State", "Score", "Categories", "Cost USD", "Notes"),
)
CATEGORIES_MAX = 12
"""More than this make a Markdown table unreadable; the weakest are shown, and how many there are besides."""
_KINDS = ("subject/", "level/", "category/")
_LOSSES = ("first_loss", "final_loss", "eval_loss", "steps_done", "steps_total")
_SPECIAL = re.compile(r"[&<>|`\\\[\]]")
_EMPHASIS = re.compile(r"([*_~])")
_UNSEEN = re.compile(
    "[\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)  # ends of lines, directions of writing, no text at all
Json = Mapping[str, Any]


def read() -> dict[str, Any]:
    """Every run that is remembered, oldest first, and those whose folder has gone: what `gpu journal --json` prints."""
    gone = [{"run_id": name, "folder": str(folder)} for name, folder in runs.gone().items()]
    return {"runs": [_entry(run) for run in runs.remembered()], "gone": gone}


def _entry(run: Run) -> dict[str, Any]:
    record, job = run.record, durable.load_news(run.home.job)
    params = job.get("params") or {}
    found = _summary(run)
    cost = found.get("cost_usd")
    return {
        "run_id": run.run_id,
        "created_at": record.created_at,
        "job": record.job,
        "task": job.get("task") or ", ".join(suites.tasks(job)) or None,
        **{name: _sound(params.get(name)) for name in ("dataset", "model", "adapter")},
        "state": record.state,
        "score": _score(found),
        "training": _training(found),
        "categories": _categories(found.get("metrics") or {}) or _headlines(found),
        "cost_usd": cost if isinstance(cost, int | float) else round(run.cost_usd(), 4),
        "notes": notes.read(run),
        "command": retyping.line(run, job) if {"job", "story"} <= job.keys() else None,
        "cwd": _sound(record.cwd),
        "folder": _sound(str(run.home.folder)),
    }


def _summary(run: Run) -> dict[str, Any]:
    """The run's summary, counted anew only where that was never done; nothing of a run that has not ended."""
    if run.record.state not in runs.ENDED or not (run.record.rows_home or run.record.steps_done):
        return {}
    try:
        return summary.current(run)
    except (OSError, KeyError, TypeError):  # a folder nobody may write to, or a damaged job.json: what is there counts
        return durable.load_news(run.home.summary)


def _sound(value: Any) -> str | None:
    """Text that can be written anywhere, whatever bytes a path was made of."""
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _score(found: Json) -> dict[str, Any] | None:
    """The headline of an evaluation: the rule its task is known by, else the mean score, or the perplexity."""
    metrics, resolved = found.get("metrics") or {}, found.get("resolved") or {}
    headline = str(resolved.get("headline"))
    known = {"mean": (found.get("selection") or {}).get("mean"), **metrics}
    name = next((name for name in (headline, "mean", "word_perplexity") if known.get(name)), headline)
    entry = known.get(name)
    if not isinstance(entry, Mapping) or entry.get("value") is None:
        return None
    return {"name": name, "value": entry["value"], "ci95": entry.get("ci95") or [None, None], "n": entry.get("n")}


def _training(found: Json) -> dict[str, Any] | None:
    made = found.get("training")
    return {name: made.get(name) for name in _LOSSES} if isinstance(made, Mapping) else None


def _categories(metrics: Json) -> list[dict[str, Any]]:
    """Subjects, levels and categories, each with its interval, the weakest first."""
    found = [
        {"name": name, "value": entry["value"], "ci95": entry.get("ci95"), "n": entry.get("n")}
        for name, entry in metrics.items()
        if name.startswith(_KINDS) and isinstance(entry, Mapping) and entry.get("value") is not None
    ]
    return sorted(found, key=lambda each: (each["value"], each["name"]))


def _headlines(found: Json) -> list[dict[str, Any]]:
    """That of each part of a run that has several."""
    parts = [(f"{task} {part.get('headline')}", part) for task, part in (found.get("parts") or {}).items()]
    named = [(name, (part.get("metrics") or {}).get(part.get("headline")) or {}) for name, part in parts]
    return [
        {"name": name, **{key: entry.get(key) for key in ("value", "ci95", "n")}}
        for name, entry in named
        if entry.get("value") is not None
    ]


def markdown(found: Json) -> str:
    """The journal as Markdown: a table, what has gone, and the commands."""
    lines = ["# Journal", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line([_cell(word) for word in cells(entry, CATEGORIES_MAX)]) for entry in found["runs"]]
    lines += ["", *_of_gone(found["gone"])] if found["gone"] else []
    if commands := [entry for entry in found["runs"] if entry["command"]]:
        lines += ["", "## Commands", "", "```bash"]
        for entry in commands:
            where = retyping.quoted(entry["cwd"] or "")
            lines += [f"# {plain(entry['run_id'])}, in {plain(where)}", plain(entry["command"])]
        lines += ["```"]
    return "\n".join([*lines, ""])


def _of_gone(gone: Sequence[Json]) -> list[str]:
    words = "The folder of one run has" if len(gone) == 1 else f"The folders of {len(gone)} runs have"
    return [f"{words} gone:", "", *(f"- {_cell(each['run_id'])}: {_cell(each['folder'])}" for each in gone)]


def html(found: Json) -> str:
    """The same as one self-contained page."""
    from markupsafe import Markup

    css, script = pages.asset("report.css"), pages.asset("report_theme.js")
    entries = [{**entry, "cells": [_shown(word) for word in cells(entry, None)]} for entry in found["runs"]]
    return pages.template("journal.html.j2").render(
        runs=entries,
        gone=found["gone"],
        columns=COLUMNS,
        css=Markup(css),  # noqa: S704 - our own file
        js=Markup(script),  # noqa: S704 - our own file
        digest=pages.digest,
    )


def cells(entry: Json, most: int | None) -> list[str]:
    """The words of a run's line in the table; of its categories at most so many."""
    words = [entry["run_id"], str(entry["created_at"])[:10]]
    words += [str(entry[name] or "") for name in ("job", "task", "dataset", "model", "adapter", "state")]
    said = [f"{note['at'][:10]} {note['text'].strip()}" for note in entry["notes"]]
    return [*words, result(entry), _parts(entry["categories"], most), f"{entry['cost_usd']:.2f}", "\n".join(said)]


def result(entry: Json) -> str:
    """The score with its interval, or the losses of a training; empty where there is none yet."""
    score, made = entry["score"], entry["training"]
    if made:
        held_out = f", held out {made['eval_loss']:.4f}" if made["eval_loss"] is not None else ""
        return f"loss {_number(made['first_loss'], 4)} to {_number(made['final_loss'], 4)}{held_out}"
    if not score:
        return ""
    low, high = score["ci95"]
    interval = f" ({_number(low)} to {_number(high)})" if low is not None else ""
    return f"{score['name']} {_number(score['value'])}{interval}"


def _parts(categories: Sequence[Json], most: int | None) -> str:
    said = [f"{each['name'].partition('/')[2] or each['name']} {_number(each['value'])}" for each in categories[:most]]
    left = len(categories) - len(said)
    return ", ".join(said) + (f" and {left} more" if left else "")


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _line(words: Iterable[str]) -> str:
    return f"| {' | '.join(words)} |"


def _cell(text: str) -> str:
    """Any text as words of a Markdown table: no mark-up, no end of the cell or the line, nothing that is not seen."""
    words = _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", _shown(text))
    return _EMPHASIS.sub(r"\\\1", words).replace("\r", "\n").replace("\n", "<br>").replace("\t", " ")


def _shown(text: str) -> str:
    """Text without what a reader would not see, and without secrets."""
    return _UNSEEN.sub("\ufffd", plain(text)).replace("\r\n", "\n")

"""Several runs as one self-contained page: their numbers beside each other, and each run's score of every example."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import durable, suites
from orchestrator import comparing, pages, summary
from orchestrator.comparing import Loaded, Side
from orchestrator.report import Figure

EXAMPLES_MAX = 20_000
"""More than these would be no page that a browser opens at once; those that flipped go first."""
_CHARS = 300
_CATEGORY = re.compile(r"(?:(.+)/)?(?:subject|level|category)/(.+)")
_DRAWN = 1e-9


@dataclass
class Line:
    """One example: what was asked, and of each run, by its place, the score and the answer of the first sample."""

    subject: str | None
    prompt: str
    target: str
    scores: dict[int, float] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)

    def flips(self) -> bool:
        """Whether two runs that scored it did so differently."""
        return bool(self.scores) and max(self.scores.values()) - min(self.scores.values()) > _DRAWN


def write(path: Path, loaded: Loaded, compared: Mapping[str, Any]) -> None:
    """Put the page of these runs at `path`, whole or not at all; `compared` is what `comparing.compare` says of them.

    Their summaries are there. ConfigError when it cannot be written.
    """
    comparing.write(path, render(loaded, compared).encode())


def render(loaded: Loaded, compared: Mapping[str, Any]) -> str:
    """The page. Any text of a row may be hostile."""
    from markupsafe import Markup

    labels, lines = list(loaded.runs), _lines(loaded)
    shown = sorted(lines, key=lambda name: not lines[name].flips())[:EXAMPLES_MAX]
    data = {"runs": labels, "examples": [_example(name, lines[name], len(labels)) for name in shown]}
    metrics, categories = _rows(durable.load_news(_any(sides).home.summary) for sides in loaded.runs.values())
    return pages.template("side_by_side.html.j2").render(
        labels=labels,
        tasks=compared["tasks"],
        runs=[{**each, "figure": Figure.of(each["measure"], each)} for each in compared["runs"]],
        comparisons=compared["comparisons"],
        metrics=metrics,
        categories=categories,
        total=len(lines),
        shown=len(shown),
        data=Markup(pages.encode(data)),  # noqa: S704 - see encode
        css=Markup(pages.asset("report.css")),  # noqa: S704 - our own file
        js=Markup(pages.asset("report_theme.js") + pages.asset("side_by_side.js")),  # noqa: S704 - our own files
        digest=pages.digest,
    )


def _any(sides: Mapping[str, Side]) -> Side:
    return next(iter(sides.values()))


def _lines(loaded: Loaded) -> dict[tuple[str, str], Line]:
    """Every example that any of the runs has, in the order of the first, by task and id."""
    lines: dict[tuple[str, str], Line] = {}
    several = len(loaded.tasks()) > 1
    for place, sides in enumerate(loaded.runs.values()):
        for row in summary.finals(_any(sides).home):
            task, name = suites.task_of(row["key"]), str(row["example_id"])
            line = lines.get((task, name))
            if line is None:
                category = ": ".join(filter(None, [task if several else None, row.get("subject")])) or None
                line = lines[task, name] = Line(category, _asked(row), _short(row.get("target")))
            if row.get("error") is None and place not in line.answers:
                line.answers[place] = _short(row.get("prediction") if "logliks" in row else row.get("answer"))
            if task in sides and name in sides[task].scores:
                line.scores[place] = sides[task].scores[name]
    return lines


def _example(name: tuple[str, str], line: Line, runs: int) -> dict[str, Any]:
    """What the page's script gets of an example; what is not there is null."""
    return {
        "id": pages.text(name[1]),
        "subject": pages.text(line.subject),
        "prompt": pages.text(line.prompt),
        "target": pages.text(line.target),
        "scores": [line.scores.get(place) for place in range(runs)],
        "answers": [pages.text(line.answers.get(place)) for place in range(runs)],
        "flips": line.flips(),
    }


def _asked(row: Mapping[str, Any]) -> str:
    """The end of what was asked: there the question stands."""
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages and isinstance(messages[-1], Mapping) else {}
    return _short(last.get("content", row.get("prompt")), from_end=True)


def _short(value: Any, *, from_end: bool = False) -> str:
    text = "" if value is None else value if isinstance(value, str) else str(value)
    if len(text) <= _CHARS:
        return text
    return f"…{text[-_CHARS:]}" if from_end else f"{text[:_CHARS]}…"


def _rows(summaries: Iterable[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Metrics, and categories apart, as lines of a table: a name, and of each run its figure or None."""
    given = [each.get("metrics") or {} for each in summaries]
    names = dict.fromkeys(name for metrics in given for name in metrics)
    made = [
        (name, [Figure.of(name, metrics[name]) if name in metrics else None for metrics in given]) for name in names
    ]
    apart = [(_category(name), figures) for name, figures in made if _CATEGORY.fullmatch(name)]
    return [line for line in made if not _CATEGORY.fullmatch(line[0])], apart


def _category(name: str) -> str:
    """What a category is called, after the part of the job it belongs to, if any."""
    found = _CATEGORY.fullmatch(name)
    return ": ".join(filter(None, found.groups())) if found else name

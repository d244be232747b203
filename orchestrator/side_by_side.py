"""Several runs as one self-contained page: their numbers beside each other, and each run's score of every example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import durable, selection
from orchestrator import comparing, pages, summary
from orchestrator.report import Figure
from orchestrator.runs import Run

EXAMPLES_MAX = 20_000
"""More than these would be no page that a browser opens at once; those that flipped go first."""
_CHARS = 300
_KINDS = ("subject/", "level/", "category/")
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


def write(path: Path, found: Sequence[Run], compared: Mapping[str, Any]) -> None:
    """Put the page of these runs at `path`, whole or not at all; `compared` is what `comparing.compare` says of them.

    ConfigError when it cannot be written.
    """
    comparing.write(path, render(found, compared).encode())


def render(found: Sequence[Run], compared: Mapping[str, Any]) -> str:
    """The page. Any text of a row may be hostile."""
    from markupsafe import Markup

    lines = _lines(found)
    shown = sorted(lines, key=lambda name: not lines[name].flips())[:EXAMPLES_MAX]
    examples = [_example(name, lines[name], len(found)) for name in shown]
    summaries = [durable.load_news(run.home.summary) for run in found]
    metrics, categories = _rows(summaries)
    return pages.template("side_by_side.html.j2").render(
        runs=[{**each, "figure": Figure.of(each["measure"], each)} for each in compared["runs"]],
        comparisons=compared["comparisons"],
        metrics=metrics,
        categories=categories,
        total=len(lines),
        shown=len(examples),
        data=Markup(pages.encode({"runs": [run.run_id for run in found], "examples": examples})),  # noqa: S704 - see encode
        css=Markup(pages.asset("report.css")),  # noqa: S704 - our own file
        js=Markup(pages.asset("report_theme.js") + pages.asset("side_by_side.js")),  # noqa: S704 - our own files
        digest=pages.digest,
    )


def _lines(found: Sequence[Run]) -> dict[str, Line]:
    """Every example that any of the runs has, in the order of the first, by id."""
    lines: dict[str, Line] = {}
    for place, run in enumerate(found):
        for row in summary.finals(run.home):
            name = str(row["example_id"])
            line = lines.get(name)
            if line is None:
                line = lines[name] = Line(row.get("subject"), _asked(row), _short(row.get("target")))
            if row.get("error") is None and place not in line.answers:
                line.answers[place] = _short(row.get("prediction") if "logliks" in row else row.get("answer"))
        for name, candidates in selection.group(summary.finals(run.home)).scored().items():
            lines[name].scores[place] = selection.mean(candidates)
    return lines


def _example(name: str, line: Line, runs: int) -> dict[str, Any]:
    """What the page's script gets of an example; what is not there is null."""
    return {
        "id": pages.text(name),
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
    apart = [(name.partition("/")[2], figures) for name, figures in made if name.startswith(_KINDS)]
    return [line for line in made if not line[0].startswith(_KINDS)], apart

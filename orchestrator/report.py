"""A run as one self-contained HTML page: headline, ways of choosing, subjects, and the problems behind the numbers."""

from __future__ import annotations

import hashlib
import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jobs import durable, perplexities
from orchestrator import pages, speeds, training
from orchestrator.pages import encode as _encode
from orchestrator.pages import text as _text

Json = Mapping[str, Any]
SUBJECTS_MAX = 200
"""More subjects than this are no table anybody reads; the page says how many were left out."""
_TILES = 4
_WAYS = ("first", "mean", "majority", "oracle")
_SHARES_OF_ROWS = ("finish_length", "no_answer")  # metrics told among the facts of the run
_NOT_SHARES = re.compile(r"perplexity|ppl|loss|bits|log|second|token|length", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """How much of a run goes into its page: whole examples until either is full, and long texts cut in the middle."""

    examples: int = 2_000
    text_bytes: int = 8_000_000
    text_chars: int = 6_000


def write(path: Path, summary: Json, rows: Iterable[Json], selections: Mapping[str, Json], job: Json) -> None:
    """Put the page at `path`, whole or not at all; arguments as for `render`."""
    durable.replace_whole(path, "".join(render(summary, rows, selections, job)).encode())


def render(
    summary: Json,
    rows: Iterable[Json],
    selections: Mapping[str, Json],
    job: Json,
    limits: Limits = Limits(),
) -> Iterator[str]:
    """The page, in pieces. Reads `rows` once and holds the texts of the sampled examples only.

    `selections`: example id → its line of selections.jsonl. `job`: job.json, with `machine` and `started_at` of the
    run's record where known. Any key may be missing or null, and any text may be hostile.
    """
    from markupsafe import Markup

    intake = Intake(limits)
    for row in rows:
        intake.add(row)
    view = _view(summary, intake, job)
    view["failed"] = sum(isinstance(line, Mapping) and line.get("error") is not None for line in selections.values())
    view["data"] = (Markup(piece) for piece in _data(intake, selections, [*view["gaps"]]))  # noqa: S704 - see _encode
    view["css"] = Markup(pages.asset("report.css"))  # noqa: S704 - our own file
    view["js"] = Markup(pages.asset("report_theme.js") + pages.asset("report.js"))  # noqa: S704 - our own files
    yield from pages.template("report.html.j2").generate(view, digest=pages.digest)


class Mark(NamedTuple):
    """What is kept of every row: its score, and what the warnings count."""

    score: float | None
    error: bool
    generated: bool
    cut: bool
    silent: bool
    """There was something to find, and no answer was found in the completion."""
    read: bool = False
    """It is a text that was read: it has a likelihood, and needs no score."""


@dataclass
class Kept:
    """One sampled example: what the page shows of it, and how much room that takes."""

    subject: str | None
    prompt: Any
    target: Any
    size: int
    candidates: dict[int, Json] = field(default_factory=dict)


class Intake:
    """One pass over rows: a small mark of each, and the texts of a stable sample of examples.

    The sample is the examples with the smallest hashes of their ids, as many as fit. The limit only ever falls, so an
    example once left out stays out and one kept is kept whole: the order of the rows changes nothing.
    """

    def __init__(self, limits: Limits) -> None:
        self.marks: dict[str, dict[int, Mark]] = {}
        self.kept: dict[str, Kept] = {}
        self.tokens_in = 0
        self.times: tuple[str, str] | None = None
        self._limits = limits
        self._heap: list[tuple[int, str]] = []  # (minus hash, example id): the first to go is on top
        self._ceiling = 1 << 64
        self._size = 0
        self._shared: dict[Mark, Mark] = {}

    def add(self, row: Json) -> None:
        """Take one row in; a second row of the same sample counts only where the first was an error."""
        example_id = _text(row.get("example_id")) or "(no id)"
        marks = self.marks.setdefault(example_id, {})
        index = row.get("sample_index")
        index = index if isinstance(index, int) else len(marks)
        known = marks.get(index)
        if known is not None and not known.error:
            return
        mark = _mark(row)
        marks[index] = self._shared.setdefault(mark, mark)
        self.tokens_in += int(_number(row.get("tokens_in")) or 0)
        at = row.get("at")
        if isinstance(at, str):
            self.times = (min(self.times[0], at), max(self.times[1], at)) if self.times else (at, at)
        self._sample(example_id, index, row)

    def _sample(self, example_id: str, index: int, row: Json) -> None:
        kept = self.kept.get(example_id)
        if kept is None:
            rank = int.from_bytes(hashlib.blake2b(example_id.encode(), digest_size=8).digest(), "big")
            if rank >= self._ceiling:
                return
            heapq.heappush(self._heap, (-rank, example_id))
            kept = self.kept[example_id] = self._example(example_id, row)
            self._size += kept.size
        candidate = _candidate(row, index, self._limits.text_chars)
        size = len(_encode(candidate).encode())
        kept.candidates[index] = candidate
        kept.size += size
        self._size += size
        while len(self._heap) > self._limits.examples or (self._size > self._limits.text_bytes and len(self._heap) > 1):
            rank, left_out = heapq.heappop(self._heap)
            self._ceiling = -rank
            self._size -= self.kept.pop(left_out).size

    def _example(self, example_id: str, row: Json) -> Kept:
        chars = self._limits.text_chars
        prompt, target = _shown(_prompt(row), chars), _shown(row.get("target"), chars)
        size = len(_encode([example_id, prompt, target]).encode())
        return Kept(_text(row.get("subject")), prompt, target, size)


def _mark(row: Json) -> Mark:
    failed = row.get("error") is not None
    generated = not failed and row.get("completion") is not None
    silent = generated and row.get("answer") is None and row.get("target") is not None
    score = None if failed else _number(row.get("score"))
    read = perplexities.reading(row) is not None
    return Mark(score, failed, generated, row.get("finish_reason") == "length", silent, read)


def _prompt(row: Json) -> Any:
    """The last message of the user, else the bare prompt."""
    messages = row.get("messages")
    said = [message for message in messages if isinstance(message, Mapping)] if isinstance(messages, list) else []
    if not said:
        return row.get("prompt")
    content = next((message for message in reversed(said) if message.get("role") == "user"), said[-1]).get("content")
    if isinstance(content, list):  # parts, of which only the texts can be shown
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content


def _candidate(row: Json, index: int, chars: int) -> Json:
    """What the page shows of one completion; what is null is left out."""
    answer = row.get("answer")
    answers, scores = row.get("answers"), row.get("scores")
    rules = []
    if isinstance(answers, Mapping) and isinstance(scores, Mapping):
        rules = [[_text(rule), _shown(answers.get(rule), 200), _number(scores[rule])] for rule in scores]
    if all(rule[1:] == rules[0][1:] for rule in rules):
        rules = []  # where they agree, the answer and the mark say it all
    logliks, choices, read = row.get("logliks"), row.get("choices"), perplexities.reading(row)
    candidate = {
        "n": index,
        "text": _shown(row.get("completion"), chars),
        "answer": _shown(row.get("prediction") if answer is None else answer, chars),
        "score": _mark(row).score,
        "end": _shown(row.get("finish_reason"), 100),
        "tokens": _number(row.get("tokens_out")),
        "error": _shown(row.get("error"), chars),
        "rules": rules or None,
        "logliks": [_number(value) for value in logliks] if isinstance(logliks, list) else None,
        "choices": [_shown(choice, 200) for choice in choices] if isinstance(choices, list) else None,
        "nats": -read.loglik / read.tokens if read else None,
    }
    return {key: value for key, value in candidate.items() if value is not None}


def _number(value: Any) -> float | None:
    """A finite number, else None."""
    if not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond what a float holds
        return None


def _shown(value: Any, chars: int) -> Any:
    """Text for the page's data: whole, or [start, characters cut, end] where it is longer than `chars`."""
    text = value if isinstance(value, str) else _text(value)
    if text is None or len(text) <= chars:
        return _text(text)
    start = chars * 2 // 3  # the end counts too: there the answer stands
    return [_text(text[:start]), len(text) - chars, _text(text[start - chars :])]


def _data(intake: Intake, selections: Mapping[str, Json], rerankers: Sequence[str]) -> Iterator[str]:
    """The sampled examples as one JSON object, in pieces."""
    yield '{"examples":['
    for number, (example_id, kept) in enumerate(intake.kept.items()):
        candidates = [kept.candidates[index] for index in sorted(kept.candidates)]
        example = {
            "id": example_id,
            "subject": kept.subject,
            "prompt": kept.prompt,
            "target": kept.target,
            "picks": [*_majority(candidates), *_choice(selections.get(example_id), rerankers)],
            "candidates": candidates,
        }
        yield ("," if number else "") + _encode(example)
    yield "]}"


def _majority(candidates: Sequence[Json]) -> Iterator[Json]:
    """The vote of an example, as `{by, n, tied}`; as in jobs/selection.py, only what has answer and score votes."""
    answers = [str(each["answer"]) if "answer" in each and "score" in each else None for each in candidates]
    votes = Counter(answer for answer in answers if answer is not None).most_common(2)
    if votes and len(candidates) > 1:
        tied = len(votes) == 2 and votes[0][1] == votes[1][1]
        yield {"by": "majority", "n": None if tied else candidates[answers.index(votes[0][0])]["n"], "tied": tied}


def _choice(line: Any, rerankers: Sequence[str]) -> Iterator[Json]:
    """What the re-ranker took for an example: `{by, n, scores by sample index, error}`."""
    if not isinstance(line, Mapping):
        return
    name = rerankers[0] if len(rerankers) == 1 else _text(line.get("reranker"))
    samples, scores = (each if isinstance(each, list) else [] for each in (line.get("samples"), line.get("scores")))
    by_sample = {_text(sample): _number(score) for sample, score in zip(samples, scores, strict=False)}
    error = _shown(line.get("error"), 500)
    yield {"by": name or "re-ranker", "n": _number(line.get("sample_index")), "scores": by_sample, "error": error}


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval and standard error; None where unknown."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    n: float | None = None
    """How many problems it is a mean over."""

    @classmethod
    def of(cls, name: str, given: Any) -> Figure:
        """From a bare number, or from `{value, stderr, ci95}`."""
        given = given if isinstance(given, Mapping) else {"value": given}
        ends = given.get("ci95")
        low, high = map(_number, ends) if isinstance(ends, Sequence) and len(ends) == 2 else (None, None)
        return cls(name, _number(given.get("value")), low, high, _number(given.get("stderr")), _number(given.get("n")))

    @property
    def is_share(self) -> bool:
        """Whether the number is a part of a whole, to be written in percent and drawn as a bar."""
        known = [number for number in (self.value, self.low, self.high) if number is not None]
        return bool(known) and not _NOT_SHARES.search(self.name) and all(0 <= number <= 1 for number in known)

    def show(self, number: float | None) -> str:
        """One of this figure's numbers as it is written."""
        if number is None:
            return "–"
        if self.is_share:
            return f"{100 * number:.1f}%"
        return f"{number:,.2f}" if 0.1 <= abs(number) < 1e9 else f"{number:.3g}"


def _view(summary: Json, intake: Intake, job: Json) -> dict[str, Any]:
    """Everything the template writes but the problems; its words stand in the template."""
    marks = [mark for by_index in intake.marks.values() for mark in by_index.values()]
    generated = sum(mark.generated for mark in marks) or 1
    samples = max(map(len, intake.marks.values()), default=0)
    return {
        **_figures(summary, samples),
        "training": training.shown(summary.get("training")),
        "speed": speeds.facts(summary.get("speed") or {}),
        "summary": defaultdict(lambda: None, summary),
        "job": defaultdict(lambda: None, job),
        "times": intake.times or (None, None),
        "problems": len(intake.marks),
        "shown": len(intake.kept),
        "rows": len(marks),
        "samples": samples,
        "short": 0 if summary.get("parts") else sum(len(by_index) < samples for by_index in intake.marks.values()),
        "tiles": len(summary.get("parts") or ()) or _TILES,
        "unscored": sum(mark.score is None and not mark.read for mark in marks),
        "errors": sum(mark.error for mark in marks),
        "cut": sum(mark.cut for mark in marks) / generated,
        "silent": sum(mark.silent for mark in marks) / generated,
        "tokens_in": intake.tokens_in,
    }


def _figures(summary: Json, samples: int) -> dict[str, Any]:
    """The summary's numbers by the section they stand in; one sample leaves no choice, and so no ways of choosing."""
    selection, metrics = ({**(summary.get(key) or {})} for key in ("selection", "metrics"))
    ways = [Figure.of(name, selection[name]) for name in sorted(selection, key=_way_rank)] if samples != 1 else []
    gaps = {name: metrics.pop(name) for name in [*metrics] if name.startswith("oracle_gap_closed")}
    subjects = {name: metrics.pop(name) for name in [*metrics] if name.startswith("subject/")}
    weakest_first = sorted(
        (Figure.of(name.removeprefix("subject/"), given) for name, given in subjects.items()),
        key=lambda figure: (math.inf if figure.value is None else figure.value, figure.name),
    )
    rerankers = [figure.name for figure in ways if figure.name not in _WAYS]
    return {
        "ways": [figure for figure in ways if figure.is_share],
        "gaps": {
            name: Figure.of(name, gaps.get(f"oracle_gap_closed/{name}", gaps.get("oracle_gap_closed")))
            for name in rerankers
        },
        "metrics": [Figure.of(name, given) for name, given in metrics.items() if not name.endswith(_SHARES_OF_ROWS)],
        "subjects": weakest_first[:SUBJECTS_MAX],
        "subjects_left_out": len(weakest_first[SUBJECTS_MAX:]),
        "generations": [
            (defaultdict(lambda: None, each), Figure.of("accuracy", {**each, "value": each.get("accuracy")}))
            for each in summary.get("generations") or ()
            if each
        ],
    }


def _way_rank(name: str) -> int:
    """First, mean, majority, the re-rankers, oracle: the order the page shows ways of choosing in."""
    return {"first": 0, "mean": 1, "majority": 2, "oracle": 4}.get(name, 3)

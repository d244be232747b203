"""A run as one self-contained HTML page: headline, ways of choosing, subjects, and the problems behind the numbers."""

from __future__ import annotations

import base64
import functools
import hashlib
import heapq
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs import durable

if TYPE_CHECKING:
    import jinja2

Json = Mapping[str, Any]
SUBJECTS_MAX = 200
"""More subjects than this are no table anybody reads; the page says how many were left out."""
_Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
_WAYS = ("first", "mean", "majority", "oracle")
_NOT_SHARES = re.compile(r"perplexity|ppl|loss|bits|log|second|token|length", re.IGNORECASE)
# What a page cannot show is made visible: control characters as their pictures, lone surrogates as U+FFFD.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_ESCAPED = "<>&\u2028\u2029"  # could end <script> early or, to a reader of old, a line in it


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

    `selections`: example id → its line of selections.jsonl. `job`: job.json, with `machine`, `started_at` and
    `finished_at` of the run's record where known. Any key may be missing or null, and any text may be hostile.
    """
    from markupsafe import Markup

    intake = Intake(limits)
    for row in rows:
        intake.add(row)
    view = _view(summary, intake, job)
    rerankers = [figure.name for figure in view["ways"] if figure.name not in _WAYS]
    view["failed"] = sum(isinstance(line, Mapping) and line.get("error") is not None for line in selections.values())
    view["data"] = (Markup(piece) for piece in _data(intake, selections, rerankers))  # noqa: S704 - see _encode
    view["css"] = Markup(_asset("report.css"))  # noqa: S704 - our own file
    view["js"] = Markup(_asset("report_theme.js") + _asset("report.js"))  # noqa: S704 - our own files
    yield from _template().generate(view, digest=_digest)


@functools.cache
def _template() -> jinja2.Template:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_asset),
        finalize=lambda value: value if isinstance(value, Markup) else "–" if value is None else _text(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _asset(name: str) -> str:
    return (resources.files("orchestrator") / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Mark(NamedTuple):
    """What is kept of every row: its score, and what the warnings count."""

    score: float | None
    error: bool
    generated: bool
    cut: bool
    silent: bool
    """There was something to find, and no answer was found in the completion."""


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
        self.subjects: dict[str, str] = {}
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
        if example_id not in self.subjects and (subject := row.get("subject") or row.get("category")):
            self.subjects[example_id] = _text(subject) or ""
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
        return Kept(self.subjects.get(example_id), prompt, target, size)


def _mark(row: Json) -> Mark:
    generated = row.get("completion") is not None
    silent = generated and row.get("answer") is None and row.get("target") is not None
    error = row.get("error") is not None
    return Mark(_number(row.get("score")), error, generated, row.get("finish_reason") == "length", silent)


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
    if isinstance(answers, Mapping) and isinstance(scores, Mapping) and len(scores) > 1:
        rules = [[_text(rule), _shown(answers.get(rule), 200), _number(scores[rule])] for rule in scores]
    logliks = row.get("logliks")
    candidate = {
        "n": index,
        "text": _shown(row.get("completion"), chars),
        "answer": _shown(row.get("prediction") if answer is None else answer, chars),
        "score": _number(row.get("score")),
        "end": _shown(row.get("finish_reason"), 100),
        "tokens": _number(row.get("tokens_out")),
        "error": _shown(row.get("error"), chars),
        "rules": rules or None,
        "logliks": [_number(value) for value in logliks] if isinstance(logliks, list) else None,
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


def _text(value: Any) -> str | None:
    """Any value as text a page can show; None stays None."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _HIDDEN.sub(_visible, text.replace("\r\n", "\n"))


def _visible(hidden: re.Match[str]) -> str:
    code = ord(hidden[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def _shown(value: Any, chars: int) -> Any:
    """Text for the page's data: whole, or [start, characters cut, end] where it is longer than `chars`."""
    text = value if isinstance(value, str) else _text(value)
    if text is None or len(text) <= chars:
        return _text(text)
    start = chars * 2 // 3  # the end counts too: there the answer stands
    return [_text(text[:start]), len(text) - chars, _text(text[start - chars :])]


def _encode(value: Any) -> str:
    """JSON that can stand inside <script>, whatever is in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in _ESCAPED:
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


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
            "picks": [*_majority(candidates), *_choice(selections.get(example_id), candidates, rerankers)],
            "candidates": candidates,
        }
        yield ("," if number else "") + _encode(example)
    yield "]}"


def _majority(candidates: Sequence[Json]) -> Iterator[Json]:
    """The vote of an example, as `{by, n}`: of answers equally frequent the one seen first wins."""
    votes = Counter(str(each["answer"]) for each in candidates if "answer" in each)
    if votes and len(candidates) > 1:
        winner = max(votes, key=votes.__getitem__)
        yield {"by": "majority", "n": next(each["n"] for each in candidates if str(each.get("answer")) == winner)}


def _choice(line: Any, candidates: Sequence[Json], rerankers: Sequence[str]) -> Iterator[Json]:
    """What the re-ranker took for an example: `{by, n, scores by sample index, error}`."""
    if not isinstance(line, Mapping):
        return
    name = rerankers[0] if len(rerankers) == 1 else _text(line.get("reranker"))
    scores = line.get("scores")
    if isinstance(scores, list):
        scores = {each["n"]: score for each, score in zip(candidates, scores, strict=False)}
    scores = {_text(key): _number(score) for key, score in scores.items()} if isinstance(scores, Mapping) else {}
    error = _shown(line.get("error"), 500)
    yield {"by": name or "re-ranker", "n": _number(line.get("sample_index")), "scores": scores, "error": error}


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval and standard error; None where unknown."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None

    @classmethod
    def of(cls, name: str, given: Any) -> Figure:
        """From a bare number, or from `{value, stderr, ci95}`."""
        given = given if isinstance(given, Mapping) else {"value": given}
        ends = given.get("ci95")
        low, high = map(_number, ends) if isinstance(ends, Sequence) and len(ends) == 2 else (None, None)
        return cls(name, _number(given.get("value")), low, high, _number(given.get("stderr")))

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
    selection, metrics = ({**(summary.get(key) or {})} for key in ("selection", "metrics"))
    ways = {name: Figure.of(name, selection[name]) for name in sorted(selection, key=_way_rank)} if samples != 1 else {}
    subjects = _subjects(intake)
    return {
        "summary": defaultdict(lambda: None, summary),
        "job": defaultdict(lambda: None, job),
        "parameters": job.get("parameters") or {},
        "times": intake.times or (None, None),
        "ways": [figure for figure in ways.values() if figure.is_share],
        "metrics": [Figure.of(name, given) for name, given in metrics.items()],
        "subjects": subjects[:SUBJECTS_MAX],
        "subjects_left_out": len(subjects[SUBJECTS_MAX:]),
        "generations": [
            (defaultdict(lambda: None, each), Figure.of("accuracy", {**each, "value": each.get("accuracy")}))
            for each in summary.get("generations") or ()
            if each
        ],
        "problems": len(intake.marks),
        "shown": len(intake.kept),
        "rows": len(marks),
        "samples": samples,
        "short": sum(len(by_index) < samples for by_index in intake.marks.values()),
        "unscored": sum(mark.score is None for mark in marks),
        "errors": sum(mark.error for mark in marks),
        "cut": sum(mark.cut for mark in marks) / generated,
        "silent": sum(mark.silent for mark in marks) / generated,
        "tokens_in": intake.tokens_in,
    }


def _way_rank(name: str) -> int:
    """First, mean, majority, the re-rankers, oracle: the order the page shows ways of choosing in."""
    return {"first": 0, "mean": 1, "majority": 2, "oracle": 4}.get(name, 3)


def _subjects(intake: Intake) -> list[tuple[int, Figure]]:
    """How many problems each subject has, and its mean score; the weakest subject first."""
    means: dict[str, list[float]] = defaultdict(list)
    for example_id, subject in intake.subjects.items():
        scores = [mark.score for mark in intake.marks[example_id].values() if mark.score is not None]
        if scores:
            means[subject].append(sum(scores) / len(scores))
    figures = [(len(values), _mean(subject, values)) for subject, values in means.items()]
    return sorted(figures, key=lambda each: (each[1].value, each[1].name))


def _mean(name: str, values: Sequence[float]) -> Figure:
    """The mean of problems' scores with Wilson's interval, as wide as if every problem had been answered once."""
    n, mean = len(values), sum(values) / len(values)
    if not all(0 <= value <= 1 for value in values):
        return Figure(name, mean)
    middle, reach = mean + _Z_95**2 / (2 * n), _Z_95 * math.sqrt(mean * (1 - mean) / n + _Z_95**2 / (4 * n * n))
    low, high = ((middle + side * reach) / (1 + _Z_95**2 / n) for side in (-1, 1))
    return Figure(name, mean, max(low, 0.0), min(high, 1.0))

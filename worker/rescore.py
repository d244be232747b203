"""Scores answers that exist already, without a model: a file of rows in, one JSON document out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from jobs import spec, suites
from worker import tasks
from worker.failures import BadRecord, ConfigFailure
from worker.tasks import Generates, Reply, Task, choosing

EXIT_CONFIG = 3
"""What `main` returns after a failure document: the request or the file must change, trying again will not help."""

_Scores = tuple[float | None, ...]  # one per rule of the task, in the order of its RULES


@dataclass(frozen=True)
class Request:
    """What to score: a task's name, a file of JSON lines, and the fields that hold completion and target."""

    task: str
    path: str
    completion: str
    target: str
    allow: bool = False
    """Whether what the model wrote may be run, by a task that does so."""
    own: bool = False
    """Whether only rows of the task are scored, as their keys have it: the file holds those of several."""


@dataclass
class _Tally:
    """What the rows gave so far: small per row, since the texts are not kept."""

    rules: tuple[str, ...]
    scores: dict[int, _Scores] = field(default_factory=dict)
    disagreements: list[dict[str, Any]] = field(default_factory=list)
    seen: dict[_Scores, _Scores] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    """The key of each row that holds an error instead of a completion, and where it stands."""
    ignored_last_line: bool = False

    def add(self, index: int, verdict: tasks.Verdict) -> None:
        """Count a scored row; it disagrees when the rules that apply to it do not all give the same score."""
        scores = tuple(verdict.scores[rule] for rule in self.rules)
        self.scores[index] = self.seen.setdefault(scores, scores)  # a few distinct tuples serve all rows
        if len(set(scores) - {None}) > 1:
            self.disagreements.append(
                {"index": index, "answers": dict(verdict.answers), "scores": dict(verdict.scores)}
            )

    def add_failed(self, index: int, key: Any) -> None:
        """Count a row that holds an error instead of a completion: unscored by every rule."""
        self.scores[index] = (None,) * len(self.rules)
        if isinstance(key, str):
            self.failed[key] = index

    def replace(self, key: Any) -> None:
        """Forget the error row of a key when another row of that key comes."""
        index = self.failed.pop(key, None) if isinstance(key, str) else None
        if index is not None:
            del self.scores[index]


class UnknownTask(ConfigFailure):
    """No benchmark has that name: what was typed is wrong."""

    kind = "usage"


class NotAllowed(ConfigFailure):
    """Scoring would run programs that a model wrote, and nobody has said that this is wanted here."""

    kind = "consent"


def main(stdin: BinaryIO, stdout: BinaryIO) -> int:
    """Read the request (see `Request`), write what `gpu rescore --json` promises; returns the exit code.

    What cannot be scored gives `{"failed": {"kind", "message", "hint"}}` instead, and a code other than 0. Indexes
    count the file's rows from 0; messages count its lines from 1.
    """
    try:
        request = _request(stdin.read())
        task = _task(request.task)
        if request.task in tasks.RUNS_CODE and not request.allow:
            raise NotAllowed(*_question(request))
        tally = _scored(request, task)
    except ConfigFailure as failure:
        document = {"failed": {"kind": failure.kind, "message": failure.message, "hint": failure.hint}}
        stdout.write(json.dumps(document).encode() + b"\n")
        return EXIT_CONFIG
    for piece in _document(request, tally):
        stdout.write(piece.encode())
    return 0


def _request(data: bytes) -> Request:
    try:
        asked = json.loads(data)
        texts = {name: str(asked[name]) for name in ("task", "path", "completion", "target")}
        return Request(**texts, allow=asked.get("allow") is True, own=asked.get("own") is True)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigFailure(f"The request to rescore cannot be read: {error!r}.") from error


def _question(request: Request) -> tuple[str, str]:
    """What is asked before foreign programs are run here, and how to say yes."""
    from worker import sandbox

    held_by = sandbox.walls().described()
    return (
        f"To score {request.task}, every completion in {request.path} is run here. {held_by}",
        "Say yes: gpu rescore … -y",
    )


def _task(name: str) -> Task:
    try:
        task = tasks.get(name)
    except KeyError:
        raise UnknownTask(f"There is no task {name!r}: {spec.nearest(name, tasks.TASKS)}") from None
    if task.KIND == tasks.READS:
        raise ConfigFailure(
            f"Rows of {name} have a likelihood and no score: there is nothing to score again.",
            "Count its perplexities anew from the rows: gpu report RUN",
        )
    return task


def _verdict(request: Request, task: Task, number: int, row: dict[str, Any]) -> tasks.Verdict:
    """What the task's rules say of a row: of its completion, or of the likelihoods of its choices."""
    if task.KIND == tasks.CHOOSES:
        return _chosen(request, number, row)
    completion, target = (_text(request, number, row, name) for name in (request.completion, request.target))
    ended = row.get("finish_reason")
    return cast(Generates, task).score(Reply(completion, ended if isinstance(ended, str) else None), target)


def _chosen(request: Request, number: int, row: dict[str, Any]) -> tasks.Verdict:
    """The choice each rule takes, from the likelihoods and the choices that stand in the row."""
    logliks, choices, target = (row.get(name) for name in ("logliks", "choices", request.target))
    try:
        answers = choosing.answers([float(loglik) for loglik in logliks or ()], choices or ())
        scores = choosing.scores(answers, int(target))  # type: ignore[arg-type]  # None is a TypeError
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise BadRecord(
            f"{request.path}, line {number}: 'logliks' and 'choices' must be lists of numbers and of texts, equally "
            f"long, and {request.target!r} the number of the right choice.",
            "Rows of a run of this task have them; no others can be scored again by it.",
        ) from error
    return tasks.Verdict({rule: str(answer) for rule, answer in answers.items()}, dict(scores))


def _scored(request: Request, task: Task) -> _Tally:
    tally = _Tally(tuple(task.RULES))
    answered = "logliks" if task.KIND == tasks.CHOOSES else request.completion
    index = -1
    for number, line in _lines(request.path):
        row = _row(request.path, number, line)
        if row is None:
            tally.ignored_last_line = True
            continue
        index += 1
        if request.own and suites.task_of(row.get("key")) != request.task:
            continue
        tally.replace(row.get("key"))
        if row.get("error") is not None and row.get(answered) is None:
            tally.add_failed(index, row.get("key"))
        else:
            tally.add(index, _verdict(request, task, number, row))
    if not tally.scores:
        cut = " Its only line is not JSON." if tally.ignored_last_line else ""
        raise ConfigFailure(f"{request.path} has no rows to score.{cut}")
    return tally


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Every line that is not blank with its number, counted from 1. The file is read as bytes, line by line."""
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigFailure(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error


def _row(path: str, number: int, line: bytes) -> dict[str, Any] | None:
    """The row of a line; None for a last line that lacks its newline and does not parse: a write was cut short."""
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        if not line.endswith(b"\n"):
            return None
        raise BadRecord(
            f"{path}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8.",
            "Convert the file: iconv -f LATIN1 -t UTF-8 (if that is what it is in).",
        ) from error
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            return None
        raise BadRecord(f"{path}, line {number}: not JSON: {error}.", "The file holds one object a line.") from error
    if not isinstance(row, dict):
        raise BadRecord(f"{path}, line {number}: not an object with named fields.")
    return row


def _text(request: Request, number: int, row: dict[str, Any], name: str) -> str:
    """The text of a field; a number may stand for a target. Raises BadRecord naming the line."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    is_target = name == request.target
    if is_target and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if value is None:
        raise BadRecord(
            f"{request.path}, line {number}: no field {name!r}; it has: {', '.join(row) or 'nothing'}.",
            f"Name the field that holds the {'target' if is_target else 'completion'}: "
            f"--{'target' if is_target else 'completion'} FIELD.",
        )
    raise BadRecord(f"{request.path}, line {number}: the field {name!r} holds no text.")


def _document(request: Request, tally: _Tally) -> Iterator[str]:
    """The answer as JSON in pieces, so that the rows never stand in memory as text."""
    counts = {
        rule: {
            "correct": sum(each[place] == 1.0 for each in tally.scores.values()),
            "scored": sum(each[place] is not None for each in tally.scores.values()),
            "unscored": sum(each[place] is None for each in tally.scores.values()),
        }
        for place, rule in enumerate(tally.rules)
    }
    head = {
        "task": request.task,
        "n": len(tally.scores),
        "rules": counts,
        "ignored_last_line": tally.ignored_last_line,
        "not_installed": tasks.lacking(request.task),
        "disagreements": tally.disagreements,
    }
    yield json.dumps(head)[:-1] + ', "rows": ['
    written = {scores: json.dumps(dict(zip(tally.rules, scores, strict=True))) for scores in set(tally.scores.values())}
    for place, (index, scores) in enumerate(tally.scores.items()):
        yield f'{"," if place else ""}\n{{"index": {index}, "scores": {written[scores]}}}'
    yield "\n]}\n"

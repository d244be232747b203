"""HumanEval, functions to complete: a completion is right when the problem's own tests pass, run in the sandbox."""

from __future__ import annotations

import functools
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import spec
from worker import sandbox
from worker.failures import BadRecord
from worker.tasks import GENERATES, Example, Verdict
from worker.tasks.chats import chat
from worker.tasks.records import Ids, Record, read

NAME = "humaneval"
VERSION = "1"
KIND = GENERATES
DATASET = "openai/openai_humaneval"
SAMPLE = str(Path(__file__).with_name("humaneval.jsonl"))
SHOTS_SPLIT = "train"
COLUMNS: tuple[str, ...] = ()
OPTIONS: tuple[str, ...] = ()
RULES = ("passed", "continuation")
"""`continuation` is that of openai/human-eval: the reply goes on where the prompt ends, up to the first stop string.
`passed` is ours, for chat models as well: the code is taken from the reply's fenced block, where it has one."""
HEADLINE = "passed"
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What ends a continuation (Chen et al. 2021, section 2.1)."""

TIMEOUT_S = 3.0
"""That of openai/human-eval; where the reference solution is slow here, programs get more, see below."""
REFERENCE_FACTOR = 4.0
"""A program gets so many times what the reference solution takes here, as in evalplus."""
_REFERENCE_TIMEOUT_S = 60.0
_FIELDS = ("prompt", "entry_point", "test")
_HOLDS = "HumanEval rows hold 'prompt', 'entry_point', 'test' and, to set the time limit by, 'canonical_solution'."
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_OUTPUT_CHARACTERS = 300


class _Broken(Exception):
    """A problem whose own reference solution does not pass here: no completion of it can be judged."""


def examples(records: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Every record as an Example, in order; the target is its tests and reference solution as canonical JSON.

    Raises BadRecord naming the row and what it lacks.
    """
    return read(records, _HOLDS, _example)


def messages(example: Example, shots: Sequence[Example], *, instruction: str = "") -> list[dict[str, str]]:
    """The chat: each shot as a user and an assistant turn, then the beginning of the function alone.

    An `instruction` follows each on a new line; for a base model (chat_template=none) there should be none.
    """
    return chat(example, shots, instruction, lambda shot: f"```python\n{shot.problem}{shot.solution or ''}\n```")


def score(completion: str, target: str) -> Verdict:
    """Whether the tests pass with what each rule takes from a completion. The notes say what came of it.

    An error, and no score, where the sandbox fails or the problem's own reference solution does: that says nothing
    about the completion.
    """
    problem = _problem(target)
    where, code, program = _ours(problem, completion)
    continuation = problem["prompt"] + _until_stop(completion)
    answers = {"passed": code, "continuation": _until_stop(completion) or None}
    try:
        limit_s = _limit_s(target)
        outcome = _run(program, problem, limit_s)
        same = program == continuation
        other = outcome if same else _run(continuation, problem, limit_s)
    except (_Broken, sandbox.SandboxFailed) as failed:
        return Verdict(answers, dict.fromkeys(RULES), error=f"not scored: {failed}")
    notes = {"taken": where, **_told(outcome), "limit_s": limit_s}
    return Verdict(answers, {"passed": float(outcome.passed), "continuation": float(other.passed)}, notes=notes)


def taken(completion: str, entry_point: str) -> tuple[str, str]:
    """Where the code of a reply is, and that code: `fenced block`, `whole function`, or `continuation`.

    Of several blocks, the last that defines the function, else the first. A block that is never closed goes to the end.
    """
    defines = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    blocks: list[str] = _FENCED.findall(completion)
    if blocks:
        return "fenced block", next((block for block in reversed(blocks) if defines.search(block)), blocks[0])
    if defines.search(completion):
        return "whole function", completion
    return "continuation", _until_stop(completion)


def _ours(problem: Mapping[str, str], completion: str) -> tuple[str, str | None, str]:
    """Where the code was found, the code, and the program up to the tests.

    Code that defines the function follows the prompt, whose imports and helpers it may need, and takes the place of
    the beginning there; other code is its body.
    """
    where, code = taken(completion, problem["entry_point"])
    if where == "continuation":
        return where, code or None, problem["prompt"] + code
    if re.search(rf"^(?:async )?def {re.escape(problem['entry_point'])}\b", code, re.MULTILINE):
        return where, code, f"{problem['prompt']}\n    pass\n{code}"
    body = code if code[:1].isspace() else textwrap.indent(code, "    ")
    return where, code or None, problem["prompt"] + body


def _until_stop(completion: str) -> str:
    ends = [at for at in map(completion.find, STOP) if at >= 0]
    return completion[: min(ends)] if ends else completion


def _run(program: str, problem: Mapping[str, str], limit_s: float) -> sandbox.Outcome:
    return sandbox.run(f"{program}\n{problem['test']}\ncheck({problem['entry_point']})", limit_s)


def _told(outcome: sandbox.Outcome) -> dict[str, Any]:
    """What came of a program, for its row."""
    last = [] if outcome.passed else outcome.output.strip().splitlines()[-1:]
    said = {"said": last[0][:_OUTPUT_CHARACTERS]} if last else {}
    return {"ended": outcome.ended, "seconds": outcome.seconds, **said}


@functools.lru_cache(maxsize=4096)
def _limit_s(target: str) -> float:
    """How long a program of this problem may run here, by how long its reference solution does."""
    problem = _problem(target)
    if "canonical_solution" not in problem:
        return TIMEOUT_S
    outcome = _run(problem["prompt"] + problem["canonical_solution"], problem, _REFERENCE_TIMEOUT_S)
    if not outcome.passed:
        said = outcome.output.strip()[-_OUTPUT_CHARACTERS:]
        raise _Broken(
            f"the reference solution of {problem['entry_point']} fails here (ended by {outcome.ended}): {said}"
        )
    return max(TIMEOUT_S, round(REFERENCE_FACTOR * outcome.seconds, 3))


@functools.lru_cache(maxsize=64)
def _problem(target: str) -> dict[str, str]:
    """The problem a target holds; BadRecord where it holds none."""
    try:
        problem = json.loads(target)
        if all(isinstance(problem[name], str) for name in _FIELDS):
            return dict(problem)
    except (ValueError, KeyError, TypeError):
        pass
    raise BadRecord(
        f"the target {target[:60]!r} is no HumanEval problem: it must be a JSON object with {', '.join(_FIELDS)}",
        "Rows of a run of eval-humaneval have it.",
    )


def _example(record: Record, ids: Ids) -> Example:
    problem = {name: record.text(name) for name in _FIELDS}
    if not problem["entry_point"].isidentifier():
        raise BadRecord(f"row {record.row}: the field 'entry_point' must be the name of the function", _HOLDS)
    if f"def {problem['entry_point']}" not in problem["prompt"]:
        raise BadRecord(
            f"row {record.row}: the field 'prompt' does not begin the function {problem['entry_point']}", _HOLDS
        )
    solution = record.fields.get("canonical_solution")
    if solution is not None:
        problem["canonical_solution"] = record.text("canonical_solution")
    task_id = record.fields.get("task_id")
    if isinstance(task_id, str) and record.fields.get("id") is None:
        record = Record({**record.fields, "id": task_id.replace("/", "-")}, record.row, _HOLDS)
    return Example(
        id=ids.take(record, problem["prompt"]),
        problem=problem["prompt"],
        target=spec.canonical(problem).decode(),
        solution=problem.get("canonical_solution"),
    )

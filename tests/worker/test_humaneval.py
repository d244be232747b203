"""HumanEval: where the code of a reply is, what passes, and what is an error rather than a wrong answer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import data_folder
from worker import sandbox
from worker.failures import BadRecord
from worker.sandbox import SandboxFailed
from worker.tasks import humaneval

RECORDS = [json.loads(line) for line in Path(humaneval.SAMPLE).read_text().splitlines()]
EXAMPLES = {
    record["entry_point"]: example for record, example in zip(RECORDS, humaneval.examples(RECORDS), strict=True)
}
INITIALS = EXAMPLES["initials"]
BODY = str(INITIALS.solution)
WHOLE = "def initials(text):\n" + BODY


@pytest.mark.parametrize(
    ("reply", "where", "passed", "continuation"),
    [
        (BODY, "continuation", 1, 1),
        (BODY + "\n\ndef other():\n    broken(", "continuation", 1, 1),
        (f"Sure!\n```python\n{INITIALS.problem}{BODY}```\nIt joins letters.", "fenced block", 1, 0),
        (f"```\n{WHOLE}\n```", "fenced block", 1, 0),
        (f"```python\nprint(1)\n```\nthen\n```python\n{WHOLE}", "fenced block", 1, 0),
        (f"```python\n{BODY}```", "fenced block", 1, 0),
        (f"```python\n{BODY.strip()}\n```", "fenced block", 1, 0),
        (WHOLE, "whole function", 1, 1),
        ("    return 'gpu'\n", "continuation", 0, 0),
        ("    import sys; sys.exit(0)\n", "continuation", 0, 0),
        ("    import os; os._exit(0)\n", "continuation", 0, 0),
        ("", "continuation", 0, 0),
        ("I cannot do that.", "continuation", 0, 0),
    ],
)
def test_replies_of_every_form_are_run(reply: str, where: str, passed: int, continuation: int) -> None:
    """Code is found in each form of reply, said where, and right when the tests pass; the published rule beside it."""
    verdict = humaneval.score(reply, INITIALS.target)
    assert verdict.error is None
    assert verdict.scores == {"passed": passed, "continuation": continuation}
    assert verdict.notes["taken"] == where


def test_a_program_that_hangs_is_wrong_and_the_time_limit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not end within the limit is a wrong answer, and the row says what ended it and after how long."""
    monkeypatch.setattr(humaneval, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(humaneval, "REFERENCE_FACTOR", 0.0)
    humaneval._limit_s.cache_clear()
    verdict = humaneval.score("    while True: pass\n", INITIALS.target)
    humaneval._limit_s.cache_clear()
    assert verdict.scores["passed"] == 0.0
    assert verdict.notes["ended"] == "time"
    assert verdict.notes["limit_s"] == 0.5 <= verdict.notes["seconds"]


def test_the_limit_follows_the_reference_solution() -> None:
    """A problem whose own solution takes long here gives programs a multiple of that."""
    slow = {
        **RECORDS[0],
        "canonical_solution": "    import time; time.sleep(2 / 2)\n" + RECORDS[0]["canonical_solution"],
    }
    (example,) = humaneval.examples([slow])
    verdict = humaneval.score("    return 0\n", example.target)
    assert 4.0 <= verdict.notes["limit_s"] < 60.0


def test_a_problem_that_its_own_solution_fails_is_an_error() -> None:
    """Where the reference solution does not pass, the row has an error and no score."""
    (example,) = humaneval.examples([{**RECORDS[0], "canonical_solution": "    return None\n"}])
    verdict = humaneval.score(str(EXAMPLES["add_all"].solution), example.target)
    assert verdict.scores == {"passed": None, "continuation": None}
    assert "reference solution of add_all fails here" in str(verdict.error)


def test_a_sandbox_that_fails_is_an_error_and_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the walls cannot be built, nothing is scored, and the error says why."""
    humaneval._limit_s.cache_clear()

    def refuse(program: str, wall_s: float) -> sandbox.Outcome:
        raise SandboxFailed("no memory for a wall")

    monkeypatch.setattr(sandbox, "run", refuse)
    verdict = humaneval.score(BODY, INITIALS.target)
    assert verdict.scores == {"passed": None, "continuation": None}
    assert verdict.error == "not scored: no memory for a wall"


def test_a_sample_of_the_real_problems_passes() -> None:
    """Of every tenth published problem, the reference solution passes bare and fenced, and an empty body does not."""
    with gzip.open(data_folder("humaneval") / "HumanEval.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    examples = humaneval.examples(records)
    assert (len(examples), examples[0].id) == (164, "HumanEval-0")
    for record, example in [*zip(records, examples, strict=True)][::20]:
        assert humaneval.score(record["canonical_solution"], example.target).scores["continuation"] == 1.0
        fenced = f"```python\n{record['prompt']}{record['canonical_solution']}```"
        assert humaneval.score(fenced, example.target).scores["passed"] == 1.0
        assert humaneval.score("    return None\n", example.target).scores["passed"] == 0.0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt": None}, "'prompt'"),
        ({"test": 3}, "'test'"),
        ({"entry_point": "a b"}, "'entry_point'"),
        ({"entry_point": "other"}, "does not begin the function other"),
        ({"canonical_solution": 7}, "'canonical_solution'"),
    ],
)
def test_a_bad_record_is_named(changed: dict[str, object], words: str) -> None:
    """A record that cannot be used is refused by its row, counted from 1, and its field."""
    with pytest.raises(BadRecord) as failed:
        humaneval.examples([RECORDS[0], {**RECORDS[1], **changed}])
    assert "row 2" in failed.value.message
    assert words in failed.value.message


def test_a_target_that_is_no_problem_is_refused() -> None:
    """Scoring against a target that holds no tests is refused with what it must hold."""
    with pytest.raises(BadRecord, match="entry_point"):
        humaneval.score(BODY, "12")

"""MATH: what each rule finds and scores, the examples made of records, and grading that is ended in time."""

from __future__ import annotations

import json
import time

import pytest

from tests.conftest import data_folder
from worker import grading, tasks
from worker.failures import BadRecord, ConfigFailure
from worker.tasks import mathematics

needs_math_verify = pytest.mark.skipif(bool(tasks.lacking("math")), reason="math-verify is not installed")
CASES = (
    # the reference's answer, the completion, then 1 or 0 for math_verify and exact_match
    (r"\boxed{\frac{9}{7}}", r"So $\boxed{\dfrac{9}{7}}$.", 1, 1),
    (r"\boxed{\frac{9}{7}}", "Final Answer: The final answer is $\\frac97$. I hope it is correct.", 1, 1),
    (r"\boxed{5}", "$x=5$", 1, 1),
    (r"\boxed{1234}", r"\boxed{1,234}", 1, 1),
    (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$", 1, 0),
    (r"\boxed{10\%}", r"\boxed{10}", 0, 0),
    (r"\boxed{12}", "It is 12 in all.\n#### 12", 1, 1),
    (r"\boxed{\text{Evelyn}}", r"\boxed{Evelyn}", 1, 1),
    (r"\boxed{90^\circ}", "The answer is 90 degrees.", 1, 1),
    (r"\boxed{12}", "I do not know.", 0, 0),
    (r"\boxed{12}", "", 0, 0),
    (r"\boxed{12}", r"\boxed{13}", 0, 0),
    (r"\boxed{12}", r"\boxed{12", 0, 1),
    (r"\boxed{12}", "First $12$, then \\boxed{7}", 0, 0),
)


@needs_math_verify
@pytest.mark.parametrize(("target", "completion", "verified", "exact"), CASES)
def test_every_kind_of_answer_scores_as_the_table_says(target: str, completion: str, verified: int, exact: int) -> None:
    """Each kind of completion gets the score of both rules that is written beside it."""
    scores = mathematics.score(completion, target).scores
    assert (scores["math_verify"], scores["exact_match"]) == (verified, exact)


@needs_math_verify
def test_the_order_of_the_arguments_is_kept() -> None:
    """An interval fits an inequality as the gold answer; the other way round it does not."""
    inequality, interval = r"$\boxed{1 < x < 2}$", r"$\boxed{(1,2)}$"
    assert mathematics.judge([interval, inequality])[1] == 1.0
    assert mathematics.judge([inequality, interval])[1] == 0.0


@needs_math_verify
def test_all_answers_of_math_500_are_right_within_seconds() -> None:
    """Each of the 500 reference answers is right by both rules, and all are graded in a minute by one child."""
    rows = [json.loads(line) for line in (data_folder("math500") / "test.jsonl").read_text().splitlines()]
    examples = mathematics.examples(rows)
    assert (examples[0].id, examples[0].subject, examples[0].level) == ("test-precalculus-807", "Precalculus", "2")
    began = time.monotonic()
    for row, example in zip(rows[::5], examples[::5], strict=True):
        verdict = mathematics.score(f"So it is $\\boxed{{{row['answer']}}}$.", example.target)
        assert set(verdict.scores.values()) == {1.0}, (row["answer"], verdict)
    assert time.monotonic() - began < 60


@needs_math_verify
def test_a_reply_that_cannot_be_graded_in_time_is_wrong_and_the_next_is_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """When grading passes its limit, the child is killed, the reply is wrong, the notes say why, and all goes on."""
    assert mathematics.score("$1$", r"\boxed{1}").scores["math_verify"] == 1.0
    monkeypatch.setattr(mathematics, "TIMEOUT_S", 0.0001)
    verdict = mathematics.score("$" + "+".join(["x"] * 2000) + "$", r"\boxed{1}")
    assert verdict.scores["math_verify"] == 0.0
    assert "more than" in verdict.notes["math_verify"]
    assert not grading._grader("mathematics").is_there
    monkeypatch.undo()
    assert mathematics.score("$1$", r"\boxed{1}").scores["math_verify"] == 1.0


def test_without_the_package_the_other_rule_still_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where math-verify is not installed its rule gives null, and exact_match its score; a run says what to install."""
    monkeypatch.setitem(tasks.NEEDS, "math", {"no_such_module": "math-verify"})
    verdict = mathematics.score(r"\boxed{12}", r"\boxed{12}")
    assert (verdict.scores["math_verify"], verdict.scores["exact_match"]) == (None, 1.0)
    with pytest.raises(ConfigFailure, match="math-verify") as failed:
        tasks.require("math")
    assert "pip install 'math-verify'" in failed.value.hint


@needs_math_verify
def test_another_version_of_the_parser_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the parser below math-verify is not the reference's version, the rule is not applied, and that is said."""
    monkeypatch.setitem(tasks.VERSIONS, "math", {"antlr4-python3-runtime": "4.13."})
    assert tasks.lacking("math") == ["antlr4-python3-runtime==4.13.*"]
    assert mathematics.score(r"\boxed{12}", r"\boxed{12}").scores["math_verify"] is None


def test_subjects_and_levels_are_chosen() -> None:
    """Only the named subjects and levels are left; one that no problem has is refused by its name."""
    record = {"problem": "P", "solution": r"\boxed{1}", "type": "Algebra", "level": "Level 2"}
    records = [record, {**record, "problem": "Q", "level": "Level 3"}, {**record, "problem": "R", "type": "Geometry"}]
    assert [example.problem for example in mathematics.examples(records, levels="2")] == ["P", "R"]
    assert [example.problem for example in mathematics.examples(records, levels="2,3", subjects="Algebra")] == [
        "P",
        "Q",
    ]
    with pytest.raises(ConfigFailure, match="'Algebr': did you mean Algebra"):
        mathematics.examples(records, subjects="Algebr")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"solution": r"\boxed{1}"}, "'problem'"),
        ({"problem": "P"}, "'answer'"),
        ({"problem": "P", "solution": "no box"}, "no \\boxed"),
        ({"problem": "P", "answer": True}, "'answer'"),
        ({"problem": " ", "answer": "1"}, "'problem'"),
    ],
)
def test_a_bad_record_is_named(record: dict[str, object], words: str) -> None:
    """A record that cannot be used is refused by its row, counted from 1, and its field."""
    with pytest.raises(BadRecord) as failed:
        mathematics.examples([{"problem": "Q", "answer": 1}, record])
    assert "row 2" in failed.value.message
    assert words in failed.value.message


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}} and \boxed{3}", "3"),
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed 7$", "7"),
        (r"\fbox{7}", "7"),
        ("The answer is: 5.", "5"),
        (r"costs $\$5$", r"\$5"),
        ("two lines\nand no answer", None),
    ],
)
def test_the_answer_a_text_settles_on(text: str, answer: str | None) -> None:
    """The last box counts, else what is said to be the answer, else the last formula."""
    assert mathematics.extracted(text) == answer

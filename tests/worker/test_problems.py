"""Generated word problems: right, reproducible, and never trained on what they are tested with."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import problems
from worker.failures import ConfigFailure
from worker.problems import Problem
from worker.tasks import gsm8k

ROOT = Path(__file__).parent.parent.parent
EQUATION = re.compile(r"(\d+)([-+])(\d+)=(\d+)")
RESULTS = {
    "addition": lambda a, b: a + b,
    "subtraction": lambda a, b: a - b,
    "multiplication": lambda a, b: a * b,
    "two-step": lambda a, b, c: a + b - c,
    "comparison": lambda a, b: a + (a + b),
}
"""What each subject asks for, from the numbers in the question; worked out apart from the generator."""


def operands(problem: Problem) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", problem.question)))


def identity(problem: Problem) -> tuple[str, tuple[int, ...]]:
    """Subject and operands, an addition's in either order."""
    found = operands(problem)
    return problem.subject, tuple(sorted(found)) if problem.subject == "addition" else found


def trained(count: int, seed: int = 0) -> list[Problem]:
    return list(itertools.islice(problems.training(seed), count))


def everything() -> list[Problem]:
    return trained(4000) + problems.evaluation(1000)


def test_no_operands_of_a_test_problem_are_ever_trained() -> None:
    """Over three streams of 15,000 training problems and 3,000 test problems, no subject and operands are in both."""
    seen = {identity(problem) for seed in (0, 1, 2) for problem in trained(15_000, seed)}
    asked = {identity(problem) for seed in (0, 1, 2) for problem in problems.evaluation(1000, seed)}
    assert not seen & asked
    assert len(seen) > 3000
    assert len(asked) > 500


def test_one_tuple_in_five_is_for_the_test() -> None:
    """About 20 % of each subject's operands belong to the test split, and both splits have problems of every level."""
    pairs = list(itertools.product(range(2, 60), range(2, 60)))
    for subject in problems.subjects():
        share = sum(problems.split_of(subject, pair) == "test" for pair in pairs) / len(pairs)
        assert 0.17 < share < 0.23
    for made in (trained(2000), problems.evaluation()):
        assert {(p.subject, p.level) for p in made} == set(itertools.product(problems.subjects(), problems.LEVELS))


def test_swapped_additions_stay_together() -> None:
    """An addition and its mirror image are in the same split, since one gives the other away."""
    for first, second in itertools.combinations(range(2, 40), 2):
        assert problems.split_of("addition", (first, second)) == problems.split_of("addition", (second, first))


def test_the_numbers_of_a_question_are_its_operands_in_order() -> None:
    """The split can be told from a question's text: its numbers, in order, are what the split is decided by."""
    for problem in trained(3000):
        assert problems.split_of(problem.subject, operands(problem)) == "train"
    for problem in problems.evaluation():
        assert problems.split_of(problem.subject, operands(problem)) == "test"


def test_every_equation_is_right() -> None:
    """Each line of each solution is an equation that holds, and the last one's result is the answer."""
    for problem in everything():
        *lines, final = problem.solution.split("\n")
        assert lines
        for line in lines:
            left, sign, right, result = EQUATION.fullmatch(line).groups()  # type: ignore[union-attr]
            assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
        assert final == f"#### {problem.answer}"
        assert result == problem.answer


def test_every_answer_is_what_the_question_asks_for() -> None:
    """The answer, worked out anew from the numbers in the question, is the one given, and above zero."""
    for problem in everything():
        assert int(problem.answer) == RESULTS[problem.subject](*operands(problem)) > 0


def test_questions_are_plain_sentences() -> None:
    """No placeholder, no `1 apples`, and nobody is compared with themselves."""
    for problem in everything():
        assert re.fullmatch(r"[A-Z][A-Za-z0-9 ,.]+\?", problem.question)
        assert 1 not in operands(problem)
        if problem.subject == "comparison":
            assert problem.question.split()[0] != problem.question.split(". ")[1].split()[0]


def test_the_same_seed_gives_the_same_problems_in_another_process() -> None:
    """Streams and digest follow from the seed alone, not from Python's own salted hashes."""
    code = (
        "import itertools; from worker import problems as p;"
        "print(p.digest(), *(q.question for q in itertools.islice(p.training(7), 50)), sep='|')"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for salt in ("1", "2")
    }
    assert outputs == {"|".join([problems.digest(), *(problem.question for problem in trained(50, 7))])}


def test_another_seed_gives_other_problems() -> None:
    """Two seeds make two streams and two evaluations."""
    assert trained(50, 0) != trained(50, 1)
    assert problems.evaluation(50, 0) != problems.evaluation(50, 1)


@given(count=st.integers(0, 600))
def test_a_smaller_evaluation_is_the_start_of_a_bigger_one(count: int) -> None:
    """The first N problems of any evaluation are the evaluation of N, with subjects balanced to one problem."""
    found = problems.evaluation(count)
    assert found == problems.evaluation(600)[:count]
    times = Counter(problem.subject for problem in found)
    assert len(found) == count
    assert max(times[name] for name in problems.subjects()) - min(times[name] for name in problems.subjects()) <= 1


def test_no_question_is_asked_twice() -> None:
    """Even 3,000 test problems have no question twice."""
    assert len({problem.question for problem in problems.evaluation(3000)}) == 3000


def test_weak_subjects_are_weak_by_construction() -> None:
    """Comparisons are by far the rarest in training, and every subject is trained."""
    times = Counter(problem.subject for problem in trained(10_000))
    assert set(times) == set(problems.subjects())
    assert min(times, key=times.__getitem__) == "comparison"
    assert times["comparison"] * 4 < min(count for name, count in times.items() if name != "comparison")


@pytest.mark.parametrize("split", ["train", "test"])
def test_records_are_what_the_gsm8k_task_reads(split: str) -> None:
    """500 rows become 500 examples with the same ids, questions, subjects and gold answers."""
    rows = problems.records(split)
    examples = gsm8k.examples(rows)
    assert [(e.id, e.problem, e.subject) for e in examples] == [(r["id"], r["question"], r["subject"]) for r in rows]
    assert [e.target for e in examples] == [r["answer"].rpartition("#### ")[2] for r in rows]
    assert all(gsm8k.score(r["answer"], e.target).scores["strict"] == 1 for r, e in zip(rows, examples, strict=True))
    assert len(rows) == 500


def test_ids_come_from_the_question_and_are_unique_over_both_splits() -> None:
    """An id is the start of the question's SHA-256, and 1,000 rows have 1,000 ids."""
    rows = problems.records("test") + problems.records("train")
    assert all(row["id"] == hashlib.sha256(row["question"].encode()).hexdigest()[:12] for row in rows)
    assert len({row["id"] for row in rows}) == 1000


def test_records_belong_to_their_split() -> None:
    """Few-shot examples come from the training side, test rows from the other."""
    for split in ("train", "test"):
        for row in problems.records(split):
            numbers = tuple(map(int, re.findall(r"\d+", row["question"])))
            assert problems.split_of(row["subject"], numbers) == split


def test_another_split_is_refused_in_words() -> None:
    """A split that does not exist is a ConfigFailure that names the two there are."""
    with pytest.raises(ConfigFailure, match=r"split=validation: .* test and a train split"):
        problems.records("validation")


def test_the_digest_tells_test_sets_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed thing in the texts changes the digest; the digest is the same when asked again."""
    before = problems.digest()
    assert before == problems.digest()
    monkeypatch.setattr(problems, "_THINGS", ("plums", *problems._THINGS[1:]))
    assert problems.digest() != before

"""Generated arithmetic word problems with GSM8K-style solutions, split honestly; standard library only."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from worker.failures import ConfigFailure

LEVELS = (1, 2, 3)
TRAIN, TEST = "train", "test"
RECORDS = 500
"""Problems in each split as a dataset; the stream of training problems itself has no end."""

_TEST_SHARE = 0.2
_ID_DIGITS = 12
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
_THINGS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps")


@dataclass(frozen=True)
class Problem:
    """A question in words, its solution (one equation a line, then `#### answer`), its subject and level (1 to 3)."""

    subject: str
    level: int
    question: str
    solution: str
    answer: str


Operands = tuple[int, ...]
Step = tuple[int, str, int]
"""One equation: left operand, sign, right operand."""


@dataclass(frozen=True)
class _Subject:
    """How problems of a subject are made. Each wording names the operands in their order, and no other number."""

    weight: float
    """Share of the training problems; a subject with a small one stays weak."""
    draw: Callable[[Random, int], Operands]
    steps: Callable[..., list[Step]]
    wordings: tuple[str, ...]
    ordered: bool = True
    """Whether swapped operands are another problem; where not, a pair and its mirror image are on one side."""


def subjects() -> tuple[str, ...]:
    """The names of the subjects, in the order they take turns in an evaluation."""
    return tuple(_SUBJECTS)


def split_of(subject: str, operands: Operands) -> str:
    """`train` or `test`, by the SHA-256 of subject and operands: names, things and wording change nothing.

    One sum may still occur on both sides as a step of problems with other operands, as in any school book.
    """
    key = operands if _SUBJECTS[subject].ordered else tuple(sorted(operands))
    summed = hashlib.sha256(f"{subject} {' '.join(map(str, key))}".encode()).digest()
    return TEST if int.from_bytes(summed[:4], "big") < _TEST_SHARE * 2**32 else TRAIN


def training(seed: int) -> Iterator[Problem]:
    """Training problems without end, the same for the same seed; subjects by weight, levels evenly."""
    random = _random(TRAIN, seed)
    weights = [subject.weight for subject in _SUBJECTS.values()]
    while True:
        name = random.choices(subjects(), weights)[0]
        yield _problem(random, name, random.choice(LEVELS), TRAIN)


def evaluation(count: int = RECORDS, seed: int = 0) -> list[Problem]:
    """Test problems, no question twice: subjects take turns, each through its levels; a smaller count is a prefix."""
    randoms = {name: _random(TEST, seed, name) for name in subjects()}
    turns = itertools.cycle(itertools.product(LEVELS, subjects()))
    found: dict[str, Problem] = {}
    for level, name in itertools.islice(turns, count):
        problem = _problem(randoms[name], name, level, TEST)
        while problem.question in found:
            problem = _problem(randoms[name], name, level, TEST)
        found[problem.question] = problem
    return list(found.values())


def records(split: str) -> list[dict[str, Any]]:
    """The split (`test` or `train`) as GSM8K-style rows: `id`, `question`, `answer` (the solution), `subject`, `level`.

    Ids come from the question. Raises ConfigFailure for any other split.
    """
    if split == TEST:
        problems = evaluation()
    elif split == TRAIN:
        distinct = {problem.question: problem for problem in itertools.islice(training(0), 2 * RECORDS)}
        problems = list(distinct.values())[:RECORDS]
    else:
        raise ConfigFailure(f"split={split}: the generated problems have a {TEST} and a {TRAIN} split.")
    return [_record(problem) for problem in problems]


def quizzes(split: str) -> list[dict[str, Any]]:
    """The same problems with four choices, in the fields of every task that weighs choices or reads texts.

    `test` and `validation` are the test problems, any other split has training problems. Wrong choices are near the
    answer, and the right one's place is drawn from the question.
    """
    found = []
    for row in records(TEST if split in (TEST, "validation") else TRAIN):
        random = Random(row["id"])  # noqa: S311 -- a choice of numbers, no secret
        answer = int(row["answer"].rpartition("#### ")[2])
        others = random.sample([answer + step for step in (-10, -3, -2, -1, 1, 2, 3, 10)], 3)
        choices = random.sample([str(number) for number in (answer, *others)], 4)
        gold = choices.index(str(answer))
        found.append(
            {
                "id": row["id"],
                "question": row["question"],
                "query": f"Question: {row['question']}",
                "choices": choices,
                "answer": gold,
                "gold": gold,
                "subject": row["subject"],
                "text": f"{row['question']}\n{row['answer']}",
            }
        )
    return found


def digest() -> str:
    """What tells one version of the test split from another: the SHA-256 of its rows."""
    return hashlib.sha256(json.dumps(records(TEST), sort_keys=True).encode()).hexdigest()


def _record(problem: Problem) -> dict[str, Any]:
    return {
        "id": hashlib.sha256(problem.question.encode()).hexdigest()[:_ID_DIGITS],
        "question": problem.question,
        "answer": problem.solution,
        "subject": problem.subject,
        "level": problem.level,
    }


def _random(*key: object) -> Random:
    """Numbers that follow from the key alone: Random hashes a text with SHA-512, alike on every Python."""
    return Random(" ".join(map(str, key)))  # noqa: S311 -- for problems, not for secrets


def _problem(random: Random, name: str, level: int, split: str) -> Problem:
    """A new problem of the subject and level whose operands belong to the split."""
    subject = _SUBJECTS[name]
    operands = subject.draw(random, level)
    while split_of(name, operands) != split:
        operands = subject.draw(random, level)
    first, second = random.sample(_NAMES, 2)
    wording, things = random.choice(subject.wordings), random.choice(_THINGS)
    steps = subject.steps(*operands)
    answer = str(_value(steps[-1]))
    return Problem(
        subject=name,
        level=level,
        question=wording.format(*operands, name=first, other=second, things=things),
        solution="\n".join([*map(_equation, steps), f"#### {answer}"]),
        answer=answer,
    )


def _value(step: Step) -> int:
    left, sign, right = step
    return left + right if sign == "+" else left - right


def _equation(step: Step) -> str:
    left, sign, right = step
    return f"{left}{sign}{right}={_value(step)}"  # tight, as in GSM8K's calculator annotations: fewer tokens


# --- operands: one digit on level 1, up to 19 on level 2, up to 30 on level 3 ----------------------------------------


def _largest(level: int) -> int:
    return (9, 19, 30)[level - 1]


def _two_numbers(random: Random, level: int) -> Operands:
    return random.randint(2, _largest(level)), random.randint(2, _largest(level))


def _number_and_part(random: Random, level: int) -> Operands:
    whole = random.randint(4, _largest(level) + 5)
    return whole, random.randint(2, whole - 1)


def _two_numbers_and_part(random: Random, level: int) -> Operands:
    first, second = _two_numbers(random, level)
    return first, second, random.randint(2, min(first + second - 1, _largest(level)))


def _count_and_size(random: Random, level: int) -> Operands:
    return random.randint(2, level + 2), random.randint(2, _largest(level))


# --- solutions: the tens of a second operand first, then its ones ----------------------------------------------------


def _in_parts(left: int, sign: str, right: int) -> list[Step]:
    """`left sign right`, in two steps when the right operand has both tens and ones, so that each step is simple."""
    tens, ones = right - right % 10, right % 10
    if not tens or not ones:
        return [(left, sign, right)]
    first = (left, sign, tens)
    return [first, (_value(first), sign, ones)]


def _sum(first: int, second: int) -> list[Step]:
    return _in_parts(first, "+", second)


def _difference(whole: int, part: int) -> list[Step]:
    return _in_parts(whole, "-", part)


def _repeated_sum(count: int, size: int) -> list[Step]:
    return [step for times in range(1, count) for step in _sum(times * size, size)]


def _sum_then_difference(first: int, second: int, part: int) -> list[Step]:
    return _sum(first, second) + _difference(first + second, part)


def _both_together(first: int, more: int) -> list[Step]:
    return _sum(first, more) + _sum(first, first + more)


_SUBJECTS = {
    "addition": _Subject(
        weight=4,
        draw=_two_numbers,
        steps=_sum,
        wordings=(
            "{name} has {0} {things} and buys {1} more. How many {things} now?",
            "{name} finds {0} {things} and then {1} {things}. How many {things} in all?",
        ),
        ordered=False,
    ),
    "subtraction": _Subject(
        weight=4,
        draw=_number_and_part,
        steps=_difference,
        wordings=(
            "{name} has {0} {things} and gives away {1}. How many {things} are left?",
            "{name} had {0} {things} and lost {1}. How many {things} are left?",
        ),
    ),
    "multiplication": _Subject(
        weight=3,
        draw=_count_and_size,
        steps=_repeated_sum,
        wordings=(
            "{name} has {0} boxes of {1} {things} each. How many {things} in all?",
            "{name} buys {0} bags with {1} {things} each. How many {things} now?",
        ),
    ),
    "two-step": _Subject(
        weight=2.5,
        draw=_two_numbers_and_part,
        steps=_sum_then_difference,
        wordings=(
            "{name} has {0} {things}, buys {1} more and gives away {2}. How many {things} are left?",
            "{name} finds {0} {things} and then {1} more but loses {2}. How many {things} are left?",
        ),
    ),
    "comparison": _Subject(
        weight=0.5,
        draw=_two_numbers,
        steps=_both_together,
        wordings=("{name} has {0} {things}. {other} has {1} more than {name}. How many {things} in all?",),
    ),
}

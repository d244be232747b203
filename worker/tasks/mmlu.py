"""MMLU, 57 subjects of four lettered choices: the subject's description, its worked examples in order, the letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs import spec
from worker.failures import BadRecord, ConfigFailure
from worker.tasks import CHOOSES, Example, choosing
from worker.tasks.records import Ids, Record, read

NAME = "mmlu"
VERSION = "1"
KIND = CHOOSES
DATASET = "cais/mmlu"
SHOTS_SPLIT = "dev"
OPTIONS = ("subjects",)
RULES = choosing.RULES
HEADLINE = "acc"

COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
"""Of the published CSV files, which have no header."""

_LETTERS = ("A", "B", "C", "D")
_HOLDS = "MMLU rows hold 'question', 'choices' (or 'choice0' to 'choice3', or 'A' to 'D'), 'answer' and 'subject'."


def examples(records: Sequence[Mapping[str, Any]], *, subjects: str | None = None) -> list[Example]:
    """Every record of the named subjects (commas between them; None: of all) as an Example, in order.

    What is weighed is the letter alone. An id comes from subject, question and choices, unless the record has one.
    Raises BadRecord naming the row and what it lacks, ConfigFailure for a subject that no record has.
    """
    found = read(records, _HOLDS, _example)
    if subjects is None:
        return found
    known = {str(example.subject) for example in found}
    wanted = [name.strip() for name in subjects.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise ConfigFailure(
                f"subjects={subjects}: there is no subject {name!r}: {spec.nearest(name, known)}",
                "Names are separated by commas: --set subjects=anatomy,virology",
            )
    return [example for example in found if example.subject in wanted]


def context(example: Example, shots: Sequence[Example]) -> str:
    """The description of the subject, each shot with its letter, then the problem, to be answered by a letter."""
    subject = str(example.subject).replace("_", " ")
    return (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{choosing.context(example, shots)}"
    )


def _example(record: Record, ids: Ids) -> Example:
    question = record.text("question")
    choices = _choices(record)
    subject = record.text("subject")
    lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True)]
    return Example(
        id=ids.take(record, [subject, question, *choices]),
        problem="\n".join([question.strip(), *lines, "Answer:"]),
        target=str(_answer(record)),
        subject=subject,
        choices=_LETTERS,
    )


def _choices(record: Record) -> tuple[str, ...]:
    """The four choices in any of the forms this benchmark is published in."""
    if "choices" in record.fields:
        choices = record.get("choices")
    elif "A" in record.fields:
        choices = [record.get(letter) for letter in _LETTERS]
    else:
        choices = [record.get(name) for name in COLUMNS[1:5]]
    choices = [str(choice) for choice in choices] if isinstance(choices, (list, tuple)) else choices
    if not isinstance(choices, list) or len(choices) != len(_LETTERS):
        raise BadRecord(f"row {record.row}: an MMLU question has four choices", _HOLDS)
    return tuple(choices)


def _answer(record: Record) -> int:
    answer = record.get("answer")
    if isinstance(answer, str) and answer.strip() in _LETTERS:
        return _LETTERS.index(answer.strip())
    return record.number("answer", len(_LETTERS))

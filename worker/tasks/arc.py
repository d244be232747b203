"""ARC, grade-school science questions, the challenge set: the texts of the choices are weighed after the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from worker.failures import BadRecord
from worker.tasks import CHOOSES, Example, choosing
from worker.tasks.records import Ids, Record, read

NAME = "arc"
VERSION = "1"
KIND = CHOOSES
DATASET = "allenai/ai2_arc"
SHOTS_SPLIT = "train"
COLUMNS: tuple[str, ...] = ()
OPTIONS: tuple[str, ...] = ()
RULES = choosing.RULES
HEADLINE = "acc_norm"
context = choosing.context

_HOLDS = (
    "ARC rows hold 'question', 'choices' with 'text' and 'label', and 'answerKey'; or 'query', 'choices' and 'gold'."
)


def examples(records: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Every record, as published or as `query`, `choices` and `gold` (from 0), as an Example, in order.

    Raises BadRecord naming the row and what it lacks.
    """
    return read(records, _HOLDS, _example)


def _example(record: Record, ids: Ids) -> Example:
    if "query" in record.fields:
        problem = record.text("query")
        choices = record.texts("choices")
        target = record.number("gold", len(choices))
    else:
        problem = f"Question: {record.text('question')}"
        choices, target = _labelled(record)
    return Example(ids.take(record, [problem, *choices]), f"{problem}\nAnswer:", str(target), choices=choices)


def _labelled(record: Record) -> tuple[tuple[str, ...], int]:
    """The texts of the choices, and the place of the one whose label, a letter or a digit, is the key."""
    given = record.get("choices")
    if not isinstance(given, Mapping) or not isinstance(given.get("label"), (list, tuple)):
        raise BadRecord(f"row {record.row}: the field 'choices' must hold 'text' and 'label'", _HOLDS)
    choices = record.checked("choices", given.get("text"))
    labels, key = [str(label) for label in given["label"]], str(record.get("answerKey"))
    if len(labels) != len(choices) or key not in labels:
        raise BadRecord(f"row {record.row}: the answerKey {key!r} is none of the labels {', '.join(labels)}", _HOLDS)
    return choices, labels.index(key)

"""HellaSwag, how a scene goes on: whole endings are weighed after the scene, both cleaned as published."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from worker.failures import BadRecord
from worker.tasks import CHOOSES, Example, choosing
from worker.tasks.records import Ids, Record, read

NAME = "hellaswag"
VERSION = "1"
KIND = CHOOSES
DATASET = "Rowan/hellaswag"
SHOTS_SPLIT = "train"
COLUMNS: tuple[str, ...] = ()
OPTIONS: tuple[str, ...] = ()
RULES = choosing.RULES
HEADLINE = "acc_norm"
context = choosing.context

_HOLDS = (
    "HellaSwag rows hold 'activity_label', 'ctx_a', 'ctx_b', 'endings' and 'label'; or 'query', 'choices' and 'gold'."
)
_BRACKETED = re.compile(r"\[.*?\]")


def examples(records: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Every record, as published or as `query`, `choices` and `gold` (from 0), as an Example, in order.

    Raises BadRecord naming the row and what it lacks; the published test split has no labels.
    """
    return read(records, _HOLDS, _example)


def cleaned(text: str) -> str:
    """The text without what WikiHow left in it: lm_eval/tasks/hellaswag/utils.py of 0.4.13, step by step."""
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETED.sub("", text).replace("  ", " ")


def _example(record: Record, ids: Ids) -> Example:
    if "query" in record.fields:
        problem, endings, gold = record.text("query"), record.texts("choices"), "gold"
    else:
        scene = f"{record.text('ctx_a', empty=True)} {record.text('ctx_b', empty=True).capitalize()}"
        problem = cleaned(f"{record.text('activity_label')}: {scene}")
        endings, gold = tuple(map(cleaned, record.texts("endings"))), "label"
    if not all(endings):
        raise BadRecord(f"row {record.row}: an ending is empty once it is cleaned", _HOLDS)
    if record.fields.get(gold) == "":
        raise BadRecord(f"row {record.row} has no label: this is the published test split", "--set split=validation")
    target = record.number(gold, len(endings))
    return Example(ids.take(record, [problem, *endings]), problem, str(target), choices=endings)

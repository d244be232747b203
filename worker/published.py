"""Records of a benchmark with the fields of its published dataset, whatever form they were read in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LETTERS = ("A", "B", "C", "D")
Record = Mapping[str, Any]


def arc(record: Record) -> dict[str, Any]:
    """`question`, `choices` with `text` and `label`, `answerKey`."""
    if "query" not in record:
        return {"question": record["question"], "choices": record["choices"], "answerKey": str(record["answerKey"])}
    labels = [str(number) for number in range(1, len(record["choices"]) + 1)]
    question = str(record["query"]).removeprefix("Question: ")
    choices = {"text": list(record["choices"]), "label": labels}
    return {"question": question, "choices": choices, "answerKey": labels[int(record["gold"])]}


def hellaswag(record: Record) -> dict[str, Any]:
    """`activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`; cleaned ones keep `query` and `choices`."""
    if "query" in record:
        return {"query": record["query"], "choices": list(record["choices"]), "label": str(record["gold"])}
    return {name: record[name] for name in ("activity_label", "ctx_a", "ctx_b", "endings", "label")}


def mmlu(record: Record) -> dict[str, Any]:
    """`question`, `choices`, `answer` as a number, `subject`."""
    if "choices" in record:
        choices = record["choices"]
    else:
        names = _LETTERS if "A" in record else [f"choice{number}" for number in range(len(_LETTERS))]
        choices = [record[name] for name in names]
    answer = str(record["answer"]).strip()
    number = _LETTERS.index(answer) if answer in _LETTERS else int(answer)
    choices = [str(choice) for choice in choices]
    return {"question": record["question"], "choices": choices, "answer": number, "subject": record["subject"]}

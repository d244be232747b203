"""The story of a verification: the rows of a run beside what lm-evaluation-harness makes of the same records."""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jobs import durable, rows, rundir
from worker import agreement, harness, harnessed, models, plan, published, worked
from worker.agreement import Compared
from worker.asking import Item
from worker.failures import ConfigFailure, WorkerFailure
from worker.harness import HarnessTask
from worker.plan import Prepared

_NO_SPLITS = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None}
_RULES = {"arc": ("acc", "acc_norm"), "hellaswag": ("acc", "acc_norm"), "mmlu": ("acc",)}
_FILTERS = {"strict-match": "strict", "flexible-extract": "flexible"}
"""The harness's filters of GSM8K, and what our rules are called that are the same."""
_BATCH = 8


@dataclass(frozen=True)
class Side:
    """One task of the harness, and our items that it is over, in the order of its file."""

    task: HarnessTask
    items: list[Item]


def main(folder: str, python: str, out: BinaryIO) -> int:
    """Compare the run in `folder`, whose rows are all there, with the harness that `python` imports: a JSON line."""
    try:
        answer = verify(rundir.Run(Path(folder)), python)
    except WorkerFailure as failure:
        answer = {"failed": {"message": failure.message, "hint": failure.hint}}
    out.write(json.dumps(answer).encode() + b"\n")
    return 0


def verify(run: rundir.Run, python: str) -> dict[str, Any]:
    """The agreement of a run with the harness; raises ConfigFailure where the two cannot be asked the same."""
    job = durable.load_json(run.job)
    if job is None:
        raise ConfigFailure(f"{run.folder} is not there any more.", "Make another run: gpu verify --task TASK")
    prepared, *others = plan.prepare(job, run, lambda _: None)
    if others:
        raise ConfigFailure("A run of several parts is not verified as one.", f"gpu verify --task {prepared.task.NAME}")
    _refuse_what_differs(prepared)
    made = {row["key"]: row for row in rows.read(run.row_files())}
    if missing := [item for item in prepared.items if item.key not in made]:
        raise ConfigFailure(f"{len(missing)} rows of the run are missing.", f"gpu resume {job['run_id']}")
    with tempfile.TemporaryDirectory() as scratch:
        sides = list(_SIDES[prepared.task.NAME](prepared, Path(scratch)))
        shots = 0 if prepared.asked.sampling else int(prepared.params.get("shots") or 0)
        found = harness.evaluate(python, Path(scratch), _model(prepared), [side.task for side in sides], shots)
    compared = [each for side in sides for each in _compared(prepared, side, found["items"][side.task.name], made)]
    return {"task": prepared.task.NAME, "harness": harnessed.VERSION, **agreement.document(compared)}


def _refuse_what_differs(prepared: Prepared) -> None:
    """Raise ConfigFailure for settings under which the two would not be asked the same."""
    params, sampling = prepared.params, prepared.asked.sampling
    if prepared.task.NAME not in _SIDES:
        raise ConfigFailure(f"{prepared.task.NAME} cannot be verified.", f"These can: {', '.join(_SIDES)}.")
    if prepared.engine == "openai":
        raise ConfigFailure("engine=openai cannot be verified: the harness loads the model itself.", "--set engine=hf")
    if sampling and (sampling.temperature > 0 or params["samples"] > 1):
        raise ConfigFailure("Only greedy completions can be compared.", "--set temperature=0 --set samples=1")
    if not sampling and not prepared.renderer.plain:
        raise ConfigFailure("Choices are compared without a chat template.", "--set chat_template=none")


def _model(prepared: Prepared) -> dict[str, Any]:
    """What the harness's model class is made with, so that it loads what we load."""
    request, size = prepared.request, prepared.params.get("batch_size")
    found = {
        "pretrained": request.model,
        "revision": request.revision or "main",
        "dtype": models.dtype_name(request),
        "device": str(models.choose_device(request.device)),
        "batch_size": size if isinstance(size, int) else _BATCH,
        "trust_remote_code": request.trust_remote_code,
    }
    if request.adapter:
        found["peft"] = request.adapter
    if prepared.asked.max_length:
        found["max_length"] = prepared.asked.max_length
    return found


def _records(prepared: Prepared) -> Callable[[Item], Mapping[str, Any]]:
    """The record that each item was made of."""
    _, records = worked.examples(prepared.params, prepared.task)
    every = prepared.task.examples(records.rows)
    by_id = {example.id: record for example, record in zip(every, records.rows, strict=True)}
    return lambda item: by_id[item.example.id]


def _gsm8k(prepared: Prepared, scratch: Path) -> list[Side]:
    """The prompts as we send them, and the harness's own end of a completion, filters and metric."""
    sampling = prepared.asked.sampling
    assert sampling is not None
    docs = [{"asked": _text(prepared, item), "answer": f"#### {item.example.target}"} for item in prepared.items]
    until = {"until": list(sampling.stop), "do_sample": False, "max_gen_toks": sampling.max_new_tokens}
    settings = {**_NO_SPLITS, "doc_to_text": "asked", "generation_kwargs": until}
    file = harness.write(scratch / "gsm8k.jsonl", docs)
    return [Side(HarnessTask("gsm8k_here", "gsm8k/gsm8k.yaml", {"test": file}, settings), prepared.items)]


def _text(prepared: Prepared, item: Item) -> str:
    asked = item.asked
    return str(asked["prompt"] if "prompt" in asked else prepared.renderer.text(asked["messages"]))


def _arc(prepared: Prepared, scratch: Path) -> list[Side]:
    return [_choosing(prepared, scratch, "arc/arc_challenge.yaml", published.arc)]


def _hellaswag(prepared: Prepared, scratch: Path) -> list[Side]:
    side = _choosing(prepared, scratch, "hellaswag/hellaswag.yaml", published.hellaswag)
    record = _records(prepared)(side.items[0])
    if "query" in record:  # cleaned already
        side.task.settings.update(process_docs=None)
    return [side]


def _choosing(
    prepared: Prepared, scratch: Path, include: str, form: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> Side:
    """All items as one task; worked examples are the first of their split, as ours are."""
    name, record = prepared.task.NAME, _records(prepared)
    files = {"test": harness.write(scratch / f"{name}.jsonl", [form(record(item)) for item in prepared.items])}
    settings: dict[str, Any] = dict(_NO_SPLITS)
    if shots := worked.shot_records(prepared.params, prepared.task):
        files["shots"] = harness.write(scratch / f"{name}-shots.jsonl", map(form, shots.rows))
        settings |= {"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}}
    return Side(HarnessTask(f"{name}_here", include, files, settings), prepared.items)


def _mmlu(prepared: Prepared, scratch: Path) -> list[Side]:
    """A task for each subject, described as it is there."""
    record, by_subject = _records(prepared), defaultdict[str, list[Item]](list)
    for item in prepared.items:
        by_subject[str(item.example.subject)].append(item)
    shots = worked.shot_records(prepared.params, prepared.task)
    return [
        _subject(
            scratch, number, items, ([published.mmlu(record(item)) for item in items], shots.rows if shots else [])
        )
        for number, items in enumerate(by_subject.values())
    ]


def _subject(
    scratch: Path, number: int, items: list[Item], docs: tuple[list[dict[str, Any]], Sequence[Mapping[str, Any]]]
) -> Side:
    subject = str(items[0].example.subject)
    worked_examples = [published.mmlu(record) for record in docs[1] if str(record.get("subject")) == subject]
    files = {"test": harness.write(scratch / f"mmlu-{number}.jsonl", docs[0])}
    if worked_examples:
        files["dev"] = harness.write(scratch / f"mmlu-{number}-dev.jsonl", worked_examples)
    words = subject.replace("_", " ")
    settings = {
        "description": f"The following are multiple choice questions (with answers) about {words}.\n\n",
        "fewshot_split": "dev" if worked_examples else None,
    }
    return Side(HarnessTask(f"mmlu_here_{number}", "mmlu/default/_default_template_yaml", files, settings), items)


_SIDES: dict[str, Callable[[Prepared, Path], list[Side]]] = {
    "gsm8k": _gsm8k,
    "arc": _arc,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
}


def _compared(
    prepared: Prepared, side: Side, found: Sequence[dict[str, Any]], made: Mapping[str, rows.Row]
) -> list[Compared]:
    """Our rows beside the harness's items of one of its tasks."""
    if prepared.asked.sampling:
        by_filter = {name: [item for item in found if item["filter"] == name] for name in _FILTERS}
        return [
            agreement.generated(
                made[item.key],
                {name: each[place] for name, each in by_filter.items()},
                _FILTERS,
                _text(prepared, item),
            )
            for place, item in enumerate(side.items)
        ]
    exact = models.dtype_name(prepared.request) in ("float32", "float64")
    most = agreement.LOGLIK_MOST if exact else math.inf
    rules = _RULES[prepared.task.NAME]
    return [
        agreement.chosen(made[item.key], theirs, rules, most) for item, theirs in zip(side.items, found, strict=True)
    ]

"""The examples of a task and the worked examples shown before them, from wherever a job says they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jobs import spec
from worker import builtin, sources
from worker.failures import BadRecord, ConfigFailure
from worker.tasks import CHOOSES, GENERATES, Example, Generates, Task


@dataclass(frozen=True)
class Shots:
    """Worked examples, fixed: the first of their split; of a task that chooses, the first of the example's subject."""

    pool: list[Example]
    count: int
    by_subject: bool

    def of(self, example: Example) -> list[Example]:
        """Those that an example is shown. ConfigFailure when its subject has too few."""
        suited = [shot for shot in self.pool if not self.by_subject or shot.subject == example.subject][: self.count]
        if self.by_subject and len(suited) < self.count:
            of_it = "" if example.subject is None else f" of {example.subject}"
            raise ConfigFailure(
                f"There are {len(suited)} worked examples{of_it}, and shots={self.count} asks for more.",
                f"--set shots={len(suited)}",
            )
        return suited

    def digest(self, examples: Sequence[Example]) -> str | None:
        """What tells one set of worked examples from another; None without any."""
        if not self.count:
            return None
        by_subject = {example.subject: example for example in examples} if self.by_subject else {None: examples[0]}
        shown = [shot for example in by_subject.values() for shot in self.of(example)]
        said = [(shot.problem, shot.choices[int(shot.target)] if shot.choices else shot.solution) for shot in shown]
        return spec.digest(said)


def examples(params: dict[str, Any], task: Task) -> tuple[list[Example], sources.Records]:
    """Every example of the split, or a sample, and the records they were made of; raises ConfigFailure."""
    records = sources.load(_source(params, task, params["split"]))
    found = _examples(task, records, params)
    _refuse_twins(found, records.name)
    return drawn(found, params.get("sample")), records


def drawn(found: list[Example], count: int | None) -> list[Example]:
    """So many of the examples, in their order: those whose ids have the lowest hashes, so that everybody draws alike.

    A file may be sorted by subject, so that its first examples stand for nothing but themselves.
    """
    if count is None:
        return found
    taken = lowest([example.id for example in found], count)
    return [example for example in found if example.id in taken]


def lowest(names: Iterable[str], count: int) -> set[str]:
    """So many of these names, those with the lowest hashes."""
    return set(sorted(names, key=_rank)[:count])


def _rank(example_id: str) -> bytes:
    return hashlib.sha256(example_id.encode()).digest()


def shots(params: dict[str, Any], task: Task) -> Shots:
    """The worked examples a job asks for; raises ConfigFailure when there is no telling where they are."""
    records = shot_records(params, task)
    pool = _examples(task, records, params) if records else []
    return Shots(pool, params.get("shots") or 0, task.KIND == CHOOSES)


def shot_records(params: dict[str, Any], task: Task) -> sources.Records | None:
    """The records that worked examples come from, None where none are asked for; raises ConfigFailure."""
    count = params.get("shots") or 0
    if not count:
        return None
    if params.get("shots_dataset"):
        return sources.load(sources.Source(params["shots_dataset"], task.SHOTS_SPLIT, columns=task.COLUMNS))
    if sources.is_path(params["dataset"]) and not sources.has_split(params["dataset"], task.SHOTS_SPLIT):
        raise ConfigFailure(
            f"shots={count} needs worked examples, and {params['dataset']} has no split {task.SHOTS_SPLIT}.",
            f"Say where they are: --set shots_dataset={task.SHOTS_SPLIT}.jsonl, or do without: --set shots=0",
        )
    return sources.load(_source(params, task, task.SHOTS_SPLIT))


def _source(params: dict[str, Any], task: Task, split: str) -> sources.Source:
    """Where examples come from; the built-in model is asked the problems that it was made for."""
    dataset = params["dataset"]
    if dataset == "auto":
        sample = cast(Generates, task).SAMPLE if task.KIND == GENERATES else sources.GENERATED
        dataset = sample if params["model"] == builtin.NAME else task.DATASET
    return sources.Source(dataset, split, columns=task.COLUMNS, with_choices=task.KIND != GENERATES)


def _examples(task: Task, records: sources.Records, params: dict[str, Any]) -> list[Example]:
    try:
        return task.examples(records.rows, **{name: params[name] for name in task.OPTIONS})
    except BadRecord as bad:
        raise BadRecord(f"{records.name}, {bad.message}", bad.hint) from None


def _refuse_twins(found: Sequence[Example], name: str) -> None:
    """Ids are keys: two examples under one would be one row."""
    seen: set[str] = set()
    for example in found:
        if example.id in seen:
            raise ConfigFailure(
                f"{name} has two rows with the id {example.id!r}.", "Make the ids unique, or leave them out."
            )
        seen.add(example.id)

"""What every benchmark module provides: examples, what is asked of the model, and scores; pure but for nothing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

TASKS = ("gsm8k", "mmlu", "arc", "hellaswag", "perplexity")
"""Names of the benchmarks; each is the module of that name in this package."""

GENERATES, CHOOSES, READS = "generates", "chooses", "reads"
"""What a model does in a task: it writes a completion, it weighs given choices, or it reads a text."""


@dataclass(frozen=True)
class Example:
    """One item of a benchmark: its id, the problem as asked, the gold answer, and the group it is counted under."""

    id: str
    problem: str
    target: str
    subject: str | None = None
    solution: str | None = None
    """The reference solution in the form a model is expected to write, used for fixed few-shot prompts."""
    choices: tuple[str, ...] = ()
    """Of a task that chooses, what is weighed; `target` is the number of the right one, from 0."""


@dataclass(frozen=True)
class Verdict:
    """What every rule of a task found in one completion, and the score it gives (0.0 to 1.0; None: not scorable)."""

    answers: Mapping[str, str | None]
    scores: Mapping[str, float | None]


class Task(Protocol):
    """A benchmark module. Everything here is pure: the same input gives the same output on every machine."""

    NAME: str
    VERSION: str
    """Raised whenever prompts or scores of the task change; part of the fingerprint."""
    KIND: str
    DATASET: str
    """The Hub dataset that `dataset=auto` means for a real model."""
    SHOTS_SPLIT: str
    """The split of the dataset that worked examples come from."""
    COLUMNS: tuple[str, ...]
    """Names for the columns of its files where those have no header."""
    OPTIONS: tuple[str, ...]
    """Parameters of the job that `examples` takes besides the records; they are part of the fingerprint."""
    RULES: tuple[str, ...]
    HEADLINE: str
    """The rule whose answer and score become the row's `answer` and `score`; empty for a task that reads."""

    def examples(self, records: Sequence[Mapping[str, Any]], **options: Any) -> list[Example]:
        """Every record as an Example, in order; raises BadRecord naming the row and what it lacks."""
        ...


class Generates(Task, Protocol):
    """A task whose completions are scored."""

    def messages(self, example: Example, shots: Sequence[Example], *, instruction: str = "") -> list[dict[str, str]]:
        """The chat sent for an example, after the fixed shots: a list of `{role, content}`.

        An `instruction` is appended to every problem after a newline; without one the problem stands alone.
        """
        ...

    def score(self, completion: str, target: str) -> Verdict:
        """What each rule finds in a completion and how it scores against the target."""
        ...


class Chooses(Task, Protocol):
    """A task whose choices are weighed by how likely the model finds each after the context (see `choosing.py`)."""

    def context(self, example: Example, shots: Sequence[Example]) -> str:
        """What stands before each choice and the space that leads to it: the fixed shots, then the problem."""
        ...


class Reads(Task, Protocol):
    """A task that tells how well the model predicts a text: the example's `problem`.

    Its words and bytes are counted in `solution` where there is one: the text before it was made fit for reading.
    """


def get(name: str) -> Task:
    """The benchmark of that name; KeyError when there is none."""
    if name not in TASKS:
        raise KeyError(name)
    return cast(Task, importlib.import_module(f"worker.tasks.{name}"))

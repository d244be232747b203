"""What every benchmark module provides: examples, what is asked of the model, and scores; pure but for nothing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from worker.failures import ConfigFailure

TASKS = ("gsm8k", "mmlu", "arc", "hellaswag", "perplexity", "math", "humaneval", "generation", "prompts")
"""Names of the benchmarks; each is the module of that name in this package, or of the name below."""
_MODULES = {"math": "mathematics"}  # no module of ours bears a name of the standard library

NEEDS = {"math": {"math_verify": "math-verify[antlr4-11-0]"}, "prompts": {"jsonschema": "jsonschema"}}
"""What the rules of a task import beyond the standard library, and what to install for it."""
VERSIONS = {"math": {"antlr4-python3-runtime": "4.11."}}
"""Versions without which a rule is another one: under 4.13 of this, 10 is 10 %, and under the reference's it is not."""
RUNS_CODE = ("humaneval",)
"""Tasks that run what the model wrote: scoring again asks whether that is wanted on this computer."""

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
    level: str | None = None
    """How hard it is, where the dataset says so."""
    chat: tuple[Mapping[str, str], ...] = ()
    """The messages to send, where the dataset has more than one for an example."""
    choices: tuple[str, ...] = ()
    """Of a task that chooses, what is weighed; `target` is the number of the right one, from 0."""


@dataclass(frozen=True)
class Verdict:
    """What every rule of a task found in one completion, and the score it gives (0.0 to 1.0; None: not scorable)."""

    answers: Mapping[str, str | None]
    scores: Mapping[str, float | None]
    error: str | None = None
    """Why nothing could be scored, through no fault of the completion."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else there is to tell of how it was scored."""


class Reply(str):
    """The text of a completion, which also says why it ended: `stop`, `length`, or None where nobody knows."""

    __slots__ = ("finish_reason",)
    finish_reason: str | None

    def __new__(cls, text: str, finish_reason: str | None = None) -> Reply:
        """The text, and why it ended."""
        reply = super().__new__(cls, text)
        reply.finish_reason = finish_reason
        return reply


class Task(Protocol):
    """A benchmark module. Everything here is pure: the same input gives the same output on every machine."""

    NAME: str
    VERSION: str
    """Raised whenever prompts or scores of the task change; part of the fingerprint."""
    KIND: str
    DATASET: str
    """The Hub dataset that `dataset=auto` means for a real model; a path where the problems are our own."""
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

    SAMPLE: str
    """What `dataset=auto` means for the built-in model: `generated`, or a file of ours."""
    STOP: tuple[str, ...]
    """What ends a completion where no chat template is used."""

    def messages(self, example: Example, shots: Sequence[Example], *, instruction: str = "") -> list[dict[str, str]]:
        """The chat sent for an example, after the fixed shots: a list of `{role, content}`.

        An `instruction` is appended to every problem after a newline; without one the problem stands alone.
        """
        ...

    def score(self, completion: Reply, target: str) -> Verdict:
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
    return cast(Task, importlib.import_module(f"worker.tasks.{_MODULES.get(name, name)}"))


def lacking(name: str) -> list[str]:
    """What to install so that every rule of a task can be applied here; empty where all is there."""
    missing = [package for module, package in NEEDS.get(name, {}).items() if not _is_found(module)]
    versions = {} if missing else VERSIONS.get(name, {})
    return missing + [f"{package}=={start}*" for package, start in versions.items() if not _has(package, start)]


@functools.cache  # asked for every row that is scored
def _is_found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _has(package: str, start: str) -> bool:
    """Whether a package is installed in a version that begins like this."""
    import importlib.metadata

    try:
        return importlib.metadata.version(package).startswith(start)
    except importlib.metadata.PackageNotFoundError:
        return False


def require(name: str) -> None:
    """Raise ConfigFailure where a rule of the task could not be applied."""
    if missing := lacking(name):
        words = " ".join(f"'{package}'" for package in missing)
        raise ConfigFailure(
            f"The rules of {name} need {', '.join(missing)}, which {sys.executable} does not have.",
            f"Install it there: {sys.executable} -m pip install {words}",
        )

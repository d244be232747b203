"""What an evaluation will ask, worked out before any weights load: examples, prompts, seeds and findings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs import rundir, shares, suites
from worker import builtin, engines, models, prompts, tasks, unrendered, wanted, worked
from worker.asking import Item, Means, Questions, questions
from worker.failures import ConfigFailure
from worker.tasks import GENERATES, Example, Task

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Everything settled before the first token, of one evaluation: a job, or a part of one that has several."""

    job: dict[str, Any]
    task: Task
    engine: str
    """`hf`, `vllm` or `openai`."""
    request: models.ModelRequest
    renderer: prompts.Renderer
    asked: Questions
    items: list[Item]
    """Those of `asked` that are made here."""
    dataset_digest: str
    shots_digest: str | None
    example_ids: list[str]
    """Of all its examples, in their order, as the run lists them, whoever makes them; `items` are those made here."""
    is_again: bool = False
    """Its items were asked before: this time to learn how many answers change."""

    @property
    def params(self) -> dict[str, Any]:
        """Its parameters."""
        return dict(self.job["params"])

    @property
    def title(self) -> str:
        """What a line about it begins with: nothing, where there is no other."""
        task = f"{self.task.NAME}: " if "part_takes" in self.job else ""
        return f"{task}once more, " if self.is_again else task

    def without(self, done: dict[str, bool]) -> Prepared:
        """The same with those items only that have no good row yet."""
        return replace(self, items=[item for item in self.items if not done.get(item.key)])


@dataclass(frozen=True)
class _Found:
    """A part whose dataset was read: its examples, and those that are shown before them."""

    job: dict[str, Any]
    task: Task
    examples: list[Example]
    digest: str
    shots: worked.Shots

    def names(self) -> list[str]:
        """What the examples are called in the list of all examples of the run."""
        return [shares.listed(self.job, example.id) for example in self.examples]


def prepare(job: dict[str, Any], run: rundir.Run, say: Say) -> list[Prepared]:
    """Read the datasets, render and check every prompt. Trains the built-in model when it is asked for and not there.

    Raises ConfigFailure for what cannot be read or rendered; what is merely suspicious stands among the findings.
    """
    known = run.identity()

    def choose(part: dict[str, Any]) -> str:
        generates = tasks.get(part["task"]).KIND == GENERATES
        return engines.choose(part["params"], suites.identity(known, part["task"]), generates=generates)

    return _prepare(job, choose, lambda: builtin.folder(run, say), known, say)


def rehearse(job: dict[str, Any], scratch: Path, say: Say) -> list[Prepared]:
    """The same without a model: of the built-in one only the tokenizer is made, in the folder `scratch`."""
    return _prepare(job, lambda part: engines.named(part["params"]), lambda: builtin.outline(scratch), {}, say)


def refuse_bad_prompts(parts: Sequence[Prepared], say: Say) -> None:
    """Show the first prompts and every finding; raises ConfigFailure when one of them is an error."""
    for part in parts:
        first_prompt, findings = part.asked.first_prompt, part.asked.findings
        say(f"{part.title}The first prompt:\n{first_prompt}")
        for finding in findings:
            say(f"{part.title}{finding.level}: {finding.message} {suites.renamed(part.job, finding.hint)}")
        errors = [finding for finding in findings if finding.level == "error"]
        if errors:
            message = " ".join(finding.message for finding in errors)
            raise ConfigFailure(
                f"{part.title}{message} The first prompt:\n{first_prompt}", suites.renamed(part.job, errors[0].hint)
            )


def described(parts: Sequence[Prepared]) -> dict[str, Any]:
    """What a dry run answers."""
    lengths = [item.tokens_in for part in parts for item in part.items]
    return {
        "examples": sum(len({item.example.id for item in part.items}) for part in parts),
        "rows_total": len(lengths),
        "tokens_in": {"max": max(lengths), "mean": round(sum(lengths) / len(lengths), 1)},
        "first_prompt": "\n\n".join(f"{part.title}{part.asked.first_prompt}" for part in parts),
        "findings": [
            {
                **finding.__dict__,
                "message": part.title + finding.message,
                "hint": suites.renamed(part.job, finding.hint),
            }
            for part in parts
            for finding in part.asked.findings
        ],
    }


def _prepare(
    job: dict[str, Any],
    choose: Callable[[dict[str, Any]], str],
    built_in: Callable[[], Path],
    known: dict[str, Any],
    say: Say,
) -> list[Prepared]:
    """The datasets are read before the built-in model is made: what is wrong with one is then said at once."""
    parts = suites.parts(job)
    names = [choose(part) for part in parts]
    found = []
    for part in parts:
        with _said_of(part):
            found.append(_read(part, say))
    mine = set(shares.chosen(job, [name for each in found for name in each.names()]))
    made = []
    for each, engine in zip(found, names, strict=True):
        params, of_it = each.job["params"], suites.identity(known, each.task.NAME)
        request = wanted.model(params, built_in() if params["model"] == builtin.NAME else None, of_it)
        with _said_of(each.job):
            made.append(_asked(each, engine, request, mine, say))
    return made


def _read(part: dict[str, Any], say: Say) -> _Found:
    tasks.require(part["task"])
    params, task = part["params"], tasks.get(part["task"])
    say("reading the dataset")
    found, records = worked.examples(params, task)
    return _Found(part, task, found[: part["limit"]], records.digest, worked.shots(params, task))


def _asked(found: _Found, engine: str, request: models.ModelRequest, mine: set[str], say: Say) -> Prepared:
    """A part with its questions, of the examples that are made here."""
    examples = found.examples
    renderer, config = _renderer(engine, request, found.job["params"].get("chat_template", "none"))
    example_ids = found.names()
    own = {example.id for example, name in zip(examples, example_ids, strict=True) if name in mine}
    shown = [example for example in examples if example.id in own] or examples[:1]
    say(f"rendering {len(shown)} prompts")
    asked = questions(Means(found.job, found.task, request, config, renderer, found.shots), shown)
    return Prepared(
        job=found.job,
        task=found.task,
        engine=engine,
        request=request,
        renderer=renderer,
        asked=asked,
        items=[item for item in asked.items if item.example.id in own],
        dataset_digest=found.digest,
        shots_digest=found.shots.digest(examples),
        example_ids=example_ids,
    )


@contextlib.contextmanager
def _said_of(part: dict[str, Any]) -> Iterator[None]:
    """What is wrong with one of several parts is said of it, and parameters by the names they have in the job."""
    try:
        yield
    except ConfigFailure as failure:
        if "part_takes" not in part:
            raise
        raise ConfigFailure(f"{part['task']}: {failure.message}", suites.renamed(part, failure.hint)) from failure


def _renderer(engine: str, request: models.ModelRequest, chat_template: str) -> tuple[prompts.Renderer, Any]:
    """What makes prompts, and the model's configuration: None where both are a server's."""
    if engine == "openai":
        return unrendered.Renderer(chat_template), None
    return prompts.Renderer(models.load_tokenizer(request), chat_template), models.load_config(request)

"""What an evaluation will ask, worked out before any weights load: examples, prompts, seeds and findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import rundir, shares
from worker import builtin, engines, models, prompts, tasks, unrendered, wanted, worked
from worker.asking import Item, Means, Questions, questions
from worker.failures import ConfigFailure
from worker.tasks import GENERATES, Task


@dataclass(frozen=True)
class Prepared:
    """Everything settled before the first token."""

    params: dict[str, Any]
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
    """Of all examples of the run, in their order, whoever makes them; `items` are those made here."""


def prepare(job: dict[str, Any], run: rundir.Run, say: Callable[[str], None]) -> Prepared:
    """Read the dataset, render and check every prompt. Trains the built-in model when it is asked for and not there.

    Raises ConfigFailure for what cannot be read or rendered; what is merely suspicious stands among the findings.
    """
    known = run.identity()
    engine = engines.choose(job["params"], known, generates=_generates(job))
    return _prepare({**job, "engine": engine}, lambda: builtin.folder(run, say), known, say)


def rehearse(job: dict[str, Any], scratch: Path, say: Callable[[str], None]) -> Prepared:
    """The same without a model: of the built-in one only the tokenizer is made, in the folder `scratch`."""
    return _prepare({**job, "engine": engines.named(job["params"])}, lambda: builtin.outline(scratch), {}, say)


def refuse_bad_prompts(prepared: Prepared, say: Callable[[str], None]) -> None:
    """Show the first prompt and every finding; raises ConfigFailure when one of them is an error."""
    first_prompt, findings = prepared.asked.first_prompt, prepared.asked.findings
    say(f"The first prompt:\n{first_prompt}")
    for finding in findings:
        say(f"{finding.level}: {finding.message} {finding.hint}")
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        message = " ".join(finding.message for finding in errors)
        raise ConfigFailure(f"{message} The first prompt:\n{first_prompt}", errors[0].hint)


def described(prepared: Prepared) -> dict[str, Any]:
    """What a dry run answers."""
    lengths = [item.tokens_in for item in prepared.items]
    return {
        "examples": len({item.example.id for item in prepared.items}),
        "rows_total": len(prepared.items),
        "tokens_in": {"max": max(lengths), "mean": round(sum(lengths) / len(lengths), 1)},
        "first_prompt": prepared.asked.first_prompt,
        "findings": [dict(finding.__dict__) for finding in prepared.asked.findings],
    }


def _prepare(
    job: dict[str, Any], built_in: Callable[[], Path], known: dict[str, Any], say: Callable[[str], None]
) -> Prepared:
    """The dataset is read before the built-in model is made: what is wrong with it is then said at once."""
    tasks.require(job["task"])
    params, task, engine = job["params"], tasks.get(job["task"]), job["engine"]
    say("reading the dataset")
    found, records = worked.examples(params, task)
    examples = found[: job["limit"]]
    shots = worked.shots(params, task)
    request = wanted.model(params, built_in() if params["model"] == builtin.NAME else None, known)
    renderer, config = _renderer(engine, request, params.get("chat_template", "none"))
    example_ids = [example.id for example in examples]
    mine = set(shares.chosen(job, example_ids))
    shown = [example for example in examples if example.id in mine] or examples[:1]
    say(f"rendering {len(shown)} prompts")
    asked = questions(Means(job, task, request, config, renderer, shots), shown)
    return Prepared(
        params=params,
        task=task,
        engine=engine,
        request=request,
        renderer=renderer,
        asked=asked,
        items=[item for item in asked.items if item.example.id in mine],
        dataset_digest=records.digest,
        shots_digest=shots.digest(examples),
        example_ids=example_ids,
    )


def _generates(job: dict[str, Any]) -> bool:
    tasks.require(job["task"])
    return tasks.get(job["task"]).KIND == GENERATES


def _renderer(engine: str, request: models.ModelRequest, chat_template: str) -> tuple[prompts.Renderer, Any]:
    """What makes prompts, and the model's configuration: None where both are a server's."""
    if engine == "openai":
        return unrendered.Renderer(chat_template), None
    return prompts.Renderer(models.load_tokenizer(request), chat_template), models.load_config(request)

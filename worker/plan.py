"""What an evaluation will ask, worked out before any weights load: examples, rendered prompts, seeds and findings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import durable, rundir, shares, spec
from worker import builtin, engines, models, prompts, sources, tasks, unrendered
from worker.failures import BadRecord, ConfigFailure
from worker.generators import Prompt, Sampling
from worker.tasks import Example, Task


@dataclass(frozen=True)
class Item:
    """One completion to be made: which example, which sample of it, and what is sent."""

    key: str
    example: Example
    sample_index: int
    prompt: Prompt
    asked: dict[str, Any]
    """`messages`, or `prompt` where no chat template is used: as it stands in the row."""


@dataclass(frozen=True)
class Prepared:
    """Everything settled before the first token."""

    params: dict[str, Any]
    task: Task
    engine: str
    """`hf`, `vllm` or `openai`."""
    request: models.ModelRequest
    renderer: prompts.Renderer
    sampling: Sampling
    items: list[Item]
    findings: list[prompts.Finding]
    first_prompt: str
    dataset_digest: str
    shots_digest: str | None
    example_ids: list[str]
    """Of all examples of the run, in their order, whoever makes them; `items` are those made here."""


def prepare(job: dict[str, Any], run: rundir.Run, say: Callable[[str], None]) -> Prepared:
    """Read the dataset, render and check every prompt. Trains the built-in model when it is asked for and not there.

    Raises ConfigFailure for what cannot be read or rendered; what is merely suspicious stands in `findings`.
    """
    known = _known(run)
    return _prepare(
        {**job, "engine": engines.choose(job["params"], known)}, lambda: builtin.folder(run, say), known, say
    )


def rehearse(job: dict[str, Any], scratch: Path, say: Callable[[str], None]) -> Prepared:
    """The same without a model: of the built-in one only the tokenizer is made, in the folder `scratch`."""
    return _prepare({**job, "engine": engines.named(job["params"])}, lambda: builtin.outline(scratch), {}, say)


def refuse_bad_prompts(prepared: Prepared, say: Callable[[str], None]) -> None:
    """Show the first prompt and every finding; raises ConfigFailure when one of them is an error."""
    say(f"The first prompt:\n{prepared.first_prompt}")
    for finding in prepared.findings:
        say(f"{finding.level}: {finding.message} {finding.hint}")
    errors = [finding for finding in prepared.findings if finding.level == "error"]
    if errors:
        message = " ".join(finding.message for finding in errors)
        raise ConfigFailure(f"{message} The first prompt:\n{prepared.first_prompt}", errors[0].hint)


def described(prepared: Prepared) -> dict[str, Any]:
    """What a dry run answers."""
    lengths = [len(item.prompt.token_ids) for item in prepared.items]
    return {
        "examples": len({item.example.id for item in prepared.items}),
        "rows_total": len(prepared.items),
        "tokens_in": {"max": max(lengths), "mean": round(sum(lengths) / len(lengths), 1)},
        "first_prompt": prepared.first_prompt,
        "findings": [dict(finding.__dict__) for finding in prepared.findings],
    }


def seed_of(run_seed: int, key: str) -> int:
    """The seed of one completion, 63 bits: a hash, so that it depends on nothing else that is asked."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}\0{key}".encode()).digest()[:8], "big") >> 1


def _prepare(
    job: dict[str, Any], built_in: Callable[[], Path], known: dict[str, Any], say: Callable[[str], None]
) -> Prepared:
    """The dataset is read before the built-in model is made: what is wrong with it is then said at once."""
    params, task, engine = job["params"], tasks.get(job["task"]), job["engine"]
    say("reading the dataset")
    records = sources.load(_source(params, task, params["split"]))
    examples = _examples(task, records)[: job["limit"]]
    _refuse_twins(examples, records.name)
    shots = _shots(params, task)
    request = _request(params, built_in() if params["model"] == builtin.NAME else None, known)
    renderer = _renderer(engine, request, params)
    example_ids = [example.id for example in examples]
    mine = set(shares.chosen(job, example_ids))
    shown = [example for example in examples if example.id in mine] or examples[:1]
    say(f"rendering {len(shown)} prompts")
    rendered = [_render(renderer, task, example, shots, params) for example in shown]
    sampling = _sampling(params)
    return Prepared(
        params=params,
        task=task,
        engine=engine,
        request=request,
        renderer=renderer,
        sampling=sampling,
        items=[
            _item(job, example, prompt, sample, renderer)
            for example, prompt in zip(shown, rendered, strict=True)
            for sample in range(params["samples"])
            if example.id in mine
        ],
        findings=_findings(rendered, renderer, request, (sampling, params["samples"])),
        first_prompt=renderer.shown(rendered[0]),
        dataset_digest=records.digest,
        shots_digest=_digest(shots) if shots else None,
        example_ids=example_ids,
    )


def _renderer(engine: str, request: models.ModelRequest, params: dict[str, Any]) -> prompts.Renderer:
    if engine == "openai":
        return unrendered.Renderer(params["chat_template"])
    return prompts.Renderer(models.load_tokenizer(request), params["chat_template"])


def _findings(
    rendered: Sequence[prompts.RenderedPrompt],
    renderer: prompts.Renderer,
    request: models.ModelRequest,
    drawn: tuple[Sampling, int],
) -> list[prompts.Finding]:
    if isinstance(renderer, unrendered.Renderer):
        return renderer.check(rendered, request.model, *drawn)
    return prompts.check(rendered, renderer, _facts(request, renderer, *drawn))


def _request(params: dict[str, Any], model: Path | None, known: dict[str, Any]) -> models.ModelRequest:
    """Which model to load. What an earlier attempt resolved is kept to: its dtype, and the commit of a Hub model."""
    digest = str(known.get("model_digest", ""))
    commit = digest.removeprefix("commit:") if digest.startswith("commit:") else None
    return models.ModelRequest(
        model=str(model or params["model"]),
        revision=commit or params["revision"],
        adapter=params["adapter"],
        dtype=known.get("dtype", params["dtype"]),
        device=params["device"],
        trust_remote_code=params["trust_remote_code"],
    )


def _known(run: rundir.Run) -> dict[str, Any]:
    resolved = durable.load_json(run.resolved)
    return resolved["identity"] if resolved else {}


def _source(params: dict[str, Any], task: Task, split: str) -> sources.Source:
    """Where examples come from; the built-in model is asked the problems that it was made for."""
    dataset = params["dataset"]
    if dataset == "auto":
        dataset = "generated" if params["model"] == builtin.NAME else task.DATASET
    return sources.Source(dataset, split, None)


def _shots(params: dict[str, Any], task: Task) -> list[Example]:
    """The first examples of the training split, fixed: the same prefix for every prompt."""
    if not params["shots"]:
        return []
    if params["shots_dataset"]:
        source = sources.Source(params["shots_dataset"], "train")
    elif sources.is_path(params["dataset"]):
        raise ConfigFailure(
            f"shots={params['shots']} needs worked examples, and the file {params['dataset']} has no training split.",
            "Say where they are: --set shots_dataset=train.jsonl",
        )
    else:
        source = _source(params, task, "train")
    return _examples(task, sources.load(source))[: params["shots"]]


def _digest(shots: list[Example]) -> str:
    """What tells one set of worked examples from another."""
    return hashlib.sha256(spec.canonical([(shot.problem, shot.solution) for shot in shots])).hexdigest()


def _examples(task: Task, records: sources.Records) -> list[Example]:
    try:
        return task.examples(records.rows)
    except BadRecord as bad:
        raise BadRecord(f"{records.name}, {bad.message}", bad.hint) from None


def _refuse_twins(examples: Sequence[Example], name: str) -> None:
    """Ids are keys: two examples under one would be one row."""
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise ConfigFailure(
                f"{name} has two rows with the id {example.id!r}.", "Make the ids unique, or leave them out."
            )
        seen.add(example.id)


def _sampling(params: dict[str, Any]) -> Sampling:
    return Sampling(
        temperature=params["temperature"],
        top_p=params["top_p"],
        max_new_tokens=params["max_new_tokens"],
        stop=(params["stop"],) if params["stop"] else (),
    )


def _render(
    renderer: prompts.Renderer, task: Task, example: Example, shots: list[Example], params: dict[str, Any]
) -> prompts.RenderedPrompt:
    return renderer.render(example.id, task.messages(example, shots, instruction=params["instruction"] or ""))


def _item(
    job: dict[str, Any], example: Example, rendered: prompts.RenderedPrompt, sample: int, renderer: prompts.Renderer
) -> Item:
    key = shares.row_key(job, example.id, sample)
    messages = [dict(message) for message in rendered.messages]
    asked: dict[str, Any] = {"prompt": renderer.text(messages)} if renderer.plain else {"messages": messages}
    prompt = Prompt(key, rendered.token_ids, seed_of(job["params"]["seed"], key), asked)
    return Item(key=key, example=example, sample_index=sample, prompt=prompt, asked=asked)


def _facts(request: models.ModelRequest, renderer: prompts.Renderer, sampling: Sampling, samples: int) -> prompts.Facts:
    config = models.load_config(request)
    return prompts.Facts(
        sampling=sampling,
        samples=samples,
        context_length=prompts.context_length(config),
        vocabulary_size=getattr(config.get_text_config(), "vocab_size", None),
        end_ids=models.end_token_ids(models.load_generation_config(request), renderer.tokenizer),
    )

"""What is asked of the model for each example, by the kind of its task, with what is wrong or doubtful about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jobs import shares
from worker import likelihood, models, prompts, unrendered
from worker.generators import Prompt, Query, Sampling
from worker.prompts import Finding, RenderedPrompt
from worker.tasks import CHOOSES, GENERATES, READS, Chooses, Example, Generates, Task
from worker.worked import Shots


@dataclass(frozen=True)
class Item:
    """One row to be made: which example, which sample of it, and what is sent."""

    key: str
    example: Example
    sample_index: int
    prompt: Prompt | Query
    asked: dict[str, Any]
    """`messages`, or `prompt` where no chat template is used, and what else of the question stands in the row."""

    @property
    def tokens_in(self) -> int:
        """How many tokens the model reads for it, were nothing shared."""
        if isinstance(self.prompt, Prompt):
            return len(self.prompt.token_ids)
        return sum(len(context) + len(continuation) - 1 for context, continuation in self.prompt.pairs)


@dataclass(frozen=True)
class Means:
    """What questions are made with."""

    job: dict[str, Any]
    task: Task
    request: models.ModelRequest
    config: Any
    renderer: prompts.Renderer
    shots: Shots

    def row_key(self, example: Example, sample: int = 0) -> str:
        """The key of one of an example's rows."""
        return shares.row_key(self.job, example.id, sample)


@dataclass(frozen=True)
class Questions:
    """All that is asked. `sampling` is None where nothing is generated, `max_length` where nothing is weighed."""

    items: list[Item]
    findings: list[Finding]
    first_prompt: str
    sampling: Sampling | None = None
    max_length: int | None = None


def questions(means: Means, examples: Sequence[Example]) -> Questions:
    """What is asked for these examples, at least one, in their order; raises ConfigFailure."""
    return _KINDS[means.task.KIND](means, examples)


def seed_of(run_seed: int, key: str) -> int:
    """The seed of one completion, 63 bits: a hash, so that it depends on nothing else that is asked."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}\0{key}".encode()).digest()[:8], "big") >> 1


def _generate(means: Means, examples: Sequence[Example]) -> Questions:
    params, renderer, task = means.job["params"], means.renderer, cast(Generates, means.task)
    rendered = [
        renderer.render(
            example.id, task.messages(example, means.shots.of(example), instruction=params["instruction"] or "")
        )
        for example in examples
    ]
    items = [
        _completion(means, example, prompt, sample)
        for example, prompt in zip(examples, rendered, strict=True)
        for sample in range(params["samples"])
    ]
    sampling = Sampling(
        temperature=params["temperature"],
        top_p=params["top_p"],
        max_new_tokens=params["max_new_tokens"],
        stop=(params["stop"],) if params["stop"] else task.STOP if renderer.plain else (),
    )
    if isinstance(renderer, unrendered.Renderer):
        findings = renderer.check(rendered, means.request.model, sampling, params["samples"])
    else:
        findings = prompts.check(rendered, renderer, _facts(means, sampling, params["samples"]))
    return Questions(items, findings, renderer.shown(rendered[0]), sampling)


def _completion(means: Means, example: Example, rendered: RenderedPrompt, sample: int) -> Item:
    key = means.row_key(example, sample)
    messages = [dict(message) for message in rendered.messages]
    renderer = means.renderer
    asked: dict[str, Any] = {"prompt": renderer.text(messages)} if renderer.plain else {"messages": messages}
    prompt = Prompt(key, rendered.token_ids, seed_of(means.job["params"]["seed"], key), asked)
    return Item(key=key, example=example, sample_index=sample, prompt=prompt, asked=asked)


def _choose(means: Means, examples: Sequence[Example]) -> Questions:
    task, renderer = cast(Chooses, means.task), means.renderer
    length = _max_length(means)
    contexts = [task.context(example, means.shots.of(example)) for example in examples]
    asked = likelihood.Asking(renderer, length).choices(
        [means.row_key(example) for example in examples], examples, contexts
    )
    items = _weighed(examples, asked)
    rendered = [
        RenderedPrompt(item.example.id, item.asked.get("messages", []), item.prompt.pairs[0][0])
        for item in items
        if isinstance(item.prompt, Query)
    ]
    findings = prompts.check(rendered, renderer, _facts(means)) + _cut_off(items, length)
    first = prompts.first_prompt_shown(rendered[0], renderer.tokenizer)
    return Questions(items, findings, first, max_length=length)


def _read(means: Means, examples: Sequence[Example]) -> Questions:
    length = _max_length(means)
    asked = likelihood.Asking(means.renderer, length).texts([means.row_key(example) for example in examples], examples)
    items = _weighed(examples, asked)
    rendered = [
        RenderedPrompt(item.example.id, [], context + continuation)
        for item in items
        if isinstance(item.prompt, Query)
        for context, continuation in item.prompt.pairs
    ]
    findings = prompts.check_tokens(rendered, means.renderer, _facts(means, may_end=True))
    first = prompts.first_prompt_shown(rendered[0], means.renderer.tokenizer)
    return Questions(items, findings, first, max_length=length)


def _weighed(examples: Sequence[Example], asked: Any) -> list[Item]:
    return [
        Item(key=query.key, example=example, sample_index=0, prompt=query, asked=sent)
        for example, (query, sent) in zip(examples, asked, strict=True)
    ]


def _max_length(means: Means) -> int:
    return likelihood.max_length(means.job["params"]["max_length"], means.config, means.renderer.tokenizer)


def _cut_off(items: Sequence[Item], length: int) -> list[Finding]:
    """That prompts are too long: their beginning is left out, as the reference tool does, and the choice kept."""
    cut = [item.asked["tokens_cut"] for item in items if item.asked["tokens_cut"]]
    if not cut:
        return []
    message = (
        f"{len(cut)} of {len(items)} prompts are longer than the {length} tokens the model reads: up to {max(cut)} "
        "tokens of their beginning are left out."
    )
    return [Finding("warning", "prompt_cut_off", message, "Use fewer shots (--set shots=…) or a longer context.")]


def _facts(means: Means, sampling: Sampling | None = None, samples: int = 1, *, may_end: bool = False) -> prompts.Facts:
    """What the model's configuration says; `may_end`: that a text ends with an end token is no fault."""
    generation = models.load_generation_config(means.request)
    return prompts.Facts(
        sampling=sampling,
        samples=samples,
        context_length=prompts.context_length(means.config),
        vocabulary_size=getattr(means.config.get_text_config(), "vocab_size", None),
        end_ids=frozenset() if may_end else models.end_token_ids(generation, means.renderer.tokenizer),
    )


_KINDS: dict[str, Callable[[Means, Sequence[Example]], Questions]] = {
    GENERATES: _generate,
    CHOOSES: _choose,
    READS: _read,
}

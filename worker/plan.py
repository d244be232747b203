"""What an evaluation will ask, worked out before any weights load: examples, rendered prompts, seeds and findings."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import generators, models, prompts, sources, tasks, tiny
from worker.failures import ConfigFailure
from worker.generators import Prompt, Sampling
from worker.tasks import Example, Task

_SHOTS_SPLIT = "train"
HUB_DATASETS = {"gsm8k": "openai/gsm8k"}
"""What `dataset=auto` is for a real model; the built-in one is asked the problems it was made for."""


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
    request: models.ModelRequest
    renderer: prompts.Renderer
    sampling: Sampling
    items: list[Item]
    findings: list[prompts.Finding]
    first_prompt: str
    dataset_digest: str


def prepare(job: dict[str, Any], folder: Path | None, say: Callable[[str], None]) -> Prepared:
    """Read the dataset, render and check every prompt. `folder` is the run's; None prepares without training a model.

    Raises ConfigFailure for what cannot be read or rendered; what is merely suspicious stands in `findings`.
    """
    params = job["params"]
    task = tasks.get(job["task"])
    say("reading the dataset")
    dataset, examples, shots = _examples(params, task, job["limit"])
    request = _model_request(params, folder, say)
    renderer = prompts.Renderer(models.load_tokenizer(request), params["chat_template"])
    sampling = Sampling(
        temperature=params["temperature"],
        top_p=params["top_p"],
        max_new_tokens=params["max_new_tokens"],
        stop=(params["stop"],) if params["stop"] else (),
    )
    say(f"rendering {len(examples)} prompts")
    rendered = [_render(renderer, task, example, shots, params["instruction"] or "") for example in examples]
    items = [
        _item(job, example, sample, prompt)
        for example, prompt in zip(examples, rendered, strict=True)
        for sample in range(params["samples"])
    ]
    return Prepared(
        params=params,
        task=task,
        request=request,
        renderer=renderer,
        sampling=sampling,
        items=items,
        findings=prompts.check(rendered, _prompt_facts(request, renderer, sampling, params["samples"])),
        first_prompt=prompts.first_prompt_shown(rendered[0], renderer),
        dataset_digest=dataset.digest,
    )

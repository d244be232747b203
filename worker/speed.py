"""The story of a speed measurement: a model of this shape, steps of this recipe, this device's peak; nothing is kept.

A run that was killed begins anew: what steps took before says nothing of the machine it goes on on.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import durable, rows, rundir, times
from jobs.decoders import Shape
from jobs.training_memory import Recipe
from worker import blanks, builtin, curriculum, facts, held, lora, models, peaks, resolve
from worker.batches import Micro
from worker.curriculum import Prepared
from worker.failures import ConfigFailure
from worker.progress import Progress
from worker.train import Training


def work(run: rundir.Run, attempt: rundir.Attempt, job: dict[str, Any]) -> None:
    """Do the steps and write down how each went; the laptop counts what they come to. Raises WorkerFailure."""
    progress = Progress(attempt.progress)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = plan(job, run, Path(scratch), progress.phase)
        resolve.keep(run, resolved(prepared))
        progress.phase("making the model")
        training = Training(run, prepared, learner(prepared))
        progress.phase("measuring this device")
        about = device(prepared, training.learner)
    durable.save_json(attempt.env, {**facts.environment(), "training_since": times.now(), "speed": about})
    progress.phase("training")
    with rows.Appender(attempt.steps) as out:
        for line in steps(training, prepared.params["warm_steps"]):
            out.append(line)
            progress.steps(line["step"], prepared.steps, f"{line['tokens_per_second']:.0f} tokens/s", line["eta_s"])
    progress.phase("done")


def check(job: dict[str, Any]) -> dict[str, Any]:
    """What a dry run says: how many steps of what. Makes no model."""
    with tempfile.TemporaryDirectory() as scratch:
        prepared = plan(job, rundir.Run(Path(scratch)), Path(scratch), lambda _: None)
    lengths = [len(sample) for sample in prepared.samples]
    return {
        "examples": len(lengths),
        "steps_total": prepared.steps,
        "tokens_in": {"max": max(lengths), "mean": round(sum(lengths) / len(lengths), 1)},
        "first_prompt": resolved(prepared)["first_prompt"],
        "findings": [],
    }


def plan(job: dict[str, Any], run: rundir.Run, scratch: Path, say: curriculum.Say) -> Prepared:
    """The rows and the recipe: those of a dataset, or rows of random tokens, for which no tokenizer is needed."""
    params = job["params"]
    if params["warm_steps"] >= params["steps"]:
        raise ConfigFailure(
            f"warm_steps={params['warm_steps']} leaves none of {params['steps']} steps to measure.",
            f"--set steps={params['warm_steps'] + 10}",
        )
    if params["dataset"] is not None:
        is_blank = params["weights"] == "random"
        return curriculum.rehearse(job, scratch, say) if is_blank else curriculum.prepare(job, run, say)
    is_real = params["model"] == builtin.NAME and params["weights"] == "model"
    return curriculum.made_up(params, builtin.folder(run, say) if is_real else builtin.outline(scratch))


def resolved(prepared: Prepared) -> dict[str, Any]:
    """The document of resolved.json."""
    if prepared.tokenizer is not None:
        return prepared.resolved()
    words = f"{len(prepared.samples)} rows of {len(prepared.samples[0])} random tokens"
    known = {"fingerprint": prepared.fingerprint, "identity": prepared.identity, "device": prepared.device}
    return {**known, "model": prepared.params["model"], "first_prompt": words, "warnings": []}


def learner(prepared: Prepared) -> lora.Learner:
    """The model with its adapter, in random numbers unless its own were asked for."""
    if prepared.params["weights"] == "model":
        return lora.load(prepared.request, prepared.settings)
    return lora.fit(blanks.load(prepared.request), prepared.settings)


def device(prepared: Prepared, learner: lora.Learner) -> dict[str, Any]:
    """What the figures are counted from beside the steps: the device, the shape, the recipe, all tokens there are."""
    params, dtype = prepared.params, models.dtype_name(prepared.request)
    shape = Shape.of(models.load_config(prepared.request).to_dict())
    lengths = prepared.plan.lengths
    whole = sum(lengths) * params["epochs"] if params["dataset"] is not None else None
    return {
        "device": peaks.name(learner.device),
        "kind": learner.device.type,
        "dtype": dtype,
        "peak_flops": peaks.flops(learner.device, models.choose_dtype(dtype, learner.device)),
        "copied": peaks.copied(learner.device),
        "has_bytes": peaks.memory(learner.device),
        "shape": None if shape is None else asdict(shape),
        "recipe": asdict(Recipe.of(params, dtype)),
        "micros": prepared.accumulation,
        "length": sum(length * length for length in lengths) / sum(lengths),
        "total_tokens": params["total_tokens"] or whole,
        "limits": {name: params[name] for name in ("go_s", "usable_s", "pivot_s")},
        "warm_steps": params["warm_steps"],
    }


def steps(training: Training, warm: int) -> Iterator[rows.Row]:
    """Each step's line as a training has it, with its tokens as they were laid out, and whether it counts.

    During the first `warm` steps, which do not count, tensors are counted where PyTorch does not do that itself.
    """
    on_gpu = training.learner.device.type == "cuda"
    if on_gpu:
        import torch

        training.probe()
        torch.cuda.reset_peak_memory_stats(training.learner.device)
    lines = zip(training.steps(), slots(training.prepared), strict=False)
    with contextlib.nullcontext() if on_gpu else held.counting() as tally:
        for line, wide in itertools.islice(lines, warm):
            yield {**line, **wide, "warm": True, "held_bytes": tally.most if tally else line["memory_bytes"]}
    for line, wide in lines:
        yield {**line, **wide, "warm": False, "held_bytes": line["memory_bytes"] if on_gpu else None}


def slots(prepared: Prepared) -> Iterator[dict[str, int]]:
    """Tokens of each step, and of its largest micro-batch, with their padding."""
    stream = (micro for _, micro in prepared.plan.stream())
    while True:
        sizes = [_slots(prepared, micro) for micro in itertools.islice(stream, prepared.accumulation)]
        yield {"slots": sum(sizes), "slots_most": max(sizes)}


def _slots(prepared: Prepared, micro: Micro) -> int:
    lengths = [len(prepared.samples[index]) for index in micro]
    return sum(lengths) if prepared.params["packing"] else len(lengths) * max(lengths)

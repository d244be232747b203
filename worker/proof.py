"""Whether a training goes on exactly, tried out on the user's own model: steps in one go, and again interrupted."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from jobs import durable, rundir
from worker import lora
from worker.batches import Batch, Micro
from worker.curriculum import Prepared
from worker.failures import WorkerFailure
from worker.train import Training

STEPS = 4
"""Enough for an optimizer with a history on both sides of the interruption, and over within a minute or two."""
_SCRATCH = ".verify.staged"
"""A name that the next attempt sweeps away, should this one be killed."""
_MUCH = 10.0
"""So many times what two undisturbed runs differ by is more than chance."""
Say = Callable[[str], None]


class NotExact(WorkerFailure):
    """A resumed training would not be the one that was stopped; nothing of the training proper has begun."""

    kind = "state"


class _Paused(Exception):
    """The trial has been stopped and saved, as a TERM would have it."""


@dataclass(frozen=True)
class Trace:
    """What a stretch of training came to: its steps, and everything that the next one would depend on."""

    lines: list[tuple[Any, ...]]
    at: dict[str, Any]
    tensors: dict[str, Any]
    values: dict[str, Any]


class _Trial(Training):
    """A training that is asked to stop once it has begun so many micro-batches."""

    stops_after: int | None = None
    begun = 0

    def _batch(self, micro: Micro) -> Batch:
        self.begun += 1
        self.stop_asked = self.begun == self.stops_after
        return super()._batch(micro)

    def save(self, *what: Any) -> None:
        """See Training."""
        super().save(*what)
        raise _Paused


def prove(run: rundir.Run, prepared: Prepared, say: Say) -> dict[str, Any]:
    """Train a few steps in one go, then again with a checkpoint and a model loaded anew in their middle; compare.

    The document says whether both are the same bit by bit, else by how much weights differ and, on a GPU, by how much
    those of two undisturbed runs do. NotExact where that is more than chance; on a CPU any difference is.
    """
    began = time.monotonic()
    scratch = rundir.Run(run.folder / _SCRATCH)
    shutil.rmtree(scratch.folder, ignore_errors=True)
    durable.have_folder(scratch.folder)
    say("verify_resume: a few steps in one go, and again with an interruption; nothing of it is kept")
    try:
        whole, again, begun = _undisturbed(scratch, prepared)
        resumed = _resumed(scratch, prepared, begun)
    finally:
        shutil.rmtree(scratch.folder, ignore_errors=True)
    kind = "cpu" if again is None else "gpu"
    found = judged(whole, resumed, again)
    found = {**found, "on": kind, "steps": len(whole.lines), "seconds": round(time.monotonic() - began, 1)}
    say(f"verify_resume: {found['words']}")
    if not found["exact"] and not found["by_chance"]:
        raise NotExact(
            f"A resume of this training would not be exact: {found['words']}. Nothing was trained.",
            "--set verify_resume=false trains all the same; a resumed run would then be another one.",
        )
    return found


def _undisturbed(scratch: rundir.Run, prepared: Prepared) -> tuple[Trace, Trace | None, list[tuple[Any, ...]]]:
    """The steps in one go, on a GPU a second time, and those before the interruption, which leave a checkpoint."""
    learner = lora.load(prepared.request, prepared.settings)
    beginning = lora.adapter_files(learner, "")[lora.WEIGHTS]

    def trial() -> _Trial:
        lora.load_adapter(learner, beginning)
        learner.optimizer.state.clear()
        learner.optimizer.zero_grad(set_to_none=True)
        return _Trial(scratch, prepared, learner)

    whole = _trace(trial())
    again = None if learner.device.type == "cpu" else _trace(trial())
    stopped = trial()
    accumulation = prepared.accumulation
    stopped.stops_after = max(1, len(whole.lines) // 2 * accumulation + (accumulation > 1))
    begun = _lines(stopped, STEPS)
    if not scratch.checkpoints():  # there were no more micro-batches to stop at
        with contextlib.suppress(_Paused):
            stopped.save()
    return whole, again, begun


def _resumed(scratch: rundir.Run, prepared: Prepared, begun: list[tuple[Any, ...]]) -> Trace:
    """The rest of the steps, by a model loaded anew that goes on from the checkpoint."""
    _free()
    training = _Trial(scratch, prepared, lora.load(prepared.request, prepared.settings))
    training.restore(scratch.checkpoints()[-1])
    return _trace(training, begun)


def _free() -> None:
    """Give the memory of a model that nobody holds any more back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _lines(training: _Trial, count: int) -> list[tuple[Any, ...]]:
    """What must be the same of each step, up to so many of them or to the stop."""
    found = []
    with contextlib.suppress(_Paused):
        for line in itertools.islice(training.steps(), count):
            found.append(tuple(line.get(name) for name in ("step", "loss", "grad_norm", "lr", "epoch", "eval_loss")))
    return found


def _trace(training: _Trial, begun: list[tuple[Any, ...]] | None = None) -> Trace:
    lines = [*(begun or []), *_lines(training, STEPS - len(begun or []))]
    tensors, values = lora.state(training.learner)
    weights = {f"weight/{name}": each.detach().cpu().clone() for name, each in training.learner.weights.items()}
    at = {name: value for name, value in asdict(training.at).items() if name != "seconds"}
    return Trace(lines, at, {**weights, **tensors}, values)


def judged(whole: Trace, resumed: Trace, again: Trace | None) -> dict[str, Any]:
    """What follows from both, in words too; `again` is the undisturbed run once more, where chance plays a part."""
    first = _first_difference(whole, resumed)
    if first is None:
        return {
            "exact": True,
            "by_chance": False,
            "difference": 0.0,
            "noise": None,
            "words": "resumed bit by bit the same",
        }
    difference, noise = _distance(whole, resumed), None if again is None else _distance(whole, again)
    words = f"{first} is not the same; weights differ by up to {difference:.1e}"
    by_chance = bool(noise) and again is not None and difference <= _MUCH * (noise or 0.0)
    if again is not None:
        words += f", those of two runs that nobody stopped by {noise:.1e}"
    return {"exact": False, "by_chance": by_chance, "difference": difference, "noise": noise, "words": words}


def _first_difference(one: Trace, other: Trace) -> str | None:
    """The first thing that is not the same, by name."""
    import torch

    for number, (line, found) in enumerate(itertools.zip_longest(one.lines, other.lines), start=1):
        if line != found:
            return f"step {number}"
    if (one.at, one.values) != (other.at, other.values):
        return "a count"
    if one.tensors.keys() != other.tensors.keys():
        return min(one.tensors.keys() ^ other.tensors.keys())
    return next((name for name, each in one.tensors.items() if not torch.equal(each, other.tensors[name])), None)


def _distance(one: Trace, other: Trace) -> float:
    """By how much the adapter's weights differ at most."""
    names = [name for name in one.tensors if name.startswith("weight/")]
    return max((float((one.tensors[name] - other.tensors[name]).abs().max()) for name in names), default=math.nan)

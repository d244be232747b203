"""The story of a training: rows → micro-batches → steps → checkpoints → adapter; a killed one ends just the same."""

from __future__ import annotations

import itertools
import json
import math
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs import durable, rows, rundir, times
from worker import batches, checkpoints, curriculum, curves, facts, lora, merging, resolve
from worker.batches import Batch, Micro
from worker.curriculum import Prepared
from worker.failures import Diverged, NothingLearned, OutOfMemory
from worker.progress import Progress

ADAPTER = "adapter"
ABOUT, STATE, TENSORS, BEST = "training.json", "state.json", "state.safetensors", "best.safetensors"
IDLE_STEPS = 5
"""After so many steps every adapter layer has learned something, or nothing reaches it."""
_STOPPED = 128 + signal.SIGTERM


class AnotherTraining(lora.StateMismatch):
    """A checkpoint of other rows, settings or weights; nothing of it was used."""


@dataclass
class Standing:
    """How far a training is: steps done, and of the step that has begun how many micro-batches, and their loss."""

    step: int = 0
    micro: int = 0
    loss: float = 0.0
    tokens: int = 0
    targets: int = 0
    """Of that step so far, too."""
    seconds: float = 0.0
    """Spent on steps so far, in all attempts."""
    tokens_all: int = 0
    targets_all: int = 0
    best_loss: float | None = None
    """The least so far on the rows held out, where `patience` asks for it, and the step that had it."""
    best_step: int = 0
    waited: int = 0
    """Measurements since then."""


def work(run: rundir.Run, attempt: rundir.Attempt, job: dict[str, Any]) -> None:
    """Train until the adapter is whole and durable. Raises WorkerFailure; ends with a checkpoint when it is stopped."""
    progress = Progress(attempt.progress)
    checkpoints.sweep(run)
    prepared = curriculum.prepare(job, run, progress.phase)
    curriculum.show(prepared, say)
    resolve.keep(run, prepared.resolved())
    if prepared.params["merge"]:
        merging.check(run, prepared)
    adapter = run.folder / ADAPTER
    if not (adapter / rundir.MANIFEST).is_file() or rundir.damage(adapter) is not None:
        verified = _verified(run, prepared, progress)
        progress.phase("loading the model")
        training = Training(run, prepared, lora.load(prepared.request, prepared.settings))
        training.begin()
        durable.save_json(attempt.env, {**facts.environment(), "training_since": times.now(), **verified})
        progress.phase("training")
        with rows.Appender(attempt.steps) as out, curves.drawing(attempt.curves, training.at.step + 1) as draw:
            for line in training.steps():
                out.append(line)
                draw(line)
                progress.steps(line["step"], prepared.steps, f"loss {line['loss']:.4f}", line["eta_s"])
                if line["step"] % prepared.params["save_every"] == 0:
                    out.sync()
                    training.save()
        training.finish()
    if prepared.params["merge"]:
        progress.phase("merging")
        merging.merge(run, prepared, say)
    checkpoints.retire(run, 0)
    progress.phase("done")


def _verified(run: rundir.Run, prepared: Prepared, progress: Progress) -> dict[str, Any]:
    """Where it is asked for and nothing is trained yet: what trying out a resume came to, for env.json."""
    if not prepared.params["verify_resume"] or run.checkpoints():
        return {}
    from worker import proof  # which trains, by this module

    progress.phase("verifying that a resume is exact")
    return {"verify_resume": proof.prove(run, prepared, say)}


def check(job: dict[str, Any]) -> dict[str, Any]:
    """What a dry run says: the first rows as they are learned, what is left out, and how many steps. Loads no model.

    Of a job that says `at_hand`, `unseen` tells what would have to be fetched first, and nothing else is done.
    """
    if job.get("at_hand") and (why := curriculum.unseen(job["params"])):
        return {"unseen": why}
    with tempfile.TemporaryDirectory() as scratch:
        prepared = curriculum.rehearse(job, Path(scratch), lambda _: None)
        first = "\n".join(prepared.first_rows())
    lengths = [len(sample) for sample in prepared.samples]
    return {
        "examples": len(prepared.samples),
        "steps_total": prepared.steps,
        "tokens_in": {"max": max(lengths), "mean": round(sum(lengths) / len(lengths), 1)},
        "first_prompt": first,
        "findings": [
            {"level": "warning", "code": "left_out", "message": words, "hint": ""} for words in prepared.warnings()
        ],
    }


@dataclass
class Training:
    """A training under way: what it learns from, the model, and how far it is."""

    run: rundir.Run
    prepared: Prepared
    learner: lora.Learner
    at: Standing = field(default_factory=Standing)
    stop_asked: bool = False
    best: bytes = b""
    """The adapter's weights after `at.best_step` steps."""

    def begin(self) -> None:
        """Go on from the newest whole checkpoint, or begin; from here on a TERM saves before it ends the worker."""
        folder = self._restored()
        if folder:
            say(f"going on from {folder.name}: {self.at.step} of {self.prepared.steps} steps are done")
        elif self.prepared.params["packing"]:
            lora.check_packing(self.learner, self.prepared.samples)
        if self.learner.device.type == "cuda":
            self.probe()
        signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _ask_to_stop(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.stop_asked = True

    # --- steps -----------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[rows.Row]:
        """Do every step that is left; each gives its line of steps.jsonl once the weights have changed."""
        stream = self.prepared.plan.stream(skip=self.at.step * self.prepared.accumulation)
        while self.at.step < self.prepared.steps and not self._has_waited():
            micros = list(itertools.islice(stream, self._micros_of_step()))
            began = time.monotonic()
            epoch = micros[0][0]
            rate = self.rate()
            norm = self._learn([micro for _, micro in micros], rate)
            line = self._line(norm, rate, time.monotonic() - began)
            yield {**line, "epoch": epoch, **self._tested()}

    def _micros_of_step(self) -> int:
        """Fewer in the last step where epochs decide how many there are."""
        left = math.inf if self.prepared.micros is None else self.prepared.micros
        return int(min(self.prepared.accumulation, left - self.at.step * self.prepared.accumulation))

    def _learn(self, micros: list[Micro], rate: float) -> float:
        """One step on the mean loss of all tokens learned in it, in whichever micro-batch; the norm of its gradient."""
        targets = sum(self.prepared.samples[index].targets for micro in micros for index in micro)
        while self.at.micro < len(micros):
            if self.stop_asked:
                self.save()
                say(f"stopped after {self.at.step} steps and {self.at.micro} micro-batches of the next; saved")
                sys.exit(_STOPPED)
            batch = self._batch(micros[self.at.micro])
            self.at.loss += self._backward(batch, targets)
            self.at.tokens += batch.tokens
            self.at.targets += batch.targets
            self.at.micro += 1
        norm = lora.update(self.learner, rate, self.prepared.params["clip"])
        if not math.isfinite(norm):
            raise self._diverged(f"In step {self.at.step + 1} the gradient")
        self.at.step, self.at.micro = self.at.step + 1, 0
        self._refuse_idle_layers()
        return norm

    def _batch(self, micro: Micro) -> Batch:
        samples = [self.prepared.samples[index] for index in micro]
        return batches.collate(samples, self.learner.pad_id, packing=self.prepared.params["packing"])

    def _backward(self, batch: Batch, targets: int) -> float:
        """Add a micro-batch's part to the gradients; its part of the step's loss."""
        import torch

        try:
            loss = lora.loss_sum(self.learner, batch) / targets
            loss.backward()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"A micro-batch of {batch.inputs['input_ids'].numel()} tokens does not fit into the memory of "
                f"{self.learner.device}. {self._safe()}",
                "--set batch_tokens=… (fewer), --set activation_checkpointing=true, or a larger GPU",
            ) from error
        part = float(loss.detach())
        if not math.isfinite(part):
            raise self._diverged(f"In step {self.at.step + 1} the loss")
        return part

    def rate(self) -> float:
        """The learning rate of the step that is next: up over the warm-up, then as the schedule has it."""
        params = self.prepared.params
        done = self.at.step / self.prepared.steps
        falls = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return float(params["lr"] * min(1.0, (self.at.step + 1) / max(params["warmup"], 1)) * falls[params["schedule"]])

    def _line(self, norm: float, rate: float, seconds: float) -> rows.Row:
        """What steps.jsonl says of the step that was just done; the counts of the next one begin anew."""
        at = self.at
        at.seconds += seconds
        at.tokens_all += at.tokens
        at.targets_all += at.targets
        line: rows.Row = {
            "key": f"step/{at.step}",
            "error": None,
            "step": at.step,
            "loss": at.loss,
            "grad_norm": norm,
            "lr": rate,
            "tokens": at.tokens,
            "targets": at.targets,
            "tokens_per_second": round(at.tokens / seconds, 2),
            "targets_per_second": round(at.targets / seconds, 2),
            "memory_bytes": self._memory_bytes(),
            "eta_s": round(at.seconds / at.step * (self.prepared.steps - at.step), 1),
            "at": times.now(),
        }
        at.loss, at.tokens, at.targets = 0.0, 0, 0
        return line

    def _memory_bytes(self) -> int:
        """The most that was held so far, by the GPU or else by this process."""
        import torch

        if self.learner.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.learner.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _tested(self) -> dict[str, Any]:
        """The mean loss of the rows held out, when it is their turn; random numbers are not drawn for it."""
        params = self.prepared.params
        is_due = self.at.step % params["eval_every"] == 0 or self.at.step == self.prepared.steps
        if not self.prepared.held or not is_due:
            return {}
        total = 0.0
        with lora.unchanging(self.learner):
            for sample in self.prepared.held:
                batch = batches.collate([sample], self.learner.pad_id, packing=False)
                total += float(lora.loss_sum(self.learner, batch))
        if not math.isfinite(total):
            raise self._diverged(f"After step {self.at.step} the loss of the rows held out")
        loss = total / sum(sample.targets for sample in self.prepared.held)
        return {"eval_loss": loss, **self._compared(loss)}

    def _compared(self, loss: float) -> dict[str, Any]:
        """What a line says of early stopping; an adapter better than all before is held."""
        if not self.prepared.params["patience"]:
            return {}
        at = self.at
        if at.best_loss is None or loss < at.best_loss - self.prepared.params["min_delta"]:
            at.best_loss, at.best_step, at.waited = loss, at.step, 0
            self.best = lora.adapter_files(self.learner, "")[lora.WEIGHTS]
        else:
            at.waited += 1
        return {"best_step": at.best_step, "stops_early": self._has_waited() and at.step < self.prepared.steps}

    def _has_waited(self) -> bool:
        """Whether the loss on the rows held out has not become better for as long as was asked."""
        return bool(0 < self.prepared.params["patience"] <= self.at.waited)

    def probe(self) -> None:
        """Hold the largest micro-batch once, so that memory runs out now or never; nothing is learned of it."""
        states = lora.random_states(self.learner)
        grads = {name: each.grad for name, each in self.learner.weights.items()}
        micros = self.prepared.plan.epoch(0)
        sizes = {micro: len(micro) * max(self.prepared.plan.lengths[index] for index in micro) for micro in micros}
        self._backward(self._batch(max(micros, key=sizes.__getitem__)), 1)
        for name, each in self.learner.weights.items():
            each.grad = grads[name]
        lora.set_random_states(self.learner, states)

    def _refuse_idle_layers(self) -> None:
        if self.at.step != min(IDLE_STEPS, self.prepared.steps):
            return
        if idle := lora.idle_layers(self.learner):
            raise NothingLearned(
                f"After {self.at.step} steps {len(idle)} adapter layers are as they were made, such as {idle[0]}: "
                f"no gradient reaches them. {self._safe()}",
                "Name other targets, or --set activation_checkpointing=false",
            )

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            f"{what} is not a number any more. {self._safe()}",
            "Start a new run with a smaller lr, more warmup, or a smaller clip.",
        )

    def _safe(self) -> str:
        found = self.run.checkpoints()
        return f"{found[-1].name} is safe." if found else "There is no checkpoint yet."

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Have all that the next micro-batch depends on in a checkpoint; older ones go, all but the one before."""
        from safetensors.torch import save

        tensors, values = lora.state(self.learner)
        state = {"at": asdict(self.at), "values": values, "tensors": sorted(tensors)}
        files = {**self._adapter(), TENSORS: save(tensors), STATE: json.dumps(state).encode() + b"\n"}
        if self.at.best_step not in (0, self.at.step):
            files[BEST] = self.best
        checkpoints.save(self.run, rundir.checkpoint_name(self.at.step, self.at.micro), files)
        checkpoints.retire(self.run)

    def _restored(self) -> Path | None:
        """The checkpoint that is gone on from: the newest with all that is needed; else its failure is raised."""
        refused: dict[Path, lora.StateMismatch] = {}
        for folder in checkpoints.whole(self.run, say):
            try:
                self.restore(folder)
            except AnotherTraining:
                raise
            except lora.StateMismatch as why:
                refused[folder] = why
                say(f"{folder.name} is passed over, the one before it is looked at: {why.message}")
                continue
            for passed in refused:
                checkpoints.discard(passed)
            return folder
        if refused:
            raise next(iter(refused.values()))
        return None

    def restore(self, folder: Path) -> None:
        """Take over a checkpoint that was found whole. AnotherTraining; lora.StateMismatch when a part is missing."""
        from safetensors.torch import load

        try:
            about, state = (durable.load_json(folder / name) for name in (ABOUT, STATE))
            adapter, tensors = ((folder / name).read_bytes() for name in (lora.WEIGHTS, TENSORS))
            made_for, at, values = about["fingerprint"], Standing(**state["at"]), state["values"]
            listed = state["tensors"]
            best = adapter if at.best_step in (0, at.step) else (folder / BEST).read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise lora.mismatch(f"{folder.name} lacks {error}") from error
        if made_for != self.prepared.fingerprint:
            raise AnotherTraining(
                f"{folder.name} belongs to another training ({about.get('model')}). Nothing was trained.",
                "Start a new run.",
            )
        found = load(tensors)
        if lost := sorted(set(listed) - found.keys()):
            raise lora.mismatch(f"it lacks {lost[0]}")
        lora.load_adapter(self.learner, adapter)
        lora.restore(self.learner, found, values, stepped=at.step > 0)
        self.at, self.best = at, best

    def finish(self) -> None:
        """Have the adapter in the run's folder, as peft reads it: with `patience` the best one, else the last."""
        files, at = self._adapter(self.at.best_step or self.at.step), self.at
        if at.best_step:
            files[lora.WEIGHTS] = self.best
            say(f"of {at.step} steps number {at.best_step} was the best (loss {at.best_loss:.4f} on the rows held out)")
        checkpoints.save(self.run, ADAPTER, files)

    def _adapter(self, step: int | None = None) -> dict[str, bytes]:
        """The adapter's files, with what it was trained on: another base is refused by it."""
        model = self.prepared.params["model"]
        about = {
            "model": model,
            "model_digest": self.prepared.identity["model_digest"],
            "fingerprint": self.prepared.fingerprint,
            "step": self.at.step if step is None else step,
        }
        return {**lora.adapter_files(self.learner, model), ABOUT: json.dumps(about, indent=1).encode() + b"\n"}


def say(words: str) -> None:
    """Write a line into the run's log."""
    print(words, flush=True)  # noqa: T201 -- the worker's log is its standard output

"""The story of a training: rows → micro-batches → steps → checkpoints → adapter; a killed one ends just the same."""

from __future__ import annotations

import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from jobs import durable, rows, rundir, times
from worker import batches, checkpoints, curriculum, curves, facts, lora, merging, portions, ranks, resolve
from worker.batches import Batch, Micro
from worker.curriculum import Prepared
from worker.failures import Diverged, NothingLearned, OutOfMemory
from worker.portions import Portion
from worker.progress import Progress
from worker.ranks import Ranks

ADAPTER = "adapter"
ABOUT, STATE, TENSORS, BEST = "training.json", "state.json", "state.safetensors", "best.safetensors"
IDLE_STEPS = 5
"""After so many steps every adapter layer has learned something, or nothing reaches it."""
_STOPPED = 128 + signal.SIGTERM


class AnotherTraining(lora.StateMismatch):
    """A checkpoint of other rows, settings or weights; nothing of it was used."""


@dataclass
class Standing:
    """How far a training is in whole steps."""

    step: int = 0
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
        with ranks.gathered(attempt, job, prepared.processes) as together:
            training = Training(run, prepared, lora.load(prepared.request, prepared.settings), together)
            say(training.learner.loss.words())
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


def assist(run: rundir.Run, job: dict[str, Any], together: Ranks) -> None:
    """Take part in a training that another process tells of: the same steps, and nothing is written."""
    prepared = curriculum.prepare(job, run, lambda _: None).on(together.rank)
    training = Training(run, prepared, lora.load(prepared.request, prepared.settings), together)
    training.begin()
    for _ in training.steps():
        pass


check = curriculum.check
"""What a dry run says, without a model."""


@dataclass
class Training:
    """A training under way: what it learns from, the model, how far it is, and what this process adds to it."""

    run: rundir.Run
    prepared: Prepared
    learner: lora.Learner
    ranks: Ranks = field(default_factory=Ranks)
    at: Standing = field(default_factory=Standing)
    mine: Portion = field(default_factory=Portion)
    """What this process has done of the step that has begun."""
    done: list[int] = field(default_factory=list)
    """Micro-batches of that step that a checkpoint holds already, whoever did them."""
    stop_asked: bool = False
    best: bytes = b""
    """The adapter's weights after `at.best_step` steps."""

    def begin(self) -> None:
        """Go on from the newest whole checkpoint, or begin; from here on a TERM saves before it ends the worker."""
        self.ranks.join(self.learner.device)
        folder = self.ranks.led(self._restored)
        if folder and self.ranks.is_first:
            say(f"going on from {folder.name}: {self.at.step} of {self.prepared.steps} steps are done")
        elif folder:
            self.restore(folder)
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
            micros = list(itertools.islice(stream, self.prepared.micros_of(self.at.step)))
            began = time.monotonic()
            epoch = micros[0][0]
            rate = self.prepared.rate(self.at.step)
            did, norm = self._learn([micro for _, micro in micros], rate)
            line = self._line(did, norm, time.monotonic() - began)
            yield {**line, "lr": rate, "epoch": epoch, **self._tested()}

    def _learn(self, micros: list[Micro], rate: float) -> tuple[Portion, float]:
        """One step on the mean loss of all tokens learned in it, whoever learns them; what was done, and the norm."""
        targets = sum(self.prepared.samples[index].targets for micro in micros for index in micro)
        for place in portions.places(len(micros), self.done, self.ranks.rank, self.ranks.size):
            if self.stop_asked:
                break
            self._learn_micro(place, micros[place], targets)
        did = self.ranks.meet(self.mine)
        step = portions.total(did)
        if len(step.done) < len(micros):
            self._stop(did)
        self.ranks.add_up(list(self.learner.weights.values()))
        norm = lora.update(self.learner, rate, self.prepared.params["clip"])
        if not math.isfinite(norm):
            raise self._diverged(f"In step {self.at.step + 1} the gradient")
        self.at.step += 1
        self.mine, self.done = Portion(), []
        self._refuse_idle_layers()
        return step, norm

    def _learn_micro(self, place: int, micro: Micro, targets: int) -> None:
        """Add one micro-batch; what is dropped out follows from where it stands, so that it is the same for anybody."""
        params = self.prepared.params
        lora.seed(f"{params['seed']}/{self.at.step * self.prepared.accumulation + place}")
        batch = self._batch(micro)
        self.mine.loss += self._backward(batch, targets)
        self.mine.tokens += batch.tokens
        self.mine.targets += batch.targets
        self.mine.done.append(place)

    def _stop(self, did: list[Portion]) -> NoReturn:
        """End this process between two micro-batches; the first saves what all of them have."""
        held = self.ranks.collect(lora.gradients(self.learner))
        if not self.ranks.is_first:
            sys.exit(0)
        self.save(did, held)
        micros = len(portions.total(did).done)
        say(f"stopped after {self.at.step} steps and {micros} micro-batches of the next; saved")
        sys.exit(_STOPPED)

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

    def _line(self, did: Portion, norm: float, seconds: float) -> rows.Row:
        """What steps.jsonl says of the step that was just done."""
        at = self.at
        at.seconds += seconds
        at.tokens_all += did.tokens
        at.targets_all += did.targets
        return {
            "key": f"step/{at.step}",
            "error": None,
            "step": at.step,
            "loss": did.loss,
            "grad_norm": norm,
            "tokens": did.tokens,
            "targets": did.targets,
            "tokens_per_second": round(did.tokens / seconds, 2),
            "targets_per_second": round(did.targets / seconds, 2),
            "memory_bytes": max(self.ranks.meet(lora.memory_bytes(self.learner))),
            "processes": self.ranks.size,
            "eta_s": round(at.seconds / at.step * (self.prepared.steps - at.step), 1),
            "at": times.now(),
        }

    def _tested(self) -> dict[str, Any]:
        """The mean loss of the rows held out, when it is their turn; each process has its part of them."""
        params = self.prepared.params
        is_due = self.at.step % params["eval_every"] == 0 or self.at.step == self.prepared.steps
        if not self.prepared.held or not is_due:
            return {}
        part = 0.0
        with lora.unchanging(self.learner):
            for sample in self.prepared.held[self.ranks.rank :: self.ranks.size]:
                batch = batches.collate([sample], self.learner.pad_id, packing=False)
                part += float(lora.loss_sum(self.learner, batch))
        total = sum(self.ranks.meet(part))
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
        grads = {name: each.grad for name, each in self.learner.weights.items()}
        micros = self.prepared.plan.epoch(0)
        sizes = {micro: len(micro) * max(self.prepared.plan.lengths[index] for index in micro) for micro in micros}
        self._backward(self._batch(max(micros, key=sizes.__getitem__)), 1)
        for name, each in self.learner.weights.items():
            each.grad = grads[name]

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

    def save(self, did: Sequence[Portion] = (), held: Sequence[Mapping[str, Any]] = ()) -> None:
        """Have all that the next micro-batch depends on in a checkpoint; older ones go, all but the one before.

        Of a step that has begun: what each process did, and the gradients that it holds.
        """
        from safetensors.torch import save

        did = did or [Portion()] * self.ranks.size
        tensors, values = lora.state(self.learner)
        tensors |= portions.named(held)
        state = {"at": asdict(self.at), "portions": [asdict(each) for each in did]}
        state |= {"values": values, "tensors": sorted(tensors)}
        files = {**self._adapter(), TENSORS: save(tensors), STATE: json.dumps(state).encode() + b"\n"}
        if self.at.best_step not in (0, self.at.step):
            files[BEST] = self.best
        checkpoints.save(self.run, rundir.checkpoint_name(self.at.step, len(portions.total(did).done)), files)
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
            listed, did = state["tensors"], [Portion(**each) for each in state["portions"]]
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
        self.mine, gradients = portions.dealt(did, found, self.ranks.rank, self.ranks.size)
        lora.set_gradients(self.learner, gradients)
        self.at, self.best, self.done = at, best, portions.total(did).done
        if len(did) != self.ranks.size and self.ranks.is_first:
            say(portions.ANOTHER_NUMBER.format(before=len(did), now=self.ranks.size))

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

"""What a training will learn from, settled before weights load: rows as tokens, what is learned of them, the plan."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from jobs import rundir, spec
from worker import builtin, continuing, lora, models, ranks, sources, wanted
from worker.batches import Budget, Plan
from worker.conversations import Encoder, LeftOut, Sample, shown
from worker.failures import ConfigFailure
from worker.prompts import Renderer, context_length

SHOWN_ROWS, SHOWN_REASONS = 3, 8
LeftOuts = dict[str, list[int]]
"""The numbers of the rows that nothing can be learned from, counted from 1, by why."""
_MADE_UP_MAX = 4096
"""Rows of random tokens: with more, steps would not take another time."""
_CHANGES = (
    *("steps", "epochs", "lr", "rank", "alpha", "dropout", "targets", "quantization", "optimizer", "max_length"),
    *("batch_size", "batch_tokens", "accumulation", "packing", "mix", "schedule", "warmup", "weight_decay", "clip"),
    *("eval_rows", "activation_checkpointing", "seed", "patience", "min_delta"),
)
"""Parameters that change the weights that come out. How often they are saved does not."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Everything settled before the first step."""

    params: dict[str, Any]
    request: models.ModelRequest
    settings: lora.Settings
    tokenizer: Any
    samples: list[Sample]
    held: list[Sample]
    """Rows that are only tested on."""
    plan: Plan
    micros: int | None
    """How many micro-batches there are in all; None where `steps` decides."""
    left_out: LeftOuts
    """The rows that nothing can be learned from."""
    identity: dict[str, Any]
    device: str
    processes: int
    """How many share the micro-batches of each step; the weights do not depend on it, but for rounding."""

    def on(self, rank: int) -> Prepared:
        """The same on the GPU of a process that is not the first."""
        device = f"cuda:{rank}" if self.device == "cuda" else self.device
        return dataclasses.replace(self, request=dataclasses.replace(self.request, device=device))

    @property
    def steps(self) -> int:
        """How many steps there will be."""
        return int(self.params["steps"]) if self.micros is None else math.ceil(self.micros / self.accumulation)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return int(self.params["accumulation"])

    @property
    def fingerprint(self) -> str:
        """What tells this training from every other."""
        return spec.digest(self.identity)

    def first_rows(self) -> list[str]:
        """The first rows as the model sees them, with what is learned of them marked."""
        return [shown(sample, self.tokenizer) for sample in self.samples[:SHOWN_ROWS]]

    def resolved(self) -> dict[str, Any]:
        """The document of resolved.json."""
        return {
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "device": self.device,
            "model": self.params["model"],
            "first_prompt": self.first_rows()[0],
            "warnings": self.warnings(),
        }

    def micros_of(self, step: int) -> int:
        """Micro-batches of the step after so many: fewer in the last one where epochs decide how many there are."""
        left = math.inf if self.micros is None else self.micros
        return int(min(self.accumulation, left - step * self.accumulation))

    def rate(self, step: int) -> float:
        """The learning rate of the step after so many: up over the warm-up, then as the schedule has it."""
        done = step / self.steps
        falls = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        warm = min(1.0, (step + 1) / max(self.params["warmup"], 1))
        return float(self.params["lr"] * warm * falls[self.params["schedule"]])

    def warnings(self) -> list[str]:
        """What a person should know of the rows before they are learned."""
        idle = ranks.gpus(self.device) - self.processes
        return [
            *(f"{count} rows are left out: {why}." for count, why in _in_words(self.left_out)),
            *([f"{idle} GPUs of this machine do nothing: {self.processes} share the micro-batches."] * (idle > 0)),
        ]


def prepare(job: dict[str, Any], run: rundir.Run, say: Say) -> Prepared:
    """Read the dataset, tokenize and mask every row, plan the steps. Trains the built-in model when it is asked for.

    Raises ConfigFailure for what cannot be read, and when more rows than `left_out` allows teach nothing.
    """
    return _prepare(job, lambda: builtin.folder(run, say), run.identity(), say)


def rehearse(job: dict[str, Any], scratch: Path, say: Say) -> Prepared:
    """The same without a model: of the built-in one only the tokenizer is made, in the folder `scratch`."""
    return _prepare(job, lambda: builtin.outline(scratch), {}, say)


def unseen(params: dict[str, Any]) -> str:
    """What of a training's tokenizer and rows is not on this computer, in words; empty when all of it is."""
    from huggingface_hub import try_to_load_from_cache

    for name in filter(None, (_source(params).dataset, params["mix"] and params["mix_dataset"])):
        if name != sources.GENERATED and not sources.is_path(name):
            return f"the dataset {name} is on the Hub"
    model, revision = params["model"], params["revision"]
    needed = ("config.json", "tokenizer_config.json")
    if model == builtin.NAME or Path(model).is_dir():
        return ""
    kept = [try_to_load_from_cache(model, file, revision=revision) for file in needed]
    return "" if all(isinstance(path, str) for path in kept) else f"the tokenizer of {model} is not here"


def check(job: dict[str, Any]) -> dict[str, Any]:
    """What a dry run says: the first rows as they are learned, what is left out, and how many steps. Loads no model.

    Of a job that says `at_hand`, `unseen` tells what would have to be fetched first, and nothing else is done.
    """
    if job.get("at_hand") and (why := unseen(job["params"])):
        return {"unseen": why}
    with tempfile.TemporaryDirectory() as scratch:
        prepared = rehearse(job, Path(scratch), lambda _: None)
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


def _prepare(job: dict[str, Any], built_in: Callable[[], Path], known: dict[str, Any], say: Say) -> Prepared:
    params = job["params"]
    _check(params)
    say("reading the dataset")
    records = sources.load(_source(params))
    mixed = sources.load(sources.Source(params["mix_dataset"], params["split"])) if params["mix"] else None
    request = _request(params, built_in() if params["model"] == builtin.NAME else None, known)
    if request.adapter is not None:
        continuing.check(params, request)
    renderer = Renderer(models.load_tokenizer(request), params["chat_template"])
    encoder = _encoder(params, request, renderer)
    rows = records.rows[: job["limit"]]
    say(f"tokenizing {len(rows)} rows")
    left_out: LeftOuts = {}
    samples = _encoded(encoder, rows, left_out)
    _refuse_too_few(samples, left_out, params["left_out"])
    held, samples = _held(samples, params)
    if mixed is not None:
        lost: LeftOuts = {}
        other = _encoded(encoder, mixed.rows, lost)
        _refuse_too_few(other, lost, params["left_out"])
        samples += _mixed(other, len(samples), params)
        left_out |= {f"{why}, in {params['mix_dataset']}": numbers for why, numbers in lost.items()}
    device = str(models.choose_device(request.device))
    plan = Plan([len(sample) for sample in samples], _budget(params), params["seed"])
    digests = {"dataset_digest": records.digest, "mix_digest": mixed.digest if mixed else None, "limit": job["limit"]}
    return Prepared(
        params=params,
        request=request,
        settings=lora.Settings.of(params),
        tokenizer=renderer.tokenizer,
        samples=samples,
        held=held,
        plan=plan,
        micros=None if params["steps"] else plan.count(params["epochs"]),
        left_out=left_out,
        identity=_identity(params, request, renderer) | digests,
        device=device,
        processes=ranks.count(params, device),
    )


def _check(params: dict[str, Any]) -> None:
    """Raise ConfigFailure for parameters that do not go together."""
    if bool(params["mix"]) is not bool(params["mix_dataset"]):
        raise ConfigFailure("mix and mix_dataset belong together.", "--set mix=0.1 --set mix_dataset=old.jsonl")
    if params["patience"] and not params["eval_rows"]:
        raise ConfigFailure(
            f"patience={params['patience']} waits for the loss on rows held out, and none are.",
            "--set eval_rows=100",
        )
    if params["dtype"] in ("float16", "float64"):
        raise ConfigFailure(
            f"dtype={params['dtype']} cannot be trained with: gradients that are small become zero in float16, and "
            "float64 is for comparisons only.",
            "--set dtype=bfloat16, or float32",
        )


def _source(params: dict[str, Any]) -> sources.Source:
    """Where the rows come from; `auto` is there for the built-in model alone."""
    dataset = params["dataset"]
    if dataset == "auto" and params["model"] != builtin.NAME:
        raise ConfigFailure("A training needs rows to learn from.", "--set dataset=train.jsonl, or a name on the Hub")
    return sources.Source(sources.GENERATED if dataset == "auto" else dataset, params["split"])


def _request(params: dict[str, Any], model: Path | None, known: dict[str, Any]) -> models.ModelRequest:
    """Which model to load; a device whose own choice is float16 trains in float32."""
    request = wanted.model(params, model, known)
    return request if models.dtype_name(request) != "float16" else dataclasses.replace(request, dtype="float32")


def _encoder(params: dict[str, Any], request: models.ModelRequest, renderer: Renderer) -> Encoder:
    """What turns rows into samples; the longest row fits the model and a micro-batch."""
    if renderer.template is None and not renderer.plain:
        renderer.ids([{"role": "user", "content": "?"}])  # says that there is no template, and what to do
    context = context_length(models.load_config(request))
    if context is not None and params["max_length"] > context:
        raise ConfigFailure(
            f"max_length={params['max_length']}, but the model's context holds {context} tokens.",
            f"--set max_length={context}",
        )
    ends = models.end_token_ids(models.load_generation_config(request), renderer.tokenizer)
    return Encoder(renderer, ends, min(params["max_length"], params["batch_tokens"] or params["max_length"]))


def _encoded(encoder: Encoder, rows: list[dict[str, Any]], left_out: LeftOuts) -> list[Sample]:
    """The rows as samples; what cannot be learned from is noted by its number."""
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(encoder.encode(number, row))
        except LeftOut as why:
            left_out.setdefault(str(why), []).append(number)
    return found


def _in_words(left_out: LeftOuts) -> list[tuple[int, str]]:
    """How many rows are left out and why, with the numbers of the first ones; the most first, and not endlessly."""
    found = []
    for why, numbers in sorted(left_out.items(), key=lambda entry: -len(entry[1]))[:SHOWN_REASONS]:
        first = ", ".join(map(str, numbers[:SHOWN_ROWS])) + (", …" if len(numbers) > SHOWN_ROWS else "")
        found.append((len(numbers), f"{why} (row {first})"))
    others = sum(map(len, left_out.values())) - sum(count for count, _ in found)
    return [*found, (others, "other reasons")] if others else found


def _refuse_too_few(samples: list[Sample], left_out: LeftOuts, most: float) -> None:
    """Raise ConfigFailure when more than that share of the rows teaches nothing."""
    lost = sum(map(len, left_out.values()))
    if not samples or lost > most * (lost + len(samples)):
        reasons = "; ".join(f"{count} rows: {why}" for count, why in _in_words(left_out))
        raise ConfigFailure(
            f"Of {lost + len(samples)} rows {lost} cannot be learned from ({reasons}). Nothing was trained.",
            "Mend the rows, raise max_length, or allow it: --set left_out=0.5",
        )


def _held(samples: list[Sample], params: dict[str, Any]) -> tuple[list[Sample], list[Sample]]:
    """The rows that are only tested on, drawn by the seed, and the others."""
    count = params["eval_rows"]
    if count >= len(samples):
        raise ConfigFailure(
            f"eval_rows={count} leaves none of the {len(samples)} rows to learn from.", "Ask for fewer."
        )
    drawn = set(Random(f"{params['seed']}/held").sample(range(len(samples)), count))  # noqa: S311
    return [samples[at] for at in sorted(drawn)], [each for at, each in enumerate(samples) if at not in drawn]


def _mixed(other: list[Sample], count: int, params: dict[str, Any]) -> list[Sample]:
    """As many of the other rows as make up the share that was asked for, drawn by the seed."""
    share = params["mix"]
    wanted = round(share / (1 - share) * count)
    if wanted > len(other):
        raise ConfigFailure(
            f"mix={share} of {count} rows takes {wanted} others; {params['mix_dataset']} has {len(other)}.",
            f"--set mix={len(other) / (len(other) + count):.3f} is the most there is.",
        )
    return Random(f"{params['seed']}/mixed").sample(other, wanted)  # noqa: S311


def _budget(params: dict[str, Any]) -> Budget:
    """Rows or tokens of a micro-batch; packed rows are counted in tokens whichever was asked for."""
    tokens = params["batch_tokens"] or params["batch_size"] * params["max_length"]
    return Budget(None if params["batch_tokens"] else params["batch_size"], tokens, params["packing"])


def _identity(params: dict[str, Any], request: models.ModelRequest, renderer: Renderer) -> dict[str, Any]:
    return {
        "story": "train",
        "model_digest": models.digest(request.model, request.revision),
        "template_digest": renderer.template_digest,
        "dtype": models.dtype_name(request),
        "adapter_digest": None if request.adapter is None else models.digest(request.adapter, None),
        "eval_every": params["eval_every"] if params["patience"] else None,
        **{name: params[name] for name in _CHANGES},
    }


def show(prepared: Prepared, say: Say) -> None:
    """Say what will be learned: the first rows with their targets marked, what is left out, and how many steps."""
    for row in prepared.first_rows():
        say(row)
    for warning in prepared.warnings():
        say(f"warning: {warning}")
    tokens = sum(map(len, prepared.samples))
    targets = sum(sample.targets for sample in prepared.samples)
    say(
        f"{len(prepared.samples)} rows of {tokens} tokens, {targets} of them learned; {len(prepared.held)} rows held "
        f"out; {prepared.steps} steps of {prepared.accumulation} micro-batches in {prepared.processes} processes"
    )


def made_up(params: dict[str, Any], folder: Path) -> Prepared:
    """A training on rows of random tokens, as many as its steps take; `folder` is the built-in model's, or its outline.

    No tokenizer is needed: of a model on the Hub nothing is read but its configuration.
    """
    _check(params)
    request = _request(params, folder if params["model"] == builtin.NAME else None, {})
    config = models.load_config(request)
    budget, length = _budget(params), params["row_tokens"] or min(params["max_length"], _budget(params).tokens)
    _refuse_too_long(length, budget, context_length(config))
    words, chance = config.get_text_config().vocab_size, Random(f"{params['seed']}/made up")  # noqa: S311
    learned = max(1, min(length - 1, round(length * params["learned"])))
    rows = params["steps"] * params["accumulation"] * (budget.rows or 1) * max(1, budget.tokens // length)
    samples = [
        Sample(number, array("q", chance.choices(range(words), k=length)), ((length - learned, length),))
        for number in range(1, min(rows, _MADE_UP_MAX) + 1)
    ]
    return Prepared(
        params=params,
        request=request,
        settings=lora.Settings.of(params),
        tokenizer=None,
        samples=samples,
        held=[],
        plan=Plan([length] * len(samples), budget, params["seed"]),
        micros=None,
        left_out={},
        identity={
            "story": "speed",
            "model": params["model"],
            "rows": length,
            **{name: params[name] for name in _CHANGES},
        },
        device=str(models.choose_device(request.device)),
        processes=1,
    )


def _refuse_too_long(length: int, budget: Budget, context: int | None) -> None:
    most = min(budget.tokens, context or budget.tokens)
    if not 2 <= length <= most:
        raise ConfigFailure(f"Rows of {length} tokens: 2 to {most} have room.", f"--set row_tokens={most}")

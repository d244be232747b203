"""Adapter layers on a frozen model and what trains them: float32 weights, optimizer, and all of it as tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from worker import batches, continuing, losses, models, quantization
from worker.conversations import Sample
from worker.failures import ConfigFailure, WorkerFailure

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The files of an adapter, as peft names and reads them."""
PACKED_TOLERANCE = 0.02
"""Of the largest logit: rounding alone moves a packed row's logits less, another row's tokens far more."""
_PACKED_ROWS = 3
_PACKED_TOKENS = 64


class StateMismatch(WorkerFailure):
    """A checkpoint does not hold what this training needs to go on exactly; nothing of it was used."""

    kind = "state"


@dataclass(frozen=True)
class Settings:
    """How the adapter is made and trained, as asked for; `targets` are module names or `all-linear`."""

    rank: int
    alpha: float
    dropout: float
    targets: str
    optimizer: str
    lr: float
    weight_decay: float
    activation_checkpointing: bool
    seed: int

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Settings:
        """Those of a job's parameters."""
        return cls(**{entry.name: params[entry.name] for entry in dataclasses.fields(cls)})


@dataclass
class Learner:
    """A model with trainable adapter layers and their optimizer."""

    model: Any
    tokenizer: Any
    optimizer: Any
    device: Any
    weights: dict[str, Any]
    """Every trainable parameter by its name, all float32."""
    begun: dict[str, Any] = field(default_factory=dict)
    """What each lora_B was before the first step, on the CPU, where it was not zero."""
    loss: losses.Loss = field(init=False)

    def __post_init__(self) -> None:
        self.loss = losses.Loss(self.model)

    @property
    def pad_id(self) -> int:
        """What fills up short rows; never learned and never looked at, so any token will do."""
        return int(getattr(self.tokenizer, "pad_token_id", None) or 0)


def load(request: models.ModelRequest, settings: Settings) -> Learner:
    """The model, frozen, with adapter layers that the seed decides, or the request's own; raises ConfigFailure."""
    learner = fit(models.load_model(dataclasses.replace(request, adapter=None)), settings)
    if request.adapter is not None:
        continuing.take_over(learner, request.adapter)
    return learner


def fit(loaded: models.LoadedModel, settings: Settings) -> Learner:
    """A model that is loaded already, with new adapter layers."""
    import torch
    from peft import LoraConfig, get_peft_model

    if loaded.device.type == "cuda":
        torch.cuda.set_device(loaded.device)  # some kernels run on the current one whatever they are given
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(settings.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks for names that transformers 6 will not have
            model = get_peft_model(loaded.model, config).train()
            if settings.activation_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:  # no module of that name
        raise ConfigFailure(f"targets={settings.targets}: {error}", "--set targets=all-linear") from error
    weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
    wrong = [name for name, each in weights.items() if each.dtype != torch.float32]
    if wrong:
        raise WorkerFailure(f"{wrong[0]} is not float32: training it in fewer bits would lose most of its steps.")
    learner = Learner(model, loaded.tokenizer, _optimizer(settings, weights), loaded.device, weights)
    with unchanging(learner):
        learner.loss = losses.Loss.of(model)
    return learner


def _targets(words: str) -> str | list[str]:
    return words if words == "all-linear" else [word.strip() for word in words.split(",") if word.strip()]


def _optimizer(settings: Settings, weights: Mapping[str, Any]) -> Any:
    how = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw_8bit":
        quantization.have_bitsandbytes("optimizer=adamw_8bit")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(list(weights.values()), **how)
    from torch.optim import AdamW

    return AdamW(list(weights.values()), **how)


# --- one step --------------------------------------------------------------------------------------------------------


def loss_sum(learner: Learner, batch: batches.Batch) -> Any:
    """The cross-entropy of all tokens that are learned, added up; logits are made at their positions alone."""
    inputs = {name: tensor.to(learner.device) for name, tensor in batch.inputs.items()}
    return learner.loss.sum(inputs, batch.keep.to(learner.device), batch.labels)


def _logits(learner: Learner, batch: batches.Batch) -> Any:
    inputs = {name: tensor.to(learner.device) for name, tensor in batch.inputs.items()}
    return losses.logits(learner.model, inputs, batch.keep.to(learner.device))


def seed(words: str) -> None:
    """Have what is dropped out from here on follow from these words alone."""
    import torch

    torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big"))


def update(learner: Learner, lr: float, clip: float) -> float:
    """One step of the optimizer with the gradients there are, which are then cleared; the norm they had.

    With a norm that is no number nothing is changed: the caller stops.
    """
    import torch

    norm = float(torch.nn.utils.clip_grad_norm_(list(learner.weights.values()), clip or math.inf))
    if math.isfinite(norm):
        for group in learner.optimizer.param_groups:
            group["lr"] = lr
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)
    return norm


def memory_bytes(learner: Learner) -> int:
    """The most that was held so far, by the GPU or else by this process."""
    import torch

    if learner.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(learner.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def unchanging(learner: Learner) -> Iterator[None]:
    """Inside the block nothing is dropped out and no gradient is kept."""
    import torch

    learner.model.eval()
    for module in learner.model.modules():
        # In evaluation mode bitsandbytes (0.50) lays 4-bit weights out anew on a CPU, and fails for some sizes.
        module.training = type(module).__name__ == "Linear4bit"
    try:
        with torch.no_grad():
            yield
    finally:
        learner.model.train()


def idle_layers(learner: Learner) -> list[str]:
    """Adapter layers that have learned nothing yet: their B is as it was made. Experts may not have been asked."""
    return [
        name
        for name, each in learner.weights.items()
        if "lora_B" in name
        and "expert" not in name
        and not bool((each.detach().cpu() - learner.begun.get(name, 0)).any())
    ]


def check_packing(learner: Learner, samples: Sequence[Sample]) -> None:
    """Compare rows packed together with the same rows alone; ConfigFailure when this model mixes them."""
    import torch

    rows = [_cut(sample) for sample in samples[:_PACKED_ROWS]]
    if len(rows) < 2:
        return
    with unchanging(learner):
        alone = [_logits(learner, batches.collate([row], learner.pad_id, packing=True)) for row in rows]
        packed = _logits(learner, batches.collate(rows, learner.pad_id, packing=True))
    apart = torch.cat(alone, dim=1).float()
    off = float((packed.float() - apart).abs().max() / apart.abs().max())
    if not off < PACKED_TOLERANCE:
        raise ConfigFailure(
            f"This model mixes rows that are packed together (logits move by {off:.1%}), so it would learn from "
            "answers to other questions. Nothing was trained.",
            "--set packing=false",
        )


def _cut(sample: Sample) -> Sample:
    """The sample's end, where something is learned: short, so that the comparison costs little."""
    end = sample.spans[0][1]
    start = max(0, end - _PACKED_TOKENS)
    return Sample(sample.number, sample.ids[start:end], ((max(1, sample.spans[0][0] - start), end - start),))


# --- as files --------------------------------------------------------------------------------------------------------


def adapter_files(learner: Learner, base: str) -> dict[str, bytes]:
    """The adapter as the files that peft reads, the same bytes for the same weights; `base` names its model."""
    from safetensors.torch import save

    config = learner.model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    tensors = {_peft_name(name): each.detach().cpu().clone() for name, each in learner.weights.items()}
    written = json.dumps(config, indent=1, sort_keys=True, default=str).encode() + b"\n"
    return {WEIGHTS: save(tensors, {"format": "pt"}), CONFIG: written}


def _peft_name(name: str) -> str:
    return name.replace(".default.", ".")


def load_adapter(learner: Learner, data: bytes) -> None:
    """Take over the weights that `adapter_files` wrote; StateMismatch unless each has its place and size."""
    import torch
    from safetensors.torch import load as parse

    found = parse(data)
    wanted = {_peft_name(name): each for name, each in learner.weights.items()}
    _match({name: tuple(each.shape) for name, each in found.items()}, {n: tuple(w.shape) for n, w in wanted.items()})
    with torch.no_grad():
        for name, each in wanted.items():
            each.copy_(found[name])


def state(learner: Learner) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's state, as tensors and as plain values."""
    tensors: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, each in learner.weights.items():
        for key, value in learner.optimizer.state.get(each, {}).items():
            (tensors if hasattr(value, "detach") else values)[f"optimizer/{name}/{key}"] = value
    return {name: each.detach().cpu().clone() for name, each in tensors.items()}, values


def gradients(learner: Learner) -> dict[str, Any]:
    """What was learned since the last step, of the weights that it has reached."""
    return {name: each.grad.cpu().clone() for name, each in learner.weights.items() if each.grad is not None}


def set_gradients(learner: Learner, found: Mapping[str, Any]) -> None:
    """Go on from what `gradients` gave."""
    for name, each in learner.weights.items():
        each.grad = found[name].to(each.device) if name in found else None


def restore(learner: Learner, tensors: Mapping[str, Any], values: Mapping[str, Any], *, stepped: bool) -> None:
    """Take over what `state` gave, and nothing of what there was.

    StateMismatch when a weight's part of it is missing (`stepped`: after a step there is one of each) or is of another.
    """
    known = {f"optimizer/{name}": each for name, each in learner.weights.items()}
    states: dict[str, dict[str, Any]] = {name: {} for name in known}
    for name, value in (*tensors.items(), *values.items()):
        if name.startswith("optimizer/"):
            owner, _, key = name.rpartition("/")
            if owner not in states:
                raise mismatch(f"it has {owner}, which this training has not")
            states[owner][key] = value
    without = [name for name, held in states.items() if stepped and not held]
    if without:
        raise mismatch(f"it lacks {without[0]}, so the optimizer would begin anew")
    learner.optimizer.state.clear()
    for name, held in states.items():
        if held:
            learner.optimizer.state[known[name]] = {key: _placed(key, each, known[name]) for key, each in held.items()}


def _placed(key: str, value: Any, weight: Any) -> Any:
    """A part of the optimizer's state where that weight is; AdamW's own count of steps stays with the CPU."""
    return value.to(weight.device) if hasattr(value, "to") and key != "step" else value


def _match(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wrong = sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise mismatch(f"{name} has the shape {found.get(name)}, needed is {wanted.get(name)}")


def mismatch(why: str) -> StateMismatch:
    """The failure of a checkpoint that does not fit."""
    return StateMismatch(
        f"The checkpoint does not fit this training: {why}. Nothing was trained.",
        "Resume where it was made, or start a new run.",
    )

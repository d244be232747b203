"""The adapter merged into the weights it was trained for, as a model of its own beside it."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import rundir
from worker import checkpoints, models
from worker.curriculum import Prepared
from worker.failures import ConfigFailure, DiskFull, WorkerFailure
from worker.prompts import Renderer

MERGED = "merged"
ABOUT = "training.json"
_SPARE_BYTES = 256 << 20
"""Beside the weights: tokenizer, settings, the adapter, and what else the run writes meanwhile."""
Say = Callable[[str], None]


def check(run: rundir.Run, prepared: Prepared) -> None:
    """Raise, before anything is trained, when what comes of it could not be merged, or would have no room."""
    config = models.load_config(prepared.request)
    shared = {"lm_head", "embed_tokens"} & {word.strip() for word in prepared.params["targets"].split(",")}
    if shared and getattr(config.get_text_config(), "tie_word_embeddings", False):
        raise ConfigFailure(
            f"{' and '.join(sorted(shared))} shares its weights with another layer, so an adapter on it cannot be "
            "merged without changing that one, too. Nothing was trained.",
            "Leave it out of targets, or --set merge=false",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigFailure(
            f"The weights of {prepared.request.model} are kept in fewer bits: merged, they would be those that were "
            "rounded, not its own. Nothing was trained.",
            "Train on its form in 16 bits (with quantization=nf4 if memory is short), or --set merge=false",
        )
    needed, free = size(prepared) + _SPARE_BYTES, shutil.disk_usage(run.folder).free
    if free < needed:
        raise DiskFull(
            f"merge=true needs {needed / 1e9:.1f} GB on the disk that holds {run.folder}, which has "
            f"{free / 1e9:.1f} GB left. What was trained so far is safe.",
            "Free some space there, or --set merge=false",
        )


def size(prepared: Prepared) -> int:
    """How many bytes the merged weights take."""
    import torch
    from transformers import AutoModelForCausalLM

    request = prepared.request
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            models.load_config(request), trust_remote_code=request.trust_remote_code
        )
    width = int(getattr(torch, models.dtype_name(request)).itemsize)
    return width * sum(int(each.numel()) for each in model.parameters())


def merge(run: rundir.Run, prepared: Prepared, say: Say) -> None:
    """Have the merged model in the run's folder: made on the CPU, of the adapter and the base in 16 or 32 bits."""
    if (run.folder / MERGED / rundir.MANIFEST).is_file() and rundir.damage(run.folder / MERGED) is None:
        return
    check(run, prepared)
    request = _base(run, prepared)
    if prepared.request.quantization != "none":
        say(
            f"The adapter learned on a base in {prepared.request.quantization}; it is merged into that base's own "
            f"weights in {request.dtype}, so answers may differ a little from those of the two together."
        )
    model = _merged(models.load_model(request).model)
    renderer = Renderer(prepared.tokenizer, prepared.params["chat_template"])
    if renderer.template is not None:
        renderer.tokenizer.chat_template = renderer.template

    def write(folder: Path) -> None:
        _refusing_full(lambda: model.save_pretrained(folder))
        renderer.tokenizer.save_pretrained(folder)
        shutil.copyfile(run.folder / "adapter" / ABOUT, folder / ABOUT)

    checkpoints.save_folder(run, MERGED, size(prepared), write)
    say(f"merged into {run.folder / MERGED}")


def _merged(wrapped: Any) -> Any:
    """The base with the adapter's part added to each weight, in float32 and rounded once (peft 0.21 rounds twice)."""
    import torch
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for name, layer in wrapped.named_modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                weight.copy_(weight.float() + layer.get_delta_weight(wrapped.active_adapter).float())
                if not bool(weight.isfinite().all()):
                    raise WorkerFailure(
                        f"Merged, {name} is no number any more. The adapter is whole; nothing was merged."
                    )
    return wrapped.unload()


def _base(run: rundir.Run, prepared: Prepared) -> models.ModelRequest:
    """The base as it was before it was put into fewer bits, at the commit that was trained on, with the adapter."""
    digest = str(prepared.identity["model_digest"])
    return dataclasses.replace(
        prepared.request,
        revision=digest.removeprefix("commit:") if digest.startswith("commit:") else prepared.request.revision,
        adapter=str(run.folder / "adapter"),
        dtype=models.dtype_name(prepared.request),
        quantization="none",
        device="cpu",
    )


def _refusing_full(write: Callable[[], object]) -> None:
    """Write; what safetensors says of a full disk in its own words becomes the OSError that others raise."""
    from safetensors import SafetensorError

    try:
        write()
    except SafetensorError as error:
        if "os error 28" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "No space left on device") from error

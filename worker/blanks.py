"""A model with random weights, of its configuration alone: as large and as fast as the real one, and no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker import models, quantization
from worker.models import LoadedModel, ModelRequest

_SPREAD = 0.02
"""Of the random numbers, as models are begun with: numbers all alike would make a GPU faster than it is."""


def load(request: ModelRequest) -> LoadedModel:
    """The model, and no tokenizer but one to count with; raises ConfigFailure where its configuration cannot be had."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = models.load_config(request)
    device = models.choose_device(request.device)
    dtype = models.choose_dtype(request.dtype, device)
    torch.manual_seed(0)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=request.trust_remote_code)
    model.tie_weights()
    _fill(model, request.quantization, device, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if device.type == "cpu" and parameters < models.SMALL_MODEL_PARAMETERS:
        torch.set_num_threads(1)
    name = None if Path(request.model).is_dir() else request.revision
    return LoadedModel(model.eval(), None, device, dtype, parameters, name, "random")


def _fill(model: Any, kind: str, device: Any, dtype: Any) -> None:
    """Move everything to the device, matrix by matrix, each filled there and quantized as loading would."""
    import torch

    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            own = [each for each in module.parameters(recurse=False) if each.device != device or device.type == "cpu"]
            for each in own:
                each.data = torch.empty_like(each, device=device)
                each.data.normal_(0.0, _SPREAD) if each.dim() > 1 else each.data.fill_(float("norm" in name))
            if kind != "none" and type(module) is torch.nn.Linear and module is not head:
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, quantization.linear(module, kind, dtype))
    model.to(device)  # what is no parameter
    quantization.mark(model, kind)

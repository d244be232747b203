"""lm-evaluation-harness beside ours: its own tasks over local files, evaluated in its own Python."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from worker import harnessed
from worker.failures import ConfigFailure

_DEADLINE_S = 24 * 3600.0
_WORDS_MAX = 2000
_NO_NETWORK = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}


@dataclass(frozen=True)
class HarnessTask:
    """A task as it is installed there (`include`, below its folder of tasks), over files here."""

    name: str
    include: str
    files: dict[str, str]
    """By split."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else is not as installed."""


def evaluate(
    python: str, folder: Path, model: Mapping[str, Any], tasks: Iterable[HarnessTask], shots: int | None = None
) -> dict[str, Any]:
    """Every item by task, and results, as the harness finds them; nothing is fetched. ConfigFailure when it fails.

    `model`: what its class HFLM is made with. What it reads and writes lies in `folder`.
    """
    asked, found = folder / "asked.json", folder / "found.json"
    order = {"model": dict(model), "tasks": [asdict(task) for task in tasks], "shots": shots}
    asked.write_text(json.dumps(order), encoding="utf-8")
    environment = {**os.environ, **_NO_NETWORK, "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        [python, harnessed.__file__, str(asked), str(found)],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_DEADLINE_S,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-_WORDS_MAX:]
        raise ConfigFailure(f"lm-evaluation-harness failed (exit code {done.returncode}). Its last words:\n{said}")
    answer: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return answer


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    """Put records into a file of JSON lines; returns its path."""
    path.write_text("".join(json.dumps(record, default=str) + "\n" for record in records), encoding="utf-8")
    return str(path)

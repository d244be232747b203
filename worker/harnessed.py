"""Run by the Python of lm-evaluation-harness 0.4.13: evaluates what one file asks for, writes each item to another."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

VERSION = "0.4.13"


def main(asked_path: str, found_path: str) -> None:
    """Read the order, evaluate, and write `{items: {task: […]}, results: {task: {…}}}`; items in dataset order."""
    version = importlib.metadata.version("lm_eval")
    if version != VERSION:
        raise SystemExit(f"This is lm_eval {version}; what is compared with is {VERSION}.")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    asked = json.loads(Path(asked_path).read_text(encoding="utf-8"))
    folder = Path(asked_path).parent
    for task in asked["tasks"]:
        _write_task(folder, Path(lm_eval.__file__).parent / "tasks", task)
    found = lm_eval.simple_evaluate(
        HFLM(**asked["model"]),
        tasks=[task["name"] for task in asked["tasks"]],
        num_fewshot=asked["shots"],
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=True,
        bootstrap_iters=0,
    )
    items = {name: [_item(sample) for sample in _ordered(samples)] for name, samples in found["samples"].items()}
    results = {name: {key: v for key, v in each.items() if not callable(v)} for name, each in found["results"].items()}
    Path(found_path).write_text(json.dumps({"items": items, "results": results}, default=str), encoding="utf-8")


def _write_task(folder: Path, installed: Path, task: dict[str, Any]) -> None:
    """A task of the harness's own that reads local files: the installed YAML, with another name and dataset."""
    own = {
        "include": str(installed / task["include"]),
        "task": task["name"],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": task["files"]},
        "tag": None,
        **task["settings"],
    }
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in own.items()]  # JSON is YAML
    (folder / f"{task['name']}.yaml").write_text("".join(lines), encoding="utf-8")


def _ordered(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


def _item(sample: dict[str, Any]) -> dict[str, Any]:
    asked = sample["arguments"]
    asked = asked.values() if isinstance(asked, dict) else asked
    return {
        "asked": [list(each.values()) if isinstance(each, dict) else list(each) for each in asked],
        "filter": sample["filter"],
        "found": sample["filtered_resps"],
        "said": sample["resps"],
        "scores": {name: sample[name] for name in sample["metrics"]},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])

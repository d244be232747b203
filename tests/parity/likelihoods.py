"""lm-evaluation-harness 0.4.13 with its HF backend, offline, on a model and files of the project's own."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.worker.tiny_models import SIZES, SPECIAL_TOKENS
from worker import problems

LM_EVAL = """
import importlib.metadata, json, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

assert importlib.metadata.version("lm_eval") == "0.4.13", importlib.metadata.version("lm_eval")
asked = json.load(open(sys.argv[1]))
model = HFLM(pretrained=asked["model"], dtype="float32", device="cpu", batch_size=asked["batch_size"])
manager = TaskManager(include_path=asked["tasks_folder"])
found = lm_eval.simple_evaluate(
    model, tasks=list(asked["tasks"]), num_fewshot=asked["shots"], task_manager=manager, log_samples=True,
    bootstrap_iters=0,
)
keep = {name: [{"doc": s["doc"], "arguments": s["arguments"], "resps": s["filtered_resps"],
                **{m: s[m] for m in ("acc", "acc_norm", "acc_bytes", "word_perplexity", "byte_perplexity") if m in s}}
               for s in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in found["samples"].items()}
json.dump({"samples": keep, "results": {n: {k: v for k, v in r.items() if not callable(v)}
                                        for n, r in found["results"].items()}},
          open(sys.argv[2], "w"), default=str)
"""
"""Reads what to do from one file, writes items and results to another."""


def python() -> str:
    """An interpreter with lm_eval 0.4.13 and torch; the test is skipped where none is named."""
    named = os.environ.get("GPU_PARITY_PYTHON")
    if not named:
        pytest.skip("GPU_PARITY_PYTHON does not name an interpreter with lm_eval 0.4.13")
    return named


def make_model(folder: Path, *, adds_bos: bool) -> Path:
    """A random Llama whose tokenizer merges bytes, and adds BOS as Llama's does or nothing; 512 tokens of context."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    texts = [problem.question for problem in itertools.islice(problems.training(0), 300)]
    backend.train_from_iterator([*texts, *(str(scene) for scene in scenes(50))], trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    sizes = {**SIZES, "vocab_size": 600, "max_position_embeddings": 512, "initializer_range": 0.2}
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def task(folder: Path, name: str, include: str, data: dict[str, Path], **more: Any) -> None:
    """A task of lm-eval's own that reads local files: the installed YAML, with another name and dataset."""
    files = {split: str(path) for split, path in data.items()}
    lines = [f"include: {include}", f"task: {name}", "dataset_path: json", "dataset_name: null", "tag: null"]
    lines += [f"dataset_kwargs: {json.dumps({'data_files': files})}"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in more.items()]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def installed(path: str) -> str:
    """Where the harness keeps a file of its tasks."""
    code = "import lm_eval, pathlib; print(pathlib.Path(lm_eval.__file__).parent / 'tasks')"
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return f"{done.stdout.strip()}/{path}"


def evaluate(folder: Path, model: Path, tasks: list[str], shots: int | None = None, batch_size: int = 4) -> Any:
    """Items by task, and results, as the harness finds them."""
    asked, found = folder / "asked.json", folder / "found.json"
    order = {"model": str(model), "tasks": tasks, "tasks_folder": str(folder), "shots": shots, "batch_size": batch_size}
    asked.write_text(json.dumps(order), encoding="utf-8")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        [python(), "-c", LM_EVAL, str(asked), str(found)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(found.read_text(encoding="utf-8"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentences(dice: random.Random, shortest: int, longest: int) -> str:
    """Made-up text with the odd spaces, brackets and letters that real ones have."""
    words = ("the", "man", "takes", "a", "rope,", "[step]", "Then", "he", "jumps.", "café", "10%", " [title]", "x ²")
    return " ".join(dice.choice(words) for _ in range(dice.randrange(shortest, longest)))


def scenes(count: int) -> Iterator[dict[str, Any]]:
    """HellaSwag rows as published, with all that its cleaning changes."""
    dice = random.Random(5)
    for number in range(count):
        yield {
            "ind": number,
            "activity_label": dice.choice(("Roof repair", "How to  knit", "Baking")),
            "ctx_a": "[header] " + sentences(dice, 4, 30) if number % 3 else sentences(dice, 4, 30),
            "ctx_b": dice.choice(("", "he", "the Man")),
            "endings": [sentences(dice, 2, 20) + f" {place}" for place in range(4)],
            "label": str(dice.randrange(4)),
        }

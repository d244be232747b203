"""lm-evaluation-harness 0.4.13 with its HF backend, offline, on a model and files of the project's own."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.worker.tiny_models import SIZES, SPECIAL_TOKENS
from worker import harness, problems
from worker.harness import HarnessTask


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


def task(name: str, include: str, files: dict[str, Path], **settings: Any) -> HarnessTask:
    """A task of lm-eval's own over local files, by split."""
    return HarnessTask(name, include, {split: str(path) for split, path in files.items()}, settings)


def evaluate(folder: Path, model: Path, tasks: list[HarnessTask], shots: int | None = None) -> Any:
    """Items by task, and results, as the harness finds them."""
    made_with = {"pretrained": str(model), "dtype": "float32", "device": "cpu", "batch_size": 4}
    return harness.evaluate(python(), folder, made_with, tasks, shots)


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

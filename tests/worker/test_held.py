"""The memory formula of a training against the tensors counted in real steps, within a tenth, whatever the recipe."""

from __future__ import annotations

import importlib.util
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from jobs import spec, training_memory
from jobs.decoders import Shape
from jobs.training_memory import Recipe
from worker import batches, blanks, held, lora, losses
from worker.conversations import Sample
from worker.models import ModelRequest

CONFIG = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def learner(folder: Path, settings: dict[str, Any], sizes: dict[str, Any]) -> tuple[lora.Learner, Recipe]:
    """A random model of these sizes with an adapter, and the recipe it is trained by."""
    transformers.Qwen2Config(**sizes).save_pretrained(folder)
    job = spec.find("train-lora", [spec.CATALOG])
    params = job.fill({"batch_size": "1", "max_length": "256", "dtype": "float32", "device": "cpu", **settings})
    request = ModelRequest(str(folder), dtype=params["dtype"], device="cpu", quantization=params["quantization"])
    return lora.fit(blanks.load(request), lora.Settings.of(params)), Recipe.of(params, params["dtype"])


def held_at_most(made: lora.Learner, recipe: Recipe) -> int:
    """Bytes of tensors in two steps of two full micro-batches: later ones find gradients and the optimizer's state."""
    half = recipe.tokens // 2
    spans = ((1, half),) if recipe.packing else ((1, recipe.tokens),)
    parts = [half, half] if recipe.packing else [recipe.tokens]
    samples = [Sample(number, array("l", [number % 90] * size), spans) for number, size in enumerate(parts)]
    batch = batches.collate(samples, 0, packing=recipe.packing)
    with held.counting() as tally:
        for _ in range(2):
            for _ in range(2):
                lora.loss_sum(made, batch).backward()
            lora.update(made, 1e-4, 1.0)
    return tally.most


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"targets": "all-linear", "rank": "64"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "targets": "all-linear"},
        {"packing": "true"},
        {"packing": "true", "dtype": "bfloat16", "activation_checkpointing": "true"},
        {"activation_checkpointing": "true", "targets": "all-linear"},
        pytest.param({"dtype": "bfloat16", "quantization": "nf4", "targets": "all-linear"}, marks=needs_bitsandbytes),
        pytest.param({"optimizer": "adamw_8bit", "rank": "64", "targets": "all-linear"}, marks=needs_bitsandbytes),
    ],
    ids=lambda settings: " ".join(settings.values()) or "as it comes",
)
@pytest.mark.parametrize("words", [1000, 16_000])
@pytest.mark.first(4)
def test_the_formula_says_what_a_step_holds(tmp_path: Path, settings: dict[str, Any], words: int) -> None:
    """Real steps on a random Qwen2: with few words the layers decide, with many the scores."""
    sizes = {**CONFIG, "vocab_size": words}
    made, recipe = learner(tmp_path, settings, sizes)
    shape = Shape.of(sizes)
    assert shape is not None
    said = training_memory.needs(shape, recipe)
    counted = held_at_most(made, recipe)
    assert said.tensors == pytest.approx(counted, rel=0.1), said.document()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_in_parts_take_the_memory_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """256 tokens of 16,000 words, a sixteenth of the scores at a time: the formula says what steps hold, far less."""
    sizes = {**CONFIG, "vocab_size": 16_000}
    made, recipe = learner(tmp_path, {"dtype": dtype}, sizes)
    shape = Shape.of(sizes)
    assert shape is not None
    at_once = training_memory.needs(shape, recipe)
    for module in (training_memory, losses):
        monkeypatch.setattr(module, "PART_BYTES", 16 * 16_000 * 4)
    said = training_memory.needs(shape, recipe)
    assert said.tensors == pytest.approx(held_at_most(made, recipe), rel=0.1), said.document()
    assert said.tensors < at_once.tensors - 10e6


def test_memory_that_is_freed_is_not_held() -> None:
    """Of two tensors that never live at once the larger counts; a view of one is not another."""
    with held.counting() as tally:
        for size in (1000, 3000):
            made = torch.zeros(size)
            made.view(10, -1).add_(1)
            del made
    assert (tally.held, tally.most) == (0, 12_000)

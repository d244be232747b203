"""What a measured training comes to: work counted as published, losses that add up, and changes that surely help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jobs.decoders import Shape
from jobs.training_memory import Recipe
from jobs.training_speed import Limits, Measured

LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False)
QWEN_3B = Shape(36, 2048, 11008, 16, 2, 128, 151936, tied=True)
H100, COPIES = 800e12, 2.6e12


def measured(recipe: Recipe, seconds: float, **changes: Any) -> Measured:
    """A step of four full micro-batches of that recipe on one H100 with 80 GB."""
    slots = 4.0 * recipe.tokens
    found = Measured(LLAMA_8B, recipe, seconds, 4, slots, slots, slots / 2, 512, H100, COPIES, 80e9)
    return replace(found, **changes)


@pytest.mark.parametrize(
    ("shape", "gflop", "with_recompute"),
    [(LLAMA_8B, 33.5, 48.6), (QWEN_3B, 14.3, 20.5)],
)
def test_the_work_of_a_token_is_as_published(shape: Shape, gflop: float, with_recompute: float) -> None:
    """LoRA at 4,096 tokens, every token learned: 4N and a little, as NVIDIA counts it; recomputing adds half."""
    once = shape.flops(4096, 1.0, shape.adapter(16, "all-linear"))
    again = shape.recomputed(4096, shape.adapter(16, "all-linear"))
    assert once / 1e9 == pytest.approx(gflop, rel=0.02)
    assert (once + again) / 1e9 == pytest.approx(with_recompute, rel=0.02)


def test_shares_of_the_peak_follow_from_time_and_work() -> None:
    """At 12,473 tokens a second NVIDIA has 402 TFLOP/s of Llama 3 8B: half of 800, two thirds with recomputing."""
    recipe = Recipe(8192, rank=16, targets="all-linear", activation_checkpointing=True)
    seconds = 4 * 8192 / 12_473
    found = measured(recipe, seconds, targets=4 * 8192.0, length=4096).shares()
    assert found["share_of_peak"] == pytest.approx(0.52, abs=0.02)
    assert found["share_of_peak_with_recompute"] == pytest.approx(0.76, abs=0.02)
    assert found["recompute"] == pytest.approx(0.31, abs=0.01)
    assert (found["padding"], found["dequantization"]) == (0.0, 0.0)


def test_padding_is_answered_by_packing() -> None:
    """Where six tokens of ten are padding, packing is the change, and gains more than twice the speed."""
    recipe = Recipe(4096, activation_checkpointing=True)
    found = measured(recipe, 2.0, tokens=0.4 * 4 * 4096, targets=0.2 * 4 * 4096)
    assert found.shares()["padding"] == pytest.approx(0.6)
    change = found.change()
    assert change is not None
    assert change["settings"] == {"packing": True}
    assert change["gain"] > 2
    assert change["seconds_per_step"] == pytest.approx(2.0 / change["gain"])


def test_small_micro_batches_of_a_quantized_base_are_answered_by_larger_ones() -> None:
    """Dequantizing costs the same for 256 tokens as for 4,096: fewer, larger micro-batches of the same step."""
    recipe = Recipe(256, quantization="nf4", packing=True, activation_checkpointing=True)
    found = measured(recipe, 0.5)
    assert found.shares()["dequantization"] > 0.2
    change = found.change()
    assert change is not None
    assert change["settings"] == {"batch_tokens": 1024, "accumulation": 1}
    assert change["gain"] > 1.5


def test_a_change_that_does_not_fit_is_not_proposed() -> None:
    """Without checkpointing 16,384 tokens of 8B take more than 80 GB; on a GPU with more they are the change."""
    recipe = Recipe(16_384, packing=True, activation_checkpointing=True)
    found = replace(measured(recipe, 1.0), seconds=4.2, micros=1, slots=16_384, tokens=16_384, targets=8192)
    assert found.change() is None
    change = replace(found, has_bytes=400e9).change()
    assert change is not None
    assert change["settings"] == {"activation_checkpointing": False}


@pytest.mark.parametrize(
    ("seconds", "changed", "verdict"),
    [
        (0.2, None, "go"),
        (5.0, None, "go"),
        (7.0, None, "usable"),
        (30.0, None, "usable"),
        (45.0, None, "pivot"),
        (45.0, 31.0, "pivot"),
        (45.0, 20.0, "usable"),
        (61.0, 10.0, "pivot"),
    ],
)
def test_the_verdict_is_by_seconds_a_step(seconds: float, changed: float | None, verdict: str) -> None:
    """Up to 5 go, up to 30 usable, above 60 pivot; between them what the best change makes of it."""
    assert Limits().verdict(seconds, changed) == verdict

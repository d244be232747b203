"""A training's memory before anything is rented: counted by hand, refused where it cannot fit, with what would fit."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import spec, training_memory
from jobs.decoders import Shape
from jobs.training_memory import Recipe
from orchestrator import planning, preflight
from orchestrator.preflight import Preflight
from orchestrator.preflight.findings import Finding
from tests.orchestrator.playing_hub import LLAMA_8B, PlayedHub, document
from tests.orchestrator.test_preflight import NAME, codes, offer, played

__all__ = ["played"]


def look(name: str, **params: Any) -> Preflight:
    """What is found of a job before renting."""
    words = {key: str(value) for key, value in {"model": NAME, **params}.items()}
    return preflight.look(planning.request(planning.Asked("local", words), spec.find(name, [spec.CATALOG])))


def finding(looked: Preflight, vram_gb: float) -> Finding | None:
    found = [one for one in looked.against(offer(vram_gb)).findings if one.code == "does_not_fit"]
    return found[0] if found else None


def test_the_memory_of_qlora_on_8b_is_what_one_counts_by_hand() -> None:
    """Llama 3.1 8B in nf4, rank 64 on all matrices, an 8-bit state, 4,096 tokens with checkpointing."""
    shape = Shape.of(LLAMA_8B)
    assert shape is not None
    assert shape.parameters == 8_030_261_248
    recipe = Recipe(4096, "bfloat16", "nf4", "adamw_8bit", 64, "all-linear", False, True)
    said = training_memory.needs(shape, recipe)
    body, adapter = 6_979_321_856, 167_772_160
    assert (shape.body, shape.adapter(64, "all-linear")) == (body, adapter)
    assert said.weights == pytest.approx(body * 0.515869 + 2 * (8_030_261_248 - body), rel=1e-6)
    assert said.adapter == 10 * adapter
    assert said.activations == 32 * 4096 * 4096 * 2
    assert said.work == 4096 * (296_832 + 6 * 14_336) + 2 * 4096 * 14_336  # a layer, its way back, a matrix in full
    assert said.on_gpu == pytest.approx(1.05 * said.tensors + 1e9)


def test_a_training_is_sized_and_fits_or_not(played: PlayedHub) -> None:
    """QLoRA on 8B fits on 24 GB; LoRA in 16 bits at as many tokens does not, and is refused with what would."""
    small = look("train-qlora")
    assert small.needed_vram_gb == pytest.approx(12.8, abs=0.5)
    assert finding(small, 24.0) is None
    large = look("train-lora", batch_tokens=8192)
    refused = finding(large, 24.0)
    assert refused is not None
    assert refused.level == "error"
    assert "One A10 has 24 GB" in refused.message
    assert "quantization=nf4" in refused.hint
    assert "a GPU with" in refused.hint
    assert codes(large.against(offer(180.0))) == []


@pytest.mark.parametrize("has_gb", [24.0, 40.0, 48.0, 80.0])
@pytest.mark.first(2)
def test_what_is_proposed_does_fit(played: PlayedHub, has_gb: float) -> None:
    """Typing what a refusal proposes makes the same check pass."""
    refused = finding(look("train-lora", batch_tokens=16384), has_gb)
    if refused is None:
        assert has_gb == 80.0
        return
    ways = [way for way in refused.hint.removeprefix("What fits: ").split("; ") if way.startswith("--set")]
    assert ways
    for way in ways:
        words = [word for word in way.split() if "=" in word]
        settings = {"batch_tokens": "16384", **dict(word.split("=") for word in words)}
        assert finding(look("train-lora", **settings), has_gb) is None, way


def test_a_model_of_another_kind_is_not_counted(played: PlayedHub) -> None:
    """Of a model with experts nothing is claimed but that it is not known."""
    played.repositories[NAME].files["config.json"] = document({**LLAMA_8B, "num_local_experts": 8})
    looked = look("train-lora")
    assert ("warning", "memory_not_known") in codes(looked)
    assert looked.needed_vram_gb is None


@pytest.mark.parametrize(("job", "least_gb"), [("eval-mmlu", 17.5), ("eval-perplexity", 22.0)])
def test_jobs_that_read_likelihoods_are_sized(played: PlayedHub, job: str, least_gb: float) -> None:
    """Weights of 16 GB, what a prompt or a window takes, and scores at the places that are scored."""
    looked = look(job)
    assert looked.needed_vram_gb == pytest.approx(least_gb, abs=1.0)
    refused = finding(looked, 16.0)
    assert refused is not None
    assert refused.level == "error"
    assert finding(looked, 24.0) is None
    assert "context_overflow" not in [code for _, code in codes(looked)]

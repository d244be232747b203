"""The loss in parts: the plain one, gradients too, for every kind of last layer, in a fraction of the memory."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from tests.worker import tiny_models
from worker import batches, losses
from worker.losses import Loss

SIZES = {**tiny_models.SIZES, "vocab_size": 300}
HEADS = {
    "untied": lambda: transformers.Qwen2Config(**SIZES),
    "tied": lambda: transformers.Qwen2Config(**{**SIZES, "tie_word_embeddings": True}),
    "capped": lambda: transformers.Gemma2Config(**{**SIZES, **tiny_models.SLIDING, "final_logit_softcapping": 3.0}),
    "scaled": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.0625),
    "divided": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "gpt2": lambda: transformers.GPT2Config(**{**tiny_models.OLD_SIZES, "vocab_size": 300}),
}


def made(config: Any, targets: str | list[str] = "all-linear", dropout: float = 0.0) -> Any:
    """A random model with an adapter that has learned something."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about names that transformers 6 will not have, and gpt2's layout
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=dropout))
    for name, each in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.3)
    return adapted


def batch(width: int = 300) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Three rows of which different positions are learned."""
    ids = torch.randint(1, width, (3, 12), generator=torch.Generator().manual_seed(1))  # (B, T)
    labels = ids.roll(-1, dims=1)
    labels[0, :5] = labels[1, 4:] = labels[:, 2] = batches.NOT_LEARNED
    keep = (labels != batches.NOT_LEARNED).any(dim=0).nonzero().flatten()
    return {"input_ids": ids}, keep, labels[:, keep]


def learned(loss: Loss, parts_of: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[float, list[torch.Tensor]]:
    """The loss and every gradient, with so many positions at a time; None: all at once."""
    if parts_of is not None:
        monkeypatch.setattr(losses, "PART_BYTES", parts_of * 300 * 4)
    torch.manual_seed(7)
    loss.model.zero_grad()
    total = loss.sum(*batch())
    total.backward()
    return total.item(), [each.grad.clone() for each in loss.model.parameters() if each.grad is not None]


@pytest.mark.parametrize("kind", HEADS)
def test_in_parts_it_is_the_plain_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads tied and not, scaled and capped: four positions at a time, loss to 1e-6 of it, gradients to 1e-5."""
    model = made(HEADS[kind]())
    loss = Loss.of(model.eval())
    assert loss.finish is not None
    plain, gradients = learned(Loss(model), None, monkeypatch)
    parted, others = learned(loss, 4, monkeypatch)
    assert parted == pytest.approx(plain, rel=1e-6)
    assert len(gradients) == len(others) > 0
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_a_head_that_learns_with_dropout_is_computed_again_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter on the last layer itself, which drops out: what is computed again for the gradient is the same."""
    model = made(HEADS["untied"](), targets=["lm_head", "q_proj"], dropout=0.5).train()
    loss = Loss(model, lambda found: found)
    with torch.random.fork_rng():
        total, gradients = learned(loss, 4, monkeypatch)
    step = 1e-4
    reached = [(name, each) for name, each in model.named_parameters() if each.grad is not None]
    [(at, weight)] = [(at, e) for at, (name, e) in enumerate(reached) if "lm_head" in name and "lora_B" in name]
    with torch.no_grad():
        weight += step * gradients[at]
    moved, _ = learned(loss, 4, monkeypatch)
    assert moved - total == pytest.approx(step * float((gradients[at] ** 2).sum()), rel=0.05)


def test_logits_changed_in_a_way_not_known_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does more with its logits than is known here keeps the plain loss, and says so."""
    model = made(HEADS["untied"]())
    base, forward = model.get_base_model(), type(model.get_base_model()).forward

    def bent(*words: Any, **named: Any) -> Any:
        found = forward(base, *words, **named)
        found.logits = found.logits.sign() * found.logits.abs().sqrt()
        return found

    bent.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(base, "forward", bent)
    loss = Loss.of(model)
    assert loss.finish is None
    assert "all positions at once" in loss.words()


def test_a_cap_that_small_logits_do_not_show_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a few hundredths pass below any cap: it is tried with large ones, before rows are learned wrongly."""
    config = HEADS["capped"]()
    config.initializer_range = 0.001
    model = made(config)
    monkeypatch.setattr(losses, "_finish", lambda config: lambda found: found)
    assert Loss.of(model.eval()).finish is None


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made_ = func(*args, **(kwargs or {}))
        for each in made_ if isinstance(made_, (tuple, list)) else [made_]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return made_


def test_no_tensor_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 25 positions and 5,000 tokens no more than the part's logits are ever made, forward and backward."""
    model = made(transformers.Qwen2Config(**{**SIZES, "vocab_size": 5000, "hidden_size": 8}), targets=["q_proj"])
    monkeypatch.setattr(losses, "PART_BYTES", 4 * 5000 * 4)
    inputs, keep, labels = batch()
    found = []
    for loss in (Loss(model), Loss.of(model.eval())):
        with Largest() as largest:
            loss.sum(inputs, keep, labels).backward()
        found.append(largest.bytes)
    assert found[0] >= labels.numel() * 5000 * 4
    assert found[1] <= 5000 * 8 * 4  # the head's own weights, or the logits of four positions

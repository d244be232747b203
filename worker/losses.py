"""The loss of a micro-batch: logits where something is learned alone, and a part at a time where they are many."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jobs.training_memory import PART_BYTES
from worker import batches

SEEN = 0.01
"""Of the largest logit: two ways that differ by less are one, rounded to bfloat16 in other places."""
_PROBED = 100.0
"""Logits up to here are tried out: trained models give a few tens."""


@dataclass(frozen=True)
class Loss:
    """How a model's loss is computed. Without a `finish`, the logits of all positions are made at once."""

    model: Any
    finish: Callable[[Any], Any] | None = None
    """What the model makes of its last layer's answers: scales them, or bends them below a cap."""

    @classmethod
    def of(cls, model: Any) -> Loss:
        """The way that takes least memory, if on a few tokens it gives this model's own logits; else the plain one."""
        finish = _finish(model.config.get_text_config())
        try:
            return cls(model, finish if _holds(model, finish) else None)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):  # other people's code, put to a test
            return cls(model)

    def words(self) -> str:
        """For the log, how it is computed."""
        if self.finish is None:
            return "logits of all positions at once: this model does more than scale or cap what its last layer gives"
        return "logits of a few positions at a time where the vocabulary is large"

    def sum(self, inputs: dict[str, Any], keep: Any, labels: Any) -> Any:
        """The cross-entropy of all labels (B, P) at the positions kept (P,), added up.

        Logits of a large vocabulary are made again for the gradient, part by part, rather than kept.
        """
        import torch
        from torch.utils.checkpoint import checkpoint

        finish, width = self.finish, _vocabulary(self.model)
        if finish is None or labels.numel() * width * 4 <= PART_BYTES:
            return _entropy(logits(self.model, inputs, keep), labels)
        head = _head(self.model)
        learned = (labels != batches.NOT_LEARNED).flatten().nonzero().flatten()  # (N,) where the labels are: no waiting
        hidden = _hidden(self.model, inputs, keep)  # (B, P, H)
        states = hidden.flatten(0, 1)[learned.to(hidden.device)]  # (N, H)

        def part(states: Any, labels: Any) -> Any:
            return _entropy(finish(head(states)), labels)

        count = max(1, PART_BYTES // (width * 4))
        parts = zip(states.split(count), labels.flatten()[learned].split(count), strict=True)
        return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum()


def logits(model: Any, inputs: dict[str, Any], keep: Any) -> Any:
    """(B, P, V) The model's logits at the positions kept (P,)."""
    if _keeps(model):
        return model(**inputs, use_cache=False, logits_to_keep=keep).logits
    return model(**inputs, use_cache=False).logits[:, keep]


def _vocabulary(model: Any) -> int:
    """How many logits a position has."""
    return int(model.config.get_text_config().vocab_size)


def _entropy(found: Any, labels: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(
        found.float().flatten(0, -2),
        labels.flatten().to(found.device),
        ignore_index=batches.NOT_LEARNED,
        reduction="sum",
    )


def _finish(config: Any) -> Callable[[Any], Any]:
    """What a configuration says is done to the last layer's answers: Cohere, Granite and Gemma in transformers 5."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(found: Any) -> Any:
        found = found if scale == 1.0 else found * scale
        return found if cap is None else (found / cap).tanh() * cap

    return finish


def _holds(model: Any, finish: Callable[[Any], Any]) -> bool:
    """Whether hidden states, last layer and `finish` give what the model gives; also for large logits, which bend."""
    import torch

    head = _head(model)
    if head is None:
        return False
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None] % _vocabulary(model)  # (1, T)
    keep = torch.arange(8, device=ids.device)
    with torch.no_grad():
        plain = logits(model, {"input_ids": ids}, keep)  # (1, T, V)
        apart = finish(head(_hidden(model, {"input_ids": ids}, keep)))
        probe = torch.linspace(-_PROBED, _PROBED, plain.shape[-1], device=ids.device, dtype=plain.dtype)
        with _instead(head, lambda hidden: probe.expand(*hidden.shape[:-1], -1)):
            bent = logits(model, {"input_ids": ids}, keep)
    return _alike(plain, apart) and _alike(bent, finish(probe.expand_as(plain)))


def _alike(one: Any, other: Any) -> bool:
    return one.shape == other.shape and bool(
        (one.float() - other.float()).abs().max() <= SEEN * one.float().abs().max()
    )


def _hidden(model: Any, inputs: dict[str, Any], keep: Any) -> Any:
    """(B, P, H) What the last layer is given at the positions kept (P,)."""
    given: list[Any] = []

    def keep_what_is_given(hidden: Any) -> Any:
        given.append(hidden)
        return hidden

    with _instead(_head(model), keep_what_is_given):
        logits(model, inputs, keep)
    return given[-1] if _keeps(model) else given[-1][:, keep]


def _head(model: Any) -> Any:
    return model.get_base_model().get_output_embeddings()


def _keeps(model: Any) -> bool:
    """Whether the model makes logits at chosen positions alone."""
    return "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters


@contextlib.contextmanager
def _instead(layer: Any, forward: Callable[[Any], Any]) -> Iterator[None]:
    """Have a layer answer otherwise inside the block."""
    own = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own

"""What each process has done of a step that has begun, its loss and gradients; and how it is dealt out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ANOTHER_NUMBER = (
    "This checkpoint was saved by {before} processes, and {now} go on: the same rows in the same order, but sums are "
    "rounded otherwise, so what follows is no longer bit by bit the same."
)
Gradients = Mapping[str, Any]


@dataclass
class Portion:
    """The micro-batches of the step that one process has done, by their places in it, and what they came to."""

    done: list[int] = field(default_factory=list)
    loss: float = 0.0
    """Their part of the step's mean loss."""
    tokens: int = 0
    targets: int = 0


def total(portions: Sequence[Portion]) -> Portion:
    """What all of them did; the sum goes by rank, so that it is the same each time."""
    return Portion(
        done=sorted(place for each in portions for place in each.done),
        loss=sum(each.loss for each in portions),
        tokens=sum(each.tokens for each in portions),
        targets=sum(each.targets for each in portions),
    )


def places(count: int, done: Sequence[int], rank: int, size: int) -> list[int]:
    """Which of a step's micro-batches a process does: every `size`-th, but for those that are done."""
    return [place for place in range(rank, count, size) if place not in done]


def named(held: Sequence[Gradients]) -> dict[str, Any]:
    """The gradients that each process holds, by names of their own."""
    return {f"gradient/{rank}/{name}": each for rank, one in enumerate(held) for name, each in one.items()}


def dealt(did: Sequence[Portion], tensors: Mapping[str, Any], rank: int, size: int) -> tuple[Portion, Gradients]:
    """What a process takes over of a step that others began: its own, or when they were not as many, the first all."""
    if len(did) != size:
        if rank:
            return Portion(), {}
        held: dict[str, Any] = {}
        for gradients in (_of(each, tensors) for each in range(len(did))):
            held |= {name: held[name] + each if name in held else each for name, each in gradients.items()}
        return total(did), held
    return did[rank], _of(rank, tensors)


def _of(rank: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The gradients that one process held, by the names of their weights."""
    own = f"gradient/{rank}/"
    return {name.removeprefix(own): each for name, each in tensors.items() if name.startswith(own)}

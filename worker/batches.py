"""Which rows are learned together: micro-batches by a budget of tokens, the same for the same seed, as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from worker.conversations import Sample

_CHUNK_ROWS = 512
"""Rows that are sorted or packed together: more waste less padding, fewer are nearer to a plain shuffle."""
NOT_LEARNED = -100
Micro = tuple[int, ...]
"""The samples of a micro-batch, by their index."""


@dataclass(frozen=True)
class Budget:
    """What fits into a micro-batch: so many rows, or so many tokens, padding counted."""

    rows: int | None
    tokens: int
    """Also with `rows`: what that many of the longest rows take."""
    packing: bool

    def admits(self, lengths: Sequence[int]) -> bool:
        """Whether samples of these lengths fit into one micro-batch."""
        if self.packing:
            return sum(lengths) <= self.tokens
        if self.rows is not None:
            return len(lengths) <= self.rows
        return len(lengths) * max(lengths) <= self.tokens


@dataclass(frozen=True)
class Plan:
    """The endless sequence of micro-batches over samples of these lengths; any stretch of it can be had again."""

    lengths: Sequence[int]
    budget: Budget
    seed: int

    def epoch(self, number: int) -> list[Micro]:
        """The micro-batches of one pass over all samples, in their order."""
        chance = Random(f"{self.seed}/{number}")  # noqa: S311 -- shuffles rows
        order = list(range(len(self.lengths)))
        chance.shuffle(order)
        found: list[Micro] = []
        for at in range(0, len(order), _CHUNK_ROWS):
            chunk = sorted(order[at : at + _CHUNK_ROWS], key=lambda index: -self.lengths[index])
            found += self._packed(chunk) if self.budget.packing else self._alike(chunk)
        chance.shuffle(found)
        return found

    def stream(self, skip: int = 0) -> Iterator[tuple[int, Micro]]:
        """Every micro-batch after the first `skip`, each with the number of its epoch, without end."""
        number = 0
        while True:
            for micro in self.epoch(number):
                if skip:
                    skip -= 1
                else:
                    yield number, micro
            number += 1

    def count(self, epochs: int) -> int:
        """How many micro-batches so many epochs have."""
        return sum(len(self.epoch(number)) for number in range(epochs))

    def _packed(self, chunk: list[int]) -> list[Micro]:
        """The longest first, each into the fullest bin that still has room for it."""
        bins: list[list[int]] = []
        room: list[int] = []
        for index in chunk:
            size = self.lengths[index]
            fitting = [at for at, left in enumerate(room) if left >= size]
            if fitting:
                best = min(fitting, key=lambda at: room[at])
                bins[best].append(index)
                room[best] -= size
            else:
                bins.append([index])
                room.append(self.budget.tokens - size)
        return [tuple(each) for each in bins]

    def _alike(self, chunk: list[int]) -> list[Micro]:
        """Rows of similar length together, so that little is padding."""
        found: list[list[int]] = []
        for index in chunk:
            if found and self.budget.admits([self.lengths[each] for each in (*found[-1], index)]):
                found[-1].append(index)
            else:
                found.append([index])
        return [tuple(each) for each in found]


@dataclass(frozen=True)
class Batch:
    """A micro-batch as tensors (B rows, T positions, P of which some row learns something at)."""

    inputs: dict[str, Any]
    keep: Any
    """(P,) Positions whose logits are made."""
    labels: Any
    """(B, P) The token that follows each of them; NOT_LEARNED where a row learns nothing there."""
    tokens: int
    """Without padding."""
    targets: int


def collate(samples: Sequence[Sample], pad_id: int, *, packing: bool) -> Batch:
    """The samples as one batch: packed into a single row, or each in its own, padded on the right.

    Padding needs no mask: it comes after everything that is learned, where causal attention never looks. (A mask would
    give rows of padding nothing to look at, which makes NaN of them in models with a sliding window.)
    Packed rows are kept apart by positions that begin anew at each: attention does not cross them (`lora.check_packing`
    makes sure for the model at hand). What is learned comes from spans alone, so a padding token may be the end token.
    """
    import torch

    lines = [list(samples)] if packing else [[sample] for sample in samples]
    width = max(sum(map(len, line)) for line in lines)
    ids = torch.full((len(lines), width), pad_id)  # (B, T)
    positions = torch.zeros((len(lines), width), dtype=torch.long)  # (B, T)
    labels = torch.full((len(lines), width), NOT_LEARNED)  # (B, T)
    for row, line in enumerate(lines):
        at = 0
        for sample in line:
            tokens = torch.tensor(sample.ids, dtype=torch.long)
            ids[row, at : at + len(sample)] = tokens
            positions[row, at : at + len(sample)] = torch.arange(len(sample))
            for start, end in sample.spans:
                labels[row, at + start - 1 : at + end - 1] = tokens[start:end]
            at += len(sample)
    keep = (labels != NOT_LEARNED).any(dim=0).nonzero().flatten()  # (P,)
    inputs = {"input_ids": ids, **({"position_ids": positions} if packing else {})}
    tokens, targets = sum(map(len, samples)), sum(sample.targets for sample in samples)
    return Batch(inputs, keep, labels[:, keep], tokens, targets)

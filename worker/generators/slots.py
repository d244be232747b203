"""The KV cache of the rows in flight, right-aligned so that rows of any length can join, leave and share a prefill.

Letters: B rows, H heads, W columns, D head size, V vocabulary. Row b fills the last `lengths[b]` of W columns; what
lies to the left of them is padding, masked out. Distances between a row's own tokens are distances between columns, so
sliding-window and chunked attention work by mask over the full length.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from worker.failures import ConfigFailure

GROWTH_COLUMNS = 64
"""Columns a cache is given beyond those in use: it is copied once per so many steps instead of at every step."""


@dataclass
class Block:
    """Rows with their cache. `mask` is int64 (B, at least W + 1), or None while no row is padded."""

    cache: Any
    lengths: Any  # int64 (B)
    width: int
    mask: Any


class Slots:
    """Runs a model over blocks of rows: `prefill` makes one, `merge` cuts and joins, `decode` goes a token further.

    `movable` is False for models that keep more than keys and values (recurrent state, compressed or indexed caches):
    their blocks cannot be merged. `paddable` says whether prompts of several lengths may be prefilled together.
    """

    def __init__(self, model: Any, device: Any) -> None:
        import torch

        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = device
        self._accepted = set(inspect.signature(self._model.forward).parameters)
        kind = self._model.config.model_type
        if "past_key_values" not in self._accepted:
            raise ConfigFailure(
                f"The engine hf cannot run models of type {kind}: they take no key-value cache.", "--set engine=vllm"
            )
        self._layers = self._empty_cache().layers
        self.movable = all(is_plain(layer) for layer in self._layers)
        # transformers' eager attention takes its softmax in float32, where float64's masking value is minus infinity: a
        # padding column, masked everywhere, would become NaN and spread.
        eager = getattr(self._model.config, "_attn_implementation", "") == "eager"
        self.paddable = self.movable and not (eager and self._model.dtype == torch.float64)
        self.model_type = kind

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Block, Any]:
        """A block of one row per prompt, left-padded to the longest, and the scores after its last token (B, V)."""
        import torch

        width = max(len(ids) for ids in prompts)
        ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=self.device)
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)
        mask = None
        if any(len(ids) < width for ids in prompts):
            mask = self._mask(lengths, width)
        columns = torch.arange(width, device=self.device)
        positions = (columns - (width - lengths)[:, None]).clamp_(min=0)  # (B, W)
        block = Block(self._growing_cache() if self.movable else self._empty_cache(), lengths, width, mask)
        return block, self._forward(block, ids, positions)

    def decode(self, block: Block, tokens: Any, alive: Any) -> Any:
        """The scores (B, V) after one more token (B) of each row; a row of which `alive` (B) is 0 stays where it is."""
        import torch

        if block.mask is not None and block.mask.shape[1] <= block.width:
            more = block.mask.new_ones((len(block.mask), GROWTH_COLUMNS))
            block.mask = torch.cat([block.mask, more], dim=1)
        block.width += 1
        logits = self._forward(block, tokens[:, None].to(self.device), block.lengths[:, None])
        block.lengths.add_(alive)
        return logits

    def merge(self, parts: Sequence[tuple[Block, Sequence[int]]]) -> Block:
        """One block of the named rows of each part, in order, a row as often as named; the parts are used up.

        Columns that would be padding in every row are left out.
        """
        import torch

        rows = [torch.tensor(indices, dtype=torch.int64, device=self.device) for _, indices in parts]
        lengths = torch.cat([block.lengths[index] for (block, _), index in zip(parts, rows, strict=True)])
        width = int(lengths.max())
        cache = self._growing_cache()
        for number, layer in enumerate(cache.layers):
            sources = [block.cache.layers[number] for block, _ in parts]
            if sources[0].keys is not None:
                layer.take(sources, rows, width)
        padded = int(lengths.min()) < width
        return Block(cache, lengths, width, self._mask(lengths, width) if padded else None)

    def _forward(self, block: Block, ids: Any, positions: Any) -> Any:
        inputs = {
            "input_ids": ids,
            "attention_mask": None if block.mask is None else block.mask[:, : block.width],
            "past_key_values": block.cache,
            "use_cache": True,
            "position_ids": positions,
            "logits_to_keep": 1,
        }
        taken = {name: value for name, value in inputs.items() if name in self._accepted}
        return self._model(**taken).logits[:, -1]

    def _mask(self, lengths: Any, width: int) -> Any:
        import torch

        columns = torch.arange(width + GROWTH_COLUMNS, device=self.device)
        return (columns >= (width - lengths)[:, None]).long()

    def _empty_cache(self) -> Any:
        """The cache transformers would make for this model."""
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _growing_cache(self) -> Any:
        from transformers import Cache

        growing = _growing_layer()
        return Cache(layers=[layer if holds_nothing(layer) else growing() for layer in self._layers])


def is_plain(layer: Any) -> bool:
    """Whether a layer of a cache keeps a key and a value for each token, or nothing: what can be cut and joined."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or holds_nothing(layer)


def holds_nothing(layer: Any) -> bool:
    """Whether a layer of a cache is there for the count only."""
    return type(layer).__name__ == "DummyLayer"  # by name: not every release of transformers has it


@functools.cache
def _growing_layer() -> Any:
    """The class of our cache layers; made in a function because its base class needs transformers to be imported."""
    from torch.nn import functional
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # the base class is untyped here
        """A cache layer with room to grow: keys and values (B, H, W, D) are views of tensors with more columns."""

        def __init__(self) -> None:
            super().__init__()
            self._rooms: list[Any] = []

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            """Appends the new columns and returns all; transformers calls it once per layer in each forward pass."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states, value_states
                return self.keys, self.values
            start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
            if not self._rooms or end > self._rooms[0].shape[2]:
                self._rooms = [functional.pad(old, (0, 0, 0, GROWTH_COLUMNS)) for old in (self.keys, self.values)]
            for room, new in zip(self._rooms, (key_states, value_states), strict=True):
                room[:, :, start:end] = new
            self.keys, self.values = (room[:, :, :end] for room in self._rooms)
            return self.keys, self.values

        def take(self, sources: Sequence[Any], rows: Sequence[Any], width: int) -> None:
            """Fills this new layer with rows of others, right-aligned at `width`, and empties those."""
            self.lazy_initialization(sources[0].keys, sources[0].values)
            for name in ("keys", "values"):
                room = _room([getattr(source, name) for source in sources], rows, width)
                self._rooms.append(room)
                setattr(self, name, room[:, :, :width])
                for source in sources:
                    setattr(source, name, None)

    return GrowingLayer


def _room(sources: Sequence[Any], rows: Sequence[Any], width: int) -> Any:
    """The named rows of the sources (each B, H, W, D) in one tensor: right-aligned at `width`, zeros left of them, and
    room to grow behind.
    """
    _, heads, _, size = sources[0].shape
    room = sources[0].new_empty((sum(len(index) for index in rows), heads, width + GROWTH_COLUMNS, size))
    start = 0
    for source, index in zip(sources, rows, strict=True):
        picked = source[:, :, -width:][index]
        part = room[start : start + len(index)]
        part[:, :, : width - picked.shape[2]] = 0  # masked, but a NaN left in memory would still spread
        part[:, :, width - picked.shape[2] : width] = picked
        start += len(index)
    return room

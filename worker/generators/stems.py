"""Forward passes over texts side by side, also after texts that were read before: the scores at single places.

Letters: B rows, H heads, W columns read before, S new columns, D head size, N places, V vocabulary. New texts are
left-aligned, so that what is right of them is never seen by them; what was read before is right-aligned behind a mask.
Distances between a row's own tokens are thus distances between columns, as models with sliding windows need it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from worker.generators.slots import holds_nothing, is_plain

Text = Sequence[int]
Place = tuple[int, int]
"""A row and a column of the new texts: the scores there are for the token that comes next."""


@dataclass
class Stem:
    """Texts that were read: of each layer keys and values (B, H, W, D), and how many tokens each row has."""

    layers: list[tuple[Any, Any] | None]
    lengths: list[int]
    width: int

    def pick(self, rows: Sequence[int]) -> Stem:
        """The stem of these rows, in order, a row as often as named."""
        import torch

        lengths = [self.lengths[row] for row in rows]
        width = max(lengths)

        def picked(held: Any) -> Any:
            if len(self.lengths) == 1:
                return held.expand(len(rows), -1, -1, -1)  # a copy is made when it is read on
            index = torch.tensor(rows, device=held.device)
            return held[:, :, self.width - width :].index_select(0, index)

        return Stem([held and (picked(held[0]), picked(held[1])) for held in self.layers], lengths, width)


class Reader:
    """A model that reads. `can_go_on` is False for models that keep more than keys and values: they start anew."""

    def __init__(self, model: Any, device: Any, max_length: int) -> None:
        """`max_length`: tokens the model has positions for."""
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._device = device
        self._max_length = max_length
        self._accepted = set(inspect.signature(self._model.forward).parameters)
        self._layers: list[Any] = []
        if "past_key_values" in self._accepted:
            from transformers import DynamicCache

            self._layers = DynamicCache(config=self._model.config).layers
        self.can_go_on = bool(self._layers) and all(map(is_plain, self._layers))

    def read(self, texts: Sequence[Text], places: Sequence[Place], stem: Stem | None = None) -> Any:
        """The scores (N, V) at these places of the texts, each read after its row of the stem."""
        return self._read(texts, places, stem, None)

    def read_and_keep(self, texts: Sequence[Text], places: Sequence[Place], stem: Stem | None) -> tuple[Any, Stem]:
        """The same, and the stem with the texts in it, to go on from."""
        cache = self._cache(stem)
        logits = self._read(texts, places, stem, cache)
        return logits, self._kept(cache, texts, stem)

    def _read(self, texts: Sequence[Text], places: Sequence[Place], stem: Stem | None, cache: Any) -> Any:
        import torch

        size = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (size - len(text))] for text in texts], device=self._device)  # (B, S)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        if stem is not None:
            cache = cache or self._cache(stem)
            inputs |= {"use_cache": True, **self._after(stem, size)}
        if cache is not None:
            inputs["past_key_values"] = cache
        return self._logits({name: held for name, held in inputs.items() if name in self._accepted}, places)

    def _after(self, stem: Stem, size: int) -> dict[str, Any]:
        """Positions of new columns behind a stem, and the mask over what its rows lack of its width."""
        import torch

        lengths = torch.tensor(stem.lengths, device=self._device)[:, None]  # (B, 1)
        positions = (lengths + torch.arange(size, device=self._device)).clamp_(max=self._max_length - 1)
        if min(stem.lengths) == stem.width:
            return {"position_ids": positions}
        columns = torch.arange(stem.width + size, device=self._device)
        return {"position_ids": positions, "attention_mask": (columns >= stem.width - lengths).long()}  # (B, W + S)

    def _logits(self, inputs: dict[str, Any], places: Sequence[Place]) -> Any:
        """Scores at the places alone: the last layer, the dearest in time and memory, is given nothing else."""
        rows, columns = zip(*places, strict=True)
        head = self._model.get_output_embeddings()
        seen = []

        def narrow(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(given[0])
            return (given[0][list(rows), list(columns)][None], *given[1:])  # (1, N, hidden)

        hook = head.register_forward_pre_hook(narrow) if head is not None else None
        try:
            logits = self._model(**inputs).logits
        finally:
            if hook is not None:
                hook.remove()
        return logits[0] if seen else logits[list(rows), list(columns)]

    def _cache(self, stem: Stem | None) -> Any:
        """A cache that holds the stem, full length in every layer."""
        from transformers import Cache
        from transformers.cache_utils import DynamicLayer

        layers = [layer if holds_nothing(layer) else DynamicLayer() for layer in self._layers]
        for layer, held in zip(layers, stem.layers if stem else [None] * len(layers), strict=True):
            if held is not None:
                layer.lazy_initialization(*held)
                layer.keys, layer.values = held
        return Cache(layers=layers)

    def _kept(self, cache: Any, texts: Sequence[Text], stem: Stem | None) -> Stem:
        """What the cache holds after these texts were read, right-aligned."""
        import torch

        before, width = (stem.lengths, stem.width) if stem else ([0] * len(texts), 0)
        lengths = [old + len(text) for old, text in zip(before, texts, strict=True)]
        new_width = max(lengths)
        ends = torch.tensor([width + len(text) for text in texts], device=self._device)[:, None]  # (B, 1)
        columns = (ends - new_width + torch.arange(new_width, device=self._device)).clamp_(min=0)  # (B, new W)

        def aligned(held: Any) -> Any:
            if min(lengths) == new_width == held.shape[2]:
                return held
            _, heads, _, size = held.shape
            return held.gather(2, columns[:, None, :, None].expand(-1, heads, -1, size))

        layers = [(aligned(layer.keys), aligned(layer.values)) if _is_filled(layer) else None for layer in cache.layers]
        return Stem(layers, lengths, new_width)


def _is_filled(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None

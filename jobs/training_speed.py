"""What a measured training comes to: share of the device's peak, where the rest goes, the next change, a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jobs import training_memory
from jobs.decoders import Shape
from jobs.training_memory import FULL, Recipe

GOOD = 0.6
"""Share of a device's measured matrix products that training reaches where nothing is in its way: the best published
for LoRA on one H100 is 42 % of the data sheet's, 61 % with what it computes again (NeMo AutoModel, Llama 3 8B)."""
ASSUMED = 0.3
"""Share of a data sheet's peak that an ordinary stack reaches (31 to 40 %: Qwen's and torchtune's tables, A100)."""
_DEQUANTIZED_BYTES = {"none": 0.0, "int8": 5.0, "nf4": 4.5}
"""Moved for a parameter in each pass: read in few bits, written and read again in 16 (0.52 + 2 + 2 for nf4)."""
_WORTH = 1.05
"""A smaller gain is not proposed: predictions are no better than that."""


@dataclass(frozen=True)
class Measured:
    """A training as it was measured; means over all steps that count."""

    shape: Shape
    recipe: Recipe
    """With the tokens of the largest micro-batch that the settings allow."""
    seconds: float
    """Of a step."""
    micros: float
    """Micro-batches of a step."""
    slots: float
    """Tokens of a step, padding counted."""
    tokens: float
    """Without padding."""
    targets: float
    """Those that are learned."""
    length: float
    """Of the row that a token is in."""
    peak_flops: float
    """Floating-point operations a second of matrix products, the most this device did."""
    copied: float
    """Bytes a second, read and written, that it copies."""
    has_bytes: float

    @property
    def adapter(self) -> int:
        """Parameters of the adapter."""
        return self.shape.adapter(self.recipe.rank, self.recipe.targets)

    @property
    def flops(self) -> float:
        """A real token's, without what is computed again: `Shape.flops`."""
        return self.shape.flops(self.length, self.targets / self.tokens, self.adapter)

    @property
    def recomputed(self) -> float:
        """A token's, for what is computed again."""
        checkpointing = self.recipe.activation_checkpointing
        return self.shape.recomputed(self.length, self.adapter) if checkpointing else 0.0

    def shares(self) -> dict[str, float]:
        """Of the peak: real tokens' work, the same with what is computed again; and what was lost to what."""
        seconds = self.seconds * self.peak_flops
        whole = self.flops + self.recomputed
        return {
            "share_of_peak": self.tokens * self.flops / seconds,
            "share_of_peak_with_recompute": self.tokens * whole / seconds,
            "padding": 1 - self.tokens / self.slots,
            "recompute": self.recomputed / whole,
            "dequantization": min(1.0, self.micros * self._dequantizing(self.recipe) / self.seconds),
        }

    def change(self) -> dict[str, Any] | None:
        """The one change with the largest predicted gain: settings as typed, how many times as fast, seconds a step.

        The model: a micro-batch takes its tokens' work at `GOOD` of the peak (or at what was measured, if better),
        dequantizing once a pass whatever its size, and the rest, which is the same for one of any size. None when
        nothing gains 5 %, or when it would not fit.
        """
        found = [(self._gain(changed, tokens), typed) for changed, tokens, typed in self._changes()]
        gain, typed = max(found, default=(0.0, {}), key=lambda each: each[0])
        return {"settings": typed, "gain": gain, "seconds_per_step": self.seconds / gain} if gain >= _WORTH else None

    def _changes(self) -> Iterator[tuple[Recipe, float, dict[str, Any]]]:
        """Each change that fits into the memory: the recipe, real tokens of its micro-batches, settings as typed."""
        recipe, mean = self.recipe, self.tokens / self.micros
        if not recipe.packing and self._fits(packed := replace(recipe, packing=True)):
            yield packed, float(recipe.tokens), {"packing": True}
        room = min(training_memory.within(self.shape, recipe, self.has_bytes), round(self.slots))
        pieces = math.ceil(self.slots / max(room, 1))  # as many tokens a step as now: more is another training
        if pieces < round(self.micros):
            larger = math.ceil(self.slots / pieces)
            typed = {"batch_tokens": larger, "accumulation": pieces}
            yield replace(recipe, tokens=larger), self.tokens / pieces, typed
        if recipe.activation_checkpointing and self._fits(kept := replace(recipe, activation_checkpointing=False)):
            yield kept, mean, {"activation_checkpointing": False}
        if recipe.quantization != "none" and self._fits(whole := replace(recipe, quantization="none")):
            yield whole, mean, {"quantization": "none"}

    def _fits(self, recipe: Recipe) -> bool:
        return training_memory.needs(self.shape, recipe).on_gpu <= FULL * self.has_bytes

    def _gain(self, changed: Recipe, tokens: float) -> float:
        """How many times as fast a real token is learned, with so many of them in a micro-batch."""
        now = self.seconds / self.micros
        slots = tokens if changed.packing else tokens * self.slots / self.tokens
        dequantizing = min(now, self._dequantizing(self.recipe))
        rate = max(GOOD * self.peak_flops, self._work(self.recipe) * self.slots / self.micros / max(now, 1e-9))
        computing = self._work(self.recipe) * self.slots / self.micros / rate
        rest = max(0.0, now - dequantizing - computing)
        then = self._work(changed) * slots / rate + min(now, self._dequantizing(changed)) + rest
        return (now / (self.tokens / self.micros)) / (then / tokens)

    def _work(self, recipe: Recipe) -> float:
        return self.flops + (self.recomputed if recipe.activation_checkpointing else 0.0)

    def _dequantizing(self, recipe: Recipe) -> float:
        """Seconds of a micro-batch, as an estimate: every frozen matrix forward, backward, and once more if anew."""
        passes = 3 if recipe.activation_checkpointing else 2
        return passes * _DEQUANTIZED_BYTES[recipe.quantization] * self.shape.body / self.copied


@dataclass(frozen=True)
class Limits:
    """Seconds a step that part the verdicts."""

    go_s: float = 5.0
    usable_s: float = 30.0
    pivot_s: float = 60.0

    def verdict(self, seconds: float, changed: float | None) -> str:
        """`go`, `usable` or `pivot`; between usable and pivot it is what the best change would make of it."""
        if seconds <= self.go_s:
            return "go"
        if seconds <= self.usable_s:
            return "usable"
        return "usable" if seconds <= self.pivot_s and changed is not None and changed <= self.usable_s else "pivot"

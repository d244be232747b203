"""Whether a training fits on a GPU: what it holds, by what takes it, and what would make it smaller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs import training_memory
from jobs.decoders import Shape
from jobs.training_memory import FULL, Needs, Recipe
from orchestrator import ledger
from orchestrator.preflight.findings import Finding
from orchestrator.providers.base import Offer

GB = 1e9
_SIZES_GB = (16, 24, 32, 40, 48, 80, 96, 141, 180)
"""What GPUs that can be rented have."""
_STORIES = ("train", "speed")
_SHOWN = 8
_LEAST_TOKENS = 1024
"""Fewer in a micro-batch hold no long row, and leave a GPU idle most of the time."""
_STEP = 256
"""Tokens of a micro-batch are proposed in such steps."""


@dataclass(frozen=True)
class Training:
    """A training of a model whose shape is known, by its recipe at the largest micro-batch."""

    asked: str
    shape: Shape
    recipe: Recipe

    @classmethod
    def of(cls, story: str, params: Mapping[str, Any], config: Mapping[str, Any], dtype: str) -> Training | None:
        """That of a job; None when it trains nothing on a GPU, or the model is of a kind that is not counted here."""
        shape = Shape.of(config)
        if story not in _STORIES or params.get("device") not in (None, "auto", "cuda") or shape is None:
            return None
        return cls(f"model={params['model']}", shape, Recipe.of(params, dtype))

    @property
    def needs(self) -> Needs:
        """Counted as if every token were learned, which is the most."""
        return training_memory.needs(self.shape, self.recipe)

    def line(self) -> str:
        """What it takes, for people."""
        needs = self.needs
        parts = {"weights": needs.weights, "adapter": needs.adapter, "activations": needs.activations}
        words = ", ".join(f"{name} {size / GB:.1f}" for name, size in {**parts, "work": needs.work}.items())
        return f"Training it at {self.recipe.tokens} tokens a micro-batch takes {needs.on_gpu / GB:.1f} GB ({words})."

    def check(self, offer: Offer) -> list[Finding]:
        """Whether it fits on one GPU of this machine: an error where it cannot even if hardly a token is learned."""
        if offer.gpu is None or offer.vram_gb is None:
            what = "has no GPU, and a training needs one" if offer.gpu is None else "does not say its GPU's memory"
            return [Finding("warning", "memory_not_known", f"{offer.type_name} {what}.")]
        has = offer.vram_gb * GB
        least = training_memory.needs(self.shape, replace(self.recipe, learned=0.0)).on_gpu
        if self.needs.on_gpu <= FULL * has:
            return []
        message = f"{self.line()} One {offer.gpu} has {offer.vram_gb:g} GB."
        if least <= has:
            message += " It fits only where few tokens of a row are learned."
        return [Finding("error" if least > has else "warning", "does_not_fit", message, self.hint(has))]

    def hint(self, has_bytes: float | None = None) -> str:
        """What would fit into so much memory, or what takes less than this: each way as it is typed."""
        fitting = next((size for size in _SIZES_GB if size * GB * FULL >= self.needs.on_gpu), None)
        ways = [] if fitting is None else [f"a GPU with {fitting} GB"]
        for changes in self._ways():
            changed = replace(self.recipe, **changes)
            tokens = changed.tokens if has_bytes is None else training_memory.within(self.shape, changed, has_bytes)
            tokens = min(changed.tokens, tokens // _STEP * _STEP)
            if tokens < min(_LEAST_TOKENS, changed.tokens) or (tokens == changed.tokens and not changes):
                continue
            typed = {**changes, **({"batch_tokens": tokens} if tokens < changed.tokens else {})}
            takes = training_memory.needs(self.shape, replace(changed, tokens=tokens)).on_gpu
            ways.append(
                f"{' '.join(f'--set {name}={_typed(value)}' for name, value in typed.items())} ({takes / GB:.1f} GB)"
            )
        return f"What fits: {'; '.join(ways)}." if ways else "Take a smaller model: nothing else makes it fit."

    def _ways(self) -> Iterator[dict[str, Any]]:
        """What can be changed beside the tokens of a micro-batch; the least loss of speed first."""
        checkpointing = {} if self.recipe.activation_checkpointing else {"activation_checkpointing": True}
        fewer_bits = {} if self.recipe.quantization == "nf4" else {"quantization": "nf4"}
        ways: list[dict[str, Any]] = [{}, checkpointing, fewer_bits, {**checkpointing, **fewer_bits}]
        yield from (way for at, way in enumerate(ways) if way not in ways[:at])

    def among(self, offered: Sequence[Offer]) -> list[str]:
        """Which kinds of machine it fits on, cheapest first, one line each, and which are too small."""
        cheapest: dict[tuple[str, float], Offer] = {}
        for offer in sorted(offered, key=lambda one: one.price_usd_per_hour):
            if offer.available and offer.gpu and offer.vram_gb and offer.count == 1 and not offer.spot:
                cheapest.setdefault((offer.gpu, round(offer.vram_gb)), offer)
        fits = [one for one in cheapest.values() if not self.check(one)]
        small = sorted({f"{one.gpu} {one.vram_gb:g} GB" for one in cheapest.values() if self.check(one)})
        lines = [
            f"fits {100 * self.needs.on_gpu / GB / (one.vram_gb or 1):.0f} % of {one.gpu} {one.vram_gb:g} GB: "
            f"{ledger.shown(one.price_usd_per_hour)} USD/h ({one.provider})"
            for one in fits[:_SHOWN]
        ]
        return [*lines, *([f"too small: {', '.join(small[:_SHOWN])}"] if small else [])]


def _typed(value: object) -> str:
    return str(value).lower()

"""How much memory a LoRA or QLoRA training holds at its most, in bytes, from its recipe and the model's shape alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.decoders import Shape

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number."""
_FROZEN = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a quantized parameter: 4 bits, a scale of 8 bits for 64 of them, and one of 32 for 256 scales (QLoRA,
section 3). LLM.int8 has a scale a row besides, which is nothing."""
_STATES = {"adamw": 8, "adamw_8bit": 2}
"""Bytes of AdamW's two moments of a parameter."""
_SMALL = 4096
"""Entries below which bitsandbytes keeps a matrix's moments in 32 bits (`min_8bit_size`)."""
_WEIGHT_BYTES = 4
"""Of an adapter's number and of its gradient: float32, whatever the base is."""
_SCORE_BYTES = 12
"""Of one score of one learned token while its gradient is made: log-softmax, the gradient of the loss, and its own."""
PART_BYTES = 256 << 20
"""Of float32 scores that a training makes at a time; more of them are made part by part (`worker/losses.py`)."""
CONTEXT_BYTES = 1e9
"""What CUDA, cuBLAS and PyTorch take on a GPU before the first weight: 0.5 to 0.9 GB, by card and version."""
SPARE = 1.05
"""Room for what PyTorch's allocator loses between blocks of unequal sizes."""
FULL = 0.92
"""Share of a GPU that a training may be counted to take."""


@dataclass(frozen=True)
class Recipe:
    """What of a training decides its memory; `tokens`: those of a micro-batch, padding counted."""

    tokens: int
    dtype: str = "bfloat16"
    quantization: str = "none"
    optimizer: str = "adamw"
    rank: int = 8
    targets: str = "q_proj,v_proj"
    packing: bool = False
    activation_checkpointing: bool = False
    learned: float = 1.0
    """Share of those tokens whose scores are made."""

    @classmethod
    def of(cls, params: Mapping[str, Any], dtype: str, tokens: int | None = None) -> Recipe:
        """That of a job's parameters, at the largest micro-batch they allow unless `tokens` says another."""
        most = int(params["batch_tokens"] or params["batch_size"] * params["max_length"])
        names = ("quantization", "optimizer", "rank", "targets", "packing", "activation_checkpointing")
        return cls(tokens=tokens or most, dtype=dtype, **{name: params[name] for name in names})


@dataclass(frozen=True)
class Needs:
    """Memory in bytes, by what takes it."""

    weights: float
    adapter: float
    """Its weights, their gradients, and the optimizer's state."""
    activations: float
    """What the forward pass keeps for the backward pass."""
    work: float
    """What comes and goes beside that at the worst moment: scores and their gradients, or a layer on its way back."""

    @property
    def tensors(self) -> float:
        """All that PyTorch holds at once: what `torch.cuda.max_memory_allocated` says."""
        return self.weights + self.adapter + self.activations + self.work

    @property
    def on_gpu(self) -> float:
        """What a GPU must have for it: with CUDA's own part, and room for what falls between blocks."""
        return SPARE * self.tensors + CONTEXT_BYTES

    def document(self) -> dict[str, float]:
        """All of it for JSON, in bytes."""
        return {**asdict(self), "tensors": self.tensors, "on_gpu": self.on_gpu}


def needs(shape: Shape, recipe: Recipe) -> Needs:
    """The most that a training of this recipe holds, in bytes, on one GPU.

    Counted is what autograd keeps in transformers 5 (scaled-dot-product attention) under peft 0.21, which casts the
    input of every adapted matrix to float32; within 10 % of the tensors counted in real steps, `tests/worker/
    test_held.py`. T tokens, s bytes a number of the base, L layers, p adapter parameters:
    weights = body x (s, 1 or 0.516) + s x vocabulary; adapter = p x (4 + 4 + 8, or 2 in 8 bits);
    activations = L x T x a layer's (`_layer`), with checkpointing s x L x T x hidden and one layer's;
    work = the larger of 12 x learned x T x words, or of a part of them, and 3 s x T x wide on the way back through a
    feed-forward.
    """
    size, tokens = SIZES[recipe.dtype], recipe.tokens
    parameters = shape.adapter(recipe.rank, recipe.targets)
    layer = _layer(shape, recipe)
    kept = shape.layers * layer
    back: float = 3 * size * tokens * shape.wide
    if recipe.activation_checkpointing:
        kept = size * shape.layers * tokens * shape.hidden
        back += layer
    if recipe.quantization != "none":  # the matrix that is at work, in full
        back += size * max(wide * tall for wide, tall in shape.matrices.values())
    frozen = _FROZEN.get(recipe.quantization, size)
    return Needs(
        weights=frozen * shape.body + size * (shape.parameters - shape.body),
        adapter=parameters * 2 * _WEIGHT_BYTES + _states(shape, recipe),
        activations=kept,
        work=max(back, _SCORE_BYTES * min(recipe.learned * tokens * shape.words, PART_BYTES / 4)),
    )


def _states(shape: Shape, recipe: Recipe) -> float:
    """AdamW's moments of all adapter matrices; those of small ones are never in 8 bits."""
    matrices = [shape.matrices[name] for name in shape.adapted(recipe.targets)]
    halves = [recipe.rank * side for sides in matrices for side in sides]
    least = _STATES[recipe.optimizer]
    return float(shape.layers * sum(half * (least if half >= _SMALL else _STATES["adamw"]) for half in halves))


def _layer(shape: Shape, recipe: Recipe) -> float:
    """What one layer keeps for the way back, in bytes.

    Of a token: both norms in float32, queries and what attention gives back, keys and values, three vectors of the
    feed-forward, and the adapters' inputs in float32: shared with what is kept anyway where the base is float32.
    Packed rows have a mask, T x T, for which keys and values are repeated for every head.
    """
    size, tokens = SIZES[recipe.dtype], recipe.tokens
    adapted = shape.adapted(recipe.targets)
    numbers = 2 * shape.queries + 3 * shape.wide
    numbers += 2 * (shape.queries if recipe.packing else shape.keys)
    token = size * numbers + 2 * 4 * shape.hidden + 4 * shape.heads + 4 * recipe.rank * len(adapted)
    inputs = {name: shape.matrices[name][0] for name in adapted}
    if size >= 4:  # the inputs themselves, each once; what attention gives back is kept already
        shared = {"q_proj": "norm", "k_proj": "norm", "v_proj": "norm", "gate_proj": "other", "up_proj": "other"}
        inputs = {shared.get(name, name): width for name, width in inputs.items() if name != "o_proj"}
    token += max(size, 4) * sum(inputs.values())
    return float(token * tokens + (size * tokens * tokens if recipe.packing else 0))


def within(shape: Shape, recipe: Recipe, has_bytes: float) -> int:
    """The most tokens of a micro-batch that so much memory is enough for; 0 when none are."""
    low, high = 0, 1 << 22
    while low < high:
        middle = (low + high + 1) // 2
        fits = needs(shape, replace(recipe, tokens=middle)).on_gpu <= FULL * has_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low

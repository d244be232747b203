"""How much GPU memory and disk a job needs, in bytes, from a model's configuration and the sizes of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jobs.decoders import Shape, number
from jobs.training_memory import CONTEXT_BYTES, SIZES, SPARE
from orchestrator.preflight.model import Model

GB = 1e9
"""Offers call a GPU of 24 GiB one of 24 GB: counted as 10^9 bytes, it has 7 % more than is counted on."""
_STORED = {"F64": 8.0, "F32": 4.0, "BF16": 2.0, "F16": 2.0, "F8_E4M3": 1.0, "F8_E5M2": 1.0}
"""Bytes of one floating-point number in a safetensors file; loading turns them all into the job's dtype."""
ENVIRONMENT_GB = 8.0
"""PyTorch with CUDA, transformers and what they bring, installed; their downloads are not kept."""
DATASET_GB = 2.0
"""Benchmarks have megabytes; a Hub dataset is kept as downloaded and once more as Arrow."""
PROMPT_TOKENS, SHOT_TOKENS = 512, 384
"""The longest GSM8K question has about 250 tokens; with its worked solution, 400 hold nearly all."""
_GROWTH_TOKENS = 64
_PREFILL_TOKENS = 16_384
"""The worker's: room its cache is given at a time, and prompt tokens of one prefill unless one prompt has more."""
_SCORE_BYTES = 32
"""Of each word of the vocabulary while a token is drawn: its score, twice in float32, sorted with noise in float64."""
WINDOW_TOKENS = 8192
"""Of a text that is read for its perplexity; of WikiText's articles nearly all are shorter."""
_SUMMED_ROWS = 512
"""The worker's, of likelihoods: places whose scores are turned into float32 at once."""


@dataclass(frozen=True)
class Load:
    """What a job asks of the memory. `rows`: completions in flight; None: as many as fit."""

    dtype: str
    prompt_tokens: int
    max_new_tokens: int
    rows: int | None = None
    scored_tokens: int | None = None
    """Where likelihoods are read: places of one text at which scores are made."""

    @classmethod
    def of(cls, params: Mapping[str, Any], limit: int | None, prompt_tokens: int | None) -> Load | None:
        """The load of a job that generates or reads likelihoods; None for another. `auto` on a GPU has two bytes."""
        if "max_new_tokens" not in params:
            return cls._reading(params, prompt_tokens) if "max_length" in params else None
        shots = params.get("shots") or 0
        guess = PROMPT_TOKENS + SHOT_TOKENS * shots + len(params.get("instruction") or "") // 2 * (1 + shots)
        rows = params.get("batch_size")
        rows = (
            None
            if not isinstance(rows, int)
            else rows
            if limit is None
            else min(rows, limit * (params.get("samples") or 1))
        )
        return cls(dtype_of(params), guess if prompt_tokens is None else prompt_tokens, params["max_new_tokens"], rows)

    @classmethod
    def _reading(cls, params: Mapping[str, Any], prompt_tokens: int | None) -> Load:
        """Of questions with choices a prompt, scored at its end; of texts a window, scored throughout.

        Of one text: how many are read at once, the worker bounds by their tokens.
        """
        chooses, asked = "shots" in params, params["max_length"]
        guess = PROMPT_TOKENS + SHOT_TOKENS * (params["shots"] or 0) if chooses else WINDOW_TOKENS
        tokens = min(prompt_tokens or guess, asked if isinstance(asked, int) else guess)
        scored = SHOT_TOKENS if chooses else tokens
        return cls(dtype_of(params), tokens, 0, scored_tokens=scored)

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds of one completion at its longest."""
        return self.prompt_tokens + self.max_new_tokens + _GROWTH_TOKENS


@dataclass(frozen=True)
class Needs:
    """GPU memory in bytes, by what takes it, of one completion at a time; a part that is not known is None."""

    weights: float
    cache_per_row: float | None
    cache_is_exact: bool
    prompt_tokens: int
    work_per_token: float
    """Of a prompt, while it is read."""
    scores_per_row: float

    def cache(self, rows: int = 1) -> float:
        """Keys and values of so many completions at their longest; 0 when not known."""
        return SPARE * rows * (self.cache_per_row or 0.0)

    def work(self, rows: int = 1) -> float:
        """What comes and goes: a layer at work on prompts, and the scores that tokens are drawn from."""
        tokens = max(self.prompt_tokens, min(rows * self.prompt_tokens, _PREFILL_TOKENS))
        return SPARE * (tokens * self.work_per_token + rows * self.scores_per_row)

    def total(self, rows: int = 1) -> float:
        """All of it for so many completions at once."""
        return self.weights + CONTEXT_BYTES + self.cache(rows) + self.work(rows)


def dtype_of(params: Mapping[str, Any]) -> str:
    """The dtype that a job has on a GPU."""
    asked = params.get("dtype", "auto")
    return "bfloat16" if asked == "auto" else str(asked)


def needs(model: Model, load: Load, adapter_bytes: float = 0.0) -> Needs | None:
    """What generating takes on one GPU; None when the size of the weights is not known."""
    weights = weights_bytes(model, load.dtype)
    if weights is None:
        return None
    per_token = cached_numbers_per_token(model.text_config)
    size, words = SIZES[load.dtype], number(model.text_config, "vocab_size") or 256_000
    scores = _SCORE_BYTES
    if (scored := load.scored_tokens) is not None:
        context = context_tokens(model.text_config) or load.prompt_tokens
        load = replace(load, prompt_tokens=min(load.prompt_tokens, context))
        places = min(scored, load.prompt_tokens)
        scores = places * size + min(places, _SUMMED_ROWS) * 4
    return Needs(
        weights=weights + adapter_bytes * max(1.0, size / 2),
        cache_per_row=None if per_token is None else float(per_token[0] * size * load.tokens),
        cache_is_exact=per_token is not None and per_token[1],
        prompt_tokens=load.prompt_tokens,
        work_per_token=float(_numbers_per_prompt_token(model.text_config) * size),
        scores_per_row=float(words * scores),
    )


def needs_vram_gb(model: Model, load: Load, adapter_bytes: float = 0.0) -> float | None:
    """The least memory of a GPU, in GB, on which the job can make one completion at a time; None: not known."""
    needed = needs(model, load, adapter_bytes)
    return None if needed is None else needed.total() / GB


def needs_disk_gb(transfer_bytes: float, dataset_bytes: float = 0.0) -> float:
    """The disk a machine needs, in GB, for a model of that many bytes, the dataset and the worker's packages."""
    return transfer_bytes / GB + ENVIRONMENT_GB + max(DATASET_GB, 2 * dataset_bytes / GB)


def weights_bytes(model: Model, dtype: str) -> float | None:
    """The loaded weights: each parameter in the job's dtype; quantised ones, which stay so, as they are stored."""
    stored = model.weight_bytes()
    if model.is_quantised():
        return stored
    size = SIZES[dtype]
    if counts := model.listing.parameters:
        return float(sum(count * (size if kind in _STORED else 1) for kind, count in counts.items()))
    if stored is None:
        count = parameter_count(model.text_config)
        return None if count is None else float(count * size)
    said = str(model.text_config.get("dtype") or model.text_config.get("torch_dtype")).removeprefix("torch.")
    return stored / SIZES.get(said, 2) * size


def cached_numbers_per_token(config: Mapping[str, Any]) -> tuple[int, bool] | None:
    """How many numbers the KV cache holds of each token, over all layers; and whether that is exact or the most.

    Every layer counts with all tokens: sliding windows are not made use of by the worker's cache, and layers of
    another kind (recurrent ones) hold less. Compressed caches (MLA) count as they are computed with, uncompressed.
    None when the configuration does not say it.
    """
    layers = number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = number(config, "num_attention_heads", "n_head", "n_heads")
    if layers is None or heads is None:
        return None
    if number(config, "kv_lora_rank") is not None:  # DeepSeek-V2, section 2.1: multi-head latent attention
        parts = [number(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
        per_head = [part for part in parts if part is not None]
        return (layers * heads * sum(per_head), False) if len(per_head) == len(parts) else None
    hidden = number(config, "hidden_size", "n_embd", "d_model")
    size = number(config, "head_dim") or (hidden // heads if hidden else None)
    if size is None:
        return None
    kv_heads = number(config, "num_key_value_heads", "num_kv_heads") or heads
    numbers = 2 * layers * kv_heads * size
    if (wide := number(config, "global_head_dim")) is not None:  # layers of two shapes: the larger for all
        numbers = max(numbers, 2 * layers * (number(config, "num_global_key_value_heads") or kv_heads) * wide)
    kinds = config.get("layer_types")
    plain = not isinstance(kinds, list) or all(str(kind).endswith("attention") for kind in kinds)
    plain = plain and "linear_attention" not in (kinds or []) and not config.get("multi_query")
    return numbers, plain and wide is None and not _is_hybrid(config)


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int | None:
    """The KV cache of one token of one completion; None: not known."""
    numbers = cached_numbers_per_token(config)
    return None if numbers is None else numbers[0] * SIZES[dtype]


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """Prompt and completion together that the model was made for; None: not known."""
    return number(config, "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")


def parameter_count(config: Mapping[str, Any]) -> int | None:
    """The parameters of a dense model of Llama's shape with this configuration; None for any other."""
    shape = Shape.of(config)
    return None if shape is None else shape.parameters


def _numbers_per_prompt_token(config: Mapping[str, Any]) -> int:
    """The numbers that the layer at work holds of a prompt's token; of an unknown model, what one of 70B has.

    Eight vectors of the hidden size (residual, norm, queries, keys, values, output), three of the feed-forward's.
    """
    hidden = number(config, "hidden_size", "n_embd", "d_model") or 8192
    wide = number(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    return 8 * hidden + 3 * wide


def _is_hybrid(config: Mapping[str, Any]) -> bool:
    """Whether some layers keep a state of another kind."""
    signs = ("mamba", "ssm_", "conv_kernel", "linear_num", "rwkv", "attn_layer", "block_types", "layers_block_type")
    return any(name.startswith(signs) for name in config)

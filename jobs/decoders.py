"""The shape of a decoder, from its config.json: its matrices, an adapter on them, and what a step computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALL_LINEAR = "all-linear"
_DIMENSION_MAX = 10**8
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
"""Where models that also see or hear keep the configuration of the part that writes."""
_OTHER = ("expert", "mamba", "ssm_", "conv_kernel", "linear_num", "rwkv", "attn_layer", "block_types", "kv_lora")
"""Parts of names in configurations of models with experts, or with layers of another kind."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder of Llama's kind: attention with grouped heads, a gated feed-forward."""

    layers: int
    hidden: int
    wide: int
    """Of the feed-forward."""
    heads: int
    kv_heads: int
    head: int
    """Numbers of one head."""
    words: int
    tied: bool
    """The embedding is the head, too."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape | None:
        """That of a configuration; None for a model of any other kind, of which nothing here would be true."""
        config = text_part(config)
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        layers, hidden, wide, heads, words = (number(config, name) for name in names)
        if not (layers and hidden and wide and heads and words):
            return None
        if any(part in name for name, value in config.items() if value for part in _OTHER):
            return None
        return cls(
            layers=layers,
            hidden=hidden,
            wide=wide,
            heads=heads,
            kv_heads=number(config, "num_key_value_heads") or heads,
            head=number(config, "head_dim") or hidden // heads,
            words=words,
            tied=bool(config.get("tie_word_embeddings")),
        )

    @property
    def queries(self) -> int:
        """Numbers of a token's queries, and of what attention gives back."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Numbers of a token's keys, and of its values."""
        return self.kv_heads * self.head

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Each matrix of a layer by its module's name: numbers in, numbers out."""
        hidden, wide, queries, keys = self.hidden, self.wide, self.queries, self.keys
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }

    @property
    def body(self) -> int:
        """Parameters of all these matrices: what is quantized."""
        return self.layers * sum(wide * tall for wide, tall in self.matrices.values())

    @property
    def vocabulary(self) -> int:
        """Parameters of the embedding and of the head, which are not quantized."""
        return self.words * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them, but the biases that few models have."""
        return self.body + self.vocabulary + self.hidden * (2 * self.layers + 1)

    def adapted(self, targets: str) -> list[str]:
        """The matrices of a layer that get adapter layers; all, where a name is none of Llama's."""
        asked = [word.strip() for word in targets.split(",")]
        known = [name for name in self.matrices if name in asked]
        return known if len(known) == len(asked) else list(self.matrices)

    def adapter(self, rank: int, targets: str) -> int:
        """Parameters of an adapter."""
        return self.layers * rank * sum(sum(self.matrices[name]) for name in self.adapted(targets))

    def flops(self, length: float, learned: float, adapter: int) -> float:
        """Floating-point operations that one token's step costs, recomputing left out; 2 for a multiply-add.

        `length`: tokens of the row it is in; `learned`: share of tokens whose scores are made. Frozen matrices have no
        weight gradient, so a step passes twice through them where full training passes three times:
        4 body + 4 head x learned + 3 attention + 6 adapter, attention = 2 x length x queries x layers (causal half).
        """
        head = self.words * self.hidden
        return 4 * self.body + 4 * head * learned + 3 * self._attention(length) + 6 * adapter

    def recomputed(self, length: float, adapter: int) -> float:
        """What activation checkpointing adds to that: the layers forward once more."""
        return 2 * self.body + self._attention(length) + 2 * adapter

    def _attention(self, length: float) -> float:
        return 2 * length * self.queries * self.layers


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the part that writes."""
    parts = (config.get(name) for name in _TEXT_CONFIGS)
    return next((part for part in parts if isinstance(part, dict) and part), config)


def number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that is a sensible whole number; of a list, one entry a layer, the largest."""
    for name in names:
        value = config.get(name)
        if isinstance(value, list) and value and all(isinstance(entry, int) for entry in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _DIMENSION_MAX:
            return value
    return None

"""Tiny random models and tokenizers, built in memory, for the tests of what loads and runs models."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from worker.models import LoadedModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|start|>", "<|end|>")
VOCABULARY = len(SPECIAL_TOKENS) + 256

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough for the next token to depend on the ones before
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # tied, a random model repeats itself
}
OLD_SIZES = {
    "vocab_size": VOCABULARY,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
SLIDING = {"head_dim": 8, "sliding_window": 8}


def tokenizer(adds_bos: bool = False, chat_template: str | None = None) -> Any:
    """A tokenizer with a token per byte; `adds_bos` as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|start|>", "<|end|>"],
        chat_template=chat_template,
    )


BUILDERS: dict[str, Any] = {
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "gemma2": lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, **SLIDING)),
    "gemma3": lambda t: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**SIZES, **SLIDING, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(**OLD_SIZES, n_embd=32, n_positions=256, bos_token_id=1, eos_token_id=2)
    ),
    "bloom": lambda t: t.BloomForCausalLM(t.BloomConfig(**OLD_SIZES, hidden_size=32)),
    "qwen3_next": lambda t: t.Qwen3NextForCausalLM(
        t.Qwen3NextConfig(
            **SIZES,
            head_dim=8,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=0,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "mamba": lambda t: t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1)),
}


def model(kind: str, dtype: Any = torch.float64) -> Any:
    """A random model of that architecture, the same at every call."""
    torch.manual_seed(0)
    made = BUILDERS[kind](transformers).to(dtype).eval()
    made.generation_config.eos_token_id = 2
    made.generation_config.pad_token_id = 0
    return made


def wrapped(made: Any) -> LoadedModel:
    """The model as `load_model` would hand it over."""
    dtype = next(made.parameters()).dtype
    count = sum(parameter.numel() for parameter in made.parameters())
    return LoadedModel(made, tokenizer(), torch.device("cpu"), dtype, count, None, "sha256:none")


@functools.cache
def loaded(kind: str) -> LoadedModel:
    """A float64 model shared by tests that leave it as it is."""
    return wrapped(model(kind))


@contextmanager
def watched(model: LoadedModel) -> Iterator[list[tuple[int, int]]]:
    """Records rows and columns of the input of each forward pass."""
    shapes: list[tuple[int, int]] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()

"""Memory and disk are counted from public configurations by hand, and never wrongly in the costly direction."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import preflight
from orchestrator.preflight import memory
from orchestrator.preflight.memory import Load
from orchestrator.preflight.model import Model
from orchestrator.preflight.shelf import Listing
from orchestrator.providers.base import Offer
from tests.orchestrator.playing_hub import LLAMA_8B, LLAMA_8B_PARAMETERS
from tests.orchestrator.test_preflight import codes, job, offer
from worker import tiny
from worker.generators import hf, slots

QWEN_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GPT2 = {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
DEEPSEEK_V2_LITE = {
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_size": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
GEMMA_3_4B = {"text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "head_dim": 256, "num_attention_heads": 8}}
GEMMA_3_4B["text_config"] |= {"num_key_value_heads": 4, "vocab_size": 262208, "intermediate_size": 10240}
QWEN3_NEXT = {"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256}
QWEN3_NEXT |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 32}
MAMBA = {"num_hidden_layers": 48, "hidden_size": 1536, "state_size": 16, "vocab_size": 50280}


def model(config: dict[str, Any], **files: int) -> Model:
    counts = {"parameters": {"BF16": LLAMA_8B_PARAMETERS}} if config is LLAMA_8B else {}
    return Model("model=m", Listing(files or {"model.safetensors": 16_060_556_376}, **counts), config)


def load(rows: int | None = None, dtype: str = "bfloat16", prompt: int = 512, new: int = 400) -> Load:
    return Load(dtype, prompt, new, rows)


@pytest.mark.parametrize(
    ("config", "dtype", "bytes_per_token"),
    [
        (LLAMA_8B, "bfloat16", 131_072),  # 2 (keys, values) x 32 layers x 8 heads x 128 x 2 bytes
        (LLAMA_8B, "float32", 262_144),
        (QWEN_05B, "bfloat16", 12_288),  # 2 x 24 x 2 x (896 / 14 = 64) x 2
        (GPT2, "float16", 36_864),  # 2 x 12 x 12 x 64 x 2
        (DEEPSEEK_V2_LITE, "bfloat16", 276_480),  # 27 x 16 x (128 + 64 + 128) x 2
        (GEMMA_3_4B["text_config"], "bfloat16", 139_264),  # 2 x 34 x 4 x 256 x 2: its windows count in full
        (QWEN3_NEXT, "bfloat16", 98_304),  # 2 x 48 x 2 x 256 x 2: at most; three layers of four hold none
        (MAMBA, "bfloat16", None),
        ({}, "bfloat16", None),
    ],
)
def test_the_cache_of_a_token_is_what_one_counts_by_hand(
    config: dict[str, Any], dtype: str, bytes_per_token: int | None
) -> None:
    """Public configurations, worked out by hand; what has no such cache is not known."""
    assert memory.kv_bytes_per_token(config, dtype) == bytes_per_token


def test_parameters_are_counted_from_a_configuration_alone() -> None:
    """Llama 3.1 8B has 8,030,261,248 parameters; a mixture of experts is not guessed at."""
    assert memory.parameter_count(LLAMA_8B) == LLAMA_8B_PARAMETERS
    assert memory.parameter_count({**LLAMA_8B, "num_local_experts": 8}) is None
    assert memory.weights_bytes(Model("m", Listing({}), LLAMA_8B), "float16") == 2 * LLAMA_8B_PARAMETERS


@pytest.mark.parametrize(
    ("parameters", "config", "dtype", "expected"),
    [
        ({"BF16": 1000}, {}, "bfloat16", 2000),
        ({"BF16": 1000}, {}, "float32", 4000),
        ({"F32": 1000}, {}, "bfloat16", 2000),
        ({"F32": 900, "I64": 8}, {}, "float64", 7208),
        ({}, {"torch_dtype": "float32"}, "bfloat16", 500),  # 1000 bytes of files
        ({}, {"dtype": "bfloat16"}, "float32", 2000),
        ({}, {"text_config": {"dtype": "torch.float16"}}, "float32", 2000),
        ({}, {}, "bfloat16", 1000),
        ({"I32": 100, "F16": 50}, {"quantization_config": {"quant_method": "gptq"}}, "float32", 1000),
    ],
)
def test_weights_are_loaded_in_the_jobs_dtype(
    parameters: dict[str, int], config: dict[str, Any], dtype: str, expected: float
) -> None:
    """Twice as large in float32 as in bfloat16, whatever is stored; quantised weights stay as they are."""
    one = Model("m", Listing({"model.safetensors": 1000}, parameters), config)
    assert memory.weights_bytes(one, dtype) == expected


def test_all_parts_add_up_by_hand() -> None:
    """Llama 3.1 8B, one completion of 512 + 400 tokens: 16.06 + 0.13 cache + 0.04 work + 1 GB."""
    needed = memory.needs(model(LLAMA_8B), load())
    assert needed is not None
    assert needed.weights == 16_060_522_496
    assert needed.cache() == pytest.approx(1.05 * 131_072 * (512 + 400 + 64))
    assert needed.work() == pytest.approx(1.05 * (512 * (8 * 4096 + 3 * 14336) * 2 + 128256 * 32))
    assert needed.total() == pytest.approx(needed.weights + needed.cache() + needed.work() + 1e9)
    assert memory.needs_vram_gb(model(LLAMA_8B), load()) == pytest.approx(needed.total() / 1e9)
    assert needed.work(10_000) < 1.05 * (16_384 * 75_776 * 2 + 10_000 * 128256 * 32) + 1  # prefills have a bound
    assert memory.needs_vram_gb(Model("m", Listing({}), {}), load()) is None


def test_the_bounds_are_those_of_the_worker() -> None:
    """How far a prefill and a cache grow at a time is the worker's own."""
    assert (memory._PREFILL_TOKENS, memory._GROWTH_TOKENS) == (hf.PREFILL_TOKENS, slots.GROWTH_COLUMNS)


numbers = st.integers(1, 2**14)


@given(st.lists(numbers, min_size=5, max_size=5), st.integers(1, 10**5), st.integers(1, 10**6), st.integers(1, 512))
def test_more_never_needs_less(shape: list[int], prompt: int, new: int, rows: int) -> None:
    """Longer prompts and completions, more rows, wider numbers and more layers never need less memory."""
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    config = {**dict(zip(names, shape, strict=True)), "head_dim": 64, "vocab_size": 1000}

    def total(count: int = rows, more: dict[str, int] | None = None, **how: Any) -> float:
        needed = memory.needs(model({**config, **(more or {})}), load(**{"prompt": prompt, "new": new, **how}))
        assert needed is not None
        assert math.isfinite(needed.total(count))
        return needed.total(count)

    least = total()
    assert least >= 16_060_556_376 + memory.CONTEXT_BYTES
    assert total(rows + 1) >= least
    assert total(prompt=prompt + 1) >= least
    assert total(new=new + 1) >= least
    assert total(dtype="float32") > least
    assert total(more={"num_hidden_layers": shape[0] + 1}) >= least


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from([*LLAMA_8B, *GPT2, *DEEPSEEK_V2_LITE, "text_config", "quantization_config", "layer_types"])
more_fields = st.sampled_from(["auto_map", "head_dim", "eos_token_id", "chat_template", "bos_token", "weight_map"])
objects = st.dictionaries(fields | more_fields, junk, max_size=8)


def test_no_configuration_breaks_the_look(tmp_path: Path) -> None:
    """Whatever the small files of a model say, looking ends with findings and numbers, and never with an exception."""
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")

    @settings(max_examples=150, deadline=None)
    @given(objects, objects, objects, objects)
    def looked(config: Any, tokenizer: Any, generation: Any, index: Any) -> None:
        tokenizer = {**tokenizer, "chat_template": None}  # rendering has its own tests
        written = {"config": config, "tokenizer_config": tokenizer, "generation_config": generation}
        for name, document in (written | {"model.safetensors.index": index}).items():
            (tmp_path / f"{name}.json").write_text(json.dumps(document))
        found = preflight.check(job(model=tmp_path), offer())
        assert json.dumps(found.document())
        assert found.lines()

    looked()


def test_what_does_not_fit_says_by_how_much(folder_8b: Path) -> None:
    """Too small a GPU is an error with the numbers and the size that would do; several small ones do not help."""
    found = preflight.check(job(model=folder_8b), offer(vram_gb=16.0, count=8))
    assert codes(found) == [("error", "does_not_fit")]
    message = found.findings[0].message
    assert "17.3 GB" in message
    assert "weights 16.1, cache 0.1, work 0.1, CUDA 1.0" in message
    assert "one A10 has 16 GB" in message
    assert "other 7 do not help" in message
    assert "24 GB" in found.findings[0].hint
    assert codes(preflight.check(job(model=folder_8b), offer(vram_gb=24.0))) == []
    wide = preflight.check(job(model=folder_8b, dtype="float32"), offer(vram_gb=24.0))
    assert codes(wide) == [("error", "does_not_fit")]
    assert wide.weights_gb == pytest.approx(32.1, abs=0.1)


def test_a_batch_that_does_not_fit_is_a_warning(folder_8b: Path) -> None:
    """The worker halves such a batch: it costs time, not the run. A limit of examples bounds it."""
    found = preflight.check(job(model=folder_8b, batch_size=512), offer())
    assert codes(found) == [("warning", "batch_too_large")]
    assert found.wanted_vram_gb
    assert found.wanted_vram_gb > 80
    small = {**job(model=folder_8b, batch_size=512), "limit": 2}
    bounded = preflight.check(small, offer())  # 2 examples of 5 samples
    assert codes(bounded) == []
    # Ten caches of 0.134 GB, ten rows of scores of 4 MB, and a prefill of 5,120 tokens of 0.16 MB each.
    assert bounded.wanted_vram_gb == pytest.approx(16.06 + 1 + 10 * (0.1343 + 0.0043) + 0.815, abs=0.01)


def test_what_is_not_known_is_said_and_stops_nothing(folder_8b: Path) -> None:
    """Memory, disk or GPU that an offer does not tell are warnings."""
    assert codes(preflight.check(job(model=folder_8b), offer(None, None))) == [
        ("warning", "memory_not_known"),
        ("warning", "disk_not_known"),
    ]
    without = Offer("lambda", "1", "cpu_4x", None, 0, None, 4, 16.0, 200.0, None, 0.1)
    assert codes(preflight.check(job(model=folder_8b), without)) == [("warning", "no_gpu")]
    assert codes(preflight.check(job(model=folder_8b, device="cpu"), without)) == []


def test_a_cache_counted_at_its_most_is_no_error(folder_8b: Path) -> None:
    """Where only an upper bound of the cache does not fit, the job is not stopped; where weights do not, it is."""
    hybrid = {**LLAMA_8B, "layer_types": ["linear_attention"] * 31 + ["full_attention"]}
    (folder_8b / "config.json").write_text(json.dumps(hybrid))
    long = job(model=folder_8b, max_new_tokens=100_000)
    assert codes(preflight.check(long, offer())) == [("warning", "does_not_fit")]
    assert codes(preflight.check(long, offer(vram_gb=16.0))) == [("error", "does_not_fit")]
    (folder_8b / "config.json").write_text(json.dumps(LLAMA_8B))
    assert codes(preflight.check(long, offer())) == [("error", "does_not_fit")]


def test_disk_counts_model_packages_and_dataset(folder_8b: Path, tmp_path: Path) -> None:
    """Too small a disk is an error with the numbers; a dataset of the user's own counts twice."""
    found = preflight.check(job(model=folder_8b), offer(disk_gb=20.0))
    assert codes(found) == [("error", "disk_too_small")]
    assert "26 GB" in found.findings[0].message
    data = tmp_path / "data.jsonl"
    with data.open("wb") as file:
        file.truncate(5_000_000_000)
    grown = preflight.look(job(model=folder_8b, dataset=data))
    assert grown.needed_disk_gb == pytest.approx((found.needed_disk_gb or 0) + 8, abs=0.1)


def test_prompt_and_completion_need_room_in_the_context(folder_8b: Path) -> None:
    """A completion longer than the context is an error; a guessed prompt that reaches over it is a warning."""
    small = {**LLAMA_8B, "max_position_embeddings": 4096}
    (folder_8b / "config.json").write_text(json.dumps(small))
    assert codes(preflight.look(job(model=folder_8b, max_new_tokens=4096))) == [("error", "context_overflow")]
    found = preflight.look(job(model=folder_8b, max_new_tokens=3800))
    assert codes(found) == [("warning", "context_overflow")]
    assert "max_new_tokens=3584" in found.findings[0].hint
    assert codes(preflight.look(job(model=folder_8b, max_new_tokens=3800), prompt_tokens=200)) == []


@pytest.fixture
def folder_8b(tmp_path: Path) -> Iterator[Path]:
    """A folder like that of an 8B model: its weights are a hole, with a true header."""
    folder = tmp_path / "chat-8b"
    folder.mkdir()
    size = 2 * LLAMA_8B_PARAMETERS
    entry = {"dtype": "BF16", "shape": [LLAMA_8B_PARAMETERS], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "all": entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    yield folder
    (folder / "model.safetensors").unlink()


def test_the_projects_own_model_is_sound(tmp_path: Path) -> None:
    """The tiny model as transformers saves it: every file is understood, its parameters are counted to the last."""
    import torch

    torch.set_num_threads(1)
    folder = tiny.ensure(tmp_path / "models", lambda _: None, tiny.Recipe(steps=1))
    found = preflight.check(job(model=folder), offer())
    assert codes(found) == []
    assert found.weights_gb == pytest.approx(_parameters(folder) * 2 / 1e9)
    assert found.download_s == 0
    cut = (folder / "model.safetensors").read_bytes()[:-1]
    (folder / "model.safetensors").write_bytes(cut)
    assert codes(preflight.look(job(model=folder))) == [("error", "damaged_weights")]
    (folder / "model.safetensors").unlink()
    assert codes(preflight.look(job(model=folder))) == [("error", "no_weights")]
    (folder / "config.json").unlink()
    assert codes(preflight.look(job(model=folder))) == [("error", "no_config")]


def _parameters(folder: Path) -> int:
    from transformers import AutoModelForCausalLM

    return int(AutoModelForCausalLM.from_pretrained(folder).num_parameters())

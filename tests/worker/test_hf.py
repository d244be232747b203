"""The transformers engine gives each prompt the text it would get alone, whatever runs beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import loaded, model, tokenizer, watched, wrapped

from worker.failures import ConfigFailure
from worker.generators import Completion, Prompt, Sampling, hf
from worker.generators.noise import draw, row_key
from worker.generators.slots import GROWTH_COLUMNS, Slots
from worker.generators.texts import Texts
from worker.models import LoadedModel

GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=24)
SAMPLED = Sampling(temperature=0.9, top_p=0.9, max_new_tokens=24)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(count: int, samples: int = 1, longest: int = 40) -> list[Prompt]:
    dice = random.Random(count)
    made = []
    for number in range(count):
        ids = tuple(dice.randrange(5, 250) for _ in range(dice.randrange(3, longest)))
        made += [Prompt(f"{number}#{sample}", ids, dice.getrandbits(63)) for sample in range(samples)]
    return made


def run(model: LoadedModel, asked: list[Prompt], sampling: Sampling, batch_size: int) -> dict[str, Completion]:
    pairs = list(hf.HfGenerator(model, batch_size, note=[].append).generate(asked, sampling))
    assert sorted(prompt.key for prompt, _ in pairs) == sorted(prompt.key for prompt in asked)
    return {prompt.key: completion for prompt, completion in pairs}


def reference(model: Any, prompt: Prompt, limit: int) -> list[int]:
    """The tokens transformers' own greedy generate gives the prompt alone."""
    ids = torch.tensor([prompt.token_ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
    return list(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3", "gemma2", "gpt2", "bloom", "qwen3_next"])
def test_greedy_text_is_that_of_generate(kind: str) -> None:
    """Batched with refills, each greedy completion equals transformers' generate on the prompt alone: rotary, learned
    and no positions, sliding windows, and recurrent state."""
    model, asked = loaded(kind), prompts(9)
    got = run(model, asked, GREEDY, batch_size=4)
    for prompt in asked:
        wanted = reference(model.model, prompt, GREEDY.max_new_tokens)
        text = model.tokenizer.decode(wanted, skip_special_tokens=True)
        assert (got[prompt.key].text, got[prompt.key].tokens_out) == (text, len(wanted)), prompt.key
        assert got[prompt.key].tokens_in == len(prompt.token_ids)


def test_long_completions_outgrow_the_cache_unharmed() -> None:
    """Rows that decode past the room a cache is given still equal generate, padded rows too."""
    model, asked = endless("llama", torch.float64), prompts(3)
    limit = 2 * GROWTH_COLUMNS + 10
    got = run(model, asked, Sampling(0, 1, limit), batch_size=3)
    assert [completion.tokens_out for completion in got.values()] == [limit] * 3
    for prompt in asked:
        wanted = reference(model.model, prompt, limit)
        assert got[prompt.key].text == model.tokenizer.decode(wanted, skip_special_tokens=True)


def test_sampled_text_is_drawn_with_the_noise_of_each_step() -> None:
    """Tokens of a batch are those drawn one by one from a model without cache, each with its seed's key of the step."""
    model, asked = loaded("llama"), prompts(6)
    got = run(model, asked, SAMPLED, batch_size=6)
    for prompt in asked:
        ids, made = list(prompt.token_ids), []
        while len(made) < SAMPLED.max_new_tokens and made[-1:] != [2]:
            with torch.inference_mode():
                logits = model.model(torch.tensor([ids + made])).logits[:, -1]
            key = torch.tensor([row_key(prompt.seed, len(made))])
            made += draw(logits, SAMPLED.temperature, SAMPLED.top_p, key).tolist()
        assert got[prompt.key].text == model.tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.first(2)
def test_sampled_texts_do_not_depend_on_the_batch(kind: str, top_p: float) -> None:
    """In float64 sampled texts are the same for every batch size, order and mix of samples."""
    model, sampling = loaded(kind), Sampling(0.9, top_p, 24)
    asked = prompts(10, samples=3)
    alone = run(model, asked, sampling, batch_size=1)
    assert len({completion.text for completion in alone.values()}) > 25  # two may be empty
    for batch_size in (3, 16, 64):
        shuffled = random.Random(batch_size).sample(asked, len(asked))
        assert run(model, shuffled, sampling, batch_size) == alone
    assert run(model, asked[::3], sampling, batch_size=4) == {prompt.key: alone[prompt.key] for prompt in asked[::3]}


def test_seeds_tell_samples_apart_and_nothing_else_does() -> None:
    """The key and the place of a prompt change nothing; another seed changes the text."""
    model, (prompt, other) = loaded("qwen2"), prompts(1, samples=2)
    renamed = Prompt("renamed", prompt.token_ids, prompt.seed)
    got = run(model, [renamed, prompt, other], SAMPLED, batch_size=3)
    assert got["renamed"] == got[prompt.key] != got[other.key]


def test_finished_rows_make_room_at_once() -> None:
    """No pass has more rows than batch_size, and rows of uneven lengths take fewer passes than batches that wait."""
    model = wrapped(model_with_many_ends())
    asked = prompts(64)
    sampling = Sampling(1, 1, 60)
    with watched(model) as shapes:
        got = run(model, asked, sampling, batch_size=8)
    lengths = [got[prompt.key].tokens_out for prompt in asked]
    waiting = sum(max(lengths[start : start + 8]) for start in range(0, 64, 8))
    assert max(rows for rows, _ in shapes) == 8
    assert sum(columns == 1 for _, columns in shapes) < 0.7 * waiting


def model_with_many_ends() -> Any:
    made = model("qwen2", torch.float32)
    made.generation_config.eos_token_id = list(range(2, 22))
    return made


def test_samples_of_a_prompt_share_its_prefill() -> None:
    """Eight samples of each of two prompts are prefilled as two rows."""
    model = loaded("qwen2")
    with watched(model) as shapes:
        run(model, prompts(2, samples=8), SAMPLED, batch_size=16)
    assert [rows for rows, columns in shapes if columns > 1] == [2]


def test_a_large_prefill_is_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No prefill holds more tokens, padding counted, than allowed, and the texts stay the same."""
    model, asked = loaded("qwen2"), prompts(12)
    before = run(model, asked, SAMPLED, batch_size=12)
    monkeypatch.setattr(hf, "PREFILL_TOKENS", 100)
    with watched(model) as shapes:
        assert run(model, asked, SAMPLED, batch_size=12) == before
    assert max(rows * columns for rows, columns in shapes if columns > 1) <= 100


def test_rows_come_out_as_they_finish_and_prompts_are_read_late() -> None:
    """The first completion comes before all prompts were read: at most the look-ahead window of them."""
    read: list[str] = []

    def source() -> Iterator[Prompt]:
        for prompt in prompts(100):
            read.append(prompt.key)
            yield prompt

    generated = hf.HfGenerator(loaded("qwen2"), 4, note=[].append).generate(source(), SAMPLED)
    next(generated)
    assert len(read) <= hf.LOOK_AHEAD * 4
    generated.close()


def test_prompts_join_longest_first_with_equal_ones_side_by_side() -> None:
    """Within the window prompts are taken by falling length, and samples of one prompt stay together."""
    long, short = (7,) * 9, (5, 6, 7)
    twin = (8, 6, 7)
    mixed = [Prompt(str(number), ids, 0) for number, ids in enumerate((short, twin, long, short, twin))]
    queue = hf.Queue(mixed, window=10)
    assert not queue.is_empty()
    taken = queue.take(5, one_length=False)
    assert [prompt.token_ids for prompt in taken] == [long, short, short, twin, twin]
    assert queue.is_empty()


def test_end_tokens_come_from_model_and_tokenizer() -> None:
    """A number, a list and the tokenizer's own token all end completions; the token is counted but not in the text."""
    made = wrapped(model("qwen2", torch.float32))
    prompt = prompts(1)[0]
    made.model.generation_config.eos_token_id = None
    first, second = reference(made.model, prompt, 2)
    expected = Completion(made.tokenizer.decode([first]), "stop", len(prompt.token_ids), 2)
    for listed in (second, [9, second]):
        made.model.generation_config.eos_token_id = listed
        assert run(made, [prompt], GREEDY, batch_size=1)[prompt.key] == expected
    made.model.generation_config.eos_token_id = None
    made.tokenizer.eos_token = made.tokenizer.convert_ids_to_tokens(second)
    assert run(made, [prompt], GREEDY, batch_size=1)[prompt.key] == expected


def test_a_completion_is_cut_before_the_first_stop_string() -> None:
    """For stop strings of one to three characters the text is that before the first, found at its last token."""
    model, asked = loaded("qwen2"), prompts(6)
    whole = run(model, asked, SAMPLED, batch_size=3)
    for length in (1, 2, 3):
        for prompt in asked:
            text = whole[prompt.key].text
            stop = text[10 : 10 + length]
            sampling = Sampling(0.9, 0.9, 24, stop=("never there", stop))
            got = run(model, [prompt], sampling, batch_size=1)[prompt.key]
            assert got.finish_reason == "stop"
            assert got.text == text[: text.index(stop)]
            assert got.tokens_out < whole[prompt.key].tokens_out or text.endswith(stop)


def test_the_token_that_ends_a_text_is_not_in_it() -> None:
    """An end token is counted and not shown, also one that is an ordinary word of the tokenizer."""
    words, prompt = tokenizer(), Prompt("k", (5, 6, 7), 0)
    ids = words("ab!")["input_ids"]
    ended = Texts(words, frozenset(ids[-1:]), ()).completion(prompt, ids)
    assert (ended.text, ended.finish_reason, ended.tokens_in, ended.tokens_out) == ("ab", "stop", 3, 3)
    cut = Texts(words, frozenset(), ()).completion(prompt, ids)
    assert (cut.text, cut.finish_reason) == ("ab!", "length")


def test_of_two_stop_strings_the_first_in_the_text_counts() -> None:
    """When one token completes two of them, the text ends before the one that begins earlier."""
    words = tokenizer()
    ending = hf.Ending(Texts(words, frozenset(), ("c", "bc")), 100)
    row = hf.Row(Prompt("k", (1,), 0))
    results = [ending.completion(row, token) for token in words("abc")["input_ids"]]
    assert results == [None, None, Completion("a", "stop", 1, 3)]


def test_a_stop_string_in_many_bytes_is_found() -> None:
    """A stop string of characters that take several tokens each ends the row at its last byte."""
    text_of = tokenizer()
    stop = "é→"
    ids = text_of("abé→cd")["input_ids"]
    ending = hf.Ending(Texts(text_of, frozenset(), (stop,)), 100)
    row = hf.Row(Prompt("k", (1,), 0))
    results = [ending.completion(row, token) for token in ids[: len(text_of("abé→")["input_ids"])]]
    assert results[:-1] == [None] * (len(results) - 1)
    assert results[-1] == Completion("ab", "stop", 1, len(results))


def endless(kind: str, dtype: Any) -> LoadedModel:
    """A model with no end-of-sequence token."""
    made = wrapped(model(kind, dtype))
    made.model.generation_config.eos_token_id = None
    made.tokenizer.eos_token = None
    return made


def test_rows_end_at_the_token_limit() -> None:
    """A completion that does not end by itself has exactly max_new_tokens tokens and says so."""
    made = endless("gpt2", torch.float32)
    for limit in (1, 5):
        for completion in run(made, prompts(5), Sampling(0, 1, limit), batch_size=2).values():
            assert (completion.finish_reason, completion.tokens_out) == ("length", limit)


def test_a_row_waiting_to_be_cut_out_stays_where_it_is() -> None:
    """A row that is done at the model's last position does not go on to positions the model does not have."""
    made = loaded("gpt2")
    slots = Slots(made.model, made.device)
    with torch.inference_mode():
        block, _ = slots.prefill([(9,) * 255, (9, 9)])
        for _ in range(3):
            slots.decode(block, torch.tensor([9, 9]), alive=torch.tensor([0, 1]))
    assert block.lengths.tolist() == [255, 5]


@contextmanager
def memory_for(model: LoadedModel, tokens: int) -> Iterator[None]:
    """A forward pass of more rows times columns than this fails as a real allocation does, by making one."""

    def allocate(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        rows, columns = inputs["input_ids"].shape
        if rows * columns > tokens:
            torch.empty(2**60)

    hook = model.model.register_forward_pre_hook(allocate, with_kwargs=True)
    yield
    hook.remove()


def test_out_of_memory_halves_the_batch_and_changes_no_text() -> None:
    """When 16 rows do not fit but 4 do, every prompt gets the text it had, and each halving is noted."""
    model, asked = loaded("qwen2"), prompts(20, longest=20)
    before = run(model, asked, SAMPLED, batch_size=1)
    notes: list[str] = []
    generator = hf.HfGenerator(model, 16, notes.append)
    with memory_for(model, 80):
        got = {prompt.key: completion for prompt, completion in generator.generate(asked, SAMPLED)}
    assert got == before
    assert generator.batch_size in (4, 8)
    assert len(notes) == {4: 2, 8: 1}[generator.batch_size]


def test_a_prompt_too_large_for_the_memory_fails_alone() -> None:
    """It is completed with an error that says why, and the others run on in batches as before."""
    model, asked = loaded("qwen2"), prompts(12, longest=15)
    giant = Prompt("giant", (9,) * 100, 1)
    generator = hf.HfGenerator(model, 4, note=[].append)
    with memory_for(model, 64):
        got = {prompt.key: completion for prompt, completion in generator.generate([*asked, giant], SAMPLED)}
    lost = got.pop("giant")
    assert (lost.finish_reason, lost.text, lost.tokens_in) == ("error", "", 100)
    assert "memory" in str(lost.error)
    assert got == run(model, asked, SAMPLED, batch_size=4)
    assert generator.batch_size == 4


def test_other_errors_of_the_model_are_not_swallowed() -> None:
    """Only running out of memory is handled; anything else a forward pass raises comes through."""
    model = loaded("qwen2")
    with pytest.raises(IndexError):
        run(model, [Prompt("k", (10**6,), 0)], GREEDY, batch_size=1)


def test_scores_that_are_not_numbers_become_an_error() -> None:
    """A model that computes NaN gives completions with an error, not invented text."""
    made = wrapped(model("qwen2", torch.float32))
    with torch.no_grad():
        made.model.lm_head.weight[5] = float("nan")
    for sampling in (GREEDY, SAMPLED):
        for completion in run(made, prompts(3), sampling, batch_size=2).values():
            assert completion.finish_reason == "error"
            assert "not numbers" in str(completion.error)


def test_a_prompt_without_tokens_is_an_error() -> None:
    """It fails with words, and its neighbours are untouched."""
    model, asked = loaded("qwen2"), prompts(2)
    got = run(model, [Prompt("empty", (), 0), *asked], SAMPLED, batch_size=2)
    assert got.pop("empty").finish_reason == "error"
    assert got == run(model, asked, SAMPLED, batch_size=1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by peft 0.21
def test_an_adapter_runs_as_if_merged() -> None:
    """A peft-wrapped model gives the greedy texts of the model with the adapter merged into its weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    tuned = get_peft_model(model("qwen2"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tuned = tuned.double().eval()
    asked = prompts(5)
    got = run(wrapped(tuned), asked, GREEDY, batch_size=3)
    assert got != run(loaded("qwen2"), asked, GREEDY, batch_size=3)
    assert got == run(wrapped(tuned.merge_and_unload()), asked, GREEDY, batch_size=3)


def test_models_with_recurrent_state_run_by_equal_lengths() -> None:
    """Their texts do not depend on the batch either, no pass mixes lengths, and the user is told."""
    model, asked = loaded("qwen3_next"), prompts(4, samples=2)
    notes: list[str] = []
    pairs = list(hf.HfGenerator(model, 8, notes.append).generate(asked, SAMPLED))
    assert {prompt.key: completion for prompt, completion in pairs} == run(model, asked, SAMPLED, batch_size=1)
    assert "qwen3_next" in notes[0]


def test_models_without_a_key_value_cache_are_refused() -> None:
    """Their type is named before anything runs."""
    with pytest.raises(ConfigFailure, match="mamba"):
        hf.HfGenerator(wrapped(model("mamba", torch.float32)), 1, note=[].append)


def test_auto_batch_size_fits_the_machine() -> None:
    """Auto is 64 for a small model on a CPU, 16 for a larger one, 128 on a GPU."""
    small = loaded("qwen2")
    large = LoadedModel(small.model, small.tokenizer, small.device, small.dtype, 10**9, None, "")
    on_gpu = LoadedModel(small.model, small.tokenizer, torch.device("cuda"), small.dtype, 10**9, None, "")
    assert [hf.auto_batch_size(one) for one in (small, large, on_gpu)] == [64, 16, 128]
    assert hf.HfGenerator(small, None, note=[].append).batch_size == 64


def test_the_consumer_may_train_between_rows() -> None:
    """Inference mode does not leak out of the generator while it waits."""
    generated = hf.HfGenerator(loaded("qwen2"), 2, note=[].append).generate(prompts(3), SAMPLED)
    next(generated)
    assert not torch.is_inference_mode_enabled()
    generated.close()

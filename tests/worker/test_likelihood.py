"""The engine of likelihoods: what it weighs is what the model says of each text alone, however it batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.worker.tiny_models import BUILDERS, loaded, model, watched, wrapped
from worker.generators import Likelihood, Query
from worker.generators.likelihood import SHARED_TOKENS, HfWeigher
from worker.models import LoadedModel

MAX_LENGTH = 256
KINDS = sorted(BUILDERS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def queries(count: int, seed: int = 0) -> list[Query]:
    """Of each kind some: contexts that begin alike and not, one choice and several, of one token and of more."""
    dice = random.Random(seed)

    def ids(shortest: int, longest: int) -> tuple[int, ...]:
        return tuple(dice.randrange(5, 250) for _ in range(dice.randrange(shortest, longest)))

    shots = [ids(SHARED_TOKENS + 1, SHARED_TOKENS + 20) for _ in range(2)]
    made = []
    for number in range(count):
        context = (*dice.choice([(), *shots, *shots]), *ids(1, 20))
        longest = dice.choice([2, 9])
        pairs = [(context, ids(1, longest)) for _ in range(dice.choice([1, 4]))]
        if dice.random() < 0.3:  # a window of its own, as where a text is too long
            pairs.append((ids(1, 40), ids(1, 9)))
        if dice.random() < 0.3:  # the same but for its last token
            pairs.append((context, (*pairs[0][1][:-1], 7)))
        made.append(Query(f"{number}", tuple(pairs)))
    return made


def alone(made: Any, context: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """The log-likelihood by one plain pass over the whole text."""
    ids = torch.tensor([context + continuation])
    with torch.inference_mode():
        logprobs = made(ids).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[len(context) - 1 + place, token]) for place, token in enumerate(continuation))


def weighed(tiny: LoadedModel, asked: list[Query], batch_size: int) -> dict[str, Likelihood]:
    pairs = list(HfWeigher(tiny, batch_size, MAX_LENGTH, note=[].append).weigh(asked))
    assert sorted(query.key for query, _ in pairs) == sorted(query.key for query in asked)
    return {query.key: found for query, found in pairs}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.first(4)
def test_what_is_shared_changes_nothing(kind: str) -> None:
    """Every log-likelihood is that of the text alone: learned, rotary and no positions, windows, recurrent state."""
    tiny, asked = loaded(kind), queries(40)
    for batch_size in (1, 5, 64):
        got = weighed(tiny, asked, batch_size)
        for query in asked:
            wanted = [alone(tiny.model, *pair) for pair in query.pairs]
            assert got[query.key].logliks == pytest.approx(wanted, abs=1e-5), query.key


def test_batches_agree_in_float32() -> None:
    """In float32, whatever the batch size, log-likelihoods are within 1e-4 of those of batch 1."""
    llama, asked = wrapped(model("llama", torch.float32)), queries(60, seed=1)
    single = weighed(llama, asked, 1)
    for batch_size in (3, 16, 64):
        got = weighed(llama, asked, batch_size)
        for query in asked:
            assert got[query.key].logliks == pytest.approx(single[query.key].logliks, abs=1e-4)


def test_what_many_contexts_begin_with_is_read_once() -> None:
    """Six contexts with the same 100 tokens before them cost one pass over those, and one over what is their own."""
    tiny = loaded("llama")
    shots = tuple(range(5, 105))
    asked = [Query(f"{n}", tuple(((*shots, 9, n), (choice,)) for choice in (20, 21, 22, 23))) for n in range(10, 16)]
    with watched(tiny) as shapes:
        weighed(tiny, asked, 8)
    assert shapes == [(1, 101), (6, 1)]  # the token before the last is shared, too


def test_a_beginning_is_kept_for_the_next_batches() -> None:
    """What was read of shared shots serves all batches that are read ahead later, until other shots come."""
    tiny = loaded("llama")
    shots = [tuple(range(first, first + 100)) for first in (5, 6)]
    asked = [
        Query(f"{n}", (((*shots[n // 40], n + 5, 7), (8,)), ((*shots[n // 40], n + 5, 7), (9,)))) for n in range(80)
    ]
    with watched(tiny) as shapes:
        weighed(tiny, asked, 2)  # reads 16 queries ahead
    assert [shape for shape in shapes if shape[1] > 2] == [(1, 100), (1, 100)]


def test_choices_of_several_tokens_go_on_from_their_context() -> None:
    """A context of 30 tokens with four choices of 5 is read once, and then what differs of the choices."""
    tiny = loaded("llama")
    context = tuple(range(30, 60))
    asked = [Query("x", tuple((context, (n, 1, 2, 3, 4)) for n in (5, 6, 7, 8)))]
    with watched(tiny) as shapes:
        weighed(tiny, asked, 8)
    assert shapes == [(1, 30), (4, 4)]
    with watched(tiny) as shapes:
        weighed(tiny, [Query("y", tuple((context, (1, 2, 3, n)) for n in (5, 6, 7, 8)))], 8)
    assert shapes == [(1, 33)], "choices that differ in their last token alone are one text"


def test_a_batch_that_is_too_large_is_halved_and_nothing_is_lost() -> None:
    """Where memory runs out with more than 3 texts, the batch is halved, once, and every query is answered."""
    tiny, asked, said = loaded("llama"), queries(30, seed=2), list[str]()
    expected = weighed(tiny, asked, 1)

    def refuse(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if len(inputs["input_ids"]) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    weigher = HfWeigher(tiny, 12, MAX_LENGTH, said.append)
    hook = tiny.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        found = dict(weigher.weigh(asked))
    finally:
        hook.remove()
    assert weigher.batch_size == 3
    assert len(said) == 2
    for query, got in found.items():
        assert got.logliks == pytest.approx(expected[query.key].logliks, abs=1e-5)
    assert len(found) == len(asked)


def test_a_text_too_large_for_the_memory_is_an_error_of_its_own() -> None:
    """What does not fit alone is answered with an error that says so; everything else is answered."""
    tiny = loaded("llama")
    asked = [Query("small", (((5, 6), (7,)),)), Query("large", ((tuple(range(5, 205)), (7,)), ((5, 6), (8,))))]

    def refuse(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].shape[1] > 100:
            raise RuntimeError("can't allocate memory")

    hook = tiny.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        found = weighed(tiny, asked, 4)
    finally:
        hook.remove()
    assert found["small"].error is None
    assert "alone: can't allocate memory" in str(found["large"].error)


def test_scores_that_are_not_numbers_are_an_error() -> None:
    """A model whose scores are NaN gives no likelihood, and says why."""
    broken = model("llama")
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    found = weighed(wrapped(broken), [Query("x", (((5, 6), (7,)),))], 4)
    assert "not numbers" in str(found["x"].error)


def test_rows_come_as_they_are_known() -> None:
    """The first likelihoods are there when a batch is, long before all queries were read."""
    taken = []

    def source() -> Iterator[Query]:
        for query in queries(200):
            taken.append(query)
            yield query

    next(HfWeigher(loaded("llama"), 2, MAX_LENGTH, note=[].append).weigh(source()))
    assert len(taken) <= 16


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by peft 0.21
def test_an_adapter_is_weighed_with_its_model() -> None:
    """A peft-wrapped model weighs as one pass of the wrapped model does, and not as its base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    tuned = get_peft_model(model("qwen2"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    asked = queries(12, seed=4)
    got, bare = weighed(wrapped(tuned.eval()), asked, 5), weighed(loaded("qwen2"), asked, 5)
    for query in asked:
        assert got[query.key].logliks == pytest.approx([alone(tuned, *pair) for pair in query.pairs], abs=1e-5)
    assert any(abs(got[key].logliks[0] - bare[key].logliks[0]) > 0.01 for key in got)

"""The engine of likelihoods: what it weighs is what the model says of each text alone, however it batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.worker.tiny_models import BUILDERS, loaded, model, wrapped
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


@contextmanager
def watched(tiny: LoadedModel) -> Iterator[list[tuple[int, int]]]:
    """Records rows and columns of the input of each forward pass."""
    shapes: list[tuple[int, int]] = []
    hook = tiny.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@pytest.mark.parametrize("kind", KINDS)
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

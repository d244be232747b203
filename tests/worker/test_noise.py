"""The noise is a pure function of its key, looks random, and draws what softmax and the nucleus say."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.generators import noise

MANY = 40_000


def uniforms(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return torch.exp(-torch.exp(-noise.gumbel(keys, token_ids)))


def keys_of(seeds: list[int], steps: list[int]) -> torch.Tensor:
    return torch.tensor([noise.row_key(seed, step) for seed, step in zip(seeds, steps, strict=True)])


def chi_square(counts: Counter[int], shares: list[float], total: int) -> float:
    return sum((counts[number] - share * total) ** 2 / (share * total) for number, share in enumerate(shares))


def test_row_keys_are_splitmix64_outputs() -> None:
    """The keys of a seed are the published first outputs of splitmix64 for it."""
    outputs = [noise.row_key(1234567, step) % 2**64 for step in range(5)]
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**20)), min_size=1, max_size=8))
def test_tensor_keys_equal_plain_keys(pairs: list[tuple[int, int]]) -> None:
    """Wrapping int64 tensors compute the same keys as unbounded Python integers."""
    seeds, steps = (list(column) for column in zip(*pairs, strict=True))
    assert torch.equal(noise.row_keys(torch.tensor(seeds), torch.tensor(steps)), keys_of(seeds, steps))


def test_noise_of_a_token_depends_on_its_key_and_id_alone() -> None:
    """Whatever else is in the batch and in whatever order, a (key, token) pair has one noise."""
    keys = keys_of(list(range(7)), [3] * 7)
    tokens = torch.randperm(500)[None].expand(7, -1)
    whole = noise.gumbel(keys, tokens)
    for row in range(7):
        for place in (0, 250, 499):
            alone = noise.gumbel(keys[row : row + 1], tokens[row : row + 1, place : place + 1])
            assert alone.item() == whole[row, place].item()


def test_uniforms_pass_kolmogorov_smirnov_along_every_axis() -> None:
    """Along tokens, steps and seeds the uniforms stay within the 0.1 % bound of the Kolmogorov-Smirnov test."""
    one = torch.zeros((MANY, 1), dtype=torch.int64)
    axes = {
        "tokens": uniforms(keys_of([5], [0]), torch.arange(MANY)[None])[0],
        "steps": uniforms(noise.row_keys(torch.tensor(5), torch.arange(MANY)), one)[:, 0],
        "seeds": uniforms(noise.row_keys(torch.arange(MANY), torch.tensor(0)), one)[:, 0],
    }
    steps = torch.arange(MANY) / MANY
    for axis, values in axes.items():
        ordered = values.sort().values
        distance = max((ordered - steps).max().item(), (steps + 1 / MANY - ordered).max().item())
        assert distance * math.sqrt(MANY) < 1.95, axis


def test_neighbours_are_uncorrelated() -> None:
    """Uniforms of neighbouring tokens, steps and seeds have a correlation within 4 standard errors of zero."""
    tokens = torch.arange(200)[None]
    keys = noise.row_keys(torch.arange(20)[:, None], torch.arange(20)).flatten()
    values = uniforms(keys, tokens).reshape(20, 20, 200)
    for axis in range(3):
        for lag in (1, 2, 7):
            size = values.shape[axis] - lag
            here, there = values.narrow(axis, 0, size).flatten(), values.narrow(axis, lag, size).flatten()
            correlation = torch.corrcoef(torch.stack([here, there]))[0, 1].item()
            assert abs(correlation) < 4 / math.sqrt(len(here)), (axis, lag)


def test_the_extreme_hash_values_give_finite_noise() -> None:
    """Even all-zero and all-one bits, found by running the mixer backwards, give a uniform strictly inside (0, 1)."""

    def unshift(word: int, places: int) -> int:
        result = word
        for _ in range(64 // places + 1):
            result = word ^ (result >> places)
        return result

    for bits in (0, 2**64 - 1):
        state = unshift(bits, noise.LAST_SHIFT)
        for shift, factor in reversed(noise.MIXERS):
            state = unshift(state * pow(factor, -1, 2**64) % 2**64, shift)
        key = (state - noise.INCREMENT) % 2**64
        signed = torch.tensor([key - 2**64 if key >= 2**63 else key])
        assert noise.row_key(key, 0) % 2**64 == bits
        assert noise.gumbel(signed, torch.zeros((1, 1), dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8)])
def test_draws_follow_the_nucleus_of_softmax(temperature: float, top_p: float) -> None:
    """Drawn frequencies match softmax cut to its nucleus, within the 0.1 % bound of chi-square."""
    logits = torch.tensor([1.0, 0.2, 2.0, -1.0, 0.0, 1.5])
    shares = (logits / temperature).softmax(-1).tolist()
    kept: set[int] = set()
    for token in sorted(range(6), key=lambda token: -shares[token]):
        if sum(shares[one] for one in kept) < top_p:
            kept.add(token)
    mass = sum(shares[one] for one in kept)
    keys = noise.row_keys(torch.arange(MANY) * 977, torch.arange(MANY) % 5)
    drawn = Counter(noise.draw(logits.expand(MANY, -1), temperature, top_p, keys).tolist())
    assert set(drawn) == kept
    ordered = sorted(kept)
    counts = Counter({place: drawn[token] for place, token in enumerate(ordered)})
    bound = {3: 13.8, 4: 16.3, 6: 20.5}[len(kept)]
    assert chi_square(counts, [shares[token] / mass for token in ordered], MANY) < bound


def reference_draw(logits: torch.Tensor, temperature: float, top_p: float, keys: torch.Tensor) -> list[int]:
    """The same draw by sorting the whole vocabulary, a row at a time."""
    chosen = []
    for row, key in zip(logits.double() / temperature, keys, strict=True):
        probabilities = row.softmax(-1)
        ordered = row.sort(descending=True).values
        masses = ordered.sub(row.logsumexp(-1)).exp().cumsum(-1)
        least = ordered[min(int((masses < top_p).sum()), len(row) - 1)]
        scores = probabilities.log() + noise.gumbel(key[None], torch.arange(len(row))[None])[0]
        chosen.append(int(scores.masked_fill(row < least, -math.inf).argmax()))
    return chosen


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_looking_at_few_candidates_changes_no_draw(spread: float) -> None:
    """For flat, usual and peaked scores, with many ties as bfloat16 has, the draw equals one by a full sort."""
    torch.manual_seed(1)
    logits = (torch.randn(40, 3000) * spread).bfloat16()
    keys = noise.row_keys(torch.arange(40), torch.arange(40))
    for top_p in (0.3, 0.9, 0.999):
        assert noise.draw(logits, 0.7, top_p, keys).tolist() == reference_draw(logits.float(), 0.7, top_p, keys)


def test_equal_scores_are_in_the_nucleus_together() -> None:
    """Of a thousand equally likely tokens each can be drawn, though half of them would reach top_p."""
    keys = noise.row_keys(torch.arange(MANY), torch.zeros(MANY, dtype=torch.int64))
    drawn = noise.draw(torch.zeros(MANY, 300), 1.0, 0.5, keys)
    assert len(set(drawn.tolist())) == 300


def test_greedy_takes_the_lowest_of_equals() -> None:
    """Among equal best scores greedy takes the lowest id."""
    assert noise.greedy(torch.tensor([[0.0, 3.0, 3.0], [1.0, 1.0, 1.0]])).tolist() == [1, 0]


def test_scores_that_are_not_numbers_give_no_token() -> None:
    """A row with a NaN or an infinite score gives NOT_A_TOKEN in every way of drawing; its neighbours are drawn."""
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, 9.0, 0.0], [0.0, math.inf, 0.0]])
    keys = keys_of([1, 2, 3], [0, 0, 0])
    for tokens in (noise.greedy(logits), noise.draw(logits, 0.1, 0.5, keys), noise.draw(logits, 0.1, 1.0, keys)):
        assert tokens.tolist() == [noise.NOT_A_TOKEN, 1, noise.NOT_A_TOKEN]

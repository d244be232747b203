"""Micro-batches: every row once, within the budget, the same for the same seed, and packed rows kept apart."""

from __future__ import annotations

import itertools
import warnings
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from tests.worker import tiny_models
from worker import batches, lora
from worker.batches import Budget, Plan, collate
from worker.conversations import Sample
from worker.failures import ConfigFailure

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)
BUDGETS = st.builds(Budget, st.none(), st.just(60), st.booleans()) | st.builds(
    Budget, st.integers(1, 5), st.just(200), st.booleans()
)


def sample(number: int, length: int, start: int = 2) -> Sample:
    """Tokens of a row, its end learned from `start` on."""
    ids = array("i", [5 + (number * 31 + at * 7) % 200 for at in range(length)])
    return Sample(number, ids, ((start, length),))


def learner_of(kind: str) -> lora.Learner:
    """A random model of that architecture with adapter layers that have learned nothing yet."""
    config = LoraConfig(r=2, target_modules=["in_proj"] if kind == "mamba" else "all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about names that transformers 6 will not have, and gpt2's layout
        model = get_peft_model(tiny_models.model(kind), config)
    return lora.Learner(model, tiny_models.tokenizer(), None, torch.device("cpu"), {})


@given(lengths=LENGTHS, budget=BUDGETS, seed=st.integers(0, 9))
def test_an_epoch_holds_every_row_once_within_the_budget(lengths: list[int], budget: Budget, seed: int) -> None:
    """No row is lost or repeated, and no micro-batch, padding counted, is larger than was asked for."""
    plan = Plan(lengths, budget, seed)
    for micros in (plan.epoch(0), plan.epoch(3)):
        assert sorted(itertools.chain.from_iterable(micros)) == list(range(len(lengths)))
        for micro in micros:
            found = [lengths[index] for index in micro]
            assert (sum(found) if budget.packing else len(found) * max(found)) <= budget.tokens
            assert budget.packing or budget.rows is None or len(found) <= budget.rows


@given(lengths=LENGTHS, budget=BUDGETS, skip=st.integers(0, 100))
def test_any_stretch_of_the_plan_can_be_had_again(lengths: list[int], budget: Budget, skip: int) -> None:
    """What follows the first n micro-batches is the same whether they were gone through or skipped, over epochs too."""
    plan = Plan(lengths, budget, 5)
    expected = list(itertools.islice(plan.stream(), skip, skip + 10))
    assert list(itertools.islice(Plan(lengths, budget, 5).stream(skip), 10)) == expected


def test_another_seed_and_another_epoch_are_another_order() -> None:
    """Rows are shuffled by seed and epoch."""
    budget = Budget(1, 100, packing=False)
    orders = [tuple(Plan([9] * 30, budget, seed).epoch(epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == 3


def test_one_long_row_makes_its_micro_batch_no_larger() -> None:
    """Beside a row of the whole budget there is no other: memory does not depend on the order of the rows."""
    plan = Plan([100, *[5] * 50], Budget(None, 100, packing=False), 0)
    assert (0,) in plan.epoch(0)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma2", "gemma3", "gpt2"])
def test_packed_rows_do_not_see_each_other(kind: str) -> None:
    """Logits and loss of packed rows are those of each row alone, in float64 to the last digits."""
    learner = learner_of(kind)
    rows = [sample(1, 13), sample(2, 9, start=5), sample(3, 21)]
    with lora.unchanging(learner):
        alone = [lora.loss_sum(learner, collate([row], 0, packing=False)).item() for row in rows]
        packed = lora.loss_sum(learner, collate(rows, 0, packing=True)).item()
        padded = lora.loss_sum(learner, collate(rows, 0, packing=False)).item()
    assert packed == pytest.approx(sum(alone), rel=1e-6)
    assert padded == pytest.approx(sum(alone), rel=1e-6)
    lora.check_packing(learner, rows)


@pytest.mark.parametrize("kind", ["mamba", "qwen3_next"])
def test_a_model_that_mixes_packed_rows_is_refused(kind: str) -> None:
    """Models that carry a state from token to token are found out before they are trained."""
    learner = learner_of(kind)
    with pytest.raises(ConfigFailure, match="mixes rows"):
        lora.check_packing(learner, [sample(1, 13), sample(2, 9), sample(3, 21)])


def test_the_loss_is_that_of_transformers() -> None:
    """Added up over what is learned, it is the mean that transformers itself computes, times its tokens."""
    learner = learner_of("llama")
    row = sample(1, 17, start=6)
    labels = torch.tensor([[batches.NOT_LEARNED] * 6 + list(row.ids[6:])])
    with torch.no_grad():
        expected = learner.model(input_ids=torch.tensor([list(row.ids)]), labels=labels).loss.item() * row.targets
        assert lora.loss_sum(learner, collate([row], 0, packing=False)).item() == pytest.approx(expected, rel=1e-6)


def test_logits_are_made_where_something_is_learned_alone() -> None:
    """Positions that no row learns at are not kept; labels are the tokens that follow."""
    batch = collate([sample(1, 6, start=4), sample(2, 5, start=3)], 0, packing=False)
    assert batch.keep.tolist() == [2, 3, 4]
    assert batch.labels[0].tolist() == [batches.NOT_LEARNED, *sample(1, 6).ids[4:6]]
    assert (batch.tokens, batch.targets) == (11, 4)

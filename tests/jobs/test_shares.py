"""Shares of a run's examples: together all of them, none twice, in the order of the dataset."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobs import shares

IDS = st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=40)


@given(IDS, st.integers(1, 9))
def test_first_shares_are_disjoint_and_all_of_it(ids: list[str], machines: int) -> None:
    """Every n-th example for each of n machines: each example belongs to one, and none has two more than another."""
    parts = [shares.chosen({"share": shares.every(index, machines)}, ids) for index in range(machines)]
    assert sorted(name for part in parts for name in part) == sorted(ids)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(IDS, st.data())
def test_a_share_by_ids_keeps_the_order_and_knows_no_others(ids: list[str], data: st.DataObject) -> None:
    """A share of named examples has those of them that there are, in dataset order; without a share a job has all."""
    wanted = data.draw(st.lists(st.sampled_from(ids), unique=True)) if ids else []
    assert shares.chosen({"share": shares.only([*wanted, "no such example"])}, ids) == [
        name for name in ids if name in wanted
    ]
    assert shares.chosen({}, ids) == ids


def test_keys_are_those_of_the_contract() -> None:
    """A row's key is task, split, example and sample; a choice's is the same without the sample."""
    job = {"task": "gsm8k", "params": {"split": "test"}}
    assert shares.row_key(job, "7", 2) == "gsm8k/test/7#2"
    assert shares.example_key(job, "7") == "gsm8k/test/7"
    assert (shares.among({}), shares.among({"share": shares.every(1, 4)})) == (1, 4)

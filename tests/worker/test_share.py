"""What a worker makes of a share: the prompts, seeds and order of a run on one machine, of its own examples only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from jobs import rundir, shares, spec
from worker import plan, resolve
from worker.expectation import Watch
from worker.failures import OutOfExpectation


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    params = spec.load(spec.CATALOG / "eval-gsm8k.toml").fill({"samples": "2"})
    return {"job": "eval-gsm8k", "story": "evaluate", "task": "gsm8k", "params": params, "limit": 5}


def consume(made: Iterable[object]) -> None:
    """Take all there is."""
    deque(made, maxlen=0)


def items(job: dict[str, Any], scratch: Path) -> dict[str, tuple[Any, ...]]:
    (prepared,) = plan.rehearse(job, scratch, lambda _: None)
    assert len(prepared.example_ids) == 5
    assert prepared.asked.first_prompt
    return {item.key: (item.prompt.seed, tuple(item.prompt.token_ids), item.asked) for item in prepared.items}


def test_shares_are_what_one_machine_asks(job: dict[str, Any], tmp_path: Path) -> None:
    """Together the shares ask what a run of one machine asks: the same keys, prompts and seeds, none of them twice."""
    whole = items(job, tmp_path)
    parts = [items({**job, "share": shares.every(index, 3)}, tmp_path) for index in range(3)]
    assert [len(part) for part in parts] == [4, 4, 2]
    assert {key: part[key] for part in parts for key in part} == whole
    assert list(parts[0]) == [key for key in whole if key in parts[0]], "in the order of the dataset"
    (named,) = plan.rehearse({**job, "share": shares.only([])}, tmp_path, lambda _: None)
    assert named.items == []


def test_several_watches_err_as_seldom_as_one(job: dict[str, Any], tmp_path: Path) -> None:
    """Each of n machines that watch the score stops a run later than one alone would: together they err as seldom."""
    run = rundir.Run(tmp_path)
    (prepared,) = plan.rehearse(
        {**job, "limit": 40, "params": {**job["params"], "samples": 1}}, tmp_path, lambda _: None
    )
    stopped = []
    for among in (1, 4):
        watch = Watch("0.9..1.0", run, prepared.items, among)
        for seen, item in enumerate(prepared.items):
            row = {"key": item.key, "error": None, "example_id": item.example.id, "score": 0.0, "completion": ""}
            try:
                watch.see(row)
            except OutOfExpectation:
                stopped.append(seen)
                break
    assert stopped[0] < stopped[1]


@pytest.mark.parametrize("name", ["mmlu", "arc", "hellaswag", "perplexity"])
def test_shares_of_a_task_that_weighs_are_what_one_machine_asks(name: str, tmp_path: Path) -> None:
    """Shares ask the queries of the whole, each once; dataset, shots and settings are the same for all of them."""
    params = spec.load(spec.CATALOG / f"eval-{name}.toml").fill({})
    job = {"job": f"eval-{name}", "story": "evaluate", "task": name, "params": params, "limit": 5}
    (whole,) = plan.rehearse(job, tmp_path, lambda _: None)
    parts = [plan.rehearse({**job, "share": shares.every(n, 2)}, tmp_path, lambda _: None)[0] for n in range(2)]
    assert {item.key: item.prompt for part in parts for item in part.items} == {
        item.key: item.prompt for item in whole.items
    }
    assert [len(part.items) for part in parts] == [3, 2]
    for part in parts:
        assert resolve.resolved([part])["fingerprint"] == resolve.resolved([whole])["fingerprint"]


def test_a_watch_shows_the_choices_that_were_taken(tmp_path: Path) -> None:
    """A score out of range stops a run that weighs choices too, and the message shows what was chosen."""
    params = spec.load(spec.CATALOG / "eval-arc.toml").fill({})
    job = {"job": "eval-arc", "story": "evaluate", "task": "arc", "params": params, "limit": 60}
    (prepared,) = plan.rehearse(job, tmp_path, lambda _: None)
    watch = Watch("0.9..1.0", rundir.Run(tmp_path), prepared.items)
    row = {"error": None, "score": 0.0, "answer": 0, "choices": ["my choice", "another"]}
    rows = iter([{**row, "key": item.key, "example_id": item.example.id} for item in prepared.items])
    with pytest.raises(OutOfExpectation, match="'my choice'"):
        consume(map(watch.see, rows))

"""Asking some of it again at another batch size: rows of their own, made once, never among the run's, kills or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import durable, flips, rows, rundir, shares, spec
from orchestrator import planning
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import evaluating, machine
from worker import again, plan, processes
from worker.generators.hf import HfGenerator


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluating.save_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=2048)


def document(model: Path, **settings: str) -> dict[str, Any]:
    """The document of a run of gsm8k on that model, of 12 problems, 8 of them made again."""
    given = {"model": str(model), "dataset": "generated", "dtype": "float64", "device": "cpu", "noise": "8"}
    given |= {"samples": "2", "max_new_tokens": "24", "batch_size": "2", **settings}
    return planning.request(planning.Asked("local", given, limit=12), spec.find("eval-gsm8k", [spec.CATALOG]))


def second(there: rundir.Run) -> list[str]:
    """The keys of rows that were made again, as often as they stand there."""
    return [rows.head(line)[0] for path in there.noise_files() for _, line in rows.whole_lines(path)]


def test_the_same_is_asked_again_at_another_batch_size(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row of eight examples is made again, at another batch size, by the model loaded already."""
    sizes: list[int | None] = []
    begin = HfGenerator.__init__
    monkeypatch.setattr(
        HfGenerator, "__init__", lambda self, loaded, size, note: sizes.append(size) or begin(self, loaded, size, note)
    )
    run = evaluating.done_here(evaluating.begun(document(model)))
    there = machine.there(run)
    assert sizes == [2, 4]
    keys = second(there)
    assert len(keys) == len(set(keys)) == 8
    assert all(key.endswith("#0") for key in keys)
    made = evaluating.made(run)
    assert len(made) == 24
    assert not any("batch_size" in row for row in made.values())
    noise = flips.summarise(made.values(), rows.read(there.noise_files()))
    assert noise is not None
    assert (noise["n"], noise["flips"], noise["changed"], noise["batch_size"]) == (8, 0, 0, 4)


def test_shares_ask_again_what_is_theirs(model: Path, tmp_path: Path) -> None:
    """Together the machines of a run make those again that one machine would, none twice."""
    job = document(model)
    (whole,) = again.asked(plan.rehearse(job, tmp_path, print))
    parts = [again.asked(plan.rehearse({**job, "share": shares.every(n, 2)}, tmp_path, print))[0] for n in range(2)]
    keys = [item.key for part in parts for item in part.items]
    assert sorted(keys) == sorted(item.key for item in whole.items)
    assert len(keys) == 8
    assert (
        again.asked(plan.rehearse(document(model) | {"params": {**job["params"], "noise": None}}, tmp_path, print))
        == []
    )
    (other,) = again.asked(plan.rehearse(document(model, batch_size="4"), tmp_path, print))
    assert other.params["batch_size"] == 3


def killed_at(run: Run, count: int) -> rundir.Run:
    """Kill a run that is under way once so many rows were made again."""
    evaluating.start(run)
    there = machine.there(run)
    until(lambda: len(second(there)) >= count, within_s=120)
    known = durable.load_json(there.attempt(1).pids)
    processes.kill([known["supervisor"]["pid"], known["worker"]["pid"]])
    until(lambda: there.state().state != "running")
    return there


@pytest.mark.slow
def test_a_kill_while_it_is_measured_costs_neither_rows_nor_noise(model: Path) -> None:
    """Killed amid the second rows, a run makes those that are missing and no other; its own rows stay as they were."""
    run = evaluating.begun(document(model, noise="12", max_new_tokens="200"))
    there = killed_at(run, 2)
    before = there.attempt(1).rows.read_bytes()
    first = len(second(there))
    assert before.count(b"\n") == 24
    assert 2 <= first < 12, "it ended before it was killed"
    assert evaluating.finish(run).reason == "done"
    assert there.attempt(1).rows.read_bytes() == before
    assert there.attempt(2).rows.read_bytes() == b""
    keys = second(there)
    assert len(keys) == len(set(keys)) == 12
    assert len(list(rows.whole_lines(there.attempt(2).noise))) == 12 - first

"""A job of several parts as its machine works on it: the rows of each part alone, one loaded model, kills, shares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rows, rundir, shares, spec, suites
from orchestrator import planning
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import evaluating, machine
from worker import models as loading
from worker import plan, processes
from worker.failures import ConfigFailure, FingerprintChanged

SUITE = """
summary = "three parts"
story = "evaluate"
[parameters]
model = "tiny"
dtype = "float64"
device = "cpu"
revision = {}
adapter = {}
trust_remote_code = false
batch_size = 1
[parts.eval-hellaswag]
sample = 12
[parts.eval-gsm8k]
samples = 2
max_new_tokens = 24
limit = 10
[parts.eval-perplexity]
sample = 5
"""
ROWS = 12 + 2 * 10 + 5
TASKS = ["hellaswag", "gsm8k", "perplexity"]
Of = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that reads whole problems."""
    return evaluating.save_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=2048)


@pytest.fixture
def suite(model: Path) -> Of:
    """Makes the document of a run of three parts, or of one of them as a job of its own."""
    folder = Path("jobs")
    folder.mkdir(exist_ok=True)
    (folder / "mine.toml").write_text(SUITE)

    def make(name: str = "mine", limit: int | None = None, **settings: str) -> dict[str, Any]:
        given = {"model": str(model), "dtype": "float64", "device": "cpu", "batch_size": "1"}
        generated = {f"{task}.dataset": "generated" for task in TASKS} if name == "mine" else {"dataset": "generated"}
        asked = planning.Asked("local", given | generated | settings, limit=limit)
        return planning.request(asked, spec.find(name, [folder, spec.CATALOG]))

    return make


def said(run: Run) -> dict[str, str]:
    """What rows say that must not depend on what ran beside them; likelihoods move in their last digits."""
    found = {}
    for key, row in evaluating.made(run).items():
        assert row["error"] is None
        kept = {name: value for name, value in row.items() if name not in ("at", "crc32")}
        found[key] = json.dumps(_rounded(kept), sort_keys=True)
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


def identity(run: Run) -> dict[str, Any]:
    return dict(durable.load_json(machine.there(run).resolved)["identity"])


def test_parts_make_the_rows_of_their_own_jobs(suite: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part's rows, and what its fingerprint is of, are those of its job alone; the model is loaded once."""
    loads = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda request: loads.append(request) or load(request))
    run = evaluating.done_here(evaluating.begun(suite()))
    assert len(loads) == 1
    whole = said(run)
    assert len(whole) == ROWS
    own = {
        "hellaswag": {"sample": "12"},
        "gsm8k": {"samples": "2", "max_new_tokens": "24"},
        "perplexity": {"sample": "5"},
    }
    alone: dict[str, str] = {}
    for task, settings in own.items():
        one = evaluating.done_here(evaluating.begun(suite(f"eval-{task}", 10 if task == "gsm8k" else None, **settings)))
        assert identity(run)["parts"][task] == identity(one)
        alone |= said(one)
    assert whole == alone


@pytest.mark.slow
def test_a_kill_in_the_second_part_costs_no_row(suite: Of) -> None:
    """Killed with -9 while the second part generates, a run goes on there: every row once, those of a calm run."""
    killed, calm = evaluating.begun(suite()), evaluating.begun(suite())
    evaluating.start(killed)
    there = machine.there(killed)
    until(lambda: sum(suites.task_of(key) == "gsm8k" for key in evaluating.made(killed)) >= 3, within_s=120)
    known = durable.load_json(there.attempt(1).pids)
    processes.kill([known["supervisor"]["pid"], known["worker"]["pid"]])
    until(lambda: there.state().state != "running")
    first = there.attempt(1).rows.read_bytes().count(b"\n")
    assert 12 + 3 <= first < 12 + 20, "it ended before it was killed"
    assert evaluating.finish(killed).reason == "done"
    assert there.attempt(2).rows.read_bytes().count(b"\n") == ROWS - first
    keys = [row["key"] for path in there.row_files() for row in rows.read([path])]
    assert len(keys) == len(set(keys)) == ROWS
    assert said(killed) == said(evaluating.done_here(calm))


def test_another_setting_of_one_part_is_another_run(suite: Of) -> None:
    """What was resolved of every part is kept to: a change in one is refused by its name, and nothing is made."""
    run = evaluating.done_here(evaluating.begun(suite(limit=1)))
    there = machine.there(run)
    job = run.job()
    job["params"]["gsm8k.temperature"] = 0.1
    before = evaluating.made(run)
    with pytest.raises(FingerprintChanged, match=r"gsm8k\.temperature was 0\.7, is 0\.1\."):
        evaluating.evaluate.work(there, there.attempt(2), job)
    assert evaluating.made(run) == before


def test_shares_of_parts_are_the_whole(suite: Of, tmp_path: Path) -> None:
    """Several machines divide the examples of all parts: each row is one machine's, and all know the same list."""
    job = suite()
    whole = plan.rehearse(job, tmp_path, print)
    names = [name for part in whole for name in part.example_ids]
    keys = shares.Keys(job)
    everything = [item.key for part in whole for item in part.items]
    assert [key for name in names for key in keys.rows(name)] == everything
    made: list[str] = []
    for share in (shares.every(0, 2), shares.only(names[1::2])):
        of_it = plan.rehearse({**job, "share": share}, tmp_path, print)
        assert [part.example_ids for part in of_it] == [part.example_ids for part in whole]
        made += [item.key for part in of_it for item in part.items]
    assert sorted(made) == sorted(everything)
    assert len(set(made)) == len(made)


def test_what_is_wrong_with_a_part_is_said_of_it(suite: Of, tmp_path: Path) -> None:
    """A dataset that cannot be read is named with its part, and so is the parameter that would mend it."""
    Path("scenes.jsonl").write_text(
        '{"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": ""}'
    )
    with pytest.raises(ConfigFailure, match=r"^hellaswag: .*row 1 has no label") as failure:
        plan.rehearse(suite(**{"hellaswag.dataset": "scenes.jsonl"}), tmp_path, print)
    assert failure.value.hint == "--set hellaswag.split=validation"


def test_a_sample_is_the_same_for_everybody_and_grows(suite: Of, tmp_path: Path) -> None:
    """Drawn examples stand in dataset order, a larger sample holds the smaller, and they are not just the first."""
    drawn = []
    for count in (5, 9):
        (prepared,) = plan.rehearse(suite("eval-hellaswag", sample=str(count)), tmp_path, print)
        drawn.append(prepared.example_ids)
    (every,) = plan.rehearse(suite("eval-hellaswag"), tmp_path, print)
    small, large = drawn
    assert (len(small), len(large)) == (5, 9)
    assert set(small) < set(large)
    assert large == [name for name in every.example_ids if name in large] != every.example_ids[:9]


@pytest.fixture
def expecting(suite: Of) -> tuple[rundir.Run, list[plan.Prepared]]:
    run = machine.there(evaluating.begun(suite()))
    return run, plan.prepare(suite(), run, print)


def test_a_watch_counts_rows_of_its_part_only(expecting: tuple[rundir.Run, list[plan.Prepared]]) -> None:
    """Rows of another part, whose examples may have the same ids, are not looked at."""
    from worker.expectation import Watch

    run, parts = expecting
    hellaswag, gsm8k, _ = parts
    attempt = run.attempt(1)
    attempt.folder.mkdir(parents=True)
    with rows.Appender(attempt.rows) as out:
        for item in gsm8k.items:
            other = {"key": item.key, "error": None, "example_id": hellaswag.items[0].example.id, "score": 0.0}
            out.append({**other, "completion": ""})
    watch = Watch("0.9..1.0", run, hellaswag.items)
    assert not watch._scores
    assert Watch("0.0..0.5", run, gsm8k.items)._scores

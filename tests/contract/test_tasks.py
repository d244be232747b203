"""Every task keeps the same promises: examples with ids that stay, words for bad records, and a score of any reply."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import pytest

from jobs import rows, spec
from tests.contract.benchmarks import BENCHMARKS, HOSTILE
from tests.worker import evaluating, machine
from worker import rescore, tasks, worked
from worker.failures import ConfigFailure
from worker.tasks import CHOOSES, GENERATES, READS, Example, Generates, Reply, Verdict

JOBS = {job.task: job for job in map(spec.load, sorted(spec.CATALOG.glob("eval-*.toml"))) if job.task}
GENERATING = [name for name in BENCHMARKS if tasks.get(name).KIND == GENERATES]
FIELDS = [(name, field) for name, benchmark in BENCHMARKS.items() for field in benchmark.needed]
ROW = {
    "key",
    "error",
    "example_id",
    "sample_index",
    "tokens_in",
    "tokens_out",
    "answer",
    "target",
    "score",
    "seed",
    "at",
}
"""What the row of every evaluation has, beside `messages` or `prompt`."""
OF_KIND = {
    GENERATES: {"completion", "finish_reason", "answers", "scores"},
    CHOOSES: {"logliks", "prediction", "prediction_norm", "answers", "scores"},
    READS: {"loglik", "tokens", "words", "bytes"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluating.save_model(tmp_path_factory.mktemp("model") / "tiny")


def examples(name: str, path: Path) -> list[Example]:
    """The examples of a file, read as a run reads it."""
    params = JOBS[name].fill({"model": "some/model", "dataset": str(path)})
    return worked.examples(params, tasks.get(name))[0]


def scored(name: str, reply: str, target: str) -> Verdict:
    return cast(Generates, tasks.get(name)).score(Reply(reply, "stop"), target)


def test_every_task_and_every_job_is_held_to_this() -> None:
    """The suite has records for each task, and each task has a job of the catalogue."""
    assert set(BENCHMARKS) == set(tasks.TASKS) == set(JOBS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_says_what_it_is(name: str) -> None:
    """A name, a version and a kind; its job has the parameters that it takes, and its headline is one of its rules."""
    task, job = tasks.get(name), JOBS[name]
    assert (task.NAME, job.name) == (name, f"eval-{name}")
    assert task.VERSION
    assert set(task.OPTIONS) <= set(job.parameters)
    assert (task.HEADLINE in task.RULES) is (task.KIND != READS)
    assert job.fill({})["model"] == "tiny"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_ids_are_unique_and_stay_in_any_order(name: str, tmp_path: Path) -> None:
    """Each record has an id of its own, which neither the order of the file changes nor what else is in it."""
    benchmark = BENCHMARKS[name]
    records = list(benchmark.records)
    found = examples(name, benchmark.save(tmp_path / "a.jsonl"))
    turned = examples(name, benchmark.save(tmp_path / "b.jsonl", records[::-1]))
    first = examples(name, benchmark.save(tmp_path / "c.jsonl", records[:1]))
    assert len({example.id for example in found}) == len(records)
    assert turned == found[::-1]
    assert first == found[:1]


@pytest.mark.parametrize(("name", "field"), FIELDS)
@pytest.mark.parametrize("how", ["absent", "null", "of another type"])
def test_a_bad_record_is_named(name: str, field: str, how: str, tmp_path: Path) -> None:
    """A record without a field, or with something else in it, ends the run before it begins, with its row and field."""
    benchmark = BENCHMARKS[name]
    records = [dict(record) for record in benchmark.records]
    del records[1][field]
    if how != "absent":
        records[1][field] = None if how == "null" else {"not": ["this"]}
    with pytest.raises(ConfigFailure, match="row 2") as failure:
        examples(name, benchmark.save(tmp_path / "bad.jsonl", records))
    assert field in failure.value.message + failure.value.hint
    assert "bad.jsonl" in failure.value.message


@pytest.mark.parametrize("name", GENERATING)
def test_a_right_reply_is_right(name: str, tmp_path: Path) -> None:
    """A good reply to the first example scores 1 by the headline, and the same reply to another example may not."""
    benchmark = BENCHMARKS[name]
    target = examples(name, benchmark.save(tmp_path / "a.jsonl"))[0].target
    verdict = scored(name, benchmark.reply, target)
    assert (verdict.error, verdict.scores[tasks.get(name).HEADLINE]) == (None, 1.0)


@pytest.mark.parametrize("reply", HOSTILE)
@pytest.mark.parametrize("name", GENERATING)
def test_no_reply_breaks_a_rule(name: str, reply: str, tmp_path: Path) -> None:
    """Whatever a model writes has a score by every rule, or an error and no score; and its row can be written."""
    target = examples(name, BENCHMARKS[name].save(tmp_path / "a.jsonl"))[0].target
    verdict, task = scored(name, HOSTILE[reply], target), tasks.get(name)
    assert set(verdict.answers) == set(verdict.scores) == set(task.RULES)
    assert all(score is None or 0.0 <= score <= 1.0 for score in verdict.scores.values())
    assert verdict.error is None or set(verdict.scores.values()) == {None}, "an error is never a zero"
    row = {"key": "k", "error": verdict.error, "answers": dict(verdict.answers), "notes": dict(verdict.notes)}
    assert rows.decode(rows.encode({**row, "completion": HOSTILE[reply]}))["completion"] == HOSTILE[reply]


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.first(4)
def test_a_run_makes_rows_that_are_scored_again_alike(name: str, model: Path, tmp_path: Path) -> None:
    """Each example has a row with all that is promised, and scoring the rows again gives the scores they have."""
    benchmark, job, task = BENCHMARKS[name], JOBS[name], tasks.get(name)
    more = {"shots": "0"} if "shots" in job.parameters else {}
    run = evaluating.make(model, benchmark.save(tmp_path / "a.jsonl"), job.name, **more)
    made = list(evaluating.made(evaluating.done_here(run)).values())
    assert len(made) == len(benchmark.records)
    for row in made:
        assert row.keys() >= ROW | OF_KIND[task.KIND]
        assert "messages" in row or "prompt" in row
        assert row["error"] is None
    if task.KIND != READS:
        path = machine.there(run).attempt(1).rows
        assert [row["scores"] for row in again(name, path)["rows"]] == [row["scores"] for row in rows.read([path])]


def again(name: str, path: Path) -> dict[str, Any]:
    """What scoring a file of rows once more finds."""
    asked = {"task": name, "path": str(path), "completion": "completion", "target": "target", "allow": True}
    out = io.BytesIO()
    assert rescore.main(io.BytesIO(json.dumps(asked).encode()), out) == 0, out.getvalue()
    found: dict[str, Any] = json.loads(out.getvalue())
    return found

"""The story of an evaluation: dataset → prompts → generator → scorer → rows, then the re-ranker's choices."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from jobs import durable, rows, rundir, shares, times
from worker import engines, facts, plan, resolve, selecting
from worker.expectation import Watch
from worker.generators import Completion
from worker.plan import Item
from worker.progress import Progress


def work(run: rundir.Run, attempt: rundir.Attempt, job: dict[str, Any]) -> None:
    """Make and score every completion that is missing; returns when all rows are durable. Raises WorkerFailure."""
    progress = Progress(attempt.progress)
    prepared = plan.prepare(job, run, progress.phase)
    plan.refuse_bad_prompts(prepared, say)
    resolve.list_examples(run, prepared)
    resolve.settle(run, prepared)  # after the list: once this is home, that and the run's own model are, or follow
    done = finished(run)
    todo = {item.key: item for item in prepared.items if not done.get(item.key)}
    progress.expect(total=len(prepared.items), before=len(prepared.items) - len(todo))
    watch = Watch(job["params"]["expect"], run, prepared.items, shares.among(job))
    made = completions(prepared, todo, attempt, progress)
    with rows.Appender(attempt.rows) as out, contextlib.closing(made):
        for item, completion in made:
            row = make_row(prepared, item, completion)
            out.append(row)
            progress.rows(out.synced)
            watch.see(row)
    progress.rows(out.synced)
    if job["params"]["reranker"]:
        progress.phase("re-ranking")
        selecting.select(run, attempt, prepared)
    progress.phase("done")


def completions(
    prepared: plan.Prepared, todo: dict[str, Item], attempt: rundir.Attempt, progress: Progress
) -> Generator[tuple[Item, Completion]]:
    """What the model says to each item, as it finishes; the model is loaded only when there is something to do.

    To be closed: that ends what was started for it.
    """
    if not todo:
        return
    progress.phase("loading the model")
    with engines.running(prepared, attempt, say) as engine:
        durable.save_json(attempt.env, {**facts.environment(), "generating_since": times.now()})
        progress.phase("generating")
        prompts = (item.prompt for item in todo.values())
        for prompt, completion in engine.generate(prompts, prepared.sampling):
            yield todo[prompt.key], completion


def check(job: dict[str, Any]) -> dict[str, Any]:
    """What a dry run says: findings about the prompts and how much would be generated. No model is loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        return plan.described(plan.rehearse(job, Path(scratch), lambda _: None))


def finished(run: rundir.Run) -> dict[str, bool]:
    """Every key that has a row, at home or in an attempt here, with whether that row is without error."""
    found = rows.Index()
    for path in run.row_files():
        rows.index(path, found)
    if found.corrupt:
        say(f"{found.corrupt} damaged lines among the rows were passed over; what they held is generated again.")
    return found.keys


def make_row(prepared: plan.Prepared, item: Item, completion: Completion) -> rows.Row:
    """One row of rows.jsonl. What could not be generated has an error and no score: an error is never a zero."""
    row: rows.Row = {
        "key": item.key,
        "error": completion.error,
        "example_id": item.example.id,
        "sample_index": item.sample_index,
        "subject": item.example.subject,
        **item.asked,
        "completion": None if completion.error else completion.text,
        "finish_reason": completion.finish_reason,
        "tokens_in": completion.tokens_in,
        "tokens_out": completion.tokens_out,
        **({} if completion.usd is None else {"usd": completion.usd}),
        "target": item.example.target,
        "seed": item.prompt.seed,
        "at": times.now(),
    }
    if completion.error:
        return {**row, "answer": None, "score": None, "answers": {}, "scores": {}}
    verdict = prepared.task.score(completion.text, item.example.target)
    headline = prepared.task.HEADLINE
    return {
        **row,
        "answer": verdict.answers[headline],
        "score": verdict.scores[headline],
        "answers": dict(verdict.answers),
        "scores": dict(verdict.scores),
    }


def say(words: str) -> None:
    """Write a line into the run's log."""
    print(words, flush=True)  # noqa: T201 -- the worker's log is its standard output

"""The story of an evaluation: dataset → prompts → generator → scorer → rows, then the re-ranker's choices."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jobs import durable, rows, rundir, shares, suites, times
from worker import again, engines, facts, likelihood, plan, resolve, sandbox, selecting
from worker.asking import Item
from worker.expectation import Watch
from worker.generators import Completion, Likelihood, Prompt, Query
from worker.progress import Progress
from worker.scoring import Scoring, at_once
from worker.tasks import CHOOSES, GENERATES, READS, RUNS_CODE, Generates, Reply

_AT_WORK = {GENERATES: "generating", CHOOSES: "weighing choices", READS: "reading"}
"""What the model does, by the kind of the task."""


def work(run: rundir.Run, attempt: rundir.Attempt, job: dict[str, Any]) -> None:
    """Make every row that is missing; returns when all rows are durable. Raises WorkerFailure."""
    progress = Progress(attempt.progress)
    parts = plan.prepare(job, run, progress.phase)
    plan.refuse_bad_prompts(parts, say)
    if any(part.task.NAME in RUNS_CODE for part in parts):
        say(sandbox.walls().described())
    resolve.list_examples(run, parts)
    resolve.settle(run, parts)  # after the list: once this is home, that and the run's own model are, or follow
    done, measured = finished(run.row_files()), finished(run.noise_files())
    total, left = sum(len(part.items) for part in parts), [part.without(done) for part in parts]
    progress.expect(total=total, before=total - sum(len(part.items) for part in left))
    watches = {part.task.NAME: _watch(run, part) for part in parts}
    left += [part.without(measured) for part in again.asked(parts)]
    threads = min(at_once(part.task.NAME) for part in parts)
    with (
        rows.Appender(attempt.rows) as out,
        second_rows(attempt, left) as second,
        Scoring(make_row, lambda row: keep(row, (out, second), progress, watches), threads) as scoring,
        contextlib.closing(answers(left, attempt, progress)) as made,
    ):
        for part, item, answer in made:
            scoring.put(part, item, answer)
    progress.rows(out.synced)
    for part in parts:
        if part.params.get("reranker"):
            progress.phase("re-ranking")
            selecting.select(run, attempt, part)
    progress.phase("done")


def answers(
    parts: Sequence[plan.Prepared], attempt: rundir.Attempt, progress: Progress
) -> Generator[tuple[plan.Prepared, Item, Completion | Likelihood]]:
    """What the model makes of each item, as it finishes; loaded once for all parts of one engine, if there are items.

    To be closed: that ends what was started for it.
    """
    for group in engines.grouped(part for part in parts if part.items):
        progress.phase("loading the model")
        with engines.running(group, attempt.server_log, say) as ask:
            if not attempt.env.exists():
                durable.save_json(attempt.env, {**facts.environment(), "generating_since": times.now()})
            for part in group:
                progress.phase(part.title + _AT_WORK[part.task.KIND])
                items = {item.key: item for item in part.items}
                for prompt, answer in ask(part, (item.prompt for item in part.items)):
                    yield part, items[prompt.key], answer


def _watch(run: rundir.Run, part: plan.Prepared) -> Watch:
    return Watch(part.params.get("expect"), run, part.items, shares.among(part.job))


def second_rows(
    attempt: rundir.Attempt, parts: Sequence[plan.Prepared]
) -> contextlib.AbstractContextManager[rows.Appender | None]:
    """The file of rows that are made a second time; None where none is."""
    return rows.Appender(attempt.noise) if any(part.is_again for part in parts) else contextlib.nullcontext()


def keep(
    row: rows.Row, files: tuple[rows.Appender, rows.Appender | None], progress: Progress, watches: Mapping[str, Watch]
) -> None:
    """Save a row, then count it; raises OSError, or OutOfExpectation where it shows that the run is not worth more.

    One that was made a second time goes into the second file, and is no row of the run.
    """
    out, second = files
    if second is not None and "batch_size" in row:
        second.append(row)
        return
    out.append(row)
    progress.rows(out.synced)
    watches[suites.task_of(row["key"])].see(row)


def check(job: dict[str, Any]) -> dict[str, Any]:
    """What a dry run says: findings about the prompts and how many rows would be made. No model is loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = plan.rehearse(job, Path(scratch), lambda _: None)
    telling = next((part for part in parts if part.asked.sampling), parts[0])  # the others weigh, by transformers
    engine = engines.here(telling.params, generates=telling.asked.sampling is not None)
    return {**plan.described(parts), "engine": engine}


def finished(paths: Iterable[Path]) -> dict[str, bool]:
    """Every key that has a row, at home or in an attempt here, with whether that row is without error."""
    found = rows.Index()
    for path in paths:
        rows.index(path, found)
    if found.corrupt:
        say(f"{found.corrupt} damaged lines among the rows were passed over; what they held is generated again.")
    return found.keys


def make_row(prepared: plan.Prepared, item: Item, answer: Completion | Likelihood) -> rows.Row:
    """One row of rows.jsonl. What could not be made has an error and no score: an error is never a zero."""
    return {
        "key": item.key,
        "error": answer.error,
        "example_id": item.example.id,
        "sample_index": item.sample_index,
        "subject": item.example.subject,
        **({} if item.example.level is None else {"level": item.example.level}),
        **item.asked,
        **_RESULTS[prepared.task.KIND](prepared, item, answer),
        **({"batch_size": prepared.params["batch_size"]} if prepared.is_again else {}),
        "at": times.now(),
    }


def _generated(prepared: plan.Prepared, item: Item, completion: Completion) -> rows.Row:
    row = {
        "completion": None if completion.error else completion.text,
        "finish_reason": completion.finish_reason,
        "tokens_in": completion.tokens_in,
        "tokens_out": completion.tokens_out,
        **({} if completion.usd is None else {"usd": completion.usd}),
        "target": item.example.target,
        "seed": cast(Prompt, item.prompt).seed,
    }
    if completion.error:
        return {**row, "answer": None, "score": None, "answers": {}, "scores": {}}
    reply = Reply(completion.text, completion.finish_reason)
    verdict = cast(Generates, prepared.task).score(reply, item.example.target)
    headline = prepared.task.HEADLINE
    return {
        **row,
        "error": verdict.error,
        **({"notes": dict(verdict.notes)} if verdict.notes else {}),
        "answer": verdict.answers[headline],
        "score": verdict.scores[headline],
        "answers": dict(verdict.answers),
        "scores": dict(verdict.scores),
    }


_RESULTS: dict[str, Callable[[plan.Prepared, Item, Any], rows.Row]] = {
    GENERATES: _generated,
    CHOOSES: lambda prepared, item, found: likelihood.chosen(
        prepared.task, item.example, cast(Query, item.prompt), found
    ),
    READS: lambda _, item, found: likelihood.read(item.example, cast(Query, item.prompt), found),
}
"""What a row says of its answer, by the kind of the task."""


def say(words: str) -> None:
    """Write a line into the run's log."""
    print(words, flush=True)  # noqa: T201 -- the worker's log is its standard output

"""The re-ranker's choice for every example whose candidates are complete, as rows of selections.jsonl."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs import rows, rundir, times
from worker.plan import Prepared
from worker.reranker import Reranker, RerankerError


def select(run: rundir.Run, attempt: rundir.Attempt, prepared: Prepared) -> None:
    """Ask the re-ranker about every example it has not chosen for; returns when all choices are durable.

    A re-ranker that raises or hangs gives rows with an error, never a failed run.
    """
    if not prepared.items:  # a share of a run with fewer examples than machines
        return
    chosen = rows.Index()
    for path in run.selection_files():
        rows.index(path, chosen)
    problems = {item.example.id: item.example.problem for item in prepared.items}
    prefix = prepared.items[0].key.rpartition("#")[0].removesuffix(prepared.items[0].example.id)
    settings = prepared.params
    with (
        rows.Appender(attempt.selections) as out,
        Reranker(settings["reranker"], settings["reranker_timeout_s"]) as reranker,
    ):
        for example_id, candidates in _candidates(run.row_files()):
            key = prefix + example_id
            if example_id in problems and not chosen.keys.get(key):
                out.append(_choice(key, problems[example_id], candidates, reranker))


def _candidates(paths: Iterable[Path]) -> Iterable[tuple[str, list[rows.Row]]]:
    """Every example's candidates that have a text, by sample."""
    found: dict[str, list[rows.Row]] = defaultdict(list)
    for row in rows.read(paths):
        if row["error"] is None:
            found[row["example_id"]].append({name: row[name] for name in ("example_id", "sample_index", "completion")})
    return [(name, sorted(rows_, key=lambda row: row["sample_index"])) for name, rows_ in found.items()]


def _choice(key: str, problem: str, candidates: list[rows.Row], reranker: Reranker) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": key,
        "error": None,
        "example_id": candidates[0]["example_id"],
        "reranker": reranker.name,
        "digest": reranker.digest,
        "samples": [candidate["sample_index"] for candidate in candidates],
        "scores": None,
        "sample_index": None,
        "at": times.now(),
    }
    try:
        scores = reranker.scores(problem, [candidate["completion"] for candidate in candidates])
    except RerankerError as error:
        return {**row, "error": str(error)}
    best = max(range(len(scores)), key=scores.__getitem__)  # the first of equals
    return {**row, "scores": scores, "sample_index": candidates[best]["sample_index"]}

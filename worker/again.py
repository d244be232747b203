"""The same questions once more, at another batch size: how many answers change when nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobs import shares
from worker import worked
from worker.plan import Prepared

_BATCH_SIZE, _ANOTHER = 4, 3
"""Another number of rows at once than the run has; small, so that it fits wherever that did."""


def asked(parts: Sequence[Prepared]) -> list[Prepared]:
    """What is asked again of each part that wants it: the first row of so many examples, drawn from all of the run.

    Every machine of several that share a run asks those again that it makes.
    """
    return [_again(part, int(part.params["noise"])) for part in parts if part.params.get("noise")]


def _again(part: Prepared, count: int) -> Prepared:
    drawn = worked.lowest(part.example_ids, count)
    batch_size = _ANOTHER if part.params.get("batch_size") == _BATCH_SIZE else _BATCH_SIZE
    items = [
        item for item in part.items if item.sample_index == 0 and shares.listed(part.job, item.example.id) in drawn
    ]
    job = {**part.job, "params": {**part.params, "batch_size": batch_size}}
    return replace(part, job=job, items=items, is_again=True)

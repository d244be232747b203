"""Which examples of a run are whose, where several machines share it; and the keys that an example's rows have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jobs import suites

Job = dict[str, Any]


def every(index: int, of: int) -> dict[str, Any]:
    """The share of one of `of` machines while nobody knows yet which examples there are: every n-th of them."""
    return {"index": index, "of": of}


def only(ids: Iterable[str]) -> dict[str, Any]:
    """A share of examples by their ids."""
    return {"only": list(ids)}


def chosen(job: Job, ids: Sequence[str]) -> list[str]:
    """Those of a run's examples, given by their ids in dataset order, that a job is to make: all without a share."""
    share = job.get("share")
    if share is None:
        return list(ids)
    if "only" in share:
        wanted = set(share["only"])
        return [name for name in ids if name in wanted]
    return list(ids[share["index"] :: share["of"]])


def among(job: Job) -> int:
    """How many machines began side by side with the one that has this job: 1 for a run of its own."""
    return int((job.get("share") or {}).get("of", 1))


def example_key(job: Job, example_id: str) -> str:
    """The key of what concerns an example as a whole: a re-ranker's choice."""
    return f"{job['task']}/{job['params']['split']}/{example_id}"


def row_key(job: Job, example_id: str, sample: int) -> str:
    """The key of one of an example's rows."""
    return f"{example_key(job, example_id)}#{sample}"


def listed(job: Job, example_id: str) -> str:
    """What an example is called where all of a run's examples are listed: by its id, or, in a part, by its key."""
    return example_key(job, example_id) if "part_takes" in job else example_id


class Keys:
    """The keys of examples by what these are called where all of a run's examples are listed."""

    def __init__(self, job: Job) -> None:
        self._parts = {part["task"]: part for part in suites.parts(job)}
        self._only = job if not suites.is_suite(job) else None

    def example(self, name: str) -> str:
        """The key of what concerns the example as a whole."""
        return name if self._only is None else example_key(self._only, name)

    def rows(self, name: str) -> list[str]:
        """The keys of its rows."""
        key = self.example(name)
        return [f"{key}#{sample}" for sample in range(self.samples(name))]

    def samples(self, name: str) -> int:
        """How many rows it has."""
        part = self._only or self._parts[suites.task_of(name)]
        return int(part["params"].get("samples") or 1)

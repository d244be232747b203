"""A job of several parts, each an evaluation of its own: what they are called, and the document of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Job = dict[str, Any]
LEFT_OUT = ("reranker", "reranker_timeout_s")
"""Parameters of an evaluation that a part of another job does not have."""


def parts(job: Mapping[str, Any]) -> list[Job]:
    """The evaluations that a job is made of, each as a job of its own: the job itself, where it has no others."""
    return [_part(job, part) for part in job["parts"]] if job.get("parts") else [dict(job)]


def _part(job: Mapping[str, Any], part: Mapping[str, Any]) -> Job:
    """`takes` says by which of the job's parameters each of the part's is set; a limit of all parts is that of each."""
    params = {name: job["params"][given] for name, given in part["takes"].items()}
    own_limit = params.pop("limit", None)
    limit = own_limit if job.get("limit") is None else job["limit"]
    rest = {name: value for name, value in job.items() if name != "parts"}
    return {**rest, "task": part["task"], "params": params, "limit": limit, "part_takes": dict(part["takes"])}


def is_suite(job: Mapping[str, Any]) -> bool:
    """Whether a job has parts."""
    return bool(job.get("parts"))


def tasks(job: Mapping[str, Any]) -> list[str]:
    """The tasks of a job's parts, in their order; empty for a job without parts."""
    return [str(part["task"]) for part in job.get("parts") or ()]


def task_of(key: object) -> str:
    """The task that a row belongs to, by its key."""
    return str(key).partition("/")[0]


def name_in(part: Mapping[str, Any], name: str) -> str:
    """What a parameter of a part is called by who sets it: `gsm8k.samples`; of a job without parts its own name."""
    return str(part.get("part_takes", {}).get(name, name))


def renamed(part: Mapping[str, Any], words: str) -> str:
    """Words about a part in which each `parameter=…` is called by its name in the job."""
    return re.sub(r"\b([a-z_]+)(?==)", lambda found: name_in(part, found[1]), words)


def identity(known: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What was resolved of one part, from what was resolved of all; of a job without parts that is the same."""
    return dict(known["parts"].get(task, {})) if "parts" in known else dict(known)

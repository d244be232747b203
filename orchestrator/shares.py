"""The shares of a run that several machines make: each a run of its own in the run's folder, for a part of the keys."""

from __future__ import annotations

import math
from typing import Any

from jobs import durable, rows, shares, spec
from jobs.rundir import Home
from orchestrator import agents, clock, config, runs
from orchestrator.errors import UsageError
from orchestrator.gathering import Gathering
from orchestrator.runs import ENDED, Record, Run

COVERED = ("planned", "pushed", "running", "sealed")
"""States of a share whose examples are nobody else's: it is at work, or done."""
_CHUNKS_MAX = 4
"""What is left of a share is not cut into pieces smaller than one in so many of an even share: each loads a model."""
_CARRIED = ("job", "agent", "python", "cwd", "env_names", "gpus", "queue", "environment", "mirror", "rents")
"""What a share's record has from its run's."""


class Pool:
    """What of a run no share has: examples by their ids, or, while those are not known here, first shares by number."""

    def __init__(self, gathering: Gathering, held: set[str]) -> None:
        """`held`: ids of shares whose examples are left alone, done or not."""
        run = gathering.run
        self._of = run.record.machines
        self._ids = gathering.example_ids()
        index = gathering.arrivals
        covered = [share for share in runs.shares(run) if share.record.state in COVERED or share.run_id in held]
        jobs = [share.job() for share in covered]
        if self._ids is None:
            begun = {job["share"].get("index") for job in jobs}
            self.left: list[Any] = [index for index in range(self._of) if index not in begun]
        else:
            taken = {name for job in jobs for name in shares.chosen(job, self._ids)}
            self.left = [
                name for name in missing(run.job(), self._ids, index.rows, index.selections) if name not in taken
            ]

    def __len__(self) -> int:
        return len(self.left)

    def portion(self, among: int) -> dict[str, Any]:
        """A share for one of so many machines: each n-th of what is left, so that all have as much to do."""
        if self._ids is None:
            return shares.every(self.left[0], self._of)
        smallest = math.ceil(len(self._ids) / max(self._of * _CHUNKS_MAX, 1))
        size = max(math.ceil(len(self.left) / max(among, 1)), smallest)
        step = max(len(self.left) // size, 1)
        return shares.only(self.left[::step][:size])


def missing(job: dict[str, Any], ids: list[str], done: rows.Index, choices: rows.Index) -> list[str]:
    """The examples, in their order, of which a row or the re-ranker's choice is not home."""
    made, chosen = done.keys, choices.keys
    wants_choice = bool(job["params"].get("reranker"))
    keys = shares.Keys(job)
    return [
        name
        for name in ids
        if not all(map(made.get, keys.rows(name))) or (wants_choice and not chosen.get(keys.example(name)))
    ]


def create(gathering: Gathering, machine: str, share: dict[str, Any]) -> Run:
    """Make a share for a machine, durably: from here on its examples are nobody else's.

    The record comes last: a folder without one, as a crash leaves it, is no share.
    """
    run = gathering.run
    durable.have_folder(run.home.parts)
    number = 1 + max((runs.number_of(path.name) for path in run.home.parts.iterdir()), default=0)
    share_id = f"{run.run_id}.{number}"
    home = Home(run.home.parts / share_id)
    durable.make_folder(home.folder)
    durable.save_json(home.job, _job(run, share_id, share))
    if run.home.cargo.exists():
        durable.replace_whole(home.cargo, run.home.cargo.read_bytes())
    _seed(gathering, home, share)
    carried = {name: getattr(run.record, name) for name in _CARRIED}
    record = Record(run_id=share_id, machine=machine, created_at=clock.now(), share_of=run.run_id, **carried)
    made = Run(home, record)
    made.save()
    return made


def _job(run: Run, share_id: str, share: dict[str, Any]) -> dict[str, Any]:
    """The request of a share. Only first shares watch the score: what is left of one is no fair sample of it."""
    job = run.job()
    params = dict(job["params"])
    if "index" not in share or any(part.record.failure.get("kind") == "expectation" for part in runs.shares(run)):
        params |= {name: None for name in params if name.rpartition(".")[2] == "expect"}
    return {**job, "run_id": share_id, "params": params, "share": share}


def _seed(gathering: Gathering, home: Home, share: dict[str, Any]) -> None:
    """Have in a new share what is home of its examples: rows of some samples, or all but the re-ranker's choice."""
    run = gathering.run
    job = run.job()
    wanted = None if "only" not in share else set(map(shares.Keys(job).example, share["only"]))
    files = ("rows", "selections", "noise")
    for source, target in ((getattr(run.home, name), getattr(home, name)) for name in files):
        kept = [line + b"\n" for _, line in rows.whole_lines(source) if _is_of(line, wanted)]
        if kept:
            durable.replace_whole(target, b"".join(kept))


def _is_of(line: bytes, wanted: set[str] | None) -> bool:
    """Whether a line is a good row, or a choice, of one of the examples; None: of whichever."""
    try:
        key, good = rows.head(line)
    except rows.BadRow:
        return False
    return good and (wanted is None or key in wanted or key.rpartition("#")[0] in wanted)


def check_can_share(job: spec.Job | dict[str, Any]) -> None:
    """Raise UsageError for a job without examples: there is nothing to divide."""
    has_examples = (job.task or job.parts) if isinstance(job, spec.Job) else (job.get("task") or job.get("parts"))
    if not has_examples:
        name = job.name if isinstance(job, spec.Job) else job["job"]
        raise UsageError(
            f"Several machines share a run by its examples, and {name} has none. Nothing was started.",
            "Run it on one machine, or as several runs.",
        )


def check_agent(run: Run) -> None:
    """Raise UsageError when the worker code that a run keeps is of before there were shares: it would do all of it."""
    if "jobs/shares.py" not in agents.kept(config.state_folder() / "agents", run.record.agent):
        raise UsageError(
            f"{run.run_id} began with worker code that knows no shares. Nothing was started.",
            f"Take today's code: gpu resume {run.run_id} --new-code …",
        )


def note(gathering: Gathering, **changes: Any) -> None:
    """Bring the run's record up to date with what is home of its shares and what they say."""
    run, parts = gathering.run, runs.shares(gathering.run)
    going = [part.record for part in parts if part.record.state not in ENDED]
    home, ids = gathering.rows_home, gathering.example_ids()
    totals = [part.record.rows_total for part in parts]
    total = sum(filter(None, totals)) if len(parts) == run.record.machines and None not in totals else None
    if ids is not None:
        total = sum(map(shares.Keys(run.job()).samples, ids))
    seen = max((part.record.last_seen or "" for part in parts), default="") or None
    begun = min((part.record.started_at or "~" for part in parts), default="~")
    said = {
        "rows_home": home,
        "rows_done": home + sum(max(record.rows_done - record.rows_home, 0) for record in going),
        "rows_synced": home + sum(max(record.rows_synced - record.rows_home, 0) for record in going),
        "rows_total": total if total is not None else run.record.rows_total,
        "rows_damaged": sum(part.record.rows_damaged for part in parts),
        "last_seen": seen,
        "started_at": None if begun == "~" else begun,
        **changes,
    }
    if any(getattr(run.record, name) != value for name, value in said.items()):
        run.save(**said)


def settle(gathering: Gathering) -> None:
    """Take over how the run stands, from its shares: whoever calls knows that nothing else is to begin."""
    from orchestrator import summary

    run = gathering.run
    parts = runs.shares(run)
    going = [part for part in parts if part.record.state not in ENDED]
    if going or (not parts and not run.home.stop.exists()):
        is_begun = any(part.record.state != "planned" for part in parts)
        note(gathering, state="running" if is_begun else "planned", finished_at=None, failure={})
        return
    state, failure = _ended(gathering, parts)
    finished_at = max((part.record.finished_at or "" for part in parts), default="") or clock.now()
    if (run.record.state, run.record.failure) != (state, failure) or run.record.rows_home != gathering.rows_home:
        note(gathering, state=state, finished_at=finished_at, failure=failure, phase="")
        summary.write(run)


def _ended(gathering: Gathering, parts: list[Run]) -> tuple[str, dict[str, str]]:
    """The state of a run none of whose shares is under way, and what ended it if it is not done."""
    left = Pool(gathering, set())
    if not left:
        return "sealed", {}
    ids = gathering.example_ids()
    ended = [part for part in reversed(parts) if (part.record.finished_at or "~") >= gathering.run.record.resumed_at]
    ended = [part for part in ended if ids is None or _has_any(part, ids, set(left.left))]
    for state in ("failed", "stopped"):
        for part in ended:
            if part.record.state == state:
                return state, part.record.failure or _stopped()
    if gathering.run.home.stop.exists():
        return "stopped", _stopped()
    return "lost", _lost(gathering, len(left))


def _has_any(part: Run, ids: list[str], left: set[str]) -> bool:
    return not left.isdisjoint(shares.chosen(part.job(), ids))


def _stopped() -> dict[str, str]:
    return {"kind": "stopped", "message": "It was stopped before it was done.", "hint": ""}


def _lost(gathering: Gathering, left: int) -> dict[str, str]:
    run_id = gathering.run.run_id
    what = "examples are" if gathering.example_ids() is not None else "shares were"
    missing = "not done" if gathering.example_ids() is not None else "never begun"
    message = f"{left} {what} {missing}, and no machine is left for them. {gathering.rows_home} rows are home."
    words = f"gpu resume {run_id}" + (" --gpu …" if gathering.run.record.rents else "")
    return {"kind": "lost", "message": message, "hint": f"Carry on: {words}"}

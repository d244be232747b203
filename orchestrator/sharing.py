"""A run that several machines share, seen by commands that do not follow it: looked at, stopped, divided anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from jobs import durable, rows
from orchestrator import clock, journey, planning, runs, shares
from orchestrator.errors import GpuError, NotReachable, UsageError
from orchestrator.gathering import Gathering, ids_in
from orchestrator.runs import ENDED, Run

MACHINES_MAX = 32
"""How many machines may share a run: each is followed by a thread with a connection of its own."""
_POLL_S = 0.5
_PATIENCE_S = 15.0
"""How long a stop waits for another process of ours to take over that all shares have ended."""
_AT_ONCE_MAX = 8


def refresh(run: Run, *, everywhere: bool = True) -> None:
    """Bring home what there is now of every share, and take over how the run stands, unless it is followed."""
    if everywhere:
        journey.gather(run)
    failures = _each(journey.look, _under_way(run))
    gathered(run)
    if failures:
        raise failures[0]


def gathered(run: Run) -> None:
    """Merge what is home of all shares and take over how the run stands, unless another process follows it."""
    gathering = Gathering.open(run)
    if gathering is not None:
        with gathering:
            shares.settle(gathering)
    run.reload()


def stop(run: Run, grace_s: float) -> None:
    """Stop all shares, bring the last of them home, and record it, together with whoever follows the run."""
    journey.gather(run)
    run.reload()
    if run.record.state in ENDED:
        gathered(run)
        return
    durable.save_json(run.home.stop, {"asked_at": clock.now()})  # before: who follows the run begins no other share
    failures = _each(lambda share: journey.stop(share, grace_s), _under_way(run))
    asked_at = clock.monotonic()
    gathered(run)
    while run.record.state not in ENDED and not failures:
        if clock.monotonic() > asked_at + _PATIENCE_S:
            pid = journey.follower(run)
            raise NotReachable(
                f"All shares of {run.run_id} are stopped, but process {pid} does not go on.",
                f"Wake it up or end it (kill {pid}), then: gpu pull {run.run_id}",
            )
        time.sleep(_POLL_S)
        gathered(run)
    if failures:
        raise failures[0]


def _under_way(run: Run) -> list[Run]:
    return [share for share in runs.shares(run) if share.record.state not in ENDED]


def _each(act: Callable[[Run], None], found: list[Run]) -> list[GpuError]:
    """Do something with each share, several at a time; what went wrong with one keeps no other from it."""

    def tried(share: Run) -> GpuError | None:
        try:
            act(share)
        except GpuError as error:
            return error
        return None

    with ThreadPoolExecutor(_AT_ONCE_MAX, thread_name_prefix="shares") as pool:
        return [error for error in pool.map(tried, found) if error is not None]


def again(run: Run, *, new_code: bool, queue: bool | None) -> None:
    """Let a shared run that has ended without being done be gone on with, by the machines it has."""
    gathering = Gathering.open(run)
    if gathering is None:  # another process follows it: it goes on
        return
    with gathering:
        shares.settle(gathering)
        if run.record.state == "sealed":
            return
        if new_code:
            planning.take_new_code(run)
        run.home.stop.unlink(missing_ok=True)
        state = "planned" if run.record.state in ENDED else run.record.state
        queue = run.record.queue if queue is None else queue
        run.save(state=state, failure={}, queue=queue, resumed_at=clock.now())


@dataclass(frozen=True)
class Division:
    """Among which machines a run is to be divided anew."""

    machines: int
    boxes: list[str]
    """By name; empty: they are rented."""
    take_over: bool = False
    new_code: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    """What else of the run's record changes with it."""


def divide(run: Run, wish: Division) -> None:
    """Have what is missing of a run be made by these machines; what other ones have of it is home, or given up.

    Raises UsageError while it is at work, and NotReachable where that cannot be known, unless it is to be taken over.
    Nothing happens to a run that is done.
    """
    if not run.record.machines:
        _begin_to_share(run, wish)
        return
    gathering = Gathering.open(run)
    if gathering is None:
        raise UsageError(
            f"Process {journey.follower(run)} follows {run.run_id}. Nothing was changed.",
            f"End that first (Ctrl-C there, or kill {journey.follower(run)}), then again.",
        )
    with gathering:
        _refuse_at_work(run, wish)
        if failures := _each(lambda share: close(share, take_over=wish.take_over), _under_way(run)):
            raise failures[0]
        for share in runs.shares(run):
            gathering.take_in(share)
        shares.settle(gathering)
        if run.record.state != "sealed":
            _reopen(run, wish)


def _refuse_at_work(run: Run, wish: Division) -> None:
    """Raise UsageError when a share runs, unless it is to be taken over: then nothing was changed."""
    if wish.take_over:
        return
    busy: list[str] = []

    def look(share: Run) -> None:
        journey.look(share)  # what cannot be reached is not known to be at work, and said where it is to be closed
        if share.record.state == "running":
            busy.append(share.record.machine)

    _each(look, _under_way(run))
    if busy:
        raise UsageError(
            f"{run.run_id} is at work on {', '.join(busy)}. Nothing was changed.",
            f"Stop it first: gpu stop {run.run_id}. Or have that done: --take-over",
        )


def _begin_to_share(run: Run, wish: Division) -> None:
    """The same for a run that one machine has made so far."""

    def leave(surely: bool) -> None:
        if run.record.state == "sealed":
            return
        former = [entry for entry in run.record.former if entry["machine"] != run.record.machine]
        former.append({"machine": run.record.machine, "settled": surely})
        run.end_leg()
        _reopen(run, wish, former=former, attempt=0)

    journey.let_go(run, wish.take_over, leave)


def _reopen(run: Run, wish: Division, **changes: Any) -> None:
    if wish.new_code:
        planning.take_new_code(run)
    shares.check_agent(run)
    run.home.stop.unlink(missing_ok=True)
    changes |= {"state": "planned", "failure": {}, "finished_at": None, **wish.changes}
    run.save(machines=wish.machines, boxes=wish.boxes, resumed_at=clock.now(), **changes)


def close(share: Run, *, take_over: bool, why: str = "") -> None:
    """Have a share be at work no more, so that others may have what it lacks. Errors as `divide`.

    Of a machine that does not answer, which only `take_over` allows, what it still makes is merged when it does again.
    `why`: what was wrong with its machine; empty: it was meant.
    """

    def leave(surely: bool) -> None:
        share.end_leg()
        former = share.record.former if surely else [{"machine": share.record.machine, "settled": False}]
        state = share.record.state
        if state not in ENDED:
            state = "stopped" if surely and not why else "lost"
        failure = share.record.failure
        if state == "lost":
            failure = {"kind": "lost", "message": why or "Its machine did not answer.", "hint": ""}
        finished_at = share.record.finished_at or clock.now()
        share.save(state=state, former=former, failure=failure, finished_at=finished_at)

    journey.let_go(share, take_over, leave)


def missing(run: Run) -> int | None:
    """How many examples a run still lacks, by what is home; None while that is not known."""
    ids = next(filter(None, map(ids_in, (run.home.shared, *run.home.copies()))), None)
    if ids is None:
        return None if run.job().get("limit") is None else int(run.job()["limit"])
    index = (rows.index(run.home.rows), rows.index(run.home.selections))
    return len(shares.missing(run.job(), ids, *index))

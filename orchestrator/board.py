"""Who of a crew has which share of their run: handed out here, begun in order, and given on when one cannot go on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jobs.rundir import Run as Copy
from orchestrator import clock, runs, shares
from orchestrator.errors import GpuError
from orchestrator.gathering import Gathering
from orchestrator.runs import ENDED, Run
from orchestrator.shares import Pool
from orchestrator.transport import Machine

_WAKE_S = 0.5
"""How often one that waits looks whether a stop was asked for, or its machine's time is over."""
_NEEDED_S = 5.0
"""How often a machine on its way up looks whether there is something left for it to do."""
_UNWATCHED = "expectation"
"""The kind of failure that speaks of the whole run, whichever share it was noticed in."""
_OF_MACHINES = ("busy", "disk_full")
"""Kinds of failures that speak of the machine alone: another one may do what it could not."""


class Left(Exception):
    """This process lets go of the run; what runs on machines goes on there."""


class NotNeeded(Exception):
    """There is nothing left to do for a machine that is on its way up."""


@dataclass
class Seat:
    """One machine's place in a crew."""

    name: str
    """Empty while it is still to be rented."""
    is_rented: bool = False
    share: Run | None = None
    is_new: bool = True
    """Whether it has had no share yet: then it is one of those among which what is left is divided."""
    is_waiting: bool = False
    is_over: bool = False
    phase: str = "starting"
    said: dict[str, Any] = field(default_factory=dict)
    """What its share's status said last."""
    heard_at: float = 0.0
    machine: Machine | None = None
    error: GpuError | None = None


class Board:
    """What the threads of a crew share. Whatever changes is told to all that wait."""

    def __init__(self, gathering: Gathering, seats: list[Seat]) -> None:
        self.gathering = gathering
        self.run = gathering.run
        self.seats = seats
        self.news: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._changes = 0
        self._held: set[str] = set()
        self._is_ending = False
        self._is_left = False
        going = [share for share in runs.shares(self.run) if share.record.state not in ENDED]
        self._lead = next((share.run_id for share in going if share.record.leads), "")

    def next_share(self, seat: Seat, look: Callable[[], None], *, may_wait: bool) -> Run | None:
        """What a machine is to do next; None when there is nothing for it, and will not be.

        `may_wait`: for what others may have to give up. `look` is called now and then; what it raises ends the wait.
        """
        looked = -1
        with self._changed:
            while not self._is_over():
                if seat.share is not None:
                    return seat.share
                if looked != self._changes:
                    looked = self._changes
                    if share := self._hand_out(seat):
                        return share
                if not may_wait or not any(other.share for other in self.seats if other is not seat):
                    return None
                seat.is_waiting, seat.phase = True, "waiting"
                self._wait(look)
                seat.is_waiting = False
        return None

    def _is_over(self) -> bool:
        """Whether nothing more is to begin. Raises Left."""
        if self._is_left:
            raise Left
        return self._is_ending or self.run.home.stop.exists()

    def _wait(self, look: Callable[[], None] = lambda: None) -> None:
        self._changed.wait(_WAKE_S)
        look()

    def _tell(self) -> None:
        self._changes += 1
        self._changed.notify_all()

    def _hand_out(self, seat: Seat) -> Run | None:
        pool = self._pool()
        if not pool:
            return None
        free = sum(1 for other in self.seats if not other.is_over and other.share is None)
        busy = sum(1 for other in self.seats if other.share is not None)
        share = shares.create(self.gathering, seat.name, pool.portion(free if seat.is_new else free + busy))
        seat.share, seat.is_new = share, False
        self._tell()
        return share

    def _pool(self) -> Pool:
        for share in runs.shares(self.run):  # what is home of one that ended just now is not to be made again
            if self.gathering.example_ids() is None:
                self.gathering.resolve(share.home.machine(share.record.machine))
            self.take_in(share)
        return Pool(self.gathering, self._held)

    def has_left(self) -> bool:
        """Whether there is something that neither is done nor has anybody at work on it, or waiting for it."""
        with self._changed:
            return not self._is_over() and bool(self._pool()) and not any(seat.is_waiting for seat in self.seats)

    def may_start(self, share: Run) -> bool:
        """Return once a share that its machine has may start there; False when nothing more is to begin.

        One starts first. All others wait until what it resolved is home, and start with that; should it come to
        nothing, another one is first.
        """
        with self._changed:
            while not self._is_over():
                if share.record.leads or self.gathering.is_resolved:
                    return True
                if not self._lead:
                    self._lead = share.run_id
                    share.save(leads=True)  # durable before it starts
                    return True
                self._wait()
        return False

    def resolve(self, copy: Copy) -> None:
        """Let what a machine resolved be known to all, if it is the first."""
        before = (self.gathering.is_resolved, self.gathering.example_ids() is None)
        self.gathering.resolve(copy)
        if before != (self.gathering.is_resolved, self.gathering.example_ids() is None):
            with self._changed:
                self._tell()

    def take_in(self, share: Run) -> None:
        """Merge what is home of a share into the run's rows, and show it."""
        if fresh := self.gathering.take_in(share):
            self.news.put(({"file": "attempts/0001/rows.jsonl"}, fresh))

    def ended(self, seat: Seat, share: Run, *, is_free: bool) -> None:
        """Take over that a machine has ended with a share. `is_free`: others may have what it lacks, however it ended.

        One that failed, or was stopped, is left alone: another machine would fare no better, or is not wanted.
        """
        self.take_in(share)
        with self._changed:
            state, kind = share.record.state, share.record.failure.get("kind")
            is_free = is_free or kind in _OF_MACHINES
            if state in ("failed", "stopped") and not is_free:
                self._held.add(share.run_id)
            if state == "failed" and not is_free and (kind == _UNWATCHED or not self.gathering.is_resolved):
                self._is_ending = True
            if self._lead == share.run_id:
                self._lead = ""
            seat.share, seat.said = None, {}
            self._tell()

    @property
    def is_ending(self) -> bool:
        """Whether a failure of one share has ended them all."""
        return self._is_ending

    def leave(self) -> None:
        """Have every thread let go of what it does, at its next word from its machine."""
        with self._changed:
            self._is_left = True
            self._tell()

    def check(self) -> None:
        """Raise Left when this process lets go of the run."""
        if self._is_left:
            raise Left

    def over(self, seat: Seat) -> None:
        """Take over that a machine is in the crew no more."""
        with self._changed:
            if seat.share is not None and self._lead == seat.share.run_id:
                self._lead = ""
            seat.is_over, seat.share = True, None
            self._tell()

    def heard(self, seat: Seat) -> None:
        """Note that a machine has answered just now."""
        seat.heard_at = clock.monotonic()

    def say(self, seat: Seat) -> Callable[[str], None]:
        """Says something of one machine; raises Left when nobody listens any more."""

        def say(words: str) -> None:
            self.check()
            self.news.put(({"say": f"{seat.name or 'a machine'}: {words}"}, b""))

        return say

    def while_needed(self, seat: Seat) -> Callable[[str], None]:
        """The same for a machine on its way up; raises NotNeeded, too, when the others have left nothing for it.

        Words that would replace one another on a terminal are not passed on.
        """
        say, looked_at = self.say(seat), clock.monotonic()

        def told(words: str) -> None:
            nonlocal looked_at
            self.check()
            if clock.monotonic() - looked_at > _NEEDED_S:
                looked_at = clock.monotonic()
                if not self.has_left():
                    raise NotNeeded
            if not words.startswith("\r"):
                say(words)

        return told

"""Scores answers beside the engine, in threads with a short queue before them: no rule and no disk holds it up."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from jobs.rows import Row
from worker.tasks import RUNS_CODE

ROOM = 64
"""Answers that wait at most, and so the most that a kill can lose of what the engine has finished."""
LEAVE_S = 2.0
"""How long an end before its time waits for the row that is being made; less than a stopped worker has."""
_AT_ONCE = 4
"""Programs of a model run at once at most, each on a core that another one is free beside."""


def at_once(task: str) -> int:
    """How many answers of a task are scored at once: several only where that is done by processes, not by Python."""
    return max(1, min(_AT_ONCE, (os.cpu_count() or 1) // 2)) if task in RUNS_CODE else 1


class Scoring:
    """Makes a row of every answer it is given, and keeps it; rows come in the order in which they are finished.

    `make` is called by all threads at once, `keep` by one at a time. What either raises is raised to who gives the next
    answer, or at the end; answers that wait are dropped then. Leaving it as a context manager waits until every row is
    kept, also where the engine has failed; a stop (SystemExit) drops the answers that wait. Once left, it keeps no row.
    """

    def __init__(self, make: Callable[..., Row], keep: Callable[[Row], None], threads: int = 1) -> None:
        self._make = make
        self._keep = keep
        self._keeping = threading.Lock()
        self._failure: BaseException | None = None
        self._is_over = False
        # Queues made in C, as in `rows.Appender`: a TERM that raises in the middle of one leaves it as it should be.
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        for _ in range(ROOM):
            self._room.put(None)
        self._threads = [threading.Thread(target=self._work, name="scoring", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, *answer: Any) -> None:
        """Have a row made of an answer, the words that `make` takes; waits while there is no room for it."""
        self._room.get()
        if self._failure is not None:
            self._room.put(None)
            raise self._failure
        self._waiting.put(answer)

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        is_stop = kind is not None and not issubclass(kind, Exception)
        try:
            for _ in range(0 if is_stop else ROOM):
                self._room.get()  # once all of it is free, no answer waits and no row is being made
        finally:
            self._end()
        if kind is None and self._failure is not None:
            raise self._failure

    def _end(self) -> None:
        with self._keeping:  # a row that is being kept is kept; none comes after it
            self._is_over = True
        for _ in self._threads:
            self._waiting.put(())
        deadline = time.monotonic() + LEAVE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        """One thread: a row of each answer, until what it takes is empty."""
        while answer := self._waiting.get():
            try:
                if not self._is_over and self._failure is None:
                    self._score(answer)
            except BaseException as failure:  # noqa: BLE001 -- whatever it is, the story must hear of it
                self._failure = self._failure or failure
            self._room.put(None)

    def _score(self, answer: tuple[Any, ...]) -> None:
        row = self._make(*answer)
        with self._keeping:
            if not self._is_over and self._failure is None:
                self._keep(row)

"""One run from one command: take its lock, advance it until it is home, or wait for the process that already does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from orchestrator import advance, follow, planning
from orchestrator.home import Arrivals, News
from orchestrator.runs import ENDED, Run
from orchestrator.transport import Machine

_POLL_S = 0.5
_WAIT_FOR_LOCK_S = 10.0
Step = Callable[[Run, Machine, Arrivals, News], None]
"""Something done with a run by the one process that holds its lock."""


def go(run: Run, news: News, idle: Callable[[], None] | None = None, step: Step = advance.carry_home) -> None:
    """Take `step` with the run until it has ended. While another process follows it, `idle` is called now and then.

    When that other process dies, this one takes over: the run's lock says who is alive.
    """
    machine = planning.this_computer()
    while True:
        arrivals = Arrivals.open(run.home, machine.name)
        if arrivals is not None:
            with arrivals:
                run.reload()
                step(run, machine, arrivals, news)
                return
        if idle:
            idle()
        run.reload()
        if run.record.state in ENDED:
            return
        time.sleep(_POLL_S)


def set_off(run: Run) -> None:
    """Advance the run until it runs, and leave it to itself."""
    machine = planning.this_computer()
    with _arrivals(run) as arrivals:
        while run.record.state in ("planned", "pushed"):
            advance.advance(run, machine, arrivals, _unseen)


def reopen(run: Run, new_code: bool) -> None:
    """Look where the run stands now; if it has ended without being done, let it be started once more."""
    if run.record.state not in ("planned", "pushed"):
        refresh(run)
    if new_code and run.record.state != "running":
        planning.take_new_code(run)
    advance.again(run)


def refresh(run: Run) -> bool:
    """Bring home what there is now and take over how the run stands; False when another process is doing that."""
    machine = planning.this_computer()
    arrivals = Arrivals.open(run.home, machine.name)
    if arrivals is None:
        run.reload()
        return False
    with arrivals:
        run.reload()
        _look(run, machine, arrivals, _unseen)
    return True


def stop(run: Run, grace_s: float) -> None:
    """Stop the run where it runs, then bring the last of it home."""
    machine = planning.this_computer()
    if run.record.state in ("pushed", "running"):
        advance.stop(run, machine, grace_s)
        go(run, _unseen, step=_look)
    if run.record.state in ("planned", "pushed"):  # it had not begun
        run.save(state="stopped")


@contextlib.contextmanager
def _arrivals(run: Run) -> Iterator[Arrivals]:
    arrivals = Arrivals.open(run.home, run.record.machine, _WAIT_FOR_LOCK_S)
    if arrivals is None:
        raise TimeoutError(f"another process has held {run.home.lock} for {_WAIT_FOR_LOCK_S:g} s")
    with arrivals:
        yield arrivals


def _look(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
    """Bring home what there is and take over how the run stands, without waiting for its end."""
    if run.record.state == "running":
        end = follow.pull(run, machine, arrivals, 0.0, news)
        if end is not None:
            advance.settle(run, arrivals, end)


def _unseen(_frame: object, _data: bytes) -> None:
    """Nobody watches."""

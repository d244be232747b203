"""One run from one command: take its lock, advance it until it is home, or wait for the process that already does."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator import advance, clock, follow, planning
from orchestrator.errors import NotReachable
from orchestrator.home import Arrivals, News, full_disk_said
from orchestrator.runs import ENDED, Run
from orchestrator.transport import Machine

_POLL_S = 0.5
_PATIENCE_S = 10.0
"""How long a stop waits for another process of ours to bring home what was stopped."""
Step = Callable[[Run, Machine, Arrivals, News], None]
"""Something done with a run by the one process that holds its lock."""


def go(run: Run, news: News, idle: Callable[[float], None], step: Step = advance.carry_home) -> None:
    """Take `step` with the run. While another process follows it, `idle` is told now and then for how many seconds.

    When that other process dies, this one takes over: the run's lock says who is alive.
    """
    began = clock.monotonic()
    while not _taken(run, news, step):
        idle(clock.monotonic() - began)
        run.reload()
        if run.record.state in ENDED:
            return
        time.sleep(_POLL_S)


def set_off(run: Run) -> None:
    """Advance the run until it runs, and leave it to itself; one that another process follows is left to that."""
    while run.record.state in ("planned", "pushed"):
        if not _taken(run, _unseen, advance.advance):
            run.reload()
            time.sleep(_POLL_S)


def reopen(run: Run, new_code: bool) -> None:
    """Look where the run stands now; if it has ended without being done, let it be started once more."""

    def look_and_reopen(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
        _look(run, machine, arrivals, news)
        if new_code and run.record.state != "running":
            planning.take_new_code(run)
        advance.again(run)

    if not _taken(run, _unseen, look_and_reopen):
        run.reload()


def refresh(run: Run) -> None:
    """Bring home what there is now and take over how the run stands, unless another process is doing that."""
    if not _taken(run, _unseen, _look):
        run.reload()


def stop(run: Run, grace_s: float) -> None:
    """Stop the run where it runs, bring the last of it home, and record it, together with whoever follows the run."""
    machine = planning.this_computer()
    asked_at: float | None = None

    def end(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
        if run.record.state in ("pushed", "running"):  # asked again under the lock: it may have begun just now
            advance.stop(run, machine, grace_s)
            _look(run, machine, arrivals, news)
        if run.record.state in ("planned", "pushed"):  # what had not begun will not
            run.save(state="stopped", finished_at=clock.now())

    while run.record.state not in ENDED:
        if run.record.state != "planned":
            advance.stop(run, machine, grace_s)
        asked_at = asked_at or clock.monotonic()
        if not _taken(run, _unseen, end):
            run.reload()
            if clock.monotonic() > asked_at + _PATIENCE_S:
                raise NotReachable(
                    f"{run.run_id} is stopped on {machine.name}, but process {follower(run)} holds its folder here "
                    "and does not go on.",
                    f"Wake it up or end it (kill {follower(run)}), then: gpu pull {run.run_id}",
                )
            time.sleep(_POLL_S)


def follower(run: Run) -> str:
    """The pid of the process that follows the run, for words."""
    return run.home.lock.read_text(encoding="ascii", errors="replace").strip() or "unknown"


def _taken(run: Run, news: News, step: Step) -> bool:
    """Take a step under the run's lock, from the record as it stands then; False when another process holds it."""
    machine = planning.this_computer()
    with full_disk_said(run.home):
        arrivals = Arrivals.open(run.home, run.record.machine)
        if arrivals is None:
            return False
        with arrivals:
            run.reload()
            step(run, machine, arrivals, news)
    return True


def _look(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
    """Bring home what there is and take over how the run stands, without waiting for its end."""
    if run.record.state in ("pushed", "running"):
        end = follow.pull(run, machine, arrivals, 0.0, news)
        if "cut" in end:
            raise follow.cut(run, machine, end)
        advance.settle(run, arrivals, end)


def _unseen(_frame: object, _data: bytes) -> None:
    """Nobody watches."""

"""One run from one command: take its lock, advance it until it is home, move it, or wait for who already does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from orchestrator import advance, clock, delivery, follow, machines, planning, rentals, runs
from orchestrator.errors import GpuError, HostKeyChanged, LoginRefused, NotReachable, UsageError
from orchestrator.home import Arrivals, News, full_disk_said
from orchestrator.runs import ENDED, Run
from orchestrator.transport import Machine

_POLL_S = 0.5
_PATIENCE_S = 10.0
"""How long a stop waits for another process of ours to bring home what was stopped."""
_LOOKS_MAX = 5
Step = Callable[[Run, Machine, Arrivals, News], None]
"""Something done with a run by the one process that holds its lock."""


def _unseen(_frame: object, _data: bytes) -> None:
    """Nobody watches."""


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


def set_off(run: Run, news: News = _unseen) -> None:
    """Advance the run until it runs, and leave it to itself; one that another process follows is left to that."""
    while run.record.state in ("planned", "pushed"):
        if not _taken(run, news, advance.advance):
            run.reload()
            time.sleep(_POLL_S)


@dataclass(frozen=True)
class Wish:
    """How a run is to be carried on."""

    machine: str | None = None
    """Where; None: where it was."""
    take_over: bool = False
    queue: bool | None = None
    new_code: bool = False
    guard: Callable[[int], None] = lambda _: None
    """Told how many bytes may have to travel to another machine; raises when that is not wanted."""


def carry_on(run: Run, wish: Wish) -> None:
    """Look where the run stands now; if it has ended without being done, let it be started once more, as wished."""

    def look_and_reopen(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
        _look(run, machine, arrivals, news)
        if wish.new_code and run.record.state != "running":
            planning.take_new_code(run)
        if wish.queue is not None:
            run.save(queue=wish.queue)
        advance.again(run)

    gather(run)
    if wish.machine is not None and machines.choose(wish.machine) != run.record.machine:
        move(run, wish)
    elif not _taken(run, _unseen, look_and_reopen):
        run.reload()


def move(run: Run, wish: Wish) -> None:
    """Have the run go on, on another machine: what the old one made is home, or it is given up on purpose.

    Raises UsageError while it runs there, and NotReachable when that cannot be known: unreachable is not dead.
    """
    target = machines.choose(wish.machine)
    if target == machines.LOCAL:
        planning.check_interpreter(run.record.environment or "none")
    elif run.record.state != "sealed":
        wish.guard(delivery.new_bytes(run, target))

    def leave(surely: bool) -> None:
        if run.record.state == "sealed":  # it stays where it is
            return
        if wish.new_code:
            planning.take_new_code(run)
        advance.move(run, target, settled=surely, queue=run.record.queue if wish.queue is None else wish.queue)

    let_go(run, wish.take_over, leave)


def let_go(run: Run, take_over: bool, then: Callable[[bool], None]) -> None:
    """Have a run work on its machine no more, what it made there at home, or given up on purpose; errors as `move`.

    `then` is called under the run's lock, and told whether the machine itself said that it has ended there.
    """

    def leave(run: Run, machine: Machine, arrivals: Arrivals, _: News) -> None:
        then(_is_over(run, machine, arrivals, take_over))

    if not _taken(run, _unseen, leave):
        raise UsageError(
            f"Process {follower(run)} follows {run.run_id}. Nothing was changed.",
            f"End that first (Ctrl-C there, or kill {follower(run)}), then again.",
        )


def _is_over(run: Run, machine: Machine, arrivals: Arrivals, take_over: bool) -> bool:
    """Whether the machine itself says that the run does not run there any more; stops it when it is to be taken over.

    False, which only `take_over` allows, when it does not answer, or does not let us in.
    """
    try:
        if advance.is_unsettled(run, machine.name):
            advance.gather(run, machine, arrivals, _unseen, may_stop=take_over)
        _look(run, machine, arrivals, _unseen)
        if run.record.state == "running" and take_over:
            advance.stop(run, machine, advance.GRACE_S)
            _look(run, machine, arrivals, _unseen)
    except (NotReachable, HostKeyChanged, LoginRefused) as error:
        if machine.is_gone():
            advance.machine_is_gone(run, arrivals, _unseen)
            return True
        if not take_over:
            raise type(error)(
                f"{error.message} {run.run_id} may still run on {machine.name}: unreachable is not dead. Nothing was "
                "started.",
                f"If that machine is surely gone: gpu resume {run.run_id} --on … --take-over. What it still made "
                "comes home when it answers again.",
            ) from None
        advance.from_mirror(run, arrivals, _unseen)
        return False
    if run.record.state == "running" or advance.is_unsettled(run, machine.name):
        raise UsageError(
            f"{run.run_id} runs on {machine.name}. Nothing was changed.",
            f"Stop it first (gpu stop {run.run_id}), or have that done: --take-over",
        )
    return True


def refresh(run: Run, *, everywhere: bool = True) -> None:
    """Bring home what there is now and take over how the run stands, unless another process is doing that.

    `everywhere`: also what machines that the run has left made late.
    """
    if run.record.machines:
        _sharing().refresh(run, everywhere=everywhere)
        return
    if everywhere:
        gather(run)
    look(run)
    if run.record.share_of:
        _sharing().gathered(runs.parent(run))


def look(run: Run) -> None:
    """Bring home what there is now of one run on its machine, unless another process follows it."""
    if not _taken(run, _unseen, _look):
        run.reload()


def _sharing() -> ModuleType:
    """What there is for runs that several machines share; it is built upon this module."""
    from orchestrator import sharing

    return sharing


def gather(run: Run) -> list[str]:
    """Bring home what machines the run has left behind made late; one that still works on it is stopped.

    A machine that does not answer is asked again the next time: its rows are merged whenever they come. Returns those
    that may still work on it, or still have something of it.
    """
    for former in run.record.former:
        current = former["machine"] == run.record.machine and run.record.state in ("pushed", "running")
        current = current and not run.record.machines
        if not former["settled"] and not current:
            with contextlib.suppress(GpuError):
                _taken(run, _unseen, advance.gather, former["machine"])
    left = [former["machine"] for former in run.record.former if not former["settled"]]
    return [*left, *(name for share in runs.shares(run) for name in gather(share))]


def stop(run: Run, grace_s: float) -> None:
    """Stop the run where it runs, bring the last of it home, and record it, together with whoever follows the run."""
    asked_at: float | None = None
    looks = 0

    def end(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
        if run.record.state in ("pushed", "running"):  # asked again under the lock: it may have begun just now
            advance.stop(run, machine, grace_s)
            _look(run, machine, arrivals, news)
        if run.record.state in ("planned", "pushed"):  # what had not begun will not
            run.save(state="stopped", finished_at=clock.now())

    if run.record.machines:
        _sharing().stop(run, grace_s)
        return
    gather(run)
    while run.record.state not in ENDED:
        if run.record.state != "planned":
            with machines.at(run.record.machine) as machine:
                advance.stop(run, machine, grace_s)
        asked_at = asked_at or clock.monotonic()
        if _taken(run, _unseen, end):
            looks += 1
            if looks >= _LOOKS_MAX and run.record.state not in ENDED:
                raise advance.mismatch(run)
        else:
            run.reload()
            if clock.monotonic() > asked_at + _PATIENCE_S:
                raise NotReachable(*_held_up(run))
            time.sleep(_POLL_S)


def _held_up(run: Run) -> tuple[str, str]:
    """What a stop says that cannot be finished because of another process of ours, and what to type."""
    pid = follower(run)
    if run.record.state in ("planned", "pushed"):
        return f"{run.run_id} is not stopped: process {pid} is sending it.", f"End that (kill {pid}), then again."
    return (
        f"{run.run_id} is stopped on {run.record.machine}, but process {pid} holds its folder here and does not go on.",
        f"Wake it up or end it (kill {pid}), then: gpu pull {run.run_id}",
    )


def follower(run: Run) -> str:
    """The pid of the process that follows the run, for words."""
    return run.home.lock.read_text(encoding="ascii", errors="replace").strip() or "unknown"


def _taken(run: Run, news: News, step: Step, name: str | None = None) -> bool:
    """Take a step under the run's lock, from the record as it stands then; False when another process holds it.

    On the machine the run is on, or on the one named, which it has left behind.
    """
    with full_disk_said(run.home):
        arrivals = Arrivals.open(run.home, name or run.record.machine)
        if arrivals is None:
            return False
        with arrivals:
            before = run.record.machine
            run.reload()
            if run.record.machine != before:  # another process moved it just now
                return False
            with machines.at(name or run.record.machine) as machine:
                try:
                    step(run, machine, arrivals, news)
                except NotReachable:
                    machines.note(machine.name, False)
                    if step is _gone or not machine.is_gone():
                        raise
                    advance.machine_is_gone(run, arrivals, news)
    return True


def machine_is_gone(run: Run, name: str, say: Callable[[str], None]) -> None:
    """Take over that a machine of the run is no more, unless another process follows the run: that one will."""

    def news(frame: dict[str, Any], _: bytes) -> None:
        if "say" in frame:
            say(str(frame["say"]))

    _taken(run, news, _gone, name)


def _gone(run: Run, _machine: Machine, arrivals: Arrivals, news: News) -> None:
    advance.machine_is_gone(run, arrivals, news)


def _look(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
    """Bring home what there is and take over how the run stands, without waiting for its end."""
    if rentals.is_gone(machine.name):
        advance.machine_is_gone(run, arrivals, news)
        return
    if run.record.state in ("pushed", "running"):
        end = follow.pull(run, machine, arrivals, follow.NOW, news)
        if "cut" in end:
            raise follow.cut(run, machine, end)
        advance.settle(run, arrivals, end)

"""THE STORY of several machines at work on one run: a thread for each, all rows in one place, nobody's part lost."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from orchestrator import (
    advance,
    clock,
    fleet,
    follow,
    inventory,
    journey,
    machines,
    notices,
    rentals,
    renting,
    runs,
    shares,
    sharing,
    tenancy,
)
from orchestrator.board import Board, Left, NotNeeded, Seat
from orchestrator.errors import DeadlineOver, GpuError, HomeDiskFull, MachineGone, MayCost, NotReachable, UsageError
from orchestrator.gathering import Gathering
from orchestrator.home import Arrivals, News
from orchestrator.runs import ENDED, Run
from orchestrator.shares import Pool
from orchestrator.transport import Machine

PATIENCE_S = 300.0
"""How long a machine that does not answer is asked again before its part is given to the others."""
GRACE_S = 10.0
_HEARD_S = 30.0
"""A machine that was heard so recently answers."""
_TICK_S = 0.25
_NOTE_S = 1.0
_POLL_S = 0.5
_LEAVE_S = 5.0
"""How long this process waits for its threads to let go of what they do."""
_CLOSE_TRIES = 20
_TRIES_MAX = 6
"""How often a rented machine may cease to answer and come back."""


@dataclass(frozen=True)
class Manner:
    """How a run is to be followed."""

    watch: Callable[[], AbstractContextManager[News]]
    """What a person sees meanwhile."""
    idle: Callable[[float], None]
    """Told now and then for how many seconds another process follows the run already."""
    detach: bool = False
    """Return once every machine has its share running."""


def carry(run: Run, manner: Manner) -> None:
    """Have the run's machines make what is missing, until all is home or no machine is left for it.

    **May spend money**, within the caps the run was started with. While another process follows the run, wait for it;
    should that one die, this one takes over. Raises GpuError; what is home then is counted all the same.
    """
    began = clock.monotonic()
    while (gathering := Gathering.open(run)) is None:
        manner.idle(clock.monotonic() - began)
        run.reload()
        if run.record.state in ENDED:
            return
        time.sleep(_POLL_S)
    with gathering:
        if run.record.state != "sealed":
            _Crew(gathering, manner).work()


class _Crew:
    """All machines of one run, and the thread that follows each."""

    def __init__(self, gathering: Gathering, manner: Manner) -> None:
        self.run = gathering.run
        self.gathering = gathering
        self.manner = manner
        self.board = Board(gathering, _seats(gathering))
        self._renting = threading.Lock()
        self._noted_at = 0.0

    def work(self) -> None:
        """Start the threads, show what they do, and sum up when all have ended."""
        pool = ThreadPoolExecutor(max(len(self.board.seats), 1), thread_name_prefix="crew")
        futures = [pool.submit(self._work, seat) for seat in self.board.seats]
        try:
            with self.manner.watch() as news:
                while not all(future.done() for future in futures):
                    wait(futures, timeout=_TICK_S)
                    self._show(news)
                self._noted_at = -_NOTE_S
                self._show(news)
        except BaseException:
            self._leave(futures)
            raise
        finally:
            pool.shutdown(wait=False)
        for future in futures:
            future.result()
        self._sum_up()

    def _leave(self, futures: list[Future[None]]) -> None:
        """Let go of every machine: what runs there goes on."""
        self.board.leave()
        for seat in self.board.seats:
            if seat.machine is not None:
                seat.machine.cut()
        wait(futures, timeout=_LEAVE_S)

    def _sum_up(self) -> None:
        """Take over how the run stands now; raise what went wrong with a machine, where that matters."""
        for share in runs.shares(self.run):
            journey.gather(share)
            self.board.take_in(share)
        shares.settle(self.gathering)
        errors = [seat.error for seat in self.board.seats if seat.error is not None]
        if self.run.record.state not in ("planned", "running", "lost"):
            errors = [error for error in errors if isinstance(error, MayCost)]
        if errors and not (self.manner.detach and self.run.record.state == "running"):
            raise max(errors, key=lambda error: error.exit_code)

    def _show(self, news: News) -> None:
        """Pass on what the threads had to say, and bring the run's record up to date now and then."""
        while not self.board.news.empty():
            news(*self.board.news.get())
        if clock.monotonic() - self._noted_at < _NOTE_S:
            return
        self._noted_at = clock.monotonic()
        begun = any(share.record.state != "planned" for share in runs.shares(self.run))
        shares.note(self.gathering, state="running" if begun else "planned", phase=self._phase())
        news({"whole": "attempts/0001/status.json"}, json.dumps(self._status()).encode())

    def _phase(self) -> str:
        """What the machines do, in words: 3 generating, 1 booting."""
        counts = Counter(seat.phase for seat in self.board.seats if not seat.is_over)
        return ", ".join(f"{number} {phase}" for phase, number in counts.items()) or "done"

    def _status(self) -> dict[str, Any]:
        """All machines' news as that of one."""
        rates = [seat.said.get("rows_per_second") for seat in self.board.seats]
        rate = float(sum(each for each in rates if isinstance(each, (int, float))))
        total = self.run.record.rows_total
        left = max((total or 0) - self.gathering.rows_home, 0)
        eta_s = left / rate if rate else None
        return {"phase": self._phase(), "rows_total": total, "rows_per_second": rate, "eta_s": eta_s}

    def _work(self, seat: Seat) -> None:
        """The thread of one machine, and of those that replace it, until there is nothing for it to do."""
        try:
            while self._is_ready(seat):
                if self._serve(seat):
                    self._give_back(seat)
                    return
                if not (seat.is_rented and tenancy.is_lost(seat.name)):
                    return
                notices.tell("machine_lost", run_id=self.run.run_id, machine=seat.name, message=f"{seat.name} is gone.")
                seat.name, seat.is_new = "", True
        except Left:
            return
        except GpuError as error:
            seat.error = error
            self.board.news.put(({"say": f"{seat.name or 'A machine'}: {error.message}"}, b""))
        finally:
            self.board.over(seat)

    def _is_ready(self, seat: Seat) -> bool:
        """Have the machine of a seat ready, rented if need be; False when there is none to be had, or no use for one.

        **May spend money.**
        """
        if not seat.is_rented:
            return True
        say = self.board.say(seat)
        if seat.share is not None and rentals.is_gone(seat.name):  # since it was followed last
            journey.machine_is_gone(seat.share, seat.name, say)
            seat.share.reload()
            self.board.ended(seat, seat.share, is_free=True)
            seat.name, seat.is_new = "", True
        with self._renting:
            if not seat.name:
                if not self.board.has_left():
                    return False
                to_come = sum(1 for other in self.board.seats if not other.name and not other.is_over)
                name = fleet.begin(self.run, to_come)
                if name is None:
                    say(f"nothing more is rented for {self.run.run_id}: its budget, hours or number is spent")
                    return False
                seat.name = name
        seat.phase = "booting"
        try:
            waits = bool(self.run.record.rents.get("wait_capacity"))
            renting.ensure_ready(seat.name, self.board.while_needed(seat), wait_capacity=waits)
        except NotNeeded:
            fleet.let_go(self.run, seat.name, say)
            return False
        fleet.shorten(self.run, seat.name)
        tenancy.take_up(seat.name)
        return True

    def _give_back(self, seat: Seat) -> None:
        """Give a machine back that has nothing more to do, if that was asked for; after a failure that waits."""
        failed = any(share.record.state == "failed" for share in runs.shares(self.run))
        if seat.is_rented and self.run.record.terminate and not self.manner.detach and not failed:
            seat.phase = "ending"
            fleet.give_back(self.run, seat.name, self.board.say(seat))

    def _serve(self, seat: Seat) -> bool:
        """Share after share on one machine; False when it cannot go on, True when there is nothing more for it."""
        stays = not (seat.is_rented and self.run.record.terminate) and not self.manner.detach
        meter = tenancy.Meter(seat.name)
        try:
            while share := self.board.next_share(seat, meter, may_wait=stays):
                if not self._carry(seat, share, meter):
                    return False
                if self.manner.detach:
                    return True
        except DeadlineOver as error:  # while it waited
            self._end_in_time(seat, error)
            return False
        return True

    def _end_in_time(self, seat: Seat, error: DeadlineOver) -> None:
        rental = rentals.find(seat.name)
        self.board.say(seat)(f"{error.message} It is given back.")
        if rental is not None:
            tenancy.end_machine(rental, self.board.say(seat))

    def _carry(self, seat: Seat, share: Run, meter: Callable[[], None]) -> bool:
        """One share on one machine, from wherever it stands; whether the machine is good for another one.

        What it could not do is anybody's then, unless the job itself failed.
        """
        before = share.record.rows_home
        for tries in reversed(range(_TRIES_MAX)):
            is_free = self._go(seat, share, meter, is_last=not tries)
            share.reload()
            if is_free is not None:
                break
        self.board.ended(seat, share, is_free=bool(is_free))
        if self.board.is_ending:
            self._stop_all()
        record = share.record
        is_back = record.state == "lost" and runs.is_settled(share) and not rentals.is_gone(seat.name)
        return (
            record.state == "sealed"
            or (self.manner.detach and record.state == "running")
            or (is_back and record.rows_home > before)
        )

    def _go(self, seat: Seat, share: Run, meter: Callable[[], None], *, is_last: bool) -> bool | None:
        """Follow a share until it has ended on its machine; whether others may have what it lacks, however it ended.

        None when the machine did not answer and does again: to be followed anew, unless that `is_last`.
        """
        try:
            journey.go(share, self._news(seat, share, meter), lambda _: self.board.check(), self._step(seat))
        except DeadlineOver as error:
            tenancy.end_in_time(share, error, self.board.say(seat))
            return True
        except HomeDiskFull:
            raise
        except GpuError as error:
            if isinstance(error, MachineGone) or rentals.is_gone(seat.name):
                journey.machine_is_gone(share, seat.name, self.board.say(seat))
            elif not self._is_given_up(seat, share, error):
                if is_last:
                    raise
                return None
            return True
        return False

    def _is_given_up(self, seat: Seat, share: Run, error: GpuError) -> bool:
        """Let others have what a machine could not do that does not answer, or cannot be made to work.

        False when a rented one answers again. Raises the error when there is nobody who could have it; when no other
        machine answers either, or no provider, it is this computer that is cut off, and all goes on as it is.
        """
        others = [other for other in self.board.seats if other is not seat and not other.is_over]
        silent = [other for other in self.board.seats if isinstance(other.error, NotReachable)]
        if isinstance(error, NotReachable) and (others or silent) and not any(map(_answers, others)):
            raise error
        say = self.board.say(seat)
        if isinstance(error, NotReachable) and seat.is_rented:
            return tenancy.is_dead(share, error, say)
        if not others:
            raise error
        seat.error = error
        say(f"{error.message} What it has not sent goes to others; what it still makes is merged when it answers.")
        for tried in range(1, _CLOSE_TRIES + 1):
            try:
                sharing.close(share, take_over=True, why=error.message)
                break
            except UsageError:  # another command of ours looks at it just now
                if tried == _CLOSE_TRIES:
                    raise
                time.sleep(_POLL_S)
        return True

    def _stop_all(self) -> None:
        """Stop what the others do: one share's failure is all of theirs."""
        for share in runs.shares(self.run):
            if share.record.state in ("pushed", "running"):
                try:
                    journey.stop(share, GRACE_S)
                except GpuError as error:
                    self.board.news.put(({"say": error.message}, b""))

    def _step(self, seat: Seat) -> journey.Step:
        def step(share: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
            seat.machine = machine
            machine.patience_s = min(machine.patience_s, PATIENCE_S)
            self.board.resolve(arrivals.copy)  # it may be home from before
            while share.record.state not in ENDED:
                seat.phase = {"planned": "sending", "pushed": "starting"}.get(share.record.state, seat.phase)
                if share.record.state == "pushed" and not self.board.may_start(share):
                    share.save(state="stopped", finished_at=clock.now())  # it has not begun
                elif share.record.state == "running" and self.manner.detach:
                    self._until_resolved(share, machine, arrivals, news)
                    return
                else:
                    advance.advance(share, machine, arrivals, news)

        return step

    def _until_resolved(self, share: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
        """Follow the first share until the others can start with what it resolves, or until it has ended."""
        while share.record.leads and not self.gathering.is_resolved and share.record.state == "running":
            end = follow.pull(share, machine, arrivals, follow.Pace(_POLL_S, follow.QUICK_POLL_S), news)
            if "cut" in end:
                raise follow.cut(share, machine, end)
            advance.settle(share, arrivals, end)

    def _news(self, seat: Seat, share: Run, meter: Callable[[], None]) -> News:
        """What is done with each frame of a share once it is safe at home."""

        def news(frame: dict[str, Any], data: bytes) -> None:
            self.board.check()
            meter()
            name = str(frame.get("whole") or frame.get("piece") or frame.get("file") or "")
            if not {"say", "unreachable"} & frame.keys():
                self.board.heard(seat)
            if name.endswith("/status.json"):
                seat.said = _parsed(data)
                seat.phase = str(seat.said.get("phase", seat.phase))
            elif name.endswith(("/rows.jsonl", "/selections.jsonl")):
                self.board.take_in(share)
            elif name and not name.startswith("attempts/"):
                self.board.resolve(share.home.machine(seat.name))
            elif {"say", "unreachable", "reachable", "skipped"} & frame.keys():
                said = {key: f"{seat.name}: {frame[key]}" if key == "say" else frame[key] for key in frame}
                self.board.news.put((said, b""))

        return news


def _seats(gathering: Gathering) -> list[Seat]:
    """A place for each machine of the run: those that are at work on it, those that are there, those to be rented."""
    run = gathering.run
    going = [share for share in runs.shares(run) if share.record.state not in ENDED]
    is_rented = not run.record.boxes
    seats = [Seat(share.record.machine, is_rented, share, is_new=False) for share in going]
    names = run.record.boxes or [rental.name for rental in fleet.live(run)]
    seats += [Seat(name, is_rented) for name in names if name not in {seat.name for seat in seats}]
    wanted = min(run.record.machines, len(going) + len(Pool(gathering, set())))
    if is_rented:
        seats += [Seat("", is_rented) for _ in range(wanted - len(seats))]
    return seats


def _answers(seat: Seat) -> bool:
    """Whether a machine answers, as far as this computer can tell."""
    if clock.monotonic() - seat.heard_at < _HEARD_S or seat.name == machines.LOCAL:
        return True
    rental = rentals.find(seat.name) if seat.name else None
    if not seat.name or (rental is not None and rental.record.state != "ready"):  # its provider is asked all the time
        return seat.is_rented
    return inventory.reach(seat.name) is None


def _parsed(data: bytes) -> dict[str, Any]:
    """A status as a machine sent it; a damaged one is no news."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}

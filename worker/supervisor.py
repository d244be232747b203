"""Starts a run's worker, restarts it after crashes, writes status and seal; outlives whoever asked for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs import durable, locks, rows, rundir, spec, times
from worker import devices, processes
from worker.failures import ConfigFailure
from worker.mirroring import Mirroring
from worker.order import Order
from worker.outs import Outs
from worker.pace import Pace

ATTEMPTS_MAX = 50
"""A run that was restarted this often has something wrong that another restart will not mend."""
CRASHES_WITHOUT_ROW_MAX = 2
"""Crashes of the worker's own making in a row, without a new row between, that end the run."""
KILLS_WITHOUT_ROW_MAX = 5
"""The same for a worker that was killed from outside."""
GRACE_S = 10.0
_OF_TRAINING = ("steps_done", "steps_total", "words", "eta_s")
_TICK_S = 0.25
_HEARTBEAT_S = 1.0
_LOCK_WAIT_S = 5.0
_TAIL_BYTES = 2000
_QUEUE_TICK_S = 0.5
_PATIENCE_S = 1.0
"""How long a start waits for GPUs in use before it says so: the run that held them may be ending just now."""
_PATIENCE_WITH_ITSELF_S = 10.0
"""The same when it is the run's own last attempt that has not let go yet."""


class Supervisor:
    """One run's supervisor. Holds `run.lock` for life; the worker inherits it, so a free lock means both are dead."""

    def __init__(self, run: rundir.Run, order: Order, lock: int) -> None:
        self.run = run
        self.order = order
        self.lock = lock
        self.crashes_without_row = 0
        self.kills_without_row = 0
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._waker, False)
        self._stopping = False
        self._claims: devices.Claims | None = None
        self._memory_before: dict[str, int] = {}
        self._mirroring = Mirroring(run, order)
        self._beat_at = 0.0
        self._first_attempt = run.last_attempt() + 1
        self._old_stop = _signature(run.attempt(run.last_attempt()).stop)

    def supervise(self) -> None:
        """Run attempts until one ends the run; every attempt is sealed."""
        processes.become_subreaper()
        signal.set_wakeup_fd(self._waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_stop)
        processes.kill(processes.marked(str(self.run.folder)))
        while (seal := self._attempt()).restarting:
            pass
        if self._claims:
            self._claims.release()  # before run.lock: whoever sees the run ended finds its GPUs free
        self._finish_mirror(self.run.attempt(seal.attempt))

    def _finish_mirror(self, attempt: rundir.Attempt) -> None:
        """Have the rest in the mirror, the seal too; that it failed is said, and changes nothing about the run."""
        if not self.order.mirror:
            return
        pace = Pace(attempt.rows)
        pace.update()

        def tick() -> None:
            if self._is_due():
                self._save_status(attempt, pace, "sealing")

        self._beat_at = 0.0
        if failed := self._mirroring.finish(tick):
            print(failed, file=sys.stderr, flush=True)  # noqa: T201 -- the supervisor's log
        self._save_status(attempt, pace, "ended")

    def _on_stop(self, *_: object) -> None:
        self._stopping = True

    def _attempt(self) -> rundir.Seal:
        """One attempt from its folder to its seal; before the first, what it needs is claimed."""
        number = self.run.last_attempt() + 1
        attempt = self.run.attempt(number)
        try:
            durable.have_folder(attempt.folder)  # it may be there: nobody was forked in it, since current.json says so
            durable.save_json(self.run.current, {"attempt": number})  # durable before the fork: an attempt starts once
            if self._claims is None and (refusal := self._claim(attempt)):
                return self._seal_unstarted(attempt, refusal)
            worker = self._spawn(attempt)
        except OSError as error:
            self.run.reserve.unlink(missing_ok=True)
            durable.have_folder(attempt.folder)
            durable.save_json(self.run.current, {"attempt": attempt.number})
            return self._seal_unstarted(attempt, _not_started(error))
        durable.save_json(
            attempt.pids, {"supervisor": processes.identity(os.getpid()), "worker": processes.identity(worker.pid)}
        )
        announce_ready()
        pace = Pace(attempt.rows)
        self._watch(worker, attempt, pace)
        _kill_group(worker)
        pace.update()
        return self._seal(attempt, worker.returncode, pace)

    def _claim(self, attempt: rundir.Attempt) -> dict[str, Any] | None:
        """Claim the GPUs the order asks for, waiting in the queue if it says so; how the attempt ends if that fails."""
        try:
            claims = devices.Claims(self.run, self.order.gpus, self.order.queue)
        except ConfigFailure as failure:
            return _outcome("failed", failure.kind, failure.message, failure.hint)
        began = time.monotonic()
        while not claims.take():
            if self._stopping or self._stop_asked(attempt):
                return _outcome("stopped", "stopped", "It was stopped before it began.")
            own = claims.waits_for == [self.run.folder.name]
            if self.order.queue:
                self._queue(attempt, claims.waits_for)
            elif time.monotonic() >= began + (_PATIENCE_WITH_ITSELF_S if own else _PATIENCE_S):
                return _outcome("failed", "busy", *devices.busy(claims))
            self._pause(_QUEUE_TICK_S)
        self._claims = claims
        self._memory_before = devices.memory_used() if claims.devices else {}
        return None

    def _queue(self, attempt: rundir.Attempt, waits_for: list[str]) -> None:
        """Say that the run waits, for whom, and whom a stop may signal meanwhile."""
        if not attempt.pids.exists():
            durable.save_json(attempt.pids, {"supervisor": processes.identity(os.getpid())})
        announce_ready()
        if self._is_due():
            self._save_status(attempt, Pace(attempt.rows), "queued", waits_for)

    def _spawn(self, attempt: rundir.Attempt) -> subprocess.Popen[bytes]:
        me = os.getpid()
        words = [self.order.python, "-I", "-X", "utf8", str(Path(self.order.agent) / "worker" / "__main__.py"), "work"]
        env = self.order.environment(os.environ) | {processes.RUN_MARK: str(self.run.folder)}
        if self._claims:
            env |= self._claims.environment()
        with durable.opened(attempt.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log:
            return subprocess.Popen(
                [*words, str(self.run.folder), str(attempt.number)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.order.cwd,
                env=env,
                start_new_session=True,
                pass_fds=[self.lock, *(self._claims.locks if self._claims else ())],
                preexec_fn=lambda: processes.die_with_parent(me),  # this process has one thread, so this is safe
            )

    def _watch(self, worker: subprocess.Popen[bytes], attempt: rundir.Attempt, pace: Pace) -> None:
        """Write status until the worker has ended; pass a stop on to it, and kill it when its grace is over."""
        stopped_at: float | None = None
        self._beat_at = 0.0
        while worker.poll() is None:
            self._stopping = self._stopping or self._stop_asked(attempt)
            if self._stopping and stopped_at is None:
                stopped_at = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGTERM)
            if stopped_at is not None and time.monotonic() >= stopped_at + self._grace_s(attempt):
                _kill_group(worker)
            self._mirroring.tick()
            if self._is_due():
                pace.update()
                self._save_status(attempt, pace, "stopping" if self._stopping else "running")
            self._pause(_TICK_S)

    def _is_due(self) -> bool:
        """Whether it is time to write status.json again."""
        if time.monotonic() < self._beat_at:
            return False
        self._beat_at = time.monotonic() + _HEARTBEAT_S
        return True

    def _pause(self, seconds: float) -> None:
        """Wait until a signal came or the time is over."""
        select.select([self._wake], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 512)

    def _stop_asked(self, attempt: rundir.Attempt) -> bool:
        """Whether a stop was asked for: of this attempt, or of the one before it, which the asker thought the last."""
        before = _signature(self.run.attempt(attempt.number - 1).stop)
        known = self._old_stop if attempt.number == self._first_attempt else None
        return attempt.stop.exists() or before != known

    def _grace_s(self, attempt: rundir.Attempt) -> float:
        """How long the asker of the stop gives the worker; a second asker may have less patience."""
        asked = durable.load_news(attempt.stop) or durable.load_news(self.run.attempt(attempt.number - 1).stop)
        return float(asked.get("grace_s", GRACE_S))

    def _save_status(self, attempt: rundir.Attempt, pace: Pace, state: str, waits_for: list[str] | None = None) -> None:
        """Replace status.json. It is news: not synced, and a full disk must not stop the run because of it."""
        said = durable.load_news(attempt.progress)
        rate = pace.rows_per_second()
        before, total = said.get("rows_before", 0), said.get("rows_total")
        left = None if total is None else max(total - before - pace.rows, 0)
        document = {
            "state": state,
            "attempt": attempt.number,
            "phase": "queued" if state == "queued" else said.get("phase", "starting"),
            "waits_for": waits_for or [],
            "rows_done": before + pace.rows,
            "rows_total": total,
            "rows_synced": before + said.get("rows_synced", 0),
            "rows_per_second": rate,
            "eta_s": None if left is None or not rate else round(left / rate, 1),
            "heartbeat": times.now(),
            **{name: said[name] for name in _OF_TRAINING if name in said},
            **self._mirroring.said(),
        }
        with contextlib.suppress(OSError):
            durable.save_json(attempt.status, document, synced=False)

    def _seal_unstarted(self, attempt: rundir.Attempt, outcome: dict[str, Any]) -> rundir.Seal:
        """Seal an attempt whose worker was never started."""
        seal = rundir.Seal(attempt.number, None, None, files=dict(_digests(attempt)), ended_at=times.now(), **outcome)
        self._save_status(attempt, Pace(attempt.rows), "ended")
        durable.save_json(attempt.exit, seal.document())
        return seal

    def _seal(self, attempt: rundir.Attempt, code: int, pace: Pace) -> rundir.Seal:
        """End what is left of the attempt, judge how it went, and write that down durably, last of all."""

        def tick() -> None:
            if self._is_due():
                self._save_status(attempt, pace, "sealing")

        self._beat_at = 0.0
        tick()
        left = processes.sweep()
        held = self._claims.devices if self._claims else []
        folder = str(self.run.folder)
        not_free = devices.free_again(held, self._memory_before, lambda: processes.marked(folder), tick)
        said = durable.load_json(attempt.failure) or {}
        outcome = self._judge(attempt, code, pace.good + self._new_steps(attempt), said)
        if left:
            outcome["message"] += f" Processes that would not die: {left}."
        if not_free:
            outcome["message"] = f"{outcome['message']} {not_free}".strip()
        outs = {} if outcome["restarting"] else Outs(self.run).digests(tick)
        seal = rundir.Seal(
            attempt=attempt.number,
            code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            files=dict(_digests(attempt)),
            ended_at=times.now(),
            outs=outs,
            outs_sha256=rundir.outs_sha256(outs),
            **outcome,
        )
        self._save_status(attempt, pace, "ended")
        data = spec.canonical(seal.document()) + b"\n"  # in one line: of thousands of outs, that takes far less memory
        try:
            durable.replace_whole(attempt.exit, data)
        except OSError:  # the disk is full: let the reserve go, which is what it is for
            self.run.reserve.unlink(missing_ok=True)
            durable.replace_whole(attempt.exit, data)
        return seal

    def _new_steps(self, attempt: rundir.Attempt) -> int:
        """How many steps a training did that no attempt before had done: only those are getting on."""
        known = rows.Index()
        for other in self.run.attempts():
            if other.number != attempt.number:
                rows.index(other.steps, known)
        return len(rows.index(attempt.steps).keys.keys() - known.keys.keys())

    def _judge(self, attempt: rundir.Attempt, code: int, good: int, said: dict[str, Any]) -> dict[str, Any]:
        """The outcome fields of the seal: done, stopped, failed on purpose, or crashed (and whether to go on)."""
        if code == 0 and (self.order.restarts or not self._stopping):  # a command may end with 0 when it is stopped
            return _outcome("done")
        if self._stopping:
            return _outcome("stopped", "stopped", "It was stopped before it was done.")
        if said:
            return _outcome("failed", said["kind"], said["message"], said["hint"])
        if not self.order.restarts:
            return _outcome(
                "failed", "command", f"The command {processes.ending(code)}. Last words: {last_words(attempt.log)}"
            )
        self.crashes_without_row = 0 if good else self.crashes_without_row + (code > 0)
        self.kills_without_row = 0 if good else self.kills_without_row + (code < 0)
        give_up = (
            self.crashes_without_row >= CRASHES_WITHOUT_ROW_MAX
            or self.kills_without_row >= KILLS_WITHOUT_ROW_MAX
            or attempt.number >= ATTEMPTS_MAX
        )
        message = (
            f"The worker {processes.ending(code)} in attempt {attempt.number}. Last words: {last_words(attempt.log)}"
        )
        return {**_outcome("crashed", "crash", message), "restarting": not give_up}


def _not_started(error: OSError) -> dict[str, Any]:
    """Why no worker could be started: its working folder or its Python is gone, or the disk is full."""
    kind = "disk_full" if durable.is_full(error) else "config"
    return _outcome("failed", kind, f"The worker could not be started: {error}.", "Mend that, then resume the run.")


def _kill_group(worker: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)


def _signature(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None when there is none."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def announce_ready() -> None:
    """Tell the starter, once, that the worker runs; it may have been killed meanwhile, which changes nothing here."""
    with contextlib.suppress(OSError):
        os.write(1, b"ready\n")
        with durable.opened(Path(os.devnull), os.O_RDWR) as null:
            os.dup2(null, 1)


def _outcome(reason: str, kind: str = "", message: str = "", hint: str = "") -> dict[str, Any]:
    return {"reason": reason, "kind": kind, "message": message, "hint": hint, "restarting": False}


def _digests(attempt: rundir.Attempt) -> Iterator[tuple[str, dict[str, Any]]]:
    """Size and SHA-256 of each growing file; of rows only up to the last newline: a torn tail is nobody's row."""
    for name in rundir.GROWING:
        digest, counted, pending = hashlib.sha256(), 0, b""
        with contextlib.suppress(FileNotFoundError), (attempt.folder / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                if name.endswith(".jsonl"):
                    head, newline, pending = (pending + chunk).rpartition(b"\n")
                    chunk = head + newline
                digest.update(chunk)
                counted += len(chunk)
        yield name, {"bytes": counted, "sha256": digest.hexdigest()}


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]
        return next((line for line in reversed(lines) if line), "none")
    return "none"


def main(folder: str) -> int:
    """Supervise the run in `folder`; the order comes on standard input. Exits 0 also when another got there first."""
    run = rundir.Run(Path(folder))
    order = Order.of(json.load(sys.stdin.buffer))
    lock = locks.take(run.run_lock, _LOCK_WAIT_S)
    if lock is None or run.last_attempt() != order.expect_attempt:
        return 0
    Supervisor(run, order, lock).supervise()
    return 0

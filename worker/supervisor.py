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
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import durable, locks, rows, rundir, times
from worker import processes

ATTEMPTS_MAX = 50
"""A run that was restarted this often has something wrong that another restart will not mend."""
CRASHES_WITHOUT_ROW_MAX = 2
"""Crashes of the worker's own making in a row, without a new row between, that end the run."""
KILLS_WITHOUT_ROW_MAX = 5
"""The same for a worker that was killed from outside."""
GRACE_S = 10.0
_TICK_S = 0.25
_HEARTBEAT_S = 1.0
_LOCK_WAIT_S = 5.0
_TAIL_BYTES = 2000
_PACE_S = 60.0


@dataclass(frozen=True)
class Order:
    """What a start asks for: which attempt is expected to be the last one so far, and how to run the worker."""

    expect_attempt: int
    python: str
    agent: str
    """Folder that holds `jobs` and `worker`."""
    cwd: str
    env: dict[str, str]
    """Environment of the worker, secrets included: only ever in memory."""


@dataclass
class Progress:
    """Rows counted from the attempt's file as it grows, and the pace they come at."""

    path: Path
    offset: int = 0
    rows: int = 0
    good: int = 0
    """Those without an error: what counts as getting on."""
    points: deque[tuple[float, int]] = field(default_factory=deque)
    """(seconds, rows) of the last `_PACE_S`, oldest first."""

    def update(self) -> None:
        """Count the whole lines that are new since the last call."""
        for offset, line in rows.whole_lines(self.path, self.offset):
            self.offset = offset + len(line) + 1
            self.rows += 1
            with contextlib.suppress(rows.BadRow):
                self.good += rows.head(line)[1]
        now_s = time.monotonic()
        while len(self.points) > 1 and (now_s - self.points[1][0] > _PACE_S or self.points[1][1] == 0):
            self.points.popleft()
        self.points.append((now_s, self.rows))

    def rows_per_second(self) -> float | None:
        """Rows per second over the last minute, from the last look that saw none; None before there is a pace."""
        (began_s, before), (now_s, after) = self.points[0], self.points[-1]
        if after == before:
            return None
        return round((after - before) / (now_s - began_s), 3)


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
        self._first_attempt = run.last_attempt() + 1
        self._old_stop = _signature(run.attempt(run.last_attempt()).stop)

    def supervise(self) -> None:
        """Run attempts until one ends the run; every attempt is sealed."""
        processes.become_subreaper()
        signal.set_wakeup_fd(self._waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_stop)
        processes.kill(processes.marked(self.run.folder.name))
        while True:
            seal = self._attempt()
            if not seal.restarting:
                return

    def _on_stop(self, *_: object) -> None:
        self._stopping = True

    def _attempt(self) -> rundir.Seal:
        """One attempt from its folder to its seal."""
        number = self.run.last_attempt() + 1
        attempt = self.run.attempt(number)
        try:
            durable.have_folder(attempt.folder)  # it may be there: nobody was forked in it, since current.json says so
            durable.save_json(self.run.current, {"attempt": number})  # durable before the fork: an attempt starts once
            worker = self._spawn(attempt)
        except OSError as error:
            return self._seal_unstarted(attempt, error)
        durable.save_json(
            attempt.pids, {"supervisor": processes.identity(os.getpid()), "worker": processes.identity(worker.pid)}
        )
        announce_ready()
        progress = Progress(attempt.rows)
        self._watch(worker, attempt, progress)
        _kill_group(worker)
        left = processes.sweep()
        progress.update()
        return self._seal(attempt, worker.returncode, progress, left)

    def _spawn(self, attempt: rundir.Attempt) -> subprocess.Popen[bytes]:
        me = os.getpid()
        words = [self.order.python, "-I", str(Path(self.order.agent) / "worker" / "__main__.py"), "work"]
        os.set_inheritable(self.lock, True)
        with durable.opened(attempt.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log:
            return subprocess.Popen(
                [*words, str(self.run.folder), str(attempt.number)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.order.cwd,
                env={**self.order.env, processes.RUN_MARK: self.run.folder.name},
                start_new_session=True,
                pass_fds=[self.lock],
                preexec_fn=lambda: processes.die_with_parent(me),  # this process has one thread, so this is safe
            )

    def _watch(self, worker: subprocess.Popen[bytes], attempt: rundir.Attempt, progress: Progress) -> None:
        """Write status until the worker has ended; pass a stop on to it, and kill it when its grace is over."""
        stopped_at: float | None = None
        beat_at = 0.0
        while worker.poll() is None:
            self._stopping = self._stopping or self._stop_asked(attempt)
            if self._stopping and stopped_at is None:
                stopped_at = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGTERM)
            if stopped_at is not None and time.monotonic() >= stopped_at + self._grace_s(attempt):
                _kill_group(worker)
            if time.monotonic() >= beat_at:
                beat_at = time.monotonic() + _HEARTBEAT_S
                progress.update()
                self._save_status(attempt, progress, "stopping" if self._stopping else "running")
            select.select([self._wake], [], [], _TICK_S)
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

    def _save_status(self, attempt: rundir.Attempt, progress: Progress, state: str) -> None:
        """Replace status.json. It is news: not synced, and a full disk must not stop the run because of it."""
        said = durable.load_news(attempt.progress)
        rate = progress.rows_per_second()
        before, total = said.get("rows_before", 0), said.get("rows_total")
        left = None if total is None else max(total - before - progress.rows, 0)
        document = {
            "state": state,
            "attempt": attempt.number,
            "phase": said.get("phase", "starting"),
            "rows_done": before + progress.rows,
            "rows_total": total,
            "rows_synced": before + said.get("rows_synced", 0),
            "rows_per_second": rate,
            "eta_s": None if left is None or not rate else round(left / rate, 1),
            "heartbeat": times.now(),
        }
        with contextlib.suppress(OSError):
            durable.save_json(attempt.status, document, synced=False)

    def _seal_unstarted(self, attempt: rundir.Attempt, error: OSError) -> rundir.Seal:
        """Say why no worker could be started: its working folder or its Python is gone, or the disk is full."""
        self.run.reserve.unlink(missing_ok=True)
        durable.have_folder(attempt.folder)
        durable.save_json(self.run.current, {"attempt": attempt.number})
        kind = "disk_full" if durable.is_full(error) else "config"
        outcome = _outcome(
            "failed", kind, f"The worker could not be started: {error}.", "Mend that, then resume the run."
        )
        seal = rundir.Seal(attempt.number, None, None, files=dict(_digests(attempt)), ended_at=times.now(), **outcome)
        durable.save_json(attempt.exit, seal.document())
        return seal

    def _seal(self, attempt: rundir.Attempt, code: int, progress: Progress, left: list[int]) -> rundir.Seal:
        """Judge how the worker ended, and write that down durably, last of all."""
        said = durable.load_json(attempt.failure) or {}
        outcome = self._judge(attempt, code, progress.good, said)
        if left:
            outcome["message"] += f" Processes that would not die: {left}."
        seal = rundir.Seal(
            attempt=attempt.number,
            code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            files=dict(_digests(attempt)),
            ended_at=times.now(),
            **outcome,
        )
        self._save_status(attempt, progress, "ended")
        try:
            durable.save_json(attempt.exit, seal.document())
        except OSError:  # the disk is full: let the reserve go, which is what it is for
            self.run.reserve.unlink(missing_ok=True)
            durable.save_json(attempt.exit, seal.document())
        return seal

    def _judge(self, attempt: rundir.Attempt, code: int, good: int, said: dict[str, Any]) -> dict[str, Any]:
        """The outcome fields of the seal: done, stopped, failed on purpose, or crashed (and whether to go on)."""
        if code == 0:
            return _outcome("done")
        if self._stopping:
            return _outcome("stopped", "stopped", "It was stopped before it was done.")
        if said:
            return _outcome("failed", said["kind"], said["message"], said["hint"])
        self.crashes_without_row = 0 if good else self.crashes_without_row + (code > 0)
        self.kills_without_row = 0 if good else self.kills_without_row + (code < 0)
        give_up = (
            self.crashes_without_row >= CRASHES_WITHOUT_ROW_MAX
            or self.kills_without_row >= KILLS_WITHOUT_ROW_MAX
            or attempt.number >= ATTEMPTS_MAX
        )
        how = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.strsignal(-code) or -code}"
        message = f"The worker {how} in attempt {attempt.number}. Last words: {last_words(attempt.log)}"
        return {**_outcome("crashed", "crash", message), "restarting": not give_up}


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
    order = Order(**json.load(sys.stdin.buffer))
    lock = locks.take(run.run_lock, _LOCK_WAIT_S)
    if lock is None or run.last_attempt() != order.expect_attempt:
        return 0
    Supervisor(run, order, lock).supervise()
    return 0

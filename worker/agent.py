"""Commands the laptop sends about a run: put, start, state, pull, acknowledge, stop; each may be repeated."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from jobs import durable, locks, rundir, spec, times
from worker import acknowledged, processes, supervisor
from worker.intake import Intake
from worker.puller import Frame, Puller, state_frame

_START_WAIT_S = 20.0
_POLL_S = 0.2
_STUCK_S = 900.0
"""A pull that goes on for this much longer than was asked sends to nobody, and is ended by its own alarm."""
_STOP_MARGIN_S = 10.0
_SEALING_IS_NEWS_S = 30.0
"""A supervisor that said so recently that it seals the run is not killed for taking long: large files are hashed."""


def start(run: rundir.Run, request: dict[str, Any]) -> Frame:
    """Start the run's next attempt unless it runs or has moved on: asked any number of times, one supervisor starts.

    The request holds the whole job, and the order for the supervisor with the last attempt the asker knows of.
    """
    durable.have_folder(run.folder)
    with locks.held(run.start_lock, _START_WAIT_S):
        known = durable.load_json(run.job)
        if known is None:
            _keep_reserve(run)
            durable.save_json(run.job, request["job"])
        elif spec.canonical(known) != spec.canonical(request["job"]):
            return {"error": "conflict", "started": False}
        state = run.state()
        if state.state == "running" or state.attempt != request["order"]["expect_attempt"]:
            return {"started": False, **state_frame(run)}
        _launch(run, request["order"])
        return {"started": True, "said": supervisor.last_words(run.supervisor_log), **state_frame(run)}


def _keep_reserve(run: rundir.Run) -> None:
    with durable.opened(run.reserve, os.O_WRONLY | os.O_CREAT) as descriptor:
        durable.write_all(descriptor, b"\0" * rundir.RESERVE_BYTES)


def _launch(run: rundir.Run, order: dict[str, Any]) -> None:
    """Start a supervisor in a session of its own, hand it the order by pipe, and wait until its worker runs."""
    here = str(Path(order["agent"]) / "worker" / "__main__.py")
    with durable.opened(run.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log:
        child = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", here, "supervise", str(run.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(spec.canonical(order))
        child.stdin.close()
    os.set_blocking(child.stdout.fileno(), False)
    deadline = time.monotonic() + _START_WAIT_S
    while time.monotonic() < deadline and child.poll() is None and not child.stdout.read():
        time.sleep(_POLL_S / 10)


def stop(run: rundir.Run, grace_s: float) -> Frame:
    """Stop the run: ask its supervisor by file, wait, and kill what is left when it does not answer. Repeatable."""
    if not run.folder.is_dir():
        return state_frame(run)
    with locks.held(run.start_lock, _START_WAIT_S + _STOP_MARGIN_S):  # a start under way is waited for, then stopped
        state = run.state()
        if state.state != "running":
            return state_frame(run)
        attempt = run.attempt(state.attempt)
        durable.save_json(attempt.stop, {"grace_s": grace_s, "asked_at": times.now()})
    deadline = time.monotonic() + grace_s + _STOP_MARGIN_S
    while locks.is_held(run.run_lock) and time.monotonic() < deadline:
        time.sleep(_POLL_S / 4)
    if locks.is_held(run.run_lock) and not _is_sealing(attempt):
        _kill_all(run)
    return state_frame(run)


def _is_sealing(attempt: rundir.Attempt) -> bool:
    """Whether the worker is gone and the supervisor is at its last work, by its own recent word."""
    with contextlib.suppress(OSError):
        age_s = time.time() - attempt.status.stat().st_mtime
        return age_s < _SEALING_IS_NEWS_S and durable.load_news(attempt.status).get("state") == "sealing"
    return False


def _kill_all(run: rundir.Run) -> None:
    """Kill the supervisor first, so that it restarts nothing, then all that bears the run's mark."""
    for attempt in run.attempts()[-2:]:
        pids = durable.load_news(attempt.pids)
        processes.kill([known["pid"] for known in pids.values() if processes.is_same(known)])
    deadline = time.monotonic() + _STOP_MARGIN_S
    while locks.is_held(run.run_lock) and time.monotonic() < deadline:
        processes.kill(processes.marked(str(run.folder)))
        time.sleep(_POLL_S / 4)


def main(verb: str, words: list[str]) -> int:
    """Run one command; the answer is a JSON line (of `pull`: frames) on standard output."""
    run = rundir.Run(Path(words[0]))
    source, out = sys.stdin.buffer, sys.stdout.buffer
    if verb == "pull":
        request = json.loads(source.readline())
        signal.alarm(
            int(float(request.get("wait_s", 0)) + _STUCK_S)
        )  # a dead network may leave a write waiting for hours
        with contextlib.suppress(BrokenPipeError):
            Puller(run, request, out).pull()
        return 0
    try:
        answer = _answer(verb, run, words[1:], source)
    except OSError as error:
        if not durable.is_full(error):
            raise
        answer = {"error": "disk_full", "folder": str(run.folder)}
    out.write(json.dumps(answer).encode() + b"\n")
    return 0


def _answer(verb: str, run: rundir.Run, words: list[str], source: BinaryIO) -> Frame:
    if verb == "put":
        return Intake(run, source).take()
    if verb == "start":
        return start(run, json.load(source))
    if verb == "acknowledge":
        return acknowledged.take(run, json.load(source))
    if verb == "stop":
        return stop(run, float(words[0]))
    return state_frame(run)

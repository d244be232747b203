"""Commands the laptop sends: put files, start, state, pull, stop; each may be repeated, each answers in one format."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jobs import durable, locks, rundir, spec, times
from worker import processes, supervisor

CHUNK_BYTES = 1 << 20
"""Largest piece of a growing file in one frame, unless a single row is longer."""
_WHOLE_MAX_BYTES = 1 << 20
_WEIGHTS_MAX_BYTES = 64 << 20
"""Files of weights up to this size come home through this channel; larger ones need a bulk copy."""
_START_WAIT_S = 20.0
_POLL_S = 0.2
_BEAT_S = 5.0
_STOP_MARGIN_S = 10.0
_PUT = ("home.jsonl", "home-selections.jsonl", "resolved.json")
Frame = dict[str, Any]


def put(run: rundir.Run, source: BinaryIO) -> Frame:
    """Take files into a run that has not begun: frames of a JSON line `{name, bytes, sha256}` and that many bytes.

    A run that has begun keeps what it began with: nothing is taken.
    """
    if run.last_attempt() > 0:
        return {"put": []}
    durable.have_folder(run.folder)
    taken = []
    while line := source.readline():
        frame = json.loads(line)
        name = str(frame["name"])
        data = source.read(frame["bytes"])
        if len(data) != frame["bytes"] or hashlib.sha256(data).hexdigest() != frame["sha256"]:
            return {"error": "torn", "name": name}
        if not (name in _PUT or (rundir.may_come_home(name) and name.count("/") == 1)):
            return {"error": "refused", "name": name}
        path = run.folder / name
        durable.have_folder(path.parent)
        durable.replace_whole(path, data)
        taken.append(name)
    return {"put": taken}


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
            [sys.executable, "-I", here, "supervise", str(run.folder)],
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


def state_frame(run: rundir.Run) -> Frame:
    """Where the run stands, for the laptop."""
    state = run.state()
    return {
        "state": state.state,
        "attempt": state.attempt,
        "seal": state.seal.document() if state.seal else None,
    }


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
    if locks.is_held(run.run_lock):
        _kill_all(run)
    return state_frame(run)


def _kill_all(run: rundir.Run) -> None:
    """Kill the supervisor first, so that it restarts nothing, then all that bears the run's mark."""
    for attempt in run.attempts()[-2:]:
        pids = durable.load_news(attempt.pids)
        processes.kill([known["pid"] for known in pids.values() if processes.is_same(known)])
    deadline = time.monotonic() + _STOP_MARGIN_S
    while locks.is_held(run.run_lock) and time.monotonic() < deadline:
        processes.kill(processes.marked(run.folder.name))
        time.sleep(_POLL_S / 4)


class Puller:
    """Sends what the laptop does not have yet, in frames; keeps running hashes so that each byte is hashed once."""

    def __init__(self, run: rundir.Run, request: dict[str, Any], out: BinaryIO) -> None:
        self.run = run
        self.out = out
        self.wait_s = float(request.get("wait_s", 0))
        self.have: dict[str, list[Any]] = request.get("have", {})
        self.have_whole: dict[str, str] = request.get("have_whole", {})
        self.offsets: dict[str, int] = {}
        self.seen: dict[str, tuple[int, int, int]] = {}

    def pull(self) -> None:
        """Send new bytes until the run is not running or `wait_s` is over; then the end frame with its state."""
        deadline = time.monotonic() + self.wait_s
        beat_at = time.monotonic() + _BEAT_S
        while True:
            state = state_frame(self.run)  # before the files: what it says was written is then sent below
            sent = self._send_new()
            if state["state"] != "running" or time.monotonic() >= deadline:
                self._send({"end": True, **state})
                return
            if sent:
                beat_at = time.monotonic() + _BEAT_S
            elif time.monotonic() >= beat_at:
                self._send({"beat": True})
                beat_at = time.monotonic() + _BEAT_S
            if select.select([sys.stdin], [], [], _POLL_S)[0]:  # the other side is gone
                return

    def _send_new(self) -> bool:
        sent = self._send_whole(self.run.resolved)
        for attempt in self.run.attempts():
            for name in rundir.GROWING:
                sent |= self._send_growth(attempt.folder / name)
            for name in rundir.WHOLE:
                sent |= self._send_whole(attempt.folder / name)
        for folder in self.run.folders():
            for path in rundir.weights(folder):
                sent |= self._send_whole(path, _WEIGHTS_MAX_BYTES)
        return sent

    def _send_whole(self, path: Path, limit: int = _WHOLE_MAX_BYTES) -> bool:
        """Send a small file that differs from the one at home."""
        name = path.relative_to(self.run.folder).as_posix()
        try:
            facts = path.stat()
            if self.seen.get(name) == (facts.st_ino, facts.st_size, facts.st_mtime_ns):
                return False
            if facts.st_size > limit:
                return False
            self.seen[name] = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
            data = path.read_bytes()
        except FileNotFoundError:
            return False
        digest = hashlib.sha256(data).hexdigest()
        if self.have_whole.get(name) == digest:
            return False
        self.have_whole[name] = digest
        self._send({"whole": name, "bytes": len(data), "sha256": digest}, data)
        return True

    def _send_growth(self, path: Path) -> bool:
        """Send the whole lines (of a log: the bytes) after the offset that is at home, once its prefix was verified."""
        name = path.relative_to(self.run.folder).as_posix()
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        if name not in self.offsets and not self._begin(path, name, size):
            return False
        sent = False
        for data in self._pieces(path, self.offsets[name]):
            frame = {"file": name, "offset": self.offsets[name], "bytes": len(data)}
            self._send({**frame, "sha256": hashlib.sha256(data).hexdigest()}, data)
            self.offsets[name] += len(data)
            sent = True
        return sent

    def _begin(self, path: Path, name: str, size: int) -> bool:
        """Verify once that what is at home is a prefix of this file; say so when it is not, and send it anew."""
        offset, digest = self.have.get(name, [0, ""])
        if offset and (size < offset or rundir.file_sha256(path, offset) != digest):
            self._send({"diverged": name})
            offset = 0
        self.offsets[name] = offset
        return True

    def _pieces(self, path: Path, offset: int) -> Iterator[bytes]:
        rows_only = path.name.endswith(".jsonl")
        with path.open("rb") as file:
            file.seek(offset)
            pending = b""
            while chunk := file.read(CHUNK_BYTES):
                pending += chunk
                piece = pending[: pending.rfind(b"\n") + 1] if rows_only else pending
                if piece:
                    pending = pending[len(piece) :]
                    yield piece

    def _send(self, frame: Frame, data: bytes = b"") -> None:
        self.out.write(json.dumps(frame, separators=(",", ":")).encode() + b"\n" + data)
        self.out.flush()


def main(verb: str, words: list[str]) -> int:
    """Run one command; the answer is a JSON line (of `pull`: frames) on standard output."""
    run = rundir.Run(Path(words[0]))
    source, out = sys.stdin.buffer, sys.stdout.buffer
    if verb == "pull":
        with contextlib.suppress(BrokenPipeError):
            Puller(run, json.loads(source.readline()), out).pull()
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
        return put(run, source)
    if verb == "start":
        return start(run, json.load(source))
    if verb == "stop":
        return stop(run, float(words[0]))
    return state_frame(run)

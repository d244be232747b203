"""Sends what the laptop does not have yet, in frames: rows and logs as they grow, other files whole or in pieces."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jobs import locks, rundir
from worker import outs
from worker.outs import Signature, signature
from worker.pieces import Pieces

CHUNK_BYTES = 1 << 20
"""Largest piece of a growing file in one frame, unless a single row is longer."""
WHOLE_MAX_BYTES = 1 << 20
"""Files up to this size come in one frame, larger ones in pieces."""
STILL_S = 2.0
"""A file of a command is sent while the run goes on once it has not changed for so long."""
_STATE_S = 0.2
_BEAT_S = 5.0
_BURST_BYTES = 16 << 20
"""How much of one growing file of a command is sent before the others are looked at again."""
_LOOK_SHARE = 10
"""Looking takes at most one part in so many of the time, however many files there are."""
_LAST_LOOKS_MAX = 3
_SKIPPED_MAX = 100
Frame = dict[str, Any]


def state_frame(run: rundir.Run) -> Frame:
    """Where the run stands, for the laptop."""
    state = run.state()
    return {
        "state": state.state,
        "attempt": state.attempt,
        "seal": state.seal.outline() if state.seal else None,
    }


@dataclass
class _Growth:
    """How much of a growing file is at home, with the hash of that much, and which file it was."""

    offset: int
    hasher: Any
    inode: int


class Puller:
    """Answers one pull request; keeps running hashes so that each byte is hashed once."""

    def __init__(self, run: rundir.Run, request: dict[str, Any], out: BinaryIO) -> None:
        self.run = run
        self.out = out
        self.wait_s = float(request.get("wait_s", 0))
        self.poll_s = float(request.get("poll_s", _STATE_S))
        self.have: dict[str, list[Any]] = request.get("have", {})
        self.have_whole: dict[str, str] = request.get("have_whole", {})
        self.pieces = Pieces(run, request.get("parts", {}), self.have_whole)
        self.outs = outs.Outs(run)
        self._begun = frozenset(request.get("parts", {}))
        self._offered: Path | None = None
        self._lease: int | None = None
        self.growing: dict[str, _Growth] = {}
        self.seen: dict[str, Signature] = {}
        self._first_seen: dict[str, tuple[Signature, float]] = {}
        self._skipped: set[tuple[str, str]] = set()
        self._sent = False
        self._beat_at = 0.0

    def pull(self) -> None:
        """Send new bytes until the run is not running and all is sent, or `wait_s` is over; then the end frame."""
        deadline = time.monotonic() + self.wait_s
        look_at, last_looks = 0.0, 0
        self._beat_at = time.monotonic() + _BEAT_S
        while True:
            state = state_frame(self.run)  # before the files: what it says was written is then sent below
            ended = state["state"] != "running"
            is_last = ended or time.monotonic() >= deadline
            if not self.pieces if is_last else time.monotonic() >= look_at:
                began = time.monotonic()
                self._look(ended, is_last)
                look_at = time.monotonic() + max(self.poll_s, _LOOK_SHARE * (time.monotonic() - began))
                last_looks += is_last
                if is_last and not self.pieces and not (ended and self._sent and last_looks < _LAST_LOOKS_MAX):
                    break
            elif is_last and not ended and self.wait_s:  # what is left of large files comes with the next pull
                break
            self._step()
            wait_s = 0.0 if is_last or self.pieces else max(0.0, min(_STATE_S, look_at - time.monotonic()))
            if select.select([sys.stdin], [], [], wait_s)[0]:  # the other side is gone
                return
        self._send({"end": True, **state})

    def _step(self) -> None:
        """Go on with the large files, and say now and then that this side lives."""
        frame = self.pieces.step() if self.pieces else None
        if frame:
            self._send(*frame)
        self._beat()

    def _beat(self) -> None:
        if time.monotonic() >= self._beat_at:
            self._send({"beat": True})

    def _look(self, ended: bool, is_last: bool) -> None:
        """Send what is new in every file, or queue it; sets `_sent` when there was any."""
        self._sent = False
        self._whole(self.run.resolved.name)
        self._whole(self.run.examples.name)
        for attempt in self.run.attempts():
            folder = f"attempts/{attempt.folder.name}"
            for name in rundir.GROWING:
                with contextlib.suppress(FileNotFoundError):
                    self._growth(f"{folder}/{name}", (attempt.folder / name).lstat(), ended, is_last)
            for name in rundir.WHOLE:
                self._whole(f"{folder}/{name}")
        for path in self.run.folders():
            if rundir.checkpoint_number(path.name) is None:
                self._weights(path)
        self._checkpoint()
        for name, facts in self.outs.find(self._skip).items():
            if rundir.grows(name):
                self._growth(name, facts, ended, is_last)
            elif ended or self._is_still(name, facts):
                self._offer(name, facts)

    def _is_still(self, name: str, facts: os.stat_result) -> bool:
        """Whether a file has not changed for a while: by its own times, or because two looks saw the same."""
        now = signature(facts)
        known, since = self._first_seen.get(name, (None, 0.0))
        if known != now:
            since = time.monotonic()
            self._first_seen[name] = (now, since)
        age_s = time.time() - max(facts.st_mtime, facts.st_ctime)
        return age_s >= STILL_S or time.monotonic() - since >= STILL_S

    def _checkpoint(self) -> None:
        """Offer one checkpoint, held against removal until all of it is home; then the newest of those that came since.

        One that began to travel is finished first: on a slow line no checkpoint would ever come home whole otherwise.
        """
        while True:
            found = [path for path in self.run.checkpoints() if not self._is_home(path)]
            if self._offered not in found:
                if self._lease is not None:
                    os.close(self._lease)
                    self._lease = None
                begun = [path for path in found if any(name.startswith(f"{path.name}/") for name in self._begun)]
                newest = [path for path in self.run.checkpoints()[-1:] if path in found]
                self._offered = next(iter([*begun, *newest]), None)
            if self._offered is None:
                return
            if self._lease is None:
                with contextlib.suppress(FileNotFoundError):  # removed just now: the next look finds another
                    self._lease = locks.take(self._offered / rundir.MANIFEST)
            self._weights(self._offered)
            if not self._is_home(self._offered):
                return

    def _is_home(self, folder: Path) -> bool:
        """Whether all of a folder of weights was sent: its manifest comes last."""
        return f"{folder.name}/{rundir.MANIFEST}" in self.have_whole

    def _weights(self, folder: Path) -> None:
        """Offer a folder of weights, its manifest once all the others are on their way home, not before."""
        with contextlib.suppress(FileNotFoundError):  # an old checkpoint, removed meanwhile
            for path in rundir.weights(folder):
                name = f"{folder.name}/{path.name}"
                facts = path.lstat()
                if not rundir.may_come_home(name) or not stat.S_ISREG(facts.st_mode):
                    self._skip(outs.plain(name), "not a regular file with a plain name")
                elif path.name != rundir.MANIFEST or not any(f"{folder.name}/" in name for name in self.pieces):
                    self._offer(name, facts)

    def _whole(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._offer(name, (self.run.folder / name).lstat())

    def _offer(self, name: str, facts: os.stat_result) -> None:
        """Send a file that appears whole and differs from the one at home; a large one joins the queue."""
        if self.seen.get(name) == signature(facts):
            return
        self.seen[name] = signature(facts)
        if facts.st_size > WHOLE_MAX_BYTES:
            self.pieces.add(name, lambda: self._open(name))
            return
        try:
            with os.fdopen(self._open(name), "rb") as file:
                data = file.read(WHOLE_MAX_BYTES + 1)
        except OSError:
            return
        digest = hashlib.sha256(data).hexdigest()
        if self.have_whole.get(name) == digest or len(data) > WHOLE_MAX_BYTES:  # it grew: the next look sees to it
            return
        self.have_whole[name] = digest
        self._send({"whole": name, "bytes": len(data), "sha256": digest}, data)

    def _open(self, name: str) -> int:
        """A descriptor of a file of the run by its name on the wire, reached without following a link; OSError."""
        if name.startswith(f"{rundir.OUT}/"):
            return self.outs.open(name)
        return outs.open_file(self.run.folder, name)

    def _growth(self, name: str, facts: os.stat_result, ended: bool, is_last: bool) -> None:
        """Send the whole lines (of a log: the bytes) after the offset that is at home, once its prefix was verified."""
        known = self.growing.get(name)
        if known and (known.inode, known.offset) == (facts.st_ino, facts.st_size):
            return
        try:
            file = os.fdopen(self._open(name), "rb")
        except OSError:
            return
        with file:
            growth = self._verified(name, file)
            began = growth.offset
            for data in self._new_bytes(name, file, ended):
                frame = {"file": name, "offset": growth.offset, "bytes": len(data)}
                self._send({**frame, "sha256": hashlib.sha256(data).hexdigest()}, data)
                growth.hasher.update(data)
                growth.offset += len(data)
                if not is_last and name.startswith(f"{rundir.OUT}/") and growth.offset - began >= _BURST_BYTES:
                    break

    def _verified(self, name: str, file: BinaryIO) -> _Growth:
        """How far the file is home, `file` standing there; what is home and is no beginning of it is said to be none.

        Verified once, and again when the file is another one or shorter than it was.
        """
        facts = os.fstat(file.fileno())
        known = self.growing.get(name)
        if known and known.inode == facts.st_ino and facts.st_size >= known.offset:
            file.seek(known.offset)
            return known
        offset, digest = (known.offset, known.hasher.hexdigest()) if known else self.have.get(name, [0, ""])
        hasher = self._hash_of_first(file, offset)
        if offset and (hasher is None or hasher.hexdigest() != digest):
            self._send({"diverged": name})
            self.have.pop(name, None)
            hasher, offset = None, 0
            file.seek(0)
        self.growing[name] = _Growth(offset, hasher or hashlib.sha256(), facts.st_ino)
        return self.growing[name]

    def _hash_of_first(self, file: BinaryIO, size: int) -> Any:
        """The running SHA-256 of the first bytes of a file, which then stands behind them; None when it is shorter."""
        hasher = hashlib.sha256()
        while size:
            chunk = file.read(min(size, CHUNK_BYTES))
            if not chunk:
                return None
            hasher.update(chunk)
            size -= len(chunk)
            self._beat()
        return hasher

    def _new_bytes(self, name: str, file: BinaryIO, ended: bool) -> Iterator[bytes]:
        """Pieces that end with a line; a row is never cut, a command's line when it is endless or its last."""
        by_line = name.endswith(".jsonl")
        is_out = name.startswith(f"{rundir.OUT}/")
        pending = b""
        while chunk := file.read(CHUNK_BYTES):
            pending += chunk
            cut = pending.rfind(b"\n") + 1 if by_line else len(pending)
            if is_out and not cut and len(pending) >= CHUNK_BYTES:
                cut = len(pending)
            if cut:
                yield pending[:cut]
                pending = pending[cut:]
        is_news = pending or (name not in self.have and not self.growing[name].offset)  # an empty file is one, too
        if is_out and ended and is_news:
            self.have[name] = [0, ""]
            yield pending

    def _skip(self, text: str, why: str) -> None:
        """Say once that a file is passed over."""
        if (text, why) not in self._skipped and len(self._skipped) < _SKIPPED_MAX:
            self._skipped.add((text, why))
            self._send({"skipped": text, "why": why})

    def _send(self, frame: Frame, data: bytes = b"") -> None:
        self.out.write(json.dumps(frame, separators=(",", ":")).encode() + b"\n" + data)
        self.out.flush()
        self._sent = True
        self._beat_at = time.monotonic() + _BEAT_S

"""What of a run the laptop has said to be durable at home, checked here byte for byte; and what is not home."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from jobs import durable, locks, rundir, trees
from worker import outs
from worker.outs import signature

_LOCK_WAIT_S = 20.0
_BUDGET_S = 30.0
"""After so long what was checked is recorded and answered; the laptop asks again for the rest."""
_SETTLED_NS = 2_000_000_000
"""A file changed more recently than this may change again without its times telling so."""
_CHUNK_BYTES = 1 << 20
_ENTRY = 6
"""Of a recorded file: how many bytes are home, their SHA-256, and the four parts of its signature then."""
_RESULTS = ("rows.jsonl", "noise.jsonl", "selections.jsonl", "steps.jsonl")
"""Of the files of an attempt, those that nothing else could make again."""
Answer = dict[str, Any]


class Acknowledged:
    """The record of one run: for each file how much of it is home, with its hash, and which file that was."""

    def __init__(self, run: rundir.Run) -> None:
        self.run = run
        self._outs = outs.Outs(run)
        known = durable.load_news(run.acknowledged)
        self._files: dict[str, list[Any]] = {name: entry for name, entry in known.items() if _is_entry(entry)}

    def take(self, request: dict[str, Any]) -> Answer:
        """Record what is home: `have` and `have_whole` as in the request of a pull. Told twice, it is recorded once.

        Only what this machine's own files confirm is recorded; `refused` names the others. `more`: not all was looked
        at yet, ask again.
        """
        deadline = time.monotonic() + _BUDGET_S
        refused: list[str] = []
        before = dict(self._files)
        for name, size, digest in _told(request):
            if time.monotonic() >= deadline:
                break
            if not self._confirm(name, size, digest):
                refused.append(name)
        else:
            deadline = float("inf")
        if self._files != before:
            durable.save_json(self.run.acknowledged, self._files)
        return {"acknowledged": len(self._files), "refused": refused, "more": deadline != float("inf")}

    def _confirm(self, name: str, size: int | None, digest: str) -> bool:
        """Whether this machine's file begins with `size` bytes of that hash (None: is all of it); then it is noted."""
        try:
            with os.fdopen(self._open(name), "rb") as file:
                facts = os.fstat(file.fileno())
                if size is None:
                    facts = _settled(file)
                asked = facts.st_size if size is None else size
                now = [asked, digest, *signature(facts)]
                if self._files.get(name) == now:
                    return True
                if asked > facts.st_size or _sha256(file, asked) != digest:
                    return False
                if size is None and signature(os.fstat(file.fileno())) != signature(facts):
                    return False
        except OSError:
            return False
        self._files[name] = now
        return True

    def _open(self, name: str) -> int:
        if name.startswith(f"{rundir.OUT}/"):
            return self._outs.open(name)
        return outs.open_file(self.run.folder, name)

    def missing(self) -> Iterator[str]:
        """The names of results that are not known to be home as they are now."""
        for attempt in self.run.attempts():
            for name in _RESULTS:
                wire = f"attempts/{attempt.folder.name}/{name}"
                if not self._has_lines(wire):
                    yield wire
        for folder in self.run.folders():
            for path in rundir.weights(folder):
                facts = path.lstat()
                if stat.S_ISREG(facts.st_mode) and not self._has_all(f"{folder.name}/{path.name}", facts):
                    yield f"{folder.name}/{path.name}"
        for name, facts in self._outs.find(lambda *_: None).items():
            if not self._has_all(name, facts):
                yield name

    def _has_all(self, name: str, facts: os.stat_result) -> bool:
        """Whether the file is home as it is, to its last byte."""
        known = self._files.get(name)
        return known is not None and known[0] == facts.st_size and tuple(known[2:]) == signature(facts)

    def _has_lines(self, name: str) -> bool:
        """Whether every whole line of a file that only grows is home; one that is not there has none."""
        known = self._files.get(name, [0, "", None])
        try:
            with os.fdopen(outs.open_file(self.run.folder, name), "rb") as file:
                facts = os.fstat(file.fileno())
                if known[0] and (known[2] != facts.st_ino or known[0] > facts.st_size):
                    return False
                file.seek(known[0])
                while chunk := file.read(_CHUNK_BYTES):
                    if b"\n" in chunk:
                        return False
        except FileNotFoundError:
            return True
        return True


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == _ENTRY and all(isinstance(part, (int, str)) for part in entry)


def _told(request: dict[str, Any]) -> Iterator[tuple[str, int | None, str]]:
    """Name, bytes (None: all) and hash of each file of the request that may come home at all."""
    have, whole = request.get("have", {}), request.get("have_whole", {})
    told = [(name, *entry) for name, entry in have.items()] + [(name, None, digest) for name, digest in whole.items()]
    for name, size, digest in told:
        is_size = size is None or (type(size) is int and size > 0)
        if is_size and trees.is_sha256(digest) and rundir.may_come_home(name):
            yield name, size, digest


def _settled(file: BinaryIO) -> os.stat_result:
    """What the file is, once its last change lies so far back that a new one would be seen."""
    facts = os.fstat(file.fileno())
    young_ns = _SETTLED_NS - (time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns))
    if 0 < young_ns <= _SETTLED_NS:
        time.sleep(young_ns / 1e9)
        facts = os.fstat(file.fileno())
    return facts


def _sha256(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def take(run: rundir.Run, request: dict[str, Any]) -> Answer:
    """What the laptop hears when it says what is durable at home."""
    if not run.folder.is_dir():
        return {"acknowledged": 0, "refused": [], "more": False}
    with locks.held(run.acknowledge_lock, _LOCK_WAIT_S):
        return Acknowledged(run).take(request)

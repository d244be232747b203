"""Large files on their way home: hashed in steps, sent from where a pull broke off, dropped when they change."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from jobs import durable, rundir
from worker.outs import Signature, signature

PIECE_BYTES = 4 << 20
"""Largest piece of a file in one frame."""
_HASH_STEP_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_SETTLED_NS = 2_000_000_000
"""A file changed more recently than this may change again without its times telling so."""
Frame = dict[str, Any]


@dataclass
class _File:
    """The file that is being sent: read to its end once for its digest, then a second time piece by piece."""

    name: str
    file: BinaryIO
    signature: Signature
    hasher: Any = field(default_factory=hashlib.sha256)
    hashed: int = 0
    digest: str = ""
    offset: int = 0

    @property
    def size(self) -> int:
        """Bytes of the file as it was found."""
        return self.signature[1]


class Pieces:
    """The queue of large files to be sent. `parts` says what of which is home; `have` the digests of whole ones."""

    def __init__(self, run: rundir.Run, parts: dict[str, Any], have: dict[str, str]) -> None:
        self._run = run
        self._parts = parts
        self._have = have
        self._queue: dict[str, Callable[[], int]] = {}
        self._current: _File | None = None
        self._known: dict[str, Any] = durable.load_news(run.digests)

    def __iter__(self) -> Iterator[str]:
        return iter(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, name: str, opens: Callable[[], int]) -> None:
        """Send that file when its turn comes; `opens` gives a descriptor of it then."""
        self._queue.setdefault(name, opens)

    def step(self) -> tuple[Frame, bytes] | None:
        """Do a little of the first file's work; the frame to send, None when it had none. The queue is not empty."""
        name, opens = next(iter(self._queue.items()))
        try:
            current = self._current or self._opened(name, opens)
            if current is None:  # it was all home
                return None
            if not current.digest:
                self._hash(current)
                return None
            return self._piece(current)
        except OSError:  # it has changed or is gone: the next look finds what it is now
            self._drop()
            return None

    def _opened(self, name: str, opens: Callable[[], int]) -> _File | None:
        file = os.fdopen(opens(), "rb")
        self._current = _File(name, file, signature(os.fstat(file.fileno())))
        known = self._known.get(name)
        if isinstance(known, list) and tuple(known[:-1]) == self._current.signature:
            self._begin(self._current, str(known[-1]))
        return self._current

    def _hash(self, current: _File) -> None:
        """Hash the next bytes; at the end of the file its digest is known."""
        for _ in range(_HASH_STEP_BYTES // _CHUNK_BYTES):
            chunk = current.file.read(_CHUNK_BYTES)
            if not chunk:
                self._refuse_changed(current)
                self._remember(current, current.hasher.hexdigest())
                self._begin(current, current.hasher.hexdigest())
                return
            current.hasher.update(chunk)
            current.hashed += len(chunk)

    def _remember(self, current: _File, digest: str) -> None:
        """Keep the digest for later pulls, unless the file is so young that a change may go unseen."""
        if time.time_ns() - max(current.signature[2:]) > _SETTLED_NS:
            self._known[current.name] = [*current.signature, digest]
            with contextlib.suppress(OSError):
                durable.save_json(self._run.digests, self._known, synced=False)

    def _begin(self, current: _File, digest: str) -> None:
        """Send from where the laptop is, or nothing when it has all of it."""
        current.digest = digest
        if self._have.get(current.name) == digest:
            self._drop()
            return
        part = self._parts.pop(current.name, {})
        if part.get("digest") == digest and 0 <= part["bytes"] <= current.size:
            current.offset = part["bytes"]

    def _piece(self, current: _File) -> tuple[Frame, bytes]:
        self._refuse_changed(current)
        current.file.seek(current.offset)
        data = current.file.read(min(PIECE_BYTES, current.size - current.offset))
        self._refuse_changed(current)  # what was read belongs to the digest
        frame = {
            "piece": current.name,
            "offset": current.offset,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "total": current.size,
            "digest": current.digest,
        }
        current.offset += len(data)
        if current.offset == current.size:
            self._have[current.name] = current.digest
            self._drop()
        return frame, data

    def _refuse_changed(self, current: _File) -> None:
        if signature(os.fstat(current.file.fileno())) != current.signature:
            raise OSError(f"{current.name} has changed")

    def _drop(self) -> None:
        """Go on with the next file."""
        del self._queue[next(iter(self._queue))]
        if self._current:
            self._current.file.close()
        self._current = None

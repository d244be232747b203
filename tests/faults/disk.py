"""Stand-ins for the `os` that writes: disks that remember, fail, stall, are full or lose; and what a power cut leaves.

The model of a power cut: what was synced is there; of what was not, each 4 KiB page may be written, missing, zeroed or
rubbish, independently of the others, and each new name may be there or not. Bytes outside the range of a write are not
harmed by it (SQLite calls this powersafe overwrite). A file's sync does not make its name durable; its folder's does.
"""
# ruff: noqa: D102, PTH102, PTH105, PTH108 -- the methods are those of `os`, and do what those do

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from jobs import durable, rows

PAGE_BYTES = 4096
CHANGES = ("open", "write", "fsync", "fdatasync", "replace", "ftruncate", "unlink", "mkdir", "rmdir")
"""The calls that change a disk; `open` counts when it makes a file."""


@contextmanager
def instead_of_os(disk: Any) -> Iterator[None]:
    """Let `jobs.durable` and `jobs.rows` see `disk` where they see `os`."""
    with mock.patch.object(durable, "os", disk), mock.patch.object(rows, "os", disk):
        yield


@dataclass(frozen=True)
class Effect:
    """One thing that happened to the disk, in order; `mark` is a word of the test's own among them."""

    kind: str
    path: Path = Path()
    file: int = -1
    offset: int = 0
    data: bytes = b""
    covers: int = 0
    """Of a sync: how many effects there were when it began. What came while it ran it does not promise."""
    mark: Any = None


class RecordingOs:
    """`os`, remembering every effect on files and folders that are made through it."""

    def __init__(self) -> None:
        self.effects: list[Effect] = []
        self._files: dict[Path, int] = {}
        self._opened: dict[int, tuple[Path, int, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mark(self, value: Any) -> None:
        self.effects.append(Effect("mark", mark=value))

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        path = Path(path)
        is_new = not path.exists()
        descriptor = os.open(path, flags, mode)
        if is_new:
            self._files[path] = len(self.effects)
            self.effects.append(Effect("create", path, self._files[path]))
        self._opened[descriptor] = (path, flags, self._files.get(path, -1))
        if flags & os.O_TRUNC and not is_new:
            self.ftruncate(descriptor, 0)
        return descriptor

    def write(self, descriptor: int, data: bytes) -> int:
        path, flags, file = self._opened[descriptor]
        offset = os.fstat(descriptor).st_size if flags & os.O_APPEND else os.lseek(descriptor, 0, os.SEEK_CUR)
        written = os.write(descriptor, data)
        self.effects.append(Effect("write", path, file, offset, bytes(data[:written])))
        return written

    def ftruncate(self, descriptor: int, size: int) -> None:
        path, _, file = self._opened[descriptor]
        os.ftruncate(descriptor, size)
        self.effects.append(Effect("truncate", path, file, size))

    def fdatasync(self, descriptor: int) -> None:
        path, _, file = self._opened[descriptor]
        covers = len(self.effects)
        os.fdatasync(descriptor)
        self.effects.append(Effect("sync folder" if path.is_dir() else "sync", path, file, covers=covers))

    fsync = fdatasync

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)
        self._files[Path(target)] = self._files.pop(Path(source))
        self.effects.append(Effect("unlink", Path(source)))  # the old name may stay, the new one shows the whole file
        self.effects.append(Effect("create", Path(target), self._files[Path(target)]))

    def unlink(self, path: Path) -> None:
        os.unlink(path)
        self.effects.append(Effect("unlink", Path(path)))

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        os.mkdir(path, mode)
        self.effects.append(Effect("mkdir", Path(path)))


class PowerCut:
    """The disk as it may be found when the power went after the given effects; `source` decides what was lost."""

    def __init__(self, effects: list[Effect], source: Random) -> None:
        self._source = source
        self._pieces = [effect.data for effect in effects if effect.data]
        self._harm = source.choice((0.0, 0.2, 0.5, 0.9, 1.0))
        self.marks = [effect.mark for effect in effects if effect.kind == "mark"]
        self.folders: set[Path] = set()
        self.files: dict[Path, bytes] = {}
        numbers = self._names(effects)
        for path, file in numbers.items():
            self.files[path] = self._content([(at, each) for at, each in enumerate(effects) if each.file == file])

    def put_into(self, folder: Path, root: Path) -> None:
        """Write the files that lay directly in `root` into `folder`, and nothing else."""
        for old in folder.iterdir():
            old.unlink()
        for path, content in self.files.items():
            if path.parent == root:
                (folder / path.name).write_bytes(content)

    def _names(self, effects: list[Effect]) -> dict[Path, int]:
        numbers: dict[Path, int] = {}
        synced: dict[Path, int] = {}
        for effect in effects:
            if effect.kind == "sync folder":
                synced[effect.path] = effect.covers
        for at, effect in enumerate(effects):
            durable_by = synced.get(effect.path.parent, 0)
            if effect.kind not in ("create", "unlink", "mkdir") or not (at < durable_by or self._source.random() < 0.5):
                continue
            if effect.kind == "create":
                numbers[effect.path] = effect.file
            elif effect.kind == "unlink":
                numbers.pop(effect.path, None)
            else:
                self.folders.add(effect.path)
        return numbers

    def _content(self, effects: list[tuple[int, Effect]]) -> bytes:
        """One file: everything its last sync covers, then whatever became of the rest."""
        covered = max((effect.covers for _, effect in effects if effect.kind == "sync"), default=0)
        content = bytearray()
        for at, effect in effects:
            if at < covered:
                _apply(content, effect)
        sizes = [len(content)]
        for at, effect in effects:
            if at < covered:
                continue
            if effect.kind == "write":
                sizes.append(effect.offset + len(effect.data))
                self._write_harmed(content, effect)
            elif effect.kind == "truncate" and self._source.random() >= self._harm:
                _apply(content, effect)
                sizes = [len(content)]
        size = self._source.choice([sizes[0], sizes[-1], self._source.choice(sizes)])
        return bytes(content[:size]).ljust(size, b"\0")

    def _write_harmed(self, content: bytearray, effect: Effect) -> None:
        start = effect.offset
        end = start + len(effect.data)
        while start < end:
            stop = min(end, (start // PAGE_BYTES + 1) * PAGE_BYTES)
            piece = effect.data[start - effect.offset : stop - effect.offset]
            fate = self._source.choice(("missing", "zeros", "stale")) if self._source.random() < self._harm else "there"
            if fate == "zeros":
                piece = bytes(len(piece))
            elif fate == "stale":
                piece = self._stale(len(piece))
            if fate != "missing":
                _apply(content, Effect("write", offset=start, data=piece))
            start = stop

    def _stale(self, size: int) -> bytes:
        """What may have stood there before: a piece of something written at any time, in its place or shifted."""
        other = self._source.choice(self._pieces)
        shift = self._source.choice((0, self._source.randrange(len(other))))
        return other[shift : shift + size].ljust(size, b"\xa5")


def _apply(content: bytearray, effect: Effect) -> None:
    if effect.kind == "truncate":
        del content[effect.offset :]
    elif effect.kind == "write":
        content.extend(bytes(max(0, effect.offset - len(content))))
        content[effect.offset : effect.offset + len(effect.data)] = effect.data


@dataclass(frozen=True)
class Fault:
    """How a disk fails: with which error, whether for good, and whether the first failing write does half its work."""

    error: int
    from_then_on: bool = False
    half: bool = False

    @property
    def can_remove(self) -> bool:
        """Whether files can still be cut and removed: on a full disk they can."""
        return self.error == errno.ENOSPC or not self.from_then_on


class FailingOs:
    """`os`, whose n-th change of the disk fails. Half a write is no error of its own: only the next call says why."""

    def __init__(self, n: int, fault: Fault) -> None:
        self.fault = fault
        self._n = n
        self._count = 0
        self._lock = threading.Lock()  # rows are synced by a thread of their own

    @property
    def has_failed(self) -> bool:
        """Whether the n-th change came at all."""
        return self._count >= self._n

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CHANGES:
            return real

        def change(*words: Any) -> Any:
            if name == "open" and not words[1] & os.O_CREAT:
                return real(*words)
            with self._lock:
                self._count += 1
                at = self._count
            if at == self._n and self.fault.half and name == "write":
                return real(words[0], words[1][: len(words[1]) // 2])
            if at == self._n or (at > self._n and self._still_fails(name)):
                raise OSError(self.fault.error, os.strerror(self.fault.error))
            return real(*words)

        return change

    def _still_fails(self, name: str) -> bool:
        removes = name in ("ftruncate", "unlink", "rmdir")
        return self.fault.from_then_on and not (removes and self.fault.can_remove)


class StallingOs:
    """`os`, whose syncs wait until `go_on` is set; counts those that were begun."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.syncs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fdatasync(self, descriptor: int) -> None:
        self.syncs += 1
        self.go_on.wait()
        os.fdatasync(descriptor)


class ShortOs:
    """`os`, that writes only so many bytes at once."""

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        return os.write(descriptor, data[: self._at_most])


class FullOs:
    """`os` on a disk that is full for as long as it is said to be."""

    is_full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(descriptor, data)


class LosingOs(StallingOs):
    """`os` on a disk that cannot sync, and says so when it is let go on."""

    def fdatasync(self, descriptor: int) -> None:
        self.syncs += 1
        self.go_on.wait()
        raise OSError(errno.EIO, "the disk lost it")

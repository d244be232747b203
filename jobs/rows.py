"""One line of rows.jsonl: encode, decode, key and checksum; append durably, read past damage, repair a torn tail."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from jobs import durable

SYNC_ROWS = 64
"""A power cut loses at most this many rows: `append` waits for the disk rather than let more stand unsynced."""
SYNC_S = 0.5
"""A power cut loses at most the rows of this many seconds."""
_SYNC_EARLY_ROWS = SYNC_ROWS // 2  # the disk works on one half while the other half is being written
_SYNC_EARLY_S = SYNC_S / 2  # the sync itself takes time too
_CHUNK_BYTES = 1 << 22
_CHECKSUM = re.compile(rb',"crc":"([0-9a-f]{8})"\}$')
_CHECKSUM_BYTES = len(b',"crc":"00000000"}')
_HEAD = re.compile(rb'\{"key":"([^"\\]*)","error":(null|")')
Row = dict[str, Any]


class BadRow(ValueError):
    """A line that is not a row: not JSON, without its key, or with another checksum than its bytes have."""


def encode(row: Row) -> bytes:
    """A row as one line with its newline: key and error first, to be indexed without parsing; CRC-32 last.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    ordered = {"key": row["key"], "error": row["error"], **row}
    try:
        body = json.dumps(ordered, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 does not have: written as an escape instead
        body = json.dumps(ordered, separators=(",", ":"), allow_nan=False).encode()
    return b'%b,"crc":"%08x"}\n' % (body[:-1], zlib.crc32(body))


def checked(line: bytes) -> bytes:
    """The line, without its newline, if its checksum is right; raises BadRow."""
    line = line.rstrip(b"\n")
    found = _CHECKSUM.search(line)
    if found is None:
        raise BadRow("no checksum at the end of the line")
    if zlib.crc32(b"}", zlib.crc32(memoryview(line)[:-_CHECKSUM_BYTES])) != int(found[1], 16):
        raise BadRow("the checksum does not match the line")
    return line


def decode(line: bytes) -> Row:
    """The row of a line; raises BadRow."""
    try:
        row = json.loads(checked(line))
    except ValueError as error:
        raise BadRow(str(error)) from error
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        raise BadRow("not an object with a key")
    return row


def head(line: bytes) -> tuple[str, bool]:
    """A row's key and whether it is without error, mostly without parsing the line; raises BadRow."""
    found = _HEAD.match(line)
    if found is not None:
        checked(line)
        return found[1].decode(), found[2] == b"null"
    row = decode(line)
    return row["key"], row.get("error") is None


def whole_lines(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Every line that has its newline, with its offset in bytes; a last line without one is not given. Absent: none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(start)
        rest = b""
        while chunk := file.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield start, line
                start += len(line) + 1


@dataclass
class Index:
    """What a file of rows holds: each key with whether a good row of it is there, and what was not readable."""

    keys: dict[str, bool] = field(default_factory=dict)
    corrupt: int = 0
    end: int = 0
    """Offset in bytes just past the last newline."""

    @property
    def good(self) -> int:
        """How many keys have a row without error."""
        return sum(self.keys.values())

    def wants(self, key: str, good: bool) -> bool:
        """Whether a row adds something: a key's first row, or the first good one after an error."""
        known = self.keys.get(key)
        return known is None or (good and not known)


def index(path: Path, into: Index | None = None) -> Index:
    """Read a whole file of rows into an index; damaged lines are counted, never fatal."""
    found = Index() if into is None else into
    found.end = 0
    for offset, line in whole_lines(path):
        found.end = offset + len(line) + 1
        try:
            key, good = head(line)
        except BadRow:
            found.corrupt += 1
            continue
        if found.wants(key, good):
            found.keys[key] = good
    return found


def read(paths: Iterable[Path]) -> Iterator[Row]:
    """Each key's final row over several files: the first without error, else the first. Damaged lines are passed over.

    Two passes, so that memory holds keys only; rows come in file order.
    """
    paths = list(paths)
    merged = Index()
    for path in paths:
        index(path, merged)
    for path in paths:
        for _, line in whole_lines(path):
            try:
                key, good = head(line)
                if merged.keys.get(key) is good:
                    row = decode(line)
                    del merged.keys[key]
                    yield row
            except BadRow:
                continue


def repair(path: Path) -> int:
    """Set a last line without newline aside, into `<name>.torn`, and cut it off; returns how many bytes that was.

    For the one writer of a file, before it appends. The bytes are durable beside the file before they are cut.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return 0
    end = _last_newline(path, size)
    if end == size:
        return 0
    with durable.opened(path, os.O_RDWR) as descriptor:
        tail = os.pread(descriptor, size - end, end)
        with durable.opened(path.with_name(path.name + ".torn"), os.O_WRONLY | os.O_CREAT | os.O_APPEND) as aside:
            durable.write_all(aside, tail + b"\n")
            durable.sync(aside)
        os.ftruncate(descriptor, end)
        durable.sync(descriptor)
    return size - end


def _last_newline(path: Path, size: int) -> int:
    """The offset just past the last newline of a file, 0 when it has none."""
    with path.open("rb") as file:
        while size > 0:
            start = max(0, size - _CHUNK_BYTES)
            file.seek(start)
            found = file.read(size - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            size = start
    return 0


class Appender:
    """Appends rows to one new file: each is written at once (a kill loses none), and synced in groups by a thread.

    One writer: the file is made here and must not exist. After a failed write or sync the appender stays failed.
    Used as a context manager; leaving it syncs and closes.
    """

    def __init__(self, path: Path) -> None:
        """Make the file, durably by name; FileExistsError when it exists."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        durable.sync_folder(path.parent)
        self._end = 0
        self._written = 0
        self._synced = 0
        self._oldest_unsynced_at = 0.0
        self._failure: BaseException | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._sync_in_groups, name="row-sync", daemon=True)
        self._thread.start()

    @property
    def written(self) -> int:
        """Rows that a kill of this process cannot lose."""
        return self._written

    @property
    def synced(self) -> int:
        """Rows that a power cut cannot lose."""
        return self._synced

    def append(self, row: Row) -> None:
        """Write a row; returns once a kill of this process cannot lose it. On OSError it is not there."""
        line = encode(row)
        with self._changed:
            while self._written - self._synced >= SYNC_ROWS and self._failure is None:
                self._changed.wait()
            self._raise_failure()
            try:
                self._end = durable.append(self._descriptor, line, self._end)
            except OSError as error:
                self._failure = error
                raise
            if self._written == self._synced:
                self._oldest_unsynced_at = time.monotonic()
            self._written += 1
            if self._written - self._synced in (1, _SYNC_EARLY_ROWS):
                self._changed.notify_all()

    def sync(self) -> None:
        """Return once every row written so far is on the disk; raises OSError."""
        with self._changed:
            goal = self._written
            self._oldest_unsynced_at = 0.0  # as if it had waited long enough
            self._changed.notify_all()
            while self._synced < goal and self._failure is None:
                self._changed.wait()
            self._raise_failure()

    def close(self) -> None:
        """Sync what is left and close the file; may be called twice. Raises OSError when rows could not be synced."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        os.close(self._descriptor)
        self._raise_failure()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise OSError(*self._failure.args) from self._failure

    def _sync_in_groups(self) -> None:
        while self._wait_for_group():
            goal = self._written
            started = time.monotonic()
            try:
                durable.sync(self._descriptor)
            except OSError as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._synced = goal
                self._oldest_unsynced_at = started
                self._changed.notify_all()

    def _wait_for_group(self) -> bool:
        """Wait until enough rows, or old enough ones, are unsynced; False when closing with nothing left to sync."""
        with self._changed:
            while True:
                unsynced = self._written - self._synced
                if self._closing or self._failure is not None:
                    return unsynced > 0 and self._failure is None
                age_s = time.monotonic() - self._oldest_unsynced_at
                if unsynced >= _SYNC_EARLY_ROWS or (unsynced and age_s >= _SYNC_EARLY_S):
                    return True
                self._changed.wait(_SYNC_EARLY_S - age_s if unsynced else None)

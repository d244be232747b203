"""One line of rows.jsonl: encode, decode, key and checksum; append durably, read past damage, repair a torn tail."""

from __future__ import annotations

import contextlib
import json
import os
import queue
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
"""A power cut loses at most the rows of this many seconds, on a disk that syncs within half of that."""
_SYNC_EARLY_ROWS = SYNC_ROWS // 2  # the disk works on one half while the other half is being written
_SYNC_EARLY_S = SYNC_S / 2  # the sync itself takes time too
_CHUNK_BYTES = 1 << 22
_CHECKSUM = re.compile(rb',"crc":"([0-9a-f]{8})"\}')
_CHECKSUM_BYTES = len(b',"crc":"00000000"}')
_HEAD = re.compile(rb'\{"key":"([^"\\]*)","error":(null|")')
Row = dict[str, Any]
_write_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class BadRow(ValueError):
    """A line that is not a row: not JSON, without its key, or with another checksum than its bytes have."""


def encode(row: Row) -> bytes:
    """A row as one line with its newline: key and error first, to be indexed without parsing; CRC-32 last.

    Raises ValueError for what would not come back: NaN, infinities, a key that is not text, a field named `crc`.
    """
    if not isinstance(row["key"], str) or "crc" in row:
        raise ValueError("a row's key is text, and no field of it is named crc: that is the checksum's")
    ordered = {"key": row["key"], "error": row["error"], **row}
    try:
        body = _write_json(ordered).encode()
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 does not have: written as an escape instead
        body = json.dumps(ordered, separators=(",", ":"), allow_nan=False).encode()
    return b'%b,"crc":"%08x"}\n' % (body[:-1], zlib.crc32(body))


def checked(line: bytes) -> bytes:
    """The line, without its newline, if its checksum is right; raises BadRow."""
    line = line.rstrip(b"\n")
    found = _CHECKSUM.fullmatch(line, max(0, len(line) - _CHECKSUM_BYTES))
    if found is None:
        raise BadRow("no checksum at the end of the line")
    if zlib.crc32(b"}", zlib.crc32(memoryview(line)[:-_CHECKSUM_BYTES])) != int(found[1], 16):
        raise BadRow("the checksum does not match the line")
    return line


def decode(line: bytes) -> Row:
    """The row of a line, without its checksum; raises BadRow."""
    try:
        row = json.loads(checked(line).decode())
    except (ValueError, RecursionError) as error:  # a checksum does not say that the line was written by `encode`
        raise BadRow(str(error)) from error
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        raise BadRow("not an object with a key")
    del row["crc"]
    return row


def head(line: bytes) -> tuple[str, bool]:
    """A row's key and whether it is without error, mostly without parsing the line; raises BadRow."""
    found = _HEAD.match(line)
    if found is None:
        row = decode(line)
        return row["key"], row.get("error") is None
    checked(line)
    try:
        return found[1].decode(), found[2] == b"null"
    except UnicodeDecodeError as error:
        raise BadRow(str(error)) from error


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
        durable.sync_folder(path.parent)
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
        self._descriptor = durable.make_file(path)
        self._written = 0
        self._synced = 0
        self._wanted = 0  # rows that someone waits for
        self._write_failure: OSError | None = None
        self._sync_failure: OSError | None = None
        self._closing = False
        # A lock and queues made in C: a signal handler that raises (a TERM that ends the worker) can leave them at any
        # moment. It would leave a Condition locked, and `close` waiting for ever.
        self._writing = threading.Lock()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._syncs: queue.SimpleQueue[None] = queue.SimpleQueue()
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
        with self._writing:
            if self._closing:
                raise ValueError(f"the row {row['key']} came after close")
            self._wait_for(self._written - SYNC_ROWS + 1)
            _raise(self._write_failure or self._sync_failure)
            try:
                durable.append(self._descriptor, line, os.lseek(self._descriptor, 0, os.SEEK_END))
            except OSError as error:
                self._write_failure = error
                raise
            self._written += 1
            if self._written - self._synced in (1, _SYNC_EARLY_ROWS, SYNC_ROWS):
                _tell(self._wakes)

    def sync(self) -> None:
        """Return once every row written so far is on the disk; raises OSError."""
        with self._writing:
            self._wanted = self._written
            _tell(self._wakes)
            self._wait_for(self._wanted)
        _raise(self._sync_failure)

    def close(self) -> None:
        """Sync what is left and close the file; may be called twice. Raises OSError when rows could not be synced."""
        with self._writing:
            if self._closing:
                return
            self._closing = True
        _tell(self._wakes)
        self._thread.join()
        os.close(self._descriptor)
        _raise(self._sync_failure)

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _wait_for(self, synced: int) -> None:
        """Return once that many rows are synced, or no more can be. The caller holds the lock: one waits at a time."""
        while self._synced < synced and self._sync_failure is None:
            self._syncs.get()

    def _sync_in_groups(self) -> None:
        """The thread: sync when half of the rows that may stand unsynced do, or the oldest has for long enough."""
        enough = _SYNC_EARLY_ROWS
        oldest_at = 0.0
        while self._sync_failure is None:
            closing = self._closing  # looked at before the rows: none is written after it
            unsynced = self._written - self._synced
            left_s = oldest_at + _SYNC_EARLY_S - time.monotonic()
            if unsynced == 0:
                if closing:
                    return
                self._wakes.get()
                oldest_at = time.monotonic()
            elif unsynced < enough and left_s > 0 and self._wanted <= self._synced and not closing:
                with contextlib.suppress(queue.Empty):
                    self._wakes.get(timeout=left_s)
            else:
                oldest_at = time.monotonic()
                disk_is_slower = self._sync_written()
                enough = SYNC_ROWS if disk_is_slower else _SYNC_EARLY_ROWS  # then each sync is to do all it may

    def _sync_written(self) -> bool:
        """Sync every row written so far and say so; whether meanwhile as many were written as may stand unsynced."""
        goal = self._written
        try:
            durable.sync(self._descriptor)
        except OSError as error:
            self._sync_failure = error
        disk_is_slower = self._written - self._synced >= SYNC_ROWS
        if self._sync_failure is None:
            self._synced = goal
        _tell(self._syncs)
        return disk_is_slower


def _tell(waiting: queue.SimpleQueue[None]) -> None:
    """Wake who waits, to look again; one message is enough."""
    if waiting.empty():
        waiting.put(None)


def _raise(failure: OSError | None) -> None:
    if failure is not None:
        raise OSError(*failure.args) from failure

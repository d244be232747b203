"""Writes that survive: whole or not at all, short writes finished, synced before they are counted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.platform == "darwin":
    import fcntl


def sync(descriptor: int) -> None:
    """Return once the file's bytes are on the disk; raises OSError, after which the file must not be trusted again.

    A failed sync is final: the kernel may mark the lost pages clean, so that a second call succeeds and lies.
    """
    if sys.platform == "darwin":  # fsync there stops at the drive's cache
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno != errno.ENOTSUP:  # network and FAT disks have only the weaker one
                raise
            os.fsync(descriptor)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename is atomic, but not on the disk before this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte: a full disk makes `write` return short without an error, and only the next call says why."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def append(descriptor: int, data: bytes, end: int) -> int:
    """Append at `end`, the file's size in bytes; returns the new size. On any failure the file is cut back to `end`."""
    try:
        write_all(descriptor, data)
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
        raise
    return end + len(data)


def replace_whole(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Put `data` at `path` so that a reader sees the old file or the new one, never a part.

    `synced=False` leaves out the two syncs: for files that are only news (status), where an old one after a power cut
    does no harm.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            write_all(descriptor, data)
            if synced:
                sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)  # noqa: PTH105 -- every effect on the disk goes through this module's `os`
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise
    if synced:
        sync_folder(path.parent)


def is_full(error: OSError) -> bool:
    """Whether an effect failed because the disk, or this user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def make_folder(folder: Path) -> None:
    """Make a folder that must not exist yet, durably; FileExistsError when it does."""
    os.mkdir(folder, 0o700)  # noqa: PTH102
    try:
        sync_folder(folder.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # noqa: PTH106 -- or the next try would find it there
        raise


def make_file(path: Path) -> int:
    """Make a file to append to, which must not exist yet, durably; returns its descriptor. FileExistsError else."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    try:
        sync_folder(path.parent)
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108
        raise
    return descriptor


def have_folder(folder: Path) -> None:
    """Make a folder and what is missing above it, each durably, for this user only; may be called again."""
    if not folder.is_dir():
        have_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            make_folder(folder)


def save_json(path: Path, document: Any, *, synced: bool = True) -> None:
    """Put one JSON document at `path`, whole or not at all."""
    text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False)
    replace_whole(path, text.encode("utf-8", "backslashreplace") + b"\n", synced=synced)


def load_json(path: Path) -> Any:
    """The JSON document at `path`, or None when there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def load_news(path: Path) -> dict[str, Any]:
    """The JSON object at `path`, empty when there is none or it is damaged: for files that were never synced."""
    try:
        document = load_json(path)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A file descriptor, closed on every path."""
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

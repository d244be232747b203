"""File locks that the kernel frees when their holder dies: the truth of who is alive, without clocks or pids."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_S = 0.005
_PROBE_S = 0.05  # a probe (`is_held`) holds the lock for microseconds, and is not a holder


def take(path: Path, wait_s: float = 0.0) -> int | None:
    """The descriptor that holds the lock, or None when another holds it for longer than `wait_s`.

    The caller keeps the descriptor open for as long as it holds the lock; lock files are never deleted.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + max(wait_s, _PROBE_S)
    taken = False
    try:
        while not (taken := _flock(descriptor, fcntl.LOCK_EX)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    finally:
        if not taken:
            os.close(descriptor)
    return descriptor if taken else None


@contextlib.contextmanager
def held(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock inside the block; TimeoutError when another holds it for longer than `wait_s`."""
    descriptor = take(path, wait_s)
    if descriptor is None:
        raise TimeoutError(f"{path} is locked by another process for more than {wait_s:g} s")
    try:
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether someone holds the lock now. Probes with a shared lock, so that two probes never disturb each other."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int) -> bool:
    """Take the lock if that can be done at once; whether it could."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

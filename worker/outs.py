"""Files a command leaves for its user: found by pattern, opened and hashed without ever following a link."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs import durable, rundir, trees

FILES_MAX = 10_000
"""More files than these are not brought home; the first one left out is named."""
_DEPTH_MAX = 64
_CHUNK_BYTES = 1 << 20
_TEXT_MAX = 200
Signature = tuple[int, int, int, int]
"""What changes when a file does: inode, size, and when content and inode were changed, in nanoseconds."""
Skip = Callable[[str, str], None]
"""Told of a name that is passed over, as plain text, and why."""
_Rests = frozenset[tuple[str, ...]]
"""What is left of each pattern that has led so far."""


def signature(facts: os.stat_result) -> Signature:
    """What is compared to see whether a file is still the same."""
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def plain(name: str) -> str:
    """A name of any bytes as text that can be shown anywhere."""
    return ascii(name)[1:-1][:_TEXT_MAX]


def open_folder(base: Path, parts: Iterable[str], *, make: bool = False) -> int:
    """A descriptor of a folder below `base`, reached without following a link; made where it is missing if asked to.

    NotADirectoryError or ELOOP when a link or a file is in the way.
    """
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    for part in parts:
        above = descriptor
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=above)
                    os.fsync(above)
            descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
        finally:
            os.close(above)
    return descriptor


def open_file(base: Path, name: str) -> int:
    """A descriptor of a regular file below `base`, reached without following a link, open for reading; OSError else."""
    *parts, last = name.split("/")
    folder = open_folder(base, parts)
    try:
        descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(f"{name} is not a regular file")
    return descriptor


class Outs:
    """What a run's command brings home: the files below the folder it runs in that match its patterns."""

    def __init__(self, run: rundir.Run) -> None:
        job = durable.load_news(run.job)
        self.run = run
        self.parts = [run.work.name, *filter(None, str(job.get("folder") or "").split("/"))]
        self.patterns = [str(pattern) for pattern in job.get("out") or ()]

    def path(self, name: str) -> str:
        """Where the file with that name on the wire lies, below the run's folder."""
        return "/".join([*self.parts, name.partition("/")[2]])

    def open(self, name: str) -> int:
        """A descriptor of one of these files by its name on the wire; OSError when it cannot be reached safely."""
        return open_file(self.run.folder, self.path(name))

    def find(self, skip: Skip) -> dict[str, os.stat_result]:
        """Every file that matches, by its name on the wire and in its order; `skip` hears of what is passed over."""
        return dict(self._found(skip))

    def _found(self, skip: Skip) -> Iterator[tuple[str, os.stat_result]]:
        if not self.patterns:
            return
        try:
            root = open_folder(self.run.folder, self.parts)
        except OSError:
            return  # nothing was made yet, or a link is in its place
        try:
            walk = _walk(root, rundir.OUT, frozenset(_parsed(self.patterns, skip)), skip)
            yield from itertools.islice(walk, FILES_MAX)
            for name, _ in itertools.islice(walk, 1):
                skip(plain(name), f"more than {FILES_MAX} files")
        finally:
            os.close(root)

    def digests(self, tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of each of these files, for the seal; `tick` is called now and then meanwhile."""
        found = {}
        for name, _ in self._found(lambda *_: None):
            digest, size = hashlib.sha256(), 0
            with contextlib.suppress(OSError), os.fdopen(self.open(name), "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    tick()
                found[name] = {"bytes": size, "sha256": digest.hexdigest()}
        return found


def _parsed(patterns: list[str], skip: Skip) -> Iterator[tuple[str, ...]]:
    """The parts of each pattern; one without a wildcard, or that ends in a slash, means a folder's files too."""
    for pattern in patterns:
        parts = tuple(part for part in pattern.split("/") if part not in ("", "."))
        if pattern.startswith("/") or ".." in parts:
            skip(plain(pattern), "a pattern that leads out of the command's folder")
            continue
        if pattern and not pattern.endswith("/"):
            yield parts
        if pattern.endswith("/") or (pattern and not any(sign in pattern for sign in "*?[")):
            yield (*parts, "**", "*")


def _closed(rests: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The same with every `**` also taken for nothing."""
    found = set()
    for rest in rests:
        found.add(rest)
        while rest[:1] == ("**",):
            rest = rest[1:]
            found.add(rest)
    return found


def _after(rests: _Rests, name: str) -> _Rests:
    """What is left of the patterns once they have led over `name`."""
    found = set()
    for rest in _closed(rests):
        if rest[:1] == ("**",):
            found.add(rest)
        elif rest and fnmatch.fnmatchcase(name, rest[0]):
            found.add(rest[1:])
    return frozenset(found)


def _walk(folder: int, prefix: str, rests: _Rests, skip: Skip) -> Iterator[tuple[str, os.stat_result]]:
    """The files below an open folder to which the patterns lead, sorted within each folder."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            left = _after(rests, entry.name)
            if not left:
                continue
            name = f"{prefix}/{entry.name}"
            matches = () in _closed(left)
            if not trees.is_safe_path(name):
                if matches or entry.is_dir(follow_symlinks=False):
                    skip(plain(name), "a name that is too long, or that cannot be shown")
            elif entry.is_dir(follow_symlinks=False):
                yield from _walk_below(folder, name, left, skip)
            elif entry.is_file(follow_symlinks=False):
                if matches:
                    with contextlib.suppress(OSError):  # it was there a moment ago
                        yield name, entry.stat(follow_symlinks=False)
            elif matches:
                skip(name, "a link" if entry.is_symlink() else "not a regular file")


def _walk_below(folder: int, name: str, rests: _Rests, skip: Skip) -> Iterator[tuple[str, os.stat_result]]:
    if name.count("/") > _DEPTH_MAX:
        skip(name[:_TEXT_MAX], f"deeper than {_DEPTH_MAX} folders")
        return
    try:
        inner = os.open(name.rpartition("/")[2], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    except PermissionError:
        skip(name, "a folder that may not be read")
        return
    except OSError:
        return  # gone since, or something else by now
    try:
        yield from _walk(inner, name, rests, skip)
    finally:
        os.close(inner)

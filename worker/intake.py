"""Files from home for a run that is to go on here: rows, what was resolved, weights, and what a command made before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jobs import durable, locks, rundir, trees
from worker.outs import open_folder

_RENEWED = ("home.jsonl", "home-noise.jsonl", "home-selections.jsonl")
"""Taken at every resume: a run may come back to a machine with newer rows than it left there."""
_LOCK_WAIT_S = 20.0
_CHUNK_BYTES = 1 << 20
Answer = dict[str, Any]


class Intake:
    """Takes frames of a JSON line `{name, bytes, sha256}` and that many bytes, whatever their size.

    An out has a `folder` too, the one its command runs in: on a new machine the job comes with the start, after this.
    Rows are replaced whole; what was resolved, weights and outs are taken only where there are none yet. While the run
    goes on here nothing is taken.
    """

    def __init__(self, run: rundir.Run, source: BinaryIO) -> None:
        self.run = run
        self.source = source
        self.put: list[str] = []
        self.left: list[str] = []

    def take(self) -> Answer:
        """Take all there are; which were put in place, and (`left`) which were not needed or had something in the way.

        An error, `refused` or `torn` with its `name` or `unstaged`, ends it: the files before that were taken.
        """
        durable.have_folder(self.run.folder)
        while line := self.source.readline():
            frame = json.loads(line)
            name, size = str(frame["name"]), int(frame["bytes"])
            if not _is_wanted(name):
                return {"error": "refused", "name": name}
            where = self._where(name, frame)
            if where is None:
                return {"error": "unstaged", "name": name}
            if self._is_running():  # asked again where it counts: this only spares the bytes
                return {"put": []}
            with self._received(size) as (path, digest):
                if digest != frame["sha256"]:
                    return {"error": "torn", "name": name}
                taken = self._place(name, path, where)
                if taken is None:
                    return {"put": []}
            (self.put if taken else self.left).append(name)
        return {"put": self.put, **({"left": self.left} if self.left else {})}

    def _where(self, name: str, frame: dict[str, Any]) -> list[str] | None:
        """The parts of the path a file belongs at, below the run's folder; None while its project is not there."""
        if not name.startswith(f"{rundir.OUT}/"):
            return name.split("/")
        folder = str(frame.get("folder") or "")
        if not self.run.work.is_dir() or (folder and not trees.is_safe_path(folder)):
            return None
        return [self.run.work.name, *filter(None, folder.split("/")), *name.split("/")[1:]]

    @contextlib.contextmanager
    def _received(self, size: int) -> Iterator[tuple[Path, str]]:
        """The next bytes of the source in a file of their own, synced, with their SHA-256 (empty: they were cut)."""
        path = self.run.folder / f".put.{os.getpid()}"
        digest = hashlib.sha256()
        try:
            with durable.opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW) as descriptor:
                while size and (chunk := self.source.read(min(size, _CHUNK_BYTES))):
                    durable.write_all(descriptor, chunk)
                    digest.update(chunk)
                    size -= len(chunk)
                durable.sync(descriptor)
            yield path, "" if size else digest.hexdigest()
        finally:
            path.unlink(missing_ok=True)

    def _is_running(self) -> bool:
        return self.run.state().state == "running"

    def _place(self, name: str, path: Path, where: list[str]) -> bool | None:
        """Put a received file where it belongs; False when it cannot be or need not be, None when the run has begun."""
        with locks.held(self.run.start_lock, _LOCK_WAIT_S):
            if self._is_running():
                return None
            if not self._is_missing(name):
                return False
            try:
                folder = open_folder(self.run.folder, where[:-1], make=True)
            except OSError as error:
                if durable.is_full(error):
                    raise
                return False  # a link or a file is in the way
            try:
                if name.startswith(f"{rundir.OUT}/") and _is_there(where[-1], folder):
                    return False
                os.replace(path, where[-1], dst_dir_fd=folder)
                os.fsync(folder)
            finally:
                os.close(folder)
            return True

    def _is_missing(self, name: str) -> bool:
        """Whether a file of that name is to be taken: an out is looked for in its own place."""
        if name in _RENEWED or name.startswith(f"{rundir.OUT}/"):
            return True
        folder, _, file = name.rpartition("/")
        return not (self.run.folder / folder / (rundir.MANIFEST if folder else file)).exists()


def _is_there(name: str, folder: int) -> bool:
    """Whether an open folder holds something of that name, be it a link that leads nowhere."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_wanted(name: str) -> bool:
    """Whether a start needs a file of that name from home."""
    if name in (*_RENEWED, "resolved.json"):
        return True
    return rundir.may_come_home(name) and (name.startswith(f"{rundir.OUT}/") or name.count("/") == 1)

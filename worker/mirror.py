"""Copies what a run has made to another place while it goes on: lines by offset, other files whole, seals last."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from jobs import durable, locks, rows, rundir, times
from worker import outs
from worker.outs import Signature, signature

CHUNK_BYTES = 4 << 20
_SEAL = "exit.json"
_WHOLE = tuple(name for name in rundir.WHOLE if name not in ("status.json", _SEAL))
_STILL_S = 2.0
_AGAIN_MAX_S = 120.0
_LOCK_WAIT_S = 5.0
_CHECKPOINTS_KEPT = 2


class Unusable(Exception):
    """The place cannot take anything as it is; the words say why and what would mend it."""


class Store(Protocol):
    """A place that keeps a run's files under the names they have on the machine."""

    pause_s: float
    """Between two looks for what is new."""

    def size(self, name: str, source: BinaryIO) -> int:
        """How many bytes of a growing file it has; they are a beginning of `source`."""
        ...

    def append(self, name: str, offset: int, data: bytes) -> None:
        """Have what follows the first `offset` bytes, durably once `flush` has returned."""
        ...

    def put(self, name: str, source: BinaryIO) -> None:
        """Have a file as it is, durably once `flush` has returned."""
        ...

    def flush(self) -> None:
        """Return once everything so far is safe there."""
        ...

    def retire(self) -> None:
        """Let older checkpoints go, all but the newest whole one and the one before it, where that frees any room."""
        ...


class FolderStore:
    """A folder on another disk, such as a network file system."""

    pause_s = 2.0

    def __init__(self, folder: Path, base: str) -> None:
        """`base` is the run's and its machine's folder below that one, which is made; Unusable when it cannot be.

        Only that one folder is made: a path of which more is missing is misspelt, or its disk is not mounted.
        """
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Unusable(f"the folder {folder} is not there, and cannot be made: {error.strerror}") from None
        self._folder = folder / base
        self._sizes: dict[str, int] = {}

    def size(self, name: str, source: BinaryIO) -> int:
        """See Store. A torn end, as a kill may leave it, is cut off; what is no beginning of it is set aside."""
        if name not in self._sizes:
            path = self._path(name)
            if rundir.grows(name) and name.endswith(".jsonl"):
                rows.repair(path)
            there = path.stat().st_size if path.exists() else 0
            if there and _sha256(source, there) != rundir.file_sha256(path):
                number = 1
                while (aside := path.with_name(f"{path.name}.diverged-{number}")).exists():
                    number += 1
                path.rename(aside)
                there = 0
            self._sizes[name] = there
        return self._sizes[name]

    def append(self, name: str, offset: int, data: bytes) -> None:
        """See Store."""
        path = self._path(name)
        is_new = not path.exists()
        del self._sizes[name]  # should it fail, the file is looked at anew
        with durable.opened(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND) as descriptor:
            if os.fstat(descriptor).st_size != offset:
                raise Unusable(f"{path} is written by somebody else, too")
            durable.append(descriptor, data, offset)
            durable.sync(descriptor)
        if is_new:
            durable.sync_folder(path.parent)
        self._sizes[name] = offset + len(data)

    def put(self, name: str, source: BinaryIO) -> None:
        """See Store. It appears whole; nothing happens when it is there already."""
        path = self._path(name)
        size = os.fstat(source.fileno()).st_size
        if path.is_file() and path.stat().st_size == size and rundir.file_sha256(path) == _sha256(source, size):
            return
        source.seek(0)
        part = path.with_name(f".{path.name}.part")
        with durable.opened(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW) as descriptor:
            while chunk := source.read(CHUNK_BYTES):
                durable.write_all(descriptor, chunk)
            durable.sync(descriptor)
        part.replace(path)
        durable.sync_folder(path.parent)

    def flush(self) -> None:
        """See Store. All of it is already."""

    def retire(self) -> None:
        """See Store. A manifest goes before the files that it names."""
        for folder in rundir.Run(self._folder).checkpoints()[:-_CHECKPOINTS_KEPT]:
            (folder / rundir.MANIFEST).unlink(missing_ok=True)
            durable.sync_folder(folder)
            shutil.rmtree(folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        path = self._folder / name
        durable.have_folder(path.parent)
        return path


def _sha256(source: BinaryIO, size: int) -> str:
    """SHA-256 of the first bytes of an open file; of fewer when it has no more."""
    source.seek(0)
    digest = hashlib.sha256()
    while size and (chunk := source.read(min(size, CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


class Copying:
    """Brings one run's files to a store; begun anew at any time, it goes on where the store is."""

    def __init__(self, run: rundir.Run, store: Store) -> None:
        self.run = run
        self.store = store
        self.bytes = 0
        """Copied so far by this process."""
        self._outs = outs.Outs(run)
        self._put: dict[str, Signature] = {}
        self._settled: dict[str, tuple[int, int]] = {}

    def step(self, *, final: bool) -> None:
        """Copy what is new; `final`: the run has ended, so that files which changed just now are whole, too.

        Seals are copied once all the rest is safe there: who sees one can rely on what it names.
        """
        attempts = [f"attempts/{attempt.folder.name}" for attempt in self.run.attempts()]
        sealed = [folder for folder in attempts if (self.run.folder / folder / _SEAL).exists()]  # before all the rest
        for folder in attempts:
            for name in rundir.GROWING:
                self._grow(f"{folder}/{name}")
            for name in _WHOLE:
                self._whole(f"{folder}/{name}")
        self._whole(self.run.resolved.name)
        self._whole(self.run.examples.name)
        for path in self.run.folders():
            self._weights(path)
        for name, facts in self._outs.find(lambda *_: None).items():
            if rundir.grows(name):
                self._grow(name)
            elif final or time.time() - facts.st_mtime >= _STILL_S:
                self._whole(name)
        self.store.flush()
        self.store.retire()
        for folder in sealed:
            self._whole(f"{folder}/{_SEAL}")
        self.store.flush()

    def _weights(self, folder: Path) -> None:
        """Copy a folder of weights, its manifest last; a checkpoint is held against removal until then."""
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as held:  # an old one, removed just now
            if rundir.checkpoint_number(folder.name) is not None:
                lease = locks.take(folder / rundir.MANIFEST)
                if lease is not None:  # else a pull holds it
                    held.callback(os.close, lease)
            for file in rundir.weights(folder):
                self._whole(f"{folder.name}/{file.name}")

    def _open(self, name: str) -> int:
        if name.startswith(f"{rundir.OUT}/"):
            return self._outs.open(name)
        return outs.open_file(self.run.folder, name)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO | None]:
        """The file, or None when it is not there, or nothing that is copied."""
        try:
            descriptor = self._open(name) if rundir.may_come_home(name) else None
        except OSError:
            descriptor = None
        if descriptor is None:
            yield None
            return
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def _grow(self, name: str) -> None:
        """Copy the whole lines (of a log: the bytes) that are new."""
        with self._opened(name) as file:
            if file is None:
                return
            facts = os.fstat(file.fileno())
            now = (facts.st_ino, facts.st_size)
            if self._settled.get(name) == now:
                return
            offset = self.store.size(name, file)
            file.seek(offset)
            pending = b""
            while chunk := file.read(CHUNK_BYTES):
                pending += chunk
                cut = pending.rfind(b"\n") + 1 if name.endswith(".jsonl") else len(pending)
                if cut:
                    self.store.append(name, offset, pending[:cut])
                    offset += cut
                    self.bytes += cut
                    pending = pending[cut:]
            self._settled[name] = now

    def _whole(self, name: str) -> None:
        """Copy a file unless it is there as it is."""
        with self._opened(name) as file:
            if file is None:
                return
            facts = os.fstat(file.fileno())
            if self._put.get(name) != signature(facts):
                self.store.put(name, file)
                self.bytes += facts.st_size
                self._put[name] = signature(facts)


def opened(target: str, run_id: str, machine: str) -> Store:
    """The store a `--mirror` names: a folder, or `hf://…`. Raises Unusable.

    In it each machine has its own folder, as at home: two machines that a run was on count their attempts from one.
    """
    base = f"{run_id}/machines/{machine}"
    if target.startswith("hf://"):
        from worker.hub_store import HubStore

        return HubStore(target, base)
    return FolderStore(Path(target), base)


def main(folder: str, target: str, machine: str, words: list[str]) -> int:
    """Mirror the run in `folder`: with the word `once` what there is, else for as long as the parent lives.

    Its news stand in mirror.json; a failure is repeated with growing pauses. `once` ends with 0 when all is there.
    """
    run = rundir.Run(Path(folder))
    if locks.take(run.mirror_lock, _LOCK_WAIT_S) is None:  # kept open for life: one writer a mirror
        return 0
    once, parent, failures = "once" in words, os.getppid(), 0
    copying: Copying | None = None
    while True:
        failed = ""
        try:
            copying = copying or Copying(run, opened(target, run.folder.name, machine))
            copying.step(final=once)
            failures = 0
        except (Unusable, OSError) as error:
            failed = str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error.strerror}"
            failures += 1
            copying = None  # what it thought was there may not be
        say(run, copying, failed)
        if once or os.getppid() != parent:
            return 1 if failed else 0
        time.sleep(min(2.0**failures, _AGAIN_MAX_S) if failed or copying is None else copying.store.pause_s)


def say(run: rundir.Run, copying: Copying | None, failed: str) -> None:
    """Replace mirror.json: when it was last looked for what is new, how much was copied, and what is wrong."""
    before: dict[str, Any] = durable.load_news(run.mirror)
    whole_at = before.get("whole_at") if failed else times.now()
    news = {"at": times.now(), "whole_at": whole_at, "bytes": copying.bytes if copying else 0, "failed": failed}
    with contextlib.suppress(OSError):
        durable.save_json(run.mirror, news, synced=False)
    if failed != before.get("failed", ""):
        print(f"{times.now()} {failed or 'it goes on'}", file=sys.stderr, flush=True)  # noqa: T201 -- its log

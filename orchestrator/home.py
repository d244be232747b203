"""Brings what a machine sends into the run's folder at home: verified, synced, merged by key, and only then counted."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from jobs import durable, locks, rows, rundir
from orchestrator import outs, weights
from orchestrator.errors import HomeDiskFull, NotReachable
from orchestrator.parts import Parts

_BATCH_ROWS = 10_000


class Arrivals:
    """The one writer of a run's folder at home; holds its lock. A context manager."""

    def __init__(self, home: rundir.Home, machine: str, lock: int) -> None:
        self.home = home
        self.copy = home.machine(machine)
        self._lock = lock
        self._hashes: dict[str, tuple[int, Any]] = {}
        self._digests: dict[str, tuple[tuple[int, int, int], str]] = {}
        self._unsynced: set[Path] = set()
        self._parts = Parts(home, self.copy)
        self._view = outs.View(home, self.copy)
        self._view.mend()
        weights.mend(home, self.copy, self._parts)
        self.rows = self._reopen(home.rows, "rows.jsonl")
        self.selections = self._reopen(home.selections, "selections.jsonl")
        self.noise = self._reopen(home.noise, "noise.jsonl")

    @classmethod
    def open(cls, home: rundir.Home, machine: str) -> Arrivals | None:
        """Take the run's lock and make its folder whole; None when another process of ours follows the run."""
        lock = locks.take(home.lock)
        if lock is None:
            return None
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)  # for words only: who follows
            return cls(home, machine, lock)
        except BaseException:
            os.close(lock)
            raise

    def _reopen(self, merged: Path, name: str) -> rows.Index:
        """Cut torn tails off (this process or the disk may have died), and merge what came but was not merged yet."""
        rows.repair(merged)
        found = rows.index(merged)
        for machine in sorted((self.home.folder / "machines").glob("*")):
            for attempt in rundir.Run(machine).attempts():
                rows.repair(attempt.folder / name)
                lines = (line for _, line in rows.whole_lines(attempt.folder / name))
                while batch := list(itertools.islice(lines, _BATCH_ROWS)):
                    self._merge(merged, found, batch)
        return found

    def request(self, wait_s: float) -> dict[str, Any]:
        """What a pull is asked for: everything after what is here already, each prefix proven by its hash."""
        have, whole = {}, {}
        for attempt in self.copy.attempts():
            for name in rundir.GROWING:
                path = attempt.folder / name
                if path.exists():
                    size, digest = self._hash(path)
                    have[self._name(path)] = [size, digest.hexdigest()]
            for name in rundir.WHOLE:
                path = attempt.folder / name
                if path.exists():
                    whole[self._name(path)] = self._digest(path)
        for path in [self.copy.resolved, self.copy.examples, *self._weights()]:
            if path.exists():
                whole[self._name(path)] = self._digest(path)
        for name in outs.names(self.copy):
            path = self.copy.folder / name
            if rundir.grows(name):
                size, digest = self._hash(path)
                have[name] = [size, digest.hexdigest()]
            else:
                whole[name] = self._digest(path)
        return {"have": have, "have_whole": whole, "parts": self._parts.request(), "wait_s": wait_s}

    def durable(self) -> dict[str, Any]:
        """What is here and stays here through a power cut, in the words of a request: the machine may lose it now."""
        told = {name: part for name, part in self.request(0.0).items() if name in ("have", "have_whole")}
        for name in told["have"]:  # an earlier process of ours may have died between a write and its sync
            with durable.opened(self.copy.folder / name, os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
                durable.sync(descriptor)
        self._sync_outs()
        return told

    def _sync_outs(self) -> None:
        """Have the names of files of a command on the disk, too; their bytes are."""
        for folder in self._unsynced:
            durable.sync_folder(folder)
        self._unsynced.clear()
        self._view.sync()

    def _weights(self) -> list[Path]:
        """The files of folders of weights that are here, of unfinished ones too."""
        if not self.copy.folder.is_dir():
            return []
        folders = [path for path in self.copy.folder.iterdir() if rundir.is_of_weights(path) and path.is_dir()]
        return [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]

    def _digest(self, path: Path) -> str:
        """SHA-256 of a copy that is whole; read once, and again only when it has changed."""
        facts = path.stat()
        known, digest = self._digests.get(self._name(path), (None, ""))
        now = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if known != now:
            digest = rundir.file_sha256(path)
            self._digests[self._name(path)] = (now, digest)
        return digest

    def take(self, frame: dict[str, Any], data: bytes) -> None:
        """Put one frame on the disk. Raises NotReachable for a frame that lies, OSError when it cannot be written."""
        if "diverged" in frame:
            self._set_aside(self._path(frame["diverged"], grows=True))
        elif "whole" in frame:
            self._take_whole(self._path(frame["whole"], grows=False), frame, data)
        elif "piece" in frame:
            self._take_piece(self._path(frame["piece"], grows=False), frame, data)
        elif "file" in frame:
            self._take_growth(self._path(frame["file"], grows=True), frame, data)

    def _path(self, name: object, *, grows: bool) -> Path:
        """Where a name sent by a machine belongs; anything but the run's own files, each in its own way, is refused."""
        if not (isinstance(name, str) and rundir.may_come_home(name)) or rundir.grows(name) is not grows:
            raise NotReachable(f"The machine sent a file with the name {name!r}, which is not one of a run's.")
        below = self.copy.folder.relative_to(self.home.folder).as_posix()
        return outs.place(self.home.folder, f"{below}/{name}", self._kept)

    @property
    def _kept(self) -> Path:
        """Where copies of outs are set aside: not among the outs."""
        return self.copy.folder / ".aside"

    def _name(self, path: Path) -> str:
        return path.relative_to(self.copy.folder).as_posix()

    def _take_whole(self, path: Path, frame: dict[str, Any], data: bytes) -> None:
        _verify(frame, data)
        if path.name == "status.json" and not self._is_out(path):
            durable.replace_whole(path, data, synced=False)
        else:
            self._put_in_place(self._parts.whole(self._name(path), data), path)

    def _take_piece(self, path: Path, frame: dict[str, Any], data: bytes) -> None:
        """Add a piece to the file's hidden part; the last one makes the file appear."""
        _verify(frame, data)
        part = self._parts.add(self._name(path), frame, data)
        if part:
            self._put_in_place(part, path)

    def _put_in_place(self, part: Path, path: Path) -> None:
        """Give a file that is whole its name. An out may have other versions, the newest stays; all else has not."""
        is_out = self._is_out(path)
        if not is_out:  # written once: another content is a stranger's
            self._set_aside(path)
        part.replace(path)
        if is_out:
            self._unsynced.add(path.parent)  # there may be thousands; what a power cut takes is sent again
            self._view.replace(self._name(path))
        else:
            durable.sync_folder(path.parent)
            if path.name == rundir.MANIFEST and rundir.is_of_weights(path.parent):
                weights.settle(self.home, self.copy, path.parent, self._parts)

    def _is_out(self, path: Path) -> bool:
        return self._name(path).startswith(f"{rundir.OUT}/")

    def _take_growth(self, path: Path, frame: dict[str, Any], data: bytes) -> None:
        """Append to this machine's copy, sync, merge by key, sync: in this order a crash anywhere loses nothing."""
        _verify(frame, data)
        size, digest = self._hash(path)
        if frame["offset"] != size:
            raise NotReachable(
                f"A piece of {path.name} was sent for offset {frame['offset']}, but {size} bytes are here."
            )
        del self._hashes[self._name(path)]  # should the sync fail, the file is looked at anew
        with durable.opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW) as descriptor:
            end = durable.append(descriptor, data, size)
            durable.sync(descriptor)
        digest.update(data)
        self._hashes[self._name(path)] = (end, digest)
        if self._is_out(path):
            self._view.grow(self._name(path), size, data)
        elif path.name == "rows.jsonl":
            self._merge(self.home.rows, self.rows, data.split(b"\n")[:-1])
        elif path.name == "selections.jsonl":
            self._merge(self.home.selections, self.selections, data.split(b"\n")[:-1])
        elif path.name == "noise.jsonl":
            self._merge(self.home.noise, self.noise, data.split(b"\n")[:-1])

    def take_rows(self, lines: list[bytes]) -> bytes:
        """Merge rows that are home in another folder, of a share of this run; returns those that were news here."""
        return self._merge(self.home.rows, self.rows, lines)

    def take_selections(self, lines: list[bytes]) -> bytes:
        """The same for a re-ranker's choices."""
        return self._merge(self.home.selections, self.selections, lines)

    def take_noise(self, lines: list[bytes]) -> bytes:
        """The same for rows that were made a second time."""
        return self._merge(self.home.noise, self.noise, lines)

    def _merge(self, merged: Path, known: rows.Index, lines: list[bytes]) -> bytes:
        """Append the lines that add a key or replace an error, and return them; a key's first good row is final.

        To a run that is frozen nothing is added any more.
        """
        if self.home.frozen.exists():
            return b""
        fresh: dict[str, tuple[bool, bytes]] = {}
        for line in lines:
            try:
                key, good = rows.head(line)
            except rows.BadRow:
                continue  # stays, as it came, in the machine's copy; the worker makes the row again on resume
            if known.wants(key, good) and not (key in fresh and fresh[key][0] >= good):
                fresh[key] = (good, line + b"\n")
        data = b"".join(line for _, line in fresh.values())
        if not fresh:
            return data
        size = merged.stat().st_size if merged.exists() else 0
        with durable.opened(merged, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
            durable.append(descriptor, data, size)
            durable.sync(descriptor)
        for key, (good, _) in fresh.items():
            known.keys[key] = good
        return data

    def _hash(self, path: Path) -> tuple[int, Any]:
        """Size and running SHA-256 of a copy; read once, then kept up to date."""
        name = self._name(path)
        if name not in self._hashes:
            digest, size = hashlib.sha256(), 0
            if path.exists():
                with path.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
                        size += len(chunk)
            self._hashes[name] = (size, digest)
        return self._hashes[name]

    def _set_aside(self, path: Path) -> None:
        """Keep a copy that is not what the machine has now under another name; nothing is overwritten."""
        outs.aside(path, "diverged", self._kept if self._is_out(path) else None, first=1)
        self._hashes.pop(self._name(path), None)

    def machine_lost_its_folder(self) -> None:
        """Keep the copies of a folder that is gone under another name: what the machine makes next is another story."""
        number = 1
        while (aside := self.copy.folder.with_name(f"{self.copy.folder.name}.lost-{number}")).exists():
            number += 1
        if self.copy.folder.is_dir():
            self.copy.folder.rename(aside)
            durable.sync_folder(aside.parent)
        self._hashes.clear()
        self._digests.clear()
        self._unsynced.clear()
        self._parts = Parts(self.home, self.copy)
        self._view = outs.View(self.home, self.copy)

    def is_complete(self, seal: rundir.Seal) -> bool:
        """Whether everything the seal names is here, byte for byte, and on the disk."""
        attempt = self.copy.attempt(seal.attempt)
        for name, facts in seal.files.items():
            size, digest = self._hash(attempt.folder / name)
            if name == "log.txt" and size > facts["bytes"]:  # what was left behind may print after the seal
                if rundir.file_sha256(attempt.folder / name, facts["bytes"]) != facts["sha256"]:
                    return False
            elif (size, digest.hexdigest()) != (facts["bytes"], facts["sha256"]):
                return False
        return self._has_outs(seal)

    def _has_outs(self, seal: rundir.Seal) -> bool:
        """Whether every out the seal speaks of is here; the list itself stands in the copy of exit.json."""
        if not seal.outs_sha256:
            return True
        full = seal if seal.outs else rundir.Seal.load(self.copy.attempt(seal.attempt).exit)
        if full is None or rundir.outs_sha256(full.outs) != seal.outs_sha256:
            return False
        for name, facts in full.outs.items():
            path = self.copy.folder / name
            if path.is_symlink() or not path.is_file():
                return False
            digest = self._hash(path)[1].hexdigest() if rundir.grows(name) else self._digest(path)
            if (path.stat().st_size, digest) != (facts["bytes"], facts["sha256"]):
                return False
        self._sync_outs()
        return True

    def close(self) -> None:
        """Let another process follow the run."""
        os.close(self._lock)

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _verify(frame: dict[str, Any], data: bytes) -> None:
    if len(data) != frame.get("bytes") or hashlib.sha256(data).hexdigest() != frame.get("sha256"):
        raise NotReachable("A piece arrived damaged: its checksum is not the one that was sent with it.")


@contextlib.contextmanager
def full_disk_said(home: rundir.Home) -> Iterator[None]:
    """Turn a full disk here, wherever it strikes, into words; what was counted as home is home."""
    try:
        yield
    except OSError as error:
        if not durable.is_full(error):
            raise
        raise HomeDiskFull(
            f"No space is left on the disk that holds {home.folder}. Rows counted so far are safe there; "
            "the job goes on by itself on its machine.",
            f"Free some space, then: gpu resume {home.run_id}",
        ) from None


News = Callable[[dict[str, Any], bytes], None]
"""Told of each frame after it is safe at home."""

"""Files that come home in pieces: put together in a hidden file, verified, synced, and only then given their name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from jobs import durable, rundir, trees
from orchestrator import outs
from orchestrator.errors import NotReachable

_CHUNK_BYTES = 1 << 20


class Parts:
    """The hidden folder beside a machine's copies in which its large files are put together.

    Each has a note that says which file it is a part of, so that another process can go on after a cut.
    """

    def __init__(self, home: rundir.Home, copy: rundir.Run) -> None:
        self.folder = copy.folder / ".parts"
        self._home = home
        self._hashers: dict[str, tuple[int, Any]] = {}

    def request(self) -> dict[str, dict[str, Any]]:
        """What is here of files that are not whole yet, for the request of a pull."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            note, part = durable.load_news(path), path.with_suffix(".part")
            if note.keys() >= {"name", "digest"} and part.is_file():
                found[note["name"]] = {"digest": note["digest"], "bytes": part.stat().st_size}
        return found

    def whole(self, name: str, data: bytes) -> Path:
        """A file that came in one frame, synced: to be renamed to its place. Parts of an older version are dropped."""
        self._forget(self._note(name).with_suffix(".part"))
        path = self._place("whole.part")
        with durable.opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW) as descriptor:
            durable.write_all(descriptor, data)
            durable.sync(descriptor)
        return path

    def add(self, name: str, frame: dict[str, Any], data: bytes) -> Path | None:
        """Add a verified piece; the file once all of it is here and has its digest, to be renamed to its place.

        Raises NotReachable for a piece that does not fit, and for a whole that is not what was promised: it is dropped.
        """
        digest, total, offset = frame.get("digest"), frame.get("total"), frame.get("offset")
        if not trees.is_sha256(digest) or type(total) is not int or type(offset) is not int:
            raise NotReachable(f"The machine sent a piece of {name!r} without saying of what.")
        part = self._part(name, {"name": name, "digest": digest, "total": total}, offset)
        size = part.stat().st_size if part.exists() else 0
        if offset != size or offset + len(data) > total:
            raise NotReachable(f"A piece of {name!r} was sent for offset {offset}, but {size} bytes are here.")
        _, hasher = self._hashers.pop(name, (size, None))
        hasher = hasher or _hasher_of(part)
        with durable.opened(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW) as descriptor:
            size = durable.append(descriptor, data, size)
            durable.sync(descriptor)
        hasher.update(data)
        if size < total:
            self._hashers[name] = (size, hasher)
            return None
        if hasher.hexdigest() != digest:
            self._forget(part)
            raise NotReachable(f"{name!r} arrived damaged: its checksum is not the one that was sent with it.")
        part.with_suffix(".json").unlink()
        return part

    def _part(self, name: str, note: dict[str, Any], offset: int) -> Path:
        """The hidden file of a name, empty when the piece begins another version of it, or the same one anew."""
        path = self._note(name)
        part = path.with_suffix(".part")
        if offset == 0 or durable.load_news(path) != note:
            self._hashers.pop(name, None)
            self._forget(part)
            durable.save_json(path, note)
        return part

    def _note(self, name: str) -> Path:
        return self._place(hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest() + ".json")

    def _place(self, name: str) -> Path:
        return outs.place(self._home.folder, (self.folder / name).relative_to(self._home.folder).as_posix())

    def forget(self, start: str) -> None:
        """Drop the parts of all files whose names begin so: they are not wanted any more."""
        for name in [name for name in self.request() if name.startswith(start)]:
            self._hashers.pop(name, None)
            self._forget(self._note(name).with_suffix(".part"))

    def _forget(self, part: Path) -> None:
        part.with_suffix(".json").unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def _hasher_of(path: Path) -> Any:
    """The running SHA-256 of what a file holds; of nothing when there is none."""
    hasher = hashlib.sha256()
    if path.exists():
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
    return hasher

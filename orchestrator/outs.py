"""Files a command brought home, as its user sees them: one folder, whichever machines they came from."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from jobs import durable, rundir
from orchestrator.errors import ConfigError

_CHUNK_BYTES = 1 << 20
_NAME_MAX_BYTES = 255


def aside(path: Path, why: str, kept: Path | None = None, first: int = 0) -> None:
    """Give what is at `path` another name, which says why, beside it or in `kept`; nothing is overwritten.

    Names are numbered from `first` on, and 0 is left out.
    """
    if not os.path.lexists(path):
        return
    target = path
    if kept:
        durable.have_folder(kept)
        target = kept / path.name
    suffixes = (f".{why}" if number == 0 else f".{why}-{number}" for number in itertools.count(first))
    fresh = next(found for suffix in suffixes if not os.path.lexists(found := _with_suffix(target, suffix)))
    path.rename(fresh)
    durable.sync_folder(fresh.parent)
    durable.sync_folder(path.parent)


def _with_suffix(path: Path, suffix: str) -> Path:
    """The path with something behind its name, which is cut where it would be longer than a name may be."""
    room = _NAME_MAX_BYTES - len(suffix.encode())
    return path.with_name(path.name.encode("utf-8", "surrogateescape")[:room].decode("utf-8", "ignore") + suffix)


def place(base: Path, name: str, kept: Path | None = None) -> Path:
    """Where the file of that relative name belongs below `base`; its folders are made.

    What is no folder but should be one, and the other way round, is set aside, see `aside`. ConfigError where a link is
    in the way: nothing is ever written through one.
    """
    path = base
    *folders, last = name.split("/")
    for part in folders:
        path = path / part
        if not stat.S_ISDIR(_mode(path)):
            aside(path, "was-a-file", kept)
            durable.have_folder(path)
    path = path / last
    if stat.S_ISDIR(_mode(path)):
        aside(path, "was-a-folder", kept)
    return path


def _mode(path: Path) -> int:
    """What is at `path`, as stat(2) has it; 0 when nothing is. ConfigError when it is a link."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return 0
    if stat.S_ISLNK(mode):
        raise ConfigError(
            f"{path} is a link. Files of a run are not written through links; nothing was changed there.",
            "Move the link away, then carry on: gpu pull",
        )
    return mode


def names(copy: rundir.Run) -> Iterator[str]:
    """The names of all outs of which there is a copy from that machine, sorted within each folder."""
    root = copy.folder / rundir.OUT
    for folder, folders, files in os.walk(root) if not root.is_symlink() else ():
        folders.sort()
        for file in sorted(files):
            path = Path(folder) / file
            if not path.is_symlink():
                yield path.relative_to(copy.folder).as_posix()


def newest(home: rundir.Home) -> Iterator[tuple[str, Path]]:
    """What another machine needs to go on: every out as its user sees it, by its name on the wire."""
    machines = [rundir.Run(folder) for folder in sorted((home.folder / "machines").glob("*"))]
    for name in sorted({name for copy in machines for name in names(copy)}):
        path = home.folder / name
        if path.is_file() and not path.is_symlink():
            yield name, path


class View:
    """`results/<run_id>/out`, kept up to date with the copies from one machine. Nothing in it that grew is lost."""

    def __init__(self, home: rundir.Home, copy: rundir.Run) -> None:
        self.home = home
        self.copy = copy
        self._alike: dict[str, int] = {}
        """Of a growing out: the first so many bytes of the copy are known to be in the view."""
        self._unsynced: set[Path] = set()

    def mend(self) -> None:
        """Bring in what a crash kept from being shown: the copy was safe, the view not yet made."""
        for name in names(self.copy):
            path, shown = self.copy.folder / name, self.home.folder / name
            facts = shown.lstat() if os.path.lexists(shown) else None
            if rundir.grows(name):
                if facts is None or (stat.S_ISREG(facts.st_mode) and facts.st_size < path.stat().st_size):
                    self._extend_from(name, path, sets_aside=False)
            elif facts is None or facts.st_mtime_ns < path.stat().st_mtime_ns:
                self.replace(name)

    def grow(self, name: str, offset: int, data: bytes) -> None:
        """Show what was appended to a copy at `offset`; a view that holds something else is set aside first."""
        if self._alike.get(name) != offset or not self._extend(name, offset, data):
            self._extend_from(name, self.copy.folder / name, sets_aside=True)

    def replace(self, name: str) -> None:
        """Show the newest version of a whole file: the same file on the disk, or a copy where that cannot be."""
        path, shown = self.copy.folder / name, place(self.home.folder, name)
        if shown.exists() and shown.samefile(path):
            return
        fresh = place(self.copy.folder, ".parts/view.part")
        fresh.unlink(missing_ok=True)
        try:
            os.link(path, fresh)
        except OSError as error:
            if durable.is_full(error):
                raise
            shutil.copyfile(path, fresh)
            with durable.opened(fresh, os.O_RDWR) as descriptor:
                durable.sync(descriptor)
        fresh.replace(shown)
        self._unsynced.add(shown.parent)

    def sync(self) -> None:
        """Make the names in the view durable; until then a power cut may cost some, and `mend` brings them back."""
        for folder in self._unsynced:
            durable.sync_folder(folder)
        self._unsynced.clear()

    def _extend(self, name: str, offset: int, data: bytes) -> bool:
        """Append what the view lacks of `data`, which the copy has at `offset`; False when it has other bytes there."""
        shown = place(self.home.folder, name)
        with durable.opened(shown, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW) as descriptor:
            size = os.fstat(descriptor).st_size
            known = os.pread(descriptor, len(data), offset) if size > offset else b""
            if size < offset or not data.startswith(known):
                return False
            if len(known) < len(data):
                durable.append(descriptor, data[len(known) :], size)
                durable.sync(descriptor)
        if offset == 0:
            self._unsynced.add(shown.parent)
        self._alike[name] = offset + len(data)
        return True

    def _extend_from(self, name: str, path: Path, *, sets_aside: bool) -> None:
        """Bring the view up to date with the whole copy; one that does not begin like it is set aside, or left."""
        self._alike.pop(name, None)
        offset = 0
        with path.open("rb") as file:
            for chunk in itertools.chain([b""], iter(lambda: file.read(_CHUNK_BYTES), b"")):
                if not self._extend(name, offset, chunk):
                    if not sets_aside:
                        return
                    aside(place(self.home.folder, name), f"from-{self._author(name)}")
                    self._extend_from(name, path, sets_aside=False)
                    return
                offset += len(chunk)

    def _author(self, name: str) -> str:
        """The machine the view of a growing out came from: one whose copy begins like it, else this one."""
        shown = self.home.folder / name
        size = shown.stat().st_size
        for folder in sorted(self.copy.folder.parent.glob("*")):
            with contextlib.suppress(OSError, ValueError):
                path = folder / name
                if folder != self.copy.folder and rundir.file_sha256(path, size) == rundir.file_sha256(shown):
                    return folder.name
        return self.copy.folder.name

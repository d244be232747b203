"""A user's project as trees: the code that travels, the files a run needs by name, and what each of them holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from jobs import durable, trees
from jobs.trees import Entry, Tree
from orchestrator import config, ignore
from orchestrator.errors import ConfigError, UsageError

_TRIES = 3
_YOUNG_NS = 2 * 10**9
"""A file changed this short before it was read may change again without another time: clocks of disks tick slowly."""
_DAY_NS = 86_400 * 10**9
_KEPT_DAYS = 30
_KEPT_MAX = 200_000
_LINKS_MAX = 40
_AGAIN = "Run it again once nothing writes there."
_T = TypeVar("_T")


@dataclass(frozen=True)
class Content:
    """A tree, and where on this computer the content of each of its files lies, by SHA-256."""

    tree: Tree
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Snapshot(Content):
    """The code of a project as it travels, and what of the project does not."""

    left_out: tuple[ignore.LeftOut, ...]
    """Sorted by path."""


@dataclass(frozen=True)
class Need(Content):
    """A file or folder that was asked for by name, links followed. A file is one entry with its base name."""

    name: str
    """Its path in the project; `.` for all of it."""
    is_file: bool

    @property
    def paths(self) -> list[tuple[str, Entry]]:
        """Each of its entries with its path in the project."""
        if self.is_file:
            return [(self.name, entry) for entry in self.tree.entries]
        prefix = "" if self.name == "." else f"{self.name}/"
        return [(prefix + entry.path, entry) for entry in self.tree.entries]


class _Changing(ConfigError):
    """A file that is written to while it is read."""


def root(folder: Path) -> Path:
    """The project a folder belongs to: the nearest folder from it upwards that holds `.git`, else the folder itself."""
    folder = folder.absolute()
    return next((above for above in (folder, *folder.parents) if os.path.lexists(above / ".git")), folder)


def hashes() -> Hashes:
    """What is known of files that were read before, by this user on this computer."""
    return Hashes(config.state_folder() / "hashes.json")


class Hashes:
    """SHA-256 of files, known without reading a file again for as long as size, times and inode stay what they were."""

    def __init__(self, path: Path, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._now_ns = now_ns
        self._today = now_ns() // _DAY_NS
        self._known = durable.load_news(path)
        self._changed = False
        self.read = 0
        """Files that had to be read so far."""

    def of(self, where: str, about: os.stat_result) -> tuple[str, os.stat_result]:
        """SHA-256 of a regular file, and its facts as they were then; `about` is what they were a moment ago.

        Raises ConfigError for a file that cannot be read, or does not stay the same while it is.
        """
        known: Any = self._known.get(where)
        if _day(known) and known[:4] == _identity(about) and trees.is_sha256(known[4]):
            if known[5] != self._today:
                self._keep(where, about, known[4])
            return known[4], about
        self.read += 1
        began_ns = self._now_ns()
        sha256, about = _hashed(where)
        if began_ns - max(about.st_mtime_ns, about.st_ctime_ns) >= _YOUNG_NS:
            self._keep(where, about, sha256)
        return sha256, about

    def save(self) -> None:
        """Keep what is known for the next time, without what was not asked for in a month."""
        if self._changed:
            fresh = {where: known for where, known in self._known.items() if _day(known) >= self._today - _KEPT_DAYS}
            if len(fresh) > _KEPT_MAX:
                fresh = dict(sorted(fresh.items(), key=lambda item: _day(item[1]))[-_KEPT_MAX:])
            with contextlib.suppress(OSError):  # then files are read again the next time
                durable.replace_whole(self._path, json.dumps(fresh, separators=(",", ":")).encode())
            self._changed = False

    def _keep(self, where: str, about: os.stat_result, sha256: str) -> None:
        self._known[where] = [*_identity(about), sha256, self._today]
        self._changed = True


def _identity(about: os.stat_result) -> list[int]:
    return [about.st_size, about.st_mtime_ns, about.st_ino, about.st_ctime_ns]


def _day(known: Any) -> int:
    """The day something was last asked for; one that nobody can read was long ago."""
    return known[5] if isinstance(known, list) and len(known) == 6 and type(known[5]) is int else 0


def _hashed(where: str) -> tuple[str, os.stat_result]:
    """SHA-256 of a file that stays the same while it is read, and its facts."""
    for _ in range(_TRIES):
        with durable.opened(Path(where), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) as descriptor:
            before = os.fstat(descriptor)
            sha256 = _digest(descriptor, where)
            after = os.fstat(descriptor)
        if stat.S_ISREG(after.st_mode) and _identity(before) == _identity(after):
            return sha256, after
    raise _Changing(f"{where} changes while it is read. Nothing was started.", _AGAIN)


def _digest(descriptor: int, where: str) -> str:
    """SHA-256 of what can be read there; OSError with the name of the file."""
    try:
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # a disk that fails does not say the name
        raise OSError(error.errno, error.strerror, where) from None


def snapshot(root: Path, hashes: Hashes) -> Snapshot:
    """The code of the project in `root`: all files but those that a rule leaves out. Raises ConfigError."""

    def made() -> Snapshot:
        walked = ignore.walk(root, config.state_folder())
        entries, files = _entries(walked.files, hashes)
        left_out = sorted(walked.left_out, key=lambda left: left.path)
        return Snapshot(_tree(entries), files, tuple(left_out))

    return _settled(made, hashes)


def tree_of(path: Path, hashes: Hashes) -> Content:
    """A file or folder as it is, wherever it lies: links are followed, nothing is left out but git's own folders.

    A file is one entry with its base name. Raises ConfigError for what is missing or cannot travel.
    """
    path = path.absolute()
    if not os.path.exists(path):  # noqa: PTH110 -- one that cannot be asked for is none
        raise ConfigError(f"{path} does not exist. Nothing was started.", "Check the path.")

    def made() -> Content:
        entries, files = _entries(_followed(path), hashes)
        return Content(_tree(entries), files)

    return _settled(made, hashes)


def needed(root: Path, cwd: Path, names: Iterable[str], hashes: Hashes) -> list[Need]:
    """The files and folders that are asked for by names relative to `cwd`, in the project in `root`.

    Raises UsageError for one outside the project, ConfigError naming all that do not exist.
    """
    paths = _inside(root, cwd, names)
    if lacking := _lacking(paths):
        verb = "does" if len(lacking) == 1 else "do"
        raise ConfigError(f"{', '.join(lacking)} {verb} not exist. Nothing was started.", f"Looked for in {root}.")
    needs = []
    for name, path in paths.items():
        content = tree_of(path, hashes)
        needs.append(Need(content.tree, content.files, name, path.is_file()))
    return needs


def lacking(root: Path, cwd: Path, names: Iterable[str]) -> list[str]:
    """Those of the names, as paths in the project, where there is nothing. Raises UsageError for one outside it."""
    return _lacking(_inside(root, cwd, names))


def placed(code: Tree, needs: Iterable[Need]) -> Content:
    """All that is needed as one tree of paths in the project, to be laid over `code`.

    Where a link of the code leads to what was asked for, it is put where the link leads, for the link is there, too.
    """
    links = {entry.path: entry.link for entry in code.entries if entry.link}
    entries: dict[str, Entry] = {}
    files: dict[str, Path] = {}
    for need in needs:
        files |= need.files
        for path, entry in need.paths:
            path = _through(links, path)
            entries[path] = replace(entry, path=path)
    return Content(_tree(list(entries.values())), files)


def _through(links: Mapping[str, str], path: str) -> str:
    """Where a path leads when the folders on its way may be links; its last part is taken as it is."""
    done: list[str] = []
    left = path.split("/")[::-1]
    followed = 0
    while left:
        part = left.pop()
        if part == "..":
            del done[-1:]
        elif part not in ("", "."):
            target = links.get("/".join([*done, part])) if left and followed < _LINKS_MAX else None
            followed += target is not None
            if target is None:
                done.append(part)
            else:
                left += target.split("/")[::-1]
    return "/".join(done)


def _inside(root: Path, cwd: Path, names: Iterable[str]) -> dict[str, Path]:
    """Where each name leads, by its path in the project; UsageError for one that leads out of it."""
    paths = {}
    for name in names:
        if not name:
            raise UsageError("A needed file with an empty name. Nothing was started.", "Name it, or leave it out.")
        path = Path(os.path.normpath(cwd / name))
        if not path.is_relative_to(root):
            raise UsageError(
                f"{name} lies outside the project {root}. Nothing was started.",
                f"Copy or link it into the project, for example: ln -s {path} {root / path.name}",
            )
        relative = path.relative_to(root).as_posix()
        if relative != "." and not trees.is_safe_path(relative):
            raise UsageError(f"{name!r} is a name that cannot travel. Nothing was started.", "Rename it.")
        paths[relative] = path
    return paths


def _lacking(paths: Mapping[str, Path]) -> list[str]:
    return [name for name, path in paths.items() if not os.path.exists(path)]  # noqa: PTH110 -- see tree_of


def _settled(make: Callable[[], _T], hashes: Hashes) -> _T:
    """What is made of files that may come and go meanwhile; ConfigError when they do so again and again."""
    gone = ""
    for _ in range(_TRIES):
        try:
            made = make()
        except FileNotFoundError as error:
            gone = _name(error)
        except OSError as error:
            raise ConfigError(
                f"{_name(error)} cannot be read: {error.strerror}. Nothing was started.",
                "Let it be read, or leave it out of the project by a line in .gpuignore.",
            ) from None
        else:
            hashes.save()
            return made
    raise _Changing(f"{gone} disappeared while it was read. Nothing was started.", _AGAIN)


def _name(error: OSError) -> str:
    """The file or folder that an error is about."""
    return os.fsdecode(error.filename or "a file").rstrip("/")


def _tree(entries: list[Entry]) -> Tree:
    """The tree of these entries, whose names are known to be safe."""
    return Tree(tuple(sorted(entries, key=lambda entry: entry.path)))


def _entries(found: Iterable[ignore.Found], hashes: Hashes) -> tuple[list[Entry], dict[str, Path]]:
    """What was found as entries of a tree, and where each content lies."""
    entries, files = [], {}
    for file in found:
        if file.link:
            entries.append(Entry(file.path, 0, "", link=file.link))
            continue
        sha256, about = hashes.of(file.where, file.stat)
        files[sha256] = Path(file.where)
        entries.append(Entry(file.path, about.st_size, sha256, bool(about.st_mode & stat.S_IXUSR)))
    return entries, files


def _followed(path: Path) -> Iterator[ignore.Found]:
    """Every file at or below a path, with the facts of what its links lead to; ConfigError for what is no file."""
    about = path.stat()
    if not stat.S_ISDIR(about.st_mode):
        yield _checked(path.name, str(path), about)
        return
    pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [("", str(path), (_place(about),))]
    while pending:
        prefix, folder, above = pending.pop()
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if entry.name != ".git"]
        for entry in entries:
            about = _about(entry)
            if not stat.S_ISDIR(about.st_mode):
                yield _checked(prefix + entry.name, entry.path, about)
            elif _place(about) in above:
                raise ConfigError(
                    f"{entry.path} is a link to a folder that it lies in itself. Nothing was started.",
                    "Remove the link, or name files instead of the folder.",
                )
            else:
                pending.append((f"{prefix}{entry.name}/", entry.path, (*above, _place(about))))


def _place(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def _about(entry: os.DirEntry[str]) -> os.stat_result:
    """What an entry is, links followed."""
    try:
        return entry.stat()
    except FileNotFoundError:
        if not entry.is_symlink():
            raise
        raise ConfigError(
            f"{entry.path} is a link to something that does not exist. Nothing was started.", "Remove or mend it."
        ) from None


def _checked(path: str, where: str, about: os.stat_result) -> ignore.Found:
    """A file that travels; ConfigError when it is none, or has a name that cannot."""
    for wrong, why in ((not stat.S_ISREG(about.st_mode), ignore.SPECIAL), (not trees.is_safe_path(path), ignore.NAME)):
        if wrong:
            raise ConfigError(f"{where!a} cannot travel {why}. Nothing was started.", "Remove or rename it.")
    return ignore.Found(path, where, about)

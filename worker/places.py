"""Where pushed trees are put to use: a run's own work folder, read-only views, and projects brought up to date."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from jobs import durable, locks, rundir, spec, trees
from jobs.trees import Entry, Tree
from worker import store as stores
from worker.store import Frame, Refusal, Store

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_IN_THE_WAY = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM)
"""What making a file says where something else stands."""
Put = Callable[[Entry, int, str], None]


class Below:
    """Folders below `root`, each opened by its own name, so that no link on the way leads a writer elsewhere."""

    def __init__(self, root: Path) -> None:
        self._names: list[str] = []
        self._open = [os.open(root, _FOLDER)]

    def close(self) -> None:
        """Let go of every folder."""
        while self._open:
            os.close(self._open.pop())

    def holder(self, path: str, *, make: bool = False) -> int:
        """The open folder that holds `path`, until the next call; OSError when a file or a link is in its place."""
        names = path.split("/")[:-1]
        same = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(names, self._names, strict=False))
        )
        while len(self._names) > same:
            self._names.pop()
            os.close(self._open.pop())
        for name in names[same:]:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=self._open[-1])
            self._open.append(os.open(name, _FOLDER, dir_fd=self._open[-1]))
            self._names.append(name)
        return self._open[-1]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


@contextlib.contextmanager
def _below(root: Path) -> Iterator[Below]:
    with contextlib.closing(Below(root)) as below:
        yield below


def _fill(root: Path, tree: Tree, put: Put) -> None:
    """Make a new folder and put every entry of a tree at its path in it."""
    root.mkdir(mode=0o700)
    with _below(root) as below:
        for entry in tree.entries:
            put(entry, below.holder(entry.path, make=True), _name(entry.path))


def _put(store: Store) -> Put:
    """How an entry's own file, or link, is made in an open folder; Damaged when the blob is not what was verified."""

    def put(entry: Entry, folder: int, name: str) -> None:
        if entry.link:
            os.symlink(entry.link, name, dir_fd=folder)
            return
        target = os.open(name, stores.NEW_FILE, 0o755 if entry.executable else 0o644, dir_fd=folder)
        try:
            store.read(entry, target)
        finally:
            os.close(target)

    return put


def _link(store: Store) -> Put:
    """How a hard link to a checked blob is made; where there can be no more links, a sealed copy."""

    def link(entry: Entry, folder: int, name: str) -> None:
        if not entry.link:
            store.read(entry)
            with contextlib.suppress(OSError):
                os.link(store.blob(entry.sha256), name, dst_dir_fd=folder)
                return
        _put(store)(entry, folder, name)
        if not entry.link:
            os.utime(name, ns=(stores.SEALED_NS, stores.SEALED_NS), dir_fd=folder)

    return link


def _own_folder(parent: Path, name: str) -> Path:
    """The folder of a run or a project, made when it is not there; Refusal when it would lie elsewhere."""
    if not rundir.is_safe_name(name):
        raise Refusal("refused", why=f"{name!r} is no name for a folder here")
    folder = parent / name
    durable.have_folder(folder)
    if folder.is_symlink():
        raise Refusal("in_the_way", path=str(folder))
    return folder


def stage(store: Store, source: BinaryIO) -> Frame:
    """Have the work folder of a run: copies of its code and of the trees it needs. One that is there stays as it is."""
    request = stores.request_of(source)
    run = _own_folder(store.root / "runs", stores.field(request, "run_id", str))
    work = run / "work"
    with locks.held(run / ".writing", stores.LOCK_WAIT_S):
        if made := not os.path.lexists(work):
            tree = _composed(store, request)
            with store.scratch(run) as scratch:
                _fill(scratch / "work", tree, _put(store))
                stores.sync_disk(run)
                (scratch / "work").rename(work)
                durable.sync_folder(run)
    return {"work": str(work), "made": made}


def _composed(store: Store, request: Frame) -> Tree:
    """The code of a run with all it needs in it, as one tree: what comes later goes over what is there."""
    code = None if request.get("code") is None else stores.digest_in(request, "code")
    entries = {} if code is None else {entry.path: entry for entry in store.tree(code).entries}
    for need in stores.field(request, "needs", list):
        if not isinstance(need, dict):
            raise Refusal("refused", why="a need that is no object")
        tree, path = store.tree(stores.digest_in(need, "digest")), stores.field(need, "path", str)
        if need.get("file"):
            if len(tree.entries) != 1:
                raise Refusal("refused", why=f"{path!r} is to be one file, and its tree holds {len(tree.entries)}")
            entries[path] = replace(tree.entries[0], path=path)
            continue
        prefix = "" if path == "." else f"{path}/"
        entries |= {prefix + entry.path: replace(entry, path=prefix + entry.path) for entry in tree.entries}
    return stores.checked(_document(entries.values()))


def _document(entries: Iterable[Entry]) -> Frame:
    return {"entries": [dict(entry.__dict__) for entry in sorted(entries, key=lambda entry: entry.path)]}


def view(store: Store, source: BinaryIO) -> Frame:
    """Have a folder of hard links to a tree's blobs, to be read only; one in which somebody wrote is made anew."""
    digest = stores.digest_in(stores.request_of(source), "digest")
    tree, folder = store.tree(digest), store.views / digest
    with locks.held(store.views / ".writing", stores.LOCK_WAIT_S):
        if not _is_view(folder, tree):
            with store.scratch(store.views) as scratch:
                _fill(scratch / "new", tree, _link(store))
                if os.path.lexists(folder):
                    folder.rename(scratch / "old")
                (scratch / "new").rename(folder)
    return {"path": str(folder)}


def _is_view(folder: Path, tree: Tree) -> bool:
    """Whether each entry is there, as it was verified."""
    try:
        with _below(folder) as below:
            return all(_is_entry(entry, below.holder(entry.path)) for entry in tree.entries)
    except OSError:
        return False


def _is_entry(entry: Entry, folder: int) -> bool:
    name = _name(entry.path)
    if entry.link:
        return os.readlink(name, dir_fd=folder) == entry.link
    return stores.is_sealed(os.stat(name, dir_fd=folder, follow_symlinks=False), entry.size)


def project(store: Store, source: BinaryIO) -> Frame:
    """Bring the tree of a project up to date: what differs from the last one is put there or removed, nothing else."""
    request = stores.request_of(source)
    folder = _own_folder(store.root / "projects", stores.field(request, "name", str))
    digest = stores.digest_in(request, "digest")
    with locks.held(folder / ".writing", stores.LOCK_WAIT_S):
        return _Update(store, folder, digest).do()


class _Update:
    """One update of a project's folder.

    `tree.json` names what in it is ours: `entries` as they were put there, and, from before the first change of an
    update until all are on the disk, `paths` that may be ours too. Files by other names were never ours.
    """

    def __init__(self, store: Store, folder: Path, digest: str) -> None:
        self.store = store
        self.folder = folder
        self.root = folder / "tree"
        self.record = folder / "tree.json"
        before, paths = _recorded(self.record)
        self.tree = before if before.digest() == digest else store.tree(digest)
        known = {entry.path: entry for entry in before.entries}
        self.stays = [
            entry for entry in self.tree.entries if known.get(entry.path) == entry and self._is_there(entry.path)
        ]
        staying = {entry.path for entry in self.stays}
        self.changed = [entry for entry in self.tree.entries if entry.path not in staying]
        self.gone = (known.keys() | paths) - {entry.path for entry in self.tree.entries}
        self.ours = known.keys() | paths | {entry.path for entry in self.changed if not self._is_there(entry.path)}

    def _is_there(self, path: str) -> bool:
        return os.path.lexists(f"{self.root}/{path}")

    def do(self) -> Frame:
        """Make the changes; one that was killed is done again, whatever is asked for next."""
        deleted = 0
        if self.changed or self.gone or self.root.is_symlink() or not self.root.is_dir():
            self._save(self.stays, sorted(self.ours))
            durable.have_folder(self.root)
            try:
                deleted = self._delete()
                self._write()
            except OSError as error:
                if error.errno not in _IN_THE_WAY:
                    raise
                raise Refusal("in_the_way", path=str(error.filename), project=str(self.root)) from None
            stores.sync_disk(self.folder)
            self._save(self.tree.entries, [])
        return {"path": str(self.root), "changed": len(self.changed), "deleted": deleted}

    def _save(self, entries: Iterable[Entry], paths: list[str]) -> None:
        durable.replace_whole(self.record, spec.canonical({**_document(entries), "paths": paths}))

    def _delete(self) -> int:
        """Remove the files that are gone, then the folders on their way that are empty now; how many files."""
        deleted = 0
        with _below(self.root) as below:
            for path in sorted(self.gone):
                with _passing_over():
                    os.unlink(_name(path), dir_fd=below.holder(path))
                    deleted += 1
            for path in sorted(_folders(self.gone) - _folders(entry.path for entry in self.tree.entries), reverse=True):
                with _passing_over():
                    os.rmdir(_name(path), dir_fd=below.holder(path))
        return deleted

    def _write(self) -> None:
        """Put what is new in its place, each file whole; OSError where something else stands."""
        put = _put(self.store)
        with (
            self.store.scratch(self.folder) as scratch,
            durable.opened(scratch, _FOLDER) as own,
            _below(self.root) as below,
        ):
            for entry in self.changed:
                put(entry, own, "new")
                try:
                    holder = below.holder(entry.path, make=True)
                    os.replace("new", _name(entry.path), src_dir_fd=own, dst_dir_fd=holder)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, entry.path) from None


def _recorded(record: Path) -> tuple[Tree, set[str]]:
    """What an earlier update left in a project: entries, and paths that may be ours; nothing when that is damaged."""
    known = durable.load_news(record)
    try:
        tree = Tree.of(known)
    except trees.BadTree:
        return Tree(()), set()
    paths: Any = known.get("paths")
    found = paths if isinstance(paths, list) else []
    return tree, {path for path in found if isinstance(path, str) and trees.is_safe_path(path)}


def _folders(paths: Iterable[str]) -> set[str]:
    """Every folder on the way to these paths."""
    return {path[:cut] for path in paths for cut, sign in enumerate(path) if sign == "/"}


@contextlib.contextmanager
def _passing_over() -> Iterator[None]:
    """Leave alone what is not there, or where something that is not ours stands now."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*_IN_THE_WAY, errno.ENOENT):
            raise


VERBS = {"stage": stage, "view": view, "project": project}

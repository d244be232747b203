"""Pushed files on this machine: blobs by SHA-256, each verified before it has its name, and the trees made of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from jobs import durable, locks, spec, trees
from jobs.trees import Entry, Tree

FRAME_MAX_BYTES = 64 << 20
"""Largest file that comes in a frame of `take`; larger ones grow in `incoming` and are adopted."""
TRUSTED_FROM_BYTES = 64 << 20
"""Blobs from this size on are not read again when they are used, as long as they bear the seal; smaller ones are."""
SEALED_NS = 10**18
"""The seal: the time of last change that every verified blob is given. Whoever writes into it breaks the seal."""
_LINE_MAX_BYTES = 4096
_CHUNK_BYTES = 1 << 20
_BATCH_BYTES = 256 << 20
_BATCH_FILES = 20_000
_PARTS_MAX = 200
"""Names in a path: each folder on the way is held open while a file is written."""
_LINK_MAX_BYTES = 4000
LOCK_WAIT_S = 600.0
"""For another process that writes in the same place; a tree of a hundred gigabytes takes minutes."""
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""How a file is opened that must not be there yet, not even as a link."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_FICLONE = 0x40049409  # linux/fs.h: share the bytes until one of the two files is written to
Frame = dict[str, Any]
_T = TypeVar("_T")


class Refusal(Exception):
    """A request that is not granted; `answer` says why, for the laptop."""

    def __init__(self, error: str, **facts: Any) -> None:
        super().__init__(error)
        self.answer = {"error": error, **facts}


class Damaged(Exception):
    """A blob is not there any more, or no longer what was verified."""

    def __init__(self, sha256: str, inode: int | None) -> None:
        super().__init__(sha256)
        self.sha256 = sha256
        self.inode = inode


class Store:
    """The folder `store` below a machine's root. A manifest in `trees` means: each of its blobs is there, verified."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "store"
        self.blobs = self.folder / "blobs"  # <first 2 hex>/<sha256>, each appears whole, verified and on the disk
        self.trees = self.folder / "trees"  # <digest>.json, written last
        self.incoming = self.folder / "incoming"  # <sha256>: what has come of a big file so far
        self.views = self.folder / "views"  # <digest>/: hard links to blobs
        for folder in (self.blobs, self.trees, self.incoming, self.views):
            durable.have_folder(folder)

    def blob(self, sha256: str) -> Path:
        """Where the content of that name lies."""
        return self.blobs / sha256[:2] / sha256

    def manifest(self, digest: str) -> Path:
        """Where the tree of that name is written down."""
        return self.trees / f"{digest}.json"

    def tree(self, digest: str) -> Tree:
        """The tree of that name; Refusal when it was never kept, or its manifest is damaged, which is then removed."""
        with contextlib.suppress(ValueError):
            found = Tree.of(durable.load_json(self.manifest(digest)))
            if found.digest() == digest:
                return found
        self.manifest(digest).unlink(missing_ok=True)
        raise Refusal("absent", digest=digest)

    def lacking(self, tree: Tree) -> list[str]:
        """The blobs of a tree that are not there, or not of the right size, each once."""
        files = {entry.sha256: entry.size for entry in tree.entries if not entry.link}
        return [sha256 for sha256, size in files.items() if size_of(self.blob(sha256)) != size]

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which manifests come and blobs go."""
        return locks.held(self.folder / ".writing", LOCK_WAIT_S)

    @contextlib.contextmanager
    def scratch(self, beside: Path) -> Iterator[Path]:
        """A folder of the caller's own in `beside`, gone at the end; those that dead callers left go first."""
        with self.writing():
            for left in beside.glob(".new-*"):
                _remove_if_dead(left)
            folder = Path(tempfile.mkdtemp(prefix=".new-", dir=beside))
            lock = locks.take(folder / ".lock")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)

    def add(self, arrived: list[tuple[Path, str]]) -> None:
        """Let verified, sealed files appear as blobs: all are on the disk before the first has its name."""
        if not arrived:
            return
        sync_disk(self.folder)
        for path, sha256 in arrived:
            self.blob(sha256).parent.mkdir(mode=0o700, exist_ok=True)
            path.replace(self.blob(sha256))
        sync_disk(self.folder)

    def discard(self, damage: Damaged) -> None:
        """Forget a blob that was found damaged, and every tree with it, before the blob itself; a new one stays."""
        with self.writing():
            for manifest in self.trees.glob("*.json"):
                if damage.sha256.encode() in manifest.read_bytes():
                    shutil.rmtree(self.views / manifest.stem, ignore_errors=True)
                    manifest.unlink(missing_ok=True)
            durable.sync_folder(self.trees)
            with contextlib.suppress(FileNotFoundError):
                if self.blob(damage.sha256).lstat().st_ino == damage.inode:
                    self.blob(damage.sha256).unlink()

    def read(self, entry: Entry, target: int | None = None) -> None:
        """Check the blob of an entry, and copy it to `target` on the way; Damaged when it is not what was verified."""
        try:
            with durable.opened(self.blob(entry.sha256), _READ) as source:
                facts = os.fstat(source)
                if entry.size >= TRUSTED_FROM_BYTES and is_sealed(facts, entry.size):
                    if target is not None and _clone(source, target) != entry.size:
                        raise Damaged(entry.sha256, facts.st_ino)
                elif pour(source, target) != (entry.size, entry.sha256):
                    raise Damaged(entry.sha256, facts.st_ino)
                elif SEALED_NS != facts.st_mtime_ns == os.fstat(source).st_mtime_ns:
                    seal(source)
        except FileNotFoundError:
            raise Damaged(entry.sha256, None) from None


def size_of(path: Path) -> int | None:
    """Bytes of a regular file; None when there is none."""
    with contextlib.suppress(FileNotFoundError):
        facts = os.lstat(path)
        return facts.st_size if stat.S_ISREG(facts.st_mode) else None
    return None


def is_sealed(facts: os.stat_result, size: int) -> bool:
    """Whether a file has this size and nobody has written into it since it was verified."""
    return stat.S_ISREG(facts.st_mode) and facts.st_size == size and facts.st_mtime_ns == SEALED_NS


def seal(descriptor: int) -> None:
    """Mark a file as verified: no longer writable, and with a time of last change that a write would move."""
    os.fchmod(descriptor, 0o400)
    os.utime(descriptor, ns=(SEALED_NS, SEALED_NS))


def pour(source: int, target: int | None = None) -> tuple[int, str]:
    """Size and SHA-256, in hex, of the rest of a file, copied to `target` on the way."""
    digest, size = hashlib.sha256(), 0
    while chunk := os.read(source, _CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        if target is not None:
            durable.write_all(target, chunk)
    return size, digest.hexdigest()


def _clone(source: int, target: int) -> int:
    """Copy a file: sharing its bytes where the file system can, else within the kernel, else by hand. The new size."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return os.fstat(target).st_size
    if sys.platform == "linux":
        try:
            while os.copy_file_range(source, target, 1 << 30):
                pass
        except OSError as error:
            if durable.is_full(error):
                raise
    pour(source, target)  # both stand where the kernel stopped
    return os.fstat(target).st_size


def sync_disk(folder: Path) -> None:
    """Return once all that was written to the folder's disk is on it: one call for thousands of files.

    Where there is no syncfs (not Linux) it may return early; what a power cut then spoils is found when it is used.
    """
    import ctypes

    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    with durable.opened(folder, os.O_RDONLY) as descriptor:
        if syncfs is None:
            os.sync()
        elif syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


def _remove_if_dead(scratch: Path) -> None:
    """Remove a scratch folder whose owner is dead: nobody holds its lock."""
    if scratch.is_symlink():
        return
    with contextlib.suppress(OSError):
        lock = locks.take(scratch / ".lock")
        if lock is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def have(store: Store, source: BinaryIO) -> Frame:
    """Which of these trees are kept."""
    digests = field(request_of(source), "digests", list)
    return {"have": [each for each in digests if trees.is_sha256(each) and store.manifest(each).exists()]}


def missing(store: Store, source: BinaryIO) -> Frame:
    """The blobs that these trees still need, each once."""
    asked = [checked(document) for document in field(request_of(source), "trees", list)]
    return {"missing": list(dict.fromkeys(sha256 for tree in asked for sha256 in store.lacking(tree)))}


def take(store: Store, source: BinaryIO) -> Frame:
    """Take blobs: frames of a JSON line `{sha256, bytes}` and that many bytes. What came whole before a fault stays."""
    taken = held = 0
    arrived: list[tuple[Path, str]] = []
    with store.scratch(store.incoming) as scratch:
        try:
            while header := _header(source):
                path = scratch / str(taken)
                _receive(source, header, path)
                arrived.append((path, header["sha256"]))
                taken, held = taken + 1, held + header["bytes"]
                if held >= _BATCH_BYTES or len(arrived) >= _BATCH_FILES:
                    store.add(arrived)
                    arrived, held = [], 0
        except Refusal:
            store.add(arrived)
            raise
        store.add(arrived)
    return {"taken": taken}


def _header(source: BinaryIO) -> Frame | None:
    """The next frame's header, checked; None at the end."""
    line = source.readline(_LINE_MAX_BYTES)
    if not line:
        return None
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not trees.is_sha256(header.get("sha256")):
        raise Refusal("torn", sha256="")
    if type(header.get("bytes")) is not int or not 0 <= header["bytes"] <= FRAME_MAX_BYTES:
        raise Refusal("refused", sha256=header["sha256"], why=f"a frame has 0 to {FRAME_MAX_BYTES} bytes")
    return header


def _receive(source: BinaryIO, header: Frame, path: Path) -> None:
    """Write a frame's bytes to a new sealed file; Refusal when they are cut off, or not what they are called."""
    digest, left = hashlib.sha256(), header["bytes"]
    with durable.opened(path, NEW_FILE) as target:
        while left:
            chunk = source.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise Refusal("torn", sha256=header["sha256"])
            digest.update(chunk)
            durable.write_all(target, chunk)
            left -= len(chunk)
        if digest.hexdigest() != header["sha256"]:
            raise Refusal("damaged", sha256=header["sha256"])
        seal(target)


def adopt(store: Store, source: BinaryIO) -> Frame:
    """Make a blob of a file that has grown in `incoming`; else say why not, and how many `bytes` of it are there."""
    request = request_of(source)
    sha256, size = digest_in(request, "sha256"), field(request, "bytes", int)
    path, is_kept = store.incoming / sha256, size_of(store.blob(sha256)) == size
    present = size_of(path)
    if request.get("look"):
        return {"bytes": size if is_kept else present or 0}
    if is_kept or (present == size and _adopt(path, store.blob(sha256))):
        path.unlink(missing_ok=True)
        return {"adopted": True}
    if present is not None and present >= size:  # it can never become what it is called
        path.unlink(missing_ok=True)
    why = "absent" if present is None else "hash" if present == size else "size"
    return {"adopted": False, "why": why, "bytes": size_of(path) or 0}


def _adopt(path: Path, blob: Path) -> bool:
    """Rename a file that has come whole once it is verified and on the disk; False when it is not what it is called."""
    with contextlib.suppress(FileNotFoundError):  # another adopts it meanwhile
        with durable.opened(path, _READ) as descriptor:
            facts = os.fstat(descriptor)
            if pour(descriptor)[1] != path.name:
                return False
            durable.sync(descriptor)
            durable.have_folder(blob.parent)
            now = path.lstat()
            if (now.st_ino, now.st_mtime_ns) != (facts.st_ino, facts.st_mtime_ns):  # another sender is still at it
                raise Refusal("busy", folder=str(path.parent))
            path.replace(blob)
            seal(descriptor)  # not before: what is sealed can no longer grow, should we be killed in between
        durable.sync_folder(blob.parent)
    return blob.exists()


def keep(store: Store, source: BinaryIO) -> Frame:
    """Write a tree down once all its blobs are there; else say which are not."""
    tree = checked(field(request_of(source), "tree", dict))
    manifest = store.manifest(tree.digest())
    with store.writing():
        if lacking := store.lacking(tree):
            manifest.unlink(missing_ok=True)
            return {"missing": lacking}
        durable.replace_whole(manifest, spec.canonical(tree.document()))
    return {"kept": manifest.stem}


def checked(document: Any) -> Tree:
    """The tree in a document of the laptop's; Refusal when it is none, or could not be made on a disk."""
    try:
        tree = Tree.of(document)
    except trees.BadTree as error:
        raise Refusal("refused", why=str(error)) from None
    for entry in tree.entries:
        if entry.path.count("/") >= _PARTS_MAX or len(str(entry.link).encode()) > _LINK_MAX_BYTES:
            raise Refusal("refused", why="a tree with a path or a link that is too long")
    return tree


def request_of(source: BinaryIO) -> Frame:
    """The JSON object that is all of a request."""
    with contextlib.suppress(ValueError, RecursionError):
        request = json.load(source)
        if isinstance(request, dict):
            return request
    raise Refusal("refused", why="the request is no JSON object")


def field(request: Frame, name: str, kind: type[_T]) -> _T:
    """A field of a request, of this type."""
    value = request.get(name)
    if type(value) is not kind:
        raise Refusal("refused", why=f"{name!r} is missing or of a wrong type")
    return value


def digest_in(request: Frame, name: str) -> str:
    """A field of a request that is a SHA-256."""
    if not trees.is_sha256(request.get(name)):
        raise Refusal("refused", why=f"{name!r} is no SHA-256")
    return str(request[name])


def answer(verb: str, root: Path, source: BinaryIO) -> Frame:
    """Do what a verb says, and say what came of it; a damaged blob is forgotten, so that it is sent again."""
    from worker import places

    verbs = {"have": have, "missing": missing, "take": take, "adopt": adopt, "keep": keep, **places.VERBS}
    try:
        store = Store(root)
        try:
            return verbs[verb](store, source)
        except Damaged as damage:
            store.discard(damage)
            return {"error": "damaged", "sha256": damage.sha256}
    except Refusal as refusal:
        return refusal.answer
    except TimeoutError:
        return {"error": "busy", "folder": str(root)}
    except OSError as error:
        if not durable.is_full(error):
            raise
        return {"error": "disk_full", "folder": str(root)}


def main(verb: str, words: list[str]) -> int:
    """Run one command on the root in the first word; the answer is a JSON line on standard output."""
    sys.stdout.buffer.write(json.dumps(answer(verb, Path(words[0]), sys.stdin.buffer)).encode() + b"\n")
    return 0

"""What tests of pushed files share: trees from words, real agent processes, and a death or a full disk at each step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from jobs.trees import Entry, Tree
from worker import store

MAIN = Path(store.__file__).parent / "__main__.py"
EFFECTS = ("open", "write", "mkdir", "rename", "replace", "link", "symlink", "unlink", "rmdir", "fchmod", "utime")
SYNCS = ("fsync", "fdatasync")
Files = Mapping[str, bytes | str]
"""Path → content of a file, or as text the target of a link. A file of which the name ends in `.sh` is executable."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree_of(files: Files) -> Tree:
    return Tree.from_entries(
        Entry(path, 0, "", link=data)
        if isinstance(data, str)
        else Entry(path, len(data), sha256(data), path.endswith(".sh"))
        for path, data in files.items()
    )


def framed(*contents: bytes) -> bytes:
    """What a sender of these blobs writes."""
    return b"".join(
        json.dumps({"sha256": sha256(data), "bytes": len(data)}).encode() + b"\n" + data for data in contents
    )


def words(verb: str, root: Path) -> list[str]:
    return [sys.executable, "-I", "-X", "utf8", str(MAIN), verb, str(root)]


def ask(root: Path, verb: str, request: Any) -> dict[str, Any]:
    """The answer of a real agent process; a request of bytes is sent as it is."""
    data = request if isinstance(request, bytes) else json.dumps(request).encode()
    done = subprocess.run(words(verb, root), input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return dict(json.loads(done.stdout))


def answer(root: Path, verb: str, request: Any) -> dict[str, Any]:
    """The same in this process."""
    data = request if isinstance(request, bytes) else json.dumps(request).encode()
    return store.answer(verb, root, io.BytesIO(data))


def push(root: Path, files: Files) -> str:
    """Have a tree kept; returns its digest."""
    tree = tree_of(files)
    with unsynced():
        assert "taken" in answer(root, "take", framed(*(data for data in files.values() if isinstance(data, bytes))))
        assert answer(root, "keep", {"tree": tree.document()}) == {"kept": tree.digest()}
    return tree.digest()


def found(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, as `Files`; links are not followed."""
    files: dict[str, bytes | str] = {}
    for top, folders, names in os.walk(folder):
        for path in (Path(top, name) for name in [*folders, *names]):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                files[name] = os.readlink(path)  # noqa: PTH115 -- pathlib would tidy it up
            elif path.is_file():
                files[name] = path.read_bytes()
    return files


def assert_sound(root: Path) -> None:
    """Each blob is what its name says, each tree has all its blobs, and what appears whole is whole."""
    stored = store.Store(root)
    for blob in stored.blobs.glob("*/*"):
        assert sha256(blob.read_bytes()) == blob.name
    for manifest in stored.trees.glob("*.json"):
        assert stored.lacking(stored.tree(manifest.stem)) == []
    for view in stored.views.iterdir():
        if not view.name.startswith("."):
            content = {path: data if isinstance(data, str) else sha256(data) for path, data in found(view).items()}
            assert content == {entry.path: entry.link or entry.sha256 for entry in stored.tree(view.name).entries}


def assert_no_scratch(root: Path) -> None:
    """No scratch folder holds more than its lock."""
    assert [path for path in root.rglob(".new-*/*") if path.name != ".lock"] == []


@contextlib.contextmanager
def at_effect(n: int, fault: Callable[[str, tuple[Any, ...]], None]) -> Iterator[list[str]]:
    """Call `fault` before the n-th change of the disk inside the block; the changes so far are in the list given."""
    seen: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def change(*words: Any, **more: Any) -> Any:
            if name == "open" and not words[1] & os.O_CREAT:
                return real(*words, **more)
            seen.append(name)
            if len(seen) == n:
                fault(name, words)
            return None if name in SYNCS else real(*words, **more)  # a death does not lose what the kernel has

        return change

    with contextlib.ExitStack() as patches:
        for name in (*EFFECTS, *SYNCS):
            patches.enter_context(mock.patch.object(os, name, counted(name)))
        patches.enter_context(mock.patch.object(store, "sync_disk", _sync_disk))
        yield seen


def unsynced() -> contextlib.AbstractContextManager[list[str]]:
    """Leave out every sync inside the block, which is what takes time; the list given says what was done."""
    return at_effect(0, disk_full)


def _sync_disk(folder: Path) -> None:
    os.fsync(-1)  # counted, not done


def die(name: str, words: tuple[Any, ...]) -> None:
    """SIGKILL for this process; in the midst of a write, half of it is done."""
    if name == "write":
        os.lseek(words[0], 0, os.SEEK_CUR)
        with contextlib.suppress(OSError):
            os.pwrite(words[0], bytes(words[1])[: len(words[1]) // 2], os.lseek(words[0], 0, os.SEEK_CUR))
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(name: str, words: tuple[Any, ...]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed_at(n: int, do: Callable[[], object]) -> bool:
    """Do it in a process that is killed before its n-th change of the disk; whether it came to that."""
    child = os.fork()
    if child == 0:
        with at_effect(n, die), contextlib.suppress(BaseException):
            do()
            os._exit(0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def every_death(do: Callable[[], object]) -> Iterator[int]:
    """Do it with a death before the 1st, 2nd, ... change of the disk; stops after each, until it needs no more."""
    for n in itertools.count(1):
        if not killed_at(n, do):
            assert n > 3
            return
        yield n

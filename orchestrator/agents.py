"""Snapshots of the machine side's code by content: a run keeps the one it began with, whatever is upgraded later."""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
from pathlib import Path

from jobs import durable, locks
from orchestrator.errors import ConfigError

_SUFFIXES = (".py", ".toml", ".txt", ".jsonl")
_PACKAGES = ("jobs", "worker")
INSTALLED = Path(__file__).resolve().parent.parent
"""The folder that holds this package and the two it sends. A user's own `worker` on the import path is not ours."""
_LOCK_WAIT_S = 60.0


def sources() -> dict[str, bytes]:
    """Every file of our own `jobs` and `worker`, by its path: those beside this package, whatever else there is."""
    return {f"{package}/{name}": data for package in _PACKAGES for name, data in _files(INSTALLED / package).items()}


def digest(files: dict[str, bytes]) -> str:
    """What names a snapshot: 16 hex digits of the SHA-256 over names and contents."""
    total = hashlib.sha256()
    for name, data in sorted(files.items()):
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()[:16]


def keep(store: Path) -> str:
    """Put the installed code into `store/<digest>/` unless it is there, and return the digest."""
    files = sources()
    name = digest(files)
    write(files, store / name)
    return name


def kept(store: Path, name: str) -> dict[str, bytes]:
    """The files of the snapshot that a run began with; ConfigError when it is gone or damaged."""
    files = _files(store / name)
    if digest(files) != name:
        raise ConfigError(
            f"The worker code {name} that this run began with is not in {store} any more, or damaged.",
            "Carry on with today's code instead: gpu resume RUN --new-code",
        )
    return files


def unpacker() -> str:
    """The program that a machine with nothing of ours is given to run, as text: see worker/unpack.py."""
    return (INSTALLED / "worker" / "unpack.py").read_text(encoding="utf-8")


def packed(store: Path, name: str) -> bytes:
    """A snapshot as the unpacker reads it: for each file the lengths of name and content, 32 bits each, then both."""
    return b"".join(
        struct.pack(">II", len(path.encode()), len(data)) + path.encode() + data
        for path, data in kept(store, name).items()
    )


def write(files: dict[str, bytes], folder: Path) -> None:
    """Have exactly these files in a folder named by their digest: durable, whole or not at all.

    A folder that is damaged, as a power cut may leave it, is made anew, by one process at a time: a whole one stays.
    """
    if _files(folder) == files:
        return
    durable.have_folder(folder.parent)
    with locks.held(folder.parent / ".writing", _LOCK_WAIT_S):
        if _files(folder) != files:  # nobody else made it meanwhile
            _make(files, folder)


def _make(files: dict[str, bytes], folder: Path) -> None:
    staging = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        for name, data in files.items():
            durable.have_folder((staging / name).parent)
            durable.replace_whole(staging / name, data)
        if folder.is_dir():
            folder.rename(Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent)) / folder.name)
        staging.rename(folder)
        durable.sync_folder(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _files(folder: Path) -> dict[str, bytes]:
    """Every file of a snapshot by its path; compiled Python is none of it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in _SUFFIXES and path.is_file()
    }

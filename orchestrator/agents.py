"""Snapshots of the machine side's code by content: a run keeps the one it began with, whatever is upgraded later."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path

from jobs import durable
from orchestrator.errors import ConfigError

_SUFFIXES = (".py", ".toml", ".txt")
_PACKAGES = ("jobs", "worker")


def sources() -> dict[str, bytes]:
    """Every file of the installed `jobs` and `worker`, by its path; found without importing them."""
    files: dict[str, bytes] = {}
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        assert found is not None
        assert found.origin is not None
        folder = Path(found.origin).parent
        for path in sorted(folder.rglob("*")):
            if path.suffix in _SUFFIXES and "__pycache__" not in path.parts:
                files[f"{package}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    return files


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
    if not (store / name).is_dir():
        write(files, store / name)
    return name


def kept(store: Path, name: str) -> Path:
    """The folder of a snapshot that a run began with; ConfigError when it is gone."""
    folder = store / name
    if not folder.is_dir():
        raise ConfigError(
            f"The worker code {name} that this run began with is not in {store} any more.",
            "Carry on with today's code instead: gpu resume RUN --new-code",
        )
    return folder


def write(files: dict[str, bytes], folder: Path) -> None:
    """Put files into a new folder, whole or not at all; another process doing the same is no harm."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        for name, data in files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        with contextlib.suppress(OSError):  # the other process won: the contents are the same, by name
            staging.rename(folder)
        durable.sync_folder(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

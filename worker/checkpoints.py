"""Folders of weights that appear whole or not at all, checked before they are believed, and removed by their number."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs import durable, locks, rundir
from worker.failures import DiskFull

KEPT = 2
"""Checkpoints that stay on the machine: the newest, and the one before it should that be damaged."""
_SPARE_BYTES = 16 << 20
"""Left free on the disk beside a checkpoint, for the rows and the log of what comes next."""
_STAGED, _GONE, _DAMAGED = ".staged", ".gone", ".damaged"
Say = Callable[[str], None]
Entries = dict[str, dict[str, Any]]
"""What a manifest says of each file."""


def save(run: rundir.Run, name: str, files: Mapping[str, bytes]) -> Path:
    """Have these files as the folder `name` of the run, durably: it appears once every byte of it is on the disk.

    One that is there already and whole stays. Raises DiskFull, before anything is written where that can be seen.
    """

    def write(staged: Path) -> Entries:
        for file, data in files.items():
            with durable.opened(staged / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                durable.write_all(descriptor, data)
                durable.sync(descriptor)
        return {file: rundir.entry_of(data) for file, data in files.items()}

    return _appear(run, name, sum(map(len, files.values())), write)


def save_folder(run: rundir.Run, name: str, size: int, fill: Callable[[Path], None]) -> Path:
    """The same for a folder that `fill` writes files into, of about `size` bytes together."""

    def write(staged: Path) -> Entries:
        fill(staged)
        return {path.name: _synced(path) for path in sorted(staged.iterdir())}

    return _appear(run, name, size, write)


def _synced(path: Path) -> dict[str, Any]:
    """What a manifest says of a file that somebody else wrote, once it is on the disk."""
    with durable.opened(path, os.O_RDONLY) as descriptor:
        durable.sync(descriptor)
    return {"bytes": path.stat().st_size, "sha256": rundir.file_sha256(path)}


def _appear(run: rundir.Run, name: str, size: int, write: Callable[[Path], Entries]) -> Path:
    """Have a folder with what `write` puts into it under its name, unless it is there and whole; see `save`."""
    folder = run.folder / name
    if (folder / rundir.MANIFEST).is_file() and rundir.damage(folder) is None:
        return folder
    _make_room(run, name, size)
    staged = run.folder / f".{name}{_STAGED}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        durable.make_folder(staged)
        durable.save_json(staged / rundir.MANIFEST, write(staged))
        if folder.exists():
            _set_aside(folder, _DAMAGED)
        staged.rename(folder)
        durable.sync_folder(run.folder)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, OSError) and durable.is_full(error):  # others write to that disk, too
            raise _full(run, name, size) from error
        raise
    return folder


def whole(run: rundir.Run, say: Say) -> Iterator[Path]:
    """The checkpoints whose every byte is as it was written, newest first; damaged ones are said, and set aside."""
    for folder in reversed(run.checkpoints()):
        reason = rundir.damage(folder)
        if reason is None:
            yield folder
        else:
            say(f"{folder.name} is damaged ({reason}) and passed over; the one before it is looked at.")
            discard(folder)


def discard(folder: Path) -> None:
    """Take a checkpoint that cannot be gone on with out of the way; the next attempt removes it."""
    _set_aside(folder, _DAMAGED)


def retire(run: rundir.Run, kept: int = KEPT) -> None:
    """Remove all checkpoints but the newest `kept`, by number; one that is being copied stays until the next time."""
    found = run.checkpoints()
    for folder in found[: max(len(found) - kept, 0)]:
        if not locks.is_held(folder / rundir.MANIFEST):
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder of weights: its name goes first, so that nobody takes half of it for the whole."""
    shutil.rmtree(_set_aside(folder, _GONE), ignore_errors=True)


def sweep(run: rundir.Run) -> None:
    """Remove what earlier attempts left unfinished, and checkpoints that never got their manifest."""
    for folder in run.folder.iterdir():
        is_left = folder.name.startswith(".") and folder.suffix in (_STAGED, _GONE, _DAMAGED)
        is_torn = rundir.checkpoint_number(folder.name) is not None and not (folder / rundir.MANIFEST).is_file()
        if is_left or is_torn:
            shutil.rmtree(folder, ignore_errors=True)


def _set_aside(folder: Path, why: str) -> Path:
    """Give a folder a hidden name that nothing reads, durably; returns it."""
    aside = folder.with_name(f".{folder.name}{why}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
        durable.sync_folder(folder.parent)
    return aside


def _make_room(run: rundir.Run, name: str, size: int) -> None:
    """Let older checkpoints go where so many bytes have no room; DiskFull when that is not enough."""
    if _free(run) < size + _SPARE_BYTES:
        retire(run, 1)
    if _free(run) < size + _SPARE_BYTES:
        raise _full(run, name, size)


def _full(run: rundir.Run, name: str, size: int) -> DiskFull:
    older = run.checkpoints()
    known = f"{older[-1].name} is safe" if older else "there is no earlier one"
    return DiskFull(
        f"{name} needs {size / 1e6:.0f} MB on the disk that holds {run.folder}, which has {_free(run) / 1e6:.0f} MB "
        f"left; {known}. Training stopped here rather than go on unsaved.",
        "Free some space there, then resume the run.",
    )


def _free(run: rundir.Run) -> int:
    return shutil.disk_usage(run.folder).free

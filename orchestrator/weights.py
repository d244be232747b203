"""Weights at home: of checkpoints the newest whole one is kept; a finished adapter is put where its user looks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from jobs import durable, rundir
from orchestrator.parts import Parts


def settle(home: rundir.Home, copy: rundir.Run, folder: Path, parts: Parts) -> None:
    """Take over that a folder of weights came whole from a machine: what that machine sent before it has had its day.

    Nothing goes before every byte of the new one was read again here. What other machines sent is not touched.
    """
    if rundir.damage(folder) is not None:
        return
    number = rundir.checkpoint_number(folder.name)
    if folder.name == home.merged.name:
        _show(home.merged, folder)
        return
    if folder.name == home.adapter.name:
        _show(home.adapter, folder)
    elif number is None:
        return
    for path in copy.folder.glob("checkpoint-*"):
        older = rundir.checkpoint_number(path.name)
        if older is not None and (number is None or older < number):
            parts.forget(f"{path.name}/")
            shutil.rmtree(path, ignore_errors=True)


def mend(home: rundir.Home, copy: rundir.Run, parts: Parts) -> None:
    """Do what a process that died has left: more than one checkpoint here, or an adapter that is not shown."""
    if len(found := copy.checkpoints()) > 1:
        settle(home, copy, found[-1], parts)
    for shown in (home.adapter, home.merged):
        folder = copy.folder / shown.name
        if (folder / rundir.MANIFEST).is_file() and not shown.exists():
            settle(home, copy, folder, parts)


def is_owed(copy: rundir.Run, job: dict[str, Any], seal: rundir.Seal) -> bool:
    """Whether a machine that is done with a training has not sent the adapter it made, or the merged model, whole."""
    if job["story"] != "train" or seal.reason != "done":
        return False
    owed = ("adapter", "merged") if job["params"].get("merge") else ("adapter",)
    return any(rundir.damage(copy.folder / name) is not None for name in owed)


def to_send(home: rundir.Home) -> Path | None:
    """What a machine that goes on with a training starts from: the adapter if there is one, else the newest checkpoint.

    Of all that came home, whichever machine sent it; a damaged one is passed over.
    """
    found = [path for copy in home.copies() for path in copy.checkpoints()]
    found.sort(key=lambda path: rundir.checkpoint_number(path.name) or (0, 0))
    adapters = [copy.folder / home.adapter.name for copy in home.copies()]
    wanted = [*reversed([*found, *(path for path in adapters if (path / rundir.MANIFEST).is_file())])]
    return next((path for path in wanted if rundir.damage(path) is None), None)


def _show(shown: Path, folder: Path) -> None:
    """Have a folder in the run's own folder, too: the same files under a second name, or copies of them."""
    staged = shown.with_name(f".{shown.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    durable.make_folder(staged)
    for path in rundir.weights(folder):
        try:
            os.link(path, staged / path.name)
        except OSError:  # not every disk has links
            shutil.copyfile(path, staged / path.name)
    shutil.rmtree(shown, ignore_errors=True)
    staged.rename(shown)
    durable.sync_folder(shown.parent)

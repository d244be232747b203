"""The built-in model of a run: trained once on a machine, copied into the run's folder so that it travels with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from jobs import durable, rundir
from worker import tiny

NAME = "tiny"
"""What `model` is called when the built-in one is meant."""


def folder(run: rundir.Run, say: Callable[[str], None]) -> Path:
    """The run's own copy of the built-in model: another processor may train other weights, so a resume keeps it."""
    own = run.folder / "model"
    if not (own / rundir.MANIFEST).is_file():
        trained = tiny.ensure(run.folder.parent.parent / "models", say)
        _copy(trained, own)
    return own


def outline(scratch: Path) -> Path:
    """The built-in model without weights, tokenizer and configuration only, in the folder `scratch`."""
    tiny.save_tokenizer(scratch)
    return scratch


def _copy(source: Path, target: Path) -> None:
    """Copy a folder of weights, manifest last: a folder without its manifest does not exist yet."""
    shutil.rmtree(target, ignore_errors=True)
    durable.make_folder(target)
    for path in rundir.weights(source):
        durable.replace_whole(target / path.name, path.read_bytes())

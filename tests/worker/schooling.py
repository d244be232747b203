"""Trainings in this process: a run folder with the built-in model, and the steps and files that come of one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rows, rundir, spec
from worker import train
from worker.batches import Micro

KEPT = ("step", "loss", "grad_norm", "lr", "tokens", "targets", "epoch", "eval_loss")
"""What of a step must not depend on interruptions."""


def run_in(folder: Path, models: Path) -> rundir.Run:
    """A run folder with its own copy of the built-in model, as the worker leaves it there."""
    run = rundir.Run(folder)
    durable.have_folder(folder)
    shutil.copytree(next(models.glob("tiny-*[0-9a-f]")), folder / "model")
    return run


def job(name: str = "train-lora", **settings: object) -> dict[str, Any]:
    """The job document of a training, settings as a user would type them."""
    params = spec.find(name, [spec.CATALOG]).fill({key: str(value) for key, value in settings.items()})
    return {"story": "train", "params": params, "limit": 60}


def attend(run: rundir.Run, document: dict[str, Any]) -> None:
    """One more attempt of the run, in this process."""
    attempt = run.attempt(len(run.attempts()) + 1)
    durable.have_folder(attempt.folder)
    train.work(run, attempt, document)


def steps(run: rundir.Run) -> list[rows.Row]:
    """The lines of all attempts, in the order they were written."""
    lines = (line for attempt in run.attempts() for _, line in rows.whole_lines(attempt.steps))
    return [rows.decode(line) for line in lines]


def essence(run: rundir.Run) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions, of each step; of one done twice the later line."""
    found = {line["step"]: tuple(line.get(name) for name in KEPT) for line in steps(run)}
    return [found[number] for number in sorted(found)]


def files(folder: Path) -> dict[str, bytes]:
    """The contents of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopping(monkeypatch: pytest.MonkeyPatch, micros: int) -> None:
    """Have every attempt from here on be asked to stop once it has begun so many micro-batches."""
    made = train.Training._batch

    def counted(training: train.Training, micro: Micro) -> Any:
        training.begun = getattr(training, "begun", 0) + 1
        training.stop_asked = training.stop_asked or training.begun >= micros
        return made(training, micro)

    monkeypatch.setattr(train.Training, "_batch", counted)

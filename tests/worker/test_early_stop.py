"""Trainings that end early: on the best adapter, at the same step however often they were stopped."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from jobs import rundir
from tests.worker import schooling
from worker import lora, train

WORSE: dict[str, Any] = {
    "steps": 12,
    "accumulation": 2,
    "lr": 0.015,
    "dropout": 0.1,
    "warmup": 0,
    "eval_rows": 6,
    "eval_every": 1,
}
WORSE["schedule"] = "constant"
"""A rate so high that the loss on the rows held out soon grows, after it has fallen twice."""


@pytest.fixture
def run(tmp_path: Path, models: Path) -> rundir.Run:
    return schooling.run_in(tmp_path / "run", models)


def measured(run: rundir.Run) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in schooling.steps(run) if "eval_loss" in line}


def test_it_ends_when_the_loss_has_not_fallen_for_as_long_as_asked(
    run: rundir.Run, tmp_path: Path, models: Path
) -> None:
    """The adapter is that of the best step, byte for byte the one of a run that ends there, and says so."""
    schooling.attend(run, schooling.job(**WORSE, patience=2))
    losses = measured(run)
    best = min(losses, key=losses.__getitem__)
    assert best > 1
    assert len(losses) == best + 2 < WORSE["steps"], "ended late, or never"
    lines = schooling.steps(run)
    assert [line["stops_early"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["best_step"] == best
    about = json.loads((run.folder / "adapter" / train.ABOUT).read_text())
    assert about["step"] == best
    whole = schooling.run_in(tmp_path / "whole", models)
    training = train.Training(
        whole, prepared := train.curriculum.prepare(schooling.job(**WORSE), whole, print), learner(prepared)
    )
    training.begin()
    list(itertools.islice(training.steps(), best))
    assert (
        lora.adapter_files(training.learner, "")[lora.WEIGHTS] == (run.folder / "adapter" / lora.WEIGHTS).read_bytes()
    )


def learner(prepared: train.Prepared) -> lora.Learner:
    return lora.load(prepared.request, prepared.settings)


def test_a_fall_that_is_too_small_is_none(tmp_path: Path, models: Path) -> None:
    """With a `min_delta` no loss falls by, the first measurement stays the best; without patience nothing ends."""
    run, other = (schooling.run_in(tmp_path / name, models) for name in ("run", "other"))
    schooling.attend(run, schooling.job(**{**WORSE, "lr": 0.002, "steps": 6}, patience=3, min_delta=100))
    assert [line["best_step"] for line in schooling.steps(run)] == [1, 1, 1, 1]
    schooling.attend(other, schooling.job(**{**WORSE, "lr": 0.002, "steps": 6}))
    assert len(schooling.steps(other)) == 6
    assert "best_step" not in schooling.steps(other)[-1]


def test_stopped_again_and_again_it_ends_at_the_same_step(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was best and how long ago is in the checkpoint: two micro-batches an attempt come to the same adapter."""
    document: dict[str, Any] = schooling.job(**WORSE, patience=2)
    calm, hurried = (schooling.run_in(tmp_path / name, models) for name in ("calm", "hurried"))
    schooling.attend(calm, document)
    schooling.stopping(monkeypatch, micros=3)
    for _ in range(12):
        try:
            schooling.attend(hurried, document)
        except SystemExit:
            continue
        break
    assert len(hurried.attempts()) > 2
    assert schooling.essence(hurried) == schooling.essence(calm)
    assert schooling.files(hurried.folder / "adapter") == schooling.files(calm.folder / "adapter")

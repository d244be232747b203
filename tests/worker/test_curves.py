"""Curves for TensorBoard: each step once, however often the training was killed, and nothing without the package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import rundir
from orchestrator import curves as shown
from tests.worker import schooling
from worker import curves, lora

SHORT = {"steps": 7, "accumulation": 1, "lr": 0.01, "warmup": 0, "save_every": 2, "eval_rows": 3, "eval_every": 3}


def test_without_the_package_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go nowhere, and no file is made."""
    monkeypatch.setattr(curves.importlib.util, "find_spec", lambda name: None)
    with curves.drawing(tmp_path / rundir.CURVES, 1) as draw:
        draw({"step": 1, "loss": 2.0})
    assert not (tmp_path / rundir.CURVES).exists()


def killed_at(run: rundir.Run, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """An attempt that ends within its so-and-so-manieth step."""
    made, updates = lora.update, iter(range(step - 1))

    def update(learner: lora.Learner, lr: float, clip: float) -> float:
        if next(updates, None) is None:
            raise KeyboardInterrupt
        return made(learner, lr, clip)

    with monkeypatch.context() as patch:
        patch.setattr(lora, "update", update)
        with pytest.raises(KeyboardInterrupt):
            schooling.attend(run, document)


def test_after_kills_each_step_is_drawn_once(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of three attempts, side by side in one folder, are one curve: the one of steps.jsonl."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = schooling.run_in(tmp_path / "run", models)
    document = schooling.job(**SHORT)
    killed_at(run, document, monkeypatch, 4)  # after three steps: the third is done again
    killed_at(run, document, monkeypatch, 4)
    schooling.attend(run, document)
    lines = schooling.steps(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 5, 6, 7]
    home = rundir.Home(tmp_path / "results")
    shutil.copytree(run.folder / "attempts", home.machine("box").folder / "attempts")
    for _ in range(2):
        assert shown.show(home) == home.folder / "tensorboard"
    assert len(list(home.curves.iterdir())) == 3
    found = EventAccumulator(str(home.curves)).Reload()
    last = {line["step"]: line for line in lines}
    assert [(each.step, each.value) for each in found.Scalars("train/loss")] == [
        (step, pytest.approx(line["loss"])) for step, line in sorted(last.items())
    ]
    assert [each.step for each in found.Scalars("eval/loss")] == [3, 6, 7]


def test_what_is_not_there_is_not_shown(tmp_path: Path) -> None:
    """A run without curves gets no folder for them."""
    assert shown.show(rundir.Home(tmp_path / "results")) is None
    assert not (tmp_path / "results").exists()

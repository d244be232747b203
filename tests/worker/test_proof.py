"""`verify_resume`: a resume is tried out before training, changes nothing of it, and a difference is found."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.worker import schooling
from worker import lora, proof

SHORT = {"steps": 5, "accumulation": 2, "lr": 0.01, "dropout": 0.1, "warmup": 2, "save_every": 2}
FEW_BITS = {"optimizer": "adamw_8bit", "quantization": "nf4", "rank": 64, "targets": "all-linear", "eval_rows": 3}


@pytest.mark.parametrize("settings", [{}, FEW_BITS, {"steps": 1, "accumulation": 1}], ids=["plain", "few bits", "one"])
def test_a_resume_is_exact_and_trying_it_out_changes_nothing(
    tmp_path: Path, models: Path, settings: dict[str, Any]
) -> None:
    """It is said to be bit by bit the same; the training that follows makes the steps and bytes of one without it."""
    if settings is FEW_BITS and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    plain, verified = (schooling.run_in(tmp_path / name, models) for name in ("plain", "verified"))
    schooling.attend(plain, schooling.job(**{**SHORT, **settings}))
    schooling.attend(verified, schooling.job(**{**SHORT, **settings}, verify_resume="true"))
    found = json.loads(verified.attempt(1).env.read_text())["verify_resume"]
    assert (found["exact"], found["on"], found["words"]) == (True, "cpu", "resumed bit by bit the same")
    assert found["steps"] == min(proof.STEPS, settings.get("steps", 5))
    assert schooling.essence(verified) == schooling.essence(plain)
    assert schooling.files(verified.folder / "adapter") == schooling.files(plain.folder / "adapter")
    assert not (verified.folder / proof._SCRATCH).exists()


@pytest.mark.parametrize("lost", ["gradient/", "optimizer/"])
def test_what_a_checkpoint_loses_is_found(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """A state that comes back altered, be it a gradient or a moment, ends the run before it trains."""
    run, taken = schooling.run_in(tmp_path / "run", models), safetensors.torch.load

    def forgetful(data: bytes) -> dict[str, Any]:
        tensors = taken(data)
        name = next((name for name in sorted(tensors) if name.startswith(lost) and tensors[name].any()), "")
        return {**tensors, name: torch.zeros_like(tensors[name])} if name else tensors

    monkeypatch.setattr(safetensors.torch, "load", forgetful)
    with pytest.raises(proof.NotExact, match=r"step [34] is not the same; weights differ by up to"):
        schooling.attend(run, schooling.job(**SHORT, verify_resume="true"))
    assert schooling.steps(run) == []
    assert run.checkpoints() == []


def test_what_was_begun_is_not_verified_again(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that goes on from a checkpoint trains at once."""
    run = schooling.run_in(tmp_path / "run", models)
    document = schooling.job(**SHORT, verify_resume="true")
    with monkeypatch.context() as patch:
        patch.setattr(lora, "update", _ending_after(5 + 2 * proof.STEPS))
        with pytest.raises(KeyboardInterrupt):
            schooling.attend(run, document)
    assert run.checkpoints()
    schooling.attend(run, document)
    assert "verify_resume" not in json.loads(run.attempt(2).env.read_text())


def _ending_after(count: int) -> Any:
    """`lora.update`, until the run is killed at its so-and-so-manieth step."""
    made, steps = lora.update, iter(range(count - 3))

    def update(learner: lora.Learner, lr: float, clip: float) -> float:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return made(learner, lr, clip)

    return update


def trace(weight: float) -> proof.Trace:
    return proof.Trace([(1, weight)], {}, {"weight/a": torch.tensor([0.0, weight])}, {})


@pytest.mark.parametrize(
    ("resumed", "again", "exact", "by_chance"),
    [(1.0, 1.0, True, False), (1.01, 1.02, False, True), (1.5, 1.02, False, False), (1.01, 1.0, False, False)],
)
def test_on_a_gpu_a_difference_is_weighed_against_chance(
    resumed: float, again: float, exact: bool, by_chance: bool
) -> None:
    """What two undisturbed runs differ by is the measure; where they do not differ, nothing else may."""
    found = proof.judged(trace(1.0), trace(resumed), trace(again))
    assert (found["exact"], found["by_chance"]) == (exact, by_chance)
    if not exact:
        assert found["noise"] == pytest.approx(again - 1.0)
        assert "two runs that nobody stopped" in found["words"]


def test_on_a_cpu_nothing_is_chance() -> None:
    """The smallest difference is one."""
    assert not proof.judged(trace(1.0), trace(1.0 + 1e-6), None)["by_chance"]


def test_what_a_kill_left_of_it_is_swept_away(tmp_path: Path, models: Path) -> None:
    """The folder of an attempt that was killed while it verified is gone after the next, which was not misled."""
    run = schooling.run_in(tmp_path / "run", models)
    (run.folder / proof._SCRATCH / "checkpoint-1").mkdir(parents=True)
    schooling.attend(run, schooling.job(**{**SHORT, "steps": 1}))
    assert not (run.folder / proof._SCRATCH).exists()

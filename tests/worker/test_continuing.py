"""Trainings that go on with an adapter there is already, and what is refused of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import rundir
from tests.worker import schooling
from worker import lora, train
from worker.failures import ConfigFailure, NothingLearned

SHORT = {"steps": 2, "accumulation": 1, "lr": 0.01, "warmup": 0}


@pytest.fixture
def run(tmp_path: Path, models: Path) -> rundir.Run:
    return schooling.run_in(tmp_path / "run", models)


@pytest.fixture
def adapter(tmp_path: Path, models: Path) -> Path:
    """The adapter of a training of two steps, as a run leaves it."""
    made = schooling.run_in(tmp_path / "first", models)
    schooling.attend(made, schooling.job(**SHORT))
    return made.folder / "adapter"


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / lora.WEIGHTS)


def test_it_begins_with_the_weights_of_the_adapter(
    run: rundir.Run, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is all but nothing leaves the adapter as it was; a resume keeps to it, and to another digest not."""
    document = schooling.job(**{**SHORT, "lr": 1e-6}, adapter=adapter)
    with monkeypatch.context() as patch:
        schooling.stopping(patch, micros=1)
        with pytest.raises(SystemExit):
            schooling.attend(run, document)
    schooling.attend(run, document)
    before, after = weights(adapter), weights(run.folder / "adapter")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-5, rtol=0) for name in before)
    prepared = train.curriculum.prepare(document, run, print)
    assert prepared.identity["adapter_digest"].startswith("sha256:")


def test_layers_that_stay_as_the_adapter_had_them_end_the_run(run: rundir.Run, adapter: Path) -> None:
    """Weights that are not zero are no sign of learning: they must change."""
    with pytest.raises(NothingLearned, match="After 5 steps 4 adapter layers"):
        schooling.attend(run, schooling.job(**{**SHORT, "steps": 9, "lr": 0.0}, adapter=adapter))


@pytest.mark.parametrize(
    ("settings", "words", "hint"),
    [
        ({"rank": 4}, "its r is 8, and this training's 4", "--set rank=8 --set alpha=16.0 --set targets=q_proj,v_proj"),
        ({"alpha": 32}, "its lora_alpha is 16.0, and this training's 32.0", "--set alpha=16.0"),
        ({"targets": "q_proj,k_proj"}, "it is for q_proj,v_proj, and this training for q_proj,k_proj", "--set rank=8"),
        ({"targets": "all-linear"}, "has the size None in it", "--set targets=q_proj,v_proj"),
    ],
)
def test_another_form_is_refused(
    run: rundir.Run, adapter: Path, settings: dict[str, Any], words: str, hint: str
) -> None:
    """Rank, scale and targets are those of the adapter, or nothing is trained; the hint is what would fit."""
    with pytest.raises(ConfigFailure) as failure:
        schooling.attend(run, schooling.job(**{**SHORT, **settings}, adapter=adapter))
    assert words in failure.value.message
    assert hint in failure.value.hint
    assert run.checkpoints() == []


def test_an_adapter_of_other_weights_is_refused(run: rundir.Run, adapter: Path) -> None:
    """One that we trained says the digest of its base, and every size may fit."""
    tensors = load_file(run.folder / "model" / "model.safetensors")
    save_file(
        {name: each + 1 for name, each in tensors.items()}, run.folder / "model" / "model.safetensors", {"format": "pt"}
    )
    (run.folder / "model" / rundir.MANIFEST).unlink()
    shutil.copy(adapter.parent / "model" / "MANIFEST.json", run.folder / "model" / "unread.json")
    request = train.curriculum.models.ModelRequest(str(run.folder / "model"), adapter=str(adapter))
    with pytest.raises(ConfigFailure, match="another base"):
        train.curriculum.continuing.check(schooling.job(**SHORT)["params"], request)


def test_an_adapter_of_another_kind_is_refused(run: rundir.Run, adapter: Path) -> None:
    """A setting under which the same weights mean another model is named."""
    path = adapter / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(ConfigFailure, match="its use_dora is True"):
        schooling.attend(run, schooling.job(**SHORT, adapter=adapter))


def test_a_dry_run_looks_at_the_adapter_too(adapter: Path) -> None:
    """Of the built-in model, whose weights are not made for it, all but their digest."""
    assert train.check(schooling.job(**SHORT, adapter=adapter))["steps_total"] == 2
    with pytest.raises(ConfigFailure, match="its r is 8"):
        train.check(schooling.job(**SHORT, rank=4, adapter=adapter))
    with pytest.raises(ConfigFailure, match=r"The adapter of .* cannot be loaded"):
        train.check(schooling.job(**SHORT, adapter=adapter.parent))

"""Trainings: bit by bit the same however often stopped, an adapter that peft reads, and a reason where they refuse."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import rundir
from tests.worker import schooling
from worker import lora, models, train
from worker.failures import ConfigFailure, FingerprintChanged, WorkerFailure

SHORT = {"steps": 3, "accumulation": 2, "lr": 0.01, "dropout": 0.1, "warmup": 2}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
FEW_BITS = {"optimizer": "adamw_8bit", "rank": 64, "targets": "all-linear"}
"""Large enough matrices for a state of 8 bits: below 4,096 entries bitsandbytes keeps 32."""


@pytest.fixture
def run(tmp_path: Path, models: Path) -> rundir.Run:
    return schooling.run_in(tmp_path / "run", models)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "bfloat16", "packing": "true", "max_length": 128, "schedule": "cosine"},
        {"batch_tokens": 200, "targets": "all-linear", "eval_rows": 4, "eval_every": 1},
        {"activation_checkpointing": "true", "batch_size": 3, "steps": 2},
        pytest.param({**FEW_BITS, "batch_tokens": 200}, marks=needs_bitsandbytes),
        pytest.param({"quantization": "nf4"}, marks=needs_bitsandbytes),
        pytest.param({**FEW_BITS, "quantization": "nf4", "packing": "true", "eval_rows": 3}, marks=needs_bitsandbytes),
        pytest.param({**FEW_BITS, "quantization": "int8"}, marks=needs_bitsandbytes),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "as it comes",
)
@pytest.mark.first(4)
def test_stopped_after_every_micro_batch_it_ends_the_same(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Each attempt does one micro-batch and is stopped: losses, norms, rates and the adapter's bytes stay the same."""
    document = schooling.job(**{**SHORT, **settings})
    calm, hurried = (schooling.run_in(tmp_path / name, models) for name in ("calm", "hurried"))
    schooling.attend(calm, document)
    schooling.stopping(monkeypatch, micros=1)
    for _ in range(document["params"]["steps"] * SHORT["accumulation"] - 1):
        with pytest.raises(SystemExit):
            schooling.attend(hurried, document)
    schooling.attend(hurried, document)
    assert schooling.essence(hurried) == schooling.essence(calm)
    assert schooling.files(hurried.folder / "adapter") == schooling.files(calm.folder / "adapter")


def test_epochs_end_where_the_rows_do(run: rundir.Run) -> None:
    """Two epochs learn every row twice; the last step takes the micro-batches that are left, and says so."""
    schooling.attend(run, schooling.job(epochs=2, accumulation=16, lr=0.01))
    lines = schooling.steps(run)
    assert len(lines) == 8  # 120 micro-batches of one row, 16 a step
    assert sum(line["targets"] for line in lines[:-1]) > 10 * lines[-1]["targets"]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert lines[-1]["eta_s"] == 0.0


def test_accumulated_micro_batches_are_one_large_one(tmp_path: Path, models: Path) -> None:
    """Four micro-batches of one row, rows of all lengths, make the step that one of four rows makes."""
    losses = []
    for size, accumulation in ((1, 4), (4, 1)):
        run = schooling.run_in(tmp_path / str(size), models)
        document = schooling.job(epochs=1, batch_size=size, accumulation=accumulation, lr=0.01) | {"limit": 4}
        schooling.attend(run, document)
        losses.append([(line["loss"], line["grad_norm"], line["targets"]) for line in schooling.steps(run)])
    assert len(losses[0]) == 1
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)


def test_the_adapter_is_one_that_peft_reads(run: rundir.Run) -> None:
    """What was trained, loaded from the folder by peft, answers as it does in training, and not as the base."""
    document = schooling.job(steps=4, lr=0.05, warmup=0)
    schooling.attend(run, document)
    request = models.ModelRequest(str(run.folder / "model"), adapter=str(run.folder / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loaded = models.load_model(request)
    learner = lora.load(models.ModelRequest(str(run.folder / "model")), lora.Settings.of(document["params"]))
    lora.load_adapter(learner, (run.folder / "adapter" / lora.WEIGHTS).read_bytes())
    with torch.no_grad():
        found, expected = loaded.model(input_ids=ids).logits, learner.model.eval()(input_ids=ids).logits
        with learner.model.disable_adapter():
            base = learner.model(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, base)
    assert {str(each.dtype) for each in load_file(run.folder / "adapter" / lora.WEIGHTS).values()} == {"torch.float32"}


def test_a_bf16_base_gets_a_float32_adapter(run: rundir.Run) -> None:
    """Adapter weights and the optimizer's moments are float32 whatever the base is loaded in."""
    request = models.ModelRequest(str(run.folder / "model"), dtype="bfloat16")
    learner = lora.load(request, lora.Settings.of(schooling.job()["params"]))
    assert {each.dtype for each in learner.weights.values()} == {torch.float32}
    assert learner.model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(run: rundir.Run, document: dict[str, Any], kind: type[WorkerFailure] = ConfigFailure) -> str:
    with pytest.raises(kind) as failure:
        schooling.attend(run, document)
    return failure.value.message


def stopped(run: rundir.Run, monkeypatch: pytest.MonkeyPatch, document: dict[str, Any]) -> Path:
    """A run with a checkpoint after its first two steps and a micro-batch of the third."""
    with monkeypatch.context() as patch:
        schooling.stopping(patch, micros=5)
        with pytest.raises(SystemExit):
            schooling.attend(run, document)
    [folder] = run.checkpoints()
    assert folder.name == "checkpoint-2.1"
    return folder


def forge(folder: Path, **changed: bytes | None) -> None:
    """Change files of a checkpoint as somebody would who renews the manifest, too."""
    listed = json.loads((folder / rundir.MANIFEST).read_text())
    for name, data in changed.items():
        if data is None:
            del listed[name]
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
            listed[name] = rundir.entry_of(data)
    (folder / rundir.MANIFEST).write_text(json.dumps(listed))


@pytest.mark.parametrize("part", ["optimizer/", "gradient/"])
def test_a_checkpoint_without_a_part_of_its_state_is_refused(
    run: rundir.Run, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Optimizer state or gradients that are missing end the run with words, never with a fresh optimizer."""
    folder = stopped(run, monkeypatch, schooling.job(**SHORT))
    tensors = load_file(folder / train.TENSORS)
    first = next(name for name in sorted(tensors) if name.startswith(part)).rpartition("/")[0]
    save_file({name: each for name, each in tensors.items() if not name.startswith(first)}, folder / "part")
    data = (folder / "part").read_bytes()
    (folder / "part").unlink()
    forge(folder, **{train.TENSORS: data})
    assert "does not fit this training" in refused(run, schooling.job(**SHORT), lora.StateMismatch)
    assert run.checkpoints() == [folder], "what cannot be gone on with was taken away"


@pytest.mark.parametrize("part", ["gradient/", "optimizer/base_model", train.STATE, train.TENSORS])
def test_one_that_lacks_something_is_stepped_over_and_said(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    """A checkpoint without a gradient, a moment or a file: the one before it is gone on from, to the same end."""
    document = schooling.job(**{**SHORT, "save_every": 1})
    calm, run = (schooling.run_in(tmp_path / name, models) for name in ("calm", "run"))
    schooling.attend(calm, document)
    with monkeypatch.context() as patch:
        schooling.stopping(patch, micros=3)
        with pytest.raises(SystemExit):
            schooling.attend(run, document)
    before, folder = run.checkpoints()
    assert (before.name, folder.name) == ("checkpoint-1", "checkpoint-1.1")
    tensors = load_file(folder / train.TENSORS)
    lost = next((name for name in sorted(tensors) if name.startswith(part)), None)
    if lost:
        save_file({name: each for name, each in tensors.items() if name != lost}, tmp_path / "part")
        forge(folder, **{train.TENSORS: (tmp_path / "part").read_bytes()})
    else:
        forge(folder, **{part: None})
    schooling.attend(run, document)
    said = capsys.readouterr().out
    assert "checkpoint-1.1 is passed over" in said
    assert "going on from checkpoint-1:" in said
    assert schooling.essence(run) == schooling.essence(calm)
    assert schooling.files(run.folder / "adapter") == schooling.files(calm.folder / "adapter")


def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, models: Path, run: rundir.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whose rank, rate or rows were others is not gone on with."""
    folder = stopped(run, monkeypatch, schooling.job(**SHORT))
    other = schooling.run_in(tmp_path / "other", models)
    shutil.copytree(folder, other.folder / folder.name)
    assert "another training" in refused(other, schooling.job(**{**SHORT, "lr": 0.02}), train.AnotherTraining)


def test_a_resume_with_other_settings_is_refused(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the run began with is kept to; the message names what differs."""
    stopped(run, monkeypatch, schooling.job(**SHORT))
    assert "rank was 8, is 4" in refused(run, schooling.job(**{**SHORT, "rank": 4}), FingerprintChanged)


def test_a_loss_that_is_no_number_ends_the_run(run: rundir.Run) -> None:
    """Weights with a NaN in them stop training at its first step; nothing is learned from it, nothing saved."""
    path = run.folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    assert "In step 1 the loss is not a number" in refused(run, schooling.job(**SHORT), train.Diverged)
    assert schooling.steps(run) == []
    assert run.checkpoints() == []


def test_a_gradient_that_is_no_number_ends_the_run(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss with an infinite gradient stops before the weights change; what was saved before stays."""
    made = lora.update
    steps: list[float] = []

    def bursting(learner: lora.Learner, lr: float, clip: float) -> float:
        steps.append(lr)
        if len(steps) == 2:
            next(iter(learner.weights.values())).grad.fill_(float("inf"))
        return made(learner, lr, clip)

    monkeypatch.setattr(lora, "update", bursting)
    message = refused(run, schooling.job(**SHORT, save_every=1), train.Diverged)
    assert "In step 2 the gradient is not a number any more. checkpoint-1 is safe." in message


def test_a_held_out_loss_that_is_no_number_ends_the_run(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows held out are never measured as NaN and passed over."""
    made = lora.loss_sum
    monkeypatch.setattr(
        lora, "loss_sum", lambda learner, batch: made(learner, batch) * (1 if torch.is_grad_enabled() else float("nan"))
    )
    message = refused(run, schooling.job(**SHORT, eval_rows=2, eval_every=1), train.Diverged)
    assert "After step 1 the loss of the rows held out" in message


def test_layers_that_learn_nothing_end_the_run(run: rundir.Run) -> None:
    """With a rate of zero every lora_B stays as it was made, which is noticed after a few steps."""
    message = refused(run, schooling.job(steps=50, lr=0.0), train.NothingLearned)
    assert "After 5 steps 4 adapter layers are as they were made" in message
    assert len(schooling.steps(run)) < 6


def test_a_full_disk_is_seen_before_a_checkpoint_is_begun(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk has too little room, training ends with words that name it, and leaves nothing half written."""
    monkeypatch.setattr("worker.checkpoints._SPARE_BYTES", 1 << 60)
    with pytest.raises(WorkerFailure, match="go on unsaved"):
        schooling.attend(run, schooling.job(**SHORT, save_every=1))
    assert not [path for path in run.folder.iterdir() if "checkpoint" in path.name]


def test_an_adapter_of_another_base_is_refused(run: rundir.Run, tmp_path: Path) -> None:
    """An adapter we trained is not put on other weights, though every size would fit."""
    schooling.attend(run, schooling.job(steps=2, lr=0.01))
    other = Path(shutil.copytree(run.folder / "model", tmp_path / "other"))
    (other / rundir.MANIFEST).unlink()
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    models.load_model(models.ModelRequest(str(run.folder / "model"), adapter=str(run.folder / "adapter")))
    with pytest.raises(ConfigFailure, match="another base"):
        models.load_model(models.ModelRequest(str(other), adapter=str(run.folder / "adapter")))


def test_the_largest_micro_batch_is_held_first_and_changes_nothing(
    run: rundir.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probing the memory leaves gradients as they were."""
    document = schooling.job(**SHORT)
    prepared = train.curriculum.prepare(document, run, print)
    training = train.Training(run, prepared, lora.load(prepared.request, prepared.settings))
    training.probe()
    assert all(each.grad is None for each in training.learner.weights.values())

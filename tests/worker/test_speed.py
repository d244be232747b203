"""A speed measurement: random weights of a real shape, steps that say what they took, memory as the formula has it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from jobs import durable, rundir, spec, training_memory
from jobs.decoders import Shape
from jobs.training_memory import Recipe
from tests.worker import schooling
from worker import blanks, models, speed
from worker.failures import ConfigFailure
from worker.models import ModelRequest

SIZES = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def run(tmp_path: Path) -> rundir.Run:
    durable.have_folder(tmp_path / "run")
    return rundir.Run(tmp_path / "run")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with nothing but a model's configuration."""
    transformers.Qwen2Config(**SIZES).save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


def measure(run: rundir.Run, **settings: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One attempt of a short measurement: what env.json says of it, and its steps."""
    short = {"steps": 4, "max_length": 64, "accumulation": 2, "device": "cpu"}
    attempt = run.attempt(len(run.attempts()) + 1)
    durable.have_folder(attempt.folder)
    speed.work(run, attempt, schooling.job("speed", **{**short, **settings}))
    return json.loads(attempt.env.read_text())["speed"], schooling.steps(run)


def test_a_bare_configuration_is_enough(run: rundir.Run, config: Path) -> None:
    """Without weights and tokenizer: steps of full rows, two that do not count, and a device that was measured."""
    about, lines = measure(run, model=config, batch_tokens=256)
    assert [line["warm"] for line in lines] == [True, True, False, False]
    assert {(line["tokens"], line["slots"], line["slots_most"], line["targets"]) for line in lines} == {
        (512, 512, 256, 256)
    }
    assert about["peak_flops"] > 1e8
    assert about["copied"] > 1e8
    assert Shape(**about["shape"]) == Shape.of(SIZES)
    assert about["total_tokens"] is None
    assert not (run.folder / "adapter").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16", "targets": "all-linear"},
        {"packing": "true", "activation_checkpointing": "true"},
        pytest.param({"quantization": "nf4", "dtype": "bfloat16"}, marks=needs_bitsandbytes),
    ],
    ids=lambda settings: " ".join(settings),
)
@pytest.mark.first(1)
def test_what_was_held_is_what_the_formula_says(run: rundir.Run, config: Path, settings: dict[str, Any]) -> None:
    """Tensors counted in the first steps, against the formula for the same recipe and micro-batch."""
    about, lines = measure(run, model=config, batch_tokens=1024, **settings)
    recipe = Recipe(**{**about["recipe"], "learned": 0.5})
    shape = Shape(**about["shape"])
    held = max(line["held_bytes"] or 0 for line in lines)
    assert training_memory.needs(shape, recipe).tensors == pytest.approx(held, rel=0.15)


def test_the_built_in_model_is_not_trained_for_it(run: rundir.Run) -> None:
    """model=tiny takes its shape alone; real rows show the padding that they come with."""
    about, lines = measure(run, model="tiny", dataset="generated", batch_size=4, epochs=3, max_length=128)
    assert not (run.folder / "model").exists()
    assert all(line["slots"] > line["tokens"] > line["targets"] for line in lines)
    assert about["total_tokens"] > 3 * 60 * 20


def test_a_killed_measurement_begins_anew(run: rundir.Run, config: Path) -> None:
    """A second attempt does every step again, and leaves those of the first where they are."""
    measure(run, model=config)
    _, lines = measure(run, model=config)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 1, 2, 3, 4]


def test_it_has_every_setting_of_a_training() -> None:
    """A training's --set words measure that training, by one process: no name is missing, none means something else."""
    own, theirs = (spec.find(name, [spec.CATALOG]).parameters for name in ("speed", "train-lora"))
    missing = theirs.keys() - own.keys()
    assert missing == {"processes"}
    assert {name for name in theirs.keys() - missing if own[name].type != theirs[name].type} == set()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"warm_steps": 4}, "leaves none of 4 steps"), ({"row_tokens": 65}, "2 to 64 have room")],
)
def test_settings_that_measure_nothing_are_refused(
    run: rundir.Run, config: Path, settings: dict[str, Any], words: str
) -> None:
    """Before the model is made, with what to type."""
    with pytest.raises(ConfigFailure, match=words) as caught:
        measure(run, model=config, **settings)
    assert caught.value.hint.startswith("--set ")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_random_weights_are_quantized_as_loaded_ones(tmp_path: Path, config: Path, kind: str) -> None:
    """The same modules of the same kinds and sizes as from_pretrained makes of real weights; the head stays whole."""
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).save_pretrained(tmp_path / "whole")
    how = models.quantization.arguments(kind, models.choose_dtype("float32", models.choose_device("cpu")))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="float32", **how)
    made = blanks.load(ModelRequest(str(config), dtype="float32", device="cpu", quantization=kind)).model
    assert parts(made) == parts(loaded)


def parts(model: Any) -> dict[str, Any]:
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return kinds | {name: (each.shape, each.dtype) for name, each in model.named_parameters()}

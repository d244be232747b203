"""Merged models: they say what base and adapter say together, in the base's own numbers, or nothing is trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs import rundir
from tests.worker import schooling
from worker import checkpoints, curriculum, lora, merging, models
from worker.failures import ConfigFailure, DiskFull

LEARNED = {"steps": 12, "accumulation": 1, "lr": 0.05, "warmup": 0, "targets": "all-linear", "merge": "true"}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def run(tmp_path: Path, models: Path) -> rundir.Run:
    return schooling.run_in(tmp_path / "run", models)


def answers(**request: Any) -> list[str]:
    """What a model says to questions, greedily."""
    loaded = models.load_model(models.ModelRequest(**request))
    found = []
    for question in ("Tom has 3 pens and buys 4 more. How many pens now?", "Eva has 9 apples.", "What is 7-2?"):
        chat = [{"role": "user", "content": question}]
        ids = loaded.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        made = loaded.model.generate(input_ids=ids, max_new_tokens=40, do_sample=False)
        found.append(loaded.tokenizer.decode(made[0, ids.shape[1] :]))
    return found


def test_the_merged_model_says_what_base_and_adapter_say(run: rundir.Run) -> None:
    """Word for word, from a folder that needs nothing else; its size was foreseen."""
    document = schooling.job(**LEARNED)
    foreseen = merging.size(curriculum.prepare(document, run, print))
    schooling.attend(run, document)
    base, adapter, merged = (str(run.folder / name) for name in ("model", "adapter", "merged"))
    assert rundir.damage(run.folder / "merged") is None
    together = answers(model=base, adapter=adapter)
    assert answers(model=merged) == together
    assert answers(model=base) != together
    assert json.loads((run.folder / "merged" / merging.ABOUT).read_text())["step"] == 12
    assert 0 <= (run.folder / "merged" / "model.safetensors").stat().st_size - foreseen < 20_000


def test_a_base_in_16_bits_stays_in_16_bits(run: rundir.Run) -> None:
    """Each weight is the base's plus the adapter's part, rounded once."""
    schooling.attend(run, schooling.job(**LEARNED, dtype="bfloat16"))
    name, merged = "model.layers.0.self_attn.q_proj", load_file(run.folder / "merged" / "model.safetensors")
    assert {each.dtype for each in merged.values()} == {torch.bfloat16}
    assert torch.equal(merged[f"{name}.weight"], expected(run, name, torch.bfloat16))


def expected(run: rundir.Run, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight of the merged model, reckoned from the files of base and adapter."""
    base = load_file(run.folder / "model" / "model.safetensors")[f"{name}.weight"].to(dtype)
    adapter = load_file(run.folder / "adapter" / lora.WEIGHTS)
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    return (base.float() + 2.0 * (b @ a)).to(dtype)


@needs_bitsandbytes
def test_a_base_in_fewer_bits_is_merged_into_its_own_weights(
    run: rundir.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not into what 4 bits made of them: base plus adapter, number for number, and the difference is said."""
    schooling.attend(run, schooling.job(**LEARNED, quantization="nf4", dtype="float32"))
    assert "merged into that base's own weights in float32" in capsys.readouterr().out
    name, merged = "model.layers.0.self_attn.q_proj", load_file(run.folder / "merged" / "model.safetensors")
    assert torch.allclose(merged[f"{name}.weight"], expected(run, name, torch.float32), atol=1e-6)
    assert "quantization_config" not in json.loads((run.folder / "merged" / "config.json").read_text())


def test_a_run_killed_before_it_merged_only_merges(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter that is there is not trained again; what was half written is not taken for the whole."""
    document = schooling.job(**LEARNED)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_synced", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            schooling.attend(run, document)
    assert not (run.folder / "merged").exists()
    schooling.attend(run, document)
    assert rundir.damage(run.folder / "merged") is None
    assert not run.attempt(2).steps.exists()


def test_what_could_not_be_merged_is_not_trained(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room, or a base that exists in few bits only: said before the first step."""
    with monkeypatch.context() as patch:
        patch.setattr(merging, "_SPARE_BYTES", 1 << 60)
        with pytest.raises(DiskFull, match=r"merge=true needs .* GB"):
            schooling.attend(run, schooling.job(**LEARNED))
    rounded = Path(shutil.copytree(run.folder / "model", run.folder.parent / "rounded"))
    config = json.loads((rounded / "config.json").read_text())
    (rounded / rundir.MANIFEST).unlink()
    (rounded / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    (run.folder / "resolved.json").unlink()
    with pytest.raises(ConfigFailure, match="kept in fewer bits"):
        schooling.attend(run, schooling.job(**LEARNED, model=rounded, dataset="generated"))
    (run.folder / "resolved.json").unlink()
    with pytest.raises(ConfigFailure, match="lm_head shares its weights"):
        schooling.attend(run, schooling.job(**{**LEARNED, "targets": "q_proj,lm_head"}))
    assert schooling.steps(run) == []

"""Which engine a run takes and keeps; and that the transformers engine loses nothing and knows adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import durable, engines
from tests.waiting import until
from tests.worker import evaluating, machine
from worker import engines as chosen
from worker import models, processes
from worker.failures import ConfigFailure
from worker.generators.vllm import Load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluating.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    ("installed", "device", "name"),
    [(True, "cuda", "vllm"), (True, "cpu", "hf"), (False, "cuda", "hf"), (False, "cpu", "hf")],
)
def test_auto_is_vllm_where_there_is_one_and_a_gpu(
    monkeypatch: pytest.MonkeyPatch, installed: bool, device: str, name: str
) -> None:
    """`auto` takes vLLM if it is installed and the run has a GPU, else transformers; to weigh texts, always that."""
    monkeypatch.setattr(chosen, "_has_vllm", lambda: installed)
    monkeypatch.setattr(models, "choose_device", lambda _: type("Device", (), {"type": device}))
    assert chosen.choose({"engine": "auto"}, {}) == name
    assert chosen.choose({"engine": "auto"}, {}, generates=False) == "hf"
    assert chosen.here({"engine": "auto"}, generates=True)["name"] == name
    assert chosen.here({"engine": "auto"}, generates=False)["name"] == "hf"


@pytest.mark.parametrize("known", ["hf", "vllm 0.32"])
def test_auto_keeps_to_what_the_run_began_with(monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    """A resume takes the engine that was resolved before, whatever is installed where it goes on."""
    monkeypatch.setattr(chosen, "_has_vllm", lambda: True)
    assert chosen.choose({"engine": "auto"}, {"engine": known}) == known.split()[0]


def test_vllm_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, or begun with, an engine that is not installed is a failure that says what to do."""
    monkeypatch.setattr(chosen, "_has_vllm", lambda: False)
    for params, known in (({"engine": "vllm"}, {}), ({"engine": "auto"}, {"engine": "vllm 0.32"})):
        with pytest.raises(ConfigFailure, match="not installed") as failure:
            chosen.choose(params, known)
        assert "engine=hf" in failure.value.hint


def test_gpus_are_divided_among_copies() -> None:
    """Each copy has GPUs of its own, as many as one is spread over; more than there are is refused."""

    def groups(gpus: str, size: int, copies: int | None = None) -> list[str]:
        load = Load(models.ModelRequest("m"), "bfloat16", 100, None, list(gpus), size, copies)
        return ["".join(group) for group in load.groups()]

    assert groups("0123", 1) == ["0", "1", "2", "3"]
    assert groups("0123", 2) == ["01", "23"]
    assert groups("01234", 2) == ["01", "23"]
    assert groups("0123", 1, 2) == ["0", "1"]
    assert groups("", 1) == [""]
    assert groups("", 1, 2) == ["", ""]
    for gpus, size, copies in (("0", 2, None), ("01", 1, 3), ("012", 2, 2)):
        with pytest.raises(ConfigFailure, match=f"the run has {len(gpus)}"):
            groups(gpus, size, copies)


def test_a_job_gets_the_environment_and_the_key_that_its_engine_needs() -> None:
    """vLLM, in the worker or as a server, needs the environment `serve`; a server elsewhere may need a key."""
    needs: list[tuple[dict[str, Any], str | None]] = [
        ({"engine": "vllm"}, "serve"),
        ({"engine": "openai", "server": "vllm serve {model} --port {port}"}, "serve"),
        ({"engine": "openai", "server": "ollama serve {port}"}, None),
        ({"engine": "auto"}, None),
        ({}, None),
    ]
    assert [engines.environment(params) for params, _ in needs] == [kind for _, kind in needs]
    assert engines.secrets({"engine": "openai", "base_url": "https://h"}) == ["OPENAI_API_KEY"]
    assert engines.secrets({"engine": "openai", "server": "s {port}"}) == []


def test_an_adapter_answers_as_merged_weights_do(model: Path, tmp_path: Path) -> None:
    """Greedy rows with a LoRA adapter are those of the model with it merged into its weights, not the base's."""
    questions = evaluating.save_questions(tmp_path / "questions.jsonl", 8)
    adapter = evaluating.save_adapter(model, tmp_path / "adapter", tmp_path / "merged")
    asked = [(model, {"adapter": adapter}), (tmp_path / "merged", {}), (model, {})]
    runs = [evaluating.done_here(evaluating.make(base, questions, engine="hf", **how)) for base, how in asked]
    with_adapter, merged, base = map(evaluating.texts, runs)
    assert with_adapter == merged != base


@pytest.mark.slow
def test_a_killed_run_ends_with_the_rows_of_one_that_was_not(model: Path, tmp_path: Path) -> None:
    """Killed in the middle and resumed, sampled rows are those of a run that was never interrupted, each made once."""
    questions = evaluating.save_questions(tmp_path / "questions.jsonl", 30)
    how = {"engine": "hf", "samples": 4, "temperature": 1, "batch_size": 4, "max_new_tokens": 60, "dtype": "float64"}
    killed, whole = (evaluating.make(model, questions, **how) for _ in range(2))
    evaluating.start(killed)
    there = machine.there(killed)
    until(lambda: len(evaluating.made(killed)) >= 8, within_s=120)
    known = durable.load_json(there.attempt(1).pids)
    processes.kill([known["supervisor"]["pid"], known["worker"]["pid"]])
    until(lambda: there.state().state != "running")
    first = there.attempt(1).rows.read_bytes().count(b"\n")
    assert 8 <= first < 120
    assert evaluating.finish(killed).reason == "done"
    assert evaluating.texts(killed) == evaluating.texts(evaluating.done_here(whole))
    assert there.attempt(2).rows.read_bytes().count(b"\n") == 120 - first

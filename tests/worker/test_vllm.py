"""The vLLM engine makes the rows the transformers engine makes, as they finish, and loses none when it dies."""

from __future__ import annotations

import collections
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import durable
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import evaluating, machine
from worker import processes
from worker.offspring import MARK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not evaluating.PYTHON_OF_VLLM, reason="no vLLM here: GPU_VLLM_PYTHON is not set"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluating.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return evaluating.save_questions(tmp_path / "questions.jsonl", 24)


def done(run: Run) -> Run:
    seal = evaluating.finish(run)
    assert seal.reason == "done", seal.message + machine.log(run)
    return run


def test_greedy_rows_are_those_of_the_transformers_engine(model: Path, questions: Path) -> None:
    """At float32 every greedy row of vLLM has the text, end and token counts of the transformers engine's, whatever
    the model's own generation settings say."""
    ours = done(evaluating.make(model, questions, engine="hf"))
    theirs = done(evaluating.make(model, questions, engine="vllm", batch_size=8))
    assert evaluating.texts(theirs) == evaluating.texts(ours)
    identity = durable.load_json(machine.there(theirs).resolved)["identity"]
    assert identity["engine"] == "vllm 0.32"
    assert identity["dtype"] == "float32"


def test_an_adapter_on_two_copies_answers_as_merged_weights_do(model: Path, questions: Path, tmp_path: Path) -> None:
    """With a LoRA adapter on two copies of the model, and a stop string, greedy rows are those of merged weights."""
    adapter = evaluating.save_adapter(model, tmp_path / "adapter", tmp_path / "merged")
    free = done(evaluating.make(tmp_path / "merged", questions, engine="hf"))
    letters = collections.Counter("".join(text for text, _, _ in evaluating.texts(free).values()))
    stop = next(letter for letter, count in letters.most_common() if letter.isalnum() and count < 40)
    merged = done(evaluating.make(tmp_path / "merged", questions, engine="hf", stop=stop))
    how = {"engine": "vllm", "adapter": adapter, "stop": stop, "batch_size": 4, "data_parallel": 2}
    assert evaluating.texts(done(evaluating.make(model, questions, **how))) == evaluating.texts(merged)
    assert {reason for _, reason, _ in evaluating.texts(merged).values()} == {"stop", "length"}
    assert evaluating.texts(merged) != evaluating.texts(done(evaluating.make(model, questions, engine="hf", stop=stop)))


def test_samples_are_drawn_from_the_same_distribution(model: Path, tmp_path: Path) -> None:
    """First tokens drawn by vLLM have the frequencies of softmax(scores / temperature) cut at top_p: no top_k, no
    penalty, whatever the model's own settings say; and each sample has its own seed."""
    question = evaluating.save_questions(tmp_path / "one.jsonl", 1)
    how = {"temperature": 0.7, "top_p": 0.9, "samples": 1000, "max_new_tokens": 1}
    rows = evaluating.made(done(evaluating.make(model, question, engine="vllm", **how)))
    drawn = collections.Counter(row["completion"] for row in rows.values())
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = next(iter(rows.values()))["messages"]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.inference_mode():
        scores = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([ids])).logits[0, -1]
    chances, tokens = (scores / 0.7).softmax(-1).sort(descending=True)
    kept = int((chances.cumsum(0) < 0.9).sum()) + 1
    wanted: collections.Counter[str] = collections.Counter()
    for chance, token in zip((chances[:kept] / chances[:kept].sum()).tolist(), tokens[:kept].tolist(), strict=True):
        wanted[tokenizer.decode([token], skip_special_tokens=True)] += chance
    assert kept > 5
    assert set(drawn) <= set(wanted)
    assert sum(abs(drawn[text] / 1000 - chance) for text, chance in wanted.items()) / 2 < 0.06


def test_a_killed_engine_fails_the_run_and_a_resume_makes_the_rest(model: Path, tmp_path: Path) -> None:
    """Killed in the middle, vLLM ends the run with its rows kept and its death said; a resume adds only what lacks."""
    questions = evaluating.save_questions(tmp_path / "many.jsonl", 60)
    how = {"engine": "vllm", "temperature": 1, "samples": 4, "max_new_tokens": 150, "batch_size": 4}
    run = evaluating.make(model, questions, **how)
    evaluating.start(run)
    until(lambda: len(evaluating.made(run)) >= 8, within_s=200)
    worker = durable.load_json(machine.there(run).attempt(1).pids)["worker"]["pid"]
    copy = next(pid for pid in processes.descendants(worker) if marked(pid))
    os.kill(copy, signal.SIGKILL)
    seal = machine.ended(run, within_s=60)
    assert (seal.reason, seal.kind) == ("failed", "engine")
    assert "SIGKILL" in seal.message
    assert "Rows so far are kept" in seal.message
    before = evaluating.made(run)
    assert 8 <= len(before) < 240
    assert not processes.marked(str(machine.there(run).folder))
    assert evaluating.finish(run).reason == "done"
    after = evaluating.made(run)
    assert len(after) == 240
    assert {key: after[key] for key in before} == before
    second = machine.there(run).attempt(2).rows.read_bytes().count(b"\n")
    assert second == 240 - len(before)


def marked(pid: int) -> bool:
    return f"\0{MARK}=".encode() in Path(f"/proc/{pid}/environ").read_bytes()


def test_what_vllm_cannot_load_is_said(model: Path, questions: Path, tmp_path: Path) -> None:
    """An adapter that vLLM has no room for ends the run with the reason, and is not tried again."""
    adapter = evaluating.save_adapter(model, tmp_path / "adapter", tmp_path / "merged")
    config = durable.load_json(adapter / "adapter_config.json")
    durable.save_json(adapter / "adapter_config.json", {**config, "r": 600})
    run = evaluating.make(model, questions, engine="vllm", adapter=adapter)
    seal = evaluating.finish(run)
    assert (seal.reason, seal.kind, seal.attempt) == ("failed", "config", 1)
    assert "up to rank 512; this one has 600" in seal.message


def test_an_engine_that_dies_by_itself_is_said(questions: Path, tmp_path: Path) -> None:
    """vLLM that fails at its first step, for heads it has no kernel for, ends the run; nothing of it is left."""
    run = evaluating.make(evaluating.save_model(tmp_path / "odd", hidden_size=96), questions, engine="vllm")
    seal = evaluating.finish(run)
    assert (seal.reason, seal.kind, seal.attempt) == ("failed", "engine", 1)
    assert "EngineDeadError" in seal.message
    assert "head_dim=24" in machine.log(run)
    assert not processes.marked(str(machine.there(run).folder))

"""An evaluation on this computer as its machine sees it: a small model and dataset, any engine, any Python."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model

from jobs import durable, rows, rundir, spec
from orchestrator import agents, config, machines, runs
from orchestrator.runs import Record, Run
from tests.worker import machine
from tests.worker.tiny_models import CHATML, SIZES, tokenizer
from worker import evaluate

PYTHON_OF_VLLM = os.environ.get("GPU_VLLM_PYTHON", "")
"""A Python that has vLLM's build for processors; `scripts/test --all` makes one."""
OF_VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
WIDER = {**SIZES, "hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 512}
"""Heads of 32: vLLM's kernels for processors know none that are smaller."""


def save_model(folder: Path, **sizes: Any) -> Path:
    """A random model of 0.2 million parameters with a chat template, the same at every call."""
    import torch
    import transformers

    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**WIDER, **sizes}))
    own = {"eos_token_id": 2, "do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 2.0}
    made.generation_config.update(**own)  # of which engines take the end token, and nothing else
    made.save_pretrained(folder)
    tokenizer(chat_template=CHATML).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, merged: Path) -> Path:
    """A random LoRA adapter for that model; and the model with it merged into its weights, in `merged`."""
    import torch
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    how = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers what is deprecated there
        wrapped = get_peft_model(model, how)
    wrapped.save_pretrained(folder)
    wrapped.merge_and_unload().save_pretrained(merged)
    tokenizer(chat_template=CHATML).save_pretrained(merged)
    return folder


def save_questions(path: Path, count: int) -> Path:
    """So many questions, of different lengths."""
    lines = [
        {"question": f"What is {number} + {number}?" + " Think." * (number % 5), "answer": f"#### {2 * number}"}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make(model: Path | str, dataset: Path, of: str = "eval-gsm8k", **params: Any) -> Run:
    """A run of that job, its parameters as typed but for these, not started yet."""
    job = spec.load(spec.CATALOG / f"{of}.toml")
    settings = {"model": str(model), "dataset": str(dataset), "temperature": "0", "samples": "1", "top_p": "1"}
    settings |= {"max_new_tokens": "24", "dtype": "float32"}
    settings = {name: value for name, value in settings.items() if name in job.parameters}
    values = job.fill(settings | {name: str(value) for name, value in params.items()})
    run_id = runs.new_run_id(job.name, None)
    document = {"schema": spec.SCHEMA, "run_id": run_id, "job": job.name, "story": job.story, "task": job.task}
    return begun(document | {"params": values, "limit": None})


def begun(document: dict[str, Any]) -> Run:
    """A run of any job, by its document, not started yet."""
    agent = agents.keep(config.state_folder() / "agents")
    record = Record(document["run_id"], document["job"], machines.LOCAL, agent, "python", str(Path.cwd()), "2026-01-01")
    run = runs.create(record, document)
    machines.this_computer().push_agent(config.state_folder() / "agents", agent)
    machine.there(run).folder.mkdir(parents=True)
    return run


def start(run: Run, **order: Any) -> None:
    """Start its next attempt; vLLM's Python where its engine is vLLM."""
    if run.job()["params"].get("engine") == "vllm":
        order = {"python": PYTHON_OF_VLLM, **order, "env": {**os.environ, **OF_VLLM, **order.get("env", {})}}
    done = machine.start(run, machine.there(run).last_attempt(), **order)
    assert done["started"], done


def finish(run: Run, **order: Any) -> rundir.Seal:
    """Start its next attempt and wait for its end."""
    start(run, **order)
    return machine.ended(run, within_s=240.0)


def done_here(run: Run) -> Run:
    """The run done by this process, which has its libraries imported already."""
    there = machine.there(run)
    durable.save_json(there.job, run.job())
    there.attempt(1).folder.mkdir(parents=True)
    durable.save_json(there.current, {"attempt": 1})
    evaluate.work(there, there.attempt(1), run.job())
    return run


def made(run: Run) -> dict[str, rows.Row]:
    """Its rows so far, by key."""
    return {row["key"]: row for row in rows.read(machine.there(run).row_files())}


def texts(run: Run) -> dict[str, tuple[str, str, int]]:
    """Of each row what an engine made: the text, why it ended, and its tokens."""
    return {key: (row["completion"], row["finish_reason"], row["tokens_out"]) for key, row in made(run).items()}

"""What is noticed before and during generation: prompts, changed inputs, and a score out of range."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import durable, rows
from orchestrator import machines, runs

GPU = [sys.executable, "-m", "orchestrator.cli"]
PROBLEM = '{{"question": "Tom has {0} apples and buys 2 more. How many now?", "answer": "#### {1}"}}\n'


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=200)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_a_dry_run_checks_prompts_and_keeps_nothing() -> None:
    """`--dry-run` shows the first prompt as sent, trains and generates nothing, and leaves no run behind."""
    done = gpu("run", "eval-gsm8k", "--dry-run", "--limit", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["examples"] == 3
    assert found["rows_total"] == 15
    assert found["findings"] == []
    assert "<|im_start|>assistant" in found["first_prompt"]
    assert list(runs.remembered()) == []
    assert not list(Path.cwd().parent.rglob("*.safetensors"))


def test_an_overflowing_request_is_refused_with_what_fits() -> None:
    """More new tokens than the context holds end a dry run and a run with exit code 3, naming the context's length."""
    done = gpu("run", "eval-gsm8k", "--dry-run", "--limit", "3", "--set", "max_new_tokens=5000")
    assert done.returncode == 3
    assert "2048" in done.stdout.replace(",", "")


@pytest.mark.slow
def test_a_template_without_generation_prompt_is_an_error_where_none_is_a_choice(trained: None) -> None:
    """A template that opens no assistant turn stops the run; `chat_template=none` is taken, and stands in the rows."""
    Path("t.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
        encoding="utf-8",
    )
    refused = gpu("run", "eval-gsm8k", "-q", "--limit", "1", "--set", "chat_template=t.jinja")
    assert refused.returncode == 3, refused.stderr
    none = gpu("run", "eval-gsm8k", "-q", "--limit", "1", "--set", "chat_template=none", "--set", "max_new_tokens=20")
    assert none.returncode == 0, none.stderr
    run = runs.find(None)
    row = next(iter(rows.read([run.home.rows])))
    assert "prompt" in row
    assert "messages" not in row
    assert durable.load_json(run.home.summary)["resolved"]["identity"]["template_digest"] == "none"


@pytest.mark.slow
def test_a_score_out_of_range_stops_the_run_and_a_resume_goes_on(trained: None) -> None:
    """`expect` stops a run that surely lies outside, shows completions, and keeps its rows; a resume finishes it."""
    done = gpu("run", "eval-gsm8k", "-q", "--limit", "100", "--set", "expect=0.0..0.05", "--set", "batch_size=8")
    assert done.returncode == 10, done.stderr
    assert "outside the expected 0..0.05" in done.stderr
    assert done.stderr.count("- gsm8k/test/") == 5
    run = runs.find(None)
    before = run.record.rows_home
    assert 0 < before < 500
    assert gpu("resume", "-q").returncode == 0
    run.reload()
    assert run.record.state == "sealed"
    assert run.record.rows_home == 500


@pytest.mark.slow
def test_a_resume_with_another_dataset_explains_and_stops(trained: None) -> None:
    """When the dataset changed since the run began, a resume names what differs and keeps the rows."""
    path = Path("data.jsonl")
    path.write_text("".join(PROBLEM.format(n, n + 2) for n in range(1, 5)), encoding="utf-8")
    assert gpu("run", "eval-gsm8k", "-q", "--set", "dataset=data.jsonl", "--set", "samples=1").returncode == 0
    run = runs.find(None)
    before = run.home.rows.read_bytes()
    path.write_text("".join(PROBLEM.format(n, n + 2) for n in range(1, 9)), encoding="utf-8")
    run.save(state="stopped")
    done = gpu("resume", "-q")
    assert done.returncode == 3, done.stderr
    assert "dataset_digest was" in done.stderr
    assert run.home.rows.read_bytes() == before


@pytest.mark.slow
def test_the_trained_model_travels_with_its_run(trained: None) -> None:
    """Where the machine has lost run and model, a resume takes both from home: nothing is trained, one fingerprint."""
    assert gpu("run", "eval-gsm8k", "-q", "--limit", "2", "--set", "samples=1").returncode == 0
    run = runs.find(None)
    before = durable.load_json(run.home.summary)["fingerprint"]
    run.save(state="stopped")
    for name in ("models", "runs"):
        shutil.rmtree(machines.this_computer().root / name)
    done = gpu("resume", "-q")
    assert done.returncode == 0, done.stderr
    assert durable.load_json(run.home.summary)["fingerprint"] == before
    assert not (machines.this_computer().root / "models").exists(), "nothing was trained"


@pytest.mark.slow
def test_worked_examples_come_from_where_they_are_said_to() -> None:
    """`shots` puts the first k worked examples of `shots_dataset` before every prompt; without one, a file has none."""
    Path("test.jsonl").write_text(PROBLEM.format(1, 3), encoding="utf-8")
    solved = '{"question": "Ann has %d pens. How many?", "answer": "She has <<%d=%d>>%d pens.\\n#### %d"}\n'
    Path("train.jsonl").write_text("".join(solved % ((n,) * 5) for n in range(5, 9)), encoding="utf-8")
    words = ["run", "eval-gsm8k", "--dry-run", "--json", "--set", "dataset=test.jsonl", "--set", "shots=2"]
    refused = gpu(*words)
    assert refused.returncode == 3
    assert "shots_dataset=train.jsonl" in refused.stderr
    done = gpu(*words, "--set", "shots_dataset=train.jsonl")
    assert done.returncode == 0, done.stderr
    prompt = json.loads(done.stdout)["first_prompt"]
    places = [prompt.index(words) for words in ("Ann has 5", "She has 5", "Ann has 6", "She has 6", "Tom has 1 apples")]
    assert places == sorted(places)
    assert "Ann has 7" not in prompt
    assert "<<" not in prompt.split("\n", 1)[1]

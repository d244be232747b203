"""`gpu run train-lora` from the command line: killed, stopped, moved to another machine, and its adapter put to use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rows, rundir
from orchestrator import machines, runs, training
from orchestrator.runs import Run
from tests.conftest import free_copy
from tests.rig import Sshd
from tests.waiting import until
from worker import problems

GPU = [sys.executable, "-m", "orchestrator.cli"]
SETTINGS = {"dataset": "rows.jsonl", "lr": 0.005, "accumulation": 2, "dropout": 0.1, "save_every": 20}
KEPT = ("step", "loss", "grad_norm", "lr", "tokens", "targets", "epoch")


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread a process, as a small model wants it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _rows() -> None:
    """Forty conversations in a file of the user's, and two rows that teach nothing."""
    made = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in problems.records("train")[:40]
    ]
    made += [{"messages": [{"role": "user", "content": "And?"}]}] * 2
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def words(*more: str, **settings: object) -> list[str]:
    pairs = [f"{key}={value}" for key, value in {**SETTINGS, **settings}.items()]
    return ["run", "train-lora", *(part for pair in pairs for part in ("--set", pair)), *more]


def gpu(*said: str) -> str:
    done = subprocess.run([*GPU, *said], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def begun(*said: str) -> tuple[subprocess.Popen[bytes], Run]:
    """A command that has begun a run, and the run."""
    command = subprocess.Popen([*GPU, *said], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return command, until(lambda: next(iter(runs.remembered()), None), 60)


def on_this_computer(run: Run) -> rundir.Run:
    return rundir.Run(machines.this_computer().root / "runs" / run.run_id)


def steps_in(folder: rundir.Run) -> int:
    return sum(each.steps.read_bytes().count(b"\n") for each in folder.attempts() if each.steps.exists())


def essence(run: Run) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in KEPT) for line in training.steps(run)]


def calm(**settings: object) -> tuple[list[tuple[Any, ...]], bytes]:
    """Steps and adapter of a run that nobody disturbs, then forgotten."""
    run = runs.open_folder(Path("results") / gpu(*words("-q", **settings)).split()[0])
    found = essence(run), (run.home.adapter / "adapter_model.safetensors").read_bytes()
    run.home.folder.rename("calm")
    (runs.config.state_folder() / "runs").rename("calm-book")
    return found


def test_a_training_comes_home_and_its_adapter_is_put_to_use(trained: None) -> None:
    """Rows shown with targets, steps and losses at home, an adapter that an evaluation takes by its path."""
    said = gpu(*words(steps=12, eval_rows=4, eval_every=6, patience=2, merge="true", verify_resume="true"))
    run = next(runs.remembered())
    assert "12 of 12 steps" in said
    assert "2 rows are left out: no turn of the assistant" in said
    log = run.home.machine("local").attempt(1).log.read_text()
    assert "<|im_start|>assistant\n【" in log
    summary = json.loads(gpu("report", "--json"))
    assert summary["training"]["steps_done"] == summary["training"]["steps_total"] == 12
    assert len(summary["training"]["curve"]) == 12
    assert [step for step, _ in summary["training"]["eval_curve"]] == [6, 12]
    assert summary["training"]["verify_resume"]["words"] == "resumed bit by bit the same"
    assert rundir.damage(run.home.merged) is None
    losses = dict(summary["training"]["eval_curve"])
    assert losses[summary["training"]["best_step"]] == summary["training"]["best_eval_loss"] == min(losses.values())
    assert f"The adapter is that of step {summary['training']['best_step']}, the best" in gpu("report")
    assert f"--set model={run.home.merged})" in gpu("report")
    assert "Loss" in run.home.report.read_text()
    document = json.loads(gpu("runs", "--json"))[0]
    assert (document["steps_done"], document["steps_total"], document["state"]) == (12, 12, "sealed")
    adapter = str(run.home.adapter)
    gpu("run", "eval-gsm8k", "--set", f"adapter={adapter}", "--set", "samples=1", "--limit", "4", "-q")
    evaluated = json.loads(gpu("report", "--json"))
    assert evaluated["n_rows"] == 4
    assert evaluated["resolved"]["identity"]["adapter_digest"].startswith("sha256:")


@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_if_left_alone(trained: None) -> None:
    """The worker is killed, then everything; what is resumed makes the same steps and the same adapter."""
    expected = calm(steps=60)
    command, run = begun(*words("-q", steps=60))
    here = on_this_computer(run)
    until(lambda: here.checkpoints(), 90)
    pids = durable.load_json(here.attempt(1).pids)
    os.kill(pids["worker"]["pid"], signal.SIGKILL)
    until(lambda: here.last_attempt() == 2 and here.attempt(2).steps.exists(), 90)
    pids = durable.load_json(here.attempt(2).pids)
    for pid in (command.pid, pids["supervisor"]["pid"], pids["worker"]["pid"]):
        os.kill(pid, signal.SIGKILL)
    command.wait()
    gpu("resume", "-q")
    run.reload()
    assert run.record.state == "sealed"
    assert "going on from checkpoint-" in here.attempt(3).log.read_text()
    assert essence(run) == expected[0]
    assert (run.home.adapter / "adapter_model.safetensors").read_bytes() == expected[1]


@pytest.mark.slow
def test_stopped_it_saves_and_goes_on_on_another_machine(trained: None, models: Path, box: Callable[..., Sshd]) -> None:
    """`gpu stop` saves at once; the checkpoint is home, travels to the next machine, and nothing is done twice."""
    expected = calm(steps=150, save_every=1000)
    there = box("box")
    free_copy(models, there.home / ".gpu" / "models")
    command, run = begun(*words("-q", "--on", "local", steps=150, save_every=1000))
    here = on_this_computer(run)
    until(lambda: steps_in(here) > 5, 90)
    gpu("stop", run.run_id, "--grace", "60")
    command.wait()
    [saved] = run.home.machine("local").checkpoints()
    assert rundir.damage(saved) is None
    gpu("resume", "-q", "--on", "box")
    run.reload()
    assert (run.record.state, run.record.machine) == ("sealed", "box")
    [first] = [rows.decode(line) for _, line in rows.whole_lines(run.home.machine("box").attempt(1).steps)][:1]
    assert first["step"] == (rundir.checkpoint_number(saved.name) or (0, 0))[0] + 1
    assert essence(run) == expected[0]
    assert (run.home.adapter / "adapter_model.safetensors").read_bytes() == expected[1]


def test_a_dry_run_shows_what_would_be_learned() -> None:
    """Without a model: the first row with its targets marked, how many rows and steps, and what is left out."""
    said = gpu(*words("--dry-run"))
    assert "【" in said
    assert "40 examples, 40 steps to make." in said
    assert "2 rows are left out" in said


def test_rows_that_teach_nothing_are_refused_above_a_share(trained: None) -> None:
    """More than the share allowed ends the run before a model loads, with the reasons counted."""
    done = subprocess.run([*GPU, *words(left_out=0.01)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 3
    assert "Of 42 rows 2 cannot be learned from (2 rows: no turn of the assistant (row 41, 42))" in done.stderr

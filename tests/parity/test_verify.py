"""`gpu verify` from end to end: the built-in model by us and by lm-evaluation-harness 0.4.13, on the same records."""

from __future__ import annotations

import json

import pytest

from jobs import rows, rundir
from orchestrator import config
from tests.journeys.hurried import document, gpu
from tests.parity import likelihoods

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("trained")]


@pytest.fixture(autouse=True)
def _harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_PARITY_PYTHON", likelihoods.python())


@pytest.mark.parametrize("task", ["gsm8k", "hellaswag", "mmlu"])
def test_the_built_in_model_agrees(task: str) -> None:
    """Prompts, answers, scores, and texts or log-likelihoods of 20 items are the harness's."""
    found = document("verify", "--task", task, "--limit", "20", timeout=600)
    assert (found["n"], found["agree"], found["disagreements"]) == (20, True, [])
    assert set(found["same"].values()) == {20}
    assert task == "gsm8k" or 0 <= found["max_loglik_difference"] < 1e-3


def test_a_row_that_says_something_else_is_found() -> None:
    """ARC agrees with code 0; with one prediction changed in the run's rows, that item is named, with code 10."""
    found = document("verify", "--task", "arc", "--limit", "12", timeout=600)
    assert found["agree"]
    run = rundir.Run(config.state_folder() / "machines" / "local" / "runs" / found["run_id"])
    path = run.attempt(1).rows
    made = [rows.decode(line) for _, line in rows.whole_lines(path)]
    made[5]["prediction"] = (made[5]["prediction"] + 1) % 4
    path.write_bytes(b"".join(map(rows.encode, made)))
    done = gpu("verify", "--run", found["run_id"], "--json", timeout=600)
    assert done.returncode == 10, done.stderr
    (other,) = json.loads(done.stdout)["disagreements"]
    assert (other["example_id"], other["differs"]) == (made[5]["example_id"], ["answer"])

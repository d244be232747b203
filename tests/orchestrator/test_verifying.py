"""`gpu verify` before and after the harness works: what is refused, what to install, and how agreement is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import verifying
from orchestrator.cli import verify
from tests.journeys.hurried import gpu
from tests.orchestrator import keeping

FOUND = {
    "run_id": "20261120-eval-arc-tiny-3f9c",
    "task": "arc",
    "harness": "0.4.13",
    "n": 2,
    "agree": False,
    "same": {"prompt": 2, "answer": 1, "score": 2, "loglik": 1},
    "max_loglik_difference": 0.25,
    "disagreements": [
        {
            "example_id": "q\x1b[31m1",
            "differs": ["answer", "loglik"],
            "ours": {"answer": 1, "logliks": [-1.0, -0.75]},
            "theirs": {"answer": 0, "logliks": [-1.0, -1.0], "text": "x" * 500},
        }
    ],
}


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(verifying.PYTHON_VARIABLE, raising=False)


@pytest.mark.parametrize("named", ["option", "environment", "nothing", "no interpreter"])
def test_a_missing_harness_is_said_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """Code 3, nothing started, and a command for that very interpreter; a path with spaces is quoted in it."""
    own = tmp_path / "my env" / "python"
    own.parent.mkdir()
    own.symlink_to("/bin/true")
    given = {"option": str(own), "no interpreter": str(tmp_path / "none")}.get(named)
    if named == "environment":
        monkeypatch.setenv(verifying.PYTHON_VARIABLE, str(own))
    done = gpu("verify", "--task", "arc", *(("--harness", given) if given else ()))
    assert done.returncode == 3
    assert "Nothing was started" in done.stderr
    if named in ("option", "environment"):
        assert f"Install it: '{own}' -m pip install 'lm_eval[hf]==0.4.13'" in done.stderr
    else:
        assert "python3 -m venv harness && harness/bin/python -m pip install 'lm_eval[hf]==0.4.13'" in done.stderr
    assert not Path("results").exists()


def test_another_version_of_the_harness_is_not_the_reference(tmp_path: Path) -> None:
    """An lm_eval of another version is named, and refused."""
    here = Path(sys.executable)
    other = tmp_path / "python"
    packages = tmp_path / "packages"
    (packages / "lm_eval-0.4.2.dist-info").mkdir(parents=True)
    (packages / "lm_eval-0.4.2.dist-info" / "METADATA").write_text("Name: lm_eval\nVersion: 0.4.2\n")
    for name in ("torch", "transformers"):
        (packages / f"{name}.py").write_text("")
    other.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={packages} exec {here} "$@"\n')
    other.chmod(0o755)
    done = gpu("verify", "--task", "arc", "--harness", str(other))
    assert done.returncode == 3
    assert "lm_eval is 0.4.2 there" in done.stderr


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("gsm8k", {"temperature": "0.7"}),
        ("gsm8k", {"samples": "5"}),
        ("arc", {"chat_template": "auto"}),
        ("gsm8k", {"engine": "openai", "base_url": "https://host/v1", "model": "m"}),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(task: str, settings: dict[str, str]) -> None:
    """Sampled completions, a chat template for choices, a model that is elsewhere: no run is made."""
    with pytest.raises(verifying.UsageError, match="Nothing was started"):
        verifying.begin(task, settings, 10)
    assert not Path("results").exists()


def test_a_run_to_verify_has_defaults_that_can_be_compared() -> None:
    """Greedy and in 32 bits, unless another number type is asked for."""
    params = verifying.begin("gsm8k", {"dtype": "bfloat16"}, 7).job()["params"]
    assert (params["samples"], params["temperature"], params["dtype"]) == (1, 0.0, "bfloat16")
    assert verifying.begin("mmlu", {}, 7).job()["params"]["dtype"] == "float32"


def test_only_a_run_that_has_ended_here_is_compared() -> None:
    """One that did not end, or ended elsewhere, is a wrong usage; so is saying both or neither of task and run."""
    for run in (keeping.begun(), keeping.ended(keeping.begun(machine="box"))):
        with pytest.raises(verifying.UsageError, match="has ended on this computer"):
            verifying.compare(run, sys.executable)
    assert gpu("verify").returncode == 2
    assert gpu("verify", "--task", "arc", "--run", "x").returncode == 2


def test_what_does_not_agree_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Counts, the largest distance, and both sides of each example that differs, harmless and cut to size."""
    verify._show(FOUND)
    said = capsys.readouterr().out
    assert "2 prompts" in said
    assert "at most 0.25 nats apart" in said
    assert "q1: other answers, log-likelihoods" in said
    assert "  ours    answer 1; logliks [-1.0, -0.75]" in said
    assert "They do not agree." in said
    assert "x" * 300 not in said
    assert json.dumps(FOUND)


def agreed(**change: Any) -> dict[str, Any]:
    return {**FOUND, "agree": True, "disagreements": [], **change}


def test_agreement_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a difference there is nothing to list, and without log-likelihoods no distance."""
    verify._show(agreed(max_loglik_difference=None))
    said = capsys.readouterr().out
    assert said.endswith("They agree.\n")
    assert "nats" not in said

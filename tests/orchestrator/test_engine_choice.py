"""What the engine that was asked for means on the laptop: an environment, a secret, and nothing to fetch or to size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from jobs import engines, spec
from orchestrator import planning, preflight
from orchestrator.runs import Run
from tests.journeys.hurried import document, gpu
from tests.rig import Sshd

JOB = spec.load(spec.CATALOG / "eval-gsm8k.toml")
ELSEWHERE = {"engine": "openai", "base_url": "https://host/v1", "model": "no/such-model-anywhere"}


def begun(settings: dict[str, str], **how: str) -> Run:
    asked = planning.Asked(machine="box", settings=settings, **how)
    return planning.begin(planning.request(asked, JOB), asked, JOB, lambda _: None)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "train"),
        ({"engine": "hf"}, "train"),
        ({"engine": "vllm"}, "serve"),
        ({"engine": "openai", "server": "vllm serve {model} --port {port}"}, "serve"),
        (ELSEWHERE, "train"),
    ],
)
def test_a_machine_makes_the_environment_that_the_engine_needs(settings: dict[str, str], kind: str) -> None:
    """vLLM, in the worker or as a server, is installed by the kind `serve`; what was typed goes before."""
    assert begun(settings).record.environment == kind
    assert begun(settings, environment="train").record.environment == "train"


def test_the_key_of_a_server_goes_along_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run behind a server gets OPENAI_API_KEY where it is set; its value is in no file here."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    run = begun(ELSEWHERE)
    assert run.record.env_names == ["OPENAI_API_KEY"]
    for path in run.home.folder.rglob("*"):
        assert not path.is_file() or b"sk-canary" not in path.read_bytes()
    assert begun({}).record.env_names == []
    monkeypatch.delenv("OPENAI_API_KEY")
    assert begun(ELSEWHERE).record.env_names == []


def test_nothing_is_looked_up_of_a_model_that_is_elsewhere() -> None:
    """Before renting, the model of a server elsewhere is neither asked for nor made room for."""
    asked = planning.request(planning.Asked(machine="box", settings=ELSEWHERE), JOB)
    assert preflight.look(asked) == preflight.Preflight()


WEIGHING = spec.load(spec.CATALOG / "eval-arc.toml")


@pytest.mark.parametrize(
    ("params", "environment", "python", "name", "words"),
    [
        ({"engine": "auto", "temperature": 0.0}, None, None, "hf", "has no vLLM; it gets one by --set engine=vllm"),
        ({"engine": "auto", "temperature": 0.0}, None, "/opt/py", None, "vllm if /opt/py has it"),
        ({"engine": "auto", "temperature": 0.0}, "serve", None, None, "vllm, of the environment serve"),
        ({"engine": "vllm", "temperature": 0.0}, "serve", None, "vllm", "as asked for"),
        (WEIGHING.fill({}), None, "/opt/py", "hf", "weighed by transformers"),
    ],
)
def test_what_auto_will_be_is_told_before_anything_starts(
    params: dict[str, Any], environment: str | None, python: str | None, name: str | None, words: str
) -> None:
    """Of a machine that nobody looks at, what is sure is named, and what depends on it is said with what it takes."""
    found = engines.expected(params, environment, python)
    assert found
    assert found["name"] == name
    assert words in str(found["why"])
    assert engines.expected({"lr": 1e-4}, None, None) is None


@pytest.mark.slow
def test_a_dry_run_says_the_engine_there(box: Callable[..., Sshd]) -> None:
    """On a machine with a Python of its own `auto` may be vLLM; on this computer it is what is installed here."""
    box("box")
    words = ("run", "eval-gsm8k", "--limit", "2", "--dry-run")
    there = document(*words, "--on", "box")["engine"]
    assert there == {
        "name": None,
        "why": f"The engine will be vllm if {sys.executable} has it and the run has a CUDA GPU, else hf",
    }
    assert "The engine will be hf" in gpu(*words, "--on", "local").stdout

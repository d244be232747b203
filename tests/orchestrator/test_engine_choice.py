"""What the engine that was asked for means on the laptop: an environment, a secret, and nothing to fetch or to size."""

from __future__ import annotations

import pytest

from jobs import spec
from orchestrator import planning, preflight
from orchestrator.runs import Run

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
    document = planning.request(planning.Asked(machine="box", settings=ELSEWHERE), JOB)
    assert preflight.look(document) == preflight.Preflight()

"""`gpu run speed`, and what a training's memory says before a machine is rented, as they are typed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cloud import Cloud
from tests.journeys.hurried import gpu
from tests.orchestrator import playing_hub
from tests.orchestrator.playing_hub import instruct_8b

NAME = "maker/chat-8b"
MODEL = ("--set", f"model={NAME}", "--set", "dataset=generated")
SHORT = ("--set", "steps=3", "--set", "warm_steps=1", "--set", "batch_tokens=128", "--set", "max_length=64")


@pytest.fixture
def _hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub with one instruction model of 8 billion parameters."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with playing_hub.running() as server:
        server.repositories[NAME] = instruct_8b()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield


@pytest.mark.slow
def test_a_measurement_comes_home_with_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdict, memory and hours are printed, stand in summary.json and on the page; without a key nothing is priced."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = gpu("run", "speed", *SHORT, "--set", "total_tokens=1000000")
    assert done.returncode == 0, done.stderr
    assert "verdict" in done.stdout
    assert "h for 1000000 tokens" in done.stdout
    assert "FITS" not in done.stdout
    summary = json.loads(gpu("report", "--json").stdout)
    assert summary["speed"]["steps_counted"] == 2
    assert summary["speed"]["verdict"] == "go"
    assert 0.8 < summary["speed"]["formula_of_held"] < 1.2
    assert summary["state"] == "sealed"


@pytest.mark.usefixtures("_hub")
def test_a_training_says_where_it_fits_before_anything_is_rented(light_cloud: Cloud) -> None:
    """What it takes, the GPUs it fits on with their prices, and those that are too small; nothing is rented."""
    done = gpu("run", "train-qlora", *MODEL, "--gpu", "A100", "--dry-run")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "Training it at 4096 tokens a micro-batch takes 11.7 GB (weights 5.7, adapter 1.7" in said
    assert "% of A100 SXM4 40 GB: 1.29 USD/h (lambda)" in said
    assert light_cloud.core.still_billing() == []


@pytest.mark.usefixtures("_hub")
@pytest.mark.parametrize("more", [("--dry-run",), ("-y",)])
def test_a_training_that_does_not_fit_is_refused_with_what_would(light_cloud: Cloud, more: tuple[str, ...]) -> None:
    """LoRA of 8B at 8,192 tokens on an A10: refused, dry run or not, with settings that fit there."""
    done = gpu("run", "train-lora", *MODEL, "--set", "batch_tokens=8192", "--gpu", "A10", *more)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "has 24 GB. Nothing was rented." in done.stderr
    assert "--set activation_checkpointing=true --set quantization=nf4 (11.6 GB)" in done.stderr
    assert light_cloud.core.still_billing() == []

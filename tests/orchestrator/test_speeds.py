"""Figures of a speed measurement as they are counted at home: of one attempt, from whatever a machine sent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rows
from jobs.decoders import Shape
from jobs.training_memory import Recipe
from orchestrator import gpus, planning, speeds
from orchestrator.runs import Run
from tests.orchestrator.playing_hub import LLAMA_8B
from tests.orchestrator.test_preflight import offer

SHAPE = Shape.of(LLAMA_8B)
assert SHAPE is not None
ABOUT: dict[str, Any] = {
    "device": "H100\x1b[31m",
    "kind": "cuda",
    "peak_flops": 700e12,
    "copied": 2.6e12,
    "has_bytes": 80e9,
    "shape": asdict(SHAPE),
    "recipe": asdict(Recipe(4096, quantization="nf4", activation_checkpointing=True)),
    "micros": 4,
    "length": 500.0,
    "total_tokens": 320_000_000,
    "limits": {"go_s": 5.0, "usable_s": 30.0, "pivot_s": 60.0},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that is home, or will be."""
    from jobs import spec

    monkeypatch.chdir(tmp_path)
    job = spec.find("speed", [spec.CATALOG])
    asked = planning.Asked("local", {})
    return planning.begin(planning.request(asked, job), asked, job, lambda _: None)


def attempt(run: Run, number: int, seconds: float, about: Any = ABOUT, **changes: Any) -> None:
    """An attempt that came home, of three steps that took so long each; the first does not count."""
    made = run.home.machine("local").attempt(number)
    durable.have_folder(made.folder)
    made.env.write_text(json.dumps({"speed": about}))
    with rows.Appender(made.steps) as out:
        for step in (1, 2, 3):
            took = 9 * seconds if step == 1 else seconds
            line = {"key": f"step/{step}", "error": None, "step": step, "tokens": 12_000, "targets": 6000}
            line |= {"slots": 16_384, "slots_most": 4096, "tokens_per_second": 12_000 / took, "warm": step == 1}
            out.append({**line, "memory_bytes": 15_000_000_000, "held_bytes": 8_000_000_000, **changes})


def test_only_the_newest_attempt_counts_and_no_warm_step(run: Run) -> None:
    """Two seconds a step, whatever the attempt before took; hours and verdict follow."""
    attempt(run, 1, 100.0)
    attempt(run, 2, 2.0)
    found = speeds.summarise(run)
    assert found["seconds_per_step"] == pytest.approx(2.0)
    assert (found["steps_done"], found["steps_counted"], found["verdict"]) == (3, 2, "go")
    assert found["hours"] == pytest.approx(320e6 / 6000 / 3600)
    assert found["padding"] == pytest.approx(1 - 12_000 / 16_384)
    assert 0.9 < found["formula_of_held"] < 1.1
    said = dict(speeds.facts(found))
    assert "\x1b" not in said["device"]
    assert said["best change"].startswith("--set activation_checkpointing=false")
    assert said["whole training"].startswith("14.8 h for 320000000 tokens")


@pytest.mark.parametrize(
    ("about", "changes"),
    [
        ({}, {}),
        ({**ABOUT, "shape": {"layers": "many"}}, {}),
        ({**ABOUT, "peak_flops": 0}, {}),
        ({**ABOUT, "micros": 0}, {}),
        ({**ABOUT, "recipe": {"tokens": 1, "dtype": "float3"}}, {}),
        (ABOUT, {"tokens_per_second": 0}),
        (ABOUT, {"slots": "many"}),
    ],
)
def test_a_machine_that_sends_nonsense_breaks_nothing(run: Run, about: Any, changes: dict[str, Any]) -> None:
    """Nothing is counted then, and nothing raised."""
    attempt(run, 1, 2.0, about, **changes)
    assert speeds.summarise(run) == {"steps_done": 0}
    assert speeds.facts({"steps_done": 0}) == []


def test_offers_are_priced_by_the_share_that_was_reached(run: Run) -> None:
    """An A100 has 312 TFLOP/s where the H100 here did 700: hours grow as much; what does not fit has no price."""
    attempt(run, 1, 2.0)
    found = speeds.summarise(run)
    large, small = offer(80.0), offer(10.0)
    lines = speeds.priced(found, [_named(large, "A100 SXM4", 2.0), _named(small, "RTX 4090", 0.5)])
    assert [line[:2] for line in lines] == [["RTX 4090 10 GB", "no"], ["A100 SXM4 80 GB", "yes"]]
    hours = found["hours"] * 700e12 / 312e12
    assert float(lines[1][2]) == pytest.approx(hours, rel=0.01)
    assert float(lines[1][3]) == pytest.approx(2 * hours, rel=0.01)


def _named(one: Any, gpu: str, price: float) -> Any:
    return type(one)(**{**asdict(one), "gpu": gpu, "price_usd_per_hour": price})


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("A100 SXM4", 312), ("H100 PCIe", 756), ("H100 SXM5", 989), ("RTX 4090", 165), ("L40S", 362), ("L4", 121)],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name: str, tflops: float) -> None:
    """As clouds spell them; a card that is not listed has none."""
    assert gpus.peak_flops(name) == tflops * 1e12
    assert gpus.peak_flops("Tesla P40") is None

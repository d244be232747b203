"""The command line that a run's folder tells: what it says, typed into a shell, asks for the same again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import planning, retyping
from tests.journeys.hurried import gpu
from tests.orchestrator import keeping


def told(run: Any) -> str:
    return retyping.line(run, run.job())


@pytest.mark.parametrize(
    ("settings", "how", "words"),
    [
        ({}, {}, ""),
        ({"samples": "3", "temperature": "0.2"}, {"limit": 20}, " --set samples=3 --set temperature=0.2 --limit 20"),
        ({"trust_remote_code": "yes"}, {"queue": True, "gpus": 1}, " --set trust_remote_code=true --gpus 1 --queue"),
        ({"model": "a | $(touch x)"}, {}, " --set 'model=a | $(touch x)'"),
        ({}, {"terminate": True, "keep_on_failure": 7.5}, " --terminate --keep-on-failure 7.5"),
        ({}, {"environment": "serve"}, " --environment serve"),
    ],
)
def test_only_what_is_not_the_default_is_typed(settings: dict[str, str], how: dict[str, Any], words: str) -> None:
    """Settings as typed, options after them; whatever a shell would act on is quoted."""
    where = {"machine": "box"} if "environment" in how else {}
    run = keeping.begun(settings, **how, **where)
    assert told(run) == f"gpu run eval-gsm8k --on {run.record.machine}{words}"


def test_the_line_is_read_by_a_shell_as_it_was_asked() -> None:
    """Quotes, lines, control characters and a dollar come out of bash exactly as they went in."""
    words = ["it's", "a\nb", "$HOME `id` \\ \x1b[31m", "caf\udce9", "é\u202e", "", "--", "*"]
    code = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    line = " ".join(map(retyping.quoted, [sys.executable, "-c", code, *words]))
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert [part.decode("utf-8", "surrogateescape") for part in done.stdout.split(b"\0")] == words


def test_a_rented_run_says_what_was_asked_of_its_machine() -> None:
    """Need and caps become the options they came from; what is the default is left out, `none` is typed."""
    rents = {
        "need": {"gpu": "A100 80GB", "count": 2, "spot": True, "filters": {"reliability": "0.9"}},
        "caps": {"max_hours": 12.0, "idle_minutes": None, "budget_usd": 20.0},
        "provider": "vast",
        "python": None,
        "wait_capacity": False,
    }
    run = keeping.begun(machine="eval-gsm8k-tiny-1", rents=rents, machines=4)
    assert told(run) == (
        "gpu run eval-gsm8k --gpu 'A100 80GB' --count 2 --spot --filter reliability=0.9 --idle-minutes none "
        "--budget 20 --provider vast --machines 4"
    )


def test_a_command_is_told_with_what_it_brings_home() -> None:
    """A typed command stands after `--`, with its files, its needs and the names of its variables."""
    Path("weights.pt").write_text("w")
    job = planning.command(("python", "run.py", "--name", "two words"))
    asked = planning.Asked("local", {}, outs=("out/*.jsonl",), needs=("weights.pt",), env_names=("HOME",))
    run = planning.begin(planning.request(asked, job), asked, job, lambda _: None)
    assert told(run) == (
        "gpu run --on local --need weights.pt --out 'out/*.jsonl' --env HOME -- python run.py --name 'two words'"
    )


@pytest.mark.slow
def test_the_line_typed_again_asks_for_the_same() -> None:
    """`gpu run …` with the words of the line makes a dry run with the same parameters."""
    run = keeping.begun({"samples": "2", "dataset": "generated", "instruction": "Say it | 'so'\nnow."}, limit=1)
    line = f"printf '%s\\0' {told(run)}"
    said = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout.decode().split("\0")[1:-1]
    done = gpu(*said, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert "Say it | 'so'\\nnow." in done.stdout
    assert json.loads(done.stdout)["rows_total"] == 2

"""`gpu run baseline`: five benchmarks in one run that is kept as it was made, and compared with later ones."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from orchestrator import runs
from tests.journeys.hurried import document, gpu

TASKS = ["mmlu", "hellaswag", "gsm8k", "perplexity", "generation"]


@pytest.mark.slow
def test_a_baseline_is_made_without_a_network_and_kept(trained: None) -> None:
    """With no options but a limit: rows of five tasks, numbers of each, read-only files; a change since is told."""
    done = gpu("run", "baseline", "--limit", "4", timeout=280)
    assert done.returncode == 0, done.stderr
    run = runs.find(None)
    summed = json.loads(run.home.summary.read_text())
    assert list(summed["parts"]) == TASKS
    assert (summed["n_rows"], summed["scored"], summed["task"]) == (20, 20, None)
    heads = ["mmlu/acc", "hellaswag/acc_norm", "gsm8k/numeric", "perplexity/token_perplexity", "generation/sane"]
    assert list(summed["metrics"])[:5] == heads
    for task, name in (head.split("/") for head in heads):
        assert summed["metrics"][f"{task}/{name}"] == summed["parts"][task]["metrics"][name]
        assert summed["parts"][task]["n_examples"] == 4
    assert {task: line for line in done.stdout.splitlines() for task in TASKS if line.startswith(task)}.keys() == {
        *TASKS
    }
    assert "Mmlu/acc" in run.home.report.read_text()

    again = document("rescore", run.run_id, "--task", "gsm8k")
    assert (again["n"], again["rules"]["numeric"]["scored"]) == (4, 4)
    assert "has no part" in gpu("rescore", run.run_id, "--task", "arc").stderr

    assert summed["frozen"]["changed"] == []
    kept = run.home.rows.read_bytes()
    for path in (run.home.rows, run.home.frozen):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o222, path
    run.home.rows.chmod(0o600)
    run.home.rows.write_bytes(kept.split(b"\n", 1)[1])
    again = document("report")
    assert again["frozen"]["changed"] == ["rows.jsonl"]
    assert again["n_rows"] == 19
    assert gpu("pull").returncode == 0
    assert len(run.home.rows.read_bytes()) < len(kept), "what is frozen is not mended either"
    assert "was changed since it was frozen" in gpu("report").stdout
    assert "changed since it was frozen" in run.home.report.read_text()

    settings = [word for each in ("sample=100", "samples=1", "temperature=0", "top_p=1") for word in ("--set", each)]
    plain = gpu("run", "eval-gsm8k", "--limit", "4", *settings, timeout=120)
    assert plain.returncode == 0, plain.stderr
    other = runs.find(None).run_id
    (found,) = (compared := document("compare", run.run_id, other))["comparisons"]
    assert (found["task"], found["n"], found["difference"]) == ("gsm8k", 4, 0.0)
    assert compared["frozen"][run.run_id]["changed"] == ["rows.jsonl"]
    assert "was changed since" in gpu("compare", run.run_id, other).stdout


def test_a_suite_takes_settings_by_part_and_says_what_it_does_not_know() -> None:
    """A parameter of a part is named with its task; one that none has is answered with the nearest; so is a path."""
    for words, said in (
        (("dataset=x.jsonl",), "did you mean "),
        (("mmlu.dataset=./nowhere",), "nowhere does not exist"),
        (("gsm8k.engine=openai",), "gsm8k: engine=openai needs"),
        (("gsm8k.expect=1..0",), "gsm8k.expect='1..0'"),
    ):
        done = gpu("run", "baseline", *(word for each in words for word in ("--set", each)))
        assert done.returncode in (2, 3)
        assert said in done.stderr
    assert not Path("results").exists()
    shown = document("jobs", "show", "baseline")
    assert shown["parts"] == TASKS
    assert "mmlu.dataset" in {each["name"] for each in shown["parameters"]}

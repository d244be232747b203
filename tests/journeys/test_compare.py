"""`gpu compare`: runs side by side from their rows, for people, for scripts, as a table and as a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rows
from orchestrator import comparing, summary
from tests.journeys.hurried import document, gpu


def kept(name: str, scores: Sequence[float | None], task: str = "gsm8k", **about: Any) -> Path:
    """A folder with the rows of a run, one sample for each score; None is a row with an error."""
    folder = Path(name)
    folder.mkdir()
    identity = {"model_digest": name, "temperature": 0.0, **about}
    durable.save_json(
        folder / "job.json", {"job": f"eval-{task}", "task": task, "params": {"model": f"model of {name}"}}
    )
    durable.save_json(folder / "summary.json", {"resolved": {"identity": identity}})
    with rows.Appender(folder / "rows.jsonl") as out:
        for index, score in enumerate(scores):
            out.append(
                {
                    "key": f"{task}/test/e{index}#0",
                    "error": None if score is not None else "out of memory",
                    "example_id": f"e{index}",
                    "sample_index": 0,
                    "subject": "odd" if index % 2 else "even",
                    "completion": "so it is",
                    "score": score,
                    "scores": {} if score is None else {"numeric": score},
                }
            )
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPU_HOME", str(tmp_path / "state"))


def test_a_clear_difference_is_told_from_noise() -> None:
    """Twelve of forty flipped one way and none the other: better, with the flips by name; two each way: noise."""
    kept("old", [0.0] * 40)
    kept("new", [1.0] * 12 + [0.0] * 28)
    kept("same", [0.0] * 38 + [1.0] * 2)
    found = document("compare", "old", "new", "same")
    new, same = found["comparisons"]
    assert (new["verdict"], same["verdict"]) == ("better", "noise")
    assert new["gained"] == [f"e{index}" for index in range(12)]
    assert new["p_adjusted"] == pytest.approx(2 * new["p_value"])
    assert new["p_value"] == pytest.approx(2 / 2**12)
    assert new["subjects"]["odd"]["difference"] == pytest.approx(6 / 20)
    assert [each["value"] for each in found["runs"]] == pytest.approx([0.0, 0.3, 0.05])


def test_an_error_is_left_out_and_not_a_zero() -> None:
    """An example that one run could not score counts for neither, and that is said."""
    kept("old", [1.0, 1.0, 0.0])
    kept("new", [None, 1.0, 0.0])
    (found,) = document("compare", "old", "new")["comparisons"]
    assert (found["n"], found["left_out"], found["difference"]) == (2, 1, 0.0)
    assert "1 examples are left out" in gpu("compare", "old", "new").stdout


def test_what_was_not_asked_alike_is_said() -> None:
    """Another temperature is named; another model is what runs are compared for, and is not."""
    kept("old", [1.0, 0.0])
    kept("new", [1.0, 0.0], temperature=0.7)
    said = gpu("compare", "old", "new").stdout
    assert "temperature 0.0 and 0.7" in said
    assert "model_digest" not in said


def test_a_difference_below_the_measured_noise_is_noise() -> None:
    """Where a run measured how many scores flip when nothing changes, less than that is not called better."""
    kept("old", [0.0] * 40)
    folder = kept("new", [1.0] * 8 + [0.0] * 32)
    assert document("compare", "old", "new")["comparisons"][0]["verdict"] == "better"
    told = json.loads((folder / "summary.json").read_text())
    durable.save_json(folder / "summary.json", told | {"noise": {"n": 50, "flips": 25}})
    (found,) = document("compare", "old", "new")["comparisons"]
    assert (found["verdict"], round(found["noise_floor"], 3)) == ("noise", 0.219)


def test_texts_that_were_read_are_compared_by_their_bits() -> None:
    """Of perplexities the bits per byte are compared, text by text; fewer are better."""
    for name, nats in (("old", 2.0), ("new", 1.0)):
        folder = Path(name)
        folder.mkdir()
        durable.save_json(folder / "job.json", {"job": "eval-perplexity", "task": "perplexity", "params": {}})
        with rows.Appender(folder / "rows.jsonl") as out:
            for index in range(12):
                read = {"loglik": -nats * (10 + index), "tokens": 5, "words": 3, "bytes": 10 + index, "score": None}
                key = {"key": f"perplexity/test/e{index}#0", "example_id": f"e{index}", "sample_index": 0}
                out.append({**key, "error": None, **read})
    (found,) = document("compare", "old", "new")["comparisons"]
    assert found["difference"] == pytest.approx(-1 / math.log(2))
    assert (found["verdict"], found["n"]) == ("better", 12)
    said = gpu("compare", "old", "new").stdout
    assert "BITS PER BYTE" in said
    assert "12 score lower" in said


def test_the_scores_are_written_as_a_table() -> None:
    """One line an example, one column a run, nothing where there is no score."""
    kept("old", [1.0, None])
    kept("new", [0.0, 0.5, 1.0])
    done = gpu("compare", "old", "new", "--csv", "scores.csv", "--by", "first")
    assert done.returncode == 0, done.stderr
    with Path("scores.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines == [
        ["example_id", "subject", "old", "new"],
        ["e0", "even", "1", "0"],
        ["e1", "odd", "", "0.5"],
        ["e2", "even", "", "1"],
    ]


def test_the_scores_are_drawn() -> None:
    """A PNG file where matplotlib is installed; else what to install, and no file."""
    kept("old", [1.0, 0.0])
    kept("new", [0.0, 0.5])
    done = gpu("compare", "old", "new", "--png", "scores.png")
    if done.returncode == 0:
        assert Path("scores.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert (done.returncode, Path("scores.png").exists()) == (3, False)
        assert "pip install" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["old"], 2, "two different runs"),
        (["old", "./old"], 2, "two different runs"),
        (["old", "maths"], 2, "no measure of one thing"),
        (["old", "empty"], 2, "no scored row"),
        (["old", "nowhere"], 2, "There are no runs yet"),
        (["old", "new", "--csv", "no/such/folder.csv"], 3, "cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_said(words: list[str], code: int, said: str) -> None:
    """One run, the same twice, other tasks, no scores, no run, no folder: each with its reason."""
    kept("old", [1.0, 0.0])
    kept("new", [1.0, 0.0])
    kept("maths", [1.0, 0.0], task="math")
    kept("empty", [None])
    done = gpu("compare", *words)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def merged(name: str, *parts: Path) -> Path:
    """A folder with the rows of several runs as those of one with several parts."""
    folder = Path(name)
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(b"".join((part / "rows.jsonl").read_bytes() for part in parts))
    identities = {}
    for part in parts:
        task = json.loads((part / "job.json").read_text())["task"]
        identities[task] = json.loads((part / "summary.json").read_text())["resolved"]["identity"]
    durable.save_json(folder / "summary.json", {"resolved": {"identity": {"parts": identities}}})
    return folder


def test_runs_of_several_parts_are_compared_task_by_task() -> None:
    """Equal ids in two tasks are two examples; p-values are adjusted over all; a plain run has one part in common."""
    merged("old", kept("om", [0.0] * 40, task="mmlu"), kept("og", [1.0, 0.0] * 20))
    merged("new", kept("nm", [1.0] * 12 + [0.0] * 28, task="mmlu"), kept("ng", [1.0, 0.0] * 20, temperature=0.7))
    found = document("compare", "old", "new", "om")
    told = [(each["task"], each["after"], each["n"], each["verdict"]) for each in found["comparisons"]]
    assert told == [("mmlu", "new", 40, "better"), ("gsm8k", "new", 40, "noise"), ("mmlu", "om", 40, "noise")]
    first = found["comparisons"][0]
    assert first["p_value"] == pytest.approx(2 / 2**12)
    assert first["p_adjusted"] == pytest.approx(3 * first["p_value"])
    assert found["not_compared"] == {"om": ["gsm8k"]}
    assert found["comparisons"][1]["differs"]["temperature"] == [0.0, 0.7]
    said = gpu("compare", "old", "new", "om", "--csv", "all.csv")
    assert said.returncode == 0, said.stderr
    assert "mmlu: new against old, on 40 examples" in said.stdout
    assert "om: gsm8k cannot be compared" in said.stdout
    with Path("all.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["task", "example_id", "subject", "old", "new", "om"]
    assert lines[1] == ["mmlu", "e0", "even", "0", "1", "0"]
    assert lines[41] == ["gsm8k", "e0", "even", "1", "1", ""]
    gpu("compare", "old", "new", "--png", "all.png")


def test_the_rows_of_a_run_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table beside the comparison costs no second reading of rows that may be gigabytes."""
    kept("old", [1.0, 0.0])
    kept("new", [1.0, 1.0])
    read: list[Any] = []
    finals = summary.finals
    monkeypatch.setattr(summary, "finals", lambda home: read.append(home) or finals(home))
    loaded = comparing.load(["old", "new"])
    assert comparing.compare(loaded)["comparisons"]
    assert comparing.table(loaded)
    assert len(read) == 2


def test_each_part_has_its_own_noise_floor() -> None:
    """Of a run of several parts the noise of the part counts; of scores between 0 and 1 its squared differences do."""
    merged("old", kept("om", [0.0] * 40, task="mmlu"), kept("og", [0.0] * 40))
    folder = merged("new", kept("nm", [1.0] * 8 + [0.0] * 32, task="mmlu"), kept("ng", [1.0] * 8 + [0.0] * 32))
    told = json.loads((folder / "summary.json").read_text())
    noises = {"mmlu": {"n": 50, "flips": 25, "squares": 25.0}, "gsm8k": {"n": 50, "flips": 25, "squares": 0.25}}
    durable.save_json(folder / "summary.json", told | {"parts": {task: {"noise": noises[task]} for task in noises}})
    mmlu, gsm8k = document("compare", "old", "new")["comparisons"]
    assert [(each["verdict"], round(each["noise_floor"], 3)) for each in (mmlu, gsm8k)] == [
        ("noise", 0.219),
        ("better", 0.022),
    ]

"""ARC, HellaSwag, MMLU and perplexity against lm-evaluation-harness 0.4.13 and its HF backend, item for item.

GPU_PARITY_PYTHON names an interpreter that imports `lm_eval` 0.4.13, torch and transformers. Where there are benchmark
files beside the project, items are theirs; else they are made up.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from jobs import perplexities, rows, spec
from tests.conftest import DATA
from tests.parity import likelihoods
from worker import agreement, engines, evaluate, plan, problems
from worker.tasks import perplexity

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ITEMS = 60
LOGLIK, RELATIVE = 1e-4, 1e-6
"""How far apart, in nats, a choice's log-likelihoods may be; and relatively, those of a text."""
MODELS = pytest.mark.parametrize("adds_bos", [True, False], ids=["bos", "no bos"])


def ours(job: str, model: Path, batch_size: int = 7, **settings: Any) -> list[rows.Row]:
    """Our rows, in dataset order, made as a worker makes them."""
    definition = spec.load(spec.CATALOG / f"{job}.toml")
    given = {"model": model, "dtype": "float32", "device": "cpu", "batch_size": batch_size, **settings}
    params = definition.fill({name: str(value) for name, value in given.items()})
    request = {"job": job, "story": "evaluate", "task": definition.task, "params": params, "limit": None}
    (prepared,) = plan.rehearse(request, model, lambda _: None)
    items = {item.key: item for item in prepared.items}
    with engines.running([prepared], model / "server.log", print) as ask:
        made = {
            prompt.key: evaluate.make_row(prepared, items[prompt.key], answer)
            for prompt, answer in ask(prepared, (item.prompt for item in prepared.items))
        }
    return [made[key] for key in items]


def compare(made: list[rows.Row], theirs: list[dict[str, Any]], rules: tuple[str, ...] = ("acc", "acc_norm")) -> None:
    """Every prompt equal, every log-likelihood within LOGLIK, every item's score by every rule the same."""
    assert len(made) == len(theirs)
    for row, item in zip(made, theirs, strict=True):
        found = agreement.chosen(row, item, rules, LOGLIK)
        assert all(found.same.values()), found


def arc_rows() -> list[dict[str, Any]]:
    """ARC's fields as published; choices of different lengths, and keys that are letters or digits."""
    path = DATA / "arc_challenge" / "arc_challenge_llmfoundry.jsonl"
    if path.is_file():
        read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:ITEMS]]
    else:
        read = problems.quizzes("test")[:ITEMS]
    made = []
    for number, row in enumerate(read):
        labels = ["1", "2", "3", "4", "5"] if number % 5 == 0 else ["A", "B", "C", "D", "E"]
        labels = labels[: len(row["choices"])]
        made.append(
            {
                "id": f"x{number}",
                "question": row["query"].removeprefix("Question: "),
                "choices": {"text": row["choices"], "label": labels},
                "answerKey": labels[row["gold"]],
            }
        )
    return made


def mmlu_rows(split: str, subject: str, count: int) -> list[dict[str, Any]]:
    """MMLU's fields as on the Hub."""
    path = DATA / "mmlu" / split / f"{subject}_{split}.csv"
    if not path.is_file():
        made = problems.quizzes("train" if split == "dev" else "test")[:count]
        return [{**{key: row[key] for key in ("question", "choices", "answer")}, "subject": subject} for row in made]
    with path.open(encoding="utf-8", newline="") as file:
        read = list(csv.reader(file))[1 : count + 1]
    return [{"question": q, "choices": c, "answer": int(a), "subject": subject} for q, *c, a in read]


@MODELS
def test_arc_and_hellaswag_agree(tmp_path: Path, adds_bos: bool) -> None:
    """Prompts, log-likelihoods, acc and acc_norm of every item are the reference's; long scenes are cut alike."""
    model = likelihoods.make_model(tmp_path / "model", adds_bos=adds_bos)
    arc = likelihoods.write(tmp_path / "arc.jsonl", arc_rows())
    scenes = list(likelihoods.scenes(ITEMS))
    scenes[3]["ctx_a"] = "a long way to go " * 200  # longer than the model's context
    scenes[4]["ctx_a"] = "another long way " * 130
    hellaswag = likelihoods.write(tmp_path / "hellaswag.jsonl", scenes)
    nothing = {"training_split": None, "validation_split": None, "test_split": "test"}
    tasks = [
        likelihoods.task("arc_local", "arc/arc_challenge.yaml", {"test": arc}, **nothing),
        likelihoods.task("hellaswag_local", "hellaswag/hellaswag.yaml", {"test": hellaswag}, **nothing),
    ]
    theirs = likelihoods.evaluate(tmp_path, model, tasks)["items"]
    compare(ours("eval-arc", model, dataset=arc), theirs["arc_local"])
    made = ours("eval-hellaswag", model, dataset=hellaswag)
    compare(made, theirs["hellaswag_local"])
    assert [row["example_id"] for row in made if row["tokens_cut"]] == [made[3]["example_id"], made[4]["example_id"]]


@MODELS
@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_agrees(tmp_path: Path, adds_bos: bool, shots: int) -> None:
    """Prompts with description and shots in order, log-likelihoods and acc of every item are the reference's."""
    model = likelihoods.make_model(tmp_path / "model", adds_bos=adds_bos)
    subjects = ("anatomy", "high_school_us_history")
    names, tasks = [], []
    for subject in subjects:
        data = {
            split: likelihoods.write(tmp_path / f"{subject}_{split}.jsonl", mmlu_rows(split, subject, ITEMS // 2))
            for split in ("dev", "test")
        }
        names.append(f"mmlu_{subject}_local")
        include = f"mmlu/default/mmlu_{subject}.yaml"
        tasks.append(likelihoods.task(names[-1], include, data, task_alias=names[-1]))
    theirs = likelihoods.evaluate(tmp_path, model, tasks, shots=shots)
    for subject, name in zip(subjects, names, strict=True):
        dataset, dev = (tmp_path / f"{subject}_{split}.jsonl" for split in ("test", "dev"))
        made = ours("eval-mmlu", model, dataset=dataset, shots_dataset=dev, shots=shots)
        compare(made, theirs["items"][name], ("acc",))
        accuracy = sum(row["scores"]["acc"] for row in made) / len(made)
        assert accuracy == pytest.approx(theirs["results"][name]["acc,none"])


@MODELS
def test_perplexity_agrees(tmp_path: Path, adds_bos: bool) -> None:
    """The log-likelihood of every text, of one window and of many, and the perplexities are the reference's."""
    model = likelihoods.make_model(tmp_path / "model", adds_bos=adds_bos)
    dice = random.Random(9)
    texts = [likelihoods.sentences(dice, 5, 60 * 9 ** (number % 3)) for number in range(12)]
    pages = [f' = Page = \n Bob \'s ( 1 @,@ 000 ) " {text} " . \n ' for text in texts]
    pages.append("one two " * 256)
    data = likelihoods.write(tmp_path / "pages.jsonl", [{"page": page} for page in pages])
    nothing = {"training_split": None, "validation_split": None}
    reading = likelihoods.task("ppl_local", "wikitext/wikitext.yaml", {"test": data}, **nothing)
    theirs = likelihoods.evaluate(tmp_path, model, [reading])
    made = ours("eval-perplexity", model, dataset=data)
    for row, page, item in zip(made, pages, theirs["items"]["ppl_local"], strict=True):
        assert row["prompt"] == perplexity.detokenised(page)
        loglik, words = item["scores"]["word_perplexity"]
        assert row["loglik"] == pytest.approx(loglik, rel=RELATIVE)
        assert (row["words"], row["bytes"]) == (words, item["scores"]["byte_perplexity"][1])
    assert max(row["tokens"] for row in made) > 2 * 512
    found = perplexities.entries([reading for row in made if (reading := perplexities.reading(row))], lambda _: 2.0)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found[name]["value"] == pytest.approx(theirs["results"]["ppl_local"][f"{name},none"], rel=1e-5)

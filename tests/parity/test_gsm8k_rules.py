"""`strict` and `flexible` of GSM8K against lm-evaluation-harness 0.4.13 itself, item for item.

GPU_PARITY_PYTHON names an interpreter that imports `lm_eval` 0.4.13 (its filters and metrics; no model is needed).
GPU_PARITY_GSM8K may name a file of GSM8K's own rows (JSON lines); without it, solutions are made up.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
from pathlib import Path

import pytest

from worker.tasks import gsm8k

pytestmark = pytest.mark.slow

ITEMS = 40_000
LM_EVAL = """
import json, sys, importlib.metadata, pathlib, yaml, lm_eval
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters import build_filter_ensemble
from lm_eval.api.instance import Instance

assert importlib.metadata.version("lm_eval") == "0.4.13", importlib.metadata.version("lm_eval")
task = yaml.safe_load((pathlib.Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
(metric,) = task["metric_list"]
settings = {name: metric[name] for name in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
items = json.load(open(sys.argv[1]))
found = {}
for chain in task["filter_list"]:
    steps = [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in chain["filter"]]
    instances = [Instance("generate_until", {}, ("", {}), index, resps=[text]) for index, (text, _) in enumerate(items)]
    build_filter_ensemble(chain["name"], steps).apply(instances)
    answers = [instance.filtered_resps[chain["name"]] for instance in instances]
    scores = [
        float(exact_match_hf_evaluate(predictions=[answer], references=[gold], **settings)["exact_match"])
        for answer, (_, gold) in zip(answers, items)
    ]
    found[chain["name"]] = list(zip(answers, scores))
json.dump(found, open(sys.argv[2], "w"))
"""
SNIPPETS = (
    *("#### ", "####", "#", "$", ",", ".", "-", "\N{MINUS SIGN}", "%", "0", "7", "1,000", ".00", "\n", " ", "  "),
    *("\\boxed{12}", "Question: ", "\n#### 5", "\n\nQuestion: Tom has 3 apples.\nAnswer: 3\n#### 3", "####\t", "$.,"),
    *("The answer is ", " dollars in 2 years", "-$5", "X", "É", "İ", "\u0663", "[invalid]", "\r\n", "\u2028", "\x00"),
)


def lm_eval(items: list[tuple[str, str]], folder: Path) -> dict[str, list[tuple[str, float]]]:
    """The answer and the score that each of the reference's filters gives every (completion, gold)."""
    python = os.environ.get("GPU_PARITY_PYTHON")
    if not python:
        pytest.skip("GPU_PARITY_PYTHON does not name an interpreter with lm_eval 0.4.13")
    asked, answered = folder / "items.json", folder / "found.json"
    asked.write_text(json.dumps(items))
    subprocess.run([python, "-c", LM_EVAL, str(asked), str(answered)], check=True, timeout=280)
    return json.loads(answered.read_text())


def disagreements(items: list[tuple[str, str]], folder: Path) -> list[object]:
    """Every item where one of our two rules finds or scores otherwise than the reference."""
    theirs = lm_eval(items, folder)
    different: list[object] = []
    for index, (text, target) in enumerate(items):
        ours = gsm8k.score(text, target)
        for rule, name in (("strict", "strict-match"), ("flexible", "flexible-extract")):
            answer, score = theirs[name][index]
            if (ours.answers[rule] or "[invalid]", ours.scores[rule]) != (answer, score):
                different.append((rule, text, target, ours.answers[rule], ours.scores[rule], answer, score))
    return different


def solutions() -> list[str]:
    """Reference solutions: the real ones where a file of them is named, else ones of the same form."""
    named = os.environ.get("GPU_PARITY_GSM8K")
    if named:
        return [json.loads(line)["answer"] for line in Path(named).read_text().splitlines()]
    source = random.Random(7)
    return [
        f"She has {a} and {b}, so {a}*{b}=<<{a}*{b}={a * b}>>{a * b:,} in all.\n#### {a * b:,}"
        for a, b in ((source.randrange(1, 3000), source.randrange(-9, 3000)) for _ in range(1000))
    ]


def mutated(text: str, source: random.Random) -> str:
    """The text after one to four seeded edits: something put in, cut out, cut off, repeated or replaced."""
    for _ in range(source.randint(1, 4)):
        near_end = max(0, len(text) - 12)
        at = source.randint(near_end if source.random() < 0.7 else 0, len(text))
        edit = source.randrange(6)
        if edit <= 1:
            text = text[:at] + source.choice(SNIPPETS) + text[at:]
        elif edit == 2:
            text = text[:at] + text[at + source.randint(1, 6) :]
        elif edit == 3:
            text = text[:at]
        elif edit == 4:
            text += source.choice(SNIPPETS) + text[near_end:]
        else:
            text = text.replace(source.choice(("####", "#### ", ",", ".", "\n", "$")), source.choice(SNIPPETS))
    return text


def test_both_rules_agree_with_the_reference_on_mutated_solutions(tmp_path: Path) -> None:
    """Over 40,000 seeded mutations of reference solutions, both rules find and score exactly what lm-eval does."""
    source = random.Random(20261120)
    pool = solutions()
    items = [(answer, answer) for answer in pool]
    while len(items) < ITEMS:
        answer = source.choice(pool)
        items.append((mutated(answer, source), answer))
    for rule in ("strict", "flexible"):  # the mutations leave some right and make some wrong
        assert 0.1 < sum(gsm8k.score(text, answer).scores[rule] or 0.0 for text, answer in items) / ITEMS < 0.9
    assert disagreements(items, tmp_path) == []


def test_the_unit_tests_table_is_what_the_reference_gives(tmp_path: Path) -> None:
    """The 0/1 values written in the unit test's table are those that lm-eval gives."""
    table = runpy.run_path(str(Path(__file__).parents[1] / "worker/test_gsm8k.py"))
    theirs = lm_eval([(text, table["GOLD"]) for _, text, *_ in table["CASES"]], tmp_path)
    written = [(strict, flexible) for _, _, _, strict, flexible in table["CASES"]]
    scores = [[score for _, score in theirs[name]] for name in ("strict-match", "flexible-extract")]
    assert list(zip(*scores, strict=True)) == written

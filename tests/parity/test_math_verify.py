"""`math_verify` of MATH against minerva_math of lm-evaluation-harness 0.4.13 itself, on the same 500 problems.

GPU_PARITY_PYTHON names an interpreter that imports `lm_eval` 0.4.13 and math-verify.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.conftest import data_folder
from worker import tasks
from worker.tasks import mathematics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LM_EVAL = """
import json, sys, importlib.metadata
assert importlib.metadata.version("lm_eval") == "0.4.13", importlib.metadata.version("lm_eval")
from lm_eval.tasks.minerva_math import utils
found = []
for doc, reply in json.load(open(sys.argv[1])):
    answer = utils.normalize_final_answer(utils.remove_boxed(utils.last_boxed_only_string(doc["solution"])))
    found.append(utils.process_results({**doc, "answer": answer}, [reply])["math_verify"])
json.dump(found, open(sys.argv[2], "w"))
"""
FORMS = (
    "So the answer is $\\boxed{{{}}}$.",
    "Final Answer: The final answer is ${}$. I hope it is correct.",
    "It is {}.",
    "{}",
    "$x={}$",
    "First $7$, then \\boxed{{{}}} and \\boxed{{3}}",
    "\\boxed{{{}",
    "**Answer:** \\({}\\)",
)


def replies(rows: list[dict[str, str]]) -> list[tuple[dict[str, str], str]]:
    """Each problem with a right answer in some form, a wrong one, and one that was cut or changed."""
    source = random.Random(20261121)
    found = []
    for row in rows:
        answer, other = row["answer"], source.choice(rows)["answer"]
        changed = answer.replace(
            source.choice(["\\frac", " ", ",", "2", "{", "-"]), source.choice(["", "3", "\\dfrac"])
        )
        found += [(row, source.choice(FORMS).format(text)) for text in (answer, other, changed)]
    return found


def test_every_verdict_is_that_of_the_reference(tmp_path: Path) -> None:
    """Over 1,500 replies to MATH-500, math_verify gives what lm-eval gives, each time."""
    python = os.environ.get("GPU_PARITY_PYTHON")
    if not python or tasks.lacking("math"):
        pytest.skip(
            "GPU_PARITY_PYTHON does not name an interpreter with lm_eval 0.4.13, or math-verify is missing here"
        )
    rows = [json.loads(line) for line in (data_folder("math500") / "test.jsonl").read_text().splitlines()]
    target = {row["unique_id"]: example.target for row, example in zip(rows, mathematics.examples(rows), strict=True)}
    items = replies(rows)
    asked, answered = tmp_path / "items.json", tmp_path / "found.json"
    asked.write_text(json.dumps(items))
    subprocess.run([python, "-c", LM_EVAL, str(asked), str(answered)], check=True, timeout=900, capture_output=True)
    ours = [mathematics.score(reply, target[row["unique_id"]]).scores["math_verify"] for row, reply in items]
    theirs = json.loads(answered.read_text())
    assert 0.3 < sum(theirs) / len(theirs) < 0.7
    different = [(reply, a, b) for (_, reply), a, b in zip(items, ours, theirs, strict=True) if a != b]
    assert different == []

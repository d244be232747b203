"""A training looked at before a machine is rented: its first rows are said, and what would end it ends it here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import spec
from orchestrator import rehearsal
from orchestrator.errors import ConfigError


def document(**settings: object) -> dict[str, Any]:
    """A training as it would be sent to a machine."""
    params = spec.find("train-lora", [spec.CATALOG]).fill({key: str(value) for key, value in settings.items()})
    return {"story": "train", "params": params, "limit": None}


def rows(*given: dict[str, Any]) -> Path:
    path = Path("rows.jsonl").absolute()
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def said(asked: dict[str, Any]) -> str:
    lines: list[str] = []
    rehearsal.look(asked, lines.append)
    return "\n".join(lines)


GOOD = {"prompt": "What is 1 + 1?", "completion": "2"}


@pytest.mark.slow
def test_the_first_rows_are_said_before_anything_costs() -> None:
    """Three rows with what is learned of them marked, how many there are, and what is left out."""
    words = said(document(dataset=rows(*[GOOD] * 30, {"prompt": "And?", "completion": ""})))
    assert words.count("【2<|im_end|>】") == 3
    assert "30 rows to learn from, 15 steps." in words
    assert "warning: 1 rows are left out: nothing to learn: every reply is empty (row 31)." in words


def test_rows_that_teach_nothing_rent_nothing() -> None:
    """What would end the training on the machine ends it here, and says that nothing was rented."""
    with pytest.raises(ConfigError, match=r"Of 2 rows 1 cannot be learned from .* Nothing was rented\."):
        said(document(dataset=rows(GOOD, {"messages": []})))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "somebody/large", "dataset": "generated"}, "the tokenizer of somebody/large is not here"),
        ({"dataset": "somebody/rows"}, "the dataset somebody/rows is on the Hub"),
    ],
)
def test_what_would_have_to_be_fetched_is_left_to_the_machine(
    settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer or rows that are not on this computer are no failure; that they were not looked at is said."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert said(document(**settings)).startswith(f"The rows are not looked at here: {words}.")


def test_other_jobs_are_not_looked_at() -> None:
    """Nothing is said of an evaluation or a command."""
    assert said({"story": "command", "params": {}}) == ""

"""What counts as agreement of two evaluations, item by item, and how records get the fields they are published with."""

from __future__ import annotations

from typing import Any

import pytest

from worker import agreement, published

ROW = {
    "example_id": "q1",
    "error": None,
    "prompt": "Question: 1 + 1?\nAnswer:",
    "choices": ["2", "three"],
    "logliks": [-1.0, -2.0],
    "prediction": 0,
    "scores": {"acc": 1.0, "acc_norm": 0.0},
}
ITEM = {
    "asked": [["Question: 1 + 1?\nAnswer:", " 2"], ["Question: 1 + 1?\nAnswer:", " three"]],
    "filter": "none",
    "found": [["-1.0", "False"], ["-2.0", "False"]],
    "said": [],
    "scores": {"acc": 1.0, "acc_norm": 0.0},
}
REPLY = {
    "example_id": "q2",
    "error": None,
    "completion": "so\n#### 4",
    "answers": {"strict": "4", "flexible": "4", "numeric": "4"},
    "scores": {"strict": 1.0, "flexible": 1.0, "numeric": 1.0},
}
RULES = {"strict-match": "strict", "flexible-extract": "flexible"}


def said(answer: str = "4", score: float = 1.0, text: str = "so\n#### 4") -> dict[str, Any]:
    """What the harness found in a completion, by both of its filters."""
    item = {"asked": [["How much?", {}]], "found": [answer], "said": [[text]], "scores": {"exact_match": score}}
    return dict.fromkeys(RULES, item)


def test_the_same_is_the_same() -> None:
    """Equal prompts, predictions, scores and log-likelihoods agree."""
    found = agreement.chosen(ROW, ITEM, ("acc", "acc_norm"), 1e-3)
    assert found.agrees
    assert agreement.document([found]) == {
        "n": 1,
        "agree": True,
        "same": {"prompt": 1, "answer": 1, "score": 1, "loglik": 1},
        "max_loglik_difference": 0.0,
        "disagreements": [],
    }


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"prompt": "Question: 1 + 1?\nAnswer: "}, ["prompt"]),
        ({"choices": ["2", "3"]}, ["prompt"]),
        ({"prediction": 1}, ["answer"]),
        ({"scores": {"acc": 1.0, "acc_norm": 1.0}}, ["score"]),
        ({"logliks": [-1.0, -2.002]}, ["loglik"]),
        ({"error": "out of memory"}, ["answer", "score"]),
    ],
)
def test_any_difference_is_told_by_name(change: dict[str, Any], differs: list[str]) -> None:
    """A prompt, an answer, a score, a log-likelihood or a row that failed: each is a disagreement with both sides."""
    found = agreement.document([agreement.chosen({**ROW, **change}, ITEM, ("acc", "acc_norm"), 1e-3)])
    assert found["agree"] is False
    assert [each["differs"] for each in found["disagreements"]] == [differs]
    assert found["disagreements"][0]["theirs"]["logliks"] == [-1.0, -2.0]


def test_completions_agree_by_what_is_found_in_them() -> None:
    """Another answer or score is a disagreement; another text with the same answers is listed and is none."""
    assert agreement.generated(REPLY, said(), RULES, "How much?").agrees
    assert not agreement.generated(REPLY, said("5"), RULES, "How much?").agrees
    assert not agreement.generated(REPLY, said(score=0.0), RULES, "How much?").agrees
    assert not agreement.generated(REPLY, said(), RULES, "How many?").agrees
    found = agreement.document([agreement.generated(REPLY, said(text="thus\n#### 4"), RULES, "How much?")])
    assert (found["agree"], found["same"]["text"], len(found["disagreements"])) == (True, 0, 1)


def test_an_answer_that_neither_finds_is_the_same() -> None:
    """Our null is what the harness calls [invalid]."""
    row = {**REPLY, "answers": {"strict": None, "flexible": None}, "scores": {"strict": 0.0, "flexible": 0.0}}
    assert agreement.generated(row, said("[invalid]", 0.0), RULES, "How much?").same["answer"]


def test_records_of_every_form_become_the_published_one() -> None:
    """Letters, columns, cleaned scenes and bare lists of choices all say the same question."""
    letters = {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "C", "subject": "anatomy"}
    columns = {"question": "q", **{f"choice{n}": str(n + 1) for n in range(4)}, "answer": "2", "subject": "anatomy"}
    expected = {"question": "q", "choices": ["1", "2", "3", "4"], "answer": 2, "subject": "anatomy"}
    assert published.mmlu(letters) == published.mmlu(columns) == published.mmlu(expected) == expected
    bare = {"query": "Question: why?", "choices": ["a", "b"], "gold": 1, "id": "x"}
    asked = {"question": "why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert published.arc(bare) == published.arc(asked) == asked
    assert published.hellaswag(bare) == {"query": "Question: why?", "choices": ["a", "b"], "label": "1"}

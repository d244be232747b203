"""What the page of a run shows where choices were weighed, or texts read."""

from __future__ import annotations

from tests.orchestrator.test_report import page, row


def test_likelihood_rows_show_their_choice():
    """A row without a completion shows its prediction and log-likelihoods, and is not counted as without answer."""
    choice = row(completion=None, answer=None, finish_reason=None, prediction=2, logliks=[-3.5, float("-inf"), -1.25])
    shown = page([choice])
    candidate = shown.data["examples"][0]["candidates"][0]
    assert (candidate["answer"], candidate["logliks"]) == ("2", [-3.5, None, -1.25])
    assert "no answer was found" not in shown.text
    (named,) = page([{**choice, "choices": ["up", "d" * 500, "<b>"]}]).data["examples"][0]["candidates"]
    assert named["choices"][0] == "up"
    assert named["choices"][1][1] == 300, "long choices are cut in the middle"


def test_a_text_that_was_read_needs_no_score():
    """A row of a text that was read is not counted as unscored, and shows how well it was predicted."""
    read = row(completion=None, answer=None, target=None, finish_reason=None, score=None, scores={}, answers={})
    read |= {"prompt": "Some text", "loglik": -20.0, "tokens": 10, "words": 2, "bytes": 9}
    shown = page([read, {**read, "example_id": "other", "loglik": None, "error": "too large"}])
    assert "1 of 2 answers could not be scored" in shown.text
    candidates = [example["candidates"][0] for example in shown.data["examples"]]
    assert sorted(candidate.get("nats", 0) for candidate in candidates) == [0, 2.0]

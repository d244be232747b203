"""What is asked where likelihoods are compared: tokens split as the reference splits them, windows, cuts, and rows."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.tiny_models import CHATML, tokenizer
from worker import likelihood
from worker.failures import BadRecord, ConfigFailure
from worker.generators import Likelihood
from worker.likelihood import Asking, windows
from worker.prompts import Renderer
from worker.tasks import Example, arc, perplexity

CHOICES = ("up", "down", "ä")


def asked(context: str, length: int = 256, choices: tuple[str, ...] = CHOICES, **how: Any) -> Any:
    renderer = Renderer(
        tokenizer(adds_bos=how.get("adds_bos", False), chat_template=CHATML), how.get("template", "none")
    )
    (found,) = Asking(renderer, length).choices(["k"], [Example("e", "p", "1", choices=choices)], [context])
    return found


def spelled(ids: tuple[int, ...]) -> str:
    return str(tokenizer().decode(list(ids)))


def test_a_choice_follows_a_space_which_is_its_own() -> None:
    """White space at the end of a context belongs to the choice; special tokens are those the tokenizer adds."""
    query, row = asked("Say: \n", adds_bos=True)
    assert {spelled(context) for context, _ in query.pairs} == {"<s>Say:"}
    assert [spelled(continuation) for _, continuation in query.pairs] == [" \n up", " \n down", " \n ä"]
    assert row == {"prompt": "Say: \n", "choices": list(CHOICES), "tokens_cut": 0}
    query, _ = asked("<s>Say:", adds_bos=True)
    assert spelled(query.pairs[0][0]) == "<s>Say:", "a text that brings its BOS gets no second one"
    assert len({id(context) for context, _ in query.pairs}) == 1


def test_a_chat_template_wraps_the_context_and_the_choice_begins_the_reply() -> None:
    """With a template there is no space before a choice, and the row says what was sent."""
    query, row = asked("Say:", template="auto")
    assert spelled(query.pairs[0][0] + query.pairs[0][1]) == "<|start|>user\nSay:<|end|>\n<|start|>assistant\nup"
    assert row["messages"] == [{"role": "user", "content": "Say:"}]


def test_what_is_too_long_loses_its_beginning_and_says_so() -> None:
    """The last `length` tokens and the one to predict are kept, choice by choice; the row says how many are gone."""
    query, row = asked("abcdefghij", length=8)
    kept = [spelled(context + continuation) for context, continuation in query.pairs]
    assert kept == ["efghij up"[-9:], "ghij down", "efghij ä"]
    assert row["tokens_cut"] == 6
    with pytest.raises(ConfigFailure, match="Choice 1 of example e has 10 tokens"):
        asked("x", length=8, choices=("a", "bcdefghij"))


@given(st.integers(1, 60), st.integers(2, 20))
def test_every_token_is_predicted_once_and_no_window_is_too_long(count: int, length: int) -> None:
    """The windows' continuations are the text; each is read with the tokens right before it, `length` at most."""
    ids = tuple(range(1, count + 1))
    found = list(windows(ids, 0, length))
    assert [token for _, continuation in found for token in continuation] == list(ids)
    text = (0, *ids)
    for context, continuation in found:
        whole = context + continuation
        assert len(whole) <= length + 1
        assert whole == text[whole[0] : whole[-1] + 1]
        assert context


def test_rows_of_choices_hold_all_that_follows_from_them() -> None:
    """Predictions are numbers of choices; an error leaves all of it empty, and is no zero."""
    query, _ = asked("Say:")
    example = Example("e", "p", "1", choices=("up", "down", "ab"))
    row = likelihood.chosen(arc, example, query, Likelihood((-2.0, -3.0, -9.0)))
    assert (row["prediction"], row["prediction_norm"], row["answer"], row["target"], row["score"]) == (0, 1, 1, 1, 1.0)
    assert row["scores"] == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 1.0}
    failed = likelihood.chosen(arc, example, query, Likelihood((), "too large"))
    assert (failed["logliks"], failed["prediction"], failed["score"], failed["scores"]) == (None, None, None, {})


def test_a_text_is_counted_as_it_stood() -> None:
    """Of a page of WikiText the detokenised text is read, and words and bytes of the original are counted."""
    page = " the cost was 1 @,@ 000 . "
    (example,) = perplexity.examples([{"page": page}])
    assert example.problem == " the cost was 1,000. "
    renderer = Renderer(tokenizer(), "none")
    ((query, row),) = Asking(renderer, 16).texts(["k"], [example])
    made = likelihood.read(example, query, Likelihood((-1.0,) * len(query.pairs)))
    assert row == {"prompt": example.problem}
    assert (made["words"], made["bytes"]) == (len(re.split(r"\s+", page)), len(page))
    assert (made["tokens"], made["loglik"]) == (len(example.problem), -2.0)
    assert made["score"] is None


def test_the_field_of_the_text_can_be_named() -> None:
    """`text` is taken before `page`, another field where it is named; a row that lacks it is refused by its number."""
    (example,) = perplexity.examples([{"text": "a", "page": "b"}])
    assert example.problem == "a"
    assert perplexity.examples([{"body": "c . d"}], field="body")[0].problem == "c . d"
    with pytest.raises(BadRecord, match="row 1 has no field 'text'; it has: body") as refused:
        perplexity.examples([{"body": "c"}])
    assert "--set field=" in refused.value.hint


def test_the_length_is_the_models_unless_a_shorter_one_is_asked_for() -> None:
    """`max_length` may be shorter than the model's context, never longer; without any, it is 2048."""

    class Config:
        max_position_embeddings = 100

    assert likelihood.max_length("auto", Config(), None) == 100
    assert likelihood.max_length(50, Config(), None) == 50
    with pytest.raises(ConfigFailure, match="the model's context holds 100"):
        likelihood.max_length(200, Config(), None)
    assert likelihood.max_length("auto", object(), tokenizer()) == 2048

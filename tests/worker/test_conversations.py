"""Rows as conversations: which tokens are learned, and which rows are left out or refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.worker import tiny_models
from worker.batches import collate
from worker.conversations import Encoder, LeftOut, messages, shown
from worker.failures import ConfigFailure
from worker.prompts import Renderer

END = 4  # <|end|> of the tests' tokenizer
THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}THINK {% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""Writes a reply another way once a later turn follows, as templates of models that think do."""
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2 of them"},
]


def encoder(template: str = tiny_models.CHATML, max_length: int = 500, end: int = END, **how: Any) -> Encoder:
    chosen = "none" if template == "none" else "auto"
    tokenizer = tiny_models.tokenizer(chat_template=None if template == "none" else template, **how)
    return Encoder(Renderer(tokenizer, chosen), frozenset({end}), max_length)


def learned(made: Encoder, row: dict[str, Any]) -> list[str]:
    """The texts of a row that are learned."""
    sample = made.encode(1, row)
    return [made.renderer.tokenizer.decode(list(sample.ids[start:end])) for start, end in sample.spans]


def test_only_what_the_assistant_says_is_learned_to_its_end() -> None:
    """Every reply with its end token, of every turn, and nothing of what the template or others write."""
    assert learned(encoder(), {"messages": TALK}) == ["1<|end|>", "2 of them<|end|>"]


def test_the_tokens_before_a_reply_are_those_the_model_is_asked_with() -> None:
    """Up to a reply a row is, token for token, the prompt that an evaluation would send."""
    made = encoder()
    sample = made.encode(1, {"messages": TALK})
    for index, (start, _) in zip((2, 4), sample.spans, strict=True):
        assert tuple(sample.ids[:start]) == made.renderer.ids(TALK[:index])
    told = made.renderer.text(TALK, add_generation_prompt=False)
    assert made.renderer.tokenizer.decode(list(sample.ids)) == told


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "Q", "completion": "A"}, "Q"),
        ({"question": "Q", "answer": "A", "id": 3}, "Q"),
        ({"instruction": "Q", "output": "A", "input": ""}, "Q"),
        ({"instruction": "Q", "input": "more", "output": "A"}, "Q\n\nmore"),
        ({"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]}, "Q"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "prompt": None}, "Q"),
    ],
)
def test_each_form_of_a_row_is_one_question_and_one_reply(row: dict[str, Any], asked: str) -> None:
    """The field names that training files have all mean the same conversation."""
    assert messages(row) == [{"role": "user", "content": asked}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "A"}, "no known fields"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "owl", "content": "Q"}]}, "without one of the roles"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"prompt": "Q", "completion": " \n"}, "every reply is empty"),
        ({"messages": [{"role": "assistant", "content": "A"}]}, "speaks first"),
        ({"prompt": "Q" * 500, "completion": "A"}, "more than 500 tokens"),
    ],
)
def test_a_row_that_teaches_nothing_is_left_out_and_says_why(row: dict[str, Any], why: str) -> None:
    """Nothing is cut, guessed or learned with an empty mask."""
    with pytest.raises(LeftOut, match=why):
        encoder().encode(1, row)


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def test_a_role_that_the_template_refuses_leaves_out_the_row_alone() -> None:
    """As Gemma's template does with a system message: the words are the template's, and other rows are learned."""
    made = encoder(REFUSING + tiny_models.CHATML)
    assert learned(made, {"messages": TALK[1:3]}) == ["1<|end|>"]
    with pytest.raises(LeftOut, match="roles system, user: System role not supported"):
        made.encode(1, {"messages": TALK[:3]})


def test_a_template_that_rewrites_earlier_turns_is_seen() -> None:
    """One turn is fine; where a later turn changes an earlier one the row is left out, not masked wrongly."""
    assert learned(encoder(THINKING), {"messages": TALK[:3]}) == ["THINK 1<|end|>"]
    with pytest.raises(LeftOut, match="another way"):
        encoder(THINKING).encode(1, {"messages": TALK})


def test_a_template_that_never_ends_a_reply_is_refused() -> None:
    """A model trained without its end token would never stop: that is said before anything is trained."""
    with pytest.raises(ConfigFailure, match="would never stop"):
        encoder(end=2).encode(1, {"messages": TALK})


def test_two_beginnings_are_refused() -> None:
    """A template that writes BOS, with a message that brings one, makes two: refused."""
    with pytest.raises(ConfigFailure, match="begins with <s> twice"):
        encoder("<s>{% for m in messages %}{{ m.content }}<|end|>{% endfor %}").encode(
            1, {"prompt": "<s>Q", "completion": "A"}
        )


def test_without_a_template_the_bare_text_ends_with_the_end_token() -> None:
    """For base models: the prompt as the tokenizer writes it, then the completion and the end, both learned."""
    made = encoder("none", end=2, adds_bos=True)
    assert learned(made, {"prompt": "2+2=", "completion": "4"}) == ["4</s>"]
    assert made.encode(1, {"prompt": "2+2=", "completion": "4"}).ids[0] == 1
    with pytest.raises(LeftOut, match="an empty question"):
        made.encode(1, {"prompt": "", "completion": "4"})


def test_a_text_that_brings_its_own_beginning_is_refused_without_a_template_too() -> None:
    """The tokenizer adds BOS to a bare text; one in the text makes two."""
    with pytest.raises(ConfigFailure, match="begins with <s> twice"):
        encoder("none", end=2, adds_bos=True).encode(1, {"prompt": "<s>2+2=", "completion": "4"})


def test_padding_with_the_end_token_does_not_hide_it() -> None:
    """Where padding is the end token, as with many tokenizers, the end of every reply is learned all the same."""
    made = encoder()
    rows = [made.encode(number, {"prompt": "Q", "completion": "A" * number}) for number in (1, 9)]
    batch = collate(rows, END, packing=False)
    assert [(row == END).sum().item() for row in batch.labels] == [1, 1]


def test_the_first_rows_are_shown_with_what_is_learned_marked() -> None:
    """Marks stand around replies, special tokens are spelled out, and a long row is cut in its middle."""
    made = encoder()
    words = shown(made.encode(7, {"messages": TALK}), made.renderer.tokenizer)
    assert words.startswith("row 7: ")
    assert "<|start|>assistant\n【2 of them<|end|>】" in words
    assert " … " in shown(made.encode(1, {"messages": TALK}), made.renderer.tokenizer, most=40)

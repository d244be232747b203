"""Prompts are rendered to the tokens the model expects, and each thing wrong with them is found before the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHATML, SIZES, tokenizer
from transformers import Gemma3Config, GPT2Config, Qwen2Config

from worker.failures import ConfigFailure
from worker.generators import Sampling
from worker.prompts import Facts, Finding, RenderedPrompt, Renderer, check, context_length, first_prompt_shown

QUESTION = [{"role": "user", "content": "How many?"}]
FINE = Facts(Sampling(0.7, 0.9, 64), samples=5, context_length=512, vocabulary_size=261, end_ids=frozenset({2, 4}))
BOS_CHATML = "{{ bos_token }}" + CHATML
OPEN_CHATML = CHATML.split("{% if", maxsplit=1)[0]  # closes the user's turn and opens none
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def found(renderer: Renderer, facts: Facts = FINE, messages: Any = QUESTION) -> list[Finding]:
    return check([renderer.render("task/7", messages)], renderer, facts)


def codes(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.code) for finding in findings]


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 64, **changes})


@pytest.mark.parametrize(
    ("adds_bos", "template"),
    [(False, CHATML), (True, BOS_CHATML), (True, MISTRAL), (False, BOS_CHATML)],
)
def test_a_good_template_gives_no_finding(adds_bos: bool, template: str) -> None:
    """Usual templates, also one that needs nothing between question and reply, and usual settings pass in silence."""
    assert found(Renderer(tokenizer(adds_bos, template))) == []


def test_template_prompts_have_the_special_tokens_of_the_template_alone() -> None:
    """Where the tokenizer adds a BOS and the template writes one, the prompt has one, and its ids are plain numbers."""
    words = tokenizer(adds_bos=True, chat_template=BOS_CHATML)
    renderer = Renderer(words)
    ids = renderer.ids(QUESTION)
    assert [token for token in ids if token < 5] == [1, 3, 4, 3]
    assert all(type(token) is int for token in ids)
    assert (
        words.decode(list(ids))
        == renderer.text(QUESTION)
        == ("<s><|start|>user\nHow many?<|end|>\n<|start|>assistant\n")
    )


def test_plain_prompts_are_the_contents_with_what_the_tokenizer_adds() -> None:
    """With chat_template=none contents are joined by a blank line and begin with the tokenizer's BOS."""
    words = tokenizer(adds_bos=True, chat_template=CHATML)
    renderer = Renderer(words, "none")
    ids = renderer.ids([{"role": "system", "content": "Be brief."}, *QUESTION])
    assert ids[0] == 1
    assert words.decode(ids[1:]) == "Be brief.\n\nHow many?"
    assert found(renderer) == []


def test_a_template_can_be_a_file_or_a_text(tmp_path: Path) -> None:
    """A file's template and the same text given directly render alike, and differ in digest from the model's own."""
    words = tokenizer(chat_template=CHATML)
    other = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    (tmp_path / "chat.jinja").write_text(other)
    from_file, from_text = Renderer(words, str(tmp_path / "chat.jinja")), Renderer(words, other)
    assert from_file.text(QUESTION) == from_text.text(QUESTION) == "How many?:"
    digests = {from_text.template_digest, Renderer(words).template_digest, Renderer(words, "none").template_digest}
    assert from_file.template_digest == from_text.template_digest
    assert len(digests) == 3
    with pytest.raises(ConfigFailure, match=r"chat\.jnja"):
        Renderer(words, str(tmp_path / "chat.jnja"))


def test_the_default_of_several_templates_is_used() -> None:
    """A tokenizer with named templates renders with the one called default."""
    words = tokenizer(chat_template={"default": CHATML, "tool_use": "tools"})  # type: ignore[arg-type]
    assert Renderer(words).template == CHATML


@pytest.mark.parametrize("body", ["{{ raise_exception('roles must alternate') }}", "{% for %}", "{{ missing.field }}"])
def test_what_a_template_raises_becomes_words(body: str) -> None:
    """A template that refuses, has a syntax error or reads what is not there ends in a ConfigFailure with the roles."""
    with pytest.raises(ConfigFailure, match="roles user"):
        Renderer(tokenizer(), body).ids(QUESTION)


def test_a_model_without_template_is_an_error() -> None:
    """It is found by check, and rendering fails with the same words and a hint at chat_template=none."""
    renderer = Renderer(tokenizer())
    (finding,) = check([], renderer, FINE)
    assert (finding.level, finding.code) == ("error", "no_chat_template")
    assert "chat_template=none" in finding.hint
    with pytest.raises(ConfigFailure) as caught:
        renderer.ids(QUESTION)
    assert (caught.value.message, caught.value.hint) == (finding.message, finding.hint)


def test_the_classic_double_bos_is_an_error() -> None:
    """A template that writes BOS, rendered to text and tokenized with special tokens again, is caught."""
    words = tokenizer(adds_bos=True, chat_template=BOS_CHATML)
    renderer = Renderer(words)
    twice = RenderedPrompt("task/7", QUESTION, tuple(words(renderer.text(QUESTION))["input_ids"]))
    assert twice.token_ids[:2] == (1, 1)
    assert codes(check([twice], renderer, FINE)) == [("error", "double_bos")]


def test_a_bos_in_plain_text_is_doubled_too() -> None:
    """Under chat_template=none a BOS typed into the message is the second one."""
    renderer = Renderer(tokenizer(adds_bos=True), "none")
    assert codes(found(renderer, messages=[{"role": "user", "content": "<s>Q:"}])) == [("error", "double_bos")]


def test_a_missing_bos_is_a_warning() -> None:
    """A tokenizer that adds BOS to text with a template that writes none is pointed out; one that adds none is not."""
    assert codes(found(Renderer(tokenizer(adds_bos=True, chat_template=CHATML)))) == [("warning", "missing_bos")]
    assert found(Renderer(tokenizer(adds_bos=False, chat_template=CHATML))) == []


def test_a_missing_generation_prompt_is_an_error() -> None:
    """A template that opens the assistant's turn only when it writes a reply is caught, and told what is missing."""
    (finding,) = found(Renderer(tokenizer(chat_template=OPEN_CHATML)))
    assert (finding.level, finding.code) == ("error", "missing_generation_prompt")
    assert repr("<|start|>assistant") in finding.message


def test_a_template_that_cannot_be_asked_is_a_warning() -> None:
    """When it takes no assistant messages and ignores add_generation_prompt, the user is asked to look."""
    template = "{% for m in messages %}{{ m.content if m.role == 'user' else raise_exception('no') }}{% endfor %}"
    assert codes(found(Renderer(tokenizer(), template))) == [("warning", "unclear_generation_prompt")]


def test_a_turn_that_ends_with_no_end_token_is_a_warning() -> None:
    """When a reply's closing text is no end-of-sequence token of the model, it may never stop."""
    renderer = Renderer(tokenizer(chat_template=CHATML))
    facts = Facts(FINE.sampling, 5, 512, 261, end_ids=frozenset({2}))
    (finding,) = found(renderer, facts)
    assert (finding.level, finding.code) == ("warning", "turn_end_not_eos")
    assert "<|end|>" in finding.message


def test_a_prompt_that_ends_the_text_is_an_error() -> None:
    """A prompt whose last token is an end-of-sequence token is caught."""
    renderer = Renderer(tokenizer(), "none")
    assert codes(found(renderer, messages=[{"role": "user", "content": "Q</s>"}])) == [("error", "ends_with_eos")]


def test_a_token_the_model_does_not_know_is_an_error() -> None:
    """Token ids beyond the model's vocabulary are named before they can crash it."""
    facts = Facts(FINE.sampling, 5, 512, vocabulary_size=100)
    (finding,) = found(Renderer(tokenizer(chat_template=CHATML)), facts)
    assert (finding.level, finding.code) == ("error", "unknown_token")
    assert "100" in finding.message


def test_an_empty_prompt_is_an_error() -> None:
    """A prompt of no tokens is named by its example."""
    (finding,) = found(Renderer(tokenizer(), "none"), messages=[{"role": "user", "content": ""}])
    assert (finding.level, finding.code) == ("error", "empty_prompt")
    assert "task/7" in finding.message


def three_prompts(renderer: Renderer) -> list[RenderedPrompt]:
    return [renderer.render(f"task/{length}", [{"role": "user", "content": "x" * length}]) for length in (10, 300, 600)]


def test_prompts_beyond_the_context_are_errors_with_counts() -> None:
    """A prompt longer than the context, and one that leaves too little for the completion, are told apart; the largest
    max_new_tokens that fits the latter does fit, and one more does not."""
    renderer = Renderer(tokenizer(), "none")
    prompts = three_prompts(renderer)
    facts = Facts(sampling(max_new_tokens=250), 5, context_length=512)
    too_long, overflow = check(prompts, renderer, facts)
    assert codes([too_long, overflow]) == [("error", "prompt_too_long"), ("error", "context_overflow")]
    assert "task/600" in too_long.message
    assert "600" in too_long.message
    assert "task/300" in overflow.message
    assert "550" in overflow.message
    assert "max_new_tokens=212 " in overflow.hint
    for wanted, expected in ((212, []), (213, [("error", "context_overflow")])):
        assert codes(check(prompts[:2], renderer, Facts(sampling(max_new_tokens=wanted), 5, 512))) == expected


def test_the_tokenizers_own_limit_counts_for_less() -> None:
    """It is the limit when the model names none, and only a warning when it is smaller than the model's."""
    words = tokenizer()
    words.model_max_length = 200
    renderer = Renderer(words, "none")
    prompts = three_prompts(renderer)[1:2]
    assert codes(check(prompts, renderer, Facts(FINE.sampling, 5))) == [("error", "prompt_too_long")]
    assert codes(check(prompts, renderer, FINE)) == [("warning", "tokenizer_limit")]


def test_context_length_is_found_under_its_many_names() -> None:
    """Configurations flat, nested and old give their length, and one without gives None."""
    assert context_length(Qwen2Config(**SIZES)) == 256
    assert context_length(Gemma3Config(text_config={"max_position_embeddings": 77})) == 77
    assert context_length(GPT2Config(n_positions=99)) == 99
    assert context_length(object()) is None


def test_a_stop_string_in_the_question_is_a_warning_with_a_template_only() -> None:
    """A chat model may repeat the question and be cut; in a plain prompt the same stop string is the idiom."""
    words = tokenizer(chat_template=CHATML)
    facts = Facts(sampling(stop=("How", "never there")), 5, 512)
    (finding,) = found(Renderer(words), facts)
    assert (finding.level, finding.code) == ("warning", "stop_in_prompt")
    assert "'How'" in finding.message
    assert found(Renderer(words, "none"), facts) == []


def test_an_empty_stop_string_is_an_error() -> None:
    """It would end every completion at once."""
    facts = Facts(sampling(stop=("",)), 5, 512)
    assert codes(found(Renderer(tokenizer(), "none"), facts)) == [("error", "empty_stop")]


def test_settings_that_waste_the_run_are_warnings() -> None:
    """Several samples at temperature 0 and fewer than 16 new tokens are pointed out; one sample and 16 are not."""
    renderer = Renderer(tokenizer(), "none")
    assert codes(found(renderer, Facts(sampling(temperature=0), 5, 512))) == [("warning", "greedy_samples")]
    assert found(renderer, Facts(sampling(temperature=0), 1, 512)) == []
    assert codes(found(renderer, Facts(sampling(max_new_tokens=15), 5, 512))) == [("warning", "few_new_tokens")]
    assert found(renderer, Facts(sampling(max_new_tokens=16), 5, 512)) == []


def test_errors_come_before_warnings() -> None:
    """Findings are listed with the errors first, though warnings are found earlier."""
    renderer = Renderer(tokenizer(adds_bos=True, chat_template=OPEN_CHATML))
    assert codes(found(renderer)) == [("error", "missing_generation_prompt"), ("warning", "missing_bos")]


def test_the_first_prompt_is_shown_with_its_special_tokens_and_ids() -> None:
    """The text is what the model sees, BOS included, under its length and its first and last ids."""
    words = tokenizer(adds_bos=True, chat_template=BOS_CHATML)
    prompt = Renderer(words).render("task/7", QUESTION)
    heading, _, text = first_prompt_shown(prompt, words, ends=2).partition("\n")
    ids = prompt.token_ids
    assert heading == f"task/7: {len(ids)} tokens [{ids[0]} {ids[1]} … {ids[-2]} {ids[-1]}]"
    assert text == "<s><|start|>user\nHow many?<|end|>\n<|start|>assistant\n"

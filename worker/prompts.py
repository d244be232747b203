"""Turning messages into the exact tokens a model is sent, and finding what is wrong with them before money is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.failures import ConfigFailure
from worker.generators import Sampling

Messages = Sequence[Mapping[str, str]]

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len", "n_ctx")
"""What model configurations call their context length."""

NO_LIMIT_TOKENS = 10**9
"""A tokenizer's model_max_length beyond this means that nobody set it (transformers writes 10**30 then)."""

FEW_NEW_TOKENS = 16
PROBE = "REPLY"
"""Stands for an assistant's reply where the template is asked how it writes one."""

NO_TEMPLATE_HINT = "--set chat_template=none for a base model, or --set chat_template=FILE.jinja"


@dataclass(frozen=True)
class RenderedPrompt:
    """An example's messages and the token ids that are sent for them."""

    example_id: str
    messages: Messages
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """Something about the prompts to say before the run: an `error` should stop it, a `warning` be shown."""

    level: str
    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Facts:
    """What prompts are checked against; None or empty: not known, not checked. `samples` is the number per example.

    Without `sampling` nothing is generated: then only the prompts themselves are looked at.
    """

    sampling: Sampling | None = None
    samples: int = 1
    context_length: int | None = None
    vocabulary_size: int | None = None
    end_ids: frozenset[int] = frozenset()


class Renderer:
    """Renders messages with one chat template: the model's (`auto`), a file's or a text's, or `none`.

    With `none` the contents of the messages, joined by a blank line, are the prompt, and the tokenizer adds the special
    tokens it adds to any text; with a template all of them come from the template. `template_digest` tells apart what
    was decided.
    """

    def __init__(self, tokenizer: Any, chat_template: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.plain = chat_template == "none"
        self.template = None if self.plain else _template_text(tokenizer, chat_template)
        self.template_digest = "none"
        if self.template is not None:
            self.template_digest = "sha256:" + hashlib.sha256(self.template.encode()).hexdigest()

    def text(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The prompt as text; what the tokenizer adds to a plain prompt is not in it."""
        if self.plain:
            return "\n\n".join(message["content"] for message in messages)
        return str(self._apply(messages, add_generation_prompt, tokenize=False))

    def ids(self, messages: Messages) -> tuple[int, ...]:
        """The prompt as token ids, exactly as sent. ConfigFailure without a template, or when the template refuses."""
        if self.plain:
            return tuple(self.tokenizer(self.text(messages))["input_ids"])
        return tuple(self._apply(messages, True, tokenize=True))

    def render(self, example_id: str, messages: Messages) -> RenderedPrompt:
        """The example's messages with their token ids."""
        return RenderedPrompt(example_id, messages, self.ids(messages))

    def shown(self, prompt: RenderedPrompt) -> str:
        """The prompt as the model sees it, for people."""
        return first_prompt_shown(prompt, self.tokenizer)

    def _apply(self, messages: Messages, add_generation_prompt: bool, tokenize: bool) -> Any:
        if self.template is None:
            finding = _no_chat_template()
            raise ConfigFailure(finding.message, finding.hint)
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=tokenize,
                return_dict=False,
            )
        except Exception as error:  # the template is a program of the model's or the user's
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigFailure(
                f"The chat template cannot render messages with the roles {roles}: {error} ({type(error).__name__}).",
                "Use another template: --set chat_template=FILE.jinja, or none for a base model.",
            ) from error


def context_length(config: Any) -> int | None:
    """The number of tokens, prompt and completion together, that the model's configuration allows; None if unknown."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in CONTEXT_FIELDS:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check(prompts: Sequence[RenderedPrompt], renderer: Renderer, facts: Facts) -> list[Finding]:
    """What is wrong or doubtful with these prompts under this renderer and these settings, errors first."""
    if renderer.template is None and not renderer.plain:
        return [_no_chat_template()]
    checks: tuple[Callable[[Sequence[RenderedPrompt], Renderer, Facts], list[Finding]], ...] = (
        check_tokens,
        _check_bos,
        _check_template,
        *((_check_length, _check_stop, _check_sampling) if facts.sampling else ()),
    )
    found = [finding for one in checks for finding in one(prompts, renderer, facts)]
    return sorted(found, key=lambda finding: finding.level != "error")


def first_prompt_shown(prompt: RenderedPrompt, tokenizer: Any, ends: int = 8) -> str:
    """The prompt as the model sees it, special tokens spelled out, under a line with its first and last token ids."""
    ids = [str(token) for token in prompt.token_ids]
    listed = " ".join(ids) if len(ids) <= 2 * ends else f"{' '.join(ids[:ends])} … {' '.join(ids[-ends:])}"
    shown = tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return f"{prompt.example_id}: {len(ids)} tokens [{listed}]\n{shown}"


def _template_text(tokenizer: Any, chat_template: str) -> str | None:
    """The template to use, None when the tokenizer has none of its own."""
    if chat_template == "auto":
        return str(tokenizer.get_chat_template()) if tokenizer.chat_template else None
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFailure(
            f"chat_template={chat_template} is neither auto, none, a template nor a file that can be read: {error}.",
            "Give the path of a .jinja file.",
        ) from error


def _no_chat_template() -> Finding:
    return Finding(
        "error",
        "no_chat_template",
        "The tokenizer has no chat template, so there is no telling how this model expects its messages.",
        NO_TEMPLATE_HINT,
    )


def check_tokens(prompts: Sequence[RenderedPrompt], renderer: Renderer, facts: Facts) -> list[Finding]:
    """Texts without tokens, with tokens that the model does not know, or at whose end all is said."""
    found = []
    if empty := [prompt for prompt in prompts if not prompt.token_ids]:
        found.append(Finding("error", "empty_prompt", f"{_which(empty)}: no token at all.", "Look at the dataset."))
    size = facts.vocabulary_size
    if size and (strange := [prompt for prompt in prompts if max(prompt.token_ids, default=0) >= size]):
        token = max(strange[0].token_ids)
        found.append(
            Finding(
                "error",
                "unknown_token",
                f"{_which(strange)}: holds token {token} ({renderer.tokenizer.convert_ids_to_tokens(token)}), "
                f"but the model knows only {size} tokens.",
                "The tokenizer belongs to another model, or was extended after this one was trained.",
            )
        )
    if ended := [prompt for prompt in prompts if prompt.token_ids and prompt.token_ids[-1] in facts.end_ids]:
        found.append(
            Finding(
                "error",
                "ends_with_eos",
                f"{_which(ended)}: ends with the end-of-sequence token, so that to the model everything is said.",
                "The tokenizer adds it (add_eos_token), or the template closes the turn and opens none.",
            )
        )
    return found


def _check_bos(prompts: Sequence[RenderedPrompt], renderer: Renderer, _: Facts) -> list[Finding]:
    bos = renderer.tokenizer.bos_token_id
    if bos is None:
        return []
    name = renderer.tokenizer.bos_token
    if twice := [prompt for prompt in prompts if prompt.token_ids[:2] == (bos, bos)]:
        return [
            Finding(
                "error",
                "double_bos",
                f"{_which(twice)}: begins with {name} twice, once written in the text and once added.",
                "Write it in one place: leave it out of the messages or the template.",
            )
        ]
    due = renderer.tokenizer("a")["input_ids"][:1] == [bos]
    if due and (without := [prompt for prompt in prompts if prompt.token_ids[:1] != (bos,)]):
        # A warning: templates of some well-known models leave it out, and those models cope.
        return [
            Finding(
                "warning",
                "missing_bos",
                f"{_which(without)}: does not begin with {name}, which this tokenizer adds to plain text.",
                "If the model was trained with it, use a template that begins with {{ bos_token }}.",
            )
        ]
    return []


def _check_template(prompts: Sequence[RenderedPrompt], renderer: Renderer, facts: Facts) -> list[Finding]:
    """Whether the first prompt ends where a reply begins, and replies end with a token that ends a completion."""
    if renderer.plain or not prompts or prompts[0].messages[-1]["role"] == "assistant":
        return []
    messages = prompts[0].messages
    prompt = renderer.text(messages)
    before, after = _around_reply(renderer, messages)
    found = []
    if prompt == renderer.text(messages, add_generation_prompt=False):
        # Some templates need nothing between a question and its reply; this one does if it writes something there.
        missing = None if before is None else before.strip().removeprefix(prompt.strip()).strip()
        if missing is None:
            found.append(
                Finding(
                    "warning",
                    "unclear_generation_prompt",
                    "The template opens no assistant turn, and cannot be asked whether it should.",
                    "Look at the end of the first prompt: a reply must be what comes next.",
                )
            )
        elif missing:
            found.append(
                Finding(
                    "error",
                    "missing_generation_prompt",
                    f"The prompts stop before the assistant's turn: the template writes {missing!r} before a reply, "
                    "but not when add_generation_prompt asks for it.",
                    "Add {% if add_generation_prompt %}…{% endif %} to the template.",
                )
            )
    closing = renderer.tokenizer(after, add_special_tokens=False)["input_ids"] if after and after.strip() else []
    if closing and facts.end_ids and not facts.end_ids.intersection(closing):
        found.append(
            Finding(
                "warning",
                "turn_end_not_eos",
                f"The template ends a reply with {after.strip()!r}, which is no end-of-sequence token of this model: "
                "it may talk on until max_new_tokens.",
                "Use the template the model was trained with, or make that text a stop string.",
            )
        )
    return found


def _around_reply(renderer: Renderer, messages: Messages) -> tuple[str | None, str]:
    """What the template writes before and after an assistant's reply to these messages; None if it writes none."""
    try:
        text = renderer.text([*messages, {"role": "assistant", "content": PROBE}], add_generation_prompt=False)
    except ConfigFailure:  # it takes no assistant messages
        return None, ""
    before, written, after = text.rpartition(PROBE)
    return (before, after) if written else (None, "")


def _check_length(prompts: Sequence[RenderedPrompt], renderer: Renderer, facts: Facts) -> list[Finding]:
    assert facts.sampling is not None
    found = []
    limit, wanted = facts.context_length, facts.sampling.max_new_tokens
    own_limit = renderer.tokenizer.model_max_length
    if limit is None and own_limit < NO_LIMIT_TOKENS:
        limit = own_limit
    if limit is None or not prompts:
        return []
    if too_long := [prompt for prompt in prompts if len(prompt.token_ids) >= limit]:
        found.append(
            Finding(
                "error",
                "prompt_too_long",
                f"{_which(too_long)}: {_longest(too_long)} tokens, but the model's context holds {limit}.",
                "Use fewer shots (--set shots=…) or a model with a longer context.",
            )
        )
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) < limit]
    if overflowing := [prompt for prompt in fitting if len(prompt.token_ids) + wanted > limit]:
        longest = _longest(overflowing)
        found.append(
            Finding(
                "error",
                "context_overflow",
                f"{_which(overflowing)}: {longest} tokens + max_new_tokens {wanted} = {longest + wanted}, "
                f"but the model's context holds {limit}.",
                f"--set max_new_tokens={limit - longest} is the most that fits.",
            )
        )
    if own_limit < limit and _longest(prompts) + wanted > own_limit:
        found.append(
            Finding(
                "warning",
                "tokenizer_limit",
                f"The tokenizer is said to be for {own_limit} tokens, the model for {limit}; "
                f"these prompts need up to {_longest(prompts) + wanted}.",
                "If completions of long prompts are poor, believe the smaller number.",
            )
        )
    return found


def _check_stop(prompts: Sequence[RenderedPrompt], renderer: Renderer, facts: Facts) -> list[Finding]:
    assert facts.sampling is not None
    found = []
    if "" in facts.sampling.stop:
        found.append(
            Finding("error", "empty_stop", "An empty stop string would end every completion.", "Leave it out.")
        )
    if renderer.plain:
        return found  # there it is the idiom: what begins the next question in the prompt ends the completion
    for stop in filter(None, facts.sampling.stop):
        if asked := [prompt for prompt in prompts if stop in prompt.messages[-1]["content"]]:
            found.append(
                Finding(
                    "warning",
                    "stop_in_prompt",
                    f"{_which(asked)}: the question itself holds the stop string {stop!r}; "
                    "a reply that repeats it is cut off there.",
                    "Leave that stop string out: a chat model ends its turn by itself.",
                )
            )
    return found


def _check_sampling(_: Sequence[RenderedPrompt], __: Renderer, facts: Facts) -> list[Finding]:
    found = []
    sampling = facts.sampling
    assert sampling is not None
    if sampling.temperature == 0 and facts.samples > 1:
        found.append(
            Finding(
                "warning",
                "greedy_samples",
                f"temperature=0 makes all {facts.samples} samples of an example equal: they cost and tell nothing.",
                "--set temperature=0.7, or --set samples=1",
            )
        )
    if sampling.max_new_tokens < FEW_NEW_TOKENS:
        found.append(
            Finding(
                "warning",
                "few_new_tokens",
                f"max_new_tokens={sampling.max_new_tokens} leaves no room for more than a few words.",
                "--set max_new_tokens=512",
            )
        )
    return found


def _which(prompts: Sequence[RenderedPrompt]) -> str:
    first = max(prompts, key=lambda prompt: len(prompt.token_ids)).example_id
    return (
        f"Prompt of example {first}" if len(prompts) == 1 else f"{len(prompts)} prompts, the longest of example {first}"
    )


def _longest(prompts: Sequence[RenderedPrompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)

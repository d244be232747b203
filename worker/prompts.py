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
    """What prompts are checked against; None or empty: not known, not checked. `samples` is the number per example."""

    sampling: Sampling
    samples: int
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
        except Exception as error:  # noqa: BLE001  the template is a program of the model's or the user's
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
        _check_tokens,
        _check_bos,
        _check_template,
        _check_length,
        _check_stop,
        _check_sampling,
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


def _check_tokens(prompts: Sequence[RenderedPrompt], renderer: Renderer, facts: Facts) -> list[Finding]:
    found = []
    if empty := [prompt for prompt in prompts if not prompt.token_ids]:
        found.append(Finding("error", "empty_prompt", f"{_which(empty)} without any token.", "Look at the dataset."))
    size = facts.vocabulary_size
    if size and (strange := [prompt for prompt in prompts if max(prompt.token_ids, default=0) >= size]):
        token = max(strange[0].token_ids)
        found.append(
            Finding(
                "error",
                "unknown_token",
                f"{_which(strange)} with token {token} ({renderer.tokenizer.convert_ids_to_tokens(token)}), "
                f"but the model knows only {size} tokens.",
                "The tokenizer belongs to another model, or was extended after this one was trained.",
            )
        )
    if ended := [prompt for prompt in prompts if prompt.token_ids and prompt.token_ids[-1] in facts.end_ids]:
        found.append(
            Finding(
                "error",
                "ends_with_eos",
                f"{_which(ended)} ending with the end-of-sequence token: to the model everything is said.",
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
                f"{_which(twice)} beginning with {name} twice: it is written in the text and added by the tokenizer too.",
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
                f"{_which(without)} without {name} at the beginning, which this tokenizer adds to plain text.",
                "If the model was trained with it, use a template that begins with {{ bos_token }}.",
            )
        ]
    return []

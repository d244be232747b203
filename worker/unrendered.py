"""Prompts for a server that makes tokens of them itself: sent as they are, and checked as far as can be from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from worker import prompts
from worker.failures import ConfigFailure
from worker.generators import Sampling
from worker.prompts import Finding, Messages, RenderedPrompt

_SHOWN_CHARACTERS = 4000


class Renderer(prompts.Renderer):
    """Leaves messages as they are, for the server's own chat template; `none` makes one text of them, as elsewhere."""

    def __init__(self, chat_template: str) -> None:
        self.tokenizer = None
        self.plain = chat_template == "none"
        self.template = None
        self.template_digest = "none" if self.plain else "server"

    def ids(self, _: Messages) -> tuple[int, ...]:
        """No tokens: the server makes them."""
        return ()

    def shown(self, prompt: RenderedPrompt) -> str:
        """The prompt as it is sent, cut when it is long."""
        said = self.text(prompt.messages) if self.plain else "\n".join(map(_turn, prompt.messages))
        return f"{prompt.example_id}, as it is sent to the server:\n{said[:_SHOWN_CHARACTERS]}"

    def check(self, rendered: Sequence[RenderedPrompt], model: str, sampling: Sampling, samples: int) -> list[Finding]:
        """Warnings only, as the server has the last word: what a tokenizer of that model tells, where one is here."""
        tokenizer = _tokenizer_here(model)
        if tokenizer is None:
            message = f"No tokenizer of {model} is here: length, special tokens and template were not checked."
            return [Finding("warning", "not_checked", message, "Look at the first completions, and why they ended.")]
        own = prompts.Renderer(tokenizer, "none" if self.plain else "auto")
        try:
            again = [own.render(prompt.example_id, prompt.messages) for prompt in rendered]
        except ConfigFailure as failure:
            return [Finding("warning", "not_checked", failure.message, failure.hint)]
        found = prompts.check(again, own, prompts.Facts(sampling, samples))
        note = f"(So says the tokenizer of {model} that is here; the server's may differ.)"
        return [replace(finding, level="warning", message=f"{finding.message} {note}") for finding in found]


def _tokenizer_here(model: str) -> Any:
    """The model's tokenizer, if this machine has its files; None else. Nothing is fetched."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError):  # a name that is none of the Hub's is a ValueError
        return None


def _turn(message: Any) -> str:
    return f"[{message['role']}] {message['content']}"

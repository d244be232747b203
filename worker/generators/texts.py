"""What text the tokens of a completion are: decoded whole, without its end token, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker.generators import Completion, Prompt


class Texts:
    """Makes completions of tokens, the same for every engine. `ends` are the tokens that end one, unseen."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.ends = ends
        self.stops = tuple(stop for stop in stops if stop)

    def completion(self, prompt: Prompt, ids: Sequence[int]) -> Completion:
        """The completion that these tokens are; its finish_reason is `length` if nothing in them ends it."""
        ended = bool(ids) and ids[-1] in self.ends
        text, stopped = self._cut(ids[:-1] if ended else ids)
        return Completion(text, "stop" if ended or stopped else "length", len(prompt.token_ids), len(ids))

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of these tokens alone, special ones left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _cut(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of the tokens up to the first stop string, and whether there was one."""
        text = self.decoded(ids)
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return (text[: min(found)], True) if found else (text, False)

"""What every engine provides: prompts or queries in, each with its answer out as it finishes, in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token. Temperature 0 is greedy; top_p in (0, 1]; stop strings end a completion, unseen."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One completion to be made: its row key, the token ids sent, and the seed of its own random stream (63 bits)."""

    key: str
    token_ids: tuple[int, ...]
    seed: int
    asked: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The same as its row has it, `messages` or `prompt`, for a server that makes tokens of it itself."""


@dataclass(frozen=True)
class Completion:
    """What an engine got for a prompt. `finish_reason` is `stop`, `length`, or `error`, with `error` saying why.

    Tokens are None, and so is `usd`, where nobody counted them.
    """

    text: str
    finish_reason: str
    tokens_in: int | None
    tokens_out: int | None
    error: str | None = None
    usd: float | None = None


def failed(prompt: Prompt, why: str, tokens_out: int = 0) -> Completion:
    """A completion with no text that says why there is none."""
    return Completion("", "error", len(prompt.token_ids), tokens_out, why)


class Generator(Protocol):
    """An engine with a model loaded."""

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[tuple[Prompt, Completion]]:
        """Each prompt's completion once, as soon as it is finished, in any order; batches as the engine likes."""
        ...


Ids = tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """What is to be weighed for one row: its key, and pairs of context and continuation, as token ids.

    No part is empty, and a pair is at most one token longer than the model's context: its last token is never read.
    Pairs with an equal context best hold the same object.
    """

    key: str
    pairs: tuple[tuple[Ids, Ids], ...]


@dataclass(frozen=True)
class Likelihood:
    """What an engine found for a query: of each pair the log-likelihood of the continuation, or why there is none."""

    logliks: tuple[float, ...]
    error: str | None = None


class Weigher(Protocol):
    """An engine with a model loaded that tells how likely texts are."""

    def weigh(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Likelihood]]:
        """Each query's likelihoods once, as soon as they are known, in any order; batches as the engine likes."""
        ...

"""What tasks that compare likelihoods ask of a model, as lm-evaluation-harness 0.4.13 does, and what rows say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from worker.failures import ConfigFailure
from worker.generators import Ids, Likelihood, Query
from worker.prompts import NO_LIMIT_TOKENS, Messages, Renderer, context_length
from worker.tasks import Example, Task, choosing, perplexity

DEFAULT_LENGTH = 2048
"""Of a text for a model that does not say how much it reads (lm_eval/defaults.py)."""

_ENCODED_TEXTS = 512  # tokenized in one call, which uses every core


Asked = tuple[Query, dict[str, Any]]
"""A query, and what stands in its row of what was asked."""


def max_length(asked: int | str, config: Any, tokenizer: Any) -> int:
    """How many tokens the model is given at once: as asked for, else by its configuration, else by its tokenizer."""
    known = context_length(config)
    if isinstance(asked, int):
        if known is not None and asked > known:
            raise ConfigFailure(f"max_length={asked}, but the model's context holds {known}.", "Leave max_length out.")
        return asked
    if known is not None:
        return known
    own = tokenizer.model_max_length
    return int(own) if own < NO_LIMIT_TOKENS else DEFAULT_LENGTH


class Asking:
    """Makes queries of examples. With a chat template a context is a user's message, and a choice begins the reply."""

    def __init__(self, renderer: Renderer, length: int) -> None:
        self._renderer = renderer
        self._length = length
        self._tokenizer = renderer.tokenizer
        self._prefix = self._tokenizer.bos_token_id
        if self._prefix is None:
            self._prefix = self._tokenizer.eos_token_id
        if self._prefix is None:
            raise ConfigFailure("The tokenizer has neither a BOS nor an EOS token for a text to begin with.")
        self._prefix_text = str(self._tokenizer.decode([self._prefix]))
        self._known: dict[int, int] = {}

    def choices(self, keys: Sequence[str], examples: Sequence[Example], contexts: Sequence[str]) -> Iterator[Asked]:
        """Each example's choices after its context, in order; the end of what is too long is kept."""
        delimiter = " " if self._renderer.plain else ""
        places = iter(zip(keys, examples, contexts, strict=True))
        while batch := list(itertools.islice(places, _ENCODED_TEXTS // 8)):
            sent = [self._sent(context) for _, _, context in batch]
            pieces = [
                _split(self._text(one), delimiter, example.choices)
                for one, (_, example, _) in zip(sent, batch, strict=True)
            ]
            encoded = iter(self._encoded([text for context, rests in pieces for text in _texts(context, rests)]))
            for (key, example, _), one, (_, rests) in zip(batch, sent, pieces, strict=True):
                yield self._weighed(key, example, one, [next(encoded) for _ in range(len(rests) + 1)])

    def texts(self, keys: Sequence[str], examples: Sequence[Example]) -> Iterator[Asked]:
        """Each example's text in windows: every token is predicted once, the first from the BOS token (else EOS)."""
        for key, example in zip(keys, examples, strict=True):
            (ids,) = self._encoded([example.problem])
            if not ids:
                raise ConfigFailure(f"The text of example {example.id} has no token.", "Look at the dataset.")
            yield Query(key, tuple(windows(ids, self._prefix, self._length))), {"prompt": example.problem}

    def _sent(self, context: str) -> dict[str, Any]:
        return {"prompt": context} if self._renderer.plain else {"messages": [{"role": "user", "content": context}]}

    def _text(self, sent: Mapping[str, Any]) -> str:
        messages: Messages | None = sent.get("messages")
        return str(sent["prompt"]) if messages is None else self._renderer.text(messages)

    def _weighed(self, key: str, example: Example, sent: dict[str, Any], encoded: list[Ids]) -> Asked:
        context, wholes = encoded[0], encoded[1:]
        pairs, cut = [], 0
        for number, whole in enumerate(wholes):
            continuation = whole[len(context) :]
            if not 0 < len(continuation) <= self._length:
                raise ConfigFailure(
                    f"Choice {number} of example {example.id} has {len(continuation)} tokens; it must have at least "
                    f"one, and the model's context holds {self._length}.",
                    "Look at the dataset; or take a model with a longer context.",
                )
            over = max(0, len(context) + len(continuation) - self._length - 1)
            cut = max(cut, over)
            pairs.append((context[over:] if over else context, continuation))
        return Query(key, tuple(pairs)), {**sent, "choices": list(example.choices), "tokens_cut": cut}

    def _encoded(self, texts: list[str]) -> Iterator[Ids]:
        """The tokens of each text; special ones as the tokenizer adds them, unless the text brings them."""
        for special in (True, False):
            chosen = [text for text in texts if self._adds(text) is special]
            if len(chosen) == len(texts):
                for ids in self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]:
                    yield tuple([self._known.setdefault(token, token) for token in ids])  # a number is one object
                return
        yield from (next(self._encoded([text])) for text in texts)

    def _adds(self, text: str) -> bool:
        return self._renderer.plain and not text.startswith(self._prefix_text)


def windows(ids: Ids, prefix: int, length: int) -> Iterator[tuple[Ids, Ids]]:
    """Context and continuation of each rolling window: lm_eval/utils.py, `get_rolling_token_windows`, context_len 1.

    A window after the first predicts as much as fits after one token of context; the last one, which has fewer tokens
    to predict, has the more context.
    """
    yield (prefix,), ids[:length]
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[end - length - 1 : start], ids[start:end]


def chosen(task: Task, example: Example, query: Query, found: Likelihood) -> dict[str, Any]:
    """What a row says of an example whose choices were weighed; choices are numbered from 0."""
    row = {
        "logliks": None if found.error else list(found.logliks),
        "tokens_in": max(len(context) for context, _ in query.pairs),
        "tokens_out": 0,
        "target": int(example.target),
        "seed": None,
    }
    if found.error:
        nothing = dict.fromkeys(("prediction", "prediction_norm", "answer", "score"))
        return {**row, **nothing, "answers": {}, "scores": {}}
    return {**row, **verdict(task, found.logliks, example.choices, int(example.target))}


def verdict(task: Task, logliks: Sequence[float], choices: Sequence[str], target: int) -> dict[str, Any]:
    """What follows from the likelihoods, by every rule."""
    answers = choosing.answers(logliks, choices)
    scores = choosing.scores(answers, target)
    return {
        "prediction": answers["acc"],
        "prediction_norm": answers["acc_norm"],
        "answer": answers[task.HEADLINE],
        "score": scores[task.HEADLINE],
        "answers": answers,
        "scores": scores,
    }


def read(example: Example, query: Query, found: Likelihood) -> dict[str, Any]:
    """What a row says of a text that was read: it has a likelihood, and no score (see `jobs/perplexities.py`)."""
    text = example.problem if example.solution is None else example.solution
    tokens = sum(len(continuation) for _, continuation in query.pairs)
    return {
        "loglik": None if found.error else sum(found.logliks),
        "tokens": tokens,
        "words": perplexity.words(text),
        "bytes": len(text.encode("utf-8", "surrogatepass")),
        "tokens_in": tokens,
        "tokens_out": 0,
        "target": None,
        "answer": None,
        "score": None,
        "seed": None,
    }


def _split(context: str, delimiter: str, choices: Sequence[str]) -> tuple[str, list[str]]:
    """The context without the white space at its end, and what follows it for each choice."""
    bare = context.rstrip()
    return bare, [context[len(bare) :] + delimiter + choice for choice in choices]


def _texts(context: str, rests: Sequence[str]) -> list[str]:
    return [context, *(context + rest for rest in rests)]

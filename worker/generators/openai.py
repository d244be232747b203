"""The engine behind a server: any that speaks OpenAI's API, asked by a bounded number of requests side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

from worker.endpoint import Again, Endpoint, Refused
from worker.failures import EngineDied
from worker.generators import Completion, Prompt, Sampling

AUTO_CONCURRENCY = 16
"""Requests at once with batch_size auto: enough for a server that batches, few enough for one that counts them."""
TRIES = 8
WAIT_S, WAIT_MAX_S = 0.5, 30.0
"""The pause before the second try, at random up to so much, and up to twice as much each time: a minute in all."""
SEED_BITS = 31
"""Of a sample's seed, as many as every server takes."""
_LOOK_S = 0.2
_NEWER_LIMIT = "max_completion_tokens"


@dataclass(frozen=True)
class Prices:
    """USD for a million tokens."""

    usd_in: float | None
    usd_out: float | None

    def usd(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """What an answer costs; None when no price is known."""
        if self.usd_in is None and self.usd_out is None:
            return None
        return ((tokens_in or 0) * (self.usd_in or 0.0) + (tokens_out or 0) * (self.usd_out or 0.0)) / 1e6


class OpenAiGenerator:
    """Generator over a server's model of that name; to be ended. `watch` is called again and again, and may raise.

    A prompt's messages go to the server, which applies its own chat template; a prompt that is bare text goes to its
    completions. Failures that may pass are tried again; what the server refuses is a completion with an error.
    """

    def __init__(self, endpoint: Endpoint, model: str, concurrency: int | None, prices: Prices) -> None:
        self._endpoint = endpoint
        self._model = model
        self._concurrency = concurrency or AUTO_CONCURRENCY
        self._prices = prices
        self._limit = "max_tokens"
        self._answered_at = float("-inf")
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="ask")
        self.watch: Callable[[], None] = lambda: None

    def end(self) -> None:
        """Break off whatever is still asked; nothing is asked any more."""
        self._stop.set()
        self._endpoint.break_off()
        self._pool.shutdown(cancel_futures=True)
        self._endpoint.close()

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[tuple[Prompt, Completion]]:
        """Each prompt's completion once, as it is answered; as many prompts are read ahead as are asked at once.

        ConfigFailure when the server would refuse any request, EngineDied when it answers nobody any more.
        """
        source = iter(prompts)
        asked: dict[Future[Completion], Prompt] = {}
        while True:
            for prompt in islice(source, self._concurrency - len(asked)):
                asked[self._pool.submit(self._ask, prompt, sampling)] = prompt
            if not asked:
                return
            done, _ = wait(asked, _LOOK_S, FIRST_COMPLETED)
            for future in sorted(done, key=lambda one: one.exception() is not None):
                yield asked.pop(future), future.result()
            self.watch()

    def _ask(self, prompt: Prompt, sampling: Sampling) -> Completion:
        began = time.monotonic()
        try:
            answer = self._answer(prompt, sampling)
            self._answered_at = time.monotonic()
        except Refused as refused:
            self._answered_at = time.monotonic()
            return Completion("", "error", None, None, str(refused))
        except Again as again:
            if self._answered_at > began:  # it answers others: there is something about this prompt
                return Completion("", "error", None, None, f"no answer in {TRIES} tries: {again}")
            raise EngineDied(
                f"The server did not answer in {TRIES} tries, the last time: {again}. Rows so far are kept.",
                "See that it runs and is reached from the machine of the run, then resume the run.",
            ) from None
        return answer

    def _answer(self, prompt: Prompt, sampling: Sampling) -> Completion:
        """What the server says, tried again where that may help."""
        import tenacity

        pause = tenacity.wait_random_exponential(multiplier=WAIT_S, max=WAIT_MAX_S)

        def asked_for(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(pause(state), error.after_s if isinstance(error, Again) else 0.0)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(TRIES) | tenacity.stop_when_event_set(self._stop),
            wait=asked_for,
            retry=tenacity.retry_if_exception_type(Again),
            sleep=tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        found: Completion = retrying(self._once, prompt, sampling)
        return found

    def _once(self, prompt: Prompt, sampling: Sampling) -> Completion:
        is_chat = "messages" in prompt.asked
        path = "/chat/completions" if is_chat else "/completions"
        try:
            answer = self._endpoint.post(path, self._body(prompt, sampling))
        except Refused as refused:
            if self._limit == _NEWER_LIMIT or _NEWER_LIMIT not in str(refused):
                raise
            self._limit = _NEWER_LIMIT  # some models of OpenAI's take the limit under this name alone
            answer = self._endpoint.post(path, self._body(prompt, sampling))
        return self._completion(answer, is_chat=is_chat)

    def _body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            **prompt.asked,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._limit: sampling.max_new_tokens,
            "seed": prompt.seed & (2**SEED_BITS - 1),
        }
        return {**body, "stop": list(sampling.stop)} if sampling.stop else body

    def _completion(self, answer: dict[str, Any], *, is_chat: bool) -> Completion:
        """The completion in an answer; Again when it is none."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if is_chat else choice["text"]
            reason = choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise Again("the answer holds no completion") from None
        if not isinstance(text, str | None) or not isinstance(reason, str | None):
            raise Again("the answer holds no completion")
        usage = answer.get("usage")
        counted = usage if isinstance(usage, dict) else {}
        tokens_in, tokens_out = (_count(counted.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        usd = self._prices.usd(tokens_in, tokens_out)
        if reason == "content_filter":
            return Completion("", "error", tokens_in, tokens_out, "the server's content filter withheld it", usd)
        if reason not in ("stop", "length") or (text is None and reason == "stop"):
            why = f"the server ended it with {reason!r}" + ("" if text else " and no text")
            return Completion("", "error", tokens_in, tokens_out, why, usd)
        return Completion(text or "", reason, tokens_in, tokens_out, None, usd)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None

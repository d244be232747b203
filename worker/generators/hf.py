"""The transformers engine: a decode loop of our own that refills finished rows and draws alike in any batch."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from worker.generators import Completion, Prompt, Sampling, failed
from worker.generators.noise import NOT_A_TOKEN, draw, greedy, row_keys
from worker.generators.slots import Block, Slots
from worker.generators.texts import Texts
from worker.models import SMALL_MODEL_PARAMETERS, LoadedModel, end_token_ids

AUTO_BATCH_GPU, AUTO_BATCH_CPU, AUTO_BATCH_SMALL = 128, 16, 64
"""Rows in flight with batch_size auto; too many for a GPU's memory corrects itself by halving."""

LOOK_AHEAD = 8
"""Prompts sorted by length at a time, in batches: enough to keep padding small, few enough to stay near file order."""

REFILL_SHARE = 4
"""New prompts join, and finished rows are cut out, once one in so many of the rows is free: both copy the cache."""

PREFILL_TOKENS = 16_384
"""Prompt tokens, padding counted, in one prefill: more would need memory that decoding never does."""

TAIL_MARGIN = 8
"""Tokens decoded beyond the bytes of the longest stop string: the first may be part of a character or lose a space."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What CUDA and MPS, the CPU allocator, and cuBLAS say in a RuntimeError."""


class HfGenerator:
    """Generator over a transformers model. `batch_size` None is auto; the attribute halves when memory runs out.

    Texts do not depend on batch size, order or refills, up to the rounding of the model's own arithmetic. Of the
    model's generation settings only the end-of-sequence tokens count: no top_k, no repetition penalty.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int | None, note: Callable[[str], None]) -> None:
        self.batch_size = batch_size or auto_batch_size(loaded)
        self._tokenizer = loaded.tokenizer
        self._ends = end_token_ids(loaded.model.generation_config, loaded.tokenizer)
        self._note = note
        self._slots = Slots(loaded.model, loaded.device)
        if not self._slots.movable:
            note(
                f"Models of type {self._slots.model_type} keep a state that rows cannot join midway: "
                "only prompts of equal length run together, without refill."
            )

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[tuple[Prompt, Completion]]:
        """Each prompt's completion once, as it finishes; at most `LOOK_AHEAD` batches of prompts are read ahead.

        A prompt that does not fit into memory alone is completed with finish_reason `error`; the rest goes on.
        """
        texts = Texts(self._tokenizer, self._ends, sampling.stop)
        flight = Flight(self._slots, sampling, Ending(texts, sampling.max_new_tokens))
        queue = Queue(prompts, LOOK_AHEAD * self.batch_size)
        proven_size = self.batch_size
        while flight.rows or not queue.is_empty():
            trouble = _attempt(flight, queue, self.batch_size)
            if flight.finished:
                proven_size = self.batch_size
                yield from flight.collect()
            if trouble is None:
                continue
            waiting = flight.drop()
            free_memory()
            if self.batch_size > 1:
                self._note(f"Out of memory with a batch of {self.batch_size}; going on with half of it.")
                self.batch_size //= 2
                queue.put_back(waiting)
            else:  # one prompt too large for the memory must not slow down the rest
                self.batch_size = proven_size
                yield from ((prompt, failed(prompt, f"this prompt alone: {trouble}")) for prompt in waiting)


def auto_batch_size(loaded: LoadedModel) -> int:
    """Rows in flight when the user leaves it to us."""
    if loaded.device.type != "cpu":
        return AUTO_BATCH_GPU
    return AUTO_BATCH_SMALL if loaded.parameters < SMALL_MODEL_PARAMETERS else AUTO_BATCH_CPU


class Queue:
    """Prompts still to run, `window` of them read at a time: longest first, equal ones side by side.

    Longest first, so that memory runs out at the start if at all, and the last rows to finish are short.
    """

    def __init__(self, prompts: Iterable[Prompt], window: int) -> None:
        self._source = iter(prompts)
        self._window = window
        self._ready: deque[Prompt] = deque()

    def is_empty(self) -> bool:
        """Whether no prompt is left; reads the next ones when none is at hand."""
        if not self._ready:
            ahead = list(islice(self._source, self._window))
            first_seen: dict[tuple[int, ...], int] = {}
            for number, prompt in enumerate(ahead):
                first_seen.setdefault(prompt.token_ids, number)
            ahead.sort(key=lambda prompt: (-len(prompt.token_ids), first_seen[prompt.token_ids]))
            self._ready.extend(ahead)
        return not self._ready

    def take(self, count: int, one_length: bool) -> list[Prompt]:
        """At least one and at most `count` prompts, of one length if asked, for a prefill within PREFILL_TOKENS."""
        taken = [self._ready.popleft()]
        distinct, width = {taken[0].token_ids}, len(taken[0].token_ids)
        while self._ready and len(taken) < count:
            ids = self._ready[0].token_ids
            width = max(width, len(ids))
            distinct.add(ids)
            if len(distinct) * width > PREFILL_TOKENS or (one_length and len(ids) != len(taken[0].token_ids)):
                break
            taken.append(self._ready.popleft())
        return taken

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """These prompts will be taken first again, in this order."""
        self._ready.extendleft(reversed(prompts))


@dataclass
class Row:
    """A prompt in flight and the tokens generated for it; when `done`, its place in the batch waits to be cut out."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    done: bool = False


class Flight:
    """The rows in flight: row b of the cache block belongs to `rows[b]`, done or not."""

    def __init__(self, slots: Slots, sampling: Sampling, ending: Ending) -> None:
        self.rows: list[Row] = []
        self.finished: list[tuple[Prompt, Completion]] = []
        self._slots = slots
        self._sampling = sampling
        self._ending = ending
        self._block: Block | None = None
        self._tokens: Any = None  # int64 (B), the last token of each row, not yet in the cache
        self._alive: Any = None  # int64 (B), 0 for a row that is done
        self._seeds: Any = None  # int64 (B), on the CPU as are the steps: keys of rows are too small for a GPU
        self._steps: Any = None  # int64 (B), tokens generated so far

    def advance(self, queue: Queue, size: int) -> None:
        """Lets prompts join if enough of `size` places are free, else goes one token further; fills `finished`."""
        import torch

        seated = [place for place, row in enumerate(self.rows) if not row.done]
        free = size - len(seated)
        with torch.inference_mode():
            if self._may_join(free, size) and not queue.is_empty():
                self._join(queue.take(free, one_length=not self._slots.paddable), seated)
            else:
                if self._slots.movable and len(seated) * REFILL_SHARE <= len(self.rows) * (REFILL_SHARE - 1):
                    self._seat([(self._block, seated)])
                self._step()
        if all(row.done for row in self.rows):
            self.drop()

    def collect(self) -> list[tuple[Prompt, Completion]]:
        """What finished since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def drop(self) -> list[Prompt]:
        """Lets go of the cache and of every row; the prompts of those that were not done."""
        waiting = [row.prompt for row in self.rows if not row.done]
        self.rows, self._block = [], None
        return waiting

    def _may_join(self, free: int, size: int) -> bool:
        return free * REFILL_SHARE >= size if self._slots.movable else not self.rows

    def _join(self, prompts: list[Prompt], seated: list[int]) -> None:
        """Prefills the prompts, equal ones once, draws their first tokens, and seats those that go on."""
        import torch

        self.finished += [
            (prompt, failed(prompt, "the prompt has no tokens")) for prompt in prompts if not prompt.token_ids
        ]
        prompts = [prompt for prompt in prompts if prompt.token_ids]
        if not prompts:
            return
        joining = [Row(prompt) for prompt in prompts]
        self.rows += joining  # before anything can run out of memory, so that `drop` finds them
        ids = [prompt.token_ids for prompt in prompts]
        if not self._slots.movable:
            self._block, logits = self._slots.prefill(ids)
            places = list(range(len(ids)))
        else:
            distinct = {one: place for place, one in enumerate(dict.fromkeys(ids))}
            block, logits = self._slots.prefill(list(distinct))
            places = [distinct[one] for one in ids]
        seeds = torch.tensor([prompt.seed for prompt in prompts])
        self._settle(joining, self._choose(logits[places], seeds, torch.zeros_like(seeds)))
        if self._slots.movable:
            going_on = [place for place, row in zip(places, joining, strict=True) if not row.done]
            self._seat([(self._block, seated), (block, going_on)])
        self._read_rows()

    def _seat(self, parts: list[tuple[Block | None, list[int]]]) -> None:
        """Makes one block of these rows of each part, and cuts out of `rows` those that are done."""
        self.rows = [row for row in self.rows if not row.done]
        filled = [(block, places) for block, places in parts if block is not None and places]
        self._block = self._slots.merge(filled) if filled else None
        self._read_rows()

    def _read_rows(self) -> None:
        import torch

        self._tokens = torch.tensor([row.ids[-1] if row.ids else 0 for row in self.rows], device=self._slots.device)
        self._alive = torch.tensor([int(not row.done) for row in self.rows], device=self._slots.device)
        self._seeds = torch.tensor([row.prompt.seed for row in self.rows])
        self._steps = torch.tensor([len(row.ids) for row in self.rows])

    def _step(self) -> None:
        assert self._block is not None
        logits = self._slots.decode(self._block, self._tokens, self._alive)
        tokens = self._choose(logits, self._seeds, self._steps)
        self._steps += 1
        self._tokens = tokens.clamp(min=0)
        if gone := self._settle(self.rows, tokens):
            self._alive[gone] = 0

    def _choose(self, logits: Any, seeds: Any, steps: Any) -> Any:
        if self._sampling.temperature == 0:
            return greedy(logits)
        return draw(logits, self._sampling.temperature, self._sampling.top_p, row_keys(seeds, steps))

    def _settle(self, rows: list[Row], tokens: Any) -> list[int]:
        """Gives each row its token (B); the places of the rows that are done by it."""
        gone = []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if not row.done and (completion := self._ending.completion(row, token)):
                row.done = True
                self.finished.append((row.prompt, completion))
                gone.append(place)
        return gone


class Ending:
    """Decides after each token whether a row is done, and with which text."""

    def __init__(self, texts: Texts, limit: int) -> None:
        self._texts = texts
        self._limit = limit
        self._tail_tokens = TAIL_MARGIN + max((len(stop.encode()) for stop in texts.stops), default=0)
        self._last_characters = {stop[-1] for stop in texts.stops} | {"\N{REPLACEMENT CHARACTER}"}
        self._completing: dict[int, bool] = {}

    def completion(self, row: Row, token: int) -> Completion | None:
        """The row's completion if this token, added to the row here, is its last; None when it goes on."""
        if token == NOT_A_TOKEN:
            return failed(row.prompt, "the model's scores are not numbers (NaN or infinite)", len(row.ids))
        row.ids.append(token)
        is_last = token in self._texts.ends or len(row.ids) >= self._limit
        if not is_last and not self._may_stop(row.ids):
            return None
        found = self._texts.completion(row.prompt, row.ids)
        return found if is_last or found.finish_reason == "stop" else None

    def _may_stop(self, ids: list[int]) -> bool:
        """Whether a stop string may just have been completed; cheap, as it is asked for every token."""
        if not self._texts.stops:
            return False
        token = ids[-1]
        if token not in self._completing:
            piece = self._texts.decoded([token])
            # Some decoders drop a space at the start of a text, so the piece alone cannot rule a space out.
            self._completing[token] = " " in self._last_characters or any(
                character in piece for character in self._last_characters
            )
        if not self._completing[token]:
            return False
        tail = self._texts.decoded(ids[-self._tail_tokens :])
        return any(stop in tail for stop in self._texts.stops)


def _attempt(flight: Flight, queue: Queue, size: int) -> str | None:
    """Advances the flight; what was said if memory ran out. Returning lets go of the tensors the error holds on to."""
    try:
        flight.advance(queue, size)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        return out_of_memory(error)
    return None


def out_of_memory(error: RuntimeError) -> str:
    """What was said when memory ran out; any other error is raised again."""
    if not any(sign in str(error) for sign in OUT_OF_MEMORY):
        raise error
    return str(error).strip().split("\n")[0]


def free_memory() -> None:
    """Gives back what no tensor holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

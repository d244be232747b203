"""The transformers engine of likelihoods: what many texts begin with is read once, and choices after their context.

Three stages share what they read: the beginning that many contexts have in common (worked examples), each context
after it, and the continuations after their context. A continuation of one token needs no stage of its own.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite
from typing import Any

from worker.generators import Ids, Likelihood, Query
from worker.generators.hf import LOOK_AHEAD, PREFILL_TOKENS, auto_batch_size, free_memory, out_of_memory
from worker.generators.stems import Place, Reader, Stem
from worker.models import LoadedModel

SHARED_TOKENS, SHARED_BY = 64, 4
"""A beginning is read apart from so many tokens on, when so many contexts of those at hand have it."""

SCORED_TOKENS = 4096
"""Places of one pass at which scores are made: each takes a number for every word of the vocabulary."""

_SUMMED_ROWS = 512  # places whose scores are summed at once: that copies them, in float32

Spot = tuple[int, int]
"""A unit's place in its batch, and the number of one of its continuations."""


@dataclass(frozen=True)
class Unit:
    """A context, and the continuations that a query has after it, by their numbers in the query."""

    query: Query
    context: Ids
    continuations: dict[int, Ids]

    def bodies(self) -> list[Ids]:
        """What has to be read of the continuations: all but their last tokens, each different one once."""
        return list(dict.fromkeys(ids[:-1] for ids in self.continuations.values()))

    def tokens(self) -> int:
        """The length of the longest text that is read for it."""
        return len(self.context) + max(map(len, self.continuations.values())) - 1


class HfWeigher:
    """Weigher over a transformers model. `batch_size` None is auto; the attribute halves when memory runs out.

    Likelihoods do not depend on batch size, order or what is shared, up to the rounding of the model's own arithmetic.
    """

    def __init__(
        self, loaded: LoadedModel, batch_size: int | None, max_length: int, note: Callable[[str], None]
    ) -> None:
        """`max_length`: tokens the model has positions for."""
        self.batch_size = batch_size or auto_batch_size(loaded)
        self._note = note
        self._reader = Reader(loaded.model, loaded.device, max_length)
        self._beginning: tuple[Ids, Stem | None] = ((), None)

    def weigh(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Likelihood]]:
        """Each query's likelihoods once, as soon as all are known; `LOOK_AHEAD` batches of queries are read ahead.

        A query that does not fit into memory alone is answered with an error; the rest goes on.
        """
        source = iter(queries)
        while ahead := list(islice(source, LOOK_AHEAD * self.batch_size)):
            tally = _Tally()
            units = [unit for query in ahead for unit in tally.units(query)]
            for beginning, group in self._groups(units):
                yield from self._weigh_group(beginning, group, tally)

    def _groups(self, units: list[Unit]) -> Iterator[tuple[Ids, list[Unit]]]:
        """The units by the beginning they share; first those that share none."""
        by_start: dict[Ids, list[Unit]] = {(): []}
        for unit in units:
            is_long = self._reader.can_go_on and len(unit.context) > SHARED_TOKENS
            by_start.setdefault(unit.context[:SHARED_TOKENS] if is_long else (), []).append(unit)
        for start in [start for start, group in by_start.items() if start and len(group) < SHARED_BY]:
            by_start[()] += by_start.pop(start)
        for start, group in by_start.items():
            if group:
                yield self._shared(group) if start else (), group

    def _shared(self, group: list[Unit]) -> Ids:
        """The beginning that all contexts of a group have, each going on after it; the one at hand if that will do."""
        contexts = [unit.context for unit in group]
        first, last = min(contexts), max(contexts)  # what these have in common, all have
        most = min(map(len, contexts)) - 1
        same = next((n for n in range(most) if first[n] != last[n]), most)
        known = self._beginning[0]
        return known if SHARED_TOKENS <= len(known) <= same and first[: len(known)] == known else first[:same]

    def _weigh_group(self, beginning: Ids, group: list[Unit], tally: _Tally) -> Iterator[tuple[Query, Likelihood]]:
        """Weighs in batches, longest first, so that memory runs out at the start if at all."""
        queue = deque(sorted(group, key=lambda unit: -unit.tokens()))
        proven_size = self.batch_size
        while queue:
            batch = self._take(queue, len(beginning))
            found, trouble = self._attempt(beginning, batch)
            if trouble is None:
                proven_size = self.batch_size
                yield from tally.answers(batch, found)
                continue
            free_memory()
            if self.batch_size > 1:
                self._note(f"Out of memory with a batch of {self.batch_size}; going on with half of it.")
                self.batch_size //= 2
                queue.extendleft(reversed(batch))
            else:  # one query too large for the memory must not slow down the rest
                self.batch_size = proven_size
                yield from tally.failures(batch, f"this text alone: {trouble}")

    def _take(self, queue: deque[Unit], shared: int) -> list[Unit]:
        """At least one and at most `batch_size` texts, for one pass within PREFILL_TOKENS and SCORED_TOKENS."""
        batch: list[Unit] = []
        rows = scored = 0
        while queue:
            width = (batch or queue)[0].tokens() - shared
            rows += 1 if self._reader.can_go_on else len(queue[0].bodies())
            scored += max(map(len, queue[0].continuations.values()))
            if batch and (rows > self.batch_size or rows * width > PREFILL_TOKENS or scored > SCORED_TOKENS):
                break
            batch.append(queue.popleft())
        return batch

    def _attempt(self, beginning: Ids, batch: list[Unit]) -> tuple[dict[Spot, float], str | None]:
        """What a batch weighs, or what was said when memory ran out; returning lets go of what the error holds."""
        import torch

        try:
            with torch.inference_mode():
                passes = _Passes(self._reader, self.batch_size)
                return passes.run(batch, len(beginning), self._stem(beginning)), None
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            return {}, out_of_memory(error)

    def _stem(self, beginning: Ids) -> Stem | None:
        """What was read of a beginning; the last one is at hand, since datasets keep together what belongs together."""
        if self._beginning[0] != beginning:
            self._beginning = ((), None)  # before another takes its room
            stem = None
            if beginning:
                _, stem = self._reader.read_and_keep([beginning], [(0, len(beginning) - 1)], None)
            self._beginning = (beginning, stem)
        return self._beginning[1]


class _Tally:
    """What is known of the queries at hand; each is answered once, when all of its units are."""

    def __init__(self) -> None:
        self._missing: dict[str, int] = {}
        self._found: dict[str, dict[int, float]] = {}

    def units(self, query: Query) -> list[Unit]:
        """A query's pairs by their contexts."""
        by_context: dict[Ids, dict[int, Ids]] = {}
        for number, (context, continuation) in enumerate(query.pairs):
            by_context.setdefault(context, {})[number] = continuation
        self._missing[query.key], self._found[query.key] = len(by_context), {}
        return [Unit(query, context, continuations) for context, continuations in by_context.items()]

    def answers(self, batch: list[Unit], found: dict[Spot, float]) -> Iterator[tuple[Query, Likelihood]]:
        """The queries of which these units were the last."""
        for place, unit in enumerate(batch):
            key = unit.query.key
            if key not in self._missing:  # it has failed
                continue
            self._found[key] |= {number: found[place, number] for number in unit.continuations}
            self._missing[key] -= 1
            if self._missing[key] == 0:
                yield unit.query, self._whole(unit.query)

    def failures(self, batch: list[Unit], why: str) -> Iterator[tuple[Query, Likelihood]]:
        """The queries of these units, answered with an error."""
        for unit in batch:
            if self._missing.pop(unit.query.key, 0):
                yield unit.query, Likelihood((), why)

    def _whole(self, query: Query) -> Likelihood:
        del self._missing[query.key]
        logliks = self._found.pop(query.key)
        if not all(map(isfinite, logliks.values())):
            return Likelihood((), "the model's scores are not numbers (NaN or infinite)")
        return Likelihood(tuple(logliks[number] for number in range(len(query.pairs))))


@dataclass
class _Texts:
    """What one pass reads: a text a row, and at which place of it which token's likelihood goes to which sum."""

    rows: list[Ids] = field(default_factory=list)
    asked: list[tuple[Place, int, Spot]] = field(default_factory=list)

    def add(self, text: Ids) -> int:
        """A further text; its row."""
        self.rows.append(text)
        return len(self.rows) - 1

    def ask(self, row: int, column: int, tokens: Ids, spot: Spot) -> None:
        """How likely these tokens are, the first of them after this column of a row, the others after the next."""
        self.asked += [((row, column + number), token, spot) for number, token in enumerate(tokens)]


@dataclass
class _Branch:
    """What is read after a context of the first pass, once for all continuations that differ in their last token."""

    row: int
    body: Ids
    ends: list[tuple[Spot, Ids]]


class _Passes:
    """The passes over one batch; `sums` adds up what the tokens of each continuation weigh."""

    def __init__(self, reader: Reader, batch_size: int) -> None:
        self.sums: dict[Spot, float] = defaultdict(float)
        self._reader = reader
        self._batch_size = batch_size

    def run(self, batch: list[Unit], shared: int, stem: Stem | None) -> dict[Spot, float]:
        """The log-likelihood of every continuation of a batch, of whose contexts `shared` tokens are the stem."""
        texts, branches = _Texts(), list[_Branch]()
        for place, unit in enumerate(batch):
            self._lay_out(unit, place, shared, texts, branches)
        before = stem.pick([0] * len(texts.rows)) if stem else None
        if not branches:
            self._add(texts, lambda places: self._reader.read(texts.rows, places, before))
            return self.sums
        kept: list[Stem] = []

        def read(places: list[Place]) -> Any:
            logits, after = self._reader.read_and_keep(texts.rows, places, before)
            kept.append(after)
            return logits

        self._add(texts, read)
        for group in self._grouped(branches):
            self._go_on(group, kept[0])
        return self.sums

    def _lay_out(self, unit: Unit, place: int, shared: int, texts: _Texts, branches: list[_Branch]) -> None:
        """A unit's context, with what follows it where that is one thing only, else with branches."""
        rest, bodies = unit.context[shared:], unit.bodies()
        ends = {
            body: [((place, n), ids) for n, ids in unit.continuations.items() if ids[:-1] == body] for body in bodies
        }
        if len(bodies) == 1 or not self._reader.can_go_on:
            for body in bodies:
                row = texts.add((*rest, *body))
                for spot, ids in ends[body]:
                    texts.ask(row, len(rest) - 1, ids, spot)
            return
        row = texts.add(rest)
        for body in bodies:
            for spot, ids in ends[body]:
                texts.ask(row, len(rest) - 1, ids[:1], spot)
            if body:
                branches.append(_Branch(row, body, ends[body]))

    def _grouped(self, branches: list[_Branch]) -> Iterator[list[_Branch]]:
        """Longest first, as many as one pass may have."""
        branches = sorted(branches, key=lambda branch: -len(branch.body))
        while branches:
            count = max(1, min(self._batch_size, SCORED_TOKENS // len(branches[0].body)))
            yield branches[:count]
            branches = branches[count:]

    def _go_on(self, group: list[_Branch], stem: Stem) -> None:
        texts = _Texts()
        for branch in group:
            row = texts.add(branch.body)
            for spot, ids in branch.ends:
                texts.ask(row, 0, ids[1:], spot)
        before = stem.pick([branch.row for branch in group])
        self._add(texts, lambda places: self._reader.read(texts.rows, places, before))

    def _add(self, texts: _Texts, read: Callable[[list[Place]], Any]) -> None:
        """Adds the log-probability of every token asked for to its sum."""
        import torch

        places = {place: number for number, place in enumerate(dict.fromkeys(place for place, _, _ in texts.asked))}
        logits = read(list(places))  # (N, V)
        precise = torch.promote_types(logits.dtype, torch.float32)
        norms = torch.cat([piece.to(precise).logsumexp(dim=-1) for piece in logits.split(_SUMMED_ROWS)])  # (N)
        numbers = torch.tensor([places[place] for place, _, _ in texts.asked], device=logits.device)
        tokens = torch.tensor([token for _, token, _ in texts.asked], device=logits.device)
        found = logits[numbers, tokens].to(precise) - norms[numbers]
        for (_, _, spot), value in zip(texts.asked, found.tolist(), strict=True):
            self.sums[spot] += value

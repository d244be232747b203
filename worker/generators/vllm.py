"""The vLLM engine: a copy of the model on each group of GPUs, fed from one queue, rows out as each finishes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from worker.failures import ConfigFailure, EngineDied
from worker.generators import Completion, Prompt, Sampling, failed
from worker.generators.texts import Texts
from worker.models import ModelRequest
from worker.offspring import Offspring

GRACE_S = 2.0
"""How long a copy has to end by itself; it has nothing to save."""
_MAIN = str(Path(__file__).resolve().parent.parent / "__main__.py")
Frame = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """What each copy loads, and on what: `gpus` are all there are, in groups of `tensor_parallel`."""

    request: ModelRequest
    dtype: str
    tokens_max: int
    """Of a prompt and its completion together."""
    batch_size: int | None
    gpus: list[str]
    tensor_parallel: int = 1
    data_parallel: int | None = None

    def groups(self) -> list[list[str]]:
        """The GPUs of each copy; a copy without any where the machine has none. ConfigFailure when they are too few."""
        copies = self.data_parallel or max(len(self.gpus) // self.tensor_parallel, 1)
        needed = copies * self.tensor_parallel
        if self.gpus and needed > len(self.gpus):
            raise ConfigFailure(
                f"data_parallel={copies} times tensor_parallel={self.tensor_parallel} takes {needed} GPUs; "
                f"the run has {len(self.gpus)}.",
                "Take fewer, or leave data_parallel at auto.",
            )
        size = self.tensor_parallel
        return [self.gpus[number * size : (number + 1) * size] for number in range(copies)]

    def arguments(self) -> Frame:
        """For vLLM's engine. Of the model's own generation settings none count; end tokens go with each request."""
        found: Frame = {
            "model": self.request.model,
            "revision": self.request.revision,
            "tokenizer_revision": self.request.revision,
            "trust_remote_code": self.request.trust_remote_code,
            "dtype": self.dtype,
            "generation_config": "vllm",
            "max_model_len": self.tokens_max,
            "enable_prefix_caching": True,
            "tensor_parallel_size": self.tensor_parallel,
            "disable_log_stats": True,
            "seed": 0,
        }
        return found if self.batch_size is None else {**found, "max_num_seqs": self.batch_size}


@dataclass
class Copy:
    """A copy of the model, and the prompts it is at."""

    name: str
    offspring: Offspring
    takes: int = 0
    """How many prompts it is given at once; 0 until it is ready."""
    asked: dict[int, Prompt] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many more it takes."""
        return self.takes - len(self.asked)

    def send(self, frame: Frame) -> None:
        """One line to it; should it be gone, that is heard of after all that it has answered."""
        assert self.offspring.process.stdin is not None
        with contextlib.suppress(OSError):
            self.offspring.process.stdin.write(json.dumps(frame).encode() + b"\n")
            self.offspring.process.stdin.flush()

    def how_it_ended(self) -> str:
        """In words, once it has closed its pipe."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.offspring.process.wait(GRACE_S)
        return self.offspring.how_it_ended() or "closed its pipe"

    def died(self, why: str) -> EngineDied:
        """The failure to raise when it has ended before its time."""
        why = why or self.how_it_ended()
        return EngineDied(
            f"{self.name} died in the middle: {why}. Rows so far are kept; {len(self.asked)} were under way.",
            "See why: gpu logs. Then resume the run: only what is missing is made.",
        )


class VllmGenerator:
    """Generator over copies of a model in vLLM. A context manager: it loads on entry, and nothing of it stays.

    `ends` are the tokens that end a completion. Equal prompts that follow each other go to one copy, which reads them
    once.
    """

    def __init__(self, load: Load, tokenizer: Any, ends: frozenset[int]) -> None:
        self._load = load
        self._tokenizer = tokenizer
        self._ends = ends
        self._copies: list[Copy] = []
        self._news: queue.Queue[tuple[Copy, Frame]] = queue.Queue()

    def __enter__(self) -> VllmGenerator:
        """Start every copy side by side, and wait until all have loaded; ConfigFailure says why one cannot."""
        groups = self._load.groups()
        try:
            for number, gpus in enumerate(groups):
                self._copies.append(self._started(f"vLLM ({number + 1} of {len(groups)})", gpus))
            while not all(copy.takes for copy in self._copies):
                self._wait_for_one()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """End every copy with all it started."""
        for copy in self._copies:
            copy.offspring.end(GRACE_S)

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[tuple[Prompt, Completion]]:
        """Each prompt's completion once, as it finishes; EngineDied when a copy ends before it should."""
        texts = Texts(self._tokenizer, self._ends, sampling.stop)
        told = {"sampling": {**asdict(sampling), "stop": texts.stops, "ends": sorted(self._ends)}}
        for copy in self._copies:
            copy.send(told)
        for number, prompt in enumerate(prompts):
            while (free := self._free(prompt)) is None:
                yield from self._hear(texts)
            free.asked[number] = prompt
            free.send({"number": number, "ids": prompt.token_ids, "seed": prompt.seed})
            while not self._news.empty():
                yield from self._hear(texts)
        while any(copy.asked for copy in self._copies):
            yield from self._hear(texts)

    def _free(self, prompt: Prompt) -> Copy | None:
        """The copy that takes a prompt next: one that was just given the same tokens, else the one with most room."""
        for copy in self._copies:
            last = next(reversed(copy.asked.values()), None)
            if copy.room > 0 and last is not None and last.token_ids == prompt.token_ids:
                return copy
        best = max(self._copies, key=lambda copy: copy.room)
        return best if best.room > 0 else None

    def _hear(self, texts: Texts) -> Iterator[tuple[Prompt, Completion]]:
        """What the next frame of any copy says is finished, waiting for it."""
        copy, frame = self._news.get()
        if "number" not in frame:
            raise copy.died(frame.get("died", ""))
        prompt = copy.asked.pop(frame["number"])
        if "error" in frame:
            yield prompt, failed(prompt, frame["error"], len(frame.get("ids", ())))
        else:
            yield prompt, texts.completion(prompt, frame["ids"])

    def _wait_for_one(self) -> None:
        """Hear of a copy that is ready, or raise why it is not."""
        copy, frame = self._news.get()
        if "ready" not in frame:
            why = frame.get("failed") or f"{copy.name} {copy.how_it_ended()}"
            raise ConfigFailure(
                f"vLLM cannot load {self._load.request.model}: {why}",
                "The log has all that vLLM said (gpu logs). Where it cannot run this model: --set engine=hf",
            )
        copy.takes = frame["ready"]

    def _started(self, name: str, gpus: list[str]) -> Copy:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else dict(os.environ)
        words = [sys.executable, "-I", "-X", "utf8", _MAIN, "replica"]
        copy = Copy(name, Offspring(words, env, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        adapter = self._load.request.adapter
        copy.send({"parent": os.getpid(), "arguments": self._load.arguments(), "adapter": adapter})
        threading.Thread(target=self._listen, args=(copy,), name="vllm-news", daemon=True).start()
        return copy

    def _listen(self, copy: Copy) -> None:
        assert copy.offspring.process.stdout is not None
        with contextlib.suppress(ValueError):  # a last line that was cut
            for line in copy.offspring.process.stdout:
                self._news.put((copy, json.loads(line)))
        self._news.put((copy, {}))  # its end

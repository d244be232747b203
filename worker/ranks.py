"""The processes that train together: the first starts the others, they meet in time, and one that dies ends all.

Neither torchrun nor accelerate starts them: their launcher would be a second supervisor, which restarts and signals
beside ours, and what it started would outlive it when it is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from jobs import durable, rundir
from worker import processes
from worker.failures import ConfigFailure

WAIT_S = 600.0
"""How long a process waits for another: nobody falls so far behind within a step and still works."""
LOAD_S = 1800.0
"""The same while they load the model."""
_POLL_S = 0.1
_TOLD_WITHIN_S = 5.0
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_MAIN = Path(__file__).resolve().parent / "__main__.py"
T = TypeVar("T")


@dataclass
class Ranks:
    """One process of those that train together, and how it meets them. One alone (`size` 1) meets nobody."""

    rank: int = 0
    size: int = 1
    folder: Path = Path()
    """Where they find each other; new for each attempt."""
    wait_s: float = WAIT_S
    _group: Any = None
    """Those who add up gradients, on their devices."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def join(self, device: Any) -> None:
        """Wait until every process has come so far, then connect with them, over this machine's loopback alone."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // self.size)))
        os.environ.update(GLOO_SOCKET_IFNAME=_LOOPBACK, NCCL_SOCKET_IFNAME=_LOOPBACK)
        store = dist.FileStore(str(self.folder / "store"), self.size)
        store.set(f"here/{self.rank}", "")
        store.wait([f"here/{rank}" for rank in range(self.size)], timedelta(seconds=LOAD_S))
        deadline = timedelta(seconds=self.wait_s)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=deadline)
        if device.type == "cuda":
            self._group = dist.new_group(backend="nccl", timeout=deadline)

    def meet(self, word: T) -> list[T]:
        """What every process says, by rank. RuntimeError when one does not come in time."""
        if self.size == 1:
            return [word]
        import torch.distributed as dist

        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, word)
        return said

    def led(self, do: Callable[[], T]) -> T:
        """What the first process got by doing it, for all."""
        return self.meet(do() if self.is_first else None)[0]  # type: ignore[return-value]

    def collect(self, word: T) -> list[T]:
        """What every process says, by rank, to the first; the others hear nothing."""
        if self.size == 1:
            return [word]
        import torch.distributed as dist

        said: list[Any] = [None] * self.size * self.is_first
        dist.gather_object(word, said if self.is_first else None)
        return said

    def add_up(self, weights: Sequence[Any]) -> None:
        """Make each weight's gradient the sum over all processes; who has none anywhere stays without."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        has = self.meet([each.grad is not None for each in weights])
        reached = [each for each, *some in zip(weights, *has, strict=True) if any(some)]
        for each in reached:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        flat = torch.cat([each.grad.flatten() for each in reached])
        dist.all_reduce(flat, group=self._group)
        parts = flat.split([each.numel() for each in reached])
        for each, part in zip(reached, parts, strict=True):
            each.grad.copy_(part.view_as(each))

    def leave(self) -> None:
        """Let the connections go, so that this process may join others."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def count(params: dict[str, Any], device: str) -> int:
    """How many processes train: one for each GPU of the run, as far as a step has micro-batches for them.

    A job without that parameter trains in one.
    """
    asked, most = params.get("processes", 1), params["accumulation"]
    if asked == "auto":
        return int(min(gpus(device), most))
    if asked > most:
        raise ConfigFailure(
            f"processes={asked}, but a step has {most} micro-batches: the others would do nothing.",
            f"--set accumulation={asked}, or --set processes={most}",
        )
    if asked > gpus(device) and device != "cpu":
        raise ConfigFailure(
            f"processes={asked}, but this run has {gpus(device)} GPUs.", f"--set processes={gpus(device)}"
        )
    return int(asked)


def gpus(device: str) -> int:
    """How many devices of the kind there are for this run; one that was named by its number is one."""
    import torch

    return torch.cuda.device_count() if device == "cuda" else 1


@contextlib.contextmanager
def gathered(attempt: rundir.Attempt, job: dict[str, Any], size: int) -> Iterator[Ranks]:
    """Start as many processes as are missing to `size`; none of them outlives the block.

    When one of them dies, this process ends inside the block, in the same way.
    """
    ranks = Ranks(0, size, attempt.folder / "ranks", WAIT_S)
    if size == 1:
        yield ranks
        return
    durable.have_folder(ranks.folder)
    others = _Others(attempt, job, ranks)
    try:
        yield ranks
        ranks.leave()
    except RuntimeError:  # a lost connection: the watch knows whose death it was, and ends this process
        others.watch.join(_TOLD_WITHIN_S)
        raise
    finally:
        others.end()


class _Others:
    """The processes beside the first, and the thread of the first that watches them."""

    def __init__(self, attempt: rundir.Attempt, job: dict[str, Any], ranks: Ranks) -> None:
        self._over = threading.Event()
        self._size = ranks.size
        place = [str(attempt.folder.parent.parent), str(attempt.number)]
        order = {"job": job, "size": ranks.size, "wait_s": ranks.wait_s, "parent": os.getpid()}
        self._started = []
        for rank in range(1, ranks.size):
            words = [sys.executable, "-I", "-X", "utf8", str(_MAIN), "assist", *place, str(rank)]
            child = subprocess.Popen(words, stdin=subprocess.PIPE)
            self._started.append(child)
            with contextlib.suppress(BrokenPipeError), child.stdin or contextlib.nullcontext() as pipe:
                pipe.write(json.dumps(order).encode())  # type: ignore[union-attr]
        self.watch = threading.Thread(target=self._watch, name="ranks-watch", daemon=True)
        self.watch.start()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_S):
            for rank, child in enumerate(self._started, start=1):
                if code := child.poll():
                    self._end_like(rank, child.pid, code)

    def _end_like(self, rank: int, pid: int, code: int) -> None:
        """End this process as one of the others ended, from outside or by itself; the kernel ends the rest with it."""
        ended = f"Process {rank} of {self._size} (pid {pid}) {processes.ending(code)}; the others end with it."
        print(ended, flush=True)  # noqa: T201 -- the worker's log is its standard output
        self._kill()
        if code < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(code)

    def _kill(self) -> None:
        """Nothing is lost by it: only the first process writes."""
        for child in self._started:
            child.kill()

    def end(self) -> None:
        """End them; one that does not die, in a driver say, is left to the supervisor."""
        self._over.set()
        self.watch.join()
        self._kill()
        for child in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_TOLD_WITHIN_S)

"""The GPUs of this machine: which there are, which run holds them, who waits for them, whether they are free again."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs import durable, locks, rundir
from worker import processes
from worker.failures import ConfigFailure

FREED_MIB = 200
"""A GPU is free again when it holds at most this much more than before the worker began."""
FREED_WITHIN_S = 10.0
_ASK_S = 10.0
_KILLED_WITHIN_S = 1.0
_LOCK_WAIT_S = 10.0
_PAUSE_S = 0.5
_FILES = "/dev/nvidia"
"""How the names of all files begin through which a process uses a GPU."""
_TICKET = re.compile(r"([0-9]{8})-(.+)")


def visible() -> list[str]:
    """What CUDA on this machine may use, as CUDA_VISIBLE_DEVICES names it; empty where there is no GPU."""
    listed = [(row[0], row[1]) for row in _ask("--query-gpu=index,uuid") if len(row) == 2]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None or not listed:
        return [index for index, _ in listed]
    found: list[str] = []
    for name in (part.strip() for part in given.split(",")):
        device = _device(name, listed)
        if device is None or device in found:  # CUDA, too, takes what stands before the first name it does not know
            break
        found.append(device)
    return found


def _device(name: str, listed: list[tuple[str, str]]) -> str | None:
    """The index of the GPU that a name stands for; a part of a GPU (MIG) keeps its name; None: there is none."""
    for index, uuid in listed:
        if name == index or (name.startswith("GPU-") and uuid.startswith(name)):
            return index
    return name if name.startswith("MIG-") and rundir.is_safe_name(name) else None


def count() -> int:
    """How many GPUs this machine has for runs; 0 where nvidia-smi is absent, fails, or does not answer in time."""
    return len(visible())


def memory_used() -> dict[str, int]:
    """MiB in use on each GPU that says so."""
    rows = _ask("--query-gpu=index,memory.used")
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def utilisation() -> dict[str, int]:
    """Percent of the last moment in which each GPU computed; empty where nvidia-smi does not say."""
    rows = _ask("--query-gpu=index,utilization.gpu")
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _ask(*words: str) -> list[list[str]]:
    """The fields of each line nvidia-smi answers with; none when it is absent, fails, or takes too long."""
    command = ["nvidia-smi", *words, "--format=csv,noheader,nounits"]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, errors="replace"
        )
    except OSError:
        return []
    try:
        said, _ = child.communicate(timeout=_ASK_S)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs may keep it for ever
            child.communicate(timeout=_KILLED_WITHIN_S)
        return []
    if child.returncode:
        return []
    return [[field.strip() for field in line.split(",")] for line in said.splitlines()]


class Claims:
    """One run's GPUs: locks held for life, which the worker inherits, and until then a place in the queue.

    Where there is no GPU nothing is claimed, and who queues waits until no other run is going on.
    """

    def __init__(self, run: rundir.Run, gpus: int | None, queue: bool) -> None:
        """Find out what is there; ConfigFailure when more is asked for than there is."""
        self.run = run
        self.queue = queue
        self.visible = visible()
        self.wanted = len(self.visible) if gpus is None else gpus
        if not 0 <= self.wanted <= len(self.visible):
            there = f"has {len(self.visible)}" if self.visible else "shows none (asked through nvidia-smi)"
            raise ConfigFailure(f"{_gpus(self.wanted)} asked for, but this machine {there}.", "Take fewer: --gpus K")
        self.folder = run.folder.parent.parent / "devices"
        self.devices: list[str] = []
        """What was claimed."""
        self.locks: list[int] = []
        """Descriptors that hold the claims, for the worker to inherit."""
        self.waits_for: list[str] = []
        """Ids of the runs that were in the way at the last try."""
        self._ticket: int | None = None
        self._number = 0

    def take(self) -> bool:
        """Claim everything at once, or nothing and, when queueing, keep a place in the queue. To be asked again."""
        if not self.wanted and (self.visible or not self.queue):
            return True
        durable.have_folder(self.folder / "queue")
        with locks.held(self.folder / "claims.lock", _LOCK_WAIT_S):
            waiting = self._waiting()
            self.waits_for = [run_id for number, run_id in waiting if not self._number or number < self._number]
            if not self.waits_for:
                self.waits_for = self._claim() if self.wanted else self._going_on({run_id for _, run_id in waiting})
            if not self.waits_for:
                self._leave_queue()
            elif self.queue:
                self._join_queue()
        return not self.waits_for

    def environment(self) -> dict[str, str]:
        """What tells CUDA which GPUs to use, by the numbers nvidia-smi gives them; empty where there are none."""
        if not self.visible:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def release(self) -> None:
        """Let the GPUs go, or the place in the queue. What inherited the locks holds them for as long as it lives."""
        for descriptor in self.locks:
            os.close(descriptor)
        self.locks, self.devices = [], []
        self._leave_queue()

    def _claim(self) -> list[str]:
        """Lock as many devices as are wanted; else none, and the ids of the runs that hold the others."""
        holders = []
        for device in self.visible:
            path = self.folder / f"{device}.lock"
            lock = locks.take(path)
            if lock is None:
                holders.append(_holder(path))
                continue
            os.ftruncate(lock, 0)
            os.pwrite(lock, self.run.folder.name.encode(), 0)  # for words only: who holds it
            self.locks.append(lock)
            self.devices.append(device)
            if len(self.locks) == self.wanted:
                return []
        for lock in self.locks:
            os.close(lock)
        self.locks, self.devices = [], []
        return list(dict.fromkeys(holders))

    def _going_on(self, waiting: set[str]) -> list[str]:
        """The other runs of this machine that are alive and do not wait themselves."""
        alive = [path.parent for path in sorted(self.run.folder.parent.glob("*/run.lock")) if locks.is_held(path)]
        return [folder.name for folder in alive if folder != self.run.folder and folder.name not in waiting]

    def _waiting(self) -> list[tuple[int, str]]:
        """Number and run id of everyone in the queue, oldest first. What the dead have left is cleared away."""
        found = []
        for path in sorted((self.folder / "queue").iterdir()):
            parts = _TICKET.fullmatch(path.name)
            if parts and locks.is_held(path):
                found.append((int(parts[1]), parts[2]))
            else:
                path.unlink()  # nobody opens a ticket but its owner, and that only while it has claims.lock
        return found

    def _join_queue(self) -> None:
        if self._ticket is None:
            numbers = [number for number, _ in self._waiting()]
            self._number = max(numbers, default=0) + 1
            self._ticket = locks.take(self._ticket_path())

    def _leave_queue(self) -> None:
        if self._ticket is not None:
            os.close(self._ticket)
            self._ticket = None

    def _ticket_path(self) -> Path:
        return self.folder / "queue" / f"{self._number:08d}-{self.run.folder.name}"


def busy(claims: Claims) -> tuple[str, str]:
    """What to say, and what to type next, when GPUs that were asked for are in use."""
    free = len(claims.visible) - sum(locks.is_held(claims.folder / f"{each}.lock") for each in claims.visible)
    message = (
        f"{_gpus(claims.wanted)} asked for; this machine has {len(claims.visible)}, of which {free} "
        f"{'is' if free == 1 else 'are'} free. In use by, or promised to: {', '.join(claims.waits_for)}."
    )
    return message, "Start it again with --queue to wait, --gpus K to take some of them."


def _gpus(number: int) -> str:
    return "1 GPU was" if number == 1 else f"{number} GPUs were"


def _holder(path: Path) -> str:
    """The id of the run that holds a device's lock, as far as it is known."""
    with contextlib.suppress(OSError):
        name = path.read_text(encoding="ascii", errors="replace")
        if rundir.is_safe_name(name):
            return name
    return "a run that has just begun"


def free_again(
    devices: list[str], before: dict[str, int], left: Callable[[], list[int]], tick: Callable[[], None]
) -> str:
    """Wait until what was used is free again; words about what is not, or nothing.

    Of the processes `left` behind, those that still have a GPU open are ended.
    """
    deadline = time.monotonic() + FREED_WITHIN_S
    while devices:
        processes.kill(_users(left()))
        used = memory_used()
        still = {each: used[each] for each in devices if used.get(each, 0) > before.get(each, 0) + FREED_MIB}
        if not still:
            break
        if time.monotonic() >= deadline:
            return " ".join(f"GPU {each} still holds {used} MiB{_by_whom(each)}." for each, used in still.items())
        tick()
        time.sleep(_PAUSE_S)
    return ""


def _users(pids: list[int]) -> list[int]:
    """Those of the processes that have a GPU open; Linux only, empty elsewhere."""
    return [pid for pid in pids if any(target.startswith(_FILES) for target in _opened(pid))]


def _opened(pid: int) -> Iterator[str]:
    """What a process has open, as far as this user may know."""
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(path.readlink())


def _by_whom(device: str) -> str:
    pids = [row[0] for row in _ask("--query-compute-apps=pid", "-i", device) if row[0].isdigit()]
    return f" (pids {', '.join(pids)})" if pids else ""

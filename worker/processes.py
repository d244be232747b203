"""Processes on this machine: who is who across pid reuse, death with the parent, and the sweep of what escaped."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN_MARK = "GPU_RUN_FOLDER"
"""Environment variable that every process of a run inherits: its folder here, which no other run has, not even on
another machine that shares this computer's processes. Leftovers of a killed supervisor are found by it."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_SWEEPS_MAX = 200
_SWEEP_PAUSE_S = 0.05


def start_time(pid: int) -> str | None:
    """When a process started, in the system's own words; with the pid it names a process for ever. None: no such."""
    if sys.platform != "linux":
        asked = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return asked.stdout.strip() or None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22 of proc(5), clock ticks since boot


def boot_id() -> str:
    """An id of this boot of this machine; empty where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def identity(pid: int) -> dict[str, object]:
    """What names a process beyond reuse of its pid: to be stored, and compared by `is_same`."""
    return {"pid": pid, "start_time": start_time(pid), "boot_id": boot_id()}


def is_same(known: dict[str, object]) -> bool:
    """Whether the process of that identity is still alive: never true for another that got its pid."""
    pid = known.get("pid")
    return isinstance(pid, int) and known.get("start_time") is not None and identity(pid) == known


def become_subreaper() -> None:
    """Have orphaned descendants re-parented to this process (Linux), so that the sweep finds them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux). Called in the child, before exec."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if sys.platform == "linux" and os.getppid() != parent:  # the parent died before the call
        os._exit(1)


def keep_memory_private() -> None:
    """Have no other process of this user read this one's memory, and no core be written of it (Linux)."""
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Every process below `root`, children before grandchildren; Linux only, empty elsewhere."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    level = [root]
    while level:
        level = [pid for parent in level for pid in children.get(parent, ())]
        found += level
    return found


def _parents() -> dict[int, int]:
    """The parent of every process that is not a zombie."""
    parents = {}
    for pid in _pids():
        try:
            state, parent = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state != b"Z":
            parents[pid] = int(parent)
    return parents


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 -- one call per process
    except OSError:
        return []


def owners() -> dict[int, int]:
    """How many processes each user has, by uid; zombies do not count. Linux only, empty elsewhere."""
    found: dict[int, int] = {}
    for pid in _parents():
        with contextlib.suppress(OSError):
            uid = Path(f"/proc/{pid}").stat().st_uid
            found[uid] = found.get(uid, 0) + 1
    return found


def marked(value: str, variable: str = RUN_MARK) -> list[int]:
    """Processes of this user, other than the caller, that inherited a mark, of a run (its folder) or another; none is
    a zombie. Linux only, empty elsewhere.
    """
    mark = os.fsencode(f"{variable}={value}")
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def ending(code: int) -> str:
    """How a process ended, by its return code as subprocess tells it."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name} ({signal.strsignal(-code) or 'no name'})"


def commands() -> dict[int, list[str]]:
    """The words of every process that may be asked for them; Linux only, empty elsewhere."""
    found = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            found[pid] = [os.fsdecode(word) for word in words[:-1]]
    return found


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    """Signal each of these processes; those already gone are passed over."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def is_in_group(pid: int, group: int) -> bool:
    """Whether a process belongs to that process group; one that is gone belongs to none."""
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


def reap() -> None:
    """Collect every dead child of this process that nobody waits for."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def sweep() -> list[int]:
    """Kill every descendant of this process until none is left; returns those that would not die (in D state, say)."""
    left: list[int] = []
    for _ in range(_SWEEPS_MAX):
        left = descendants(os.getpid())
        if not left:
            break
        kill(left)
        reap()
        time.sleep(_SWEEP_PAUSE_S)
    reap()
    return left

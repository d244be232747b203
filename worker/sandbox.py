"""Runs a program that a model wrote behind walls: what it may use is limited, and nothing of it stays."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from worker import processes, syscalls
from worker.companion import Companion, Ended
from worker.confinement import BARE, NAMESPACES, USER_NAMESPACES
from worker.failures import ConfigFailure

NOT_PROTECTED = (
    "It does not protect from holes in the kernel, from a program that heats the processor or learns from its timing, "
    "nor a score from a program written to fool its own test."
)
_PROBE_S = 30.0
_GRACE_S = 30.0  # for the walls to be built and taken down, on a busy machine
_UIDS = range(61184, 65000)  # systemd's range for users of the moment, below what small containers map
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
_THREAD = threading.local()
_RUNNER = """
import contextlib, os, sys
token, _, program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").partition("\\n")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
exec(compile(program, "<program>", "exec"), {})
os.write(3, token.encode())
with contextlib.suppress(Exception):
    sys.stdout.flush()
os._exit(0)
"""
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Limits:
    """What one program may use, all of its processes together; `address_bytes` and `disk_bytes` of a file: each."""

    memory_bytes: int = 2 << 30
    address_bytes: int = 4 << 30
    disk_bytes: int = 64 << 20
    processes: int = 32
    output_bytes: int = 8 << 10
    """What is kept of its output; the rest is read and dropped."""


@dataclass(frozen=True)
class Outcome:
    """What came of a program: whether it ran to its last line, else what ended it, how long that took, what it said."""

    passed: bool
    ended: str
    """`by itself`, or the limit that ended it: `time`, `memory`, `disk`."""
    seconds: float
    output: str


@dataclass(frozen=True)
class Walls:
    """What holds a program here."""

    way: str
    own_user: bool
    landlock: bool
    filter: bool

    def missing(self) -> list[str]:
        """What does not hold here, in words; empty where all does."""
        hidden = self.way != BARE or self.landlock
        holes = {
            "it can read the files that this user can read": not hidden and not self.own_user,
            "it can read files that everybody may read": not hidden and self.own_user,
            "it can reach the network": self.way == BARE and not self.filter,
            "it can signal other processes of this user": self.way == BARE and not self.own_user,
        }
        return [words for words, is_open in holes.items() if is_open]

    def described(self) -> str:
        """One line for a log."""
        ways = {
            NAMESPACES: "namespaces of its own",
            USER_NAMESPACES: "namespaces of its own, made as an ordinary user",
            BARE: "no namespaces (not allowed here)",
        }
        held = [ways[self.way], *(["a user of its own"] if self.own_user else [])]
        held += [*(["Landlock"] if self.landlock else []), *(["a filter of system calls"] if self.filter else [])]
        holes = f" It is weaker here than elsewhere: {'; '.join(self.missing())}." if self.missing() else ""
        return f"Programs that the model wrote run behind walls: {', '.join(held)}.{holes} {NOT_PROTECTED}"


class SandboxFailed(ConfigFailure):
    """The walls could not be built or taken down: this says nothing about the program."""


@functools.cache
def walls() -> Walls:
    """The strictest walls that can be built here; raises SandboxFailed where none can. Tried out once a process."""
    is_linux, is_root = sys.platform == "linux", os.geteuid() == 0
    first = NAMESPACES if is_root else USER_NAMESPACES
    complaints = []
    for way in (first, BARE) if is_linux else (BARE,):
        landlock = way == BARE and syscalls.landlock_version() > 0 if is_linux else False
        for filtered in (True, False) if is_linux else (False,):
            tried = Walls(way, is_root, landlock, filtered)
            try:
                outcome = run("pass", _PROBE_S, tried)
            except SandboxFailed as failed:
                complaints.append(f"{way}: {failed}")
                continue
            if outcome.passed:
                return tried
            complaints.append(f"{way}: ended by {outcome.ended}: {outcome.output[-200:]}")
    raise SandboxFailed(f"no walls can be built here for programs that a model wrote: {'; '.join(complaints)}")


def run(program: str, wall_s: float, held_by: Walls | None = None, limits: Limits = Limits()) -> Outcome:
    """Run a Python program to its end or to a limit; nothing of it is left. Raises SandboxFailed.

    May be called from several threads at once. On Linux the program dies with the calling thread.
    """
    held_by = held_by or walls()
    token = secrets.token_hex(16)
    with _uid(held_by) as uid, _folder() as folder:
        if uid is not None:
            os.chown(folder, uid, uid)
        python, readable = _interpreter(held_by)
        order = {
            "way": held_by.way,
            "landlock": held_by.landlock,
            "filter": held_by.filter,
            "uid": uid,
            "folder": os.path.realpath(folder),
            "readable": readable,
            "words": [python, "-S", "-s", "-c", _RUNNER],
            "env": {**_ENVIRONMENT, **_ONE_THREAD, "PYTHONPATH": sysconfig.get_path("purelib")},
            "limits": asdict(limits),
            "processes_before": 0 if uid is not None else processes.owners().get(os.getuid(), 0),
            "wall_s": wall_s,
            "token": token,
            "program": f"{token}\n{program}",
        }
        found = _confine(order, wall_s)
    if "failed" in found:
        raise SandboxFailed(found["failed"])
    return Outcome(**found)


def _confine(order: dict[str, Any], wall_s: float) -> dict[str, Any]:
    """What this thread's child, which has nothing in its environment, says came of an order."""
    if not hasattr(_THREAD, "child"):
        _THREAD.child = Companion("confine", {}, env={})
    try:
        found: dict[str, Any] = _THREAD.child.ask(order, wall_s + _GRACE_S)
    except (TimeoutError, Ended) as failed:
        return {"failed": str(failed)}
    return found


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """An empty folder that is gone afterwards, however deep and closed what a program made in it."""
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield folder
    finally:
        try:
            Path(folder).rmdir()
        except OSError:
            for words in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
                subprocess.run(words, capture_output=True, check=False)


@contextlib.contextmanager
def _uid(held_by: Walls) -> Iterator[int | None]:
    """A user for one program, whom nobody and nothing else on this machine is; None where we are not root."""
    if not held_by.own_user:
        yield None
        return
    taken = {*processes.owners(), *_known_users()}
    for uid in random.sample(_UIDS, len(_UIDS)):
        if uid in taken:
            continue
        with socket.socket(socket.AF_UNIX) as lock:
            try:
                lock.bind(f"\0gpu-sandbox-{uid}")  # a name without a file: it is free again when this process dies
            except OSError:
                continue
            yield uid
            return
    raise SandboxFailed(f"every user from {_UIDS[0]} to {_UIDS[-1]} is taken")


def _known_users() -> set[int]:
    import pwd

    return {entry.pw_uid for entry in pwd.getpwall()}


def _interpreter(held_by: Walls) -> tuple[str, list[str]]:
    """The Python that runs programs, and all paths it needs to see."""
    python = os.path.realpath(sys.executable)
    if held_by.own_user and held_by.way == BARE and not _everybody_may_run(python):
        others = (Path(folder) / "python3" for folder in ("/usr/local/bin", "/usr/bin"))
        python = next((os.path.realpath(other) for other in others if _everybody_may_run(str(other))), "")
        if not python:
            raise SandboxFailed(f"another user cannot run {sys.executable}, and there is no /usr/bin/python3")
    prefixes = [os.path.realpath(sys.base_prefix), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    needed = [*_SYSTEM, *(path for path in prefixes if Path(path).is_dir() and len(Path(path).parts) > 2)]
    return python, list(dict.fromkeys(path for path in needed if os.path.lexists(path)))


def _everybody_may_run(python: str) -> bool:
    path = Path(python)
    with contextlib.suppress(OSError):
        path = path.resolve(strict=True)
        return all(place.stat().st_mode & 0o005 == 0o005 for place in (path, *path.parents))
    return False

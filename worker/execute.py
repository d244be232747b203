"""Runs one command for the laptop, which ends with it: when the connection is gone, all that it started is killed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from worker import processes

NO_FOLDER = 125
"""Exit code where the working folder is missing, or the order is none."""
NOT_EXECUTABLE = 126
NOT_FOUND = 127
GRACE_S = 2.0
"""How long the command has to end by itself after TERM."""
_LINGER_S = 0.5
"""How long what a command started may take to notice that it has ended, before it counts as left behind."""
_POLL_S = 0.05
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Refusal(Exception):
    """The command could not be started; `code` is what we exit with, the message says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Command:
    """A command in a session of its own. It and all its descendants are children of this process in the end."""

    def __init__(self, order: dict[str, Any], root: Path) -> None:
        self._wake, waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, *_STOPS):
            signal.signal(number, lambda *_: None)
        processes.become_subreaper()
        self._child = _started(order, root)

    def wait(self, watched: list[int]) -> int:
        """The exit code, once the command has ended, or was made to because one of the descriptors was at its end."""
        while (code := self._ended()) is None:  # bounded by whoever holds the other ends
            ready = select.select([*watched, self._wake], [], [])[0]
            if any(_is_at_end(each) for each in ready if each != self._wake) or self._was_told_to_stop():
                return self._kill()
        if left := self._left(_LINGER_S):
            say(f"processes that the command left behind were ended with it: {len(left)}")
            self._kill()
        return code

    def _left(self, within_s: float) -> list[int]:
        """What the command has left running (Linux), once that is nothing or the time is over."""
        deadline = time.monotonic() + within_s
        while (left := processes.descendants(os.getpid())) and time.monotonic() < deadline:
            self._pause()
        return left

    def _pause(self) -> None:
        """Return when a process has ended, at the latest after a poll."""
        select.select([self._wake], [], [], _POLL_S)
        self._was_told_to_stop()

    def _ended(self) -> int | None:
        """The exit code of the command if it has ended; collects whatever else has ended and has no other parent."""
        while self._child.returncode is None:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return None
            if pid == self._child.pid:
                self._child.returncode = os.waitstatus_to_exitcode(status)
        return exit_code(self._child.returncode)

    def _was_told_to_stop(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return any(number in _STOPS for number in os.read(self._wake, 512))
        return False

    def _kill(self) -> int:
        """TERM to everything, KILL to what is left after the grace; the exit code of the command."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while self._ended() is None and time.monotonic() < deadline:
            self._pause()
        self._left(deadline - time.monotonic())
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: it has had its KILL
            self._child.wait(GRACE_S)
        processes.sweep()
        return exit_code(-signal.SIGKILL if self._child.returncode is None else self._child.returncode)

    def _signal(self, number: int) -> None:
        """To each process once: one that saves its work at the first TERM might die of a second."""
        below = processes.descendants(os.getpid())
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, number)
        processes.kill([pid for pid in below if not processes.is_in_group(pid, self._child.pid)], number)


def exit_code(code: int) -> int:
    """What a shell makes of a return code: 128 and the number for a signal."""
    return code if code >= 0 else 128 - code


def say(message: str) -> None:
    """One line of ours among the command's own complaints."""
    print(f"gpu: {message}", file=sys.stderr, flush=True)  # noqa: T201


def _is_at_end(descriptor: int) -> bool:
    """Whether nothing more can come; what did come is passed over."""
    try:
        return not os.read(descriptor, 1 << 16)
    except OSError:
        return True


def _order(source: BinaryIO) -> dict[str, Any]:
    """The order in the first line, its fields of the right types."""
    try:
        order = json.loads(source.readline())
        words, env = order["words"], order.get("env") or {}
        texts = [*words, *env, *env.values(), order.get("cwd") or "", order.get("path_first") or ""]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refusal(NO_FOLDER, "the order is none") from None
    if not (isinstance(words, list) and words and all(isinstance(text, str) for text in texts)):
        raise Refusal(NO_FOLDER, "the order is none")
    return {**order, "env": env}


def _environment(order: dict[str, Any]) -> dict[str, str]:
    environment = {**os.environ, **order["env"]}
    if first := order.get("path_first"):
        environment["PATH"] = os.pathsep.join([first, environment.get("PATH", os.defpath)])
    return environment


def _started(order: dict[str, Any], root: Path) -> subprocess.Popen[bytes]:
    """Start the command; Refusal says why it could not be. No value of its environment is ever said."""
    folder = root / order["cwd"] if order.get("cwd") else Path.home()
    me, name = os.getpid(), order["words"][0]
    try:
        if not os.access(f"{folder}/.", os.X_OK):
            raise Refusal(NO_FOLDER, f"there is no folder {str(folder)!r} on this machine")
        return subprocess.Popen(
            order["words"],
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(order),
            start_new_session=True,
            preexec_fn=lambda: processes.die_with_parent(me),  # this process has one thread, so this is safe
        )
    except (FileNotFoundError, NotADirectoryError):
        raise Refusal(NOT_FOUND, f"there is no command {name!r} on this machine, or no interpreter for it") from None
    except OSError as error:
        raise Refusal(NOT_EXECUTABLE, f"{name!r} could not be executed: {error.strerror}") from None
    except ValueError as error:
        raise Refusal(NO_FOLDER, f"the command cannot be started: {error}") from None


def main(words: list[str]) -> int:
    """Run the command in the first line of standard input, below the root in the first word; its exit code.

    It is watched by a process in a session of its own: whoever kills us, with all of our group, ends the command too.
    """
    try:
        order = _order(sys.stdin.buffer)
    except Refusal as refusal:
        say(str(refusal))
        return refusal.code
    alive, ours = os.pipe()
    watcher = os.fork()
    if watcher:
        os.close(alive)
        return exit_code(os.waitstatus_to_exitcode(os.waitpid(watcher, 0)[1]))
    os.close(ours)  # now `alive` is at its end as soon as the process that the laptop knows is gone
    os.setsid()
    try:
        return Command(order, Path(words[0])).wait([sys.stdin.fileno(), alive])
    except Refusal as refusal:
        say(str(refusal))
        return refusal.code

"""A child process that answers questions, one JSON line each, and is killed with all it started when it does not."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from worker import processes


class Ended(Exception):
    """The child ended before it answered, with this exit code, or said what was not understood."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"its process ended with exit code {code} before it answered")
        self.code = code


class Companion:
    """Starts with the first question, and again with the next one after it was killed or has died.

    On Linux it dies with the thread that started it: once that has ended, the next question starts another one. It is
    ended when this object goes, too.
    """

    def __init__(self, verb: str, hello: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
        self._verb = verb
        self._hello = hello
        self._env = env
        self._children: list[subprocess.Popen[bytes]] = []  # one at most
        self._started_by = threading.current_thread()
        weakref.finalize(self, _end, self._children)

    @property
    def is_there(self) -> bool:
        """Whether the child has been started and nothing has ended it."""
        if not self._started_by.is_alive():
            self.end()
        return bool(self._children)

    def ask(self, question: Any, timeout_s: float) -> Any:
        """The answer to one question; TimeoutError, or Ended, when there is none: then the child is dead."""
        child = self._children[0] if self.is_there else self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
            return json.loads(_read_line(child.stdout.fileno(), timeout_s))
        except TimeoutError:
            self.end()
            raise TimeoutError(f"no answer within {timeout_s:g} s") from None
        except (OSError, ValueError):
            raise Ended(self.end()) from None

    def end(self) -> int | None:
        """Kill the child with all it started; returns its exit code. May be called at any time."""
        return _end(self._children)

    def _start(self) -> subprocess.Popen[bytes]:
        main = Path(__file__).with_name("__main__.py")
        words, pipe = [sys.executable, "-I", str(main), self._verb], subprocess.PIPE
        child = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=self._env, start_new_session=True)
        self._children.append(child)
        self._started_by = threading.current_thread()
        assert child.stdin is not None
        child.stdin.write(json.dumps({**self._hello, "parent": os.getpid()}).encode() + b"\n")
        return child


def _end(children: list[subprocess.Popen[bytes]]) -> int | None:
    """Kill the child, if there is one, with all it started; returns its exit code."""
    if not children:
        return None
    child = children.pop()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    return child.wait()


def serve(source: BinaryIO, out: BinaryIO, begin: Callable[[dict[str, Any]], Callable[[Any], Any]]) -> int:
    """The child: answer each question with what `begin`, told the hello, gives, until the parent is gone."""
    hello, answers = greeted(source, out)
    answer = begin(hello)
    for line in source:
        answers.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        answers.flush()
    return 0


def greeted(source: BinaryIO, out: BinaryIO) -> tuple[dict[str, Any], BinaryIO]:
    """In a child: the hello of its parent, with whom it dies from now on, and where answers are written.

    What else is printed goes to the log, not between the answers.
    """
    answers = os.fdopen(os.dup(out.fileno()), "wb")
    os.dup2(2, 1)
    hello: dict[str, Any] = json.loads(source.readline())
    processes.die_with_parent(hello["parent"])
    return hello, answers


def _read_line(descriptor: int, timeout_s: float) -> bytes:
    """One line from a pipe; TimeoutError past the deadline, OSError at its end."""
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise TimeoutError
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            raise OSError("the pipe was closed")
        line += chunk
    return line

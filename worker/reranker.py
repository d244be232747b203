"""The user's re-ranker in a child process of its own: it may load anything, raise or hang, and the run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from worker import processes
from worker.failures import ConfigFailure

FAILURES_IN_A_ROW_MAX = 3
"""After this many the re-ranker is not called again: one that hangs would cost its time limit for every problem."""
_ERROR_CHARACTERS = 500


class RerankerError(Exception):
    """The re-ranker gave no usable scores for one problem; the message says why."""


def split(setting: str) -> tuple[Path, str]:
    """The file and the function of `path/to/file.py:function`; raises ConfigFailure."""
    path, separator, function = setting.rpartition(":")
    if not separator or not path or not function.isidentifier():
        raise ConfigFailure(
            f"The re-ranker {setting!r} is not of the form path/to/file.py:function.",
            "For example --set reranker=rank.py:score",
        )
    if not Path(path).is_file():
        raise ConfigFailure(f"The re-ranker's file {path} does not exist.", "Check the path given to reranker.")
    return Path(path).resolve(), function


class Reranker:
    """Calls the user's function in a child process, each call with a deadline. A context manager."""

    def __init__(self, setting: str, timeout_s: float) -> None:
        self._path, self._function = split(setting)
        self._timeout_s = timeout_s
        self._failures = 0
        self._child: subprocess.Popen[bytes] | None = None
        self.name = f"{self._path.name}:{self._function}"
        self.digest = hashlib.sha256(self._path.read_bytes() + b"\0" + self._function.encode()).hexdigest()

    def scores(self, problem: str, candidates: Sequence[str]) -> list[float]:
        """The score of each candidate, higher is better; raises RerankerError."""
        if self._failures >= FAILURES_IN_A_ROW_MAX:
            raise RerankerError(f"not called: it failed {self._failures} times in a row")
        self._failures += 1
        answer = self._ask({"problem": problem, "candidates": list(candidates)})
        if "error" in answer:
            raise RerankerError(str(answer["error"])[:_ERROR_CHARACTERS])
        scores = _checked(answer.get("scores"), len(candidates))
        self._failures = 0
        return scores

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            line = _read_line(child.stdout.fileno(), self._timeout_s)
            answer = json.loads(line)
        except TimeoutError:
            self._end()
            raise RerankerError(f"no answer within {self._timeout_s:g} s") from None
        except (OSError, ValueError):
            code = self._end()
            raise RerankerError(f"its process ended with exit code {code} before it answered") from None
        return answer if isinstance(answer, dict) else {"error": "its answer was not understood"}

    def _start(self) -> subprocess.Popen[bytes]:
        main = Path(__file__).with_name("__main__.py")
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(main), "rerank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._child.stdin is not None
        hello = {"path": str(self._path), "function": self._function, "parent": os.getpid()}
        self._child.stdin.write(json.dumps(hello).encode() + b"\n")
        return self._child

    def _end(self) -> int | None:
        """Kill the child with all it started; returns its exit code."""
        child, self._child = self._child, None
        if child is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return child.wait()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()


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


def _checked(scores: Any, count: int) -> list[float]:
    if not isinstance(scores, list) or len(scores) != count:
        raise RerankerError(f"it did not return a list of {count} scores")
    if not all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
        raise RerankerError(f"it returned scores that are not finite numbers: {scores}"[:_ERROR_CHARACTERS])
    return [float(score) for score in scores]


def serve(source: BinaryIO, out: BinaryIO) -> int:
    """The child: import the user's function, answer a JSON line for each JSON line asked, until the parent is gone."""
    answers = os.fdopen(os.dup(out.fileno()), "wb")
    os.dup2(2, 1)  # what the user's code prints goes to the log, not between the answers
    hello = json.loads(source.readline())
    processes.die_with_parent(hello["parent"])
    function: Callable[[str, list[str]], Any] | None = None
    for line in source:
        try:
            function = function or _load(hello["path"], hello["function"])
            request = json.loads(line)
            answer: dict[str, Any] = {
                "scores": [float(score) for score in function(request["problem"], request["candidates"])]
            }
        except Exception as error:  # noqa: BLE001 -- the user's code may raise anything; it is shown on its column
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
    return 0


def _load(path: str, function: str) -> Callable[[str, list[str]], Any]:
    sys.path.insert(0, str(Path(path).parent))
    found = importlib.util.spec_from_file_location("reranker_of_the_user", path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    loaded: Callable[[str, list[str]], Any] = getattr(module, function)
    return loaded

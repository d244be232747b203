"""The user's re-ranker in a child process of its own: it may load anything, raise or hang, and the run goes on."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from worker.companion import Companion, Ended
from worker.companion import serve as serve_companion
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
        path, function = split(setting)
        self._timeout_s = timeout_s
        self._failures = 0
        self._companion = Companion("rerank", {"path": str(path), "function": function})
        self.name = f"{path.name}:{function}"
        self.digest = hashlib.sha256(path.read_bytes() + b"\0" + function.encode()).hexdigest()

    def scores(self, problem: str, candidates: Sequence[str]) -> list[float]:
        """The score of each candidate, higher is better; raises RerankerError."""
        if self._failures >= FAILURES_IN_A_ROW_MAX:
            raise RerankerError(f"not called: it failed {self._failures} times in a row")
        self._failures += 1
        try:
            answer = self._companion.ask({"problem": problem, "candidates": list(candidates)}, self._timeout_s)
        except (TimeoutError, Ended) as failed:
            raise RerankerError(str(failed)) from None
        if not isinstance(answer, dict):
            raise RerankerError("its answer was not understood")
        if "error" in answer:
            raise RerankerError(str(answer["error"])[:_ERROR_CHARACTERS])
        scores = _checked(answer.get("scores"), len(candidates))
        self._failures = 0
        return scores

    def __enter__(self) -> Reranker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._companion.end()


def _checked(scores: Any, count: int) -> list[float]:
    if not isinstance(scores, list) or len(scores) != count:
        raise RerankerError(f"it did not return a list of {count} scores")
    if not all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
        raise RerankerError(f"it returned scores that are not finite numbers: {scores}"[:_ERROR_CHARACTERS])
    return [float(score) for score in scores]


def serve(source: BinaryIO, out: BinaryIO) -> int:
    """The child: import the user's function, and call it for each question."""
    return serve_companion(source, out, _answering)


def _answering(hello: dict[str, Any]) -> Callable[[Any], Any]:
    loaded: list[Callable[[str, list[str]], Any]] = []

    def answer(question: Any) -> dict[str, Any]:
        try:
            if not loaded:
                loaded.append(_load(hello["path"], hello["function"]))
            return {"scores": [float(score) for score in loaded[0](question["problem"], question["candidates"])]}
        except Exception as error:  # noqa: BLE001 -- the user's code may raise anything; it is shown on its column
            return {"error": f"{type(error).__name__}: {error}"}

    return answer


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

"""Grades replies in a child process with limits on time and memory: a reply can make the best rule run for ever."""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from worker.companion import Companion, Ended, serve

START_S = 180.0
"""For the child to import what it grades with, from a slow disk."""
_MEMORY_BYTES = 4 << 30
_LOCK = threading.Lock()


class Unfinished(Exception):
    """A reply that cannot be graded within the limits; the message says which one it passed."""


def grade(module: str, question: Any, timeout_s: float) -> Any:
    """What `judge` of that module of tasks answers in the child; raises Unfinished. From any thread, one at a time."""
    with _LOCK:
        grader = _grader(module)
        try:
            if not grader.is_there:
                grader.ask(None, START_S)
            return grader.ask(question, timeout_s)
        except TimeoutError:
            raise Unfinished(f"grading took more than {timeout_s:g} s") from None
        except Ended as ended:
            raise Unfinished(f"grading ended with exit code {ended.code}") from None


@functools.cache
def _grader(module: str) -> Companion:
    """The one child of a module, used for all its replies; it dies with this process."""
    return Companion("grade", {"module": module})


def serve_grades(source: BinaryIO, out: BinaryIO) -> int:
    """The child: judge each question by the module that was named first."""
    return serve(source, out, _judging)


def _judging(hello: dict[str, Any]) -> Callable[[Any], Any]:
    _limit_memory()
    logging.disable()  # the rules' libraries warn of each text they cannot read
    module = importlib.import_module(f"worker.tasks.{hello['module']}")
    module.prepare()
    return lambda question: None if question is None else module.judge(question)


def _limit_memory() -> None:
    import contextlib
    import resource

    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already, or there is none (macOS)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))

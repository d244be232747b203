"""THE STORY of a command: the worker's process becomes any command of the project, in the folder it is to run in."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any, NoReturn

from jobs import durable, rundir, trees
from worker.failures import ConfigFailure

_IGNORED_BY_PYTHON = ("SIGPIPE", "SIGXFZ", "SIGXFSZ")


def work(run: rundir.Run, attempt: rundir.Attempt, job: dict[str, Any]) -> NoReturn:
    """Become the job's command: exit code, signals and output are its own. ConfigFailure when it cannot be started."""
    words, folder = job["command"], job.get("folder") or ""
    if not (isinstance(words, list) and words and all(isinstance(word, str) and "\0" not in word for word in words)):
        raise ConfigFailure(f"A command is a list of words, not {words!r}.")
    if folder and not trees.is_safe_path(folder):
        raise ConfigFailure(f"{folder!r} is not a folder of the project.")
    try:
        os.chdir(run.work / folder)
    except OSError as error:
        raise ConfigFailure(
            f"The folder {folder or '.'!r} of the project, in which the command is to run, "
            f"cannot be entered on this machine: {error.strerror}.",
            "Run the command from a folder whose files are sent along.",
        ) from None
    durable.save_json(attempt.progress, {"phase": "running"}, synced=False)
    _forget_signals()
    try:
        os.execvpe(words[0], words, {**os.environ, "PYTHONUNBUFFERED": "1"})  # noqa: S606 -- no shell is wanted
    except OSError as error:
        raise ConfigFailure(*_words(words[0], error)) from None


def _forget_signals() -> None:
    """Give the command the signals as a shell would: ours handles TERM, and Python ignores some for itself."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for name in ("SIGTERM", "SIGINT", *_IGNORED_BY_PYTHON):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def _words(program: str, error: OSError) -> tuple[str, str]:
    """What to say, and what to type next, when a program cannot be started."""
    if isinstance(error, FileNotFoundError) and "/" not in program:
        return f"There is no program {program!r} on this machine's PATH.", "Install it there, or give its path."
    if isinstance(error, FileNotFoundError):
        return f"There is no program {program!r}, or its first line names one that is not there.", "Give another path."
    if isinstance(error, PermissionError):
        return f"{program!r} may not be executed on this machine.", f"chmod +x {program}"
    hint = "A script needs a first line such as #!/bin/sh." if error.errno == errno.ENOEXEC else ""
    return f"{program!r} cannot be executed: {error.strerror}.", hint

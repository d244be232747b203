"""Entry of the machine side, run by path in isolated mode: commands of the laptop, the supervisor, and the worker."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

# Run by path with -I, so nothing of the user's is on the import path; ours comes first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


_SERVES = {
    "rescore": ("rescore", "main"),
    "rerank": ("reranker", "serve"),
    "replica": ("replica", "serve"),
    "grade": ("grading", "serve_grades"),
    "confine": ("confinement", "main"),
}
"""Verbs that read what is asked from standard input and answer on standard output: module and function."""
_STORE = ("have", "missing", "take", "adopt", "keep", "stage", "view", "project")


def main(words: list[str]) -> int:
    """Do what the first word says; what the laptop may ask for comes first, then what is started here."""
    verb, *rest = words
    if verb in ("put", "start", "state", "pull", "stop", "acknowledge"):
        from worker import agent

        return agent.main(verb, rest)
    if verb in _STORE:
        from worker.store import main as keep_files

        return keep_files(verb, rest)
    if verb in ("environment", "build", "fetch", "imports"):
        from worker.environments import main as keep_environments

        return keep_environments(verb, rest)
    if verb in ("guard", "deadline", "watch"):
        from worker import guard

        return guard.main(verb, rest)
    if verb == "idle":
        from worker import idle

        return idle.main(rest)
    if verb == "exec":
        from worker.execute import main as execute

        return execute(rest)
    if verb == "supervise":
        from worker import supervisor

        return supervisor.main(rest[0])
    if verb == "mirror":
        from worker import mirror

        return mirror.main(rest[0], rest[1], rest[2], rest[3:])
    if verb in ("work", "assist", "check"):
        from worker import work

        return work.begin(verb, rest)
    if verb == "verify":
        from worker import verify

        return verify.main(rest[0], rest[1], sys.stdout.buffer)
    if verb in _SERVES:
        module, function = _SERVES[verb]
        code: int = getattr(importlib.import_module(f"worker.{module}"), function)(sys.stdin.buffer, sys.stdout.buffer)
        return code
    raise SystemExit(f"unknown verb {verb!r}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

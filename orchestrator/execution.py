"""`gpu exec`: a command in the synced project on a machine, its output as it comes, its secrets by standard input."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs import spec
from orchestrator import config, delivery, machines, syncing, transport
from orchestrator.transport import Machine, Stream

_CHUNK_BYTES = 1 << 15
Sink = Callable[[bytes], None]
"""Takes what a command writes, in pieces."""


@dataclass(frozen=True)
class Command:
    """What is to run: words for no shell, the folder there (None: home), and the variables of the laptop it gets."""

    words: tuple[str, ...]
    cwd: str | None
    env_names: tuple[str, ...] = ()
    path_first: str = ""


def run(machine: Machine, command: Command, out: Sink, err: Sink) -> int:
    """Run it and pass on what it writes; returns its exit code. Leaving in the middle ends it there.

    Raises NotReachable when the connection is lost: the command is then ended by its machine.
    """
    name = delivery.prepared_agent(machine)
    request = {
        "words": list(command.words),
        "cwd": command.cwd,
        "env": config.job_environment(list(command.env_names), everything=False),
        "path_first": command.path_first,
    }
    words = transport.root_words(machine, name, "exec")
    with machine.open(words, spec.canonical(request) + b"\n") as stream:
        errors = threading.Thread(target=_pass_errors, args=(stream, err), daemon=True)
        errors.start()
        while chunk := stream.read(_CHUNK_BYTES, math.inf):
            out(chunk)
        code = stream.code(math.inf)
        errors.join()
    return code


def _pass_errors(stream: Stream, err: Sink) -> None:
    while chunk := stream.read_error(_CHUNK_BYTES):
        err(chunk)


def command(name: str, words: tuple[str, ...], env_names: tuple[str, ...]) -> Command:
    """A command for a machine: in this folder of the synced project (on this computer: here), its Python first."""
    here = Path.cwd()
    cwd = str(here) if name == machines.LOCAL else syncing.folder_there(name, here)
    python = delivery.python_for_commands(name)
    return Command(words, cwd, env_names, str(Path(python).parent) if python else "")

"""A Python with what a run needs on a machine: made there and waited for, or the user's own, checked as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs import spec
from orchestrator import clock, transport
from orchestrator.errors import BadAnswer, ConfigError, NotReachable
from orchestrator.plain import plain
from orchestrator.transport import Frame, Machine

TRAIN_MODULES = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "safetensors")
"""What a Python of the user's must import to be used in place of an environment of the kind `train`."""
SERVE_MODULES = ("torch", "transformers", "vllm", "safetensors")
"""The same for the kind `serve`."""
_ENSURE_S = 3 * 3600.0
_FETCH_S = 5 * 3600.0
_CHECK_S = 180.0
_STILL_THERE = "What was begun there goes on by itself. Type the same command again to carry on."
Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A model on the Hub that a run will need."""

    name: str
    kind: str
    """The kind of environment that fetches it, where no Python is given."""
    revision: str | None = None
    python: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables of the process that fetches it; the one place for its token."""


def ensure(machine: Machine, agent: str, kind: str, say: Say) -> str:
    """The path of a Python on the machine with what this kind needs, installed once; `say` hears how it goes.

    Asking again joins an installation that still runs. Raises ConfigError when it cannot be made there (with the last
    lines of what the installer said), NotReachable when the machine falls silent.
    """
    answer = _told(machine, transport.root_words(machine, agent, "environment"), {"kind": kind}, (say, _ENSURE_S))
    if "failed" in answer:
        raise _not_made(machine, _texts(answer["failed"]))
    python = answer.get("python")
    if not isinstance(python, str) or not python.startswith("/"):
        raise BadAnswer(f"{machine.name} named no Python: {plain(repr(answer)[:200])}")
    return python


def check(machine: Machine, agent: str, python: str, modules: list[str]) -> dict[str, Any]:
    """What an interpreter of the user's on the machine is: `version`, `versions` of the modules, `cuda`.

    Raises ConfigError, saying what it lacks, when it cannot be used as it is; nothing is installed into it.
    """
    request = spec.canonical({"python": python, "modules": modules}) + b"\n"
    answer = transport.ask(machine, transport.root_words(machine, agent, "imports"), request, _CHECK_S)
    if answer.get("ok") is not True:
        said = _texts(answer)
        raise ConfigError(f"{machine.name}: {said['message']}", said["hint"])
    return answer


def fetch(machine: Machine, agent: str, model: Model, say: Say) -> str:
    """Have a model in the Hub's cache of the machine ahead of the run; returns why not, empty when it is there.

    Never raises for that: the worker fetches what is missing itself.
    """
    request = {"model": model.name, "revision": model.revision, "kind": model.kind, "python": model.python}
    words = transport.root_words(machine, agent, "fetch")
    try:
        answer = _told(machine, words, {**request, "env": dict(model.env)}, (say, _FETCH_S))
    except NotReachable as error:
        return error.message
    return _texts(answer["failed"])["message"] if "failed" in answer else ""


def _told(machine: Machine, words: list[str], request: Frame, listener: tuple[Say, float]) -> Frame:
    """The last frame of a command that tells how it goes until it is done; NotReachable when it breaks off."""
    say, limit_s = listener
    deadline = clock.monotonic() + limit_s
    with machine.open(words, spec.canonical(request) + b"\n") as stream:
        for frame, _ in transport.frames(stream):
            if "ready" in frame or "failed" in frame:
                return frame
            if "progress" in frame:
                say(plain(str(frame["progress"])))
            if clock.monotonic() > deadline:
                raise NotReachable(f"{machine.name} did not finish within {limit_s / 3600:.0f} hours.", _STILL_THERE)
        said = plain(stream.last_words())
    raise NotReachable(f"{machine.name} broke off in the middle. Its last words: {said or 'none'}", _STILL_THERE)


def _texts(told: object) -> dict[str, str]:
    """The texts of a failure, which come from elsewhere: made harmless, empty where they are missing."""
    found = told if isinstance(told, dict) else {}
    tail = found.get("tail")
    lines = [f"  {plain(str(line))}" for line in tail] if isinstance(tail, list) else []
    names = ("message", "hint", "retry")
    texts = {name: plain(found[name]) if isinstance(found.get(name), str) else "" for name in names}
    return {**texts, "tail": "\n".join(lines)}


def _not_made(machine: Machine, said: dict[str, str]) -> ConfigError:
    tail = f"\nThe last lines of the installation:\n{said['tail']}" if said["tail"] else ""
    message = f"{machine.name}: {said['message'] or 'no environment could be made.'} Nothing was started.{tail}"
    return ConfigError(message, " ".join(filter(None, [said["hint"], said["retry"]])))

"""Isolated Python environments on this machine, each made once per lock by a process that outlives whoever asks."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from jobs import durable, locks
from worker import installation, interpreters, libraries
from worker.installation import Place
from worker.interpreters import Plan, Refused

LOCKS = Path(__file__).resolve().parent / "locks"
"""The pins that ship with this code."""
RETRY = "Type the same command again: an installation that still runs is joined, one that failed is begun anew."
_MAIN = str(Path(__file__).resolve().parent / "__main__.py")
_BEAT_S = 5.0
_POLL_S = 0.1
_STARTS_MAX = 3
_CHOOSE_S = 900.0
_ATTEND_S = 3 * 3600.0
_HUB_WAIT_S = 900.0
Frame = dict[str, Any]


class Gone(Exception):
    """Whoever asked is not there any more."""


class Talk:
    """Lines of JSON to whoever asked, a beat when there is no news, and the notice that they left."""

    def __init__(self, out: BinaryIO, source: int | None) -> None:
        """`source` is the descriptor whose end means that the asker left; None: one answer is wanted, without beats."""
        self._out = out
        self._source = source
        self._said_at = time.monotonic()

    def send(self, frame: Frame) -> None:
        """Say one thing; raises Gone when nobody hears it."""
        try:
            self._out.write(json.dumps(frame, separators=(",", ":")).encode() + b"\n")
            self._out.flush()
        except BrokenPipeError:
            raise Gone from None
        self._said_at = time.monotonic()

    def say(self, text: str) -> None:
        """Tell how it goes."""
        if text.strip():
            self.send({"progress": text.strip()[: installation.LINE_MAX]})

    def tick(self) -> None:
        """Send a beat when one is due; raises Gone when the asker left."""
        if self._source is None:
            return
        if time.monotonic() - self._said_at >= _BEAT_S:
            self.send({"beat": True})
        if select.select([self._source], [], [], 0)[0] and not os.read(self._source, 4096):
            raise Gone


class Tail:
    """The lines of a growing file, each once; from the beginning again when it was emptied."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> Iterator[str]:
        """The whole lines that were not given yet."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                self._offset = 0
            file.seek(self._offset)
            news = file.read()
            news = news[: news.rfind(b"\n") + 1]
            self._offset += len(news)
            yield from news.decode("utf-8", "replace").split("\n")


# --- asking ----------------------------------------------------------------------------------------------------------


def environment(root: Path, kind: str, pins: Path, talk: Talk) -> Frame:
    """Have the environment of this kind, and say where: joins a build that runs, starts one that is needed."""
    began = time.monotonic()
    folder = root / "environments"
    try:
        plan = _plan(folder, kind, pins, talk)
        place = Place(folder, plan.digest)
        failure = None if place.ready() else _attend(plan, place, talk)
    except Refused as refused:
        failure = {"message": refused.message, "hint": refused.hint, "tail": []}
    if failure is not None:
        return {"failed": {**failure, "retry": RETRY}}
    seconds = round(time.monotonic() - began, 3)
    return {
        "ready": True,
        "python": place.python,
        "version": plan.version,
        "digest": plan.digest,
        "seconds": seconds,
    }


def _plan(folder: Path, kind: str, pins: Path, talk: Talk) -> Plan:
    """The plan whose environment is there or being made; else a new one, made by one process at a time."""
    if kind not in interpreters.KINDS:
        raise Refused(f"There is no environment of the kind {kind!r}.", f"Kinds: {', '.join(interpreters.KINDS)}.")
    known = kept(folder, kind, pins)
    if known and (Place(folder, known.digest).ready() or locks.is_held(Place(folder, known.digest).lock)):
        return known
    durable.have_folder(folder)
    with _alone(folder / "choosing.lock", talk):
        plan = interpreters.plan(folder, kind, pins, talk)
        durable.save_json(folder / f"{kind}.json", plan.document(), synced=False)
        return plan


def kept(folder: Path, kind: str, pins: Path) -> Plan | None:
    """The plan that was made before, with today's pins; None when there is none or the machine has changed since."""
    try:
        known = Plan(**durable.load_news(folder / f"{kind}.json"))
        plan = replace(known, lock=str(pins / f"{kind}-{known.version}.txt"))
    except TypeError:
        return None
    return plan if plan.seen == interpreters.seen() and Path(plan.lock).is_file() else None


@contextlib.contextmanager
def _alone(path: Path, talk: Talk) -> Iterator[None]:
    deadline = time.monotonic() + _CHOOSE_S
    while (descriptor := locks.take(path)) is None:
        talk.tick()
        if time.monotonic() >= deadline:
            raise Refused(f"Another process has held {path} for {_CHOOSE_S / 60:.0f} minutes.", f"See: fuser -v {path}")
    try:
        yield
    finally:
        os.close(descriptor)


def _attend(plan: Plan, place: Place, talk: Talk) -> Frame | None:
    """Wait until the environment is made, by us or by another, passing on what its log says; why not, if it is not."""
    tail, deadline = Tail(place.log), time.monotonic() + _ATTEND_S
    for _ in range(_STARTS_MAX):
        before = place.failure()
        builder = _start(plan, place)
        while builder.poll() is None or locks.is_held(place.lock):
            if locks.is_held(place.lock):  # before that, the log is that of the build before
                _pass_on(tail, talk)
            talk.tick()
            if time.monotonic() >= deadline:
                return {"message": "The installation does not come to an end.", "hint": "", "tail": place.tail()}
            time.sleep(_POLL_S)
        _pass_on(tail, talk)
        if place.ready():
            return None
        if place.failure() not in (None, before):
            return durable.load_news(place.failed)
        if builder.returncode != installation.ANOTHER_BUILDS:
            killed = builder.returncode < 0
            how = f"was killed by signal {-builder.returncode}" if killed else "broke off"
            hint = "The machine may be short of memory." if builder.returncode == -signal.SIGKILL else ""
            return {"message": f"Installing the environment {how}.", "hint": hint, "tail": place.tail()}
    return {"message": "Others began to install the environment and were killed.", "hint": "", "tail": place.tail()}


def _pass_on(tail: Tail, talk: Talk) -> None:
    for line in tail.lines():
        talk.say(line)


def _start(plan: Plan, place: Place) -> subprocess.Popen[bytes]:
    """Start a builder in a session of its own, which ends at once when another builds."""
    with durable.opened(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log:
        builder = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", _MAIN, "build", str(place.root.parent)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    assert builder.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        builder.stdin.write(json.dumps(plan.document()).encode())
        builder.stdin.close()
    return builder


# --- commands --------------------------------------------------------------------------------------------------------


def main(verb: str, words: list[str]) -> int:
    """Run one command; the words after its root: a folder of other locks (environment), `here` (inside a library)."""
    root, more = Path(words[0]), words[1:]
    source, out = sys.stdin.buffer, sys.stdout.buffer
    if verb == "build":
        return installation.build(root / "environments", source.read())
    if "here" in more:
        return libraries.here(verb, json.load(source))
    request = json.loads(source.readline())
    talk = Talk(out, None if verb == "imports" else source.fileno())
    with contextlib.suppress(Gone):
        if verb == "environment":
            talk.send(environment(root, request["kind"], Path(more[0]) if more else LOCKS, talk))
        elif verb == "fetch":
            talk.send(fetch(root, request, Path(more[0]) if more else LOCKS, talk))
        else:
            talk.send(libraries.check(request["python"], request["modules"], talk))
    return 0


def fetch(root: Path, request: Frame, pins: Path, talk: Talk) -> Frame:
    """Bring a model from the Hub to this machine, with a given Python or as soon as the environment being made can."""
    deadline = time.monotonic() + _HUB_WAIT_S
    python = request.get("python")
    while not python:
        plan = kept(root / "environments", request["kind"], pins)
        place = Place(root / "environments", plan.digest) if plan else None
        if place and place.hub.is_file() and os.access(place.python, os.X_OK):
            python = place.python
        elif time.monotonic() >= deadline:
            return {"failed": {"message": "No environment came that could fetch the model.", "hint": ""}}
        else:
            talk.tick()
            time.sleep(_POLL_S)
    return libraries.fetch(python, request, talk)

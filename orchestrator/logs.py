"""A run's log as it is at home, printed by byte offset, so that following goes on at the exact place."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable

from jobs import rundir
from orchestrator import advance, follow, journey, view
from orchestrator.errors import GpuError
from orchestrator.home import Arrivals, News
from orchestrator.plain import plain
from orchestrator.runs import Run
from orchestrator.transport import Machine

_TAIL_BYTES = 1 << 20
_DECODER = codecs.getincrementaldecoder("utf-8")  # a character may be cut between two looks


def show(run: Run, lines: int, echo: Callable[[str], None]) -> Tail:
    """Print the last lines of the newest attempt's log; returns a tail that goes on from there."""
    try:
        journey.refresh(run)
    except GpuError as error:  # what is home can be shown all the same
        _note(f"{error.message} This is what is home:")
    tail = Tail(run, echo)
    attempts = tail.attempts()
    for attempt in attempts:
        tail.offsets[attempt.number] = _size(attempt)
    if attempts and lines:
        data = _read(attempts[-1], max(0, _size(attempts[-1]) - _TAIL_BYTES))
        echo("".join(data.decode("utf-8", "replace").splitlines(keepends=True)[-lines:]))
    return tail


class Tail:
    """Prints what the log at home has grown by; a new attempt's log is announced."""

    def __init__(self, run: Run, echo: Callable[[str], None]) -> None:
        self.run = run
        self.echo = echo
        self.offsets: dict[int, int] = {}
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}

    def attempts(self) -> list[rundir.Attempt]:
        """The attempts whose files are home, oldest first."""
        return self.run.home.machine(self.run.record.machine).attempts()

    def follow(self) -> None:
        """Print what comes until the run has ended."""
        if self.run.record.state == "running":
            journey.go(self.run, lambda frame, _: self._take(frame), lambda _: self.print_new(), _quickly)
        self.print_new()

    def _take(self, frame: dict[str, object]) -> None:
        if str(frame.get("file", "")).endswith("log.txt"):
            self.print_new()
        if words := view.spoken(frame):
            _note(words)

    def print_new(self) -> None:
        """Print every byte that was not printed yet."""
        for attempt in self.attempts():
            if attempt.number not in self.offsets and attempt.number > 1:
                self.echo(f"--- attempt {attempt.number} ---\n")
            data = _read(attempt, self.offsets.get(attempt.number, 0))
            self.offsets[attempt.number] = self.offsets.get(attempt.number, 0) + len(data)
            if data:
                decoder = self._decoders.setdefault(attempt.number, _DECODER(errors="replace"))
                self.echo(decoder.decode(data))


def _note(words: str) -> None:
    print(plain(words), file=sys.stderr, flush=True)  # noqa: T201 -- notes go to stderr


def _quickly(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
    advance.bring_home(run, machine, arrivals, news, follow.QUICK_POLL_S)


def _size(attempt: rundir.Attempt) -> int:
    return attempt.log.stat().st_size if attempt.log.exists() else 0


def _read(attempt: rundir.Attempt, offset: int) -> bytes:
    if not attempt.log.exists():
        return b""
    with attempt.log.open("rb") as file:
        file.seek(offset)
        return file.read()

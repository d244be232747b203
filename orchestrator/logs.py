"""A run's log as it is at home, printed by byte offset, so that following goes on at the exact place."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable
from pathlib import Path

from jobs import rundir
from orchestrator import advance, clock, follow, journey, runs, view
from orchestrator.errors import GpuError
from orchestrator.home import Arrivals, News
from orchestrator.plain import plain
from orchestrator.runs import ENDED, Run
from orchestrator.transport import Machine

_TAIL_BYTES = 1 << 20
_POLL_S = 1.0
_DECODER = codecs.getincrementaldecoder("utf-8")  # a character may be cut between two looks


def show(run: Run, lines: int, echo: Callable[[str], None]) -> Tail:
    """Print the last lines of the newest attempt's log; returns a tail that goes on from there."""
    try:
        journey.refresh(run)
    except GpuError as error:  # what is home can be shown all the same
        _note(f"{error.message} This is what is home:")
    tail = Tail(run, echo)
    newest = {}
    for name, attempt in tail.attempts():
        tail.offsets[attempt.folder] = _size(attempt)
        newest[name] = attempt
    for name, attempt in newest.items() if lines else ():
        tail.head(name)
        data = _read(attempt, max(0, _size(attempt) - _TAIL_BYTES))
        echo("".join(data.decode("utf-8", "replace").splitlines(keepends=True)[-lines:]))
    return tail


class Tail:
    """Prints what the log at home has grown by; a new attempt's log is announced, and, of several, whose it is."""

    def __init__(self, run: Run, echo: Callable[[str], None]) -> None:
        self.run = run
        self.echo = echo
        self.offsets: dict[Path, int] = {}
        self._decoders: dict[Path, codecs.IncrementalDecoder] = {}
        self._last = ""

    def attempts(self) -> list[tuple[str, rundir.Attempt]]:
        """The attempts whose files are home, oldest first, each with its machine's name where several share the run."""
        parts = runs.workers(self.run)
        name = {part.run_id: part.record.machine if part is not self.run else "" for part in parts}
        copies = ((name[part.run_id], part.home.machine(part.record.machine)) for part in parts)
        return [(whose, attempt) for whose, copy in copies for attempt in copy.attempts()]

    def head(self, name: str) -> None:
        """Say whose log goes on now, unless it is that of the one before."""
        if name != self._last:
            self.echo(f"--- {name} ---\n")
            self._last = name

    def follow(self) -> None:
        """Print what comes until the run has ended."""
        if self.run.record.machines:
            self._follow_all()
        elif self.run.record.state == "running":
            journey.go(self.run, lambda frame, _: self._take(frame), lambda _: self.print_new(), _quickly)
        self.print_new()

    def _take(self, frame: dict[str, object]) -> None:
        if str(frame.get("file", "")).endswith("log.txt"):
            self.print_new()
        if words := view.spoken(frame):
            _note(words)

    def print_new(self) -> None:
        """Print every byte that was not printed yet."""
        for name, attempt in self.attempts():
            folder = attempt.folder
            if folder not in self.offsets and attempt.number > 1:
                self.head(name)
                self.echo(f"--- attempt {attempt.number} ---\n")
            data = _read(attempt, self.offsets.get(folder, 0))
            self.offsets[folder] = self.offsets.get(folder, 0) + len(data)
            if data:
                self.head(name)
                decoder = self._decoders.setdefault(folder, _DECODER(errors="replace"))
                self.echo(decoder.decode(data))

    def _follow_all(self) -> None:
        """The same where several machines share the run: what they print comes home by looks, or by who follows it."""
        while self.run.record.state not in ENDED:
            try:
                journey.refresh(self.run, everywhere=False)
            except GpuError as error:
                _note(error.message)
            self.print_new()
            clock.sleep(_POLL_S)


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

"""What a person sees while a run is followed: one live line on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from jobs import rows
from orchestrator import clock
from orchestrator.plain import plain

REFRESH_PER_SECOND = 2
_LINE_EVERY_S = 10.0
_SAID: set[str] = set()
"""Files that were said to stay on their machine, and troubles of mirrors: every pull names them again."""


class Tally:
    """What rows that were home and the frames of a pull add up to: the phase, the rows at home, their mean score."""

    def __init__(self, before: Iterable[bytes] = ()) -> None:
        self.phase = ""
        self.home = 0
        self.total: int | None = None
        self.rate = 0.0
        self.eta_s = 0.0
        self.steps = 0
        self.words = ""
        """Of a training: the steps that are done, and how it goes."""
        self._scored = 0
        self._sum = 0.0
        for line in before:
            self._count(line)

    def take(self, frame: dict[str, Any], data: bytes) -> bool:
        """Count one frame in; True when something a person would like to see has changed."""
        if frame.get("whole", "").endswith("/status.json"):
            self._take_status(data)
            return True
        if frame.get("file", "").endswith("/rows.jsonl"):
            for line in data.split(b"\n")[:-1]:
                self._count(line)
            return True
        return False

    def _take_status(self, data: bytes) -> None:
        """Take over a status; a damaged one, which a power cut may leave, is no news."""
        try:
            said = json.loads(data)
            self.phase = plain(str(said["phase"]))
            self.total = None if said["rows_total"] is None else int(said["rows_total"])
            self.rate = float(said["rows_per_second"] or 0)
            if said.get("steps_total"):
                self.steps, self.total = int(said["steps_done"]), int(said["steps_total"])
                self.words = plain(str(said["words"]))
            eta_s = float(said["eta_s"] or 0)
            self.eta_s = eta_s if math.isfinite(eta_s) else 0.0
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return

    def _count(self, line: bytes) -> None:
        with contextlib.suppress(rows.BadRow):
            row = rows.decode(line)
            self.home += row.get("error") is None
            if isinstance(row.get("score"), (int, float)):
                self._scored += 1
                self._sum += row["score"]

    @property
    def score(self) -> str:
        """Their mean score, in words; empty before there is one."""
        return f"score {self._sum / self._scored:.3f}" if self._scored else ""

    def line(self) -> str:
        """All of it on one line."""
        total = "" if self.total is None else f" of {self.total}"
        done = f"{self.steps}{total} steps" if self.words else f"{self.home}{total} rows home"
        words = [self.phase or "starting", done, self.score, self.words]
        if self.rate:
            words.append(f"{self.rate:.1f} rows/s")
        if self.eta_s:
            words.append(f"about {duration(self.eta_s)} left")
        return " · ".join(word for word in words if word)


def duration(seconds: float) -> str:
    """A time span as people say it: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class View(Protocol):
    """Told of each frame that is safe at home."""

    def __call__(self, frame: dict[str, Any], data: bytes) -> None:
        """Take one frame in."""
        ...


def spoken(frame: dict[str, Any], data: bytes = b"") -> str:
    """What a frame tells a person beside its data: a step under way, a silent machine, a mirror in trouble."""
    if "say" in frame:
        return plain(str(frame["say"]))
    if "unreachable" in frame:
        return plain(f"{frame['unreachable']} Trying again; the run may go on there by itself. Ctrl-C leaves it.")
    if "reachable" in frame:
        return plain(f"{frame['reachable']} answers again.")
    if "skipped" in frame and frame["skipped"] not in _SAID:
        _SAID.add(frame["skipped"])
        return plain(f"Left on the machine: {frame['skipped']}: {frame.get('why', '')}")
    if str(frame.get("whole", "")).endswith("/status.json"):
        return _of_mirror(data)
    return ""


def _of_mirror(status: bytes) -> str:
    """That the mirror takes no copies, and why, said once for each reason; a damaged status is no news."""
    try:
        mirror = json.loads(status).get("mirror") or {}
        why, target = str(mirror.get("failed") or ""), str(mirror.get("target"))
    except (ValueError, AttributeError, RecursionError):
        return ""
    if not why or why in _SAID:
        return ""
    _SAID.add(why)
    return plain(f"THE MIRROR {target} TAKES NO COPIES: {why}. Rows come home as before; it is tried again.")


@contextlib.contextmanager
def watching(home: Path, quiet: bool) -> Iterator[View]:
    """The view that fits: nothing when quiet, a live line on a terminal, else a plain line now and then; on stderr.

    `home`: the rows that are there already.
    """
    if quiet:
        yield lambda _frame, _data: None
        return
    tally = Tally(line for _, line in rows.whole_lines(home))
    if sys.stderr.isatty():
        with _live(tally) as view:
            yield view
    else:
        yield _Lines(tally)


class Listening:
    """Passes on what a command prints, as it comes home; other news goes to stderr."""

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, frame: dict[str, Any], data: bytes) -> None:
        """See View."""
        if words := spoken(frame, data):
            print(words, file=sys.stderr, flush=True)  # noqa: T201
        if str(frame.get("file", "")).endswith("/log.txt"):
            self._echo(self._decoder.decode(data))


class _Lines:
    """A plain line when the phase changes, and one every ten seconds."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._phase = ""
        self._said_at = 0.0

    def __call__(self, frame: dict[str, Any], data: bytes) -> None:
        """See View."""
        if words := spoken(frame, data):
            print(words, file=sys.stderr, flush=True)  # noqa: T201
        if not self._tally.take(frame, data):
            return
        if self._tally.phase != self._phase or clock.monotonic() - self._said_at >= _LINE_EVERY_S:
            self._phase, self._said_at = self._tally.phase, clock.monotonic()
            print(self._tally.line(), file=sys.stderr, flush=True)  # noqa: T201 -- progress goes to stderr


_ROWS = 20
"""Of the terminal: only whether there is more than one line matters, and not every terminal says."""


def _width() -> int:
    """Of the terminal, in columns; 80 for one that does not say."""
    return shutil.get_terminal_size().columns


@contextlib.contextmanager
def _live(tally: Tally) -> Iterator[View]:
    """One line that is drawn anew, at most so many times a second and for each phase; notes stand above it."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread that draws by itself
    shape = "{desc} {bar} {n_fmt}/{total_fmt} {unit}{postfix}"
    with tqdm(
        file=sys.stderr, bar_format=shape, leave=False, ncols=_width(), nrows=_ROWS, desc="starting", unit="rows home"
    ) as bar:
        drawn_at, phase = 0.0, ""

        def view(frame: dict[str, Any], data: bytes) -> None:
            nonlocal drawn_at, phase
            if words := spoken(frame, data):
                bar.write(words, file=sys.stderr)
            is_due = clock.monotonic() - drawn_at >= 1 / REFRESH_PER_SECOND
            if tally.take(frame, data) and (is_due or tally.phase != phase):
                drawn_at, phase = clock.monotonic(), tally.phase
                bar.total, bar.n, bar.ncols = tally.total, tally.steps or tally.home, _width()
                bar.unit = "steps" if tally.words else bar.unit
                bar.set_description_str(tally.phase, refresh=False)
                bar.set_postfix_str(" · ".join(tally.line().split(" · ")[2:]), refresh=False)
                bar.refresh()

        yield view

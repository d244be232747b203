"""The pull loop: rows, log, status and seal come home as they grow, and whoever watches is told."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from jobs import durable, spec
from orchestrator import clock, machines, on_machine, transport
from orchestrator.errors import BadAnswer, GpuError, LoginRefused, MachineGone, NotReachable
from orchestrator.home import Arrivals, News
from orchestrator.runs import Run
from orchestrator.transport import Machine

STREAM_S = 60.0
"""How long one pull keeps sending before a new one takes over."""
POLL_S = 2.0
"""How often the machine looks for new rows while a run is followed: each look costs both sides a sync."""
QUICK_POLL_S = 0.2
"""The same for `gpu logs -f`, where somebody looks."""
CUTS_MAX = 5
"""Answers in a row that are none of our agent's, before it is said that something is wrong."""
_BACK_OFF_S = (0.2, 1.0, 2.0, 5.0, 10.0)
RECORD_S = 1.0
"""How often run.json is brought up to date while following."""


@dataclass(frozen=True)
class Pace:
    """How long a pull goes on, and how often the machine looks for something new."""

    wait_s: float
    poll_s: float = POLL_S


NOW = Pace(0.0, QUICK_POLL_S)
"""What there is now, without waiting."""


def pull(run: Run, machine: Machine, arrivals: Arrivals, pace: Pace, news: News) -> dict[str, Any]:
    """One pull: bring home what is new for up to `pace.wait_s`; returns the end frame, `{cut}` when it was cut."""
    words = transport.agent_words(machine, run.record.agent, "pull", run.run_id)
    request = spec.canonical({**arrivals.request(pace.wait_s), "poll_s": pace.poll_s}) + b"\n"
    recorded_at = clock.monotonic()
    with machine.open(words, request) as stream:
        for frame, data in transport.frames(stream):
            if frame.get("end"):
                machines.note(machine.name, True)
                note(run, arrivals)
                on_machine.tell_home(run, machine, arrivals)
                return frame
            arrivals.take(frame, data)
            news(frame, data)
            if clock.monotonic() - recorded_at >= RECORD_S:
                note(run, arrivals)
                recorded_at = clock.monotonic()
        said = stream.last_words()
    return {"cut": said}


def follow(run: Run, machine: Machine, arrivals: Arrivals, news: News, poll_s: float = POLL_S) -> dict[str, Any]:
    """Pull until the run is not running any more; returns the end frame that says how it stands.

    A machine that does not answer is asked again for `machine.patience_s`, which is said (`{unreachable}`), and so is
    its coming back (`{reachable}`). Raises NotReachable when it stays away.
    """
    trouble = _Trouble(machine, news)
    while True:
        try:
            end = pull(run, machine, arrivals, Pace(STREAM_S, poll_s), trouble.over)
        except (NotReachable, LoginRefused) as error:  # a machine that boots may refuse who it let in before
            trouble.take(error)
            continue
        if end.get("state", "running") != "running":
            return end
        if "cut" in end:
            trouble.take(cut(run, machine, end))
        else:
            trouble.over(end, b"", progress=True)


class _Trouble:
    """Counts how long and how often a machine did not answer, waits longer each time, and gives up in the end."""

    def __init__(self, machine: Machine, news: News) -> None:
        self.machine = machine
        self.news = news
        self.tries = 0
        self.silent = False
        self.began_at = 0.0

    def over(self, frame: dict[str, Any], data: bytes, *, progress: bool = False) -> None:
        """Pass a frame on; what was wrong is over once data comes: a machine that only greets is asked no longer."""
        if self.silent:
            self.silent = False
            machines.note(self.machine.name, True)
            self.news({"reachable": self.machine.name}, b"")
        if data or progress:
            self.tries = 0
        self.news(frame, data)

    def take(self, error: GpuError) -> None:
        """Wait before the next try; raises the error when there is to be none."""
        if not self.tries:
            self.began_at = clock.monotonic()
        if not self.silent:
            self.silent = True
            machines.note(self.machine.name, False)
            self.news({"unreachable": error.message}, b"")
        self.tries += 1
        if self.tries > 1 and self.machine.is_gone():
            raise MachineGone(f"{self.machine.name} is gone, by its provider's own word.")
        gone_s = clock.monotonic() - self.began_at
        if gone_s > self.machine.patience_s or (isinstance(error, BadAnswer) and self.tries >= CUTS_MAX):
            raise error
        time.sleep(_BACK_OFF_S[min(self.tries, len(_BACK_OFF_S)) - 1])


def cut(run: Run, machine: Machine, end: dict[str, Any]) -> NotReachable:
    """The error for a pull that ended in the middle; one whose agent complained is no use to repeat for long."""
    why = f" Its last words: {end['cut']}" if end["cut"] else ""
    kind = BadAnswer if end["cut"] else NotReachable
    return kind(f"A pull of {run.run_id} from {machine.name} ended in the middle.{why}")


def note(run: Run, arrivals: Arrivals) -> None:
    """Bring run.json up to date with what is home."""
    changes: dict[str, Any] = {"rows_home": arrivals.rows.good, "rows_damaged": arrivals.rows.corrupt}
    is_current = arrivals.copy.folder.name == run.record.machine
    attempts = arrivals.copy.attempts() if is_current else []
    status = durable.load_news(attempts[-1].status) if attempts else {}
    if status:
        done = status.get("rows_done")
        changes |= {
            "phase": str(status.get("phase", "")),
            "rows_done": max(done if isinstance(done, int) else 0, arrivals.rows.good),
            "rows_synced": status.get("rows_synced", 0),
            "last_seen": status.get("heartbeat"),
            "rows_total": status.get("rows_total") or run.record.rows_total,
            "steps_done": status.get("steps_done") or run.record.steps_done,
            "steps_total": status.get("steps_total") or run.record.steps_total,
        }
    run.save(**changes)

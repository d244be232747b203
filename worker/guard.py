"""The guard of a rented machine: ends it at its deadline, or when it is idle and nothing on it is not home."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pwd
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs import durable, locks, rundir, times
from worker import guard_settings, processes
from worker.guard_settings import Settings, seconds
from worker.own_instance import Found, Trouble
from worker.steady import Clock

BAD_SETTINGS = 3
_LOCK_WAIT_S = 1.0
_POLL_S = 0.1
_NULL = subprocess.DEVNULL
_STOP_MARGIN_S = 60.0
"""How long after their grace stops may take: a seal hashes what the run has made."""


class Files:
    """The folder of the guard, below that of the machine. One writer a file."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "guard"
        self.lock = self.folder / "guard.lock"  # held by the guard for life: one a machine
        self.status = self.folder / "status.json"  # the guard, replaced: what it knows, and the time it goes on from
        self.deadline = self.folder / "deadline.json"  # the deadline command, replaced, durable
        self.deadline_lock = self.folder / "deadline.lock"


class Guard:
    """Holds the lock for life. Looks, and acts, step by step: each step may be the last one before it is killed."""

    def __init__(self, settings: Settings, files: Files) -> None:
        self.settings = settings
        self.spans = settings.spans
        self.files = files
        self.account = settings.account()
        saved = durable.load_news(files.status)
        self.clock = Clock.begun(settings.written_at, saved.get("clock") or {})
        kept = ("deadline", "instance_id", "answered_at", "last_error", "ended_by", "asked_at", "active_at", "token")
        self.said: dict[str, Any] = {"phase": "armed", "armed_at": times.now(), **{k: saved.get(k) for k in kept}}
        self._looked_at = -math.inf
        self._check_in_at = -math.inf
        self._end_at = -math.inf
        self._failures = 0
        self._entry = sys.argv[0]

    def keep(self) -> None:
        """Guard until the machine ends, which ends this too."""
        while True:
            time.sleep(self.step())

    def step(self) -> float:
        """Look once, do what is due, write down how it stands; returns how long to wait, never more than a tick."""
        self.said["deadline"] = self._deadline()
        reason = self._reason()
        try:
            if reason and time.monotonic() >= self._end_at:
                self._end(reason)
            elif not reason:
                self.said["phase"] = "armed"
                if time.monotonic() >= self._check_in_at:
                    self._check_in()
        except (Trouble, OSError) as trouble:
            self._end_at = self._check_in_at = time.monotonic() + self._failed(trouble)
        self._save()
        deadline = self.said["deadline"]
        left_s = math.inf if deadline is None else deadline - self.clock.now()
        return min(self.spans.tick_s, left_s if left_s > 0 else math.inf)

    def _deadline(self) -> float | None:
        """The deadline as it is now: as it was moved, if it was."""
        try:
            asked = durable.load_news(self.files.deadline).get("deadline")
            if asked is not None:
                return _clamped(seconds(asked), self.settings.deadline_max)
        except ValueError:
            pass
        except OSError:  # a disk that fails for a moment does not undo what was moved
            if self.said["deadline"] is not None:
                return float(self.said["deadline"])
        return _clamped(self.settings.deadline, self.settings.deadline_max)

    def _reason(self) -> str:
        """Why the machine is to be ended now; empty when it is not."""
        is_doubtful = self._is_over(self.clock.latest()) and time.monotonic() >= self._end_at
        if is_doubtful or self._is_over(self.clock.now()):
            return "deadline"
        if self.settings.idle_s is None:
            return ""
        if time.monotonic() >= self._looked_at + self.spans.look_s:
            self._look()
        return "idle" if self._is_idle() else ""

    def _is_over(self, at: float) -> bool:
        deadline = self._deadline()
        return deadline is not None and at >= deadline

    def _is_idle(self) -> bool:
        """Whether, at the last look, the machine had been idle for long enough and all of it was home."""
        limit_s, idle_s, unpulled = self.settings.idle_s, self.said.get("idle_s"), self.said.get("unpulled")
        return limit_s is not None and idle_s is not None and idle_s >= limit_s and not unpulled

    def _look(self) -> None:
        """Ask a process of its own how idle the machine is, so that no disk or driver that hangs holds up the guard."""
        self._looked_at = time.monotonic()
        words = [*self._words("idle"), str(self.files.folder.parent), self.settings.terminals]
        try:
            asked = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=self.spans.look_within_s, check=True
            )
            seen = json.loads(asked.stdout)
            idle_s, token = seconds(seen["idle_s"]), str(seen["token"])
            unpulled, why = [str(each) for each in seen["unpulled"]], [str(each) for each in seen["why"]]
        except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError) as error:
            self.said |= {"idle_s": None, "why": [f"the look failed ({type(error).__name__})"], "unpulled": None}
            return
        # By the times of files alone, a clock that was set ahead would make everything look old.
        now = self.clock.now()
        active_at, known = self.said["active_at"], self.said["token"]
        if active_at is None or active_at > now or idle_s < self.spans.look_s or (known and token != known):
            active_at = now - min(idle_s, self.spans.look_s)
        self.said |= {"active_at": active_at, "token": token, "unpulled": unpulled, "why": why}
        self.said["idle_s"] = round(min(idle_s, now - active_at), 1)

    def _check_in(self) -> None:
        """See now and then that the key is good, which machine this is, and what time it is."""
        self._find()
        self._failures = 0
        self._check_in_at = time.monotonic() + self.spans.check_in_s

    def _find(self) -> Found:
        found = self.account.find()
        self.clock.believe(found.at)
        self.said |= {"instance_id": found.instance_id, "answered_at": times.now(), "last_error": None}
        return found

    def _end(self, reason: str) -> None:
        """Take the steps to the end of the machine, as far as they go; Trouble when the provider is in the way."""
        self.said |= {"phase": "ending", "ended_by": reason}
        self._save()
        try:
            found = self._find()
        except Trouble:
            if reason == "deadline" and self._is_over(self.clock.now()):
                self._stop_runs()  # what it costs cannot be helped now, but rows are sealed in time
            raise
        if reason == "deadline" and self._is_still(reason):
            self._stop_runs()  # which takes a while: the deadline may be moved meanwhile
        if not self._is_still(reason):
            self.said["phase"] = "armed"
            self._end_at = time.monotonic() + self.spans.again_max_s
            return
        self.account.terminate(found)
        self._failures = 0
        self.said |= {"phase": "ended", "asked_at": times.now()}
        self._end_at = time.monotonic() + self.spans.ending_s

    def _is_still(self, reason: str) -> bool:
        """Whether the reason holds, now that the provider has said what time it is, and a moment has passed."""
        if reason == "deadline":
            return self._is_over(self.clock.now())
        self._look()
        return self._is_idle()

    def _stop_runs(self) -> None:
        """Stop every run that goes on here, each by the command the laptop would use.

        Returns when they are sealed, and in their mirror if they have one, or have had their time for that.
        """
        deadline = time.monotonic() + self.settings.grace_s + _STOP_MARGIN_S
        stops = []
        for path in self._held():
            with contextlib.suppress(OSError):
                words = [*self._words("stop"), str(path.parent), str(self.settings.grace_s)]
                stops.append(subprocess.Popen(words, stdin=_NULL, stdout=_NULL, stderr=_NULL))
        _wait_for(stops, deadline)
        while self._held() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _held(self) -> list[Path]:
        """The locks of the runs that go on here."""
        found = sorted((self.files.folder.parent / "runs").glob("*/run.lock"))
        return [path for path in found if rundir.is_safe_name(path.parent.name) and locks.is_held(path)]

    def _words(self, verb: str) -> list[str]:
        return [sys.executable, "-I", "-X", "utf8", self._entry, verb]

    def _failed(self, trouble: Trouble | OSError) -> float:
        """Remember what went wrong; returns for how long to leave the provider alone, which grows up to a bound."""
        is_ours = isinstance(trouble, Trouble)
        self.said["last_error"] = f"{times.now()} {trouble if is_ours else type(trouble).__name__}"
        wait_s = min(self.spans.again_s * 2.0 ** min(self._failures, 30), self.spans.again_max_s)
        self._failures += 1
        return max(wait_s * random.uniform(0.8, 1.2), getattr(trouble, "wait_s", 0.0))  # noqa: S311

    def _save(self) -> None:
        """Write down how it stands, without a sync and without waiting for room: a full disk must not end the guard."""
        limits = {"idle_limit_s": self.settings.idle_s, "deadline_max": self.settings.deadline_max}
        document = {**self.said, **limits, "looked_at": times.now(), "pid": os.getpid(), "clock": self.clock.saved()}
        with contextlib.suppress(OSError):
            durable.save_json(self.files.status, document, synced=False)


def _clamped(deadline: float | None, latest: float | None) -> float | None:
    return min(deadline, latest) if deadline is not None and latest is not None else deadline


def _wait_for(children: Iterable[subprocess.Popen[bytes]], deadline: float) -> None:
    """Return once all have ended; those that have not by `deadline` (monotonic seconds) are killed."""
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)


def become(user: str) -> None:
    """Give up being root: the guard needs nothing but the network and that user's files."""
    processes.keep_memory_private()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if user and os.geteuid() == 0 and pwd.getpwnam(user).pw_uid != 0:
        known = pwd.getpwnam(user)
        os.initgroups(user, known.pw_gid)
        os.setgid(known.pw_gid)
        os.setuid(known.pw_uid)
        os.environ["HOME"] = known.pw_dir
        processes.keep_memory_private()


def watch(path: str) -> int:
    """Guard this machine as the settings say. 0 at once when another guard does; else it ends with the machine."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        settings = guard_settings.load(path)
        become(settings.user)
        files = Files(settings.folder())
        durable.have_folder(files.folder)
        if locks.take(files.lock, _LOCK_WAIT_S) is None:  # kept open for life
            return 0
        guard = Guard(settings, files)
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"gpu-guard: {error if isinstance(error, ValueError) else type(error).__name__}", file=sys.stderr)  # noqa: T201
        return BAD_SETTINGS
    guard.keep()
    return 0


def view(root: Path) -> dict[str, Any]:
    """How the guard of this machine stands, for the laptop: `alive`, and what it last wrote down."""
    files = Files(root)
    said = durable.load_news(files.status)
    said.pop("clock", None)
    asked = durable.load_news(files.deadline).get("deadline")
    return {"alive": locks.is_held(files.lock), **said, "deadline_asked": asked}


def move(root: Path, deadline: float) -> dict[str, Any]:
    """Move the deadline, to sooner or later; returns `view`, with the deadline as the guard will keep it."""
    files = Files(root)
    durable.have_folder(files.folder)
    with locks.held(files.deadline_lock, 10.0):
        durable.save_json(files.deadline, {"deadline": deadline, "asked_at": times.now()})
    seen = view(root)
    return {**seen, "deadline": _clamped(deadline, seen.get("deadline_max"))}


def main(verb: str, words: list[str]) -> int:
    """Run a command about the guard; of `guard` and `deadline` the answer is a JSON line on standard output."""
    if verb == "watch":
        return watch(words[0])
    root = Path(words[0])
    try:
        answer = view(root) if verb == "guard" else move(root, seconds(json.load(sys.stdin.buffer)["deadline"]))
    except (ValueError, KeyError, TypeError):
        answer = {"error": "refused"}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0

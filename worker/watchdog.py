"""The guard of a container that has a key of its own: one plain file, sent in the request that rents the machine."""

# It travels inside a text of 4,000 signs and runs alone, on Python 3.8: the standard library, and nothing of ours.
# Its folder and its words are those of worker/guard.py, whose commands `guard` and `deadline` speak for both.

from __future__ import annotations

import email.utils
import fcntl
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path.home() / ".gpu"
GUARD = ROOT / "guard"
NEVER = 1e12


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What the work returns; the name of its error when it fails or takes longer. So nothing ends the watchdog."""
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and again each second: no child that hangs is waited for
    try:
        return work()
    except Exception as error:  # noqa: BLE001 -- what a provider or a disk answers must not keep a machine billed
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def ring(*_: object) -> None:
    """Give up what takes too long."""
    raise TimeoutError


def hold() -> Any:
    """The open file that holds the lock, to be kept for life; BlockingIOError when another process holds it."""
    GUARD.mkdir(parents=True, exist_ok=True)
    lock = (GUARD / "guard.lock").open("a")
    within(1, lambda: fcntl.flock(lock, fcntl.LOCK_EX))  # who only looks whether it is held holds it for a moment
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


class Watchdog:
    """Looks, and acts, step by step. Its own attributes are what status.json says: no secret is one of them."""

    headers: dict[str, str] = {}  # noqa: RUF012 -- the key: of the class, and so never written down
    deadline = deadline_max = idle_limit_s = NEVER
    pace: float = 1  # of all pauses: tests are in a hurry
    patience_s: float = 60  # a look, a call, or a stop beyond its grace that takes longer is given up
    terminals, processes = "/dev/pts", "/proc"
    token: object = None
    heard = False
    ended_by = ""
    tries = 0
    rest_s: float = 0
    asked = looked = -NEVER
    tls: bool
    host: str
    path: str
    instance_id: str
    grace_s: float
    epoch: float

    def __init__(self, settings: dict[str, Any]) -> None:
        vars(self).update(settings)
        self.epoch = max(time.time(), self.epoch)
        self.mark = self.active = time.monotonic()
        self.pid, self.phase = os.getpid(), "armed"

    def keep(self) -> None:
        """Guard until the machine ends, which ends this too."""
        while True:
            time.sleep(self.step())

    def step(self) -> float:
        """Look once, and do what is due; returns how long to wait."""
        within(9, self.read_deadline)
        within(9, self.save)
        if time.monotonic() > self.looked + 30 * self.pace:
            self.measure()
        reason = self.reason()
        if reason != self.ended_by:
            self.ended_by, self.tries, self.phase = reason, 0, "armed"
        # A wall clock that is ahead may have slept with all of its machine: the provider knows.
        pause = 0 if reason else 300 if time.time() > self.deadline else 3600
        if self.tries:
            pause = min(5 * 2**self.tries, 300)
        if time.monotonic() > self.asked + max(pause * self.pace, self.rest_s):
            self.tries += 1
            if reason:
                self.end()
            elif self.ask("armed", "GET"):
                self.tries = 0
        return max(min(10 * self.pace, self.deadline - self.now()), self.pace)

    def now(self) -> float:
        """The time by a clock that nobody here sets, mended by the provider; seconds since 1970."""
        return self.epoch + time.monotonic() - self.mark

    def stamp(self) -> str:
        """The time in words."""
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now()))

    def save(self) -> None:
        """Write down how it stands, if there is room."""
        self.looked_at = self.stamp()
        fresh = GUARD / "status.new"
        fresh.write_text(json.dumps(vars(self)))
        fresh.replace(GUARD / "status.json")

    def read_deadline(self) -> None:
        """Take over the deadline as it was moved, if it was; a disk that fails for a moment moves nothing back."""
        moved = json.loads((GUARD / "deadline.json").read_bytes())
        self.deadline = min(float(moved["deadline"]), self.deadline_max)

    def reason(self) -> str:
        """Why the machine is to be ended now; empty when it is not."""
        if self.now() >= self.deadline:
            return "deadline"
        return "idle" if (self.idle_s or -1) >= self.idle_limit_s else ""

    def measure(self) -> None:
        """See how idle the machine is; after a look that fails, or takes too long, nobody knows."""
        self.looked = time.monotonic()
        self.idle_s: float | None = None
        self.why = [within(self.patience_s, self.look)]

    def look(self) -> str:
        """Take over what the agent says of how idle the machine is and of what is not home; returns the last uses.

        While there is no agent, a connection over SSH is use, and whatever may be a run is not home.
        """
        agent, idle_s, token, why = self.agent(), NEVER, "", "nothing was sent here yet"
        unpulled = [path.name for path in ROOT.glob("runs/*")]
        if agent:
            words = [*agent, "idle", str(ROOT), self.terminals]
            seen = json.loads(subprocess.check_output(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            idle_s, token, unpulled, why = seen["idle_s"], seen["token"], list(seen["unpulled"]), ", ".join(seen["why"])
        elif any(words[:4] == b"sshd" and b"@" in words[:20] for words in self.commands()):
            idle_s = 0
        now, recent_s = time.monotonic(), 30 * self.pace
        # By the times of files alone, a clock that was set ahead would make everything look old.
        if idle_s < recent_s or token != self.token:
            self.active = max(self.active, now - min(idle_s, recent_s))
        self.token, self.unpulled, self.idle_s = token, unpulled, min(idle_s, now - self.active)
        return why

    def commands(self) -> Iterator[bytes]:
        """The words of each process here; of a connection over SSH they are `sshd: USER@TERMINAL`."""
        for path in Path(self.processes).glob("[0-9]*/cmdline"):
            yield path.read_bytes()

    def agent(self) -> list[str]:
        """The words that begin a command of the newest agent here; empty when there is none."""
        newest = max(ROOT.glob("agent/*/worker/__main__.py"), key=lambda path: path.stat().st_mtime, default=None)
        return [sys.executable, "-I", "-X", "utf8", str(newest)] if newest else []

    def end(self) -> None:
        """Take the steps to the end of the machine, as far as they go now."""
        self.phase = "ending"
        self.ask("ending", "GET")  # whatever it answers, its date counts
        if self.ended_by == "idle":
            self.measure()
        elif self.reason():
            within(self.grace_s + self.patience_s, self.stop_runs)  # a while, in which the deadline may be moved
        within(9, self.read_deadline)
        if self.heard and self.reason() == self.ended_by:
            # What is not home is never destroyed because nobody uses it: only its disk costs on.
            if self.ended_by == "idle" and self.unpulled:
                self.ask("stopped", "PUT", '{"state": "stopped"}')
            else:
                self.ask("ended", "DELETE", "{}")

    def stop_runs(self) -> None:
        """Stop every run that goes on here, each by the agent; returns when all are sealed."""
        stops = []
        for path in ROOT.glob("runs/*/run.lock"):
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    words = [*self.agent(), "stop", str(path.parent), str(self.grace_s)]
                    stops.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        for stop in stops:
            stop.wait()

    def ask(self, phase: str, method: str, body: str | None = None) -> bool:
        """Whether the provider did this with our own machine, and so began a phase; what was in the way is noted."""
        self.asked, self.rest_s = time.monotonic(), 0
        trouble = within(self.patience_s, lambda: self.call(method, body))
        self.last_error = trouble and self.stamp() + " " + trouble
        if not trouble:
            self.phase, self.answered_at = phase, self.stamp()
        within(9, self.save)
        return not trouble

    def call(self, method: str, body: str | None) -> str | None:
        """Ask the provider; what it refuses with, in words of ours. Redirects lead nowhere, for the key goes along."""
        link = (http.client.HTTPSConnection if self.tls else http.client.HTTPConnection)(self.host)
        link.request(method, self.path + self.instance_id + "/", body, self.headers)
        answer = link.getresponse()
        said = answer.read(1 << 20)
        self.heard = True
        at = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
        if abs(at - self.now()) > 5:  # it is the provider who counts money
            self.epoch, self.mark = at, time.monotonic()
        self.rest_s = min(float(answer.headers["Retry-After"] or 0), 600)
        status = str(answer.status)
        if status not in ("200", "404"):
            return "HTTP " + status
        document = json.loads(said)
        code = str(document.get("error"))
        if code == "no_such_instance" or (status == "200" and document.get("success", 1)):
            return None
        return "HTTP " + status + " " + (code if len(code) < 40 and code.isidentifier() else "")


def watch(settings: dict[str, Any]) -> None:
    """Guard this machine as the settings say. Returns at once when another does; else it ends with the machine."""
    signal.signal(signal.SIGALRM, ring)
    key = os.environ.pop("CONTAINER_API_KEY")  # no child inherits it
    kind = "application/json"
    Watchdog.headers = {"Authorization": "Bearer " + key, "Content-Type": kind, "User-Agent": "gpu-guard"}
    settings["instance_id"] = str(int(os.environ["CONTAINER_ID"]))
    lock = within(9, hold)
    if lock != "BlockingIOError":
        Watchdog(settings).keep()


if __name__ == "__main__":
    watch(json.loads(sys.argv[1]))

"""Disturbs a run on machines over SSH at random, again and again, while `gpu resume` carries it to its end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from jobs import durable, rows, rundir
from orchestrator.runs import Run
from tests.rig import Sshd
from tests.waiting import until

GPU = [sys.executable, "-m", "orchestrator.cli"]
SEED_VARIABLE = "GPU_STORM_SEED"
"""Set it to the seed that a failed storm names, and the same storm is made again."""
STORY = '''
"""A story for storms: rows of a size and content of their own, slowly, until the storm is over."""
import hashlib, os, time
from jobs import rows
from worker.progress import Progress

def row(index):
    digest = hashlib.sha256(str(index).encode()).hexdigest()
    text = (digest + " größer \\u6570\\n") * (1 + int(digest[:2], 16) % 7 ** (index % 4))
    score = 1.0 if int(digest[2:4], 16) % 3 else 0.0
    return {"key": f"t/s/{index}#0", "error": None, "example_id": str(index), "sample_index": 0, "completion": text,
            "answer": digest[:8], "target": str(index), "score": score, "answers": {"all": digest[:8]},
            "scores": {"all": score}, "tokens_in": index, "tokens_out": len(text), "finish_reason": "stop",
            "subject": None, "seed": index, "at": "2026-01-01T00:00:00.000Z"}

def work(run, attempt, job):
    params = job["params"]
    done = rows.Index()
    for path in run.row_files():
        rows.index(path, done)
    todo = [index for index in range(params["count"]) if not done.keys.get(f"t/s/{index}#0")]
    progress = Progress(attempt.progress)
    progress.expect(total=params["count"], before=params["count"] - len(todo))
    progress.phase("counting")
    with rows.Appender(attempt.rows) as out:
        for index in todo:
            out.append(row(index))
            progress.rows(out.synced)
            print("row", index, "größer", flush=True)
            if not os.path.exists(params["calm"]):
                time.sleep(params["pace_s"])
'''
KINDS = ("restart", "hangup", "freeze", "supervisor", "worker", "laptop", "reboot", "move")
"""What may be done to a run, or to one of the two sides of it."""
_ALLOWED = (0, 5, 10, -signal.SIGKILL)
"""How a command may end in a storm: done, the job failed, unreachable or lost, killed by us."""
_CALM_S = 240.0
_POLL_S = 0.02
_WORKING_S = 10.0


@dataclass
class SshStorm:
    """A seeded series of disturbances of one run on two machines; `history` says what was done, in order."""

    run: Run
    boxes: list[Sshd]
    calm: Path
    """A file that the run's story looks for: once it is there, the rest is made quickly."""
    rounds: int
    seed: int
    history: list[str] = field(default_factory=list)
    commands: int = 0

    def rage(self) -> Counter[str]:
        """All rounds, then calm, and on to the end; returns how often what was done. AssertionError names the seed."""
        chance = random.Random(self.seed)
        try:
            command = self._start("resume", self.run.run_id)
            for kind in kinds(chance, self.rounds):
                self._wait(chance, command)
                command = self._disturb(kind, chance.random() * 0.7, self._alive(command))
            self._end(command)
        except BaseException:
            print(f"{SEED_VARIABLE}={self.seed}, after: {', '.join(self.history)}", file=sys.stderr)  # noqa: T201
            raise
        return Counter(name.split()[0] for name in self.history)

    @property
    def here(self) -> Sshd:
        """The machine the run is on now."""
        self.run.reload()
        return next(box for box in self.boxes if box.folder.name == self.run.record.machine)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        self.commands += 1
        with self._said(self.commands) as said:
            return subprocess.Popen([*GPU, *words, "-q"], stdout=subprocess.DEVNULL, stderr=said)

    def _said(self, number: int, mode: str = "wb") -> IO[bytes]:
        folder = self.calm.parent / "commands"
        folder.mkdir(exist_ok=True)
        return (folder / f"{number}.txt").open(mode)

    def _alive(self, command: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """The command, or a new one when it has ended; how that ended is judged."""
        if command.poll() is None:
            return command
        self._judge(command)
        self.history.append(f"({command.returncode})")
        return self._start("resume", self.run.run_id)

    def _judge(self, command: subprocess.Popen[bytes]) -> None:
        with self._said(self.commands, "rb") as file:
            said = file.read().decode()
        assert command.returncode in _ALLOWED, f"exit code {command.returncode}: {said}"
        assert "Traceback" not in said, said

    def _wait(self, chance: random.Random, command: subprocess.Popen[bytes]) -> None:
        """Some moment: any, also before anything was sent, or one at which rows come home."""
        delay_s, wants_rows = chance.random() * 1.2, chance.random() < 0.4
        time.sleep(delay_s)
        before, deadline = self._home(), time.monotonic() + 6
        while wants_rows and self._home() == before and command.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _home(self) -> int:
        return self.run.home.rows.stat().st_size if self.run.home.rows.exists() else 0

    def _disturb(self, kind: str, moment_s: float, command: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        box = self.here
        self.history.append(f"{kind} {box.folder.name}")
        if kind == "move":
            return self._move(box, command, moment_s)
        if kind == "laptop":
            command.kill()
            command.wait()
        elif kind in ("supervisor", "worker"):
            self._kill(box, kind)
        elif kind == "hangup":
            hang_up(box)
        elif kind == "reboot":
            box.reboot()
        elif kind == "freeze":
            box.freeze(jobs=True)
            time.sleep(0.5 + moment_s)
            box.thaw()
        else:
            box.kill_all()
            time.sleep(moment_s)
            box.start()
        return command

    def _kill(self, box: Sshd, name: str) -> None:
        attempts = there(box, self.run).attempts()
        pids = durable.load_json(attempts[-1].pids) if attempts else None
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[name]["pid"], signal.SIGKILL)

    def _move(self, box: Sshd, command: subprocess.Popen[bytes], moment_s: float) -> subprocess.Popen[bytes]:
        """The machine is gone, the run taken over by the other one; then the old one comes back and knows nothing.

        The run works there when it is cut off, if it does within a while: what it makes from then on comes home late.
        """
        deadline = time.monotonic() + _WORKING_S
        while there(box, self.run).state().state != "running" and time.monotonic() < deadline:
            command = self._alive(command)
            time.sleep(_POLL_S)
        command.kill()
        command.wait()
        box.kill_all()
        other = next(it.folder.name for it in self.boxes if it is not box)
        taken = self._start("resume", self.run.run_id, "--on", other, "--take-over")
        until(lambda: taken.poll() is not None or self.here is not box, 60)
        time.sleep(moment_s)
        box.start()
        return taken

    def _end(self, command: subprocess.Popen[bytes]) -> None:
        """No more disturbances: the run is carried to its end, and what machines made late is brought home."""
        self.calm.touch()
        deadline = time.monotonic() + _CALM_S
        while self.run.record.state != "sealed" or command.poll() is None:
            assert time.monotonic() < deadline, f"not done in calm: {self.run.record}"
            command = self._alive(command)
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(0.2)
            self.run.reload()
        self._judge(command)
        pulled = subprocess.run([*GPU, "pull", self.run.run_id], capture_output=True, text=True, timeout=60)
        assert pulled.returncode == 0, pulled.stderr
        self.run.reload()


def kinds(chance: random.Random, rounds: int) -> list[str]:
    """What is done in each round: in any order, and each kind about as often as the others."""
    return [kind for _ in range(-(-rounds // len(KINDS))) for kind in chance.sample(KINDS, len(KINDS))][:rounds]


def hang_up(box: Sshd) -> None:
    """Kill every connection of a machine; it goes on listening, and what was started there goes on."""
    for process in box.connections():
        if process.parent != os.getpid():  # the listener is our own child
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def there(box: Sshd, run: Run) -> rundir.Run:
    """The run's folder on a machine."""
    return rundir.Run(box.home / ".gpu" / "runs" / run.run_id)


def assert_nothing_was_lost(run: Run, boxes: list[Sshd], count: int) -> None:
    """Each key once, each log and each row file as its machine has it, every machine settled."""
    assert run.record.state == "sealed", run.record
    assert all(entry["settled"] for entry in run.record.former), run.record.former
    keys = [row["key"] for row in (rows.decode(line) for _, line in rows.whole_lines(run.home.rows))]
    assert sorted(keys) == sorted(f"t/s/{index}#0" for index in range(count))
    for box in boxes:
        copy = run.home.machine(box.folder.name)
        for attempt in there(box, run).attempts():
            for name in ("log.txt", "rows.jsonl"):
                made = attempt.folder / name
                if made.exists():
                    here = copy.attempt(attempt.number).folder / name  # what is empty there need not be here
                    brought = here.read_bytes() if here.exists() else b""
                    assert brought == made.read_bytes(), f"{here} is not what {box.folder.name} made"


def laptop_processes() -> list[str]:
    """The command lines of all commands of ours that live, of this test's own world, this process aside."""
    mark = f"GPU_HOME={os.environ['GPU_HOME']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.name != str(os.getpid()) and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found

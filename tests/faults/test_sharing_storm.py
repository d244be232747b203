"""Machines that share a run, and the laptop, disturbed at random: the rows of one machine come home, each once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import runs
from orchestrator.runs import Run
from tests.faults.ssh_storm import SEED_VARIABLE, hang_up, laptop_processes
from tests.journeys import sharers
from tests.journeys.sharers import gpu, shared, started
from tests.rig import Sshd
from tests.waiting import until

Box = Callable[..., Sshd]
KINDS = ("laptop", "restart", "away", "hangup", "freeze", "supervisor", "worker", "reboot")
"""What may be done to a machine, or to the command; `away` is long enough for its part to be given to the others."""
_ALLOWED = (0, 5, 10, -signal.SIGKILL)
_CALM_S = 240.0


class Storm:
    """A seeded series of disturbances of one run; `history` says what was done, in order."""

    def __init__(self, run: Run, boxes: list[Sshd], seed: int) -> None:
        self.run = run
        self.boxes = boxes
        self.chance = random.Random(seed)
        self.history: list[str] = []
        self.command = started("resume", run.run_id)

    def rage(self, rounds: int) -> Counter[str]:
        """All rounds, then calm, and on to the end; returns how often what was done."""
        for kind in (self.chance.choice(KINDS) for _ in range(rounds)):
            self._wait(self.chance.random() * 1.5)
            self._disturb(kind, self.chance.choice(self.boxes))
            assert sharers.disjoint(self.run), "an example belongs to two shares"
        assert self._state() != "sealed", "it was over before the storm was"
        Path("calm").touch()
        for box in self.boxes:
            box.thaw()
            box.start()
        deadline = time.monotonic() + _CALM_S
        while self._state() != "sealed":
            assert time.monotonic() < deadline, [share.record for share in runs.shares(self.run)]
            self._alive()
            time.sleep(0.1)
        self._judge(*self.command.communicate(timeout=60))
        return Counter(name.split()[0] for name in self.history)

    def _state(self) -> str:
        self.run.reload()
        return self.run.record.state

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._alive()
            time.sleep(0.05)

    def _alive(self) -> None:
        """Have a command follow the run; how one that has ended did so is judged."""
        if self.command.poll() is not None and self._state() != "sealed":
            self._judge(*self.command.communicate())
            self.command = started("resume", self.run.run_id)

    def _judge(self, _: str, said: str) -> None:
        assert self.command.returncode in _ALLOWED, said
        assert "Traceback" not in said, said

    def _disturb(self, kind: str, box: Sshd) -> None:
        self.history.append(f"{kind} {box.folder.name}")
        if kind == "laptop":
            self.command.kill()
            self._judge(*self.command.communicate())
        elif kind in ("supervisor", "worker"):
            sharers.kill(box, self.run, kind)
        elif kind == "hangup":
            hang_up(box)
        elif kind == "reboot":
            box.reboot()
        elif kind == "freeze":
            box.freeze(jobs=True)
            self._wait(1.0)
            box.thaw()
        else:
            box.kill_all()
            self._wait(6.0 if kind == "away" else 0.3)
            box.start()


def weather(boxes: list[Sshd], rounds: int, seed: int) -> None:
    """One storm from its beginning to calm, and what must be true then."""
    run = shared([box.folder.name for box in boxes], 150, pace_s=0.7, samples=2)
    storm = Storm(run, boxes, seed)
    try:
        storm.rage(rounds)
        sharers.assert_whole(run, 150, 2)
        assert gpu("pull", run.run_id).returncode == 0
        run.reload()
        assert runs.is_settled(run)
        sharers.assert_whole(run, 150, 2)
        made = {key for box in boxes for key in sharers.made_on(box, run)}
        assert made == {row["key"] for row in sharers.lines(run.home.rows)}
        until(lambda: not laptop_processes(), 10)
    except BaseException:
        print(f"{SEED_VARIABLE}={seed}, after: {', '.join(storm.history)}", file=sys.stderr)  # noqa: T201
        raise
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            storm.command.kill()
            storm.command.communicate(timeout=10)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [int(os.environ[SEED_VARIABLE])] if SEED_VARIABLE in os.environ else range(4))
def test_a_storm_over_three_machines_changes_no_row(box: Box, seed: int) -> None:
    """24 disturbances of machines and laptop: nothing is lost, nothing doubled, no example ever has two owners."""
    weather([box(name) for name in "abc"], 24, seed)

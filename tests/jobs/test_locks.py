"""Locks: the kernel frees them with their holder, children may keep them, and probing disturbs nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import locks
from tests.waiting import until

ROOT = Path(__file__).parent.parent.parent
HOLD = "descriptor = locks.take(path); assert descriptor is not None; say(b'held'); signal.pause()"
LEAVE_CHILD = """
descriptor = locks.take(path)
os.set_inheritable(descriptor, True)
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"], pass_fds=[descriptor])
say(b"%d" % child.pid)
signal.pause()
"""
SPAWN_CHILD = """
descriptor = locks.take(path)
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"], close_fds=False)
say(b"%d" % child.pid)
signal.pause()
"""
PROBE = """
say(b"go")
while os.getppid() == parent:
    locks.is_held(path)
"""
RACE = """
say(b"here")
sys.stdin.buffer.read()
for _ in range(int(sys.argv[4])):
    descriptor = locks.take(path, 120.0)
    os.close(os.open(sys.argv[2] + ".alone", os.O_CREAT | os.O_EXCL))  # fails when another is here
    os.sched_yield()
    os.unlink(sys.argv[2] + ".alone")
    os.close(descriptor)
"""
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.lock"


@pytest.fixture
def start(path: Path) -> Iterator[Start]:
    """Starts a process that runs a script about the lock; it has spoken when it is given. All are killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(script: str, *words: str) -> subprocess.Popen[bytes]:
        head = (
            "import os, signal, subprocess, sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
            "from jobs import locks; path = Path(sys.argv[2]); parent = int(sys.argv[3])\n"
            "say = lambda words: os.write(1, words + b'\\n')\n"
        )
        command = [sys.executable, "-I", "-S", "-c", head + script, str(ROOT), str(path), str(os.getpid()), *words]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        with process:  # closes its pipes and waits for it
            pass


def first_word(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_one_holds_it_at_a_time(path: Path) -> None:
    """A second `take` gives None at once or after its wait; after release it succeeds."""
    first = locks.take(path)
    assert first is not None
    assert locks.take(path) is None
    began = time.monotonic()
    assert locks.take(path, 0.3) is None
    assert time.monotonic() - began >= 0.3
    os.close(first)
    second = locks.take(path)
    assert second is not None
    os.close(second)


def test_a_take_that_waits_gets_it_when_it_is_free(path: Path) -> None:
    """`take` returns soon after the holder lets go, well before its wait is over."""
    first = locks.take(path)
    assert first is not None
    threading.Timer(0.1, os.close, [first]).start()
    began = time.monotonic()
    second = locks.take(path, 60.0)
    assert second is not None
    assert time.monotonic() - began < 30
    os.close(second)


def test_held_holds_it_for_the_block(path: Path) -> None:
    """The lock is held inside the block and free after it; a second block gives up, naming what is locked."""
    with locks.held(path, 0.0):
        assert locks.is_held(path)
        with pytest.raises(TimeoutError, match=r"run\.lock"), locks.held(path, 0.1):
            pass
    assert not locks.is_held(path)


def test_held_lets_go_when_the_block_raises(path: Path) -> None:
    """An exception inside the block frees the lock."""
    with pytest.raises(KeyError), locks.held(path, 0.0):
        raise KeyError
    assert not locks.is_held(path)


def test_a_lock_that_was_never_taken_is_free(path: Path) -> None:
    """Asking about a lock file that does not exist says free, and makes nothing."""
    assert not locks.is_held(path)
    assert not path.exists()


def test_a_lock_dies_with_its_holder(path: Path, start: Start) -> None:
    """The lock of a process is held until it is killed by SIGKILL, and free as soon as it is gone."""
    process = start(HOLD)
    assert first_word(process) == b"held"
    assert locks.is_held(path)
    assert locks.take(path) is None
    process.kill()
    process.wait()
    assert not locks.is_held(path)


def test_a_child_that_inherits_it_keeps_it(path: Path, start: Start) -> None:
    """A lock passed on to a child is held while the child lives, even when its first holder was killed."""
    process = start(LEAVE_CHILD)
    child = int(first_word(process))
    process.kill()
    process.wait()
    try:
        assert locks.is_held(path)
    finally:
        os.kill(child, signal.SIGKILL)
    until(lambda: not locks.is_held(path))


def test_a_child_does_not_inherit_it_by_accident(path: Path, start: Start) -> None:
    """A child that is simply started does not keep its parent's lock."""
    process = start(SPAWN_CHILD)
    child = int(first_word(process))
    process.kill()
    process.wait()
    try:
        until(lambda: not locks.is_held(path))
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_probing_disturbs_no_other_probe(path: Path, start: Start) -> None:
    """While processes probe a free lock without pause, it is never said to be held."""
    os.close(locks.take(path) or 0)
    for _ in range(3):
        assert first_word(start(PROBE)) == b"go"
    assert not any(locks.is_held(path) for _ in range(2000))


def test_probing_disturbs_no_take(path: Path, start: Start) -> None:
    """While a process probes the lock without pause, each `take` of it succeeds, without a wait asked for."""
    assert first_word(start(PROBE)) == b"go"
    for _ in range(1000):
        descriptor = locks.take(path)
        assert descriptor is not None
        os.close(descriptor)


def lowest_free_descriptor() -> int:
    """The number that the next opened file will have: higher when one was left open."""
    descriptor = os.dup(0)
    os.close(descriptor)
    return descriptor


def test_a_wait_that_is_broken_off_leaves_no_file_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception while waiting, as Ctrl-C raises, closes what was opened."""
    first = locks.take(path)
    assert first is not None

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(locks.time, "sleep", interrupt)
    before = lowest_free_descriptor()
    with pytest.raises(KeyboardInterrupt):
        locks.take(path, 5.0)
    assert lowest_free_descriptor() == before
    os.close(first)


@pytest.mark.parametrize("count", [pytest.param(50, id="quick"), pytest.param(5000, id="long", marks=pytest.mark.slow)])
def test_twenty_that_race_never_meet(count: int, path: Path, start: Start) -> None:
    """Of twenty processes that take and release the lock again and again, never two are inside, and all get through."""
    processes = [start(RACE, str(count)) for _ in range(20)]
    for process in processes:
        assert first_word(process) == b"here"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(250) for process in processes] == [0] * 20

"""Turns at a provider: as seldom as they must be, shared by processes, and never waited for endlessly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time as real
from pathlib import Path
from typing import Any

import pytest

from orchestrator import clock, config
from orchestrator.providers import pace
from orchestrator.providers.pace import Lane, take_turn
from tests.orchestrator.providers.loopback import Time

ROOT = Path(__file__).parents[3]
ANY = Lane("any", 1.0)
LAUNCH = Lane("launch", 12.0)
_TURNS = """
import sys, time
from orchestrator.providers.pace import Lane, take_turn
for _ in range(int(sys.argv[2])):
    assert take_turn("a", Lane("any", float(sys.argv[1])))
print(time.time())
"""


def file() -> Path:
    return config.state_folder() / "pace" / "a.json"


def test_calls_keep_their_distance(time: Time) -> None:
    """The first call waits for nothing, the next for a second, a second launch for twelve, another account not."""
    start = time.now
    for lanes, after in [([ANY], 0), ([ANY], 1), ([ANY, LAUNCH], 2), ([ANY], 3), ([ANY, LAUNCH], 14), ([ANY], 15)]:
        assert take_turn("a", *lanes)
        assert time.now - start == pytest.approx(after, abs=1e-3)
    assert take_turn("b", ANY, LAUNCH)
    assert time.now - start == pytest.approx(15, abs=1e-3)


def test_some_calls_may_come_together(time: Time) -> None:
    """Of a lane with three calls in a minute, three come at once, and no four within any minute."""
    lane = Lane("search", 60.0, 3)
    moments = []
    for pause_s in (0, 0, 10, 0, 0, 5, 0, 0):
        time.now += pause_s
        time.since += pause_s
        assert take_turn("a", lane)
        moments.append(time.now)
    assert moments[2] - moments[0] == 10
    assert all(later - earlier >= 60 for earlier, later in zip(moments, moments[3:], strict=False))
    assert moments[-1] - moments[0] < 3 * 60 + 10


@pytest.mark.parametrize("back_s", [0.5, 3600, 10**9])
def test_a_clock_that_was_set_back_delays_once(time: Time, back_s: float) -> None:
    """After the clock went back, one interval is waited, not the time it went back by."""
    assert take_turn("a", ANY, LAUNCH)
    time.now -= back_s
    before = time.since
    assert take_turn("a", ANY, LAUNCH)
    assert time.since - before == pytest.approx(12, abs=1e-3)
    assert take_turn("a", ANY)
    assert time.since - before == pytest.approx(13, abs=1e-3)


@pytest.mark.parametrize("value", [None, "x", math.nan, math.inf, -math.inf, [], True, {"a": 1}])
def test_a_damaged_note_is_no_note(time: Time, value: Any) -> None:
    """Whatever stands in the file, a turn comes, and is noted properly."""
    file().parent.mkdir()
    file().write_text(json.dumps({"any": value}))
    assert take_turn("a", ANY)
    assert json.loads(file().read_text())["any"] == pytest.approx(time.now)
    file().write_text("{")
    assert take_turn("a", ANY)


def test_without_a_file_the_process_paces_itself(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or a lock that is never free does not keep a call from being made, only makes it wait its time."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pace.durable, "save_json", full)
    assert take_turn("a", ANY, LAUNCH)
    assert time.slept == [12.0]


def test_a_turn_that_never_comes_is_given_up(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """When others always come first, the call is not made, and says so in about two minutes."""

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        file().write_text(json.dumps({"any": time.now}))

    monkeypatch.setattr(clock, "sleep", sleep)
    assert take_turn("a", ANY)
    assert not take_turn("a", ANY)
    assert 100 < time.since <= 121


def test_two_processes_share_the_turns(tmp_path: Path) -> None:
    """Eight turns of a quarter of a second, taken by two processes at once, last as long as eight of one."""
    assert take_turn("a", Lane("any", 0.25))
    began = real.time()
    words = [sys.executable, "-c", _TURNS, "0.25", "4"]
    both = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [float(child.communicate(timeout=60)[0]) for child in both]
    assert [child.returncode for child in both] == [0, 0]
    assert max(ended) - began >= 8 * 0.25 - 0.05


def test_the_name_of_an_account_does_not_tell_its_key(time: Time) -> None:
    """No file of the pace has the key in its name or content; each key has its own, the same one every time."""
    key = "secret_k3y-Value.0123456789"
    name = pace.account("lambda", key)
    assert name == pace.account("lambda", key) != pace.account("lambda", key + "x")
    take_turn(name, ANY)
    found = [path for path in config.state_folder().rglob("*") if path.is_file()]
    assert sorted(path.name for path in found) == [f"{name}.json", f"{name}.lock"]
    assert not any(key in str(path) or key in path.read_text() for path in found)
    assert all(path.stat().st_mode & 0o077 == 0 for path in found)

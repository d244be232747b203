"""A clock that goes on whatever is done to the wall clock, and takes the provider's word."""

from __future__ import annotations

import time

import pytest

from worker import processes, steady
from worker.steady import Clock


class Times:
    """The machine's two clocks, in a test's hand."""

    wall = 1_800_000_000.0
    boot = 100.0

    def pass_by(self, seconds: float) -> None:
        """Let time pass as it does."""
        self.wall += seconds
        self.boot += seconds


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    times = Times()
    monkeypatch.setattr(time, "time", lambda: times.wall)
    monkeypatch.setattr(steady, "since_boot", lambda: times.boot)
    monkeypatch.setattr(processes, "boot_id", lambda: "this boot")
    return times


def test_it_goes_on_when_the_wall_clock_is_set_back(times: Times) -> None:
    """A clock that is set back does not put a deadline off."""
    clock = Clock.begun(0.0, {})
    began = clock.now()
    times.pass_by(60)
    times.wall -= 86_400
    assert clock.now() == began + 60
    times.pass_by(60)
    assert clock.now() == began + 120


def test_a_wall_clock_that_jumps_ahead_is_a_doubt_and_no_more(times: Times) -> None:
    """A jump ahead may be a machine that slept: it is the latest time it can be, and the provider decides."""
    clock = Clock.begun(0.0, {})
    began = clock.now()
    times.wall += 7200
    assert clock.now() == began
    assert clock.latest() == began + 7200
    clock.believe(began + 7100)
    assert clock.now() == began + 7100
    clock.believe(began)
    assert clock.now() == began


def test_small_corrections_are_followed(times: Times) -> None:
    """What a time server corrects in small steps is taken over."""
    clock = Clock.begun(0.0, {})
    for _ in range(100):
        times.pass_by(10)
        times.wall += 0.5
        clock.now()
    assert clock.now() == times.wall


def test_it_goes_on_from_what_was_saved(times: Times) -> None:
    """A guard that is killed goes on by the same clock in the same boot; in another one, never from before."""
    saved = Clock.begun(0.0, {}).saved()
    times.pass_by(30)
    times.wall -= 86_400
    assert Clock.begun(0.0, saved).now() == saved["epoch"] + 30
    times.boot = 5.0
    assert Clock.begun(0.0, {**saved, "boot_id": "before"}).now() == saved["epoch"]
    for damaged in ({}, {"epoch": "x", "mark": None, "boot_id": "this boot"}, {"boot_id": "this boot"}):
        assert Clock.begun(0.0, damaged).now() == times.wall


def test_no_clock_shows_less_than_when_it_was_told(times: Times) -> None:
    """A machine that boots in 1970 begins at least where the laptop was when it wrote the settings."""
    times.wall = 7.0
    assert Clock.begun(1_790_000_000.0, {}).now() == 1_790_000_000.0

"""The ledger of costs: durable, one lease a marker, whatever is torn, damaged, repeated or written side by side."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import locks
from orchestrator import ledger
from orchestrator.errors import ConfigError
from orchestrator.ledger import Lease

FIRST = Lease("gpu-1", "box", "lambda", 0.6, 1_000_000.0, instance_id="a1", what="A10 in us-east-1")
_MANY = """
import sys
from orchestrator import ledger
from orchestrator.ledger import Lease
who = sys.argv[1]
for number in range(20):
    ledger.open_lease(Lease(f"{who}-{number}", who, "lambda", 1.0, float(number)))
    ledger.open_lease(Lease(f"both-{number}", who, "lambda", 1.0, float(number)))
    ledger.close_lease(f"{who}-{number}", float(number) + 60)
"""


def test_what_was_opened_and_closed_is_there() -> None:
    """A lease comes back as it was noted, open until it is closed, then with its end."""
    ledger.open_lease(FIRST)
    assert ledger.leases() == [FIRST]
    ledger.close_lease("gpu-1", 1_003_601.0)
    (closed,) = ledger.leases()
    assert closed == replace(FIRST, closed_at=1_003_601.0)
    assert closed.hours() == pytest.approx(3601 / 3600)
    assert closed.usd() == pytest.approx(0.61)


def test_an_open_lease_costs_until_now() -> None:
    """What is not closed goes on costing, each started minute whole; never less than nothing."""
    ledger.open_lease(FIRST)
    (lease,) = ledger.leases()
    assert lease.usd(1_000_000.0) == 0
    assert lease.usd(1_000_000.5) == pytest.approx(0.01)
    assert lease.usd(1_000_060.0) == pytest.approx(0.01)
    assert lease.usd(1_000_060.1) == pytest.approx(0.02)
    assert lease.usd(900_000.0) == 0
    assert lease.usd() > 1000


def test_a_marker_is_one_lease_and_ends_once() -> None:
    """Opened or closed twice, the first counts: a step that is repeated after a crash changes no cost."""
    ledger.open_lease(FIRST)
    ledger.open_lease(replace(FIRST, price_usd_per_hour=9.0, opened_at=5.0))
    ledger.close_lease("gpu-1", 1_000_060.0)
    ledger.close_lease("gpu-1", 2_000_000.0)
    assert ledger.leases() == [replace(FIRST, closed_at=1_000_060.0)]
    assert len(ledger.path().read_bytes().splitlines()) == 2


def test_an_end_of_nothing_is_nothing() -> None:
    """The end of a marker that was never opened makes no lease, and does not close one of a like name."""
    ledger.close_lease("gpu", 5.0)
    ledger.open_lease(FIRST)
    assert ledger.leases() == [FIRST]


def test_a_torn_tail_is_set_aside() -> None:
    """A line that a power cut left half written is not read, kept apart, and does not spoil the next one."""
    ledger.open_lease(FIRST)
    whole = ledger.path().read_bytes()
    for size in (1, len(whole) // 2, len(whole) - 1):
        ledger.path().write_bytes(whole + whole.replace(b"gpu-1", b"gpu-2")[:size])
        assert ledger.leases() == [FIRST]
        ledger.open_lease(replace(FIRST, marker="gpu-3"))
        assert [lease.marker for lease in ledger.leases()] == ["gpu-1", "gpu-3"]
        assert ledger.path().with_name("ledger.jsonl.torn").read_bytes()


def test_a_damaged_line_takes_no_other_along() -> None:
    """A line with a wrong checksum, and one that is no JSON, are passed over; the others count."""
    for number in range(3):
        ledger.open_lease(replace(FIRST, marker=f"gpu-{number}"))
    lines = ledger.path().read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"0.6", b"0.1")
    ledger.path().write_bytes(b"".join([b"\xff\x00 no line of ours\n", *lines]))
    assert [lease.marker for lease in ledger.leases()] == ["gpu-0", "gpu-2"]
    ledger.close_lease("gpu-2", 1_000_060.0)
    assert ledger.leases()[1].closed_at == 1_000_060.0


def test_two_processes_lose_nothing_of_each_other() -> None:
    """Two processes that note at the same time both find their lines, and what both note is there once."""
    both = [subprocess.Popen([sys.executable, "-c", _MANY, who]) for who in ("one", "two")]
    assert [process.wait(60) for process in both] == [0, 0]
    found = ledger.leases()
    assert len(found) == 60
    assert {lease.marker for lease in found if lease.closed_at is None} == {f"both-{number}" for number in range(20)}


def test_a_ledger_that_is_held_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be noted is an error, not a cost that is forgotten."""
    ledger.open_lease(FIRST)
    monkeypatch.setattr(ledger, "_LOCK_WAIT_S", 0.05)
    with locks.held(ledger.path().with_suffix(".lock"), 1.0), pytest.raises(ConfigError, match="Nothing was noted"):
        ledger.close_lease("gpu-1", 5.0)
    assert ledger.leases() == [FIRST]


def test_it_is_private() -> None:
    """Nobody else can read what was spent."""
    ledger.open_lease(FIRST)
    assert ledger.path().stat().st_mode & 0o077 == 0


def test_what_was_taken_for_nothing_and_came_late_is_closed_in_the_end() -> None:
    """A request that made nothing, as far as was known, closes no lease: the instance that comes late has its own."""
    ledger.close_lease("gpu-1", 50.0)
    ledger.open_lease(Lease("gpu-1", "box", "lambda", 1.0, 10.0))
    (late,) = ledger.leases()
    assert late.closed_at is None
    ledger.close_lease("gpu-1", 100.0)
    (late,) = ledger.leases()
    assert late.closed_at == 100.0


def lease() -> Lease:
    (found,) = ledger.leases()
    return found


def test_a_price_that_is_told_counts_from_the_request_on() -> None:
    """What the provider says that it costs takes the place of what was offered, for all of its time."""
    ledger.open_lease(FIRST)
    for _ in range(2):
        ledger.change_price("gpu-1", 1.2)
    assert (lease().price_usd_per_hour, lease().price_now) == (1.2, 1.2)
    assert lease().usd(FIRST.opened_at + 3600) == pytest.approx(1.2)
    assert len(ledger.path().read_bytes().splitlines()) == 2, "what is known is not noted again"


def test_a_price_that_changes_counts_from_then_on() -> None:
    """An hour at one price, one at another, and one at the first again cost what each did, to the end of the lease."""
    ledger.open_lease(FIRST)
    ledger.change_price("gpu-1", 0.01, FIRST.opened_at + 3600)
    ledger.change_price("gpu-1", 0.01, FIRST.opened_at + 5000)
    ledger.change_price("gpu-1", 0.6, FIRST.opened_at + 7200)
    assert lease().usd(FIRST.opened_at + 3 * 3600) == pytest.approx(0.6 + 0.01 + 0.6)
    assert lease().usd_within(FIRST.opened_at + 1800, FIRST.opened_at + 5400) == pytest.approx(0.3 + 0.005)
    ledger.close_lease("gpu-1", FIRST.opened_at + 7200)
    assert lease().usd() == pytest.approx(0.6 + 0.01)
    ledger.change_price("gpu-1", 9.0, FIRST.opened_at + 5400)
    assert lease().usd() == pytest.approx(0.6 + 0.01), "what is closed costs what it did"


def test_what_was_noted_too_low_is_noted_anew() -> None:
    """A price from an earlier moment on takes the place of all that was noted after it."""
    ledger.open_lease(FIRST)
    ledger.change_price("gpu-1", 0.01, FIRST.opened_at + 3600)
    ledger.change_price("gpu-1", 0.6, FIRST.opened_at + 3600)
    assert lease().usd(FIRST.opened_at + 7200) == pytest.approx(1.2)
    ledger.change_price("gpu-2", 9.0)
    assert len(ledger.leases()) == 1, "what was never opened has no price"


@given(st.floats(0.0, 1e6))
def test_what_is_shown_is_never_less(usd: float) -> None:
    """An amount for a person is rounded up, by less than a cent, but for what is lost in adding up."""
    shown = float(ledger.shown(usd))
    assert usd - 1e-6 <= shown < usd + 0.01 + 1e-6


def test_a_cent_is_shown_for_less_than_one() -> None:
    """0.004 USD is not nothing, 0.30 is not 0.31, and 0 is 0."""
    assert [ledger.shown(usd) for usd in (0.004, 0.3, 0.1 + 0.2, 0.0, 1.001)] == [
        "0.01",
        "0.30",
        "0.30",
        "0.00",
        "1.01",
    ]
    assert ledger.shown(0.00831, 4) == "0.0084"

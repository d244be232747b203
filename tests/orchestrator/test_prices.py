"""A machine costs what its provider says: from its request on, its disk alone while it is stopped, never too little."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator import clock, inventory, rentals, renting
from orchestrator.providers.base import Instance, Need, Offer
from orchestrator.rentals import Caps, Rental, Terms

OFFER = Offer("vast", "7", "1x RTX 4090", "RTX 4090", 1, 24.0, 8, 32.0, 50.0, "US", 0.3)
SEEN = Instance("a1", "gpu-1", "ready", "running", "root", (), "1x RTX 4090", "US", 0.3)
STOPPED = replace(SEEN, state="stopped", stopped_usd_per_hour=0.004, charged_usd_per_hour=0.004)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    found = [clock.timestamp()]
    monkeypatch.setattr(clock, "timestamp", lambda: found[0])
    return found


def rented(at: float, offer: Offer = OFFER, **changes: Any) -> Rental:
    """A machine that was asked for then, and is ready."""
    rental = rentals.create("box", "vast", Terms(Need(), Caps(12.0, None, 3.0), "container"))
    rental.save(state="launching", marker="gpu-1", offer=vars(offer), asked_at=at, deadline=at + 36_000, **changes)
    rental.exists("a1")
    rental.save(state="ready", ready_at=clock.now())
    return rental


def test_what_its_provider_says_counts_from_the_request_on(now: list[float]) -> None:
    """Dearer than offered, within what is let pass, it is dearer in record, ledger, receipt and status alike."""
    rental = rented(now[0])
    now[0] += 1800
    rental.costs_as(replace(SEEN, price_usd_per_hour=0.306))
    now[0] += 1800
    assert rental.price_usd_per_hour == 0.306
    assert rental.usd() == pytest.approx(0.306)
    assert inventory.documents("box")[0]["price_usd_per_hour"] == 0.306
    assert renting.costs()["total_usd"] == pytest.approx(0.306)
    rental.costs_as(replace(SEEN, price_usd_per_hour=None))
    assert rental.price_usd_per_hour == 0.306, "what is not told is not taken for another price"


def test_a_dearer_machine_ends_before_its_budget_is_spent(now: list[float]) -> None:
    """Three dollars buy ten hours at 0.30 USD, and five at twice that: the deadline comes nearer, and never goes."""
    rental = rented(now[0])
    rental.costs_as(SEEN)
    assert rental.record.deadline == now[0] + 36_000
    rental.costs_as(replace(SEEN, price_usd_per_hour=0.6))
    assert rental.record.deadline == now[0] + 18_000
    rental.costs_as(SEEN)
    assert rental.record.deadline == now[0] + 18_000


def test_a_later_price_counts_from_when_it_was_told(now: list[float]) -> None:
    """A host that asks for more after a while has not cost that before."""
    rental = rented(now[0])
    rental.costs_as(SEEN)
    now[0] += 3600
    rental.costs_as(replace(SEEN, price_usd_per_hour=0.6))
    now[0] += 3600
    assert rental.usd() == pytest.approx(0.9)


def test_while_it_is_stopped_its_disk_costs(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """From when it was seen stopped; status and cost say so, with a price that is not nothing; started, all of it."""
    rental = rented(now[0])
    rental.costs_as(SEEN)
    now[0] += 3600
    rental.costs_as(STOPPED)
    rental.save(state="stopped")
    now[0] += 36_000
    rental.costs_as(STOPPED)
    assert rental.usd() == pytest.approx(0.3 + 0.04)
    (entry,) = inventory.documents("box")
    assert (entry["price_usd_per_hour"], entry["price_now_usd_per_hour"]) == (0.3, 0.004)
    (said,) = [line for line in inventory.warnings() if "is stopped" in line]
    assert "GOES ON COSTING 0.0040 USD/h for its disk" in said
    (machine,) = renting.costs()["machines"]
    assert (machine["open"], machine["stopped"], machine["price_now_usd_per_hour"]) == (True, True, 0.004)
    rental.save(state="booting")
    rental.wakes(now[0])
    rental.costs_as(STOPPED)
    now[0] += 3600
    assert rental.usd() == pytest.approx(0.3 + 0.04 + 0.3), "what is said of a start lags behind"


def test_one_that_others_woke_has_cost_its_price_all_the_while(now: list[float]) -> None:
    """When it was started elsewhere is not known here: nothing is told as less than it may have cost."""
    rental = rented(now[0])
    now[0] += 3600
    rental.costs_as(STOPPED)
    rental.save(state="stopped")
    now[0] += 3600
    assert rental.usd() == pytest.approx(0.304)
    rental.costs_as(SEEN)
    assert rental.usd() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("offer", "found"),
    [
        (replace(OFFER, spot=True), STOPPED),
        (OFFER, replace(STOPPED, spot=True)),
        (OFFER, replace(STOPPED, charged_usd_per_hour=0.3)),
        (OFFER, replace(STOPPED, charged_usd_per_hour=None)),
    ],
    ids=["bid for", "is a spot machine", "charged as before", "charge not told"],
)
def test_what_may_be_charged_in_full_is_counted_in_full(now: list[float], offer: Offer, found: Instance) -> None:
    """A spot machine wakes by itself, and a container that ended may be charged on: neither counts as its disk."""
    rental = rented(now[0], offer)
    rental.costs_as(found)
    now[0] += 3600
    assert rental.usd() == pytest.approx(0.3)

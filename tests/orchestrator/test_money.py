"""What may be spent: budgets in whole minutes, the limits of the config file, and this month's total."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import clock, keys, ledger, money, rentals
from orchestrator.errors import ConfigError, UsageError
from orchestrator.ledger import Lease
from orchestrator.providers.base import Need, Offer
from orchestrator.providers.lambda_cloud import LambdaCloud
from orchestrator.rentals import Caps, Terms

PRICES = st.integers(1, 5000).map(lambda cents: cents / 100)
BUDGETS = st.floats(0.001, 10_000, allow_nan=False)
ACCOUNT = LambdaCloud("secret_0123456789")
"""Billed afterwards; a machine of it boots in five minutes."""
OFFER = Offer("lambda", "x@r", "x", "A10", 1, 24.0, 1, 1.0, 1.0, "r", price_usd_per_hour=0.75)


def allow(**limits: object) -> None:
    keys.user_config().write_text(json.dumps({"limits": limits}))


@given(BUDGETS, PRICES)
def test_a_budget_is_never_exceeded(budget: float, price: float) -> None:
    """What a machine costs until its deadline, by the ledger's own rounding, is within its budget, by a cent-hour."""
    most = money.at_most(price, Caps(None, None, budget))
    assert most is not None
    assert most <= budget * (1 + 1e-9)
    assert budget - most < price / 60 + 1e-6, "and no whole minute of it is given away"


@given(st.floats(0, 1000), PRICES)
def test_the_ledger_never_rounds_down(hours: float, price: float) -> None:
    """A cost is at least that of the time, and less than a minute more."""
    cost = ledger.usd(hours, price)
    assert hours * price - 1e-6 <= cost <= hours * price + price / 60 + 1e-6


@given(st.one_of(st.none(), st.floats(0.01, 100)), st.one_of(st.none(), BUDGETS), PRICES)
def test_the_first_cap_that_is_reached_counts(max_hours: float | None, budget: float | None, price: float) -> None:
    """The deadline is the earlier of the hours and the budget; without either there is none."""
    hours = Caps(max_hours, None, budget).hours(price)
    if max_hours is None and budget is None:
        assert hours is None
        return
    bounds = [bound for bound in (max_hours, budget / price if budget is not None else None) if bound is not None]
    assert hours is not None
    assert hours <= min(bounds) * (1 + 1e-9)
    assert hours >= min(bounds) - 1 / 60 - 1e-9


def test_a_budget_below_the_boot_is_refused() -> None:
    """A budget that is gone before the machine is up buys nothing; one that is a little more is allowed."""
    with pytest.raises(UsageError, match=r"buys 4 minutes of x at 0\.75 USD/h"):
        money.check(OFFER, Caps(12.0, 30.0, 0.06), ACCOUNT)
    money.check(OFFER, Caps(12.0, 30.0, 0.0625), ACCOUNT)


@pytest.mark.parametrize(
    ("limits", "caps", "words"),
    [
        ({"usd_per_hour": 0.74}, Caps(), "x costs 0.75 USD/h; `limits.usd_per_hour` allows 0.74"),
        ({"usd_per_machine": 8.99}, Caps(), "could cost up to 9.00 USD"),
        ({"usd_per_machine": 1000}, Caps(None, None, None), "could cost without end"),
        ({"usd_per_month": 8.99}, Caps(), "0.00 USD are spent this month"),
        ({"usd_per_month": 1000}, Caps(None, None, None), "could cost without end"),
        ({"usd_per_hour": 0}, Caps(), "usd_per_hour` allows 0.00"),
    ],
)
def test_a_limit_holds(limits: dict[str, float], caps: Caps, words: str) -> None:
    """Each limit refuses what is above it, and what has no end; the error names the limit."""
    allow(**limits)
    with pytest.raises(ConfigError) as caught:
        money.check(OFFER, caps, ACCOUNT)
    assert words in caught.value.message
    assert "Nothing was rented" in caught.value.message


def test_what_is_within_every_limit_may_be_rented() -> None:
    """A launch at exactly its limits is allowed, and one without a config file."""
    money.check(OFFER, Caps(None, None, None), ACCOUNT)
    allow(usd_per_hour=0.75, usd_per_machine=9.0, usd_per_month=9.0)
    money.check(OFFER, Caps(), ACCOUNT)
    allow(usd_per_hour=0.75, usd_per_machine=1.0)
    money.check(OFFER, Caps(12.0, 30.0, 1.0), ACCOUNT)


@pytest.mark.parametrize(
    "text",
    [
        '{"limits": {"usd_per_moth": 5}}',
        '{"limits": {"usd_per_month": "5"}}',
        '{"limits": {"usd_per_month": true}}',
        '{"limits": {"usd_per_month": -1}}',
        '{"limits": {"usd_per_month": NaN}}',
        '{"limits": {"usd_per_month": null}}',
        '{"limits": 5}',
        '{"limits": null}',
        "null",
        "[]",
        "{",
        "",
        "[" * 100_000,
    ],
)
def test_no_limit_is_passed_over_in_silence(text: str) -> None:
    """A config file whose limits cannot be read refuses a launch, and is named."""
    keys.user_config().write_text(text)
    with pytest.raises(ConfigError) as caught:
        money.check(OFFER, Caps(), ACCOUNT)
    assert str(keys.user_config()) in caught.value.message


def test_what_is_rented_already_counts_to_its_deadline() -> None:
    """A month's limit sees what open machines may still cost; one without a deadline leaves room for no other."""
    allow(usd_per_month=20.0)
    open_one = rentals.create("box", "lambda", Terms(Need(), Caps(), "laptop"))
    facts = {"offer": asdict(OFFER), "asked_at": clock.timestamp()}
    for state in ("launching", "booting", "ready", "stopping"):
        open_one.save(state=state, deadline=clock.timestamp() + 14.6 * 3600, **facts)
        money.check(OFFER, Caps(), ACCOUNT)  # 10.95 and 9.00
        open_one.save(deadline=clock.timestamp() + 14.7 * 3600)
        with pytest.raises(ConfigError, match=r"up to 11\.0\d by what is rented already"):
            money.check(OFFER, Caps(), ACCOUNT)
    open_one.save(deadline=None)
    with pytest.raises(ConfigError, match="without end by what is rented already"):
        money.check(OFFER, Caps(), ACCOUNT)
    open_one.save(state="gone")
    money.check(OFFER, Caps(), ACCOUNT)


def test_only_this_month_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was spent before the first of the month is past; what is open costs until now; a limit sees all of it."""
    now = clock.parse("2027-03-02T00:00:00Z").timestamp()
    monkeypatch.setattr(clock, "timestamp", lambda: now)
    monkeypatch.setattr(clock, "now", lambda: "2027-03-02T00:00:00.000Z")
    day = 86_400.0
    for marker, opened, closed in [("a", 40, 30), ("b", 3, 0.5), ("c", 0.5, None)]:
        ledger.open_lease(Lease(marker, marker, "lambda", 1.0, now - opened * day))
        if closed is not None:
            ledger.close_lease(marker, now - closed * day)
    assert math.isclose(money.this_month(), 12 + 12, rel_tol=1e-9)
    allow(usd_per_month=32.9)
    with pytest.raises(ConfigError, match=r"24\.00 USD are spent this month"):
        money.check(OFFER, Caps(), ACCOUNT)
    allow(usd_per_month=33.1)
    money.check(OFFER, Caps(), ACCOUNT)

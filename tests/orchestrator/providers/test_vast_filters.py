"""Filters of Vast.ai's market: what can be said, what is overridden by it, and what makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.providers.base import Need
from orchestrator.providers.vast import VastCloud
from orchestrator.providers.vast_filters import DISK_GB, FILTERS, Wishes, overridden, wishes
from tests.orchestrator.providers.loopback import Server
from worker import interpreters


def test_the_defaults() -> None:
    """Unsaid, a machine is checked, reliable, reached directly, on a quick line, and runs what our PyTorch needs."""
    floors = {"reliability": 0.98, "inet_down": 200.0, "cuda_max_good": 13.0, "direct_port_count": 1.0}
    assert wishes(Need()) == Wishes(True, "amd64", {**floors, "disk_space": 50.0}, DISK_GB, None)
    assert wishes(Need(hours=30.0)).floors["duration"] == 108000
    assert wishes(Need(hours=30.0, filters={"duration": "2"})).floors["duration"] == 7200
    assert overridden(Need(hours=30.0, disk_gb=100)) == []


def test_the_cuda_version_is_the_one_of_our_locks() -> None:
    """A driver must run at least the CUDA version that an environment's PyTorch is built for."""
    assert float(FILTERS["cuda"].default) == float(".".join(map(str, interpreters._DEFAULT_CUDA)))
    locks = Path(interpreters.__file__).parent / "locks"
    assert {
        line for path in locks.glob("*.txt") for line in path.read_text().split() if line.startswith("torch==")
    } == {
        "torch==2.13.0"  # another one may need another CUDA: then the default above moves with it
    }


@pytest.mark.parametrize("name", FILTERS)
def test_a_default_said_aloud_overrides_nothing(name: str) -> None:
    """To say what is so anyway changes nothing; to say something else is told in words, with what is usual."""
    default = FILTERS[name].default
    if default:
        assert wishes(Need(filters={name: f" {default} "})) == wishes(Need())
        assert overridden(Need(filters={name: default})) == []
    other = {"image": "a/b:c", "arch": "arm64", "disk": "80", "direct_ports": "3"}.get(name, "any")
    (words,) = overridden(Need(hours=5.0, filters={name: other}))
    assert words.startswith(f"{name}={other} (")
    assert FILTERS[name].says in words
    assert default in words


def test_two_filters_are_told_both() -> None:
    """Each default that is not kept is named, in the order in which it was typed."""
    need = Need(filters={"verified": "ANY", "cuda": "12.4", "reliability": "0.98"})
    assert [words.partition("=")[0] for words in overridden(need)] == ["verified", "cuda"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("verifed", "verified"), ("CUDA", "cuda"), ("inet-down", "inet_down"), ("colour", None), ("", None)],
)
def test_a_filter_that_is_not_known(vast: VastCloud, server: Server, name: str, near: str | None) -> None:
    """A typo is answered with the nearest name and with all there are, and nothing is asked."""
    for ask in (vast.offers, overridden):
        with pytest.raises(UsageError) as caught:
            ask(Need(filters={name: "1"}))
        assert ("Did you mean" in caught.value.message) == (near is not None)
        assert f"Did you mean {near}?" in caught.value.message or near is None
        assert all(known in caught.value.hint for known in FILTERS)
    assert server.asked == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("verified", "no"),
        ("verified", ""),
        ("verified", "0"),
        ("reliability", "98"),
        ("reliability", "-0.1"),
        ("reliability", "high"),
        ("reliability", "nan"),
        ("reliability", ""),
        ("inet_down", "inf"),
        ("inet_down", "200Mbps"),
        ("cuda", "twelve"),
        ("direct_ports", "-1"),
        ("arch", "x86_64"),
        ("duration", "-2"),
        ("duration", "1 day"),
        ("disk", "7"),
        ("disk", "any"),
        ("disk", "50GB"),
    ],
)
def test_a_value_that_makes_no_sense(name: str, text: str) -> None:
    """A value that is none is named with its filter and what it may be."""
    with pytest.raises(UsageError) as caught:
        wishes(Need(filters={name: text}))
    assert name in caught.value.message
    assert repr(text) in caught.value.message
    assert "Nothing was rented" in caught.value.message


@pytest.mark.parametrize(
    ("disk_gb", "typed", "becomes"),
    [(None, None, 50), (8.0, None, 8), (8.1, None, 9), (None, "80", 80), (80.0, "80", 80), (1000.0, None, 1000)],
)
def test_the_disk(disk_gb: float | None, typed: str | None, becomes: int) -> None:
    """A disk is as large as was said, in whole GB, rounded up; unsaid, 50 GB."""
    found = wishes(Need(disk_gb=disk_gb, filters={"disk": typed} if typed else {}))
    assert (found.disk_gb, found.floors["disk_space"]) == (becomes, becomes)


@pytest.mark.parametrize("need", [Need(disk_gb=7.9), Need(disk_gb=0.1), Need(disk_gb=1e9), Need(disk_gb=float("inf"))])
def test_a_disk_that_is_not_rented_out(need: Need) -> None:
    """One below the minimum, or beyond reason, is named."""
    with pytest.raises(UsageError, match="8 to 100000 GB"):
        wishes(need)
    with pytest.raises(UsageError, match="Two sizes"):
        wishes(Need(disk_gb=60, filters={"disk": "80"}))


@pytest.mark.parametrize("bid", [0.0005, 128.5, float("inf"), float("nan")])
def test_a_bid_that_is_none(bid: float) -> None:
    """A bid outside what the API takes is told before anything is asked."""
    with pytest.raises(UsageError, match="takes bids from"):
        wishes(Need(spot=True, bid_usd_per_hour=bid))


@given(st.dictionaries(st.sampled_from(sorted(FILTERS)) | st.text(max_size=8), st.text(max_size=8), max_size=4))
def test_filters_are_taken_or_refused(filters: dict[str, Any]) -> None:
    """Whatever is typed, it is taken whole, or refused as a wrong usage."""
    need = Need(filters=filters)
    try:
        found = wishes(need)
    except UsageError:
        return
    assert set(filters) <= set(FILTERS)
    assert found.disk_gb >= 8
    assert len(overridden(need)) <= len(filters)

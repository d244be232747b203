"""What a machine of Vast.ai costs, its disk included, and what is bid for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import NoCapacity
from orchestrator.providers.base import Need
from orchestrator.providers.vast import VastCloud
from tests.orchestrator.providers.loopback import Server
from tests.orchestrator.providers.playing_vast import DISK_USD, entry, found, market


def test_the_price_has_the_disk_in_it_whatever_is_told() -> None:
    """Of what the market says and what its parts add up to, the higher counts; the disk is the one asked for."""
    by_parts = 0.30 + 0.15 * 200 / 720
    need = Need(disk_gb=200)
    assert found(need, entry())[0].price_usd_per_hour == pytest.approx(by_parts, abs=1e-6)
    assert found(need, entry(dph_total=0.9))[0].price_usd_per_hour == 0.9
    assert found(need, entry(dph_total=None))[0].price_usd_per_hour == pytest.approx(by_parts, abs=1e-6)
    assert found(need, entry(dph_base=None))[0].price_usd_per_hour == pytest.approx(0.3104)
    told = entry(storage_cost=None, storage_total_cost=0.05, dph_total=None)
    assert found(need, told)[0].price_usd_per_hour == pytest.approx(0.35)
    assert found(need, entry())[0].disk_gb == 200


@given(st.floats(0.001, 50.0), st.floats(0.0, 5.0), st.integers(8, 500))
def test_nothing_costs_more_than_it_is_offered_at(base_usd: float, gb_usd: float, disk_gb: int) -> None:
    """A price, with its disk or of the disk alone, is rounded up to a millionth, at a fixed price and for a bid."""
    told = entry(dph_base=base_usd, dph_total=None, storage_cost=gb_usd, min_bid=base_usd / 2)
    disk_usd = gb_usd * disk_gb / 720
    (offer,) = found(Need(disk_gb=disk_gb), told)
    assert base_usd + disk_usd - 1e-9 <= offer.price_usd_per_hour <= base_usd + disk_usd + 2.1e-6
    assert offer.stopped_usd_per_hour is not None
    assert disk_usd - 1e-9 <= offer.stopped_usd_per_hour <= disk_usd + 1.1e-6
    (bid,) = found(Need(disk_gb=disk_gb, spot=True), told)
    assert bid.bid_usd_per_hour is not None
    assert bid.price_usd_per_hour >= bid.bid_usd_per_hour + disk_usd - 1e-9


def test_a_spot_machine_costs_its_bid_and_its_disk(vast: VastCloud, server: Server) -> None:
    """Without a bid it is a little more than the lowest that is taken, to a cent; with one, that; the disk on top."""
    market(server, entry())
    (offer,) = vast.offers(Need(spot=True))
    assert server.asked[0].body["type"] == "bid"
    assert (offer.spot, offer.bid_usd_per_hour) == (True, 0.16)
    assert offer.price_usd_per_hour == pytest.approx(0.16 + DISK_USD, abs=1e-6)
    (offer,) = vast.offers(Need(spot=True, bid_usd_per_hour=0.2, max_price_usd_per_hour=0.25))
    assert "dph_total" not in server.asked[1].body
    assert (offer.bid_usd_per_hour, offer.price_usd_per_hour) == (0.2, pytest.approx(0.2 + DISK_USD, abs=1e-6))
    assert found(Need(spot=True), entry(min_bid=None)) == []
    assert found(Need(spot=True), entry(storage_cost=None, storage_total_cost=None)) == []
    assert found(Need(bid_usd_per_hour=0.2), entry())[0].bid_usd_per_hour is None


@pytest.mark.parametrize(
    ("least", "bid"), [(0.15, 0.16), (0.1, 0.11), (0.2, 0.21), (0.0, 0.01), (0.001, 0.01), (1.0, 1.05), (0.3333, 0.35)]
)
def test_a_bid_is_rounded_up_to_a_cent(least: float, bid: float) -> None:
    """Five percent more than what is taken, and never less by rounding."""
    assert found(Need(spot=True), entry(min_bid=least))[0].bid_usd_per_hour == bid


@given(st.floats(0, 100))
def test_no_bid_is_below_what_is_taken(least: float) -> None:
    """Whatever the lowest bid is, ours is at least 5 % more and at most a cent above that."""
    (offer,) = found(Need(spot=True), entry(min_bid=least))
    assert offer.bid_usd_per_hour is not None
    assert least * 1.05 - 1e-6 <= offer.bid_usd_per_hour <= max(least * 1.05, 0.01) + 0.01 + 1e-6


def test_a_bid_below_all_that_is_taken_is_told_so(vast: VastCloud, server: Server) -> None:
    """Machines that take no bid so low are passed over; when none is left because of that, the lowest is named."""
    market(server, entry(id=1, min_bid=0.3), entry(id=2, min_bid=0.21), entry(id=3, min_bid=0.1))
    assert [offer.offer_id for offer in vast.offers(Need(spot=True, bid_usd_per_hour=0.25))] == ["2", "3"]
    with pytest.raises(NoCapacity, match=r"0\.100 USD/h; 0\.05 was bid. Nothing was rented"):
        vast.offers(Need(spot=True, bid_usd_per_hour=0.05))
    market(server)
    assert vast.offers(Need(spot=True, bid_usd_per_hour=0.05)) == []

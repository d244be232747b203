"""Searching Vast.ai's market: what is asked, what is checked again here, and what a machine costs with its disk."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator import offers as wanted
from orchestrator.errors import ConfigError, NoCapacity, ProviderDown, UsageError
from orchestrator.providers import vast_search
from orchestrator.providers.base import Need, Offer
from orchestrator.providers.vast import VastCloud
from tests.orchestrator.providers.loopback import Asked, Scripted, Server
from tests.orchestrator.providers.playing_vast import DISK_USD, ENTRY, complaint, entry, found, market
from tests.orchestrator.providers.test_lambda_answers import JSON


def test_what_is_asked_for_when_nothing_is_said(vast: VastCloud, server: Server) -> None:
    """The defaults that protect are all asked for, with the disk in the price, cheapest first."""
    market(server, entry())
    assert [offer.offer_id for offer in vast.offers(Need())] == ["7654321"]
    assert server.paths() == ["POST /api/v0/bundles/"]
    assert server.asked[0].body == {
        "verified": {"eq": True},
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "reliability": {"gte": 0.98},
        "direct_port_count": {"gte": 1.0},
        "inet_down": {"gte": 200.0},
        "cuda_max_good": {"gte": 13.0},
        "cpu_arch": {"eq": "amd64"},
        "disk_space": {"gte": 50.0},
        "num_gpus": {"eq": 1},
        "order": [["dph_total", "asc"]],
        "type": "on-demand",
        "limit": 64,
        "allocated_storage": 50.0,
    }


def test_what_is_asked_for_when_much_is_said(vast: VastCloud, server: Server) -> None:
    """Every wish is in the question, in the market's words and units."""
    market(server)
    need = Need(
        gpu="A100 80GB",
        count=4,
        min_vram_gb=40.0,
        max_price_usd_per_hour=9.5,
        region="us-California",
        disk_gb=99.5,
        hours=48.0,
        filters={"verified": "any", "reliability": "0.9", "inet_down": "any", "cuda": "12.6", "arch": "any"},
    )
    assert vast.offers(need) == []
    assert server.asked[0].body == {
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "reliability": {"gte": 0.9},
        "direct_port_count": {"gte": 1.0},
        "cuda_max_good": {"gte": 12.6},
        "duration": {"gte": 172800.0},
        "disk_space": {"gte": 100.0},
        "gpu_name": {"in": ["A100 PCIE", "A100 SXM4"]},
        "num_gpus": {"eq": 4},
        "gpu_ram": {"gte": 77600},
        "geolocation": {"in": ["US"]},
        "order": [["dph_total", "asc"]],
        "type": "on-demand",
        "limit": 64,
        "allocated_storage": 100.0,
    }


@pytest.mark.parametrize(
    ("need", "names"),
    [
        (Need(gpu="RTX_4090"), {"eq": "RTX 4090"}),
        (Need(gpu="rtx4090"), {"eq": "RTX 4090"}),
        (Need(gpu="4090"), {"eq": "RTX 4090"}),
        (Need(gpu="h100"), {"in": ["H100 NVL", "H100 PCIE", "H100 SXM"]}),
        (Need(gpu="RTX 6000 Ada"), {"eq": "RTX 6000Ada"}),
        (Need(gpu="v100"), {"eq": "Tesla V100"}),
        (Need(gpu="80GB"), None),
        (Need(type_name="2x RTX 4090"), {"eq": "RTX 4090"}),
        (Need(type_name="1x RTX 3060 laptop"), {"in": ["RTX 3060 laptop", "RTX 3060 LAPTOP", "Rtx 3060 Laptop"]}),
        (Need(gpu="z_9000"), {"in": ["z 9000", "Z 9000"]}),
        (Need(), None),
    ],
)
def test_gpus_are_asked_for_as_the_market_spells_them(need: Need, names: Any) -> None:
    """A typed name with underscores, in any case, is asked for with the market's own name or names."""
    search = vast_search.search(need)
    assert search is not None
    assert search.body(None).get("gpu_name") == names
    if need.type_name:
        assert search.body(None)["num_gpus"] == {"eq": int(need.type_name[0])}


@pytest.mark.parametrize(
    "need", [Need(type_name="gpu_1x_a100_sxm4"), Need(count=0), Need(gpu=""), Need(gpu="???"), Need(type_name="0x A10")]
)
def test_what_the_market_cannot_mean_is_not_asked(vast: VastCloud, server: Server, need: Need) -> None:
    """Another cloud's type, a machine without GPU, and no name at all cost no search."""
    assert vast.offers(need) == []
    assert server.asked == []


def test_an_offer_has_all_that_is_known() -> None:
    """A machine's share of its host, its place in one word, its price with the disk asked for."""
    (offer,) = found(Need(gpu="rtx_4090"), entry())
    assert offer == Offer(
        provider="vast",
        offer_id="7654321",
        type_name="1x RTX 4090",
        gpu="RTX 4090",
        count=1,
        vram_gb=24.0,
        vcpus=16,
        ram_gb=64.2,
        disk_gb=50.0,
        region="US-California",
        price_usd_per_hour=pytest.approx(0.3104, abs=1e-4),
        reliability=0.998,
        machine_id="88888",
        stopped_usd_per_hour=pytest.approx(DISK_USD, abs=1e-6),
    )
    bare = dict.fromkeys(("gpu_ram", "cpu_ram", "gpu_frac", "cpu_cores_effective", "geolocation", "machine_id"))
    (offer,) = found(Need(), entry(**bare))
    unknown = (offer.vram_gb, offer.ram_gb, offer.vcpus, offer.region, offer.machine_id)
    assert unknown == (None,) * 5


@pytest.mark.parametrize(
    "change",
    [
        {"verification": "unverified"},
        {"verification": "deverified"},
        {"verification": None},
        {"reliability": 0.97, "reliability2": 0.999},
        {"reliability": None, "reliability2": None},
        {"direct_port_count": 0},
        {"direct_port_count": None},
        {"inet_down": 199.9},
        {"inet_down": None},
        {"cuda_max_good": 12.8},
        {"cuda_max_good": None},
        {"cpu_arch": "arm64"},
        {"cpu_arch": None},
        {"disk_space": 49.9},
        {"disk_space": None},
        {"num_gpus": 2},
        {"num_gpus": None},
        {"gpu_arch": "amd"},
        {"rentable": False},
        {"rented": True},
        {"external": True},
        {"duration": 71 * 3600.0},
        {"duration": None},
        {"id": None},
        {"id": "../1"},
        {"gpu_name": None},
        {"gpu_name": ""},
        {"dph_total": None, "dph_base": None},
        {"dph_total": -1, "dph_base": None},
        {"dph_total": "0.3", "dph_base": None},
        {"dph_total": 0, "dph_base": 0, "storage_cost": 0},
        {"dph_total": math.inf, "dph_base": None},
    ],
    ids=str,
)
def test_every_field_is_checked_again(change: dict[str, Any]) -> None:
    """A market that does not keep to what was asked sells nothing: what is wrong, or not told, is passed over."""
    need = Need(hours=72.0)
    assert len(found(need, entry())) == 1
    assert found(need, entry(**change)) == []


def test_reliability_may_have_its_other_name() -> None:
    """Where the one field is missing the other counts."""
    assert found(Need(), entry(reliability=None, reliability2=0.99))[0].reliability == 0.99


@pytest.mark.parametrize(
    ("name", "text", "change"),
    [
        ("verified", "any", {"verification": "unverified"}),
        ("reliability", "0.5", {"reliability": 0.6}),
        ("reliability", "any", {"reliability": None, "reliability2": None}),
        ("inet_down", "10", {"inet_down": 20}),
        ("cuda", "12.4", {"cuda_max_good": 12.4}),
        ("direct_ports", "0", {"direct_port_count": 0}),
        ("arch", "arm64", {"cpu_arch": "arm64"}),
        ("arch", "any", {"cpu_arch": None}),
        ("duration", "1", {"duration": 4000}),
        ("duration", "any", {"duration": None}),
    ],
)
def test_every_default_can_be_overridden(name: str, text: str, change: dict[str, Any]) -> None:
    """A filter lifts or moves its own default, for the question and for the check, and no other."""
    need = Need(hours=72.0, filters={name: text})
    (offer,) = found(need, entry(**change))
    assert found(Need(hours=72.0), entry(**change)) == []
    assert found(need, entry(**change, num_gpus=3)) == []
    assert offer.architecture == ("aarch64" if change.get("cpu_arch") == "arm64" else "x86_64")


def test_pages_go_on_from_the_price_where_the_last_one_ended(vast: VastCloud, server: Server) -> None:
    """More than 64 offers come in pages by price, none twice and none left out, even where many cost the same."""
    prices = [0.31, *[0.4] * 40, *[0.5 + step / 1000 for step in range(120)]]
    market(server, *(entry(id=1000 + at, dph_total=price) for at, price in enumerate(prices)))
    offers = vast.offers(Need())
    assert sorted(int(offer.offer_id) for offer in offers) == list(range(1000, 1000 + len(prices)))
    floors = [asked.body.get("dph_total", {}).get("gte") for asked in server.asked]
    assert floors[0] is None
    assert floors[1:] == sorted(floors[1:])
    assert [offer.price_usd_per_hour for offer in offers] == sorted(offer.price_usd_per_hour for offer in offers)


def test_more_than_a_page_at_one_price_are_all_seen(vast: VastCloud, server: Server) -> None:
    """150 offers at one price, after cheaper ones and before dearer ones, are all there, and each once."""
    prices = [0.31, *[0.4] * 150, 0.5, 0.6]
    market(server, *(entry(id=1000 + at, dph_total=price) for at, price in enumerate(prices)))
    offers = vast.offers(Need())
    assert [int(offer.offer_id) for offer in offers] == list(range(1000, 1000 + len(prices)))
    assert len(server.asked) == 4


def test_pages_end(vast: VastCloud, server: Server) -> None:
    """However many offers there are, and however the market repeats itself, a search is five pages at most."""
    market(server, *(entry(id=1 + at, dph_total=0.4) for at in range(400)))
    assert len(vast.offers(Need())) == 64 * 4, "the second page told that there are more at that price"
    assert len(server.asked) == 5
    server.asked.clear()
    server.usual = lambda _: Scripted(200, {"offers": [entry(id=1 + at) for at in range(64)]})
    assert len(vast.offers(Need())) == 64
    assert len(server.asked) == 5
    server.usual = lambda _: Scripted(200, {"offers": [None] * 64})
    assert vast.offers(Need()) == []


def test_searches_keep_to_the_markets_pace(vast: VastCloud, server: Server) -> None:
    """However often offers are looked up, no minute sees more than ten searches; a few come at once."""
    market(server, entry())
    for _ in range(25):
        vast.offers(Need())
    moments = [asked.at for asked in server.asked]
    assert moments[8] - moments[0] < 5
    assert all(later - earlier >= 60 for earlier, later in zip(moments, moments[10:], strict=False))


@pytest.mark.parametrize(
    ("need", "becomes", "words"),
    [
        (Need(gpu="RTX 4O90"), UsageError, "Did you mean RTX 4090"),
        (Need(gpu="B200"), NoCapacity, "No B200 is offered just now"),
        (Need(type_name="8x RTX 4090"), NoCapacity, "No 8x RTX 4090 is offered just now"),
        (Need(count=16), NoCapacity, "--count 16"),
        (Need(min_vram_gb=500), NoCapacity, "--min-vram 500"),
        (Need(region="JP"), NoCapacity, "region 'JP'"),
        (Need(max_price_usd_per_hour=0.1), NoCapacity, "--max-price 0.1"),
        (Need(gpu="B200", spot=True, bid_usd_per_hour=0.01), NoCapacity, "No B200"),
    ],
)
def test_why_nothing_fits_can_be_said(
    vast: VastCloud, server: Server, need: Need, becomes: type[Exception], words: str
) -> None:
    """When nothing is as asked, what there is comes instead, by one more search, and shows which wish excludes all."""

    def answer(asked: Asked) -> Scripted:
        is_narrow = {"gpu_name", "gpu_ram", "geolocation"} & set(asked.body) or asked.body.get("num_gpus") == {"eq": 16}
        return Scripted(200, {"offers": [] if is_narrow else [entry()]})

    server.usual = answer
    listed = vast.offers(need)
    assert len(server.asked) == (1 if need.max_price_usd_per_hour else 2)
    with pytest.raises(becomes, match=words):
        wanted.suitable(listed, need)


def test_a_market_that_passes_over_the_question(vast: VastCloud, server: Server) -> None:
    """Other GPUs, and smaller ones, than were asked for are not offered."""
    market(server, entry(gpu_name="RTX 5090", id=1), entry(id=2, gpu_ram=8192), entry(id=3), entry(id=4, gpu_ram=None))
    assert [offer.offer_id for offer in vast.offers(Need(gpu="4090", min_vram_gb=20))] == ["3"]
    assert [offer.offer_id for offer in vast.offers(Need(gpu="4090 24GB"))] == ["3"]
    assert {offer.offer_id for offer in vast.offers(Need(type_name="1x RTX 4090"))} == {"2", "3", "4"}


def test_what_is_too_dear_is_not_paged_through(vast: VastCloud, server: Server) -> None:
    """Pages come cheapest first: once one is dearer than may be paid, no other is asked for."""
    market(server, *(entry(id=1 + at, dph_total=0.31 + at / 100) for at in range(200)))
    assert len(vast.offers(Need(max_price_usd_per_hour=0.5))) == 64
    assert len(server.asked) == 1
    vast.offers(Need(max_price_usd_per_hour=1.0))
    assert len(server.asked) == 3


def test_an_answer_that_is_no_list(vast: VastCloud, server: Server) -> None:
    """Something else than a list is not read as a market without machines."""
    document: Any
    for document in (None, {}, "x", 5, {"id": 1}):
        server.usual = lambda _, document=document: Scripted(200, {"offers": document})
        with pytest.raises(ProviderDown, match="no list"):
            vast.offers(Need())


def test_an_image_that_was_typed_is_looked_at_first(vast: VastCloud, server: Server) -> None:
    """An image that does not exist is told before there is any offer, and nothing is searched."""
    server.usual = lambda asked: Scripted(404, b"") if asked.method == "HEAD" else Scripted(500, complaint("x"))
    with pytest.raises(ConfigError, match="nobody/nothing:v1 does not exist"):
        vast.offers(Need(filters={"image": "nobody/nothing:v1"}))
    assert [asked.method for asked in server.asked] == ["HEAD"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.dictionaries(st.sampled_from(sorted(ENTRY)), JSON, max_size=8) | JSON, max_size=4),
    st.sampled_from([Need(), Need(spot=True), Need(spot=True, bid_usd_per_hour=0.2), Need(hours=3, count=None)]),
)
def test_nothing_crashes_on_junk(changes: list[Any], need: Need) -> None:
    """Whatever a market says, an offer that comes of it has an id, a GPU, and a price above zero."""
    entries = [
        entry(**change) if isinstance(change, dict) and set(change) <= set(ENTRY) else change for change in changes
    ]
    try:
        offers = found(need, *entries)
    except NoCapacity:
        return
    for offer in offers:
        assert offer.offer_id.isdigit()
        assert offer.gpu
        assert 0 < offer.price_usd_per_hour < math.inf
        assert offer.count > 0
    vast_search.top_usd(entries)

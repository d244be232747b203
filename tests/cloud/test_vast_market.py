"""The market of the stand-in for Vast: what a search finds, what it costs, and who is too late."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from urllib.parse import quote

import pytest

from tests.cloud import Clock, Fault
from tests.cloud.vast_asking import ORDER, QUERY, SAFE, ask, best, end, launch, offers, said
from tests.cloud.vast_catalogue import TRAPS
from tests.cloud.vast_cloud import VastCloud


def test_the_market_is_large_and_always_the_same(vast: VastCloud, clock: Clock) -> None:
    """There are over 90 offers of a dozen kinds of GPUs, the same for everybody, and each has every field."""
    slots = vast.market.slots
    assert len(slots) > 90
    assert len({slot.model.name for slot in slots}) >= 12
    assert len({slot.machine_id for slot in slots}) < len(slots)
    other = VastCloud(clock, seed=5)
    assert [vast.market.row(slot) for slot in slots] == [other.market.row(slot) for slot in other.market.slots]
    assert len({frozenset(offer) for offer in offers(vast)}) == 1


OPERATORS: dict[str, tuple[dict[str, Any], Any]] = {
    "eq": ({"num_gpus": {"eq": 2}}, lambda it: it["num_gpus"] == 2),
    "neq": ({"num_gpus": {"neq": 1}}, lambda it: it["num_gpus"] != 1),
    "gt": ({"gpu_ram": {"gt": 24564}}, lambda it: it["gpu_ram"] > 24564),
    "gte and lte": ({"num_gpus": {"gte": 2, "lte": 4}}, lambda it: 2 <= it["num_gpus"] <= 4),
    "lt": ({"dph_total": {"lt": 0.3}}, lambda it: it["dph_total"] < 0.3),
    "in": ({"gpu_name": {"in": ["H100 SXM", "A100 SXM4"]}}, lambda it: it["gpu_name"] in ("H100 SXM", "A100 SXM4")),
    "notin": ({"gpu_name": {"notin": ["RTX 4090"]}}, lambda it: it["gpu_name"] != "RTX 4090"),
    "text": ({"gpu_ram": {"gte": "80000"}}, lambda it: it["gpu_ram"] >= 80000),
    "country": ({"geolocation": {"in": ["US", "CA"]}}, lambda it: str(it["geolocation"])[-2:] in ("US", "CA")),
    "flag": ({"static_ip": {"eq": True}}, lambda it: it["static_ip"]),
}


@pytest.mark.parametrize("what", OPERATORS)
def test_filters_are_honoured(vast: VastCloud, what: str) -> None:
    """Each operator, alone or two together, numbers as texts, too, finds those it should and no others."""
    query, is_right = OPERATORS[what]
    usual = {"verified": {"eq": True}, "limit": 64}
    found = said(vast, "POST /bundles/", usual | query)["offers"]
    every = [it for it in _all(vast) if is_right(it)]
    assert found
    assert {it["id"] for it in found} <= {it["id"] for it in every}
    assert len(found) == min(64, len(every))


def _all(vast: VastCloud) -> list[dict[str, Any]]:
    """Everything on offer, page by page with a rising floor of the price."""
    found: dict[int, dict[str, Any]] = {}
    floor = 0.0
    while True:
        asked = {"dph_total": {"gte": floor}, "order": [["dph_total", "asc"]], "limit": 64}
        more = said(vast, "POST /bundles/", asked)["offers"]
        found |= {it["id"]: it for it in more}
        if len(more) < 64:
            return list(found.values())
        floor = more[-1]["dph_total"]


def test_sixty_four_offers_are_the_most(vast: VastCloud) -> None:
    """Whatever is asked for, no answer has more than 64; the rest is found from a higher price on."""
    assert len(said(vast, "POST /bundles/", {"limit": 1000})["offers"]) == 64
    assert len(said(vast, "POST /bundles/", {"limit": "3"})["offers"]) == 3
    ids = [it["id"] for it in _all(vast)]
    usual = [slot for slot in vast.market.slots if slot.row["verification"] == "verified" and slot.row["rentable"]]
    assert sorted(ids) == sorted(slot.ask_id for slot in usual)
    assert len(ids) > 64


def test_order_is_kept(vast: VastCloud) -> None:
    """Offers come by score unless another order is asked for; what is null is last."""
    scores = [it["score"] for it in said(vast, "POST /bundles/", {})["offers"]]
    assert scores == sorted(scores, reverse=True)
    asked = {"order": [["num_gpus", "desc"], ["dph_total", "asc"]]}
    found = [(-it["num_gpus"], it["dph_total"]) for it in said(vast, "POST /bundles/", asked)["offers"]]
    assert found == sorted(found)
    last = offers(vast, order=[["inet_down", "asc"]])[-1]
    assert last["inet_down"] is None


def test_prices_have_the_disk_in_them(vast: VastCloud) -> None:
    """`dph_total` is the GPUs and a 720th of the month's storage for each GB asked for; a bid is the least taken."""
    small, large = (offers(vast, allocated_storage=gb) for gb in (8, 400))
    by_id = {it["id"]: it for it in large}
    for one in small:
        for it, disk_gb in ((one, 8), (by_id[one["id"]], 400)):
            assert it["storage_total_cost"] == pytest.approx(it["storage_cost"] * disk_gb / 720)
            assert it["dph_total"] == pytest.approx(it["dph_base"] + it["storage_total_cost"])
            assert it["search"]["totalHour"] == it["dph_total"]
    bids = {it["id"]: it for it in offers(vast, type="bid")}
    for one in small:
        bid = bids[one["id"]]
        assert (bid["is_bid"], one["is_bid"]) == (True, False)
        assert bid["dph_base"] == bid["min_bid"] < one["dph_base"]
    assert [it["id"] for it in small] != [it["id"] for it in large]


def test_filters_that_do_nothing(vast: VastCloud) -> None:
    """A filter nobody knows is passed over, one on `id` matches nothing, one on `ask_contract_id` that offer."""
    everything = offers(vast)
    assert offers(vast, cuda_vers={"gte": 99}, nonsense={"eq": 1}) == everything
    assert offers(vast, id={"eq": everything[0]["id"]}) == []
    assert offers(vast, ask_contract_id={"eq": everything[0]["id"]}) == everything[:1]
    assert offers(vast, gpu_name={"eq": "RTX_4090"}) == []


@pytest.mark.parametrize(
    "query", [{"num_gpus": 1}, {"num_gpus": {"is": 1}}, {"gpu_ram": {"gte": "much"}}, {"type": "spot"}, {"order": "x"}]
)
def test_what_cannot_be_read_is_refused(vast: VastCloud, query: dict[str, Any]) -> None:
    """A filter, a type or an order of another form is 400; so is a body that is no JSON."""
    assert ask(vast, "POST /bundles/", query)[0] == 400
    answer = vast.handle("POST", "/api/v0/bundles/", {}, b"{")
    assert (answer.status, json.loads(answer.body)["msg"]) == (400, "Invalid json body")


def test_a_numeric_filter_may_not_be_honoured(vast: VastCloud) -> None:
    """With the fault, one filter or all numeric ones are passed over; the others hold."""
    vast.faults.add(Fault("filter-ignored", detail="gpu_ram"))
    found = offers(vast, gpu_name={"in": ["RTX 3060", "RTX 4090"]}, gpu_ram={"gte": 20000})
    assert {it["gpu_name"] for it in found} == {"RTX 3060", "RTX 4090"}
    vast.faults.add(Fault("filter-ignored"))
    found = offers(vast, num_gpus={"eq": 1}, dph_total={"lte": 0.2})
    assert {it["gpu_name"] for it in found} == {"RTX 4090"}
    assert max(it["dph_total"] for it in found) > 0.2
    assert {it["num_gpus"] for it in found} > {1}


def test_each_trap_is_the_cheapest_and_caught_by_its_filter(vast: VastCloud) -> None:
    """Without the filters that protect, traps come first; with them none is left but the dear disk."""
    honest = min(it["dph_total"] for it in offers(vast, **SAFE, allocated_storage=40))
    for name in TRAPS:
        slot = vast.market.trap(name)
        row = vast.market.row(slot)
        assert row["dph_base"] < honest, name
        fits = [it["id"] for it in offers(vast, **SAFE, gpu_display_active={"eq": False})]
        assert (slot.ask_id in fits) == (name == "dear-disk"), name
    cheap = vast.market.trap("dear-disk")
    found = {it["id"]: it["dph_total"] for it in offers(vast, allocated_storage=40)}
    assert found[cheap.ask_id] > honest


def test_all_ways_to_search_find_the_same(vast: VastCloud) -> None:
    """POST /bundles/, PUT /search/asks/ and the old GET agree; columns are chosen; no key is needed."""
    wanted = offers(vast)
    assert said(vast, "PUT /search/asks/", {"select_cols": ["*"], "q": QUERY})["offers"] == wanted
    found = said(vast, "PUT /search/asks/", {"select_cols": ["id", "none"], "q": QUERY})["offers"]
    assert found == [{"id": it["id"], "none": None} for it in wanted]
    answer = vast.handle("GET", f"/api/v0/bundles?q={quote(json.dumps(QUERY))}", {})
    assert json.loads(answer.body)["offers"] == wanted


def test_an_offer_is_had_once(vast: VastCloud) -> None:
    """Who takes an offer has it alone; whoever comes later is told that it is gone, as the knob has it."""
    ask_id = best(vast)
    launch(vast, ask_id)
    assert ask_id not in [it["id"] for it in offers(vast)]
    for status, word in ((404, "invalid_args"), (410, "no_such_ask"), (400, "invalid_args")):
        vast.gone_offer_status = status
        found = ask(vast, f"PUT /asks/{ask_id}/", ORDER)
        assert (found[0], found[1]["error"], found[1]["ask_id"]) == (status, word, ask_id)
        assert "no_such_ask" in found[1]["msg"]
        assert "new_contract" not in found[1]
    assert len(vast.ours()) == 1


def test_a_machine_s_other_offers_change(vast: VastCloud, clock: Clock) -> None:
    """When a part of a machine is rented, what is left of it is offered under new ids; later the whole again."""
    whole = Counter(slot.machine_id for slot in vast.market.slots if slot.model.name == "RTX 4090").most_common(1)[0][0]

    def listed() -> dict[int, int]:
        rows = offers(vast, num_gpus={"gte": 1}, machine_id={"eq": whole})
        return {it["num_gpus"]: it["id"] for it in rows}

    before = listed()
    assert set(before) == {1, 2, 4}
    name = launch(vast, before[2])
    assert set(listed()) == {1, 2}
    assert not set(listed().values()) & set(before.values())
    end(vast, name)
    clock.advance(1)
    assert set(listed()) == {1, 2, 4}
    assert not set(listed().values()) & set(before.values())


def test_offers_end(vast: VastCloud, clock: Clock) -> None:
    """What is left of a host's time grows shorter; when it is over the offer is gone."""
    slot = vast.market.trap("short")
    assert [it["duration"] for it in offers(vast, machine_id={"eq": slot.machine_id})] == [5400.0]
    clock.advance(5000)
    (found,) = offers(vast, machine_id={"eq": slot.machine_id})
    assert (found["duration"], found["end_date"]) == (400.0, clock() + 400)
    clock.advance(400)
    assert offers(vast, machine_id={"eq": slot.machine_id}) == []

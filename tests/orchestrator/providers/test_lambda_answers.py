"""What Lambda's documents become, real ones and odd ones."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.providers import lambda_answers
from orchestrator.providers.base import MARKER_TAG
from tests.orchestrator.providers.test_lambda_cloud import INSTANCE, MARKER, spec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
A10: dict[str, Any] = {
    "instance_type": {
        "name": "gpu_1x_a10",
        "description": "1x A10 (24 GB PCIe)",
        "gpu_description": "A10 (24 GB PCIe)",
        "price_cents_per_hour": 75,
        "specs": {"vcpus": 30, "memory_gib": 200, "storage_gib": 1400, "gpus": 1},
    },
    "regions_with_capacity_available": [{"name": "us-east-1"}, {"name": "us-west-1"}],
}


def one(**changes: Any) -> list[Any]:
    """The offers of the A10 with some of its type changed."""
    entry = copy.deepcopy(A10)
    entry["instance_type"] |= changes
    return lambda_answers.offers({"gpu_1x_a10": entry})


def test_an_offer_for_each_region() -> None:
    """A type is one offer in each region that has it, with its price in dollars; one that none has is not available."""
    east, west = one()
    assert (east.offer_id, west.offer_id) == ("gpu_1x_a10@us-east-1", "gpu_1x_a10@us-west-1")
    assert (east.gpu, east.vram_gb, east.count) == ("A10 PCIe", 24.0, 1)
    assert (east.vcpus, east.ram_gb, east.disk_gb, east.price_usd_per_hour) == (30, 200, 1400, 0.75)
    assert (east.provider, east.region, east.available, east.spot) == ("lambda", "us-east-1", True, False)
    nowhere: Any
    for nowhere in ([], None, "x", [None, {"name": "a/b"}, {}]):
        (offer,) = lambda_answers.offers({"gpu_1x_a10": {**A10, "regions_with_capacity_available": nowhere}})
        assert (offer.offer_id, offer.region, offer.available) == ("gpu_1x_a10", None, False)


@pytest.mark.parametrize(
    ("described", "gpu", "vram_gb", "architecture"),
    [
        ("A100 (40 GB SXM4)", "A100 SXM4", 40, "x86_64"),
        ("H100 (80 GB PCIe)", "H100 PCIe", 80, "x86_64"),
        ("GH200 (96 GB)", "GH200", 96, "aarch64"),
        ("GB200 (186 GB)", "GB200", 186, "aarch64"),
        ("Tesla V100 (16 GB)", "Tesla V100", 16, "x86_64"),
        ("RTX 6000 (24 GB)", "RTX 6000", 24, "x86_64"),
        ("B200 (179.1 GB SXM6)", "B200 SXM6", 179.1, "x86_64"),
        ("Z9000, much memory", "Z9000, much memory", None, "x86_64"),
        ("Z9000 (a lot)", "Z9000 (a lot)", None, "x86_64"),
        ("N/A", None, None, "x86_64"),
        (None, "A10 PCIe", 24, "x86_64"),
        (7, "A10 PCIe", 24, "x86_64"),
    ],
)
def test_the_gpu_is_read_from_its_description(
    described: Any, gpu: str | None, vram_gb: float | None, architecture: str
) -> None:
    """Name, memory and processor come of the description; one in no known form is all name."""
    offer = one(gpu_description=described)[0]
    assert (offer.gpu, offer.vram_gb, offer.architecture) == (gpu, vram_gb, architecture)


def test_the_architecture_that_is_told_counts() -> None:
    """Newer answers tell the architecture themselves."""
    assert one(architecture="arm64")[0].architecture == "aarch64"
    assert one(architecture="x86_64", gpu_description="GH200 (96 GB)")[0].architecture == "x86_64"


def test_a_machine_without_gpu_is_an_offer() -> None:
    """A machine without GPU has the count 0 and no GPU."""
    offer = one(gpu_description="N/A", specs={"gpus": 0, "vcpus": 4})[0]
    assert (offer.gpu, offer.vram_gb, offer.count, offer.ram_gb) == (None, None, 0, None)


@pytest.mark.parametrize("cents", [None, "75", -1, 0, True, math.nan, math.inf, 10**400, 75.5, []])
def test_an_offer_without_a_price_is_passed_over(cents: Any) -> None:
    """A machine whose price is not known is never offered: no cap could hold."""
    assert one(price_cents_per_hour=cents) == []


def test_a_count_that_is_missing_is_read_from_the_description() -> None:
    """Without specifications the description tells how many GPUs there are; without both there is no offer."""
    assert one(specs=None, description="8x A10 (24 GB PCIe)")[0].count == 8
    assert one(specs=None, description=None) == []


def test_the_real_catalogue() -> None:
    """Every type of a recorded catalogue is offered, wherever it was free, at its price."""
    catalogue = spec("lambda_fixture_instance_types_2025-11.json")["data"]
    offers = lambda_answers.offers(catalogue)
    assert {offer.type_name for offer in offers} == set(catalogue)
    assert len(offers) == sum(max(len(entry["regions_with_capacity_available"]), 1) for entry in catalogue.values())
    named = {offer.type_name: offer for offer in offers}
    for name, entry in catalogue.items():
        kind = entry["instance_type"]
        assert named[name].price_usd_per_hour * 100 == pytest.approx(kind["price_cents_per_hour"])
        assert named[name].count == kind["specs"]["gpus"]
        assert (named[name].gpu is None) == (kind["gpu_description"] == "N/A") == (named[name].vram_gb is None)
    assert (named["gpu_8x_a100"].gpu, named["gpu_8x_a100"].vram_gb) == ("A100 SXM4", 40)
    assert [offer.type_name for offer in offers if offer.architecture == "aarch64"] == ["gpu_1x_gh200"]
    assert not named["cpu_4x_general"].available


def test_the_real_instance() -> None:
    """A recorded instance, booting with an address, is booting, and not ours."""
    document = spec("lambda_fixture_instance_get.json")["data"]
    found = lambda_answers.instance(document, "ubuntu", 22)
    assert found is not None
    assert (found.instance_id, found.state, found.marker) == (document["id"], "booting", None)
    assert (found.region, found.price_usd_per_hour, found.tags) == ("us-west-1", 35.92, {"key1": "value1"})
    assert document["jupyter_token"] not in repr(found)


@pytest.mark.parametrize(
    ("status", "ip", "state"),
    [
        ("booting", None, "booting"),
        ("booting", "198.51.100.2", "booting"),
        ("active", "198.51.100.2", "ready"),
        ("active", "2001:db8::1", "ready"),
        ("active", None, "booting"),
        ("active", "", "booting"),
        ("active", "-oProxyCommand=x", "booting"),
        ("active", "fe80::1%$(x)", "booting"),
        ("active", 5, "booting"),
        ("unhealthy", "198.51.100.2", "unhealthy"),
        ("terminating", "198.51.100.2", "stopping"),
        ("terminated", None, "gone"),
        ("preempted", None, "unknown"),
        ("ACTIVE", "198.51.100.2", "unknown"),
        ("paused", None, "unknown"),
        ("", None, "unknown"),
        (None, None, "unknown"),
        (["active"], None, "unknown"),
    ],
)
def test_the_state_of_an_instance(status: Any, ip: Any, state: str) -> None:
    """Ready needs an address that is one; whatever is not known counts as costing money."""
    found = lambda_answers.instance({"id": "a", "status": status, "ip": ip}, "ubuntu", 22)
    assert found is not None
    assert found.state == state
    assert (found.host is None) == (state != "ready") or found.host == ip


def test_the_marker_is_read_from_the_tag_or_the_name() -> None:
    """An instance that was renamed is still ours by its tag, one without tags by its name, another's is not."""
    cases: list[tuple[Any, Any, str | None]] = [
        ("renamed", [{"key": MARKER_TAG, "value": MARKER}], MARKER),
        (MARKER, None, MARKER),
        (MARKER, [{"key": MARKER_TAG}, 5, {"key": 1, "value": 2}], MARKER),
        ("theirs", [{"key": "gpu", "value": MARKER}], None),
        (f"{MARKER} copy", [], None),
        (None, "x", None),
    ]
    for name, tags, marker in cases:
        found = lambda_answers.instance({**INSTANCE, "name": name, "tags": tags}, "ubuntu", 22)
        assert found is not None
        assert found.marker == marker


@given(JSON)
def test_nothing_crashes_on_junk(junk: Any) -> None:
    """Any JSON at all is read without a crash."""
    lambda_answers.offers(junk)
    lambda_answers.offers({"gpu_1x_a10": junk})
    for name in A10["instance_type"]:
        one(**{name: junk})
    lambda_answers.instance(junk, "ubuntu", 22)
    for name in INSTANCE:
        lambda_answers.instance({**INSTANCE, name: junk}, "ubuntu", 22)
    lambda_answers.account_keys(junk)
    lambda_answers.account_keys([junk, {"id": "1", "name": junk, "public_key": junk}])
    lambda_answers.file_system(junk, 0.2)
    lambda_answers.file_system({"bytes_used": junk, "name": junk}, 0.2)
    lambda_answers.launched(junk)
    lambda_answers.name_of_key(junk)
    for status in (200, 400, 500):
        lambda_answers.complaint(status, junk)
        lambda_answers.complaint(status, {"error": {"code": "x", "message": junk}})

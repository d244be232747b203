"""Which offers fit: names as people type them, every wish checked, and why none fits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import cli, offers
from orchestrator.errors import NoCapacity, UsageError
from orchestrator.providers.base import Need, Offer
from tests.cloud import Cloud


def offer(gpu: str | None = "A100 SXM4", **how: Any) -> Offer:
    known: dict[str, Any] = {"provider": "lambda", "type_name": "gpu_1x", "count": 1, "vram_gb": 40.0, "vcpus": 30}
    known |= {"ram_gb": 200.0, "disk_gb": 500.0, "region": "us-east-1", "price_usd_per_hour": 1.0, **how}
    return Offer(gpu=gpu, **{"offer_id": f"{known['type_name']}@{known['region']}", **known})


SHELF = [
    offer("A10 PCIe", type_name="gpu_1x_a10", vram_gb=24.0, price_usd_per_hour=0.75),
    offer("A100 SXM4", type_name="gpu_1x_a100_sxm4", price_usd_per_hour=1.29),
    offer("A100 SXM4", type_name="gpu_1x_a100_80", vram_gb=80.0, price_usd_per_hour=1.79, region="us-west-2"),
    offer("H100 SXM5", type_name="gpu_8x_h100", count=8, vram_gb=80.0, price_usd_per_hour=23.92),
    offer("RTX 6000 Ada", type_name="gpu_1x_rtx6000", vram_gb=48.0, price_usd_per_hour=0.9),
    offer("RTX A6000", type_name="gpu_1x_a6000", vram_gb=48.0, price_usd_per_hour=0.8),
    offer("GH200", type_name="gpu_1x_gh200", vram_gb=96.0, available=False, region=None, price_usd_per_hour=0.5),
    offer(None, type_name="cpu_4x", count=0, vram_gb=None, price_usd_per_hour=0.2),
]


@pytest.mark.parametrize(
    ("gpu", "memory", "asked"),
    [
        ("RTX 4090", 24, "rtx4090"),
        ("RTX 4090", 24, "RTX_4090"),
        ("RTX 4090", 24, "4090"),
        ("RTX 4090", 24, "rtx-4090"),
        ("A100 SXM4", 80, "a100"),
        ("A100 SXM4", 80, "A100 80GB"),
        ("A100 SXM4", 80, "A100-SXM4-80GB"),
        ("A100 SXM4", 80, "a100_80gb"),
        ("A100 SXM4", 79.6, "A100 80G"),
        ("H100 SXM5", 80, "H100 SXM"),
        ("H100 SXM5", 80, "sxm5 h100"),
        ("H100 PCIe", 80, "h100/pcie"),
        ("GH200", 96, "gh200"),
        ("V100", 16, "16GB"),
    ],
)
def test_a_gpu_is_meant_by_any_usual_name(gpu: str, memory: float, asked: str) -> None:
    """Case, spaces, dashes and the order of words do not matter; a memory in the name counts."""
    assert offers.is_called(offer(gpu, vram_gb=float(memory)), asked)


@pytest.mark.parametrize(
    ("gpu", "memory", "asked"),
    [
        ("A10 PCIe", 24, "A100"),
        ("A100 SXM4", 40, "A10"),
        ("A100 SXM4", 40, "A100 80GB"),
        ("A100 SXM4", 40, "A100_80GB"),
        ("A100 SXM4", 40, "A100-80GB"),
        ("A100 SXM4", None, "A100 80GB"),
        ("RTX A6000", 48, "RTX 6000"),
        ("RTX 6000 Ada", 48, "A6000"),
        ("GH200", 96, "H200"),
        ("H100 PCIe", 80, "H100 SXM"),
        (None, None, "A100"),
        (None, None, ""),
        ("A100 SXM4", 40, ""),
        ("A100 SXM4", 40, "  "),
        ("A100 SXM4", 40, "???"),
        ("A100 SXM4", 40, "日本"),
    ],
)
def test_a_gpu_is_not_taken_for_another(gpu: str | None, memory: float | None, asked: str) -> None:
    """What is not surely meant is not rented: another memory, a name within a name, no name at all."""
    assert not offers.is_called(offer(gpu, vram_gb=memory), asked)


NEEDS = st.builds(
    Need,
    gpu=st.sampled_from([None, "A100", "RTX", "a10", "A100 80GB"]),
    type_name=st.sampled_from([None, None, "gpu_1x_a10", "gpu_8x_h100"]),
    count=st.sampled_from([None, 0, 1, 8]),
    min_vram_gb=st.one_of(st.none(), st.floats(1, 200)),
    max_price_usd_per_hour=st.one_of(st.none(), st.floats(0.1, 30)),
    region=st.sampled_from([None, "us-east-1", "us-west-2"]),
    disk_gb=st.one_of(st.none(), st.floats(1, 1000)),
    spot=st.booleans(),
)


@given(NEEDS, st.booleans())
def test_what_fits_is_what_every_wish_keeps(need: Need, had_or_not: bool) -> None:
    """Each offer that is returned keeps every wish, none that does is left out, and the cheapest comes first."""
    fitting = [
        entry
        for entry in SHELF
        if (had_or_not or entry.available)
        and (need.type_name is None or entry.type_name == need.type_name)
        and (need.gpu is None or offers.is_called(entry, need.gpu))
        and (need.type_name is not None or need.count is None or entry.count == need.count)
        and (need.min_vram_gb is None or (entry.vram_gb or 0) >= need.min_vram_gb * 0.97)
        and (need.max_price_usd_per_hour is None or entry.price_usd_per_hour <= need.max_price_usd_per_hour)
        and (need.region is None or entry.region == need.region)
        and (need.disk_gb is None or (entry.disk_gb or 0) >= need.disk_gb)
        and entry.spot == need.spot
    ]
    if not fitting:
        with pytest.raises(NoCapacity, match="Nothing was rented"):
            offers.suitable(SHELF, need, had_or_not=had_or_not)
        return
    found = offers.suitable(SHELF, need, had_or_not=had_or_not)
    assert sorted(entry.type_name for entry in found) == sorted(entry.type_name for entry in fitting)
    prices = [entry.price_usd_per_hour for entry in found if entry.available]
    assert prices == sorted(prices)
    assert [entry.available for entry in found] == sorted((entry.available for entry in found), reverse=True)


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (Need(min_vram_gb=500), "'--min-vram 500', which alone excludes all 8"),
        (Need(gpu="A10", max_price_usd_per_hour=0.5), "'--max-price 0.5' excludes the last 1, such as gpu_1x_a10"),
        (Need(gpu="A10", region="us-west-2"), "'--region us-west-2' excludes the last 1"),
        (Need(gpu="GH200"), "excludes the last"),
        (Need(spot=True), "'--spot', which alone excludes all 8"),
        (Need(count=5), "'--count 5', which alone excludes all 8"),
        (Need(region="moon"), "the region 'moon'"),
    ],
)
def test_why_none_fits_is_said(need: Need, words: str) -> None:
    """The wish that leaves nothing is named as it was typed: alone, or the last of several."""
    with pytest.raises(NoCapacity) as caught:
        offers.suitable(SHELF, need)
    assert words in caught.value.message


def test_who_asks_for_spot_where_there_is_none_is_not_told_to_wait() -> None:
    """Waiting brings no spot machine of a cloud that has none; where there are some, it may."""
    with pytest.raises(NoCapacity) as caught:
        offers.suitable(SHELF, Need(spot=True))
    assert "--provider vast" in caught.value.hint
    with pytest.raises(NoCapacity) as caught:
        offers.suitable([*SHELF, offer(spot=True)], Need(spot=True, count=5))
    assert "--wait-capacity" in caught.value.hint


@pytest.mark.slow  # it is asked for half a minute, three times
def test_a_cloud_that_does_not_answer_is_told_of(light_cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other clouds have is offered, and said to be without it; the JSON stays one document."""
    monkeypatch.setenv("VAST_API_KEY", "a-key")
    monkeypatch.setenv("GPU_VAST_URL", "http://127.0.0.1:9/vast")
    done = CliRunner().invoke(cli.gpu, ["offers", "--json"])
    assert {found["provider"] for found in json.loads(done.stdout)} == {"lambda"}
    assert "without it: Vast.ai could not search its offers" in done.stderr
    planned = CliRunner().invoke(cli.gpu, ["launch", "--gpu", "A10", "--dry-run"])
    assert "without it: Vast.ai" in planned.stderr
    monkeypatch.delenv("VAST_API_KEY")
    assert CliRunner().invoke(cli.gpu, ["offers", "--json"]).stderr == ""
    assert light_cloud.core.still_billing() == []


def test_nothing_at_all_is_offered() -> None:
    """An account without any offer is no bug."""
    with pytest.raises((NoCapacity, UsageError), match="Nothing was rented"):
        offers.suitable([], Need(gpu="A100"))
    with pytest.raises(NoCapacity, match="Nothing is offered at all"):
        offers.suitable([], Need())


@pytest.mark.parametrize(
    ("need", "near"),
    [
        (Need(gpu="A1000"), "A10"),
        (Need(gpu="h10O sxm5"), "H100 SXM5"),
        (Need(type_name="gpu_1x_a1O"), "gpu_1x_a10"),
        (Need(gpu="banana split"), ""),
    ],
)
def test_a_name_that_nothing_has_is_a_typo(need: Need, near: str) -> None:
    """It is answered with the nearest one that some have, and with those there are."""
    with pytest.raises(UsageError) as caught:
        offers.suitable(SHELF, need)
    assert f"Did you mean {near}" in caught.value.message if near else "GPU 'banana" in caught.value.message
    assert "There are: " in caught.value.hint


@pytest.mark.parametrize("asked", ["RTX 4090", "rtx_4090", "B200", "RTX 6000 Ada 48GB"])
def test_a_gpu_that_is_known_and_not_listed_is_no_typo(asked: str) -> None:
    """A market lists only what is free: a name that is known to be one is rented out, and may be waited for."""
    shelf = [entry for entry in SHELF if entry.gpu != "RTX 6000 Ada"]
    for need in (Need(gpu=asked), Need(type_name=f"1x {asked}")):
        with pytest.raises(NoCapacity, match="offered just now") as caught:
            offers.suitable(shelf, need)
        assert "--wait-capacity" in caught.value.hint
        assert "A100 SXM4" in caught.value.hint or need.gpu is None
        with pytest.raises(NoCapacity):
            offers.suitable([], need)


@pytest.mark.parametrize(
    ("region", "asked", "is_in"),
    [
        ("US-California", "US", True),
        ("US-California", "us-california", True),
        ("us-east-1", "US", True),
        ("us-east-1", "us-east-1", True),
        ("us-east-1", "us-eas", False),
        ("UK-London", "U", False),
        ("US-California", "", False),
        ("US-California", "California", False),
        (None, "US", False),
    ],
)
def test_a_region_has_parts(region: str | None, asked: str, is_in: bool) -> None:
    """A region that was typed is the whole one or one it is a part of, in any case; never a piece of a word."""
    assert offers.is_in(offer(region=region), asked) is is_in


def test_a_document_has_every_promised_key() -> None:
    """An offer's document has the keys of the command line's contract; what is not known is null."""
    promised = "provider offer_id gpu count vram_gb vcpus ram_gb disk_gb region price_usd_per_hour spot available"
    found = offers.document(offer(None, vram_gb=None))
    assert set(found) >= {*promised.split(), "reliability", "machine_id"}
    assert (found["gpu"], found["vram_gb"], found["reliability"], found["machine_id"]) == (None,) * 4

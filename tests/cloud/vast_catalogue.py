"""What machines there are at the stand-in for Vast: kinds of GPUs, honest offers, and traps that look cheaper."""

from __future__ import annotations

import functools
import random
from typing import Any, NamedTuple

from tests.cloud.answers import Json

FIRST_ID = 30_000_001
_DAY_S = 86400.0
_SEED = 7


class Model(NamedTuple):
    """A kind of GPU."""

    name: str
    """As Vast calls it."""
    shown: str
    """As nvidia-smi does."""
    memory_mib: int
    compute_cap: int
    usd: float
    """An hour, of one."""
    flops: float
    bandwidth: float
    cuda: float
    """The least that runs on it."""


MODELS = {
    "4090": Model("RTX 4090", "NVIDIA GeForce RTX 4090", 24564, 890, 0.34, 82.6, 1008.0, 11.8),
    "3090": Model("RTX 3090", "NVIDIA GeForce RTX 3090", 24576, 860, 0.19, 35.6, 936.0, 11.1),
    "3060": Model("RTX 3060", "NVIDIA GeForce RTX 3060", 12288, 860, 0.07, 12.7, 360.0, 11.1),
    "5090": Model("RTX 5090", "NVIDIA GeForce RTX 5090", 32607, 1200, 0.55, 104.8, 1792.0, 12.8),
    "a6000": Model("RTX A6000", "NVIDIA RTX A6000", 49140, 860, 0.45, 38.7, 768.0, 11.1),
    "l40s": Model("L40S", "NVIDIA L40S", 46068, 890, 0.62, 91.6, 864.0, 11.8),
    "v100": Model("Tesla V100", "Tesla V100-SXM2-16GB", 16384, 700, 0.17, 15.7, 900.0, 9.0),
    "a100-40": Model("A100 SXM4", "NVIDIA A100-SXM4-40GB", 40960, 800, 0.61, 19.5, 1555.0, 11.0),
    "a100-80": Model("A100 SXM4", "NVIDIA A100-SXM4-80GB", 81920, 800, 0.84, 19.5, 2039.0, 11.0),
    "a100-pcie": Model("A100 PCIE", "NVIDIA A100-PCIE-40GB", 40960, 800, 0.55, 19.5, 1555.0, 11.0),
    "h100": Model("H100 SXM", "NVIDIA H100 80GB HBM3", 81559, 900, 1.93, 66.9, 3350.0, 11.8),
    "h200": Model("H200", "NVIDIA H200", 143771, 900, 2.42, 66.9, 4800.0, 12.0),
    "gh200": Model("GH200 SXM", "NVIDIA GH200 480GB", 97871, 900, 1.55, 66.9, 4000.0, 12.2),
}
_HONEST = [
    # model, GPUs of the machine, what of it is offered at once, how many such machines
    ("4090", 1, (1,), 13),
    ("4090", 4, (1, 2, 4), 2),
    ("4090", 8, (8,), 2),
    ("3090", 1, (1,), 10),
    ("3090", 4, (2, 4), 1),
    ("3060", 1, (1,), 2),
    ("5090", 1, (1,), 3),
    ("a6000", 1, (1,), 3),
    ("l40s", 1, (1,), 3),
    ("v100", 1, (1,), 2),
    ("a100-40", 1, (1,), 7),
    ("a100-80", 1, (1,), 6),
    ("a100-80", 8, (1, 2, 4, 8), 1),
    ("a100-pcie", 1, (1,), 2),
    ("h100", 1, (1,), 6),
    ("h100", 8, (1, 8), 2),
    ("h200", 1, (1,), 2),
    ("gh200", 1, (1,), 2),
]
TRAPS: dict[str, Json] = {
    "unverified": {"verification": "unverified", "vericode": 0},
    "deverified": {"verification": "deverified", "vericode": 2, "is_vm_deverified": True},
    "unreliable": {"reliability": 0.81, "reliability2": 0.81},
    "no-ports": {"direct_port_count": 0},
    "old-cuda": {"cuda_max_good": 11.4, "driver_version": "470.223.02"},
    "short": {"duration": 5400.0},
    "slow": {"inet_down": 31.5, "inet_up": 8.2},
    "small-disk": {"disk_space": 17.0},
    "dear-disk": {"storage_cost": 7.2},
    "arm": {"cpu_arch": "arm64", "cpu_name": "Neoverse-V2"},
    "nulls": dict.fromkeys(("cpu_cores", "cpu_cores_effective", "reliability", "reliability2", "inet_down", "cpu_ram")),
    "rented": {"rentable": False, "rented": True},
    "display": {"gpu_display_active": True},
}
"""Cheaper than every honest offer of the same GPU, and not to be had for that price: what is changed, by a name."""
_TRAPPED = ("4090", "a100-80", "h100")
_PLACES = ("California, US", "Texas, US", "Quebec, CA", "Germany, DE", "Sweden, SE", "Poland, PL", "Japan, JP", None)
_CPUS = ("AMD EPYC 7543 32-Core Processor", "Xeon® Gold 6248", "AMD Ryzen 9 7950X", "Xeon® Platinum 8480+")
_DRIVERS = {11.4: "470.223.02", 12.2: "535.161.07", 12.4: "550.127.05", 12.8: "570.148.08", 13.0: "580.65.06"}


@functools.cache
def rows() -> list[tuple[Json, Model, int, int, str]]:
    """Every offer: its row, its GPUs, how many the machine has, its first id, and which trap it is."""
    chance = random.Random(_SEED)
    found: list[tuple[Json, Model, int, int, str]] = []

    def add(model: Model, whole: int, parts: tuple[int, ...], trap: str = "") -> None:
        machine = _machine(model, whole, chance, 41_000 + 7 * len(found))
        for count in parts:
            row = _row(machine, model, count, whole)
            if trap:
                cheap = 0.5 + 0.02 * list(TRAPS).index(trap)
                row |= {"dph_base": model.usd * cheap, "min_bid": model.usd * cheap / 2, "hosting_type": 0}
                row |= TRAPS[trap]
            found.append((row, model, whole, FIRST_ID + len(found), trap))

    for name, whole, parts, machines in _HONEST:
        for _ in range(machines):
            add(MODELS[name], whole, parts)
    for name in _TRAPPED:
        for trap in TRAPS:
            add(MODELS[name], 1, (1,), trap)
    return found


def _machine(model: Model, whole: int, chance: random.Random, machine_id: int) -> Json:
    """What all offers of one machine share."""
    cuda = chance.choice([it for it in (12.4, 12.8, 12.8, 13.0) if it >= model.cuda])
    reliability = round(chance.uniform(0.985, 0.9995), 7)
    arch = "arm64" if model.name.startswith("GH200") else "amd64"
    factor = chance.uniform(0.95, 1.9)
    return {
        "machine_id": machine_id,
        "host_id": 5000 + machine_id % 37,
        "hosting_type": chance.choice((0, 0, 1)),
        "cuda_max_good": cuda,
        "driver_version": _DRIVERS[cuda],
        "cpu_arch": arch,
        "reliability": reliability,
        "reliability2": reliability,
        "reliability_mult": 0.99,
        "expected_reliability": reliability,
        "verification": "verified",
        "vericode": 1,
        "is_vm_deverified": False,
        "cpu_name": "Neoverse-V2" if arch == "arm64" else chance.choice(_CPUS),
        "cpu_ghz": 2.99,
        "has_avx": 1,
        "cpu_cores": 16 * whole,
        "cpu_ram": 64_000 * whole,
        "mobo_name": "ROME2D32GM-2T",
        "os_version": "22.04",
        "inet_down": round(chance.uniform(520, 7800), 1),
        "inet_up": round(chance.uniform(300, 4000), 1),
        "inet_down_cost": chance.choice((0.0, 0.002, 0.01)),
        "inet_up_cost": chance.choice((0.0, 0.004)),
        "disk_space": round(chance.uniform(210, 3400), 1),
        "disk_bw": 2100.5,
        "disk_name": "nvme",
        "storage_cost": chance.choice((0.1, 0.15, 0.2)),
        "direct_port_count": chance.choice((12, 48, 250)) * whole,
        "duration": round(chance.uniform(9, 300) * _DAY_S, 1),
        "static_ip": chance.random() < 0.7,
        "public_ipaddr": f"203.0.113.{machine_id % 250 + 1}",
        "geolocation": chance.choice(_PLACES),
        "pci_gen": 4.0,
        "pcie_bw": 25.1,
        "gpu_lanes": 16,
        "usd": model.usd * factor,
    }


def _row(machine: Json, model: Model, count: int, whole: int) -> Json:
    """One offer of a machine, without what depends on the time, the disk and whether it is a bid."""
    usd = round(machine["usd"] * count, 4)
    performance = round(model.flops * count * 0.97, 1)
    own: dict[str, Any] = {
        "gpu_name": model.name,
        "num_gpus": count,
        "gpu_ram": model.memory_mib,
        "gpu_arch": "nvidia",
        "gpu_total_ram": model.memory_mib * count,
        "gpu_frac": count / whole,
        "compute_cap": model.compute_cap,
        "gpu_mem_bw": model.bandwidth,
        "gpu_max_power": 450.0,
        "gpu_max_temp": 83.0,
        "gpu_display_active": False,
        "gpu_ids": list(range(count)),
        "bw_nvlink": 0.0,
        "cpu_cores_effective": 16.0 * count,
        "driver_vers": int("".join(f"{int(it):03}" for it in machine["driver_version"].split("."))),
        "dph_base": usd,
        "min_bid": round(usd * 0.55, 4),
        "dlperf": performance,
        "score": performance / usd,
        "total_flops": model.flops * count,
        "bundled_results": None,
        "hostname": None,
        "webpage": None,
        "internet_down_cost_per_tb": machine["inet_down_cost"] * 1000,
        "logo": "/static/logos/vastai_small2.png",
        "internet_up_cost_per_tb": machine["inet_up_cost"] * 1000,
        "credit_discount_max": 0.15,
        "discount_rate": 0,
        "discounted_hourly": 0,
        "platform_fee": None,
        "vms_enabled": False,
        "external": None,
        "rentable": True,
        "rented": False,
        "is_bid": False,
        "resource_type": "gpu",
        "cluster_id": None,
        "rn": 1,
        "time_remaining": "",
        "time_remaining_isbid": "",
        "geolocode": 42424242,
        "avail_vol_ask_id": None,
        "avail_vol_dph": None,
        "avail_vol_size": None,
        **dict.fromkeys(("nw_disk_min_bw", "nw_disk_avg_bw", "nw_disk_max_bw")),
    }
    return {name: value for name, value in machine.items() if name != "usd"} | own

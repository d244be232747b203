"""What the stand-in rents out: instance types, regions, images, and the GPUs as nvidia-smi names them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cloud.answers import Json

FIXTURES = Path(__file__).parent.parent.parent.parent / "shared" / "reference" / "provider_specs"
"""Recorded answers and the specification, where a developer has them beside the project."""
REGIONS = {
    "us-east-1": "Virginia, USA",
    "us-west-1": "California, USA",
    "us-west-2": "Arizona, USA",
    "us-west-3": "Utah, USA",
    "us-south-1": "Texas, USA",
    "us-south-2": "North Texas, USA",
    "us-south-3": "Central Texas, USA",
    "us-midwest-1": "Illinois, USA",
    "europe-central-1": "Germany",
    "asia-south-1": "India",
    "me-west-1": "Israel",
    "asia-northeast-1": "Osaka, Japan",
    "asia-northeast-2": "Tokyo, Japan",
    "australia-east-1": "Sydney, Australia",
}
ARM = "gpu_1x_gh200"
FULL = "gpu_8x_a100_80gb_sxm4"
"""A type without capacity anywhere."""
_ROWS: list[tuple[str, str, int, tuple[int, int, int, int], str]] = [
    # name, GPU, cents an hour, (vCPUs, GiB of memory, GiB of disk, GPUs), regions with capacity
    ("gpu_1x_a10", "A10 (24 GB PCIe)", 75, (30, 200, 1400, 1), "us-west-1 us-east-1"),
    ("gpu_1x_a100_sxm4", "A100 (40 GB SXM4)", 129, (30, 200, 512, 1), "us-east-1 us-west-2 europe-central-1"),
    ("gpu_1x_h100_sxm5", "H100 (80 GB SXM5)", 329, (26, 225, 2816, 1), "us-south-2 us-west-2"),
    ("gpu_8x_h100_sxm5", "H100 (80 GB SXM5)", 2392, (208, 1800, 22528, 8), "us-south-2"),
    (ARM, "GH200 (96 GB)", 149, (64, 432, 4096, 1), "us-east-1"),
    (FULL, "A100 (80 GB SXM4)", 1432, (240, 1800, 20480, 8), ""),
    ("cpu_4x_general", "N/A", 20, (4, 16, 100, 0), "us-east-1"),
]
_FAMILIES = ("lambda-stack-22-04", "lambda-stack-24-04", "gpu-base-22-04", "ubuntu-22-04")
_SMI: list[tuple[str, tuple[str, int, str]]] = [
    ("A100 (40 GB SXM", ("NVIDIA A100-SXM4-40GB", 40960, "8.0")),
    ("A100 (80 GB SXM", ("NVIDIA A100-SXM4-80GB", 81920, "8.0")),
    ("A100 (40 GB PCIe", ("NVIDIA A100-PCIE-40GB", 40960, "8.0")),
    ("A10 ", ("NVIDIA A10", 23028, "8.6")),
    ("A6000", ("NVIDIA RTX A6000", 49140, "8.6")),
    ("GH200", ("NVIDIA GH200 480GB", 97871, "9.0")),
    ("H100 (80 GB PCIe", ("NVIDIA H100 PCIe", 81559, "9.0")),
    ("H100", ("NVIDIA H100 80GB HBM3", 81559, "9.0")),
    ("B200", ("NVIDIA B200", 183359, "10.0")),
    ("V100", ("Tesla V100-SXM2-16GB", 16384, "7.0")),
    ("RTX 6000", ("Quadro RTX 6000", 24576, "7.5")),
]


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a machine as nvidia-smi shows them."""

    name: str
    count: int
    memory_mib: int
    """Of each."""
    compute_cap: str


def region(name: str) -> Json:
    """A region as the API writes it."""
    return {"name": name, "description": REGIONS.get(name, name)}


def gpus_of(instance_type: Json) -> Gpus:
    """What nvidia-smi shows on a machine of this type."""
    shown, count = instance_type["gpu_description"], instance_type["specs"]["gpus"]
    for text, (name, memory_mib, compute_cap) in _SMI:
        if text in shown:
            return Gpus(name, count, memory_mib, compute_cap)
    return Gpus(f"NVIDIA {shown.partition(' (')[0]}", count, 16384, "8.0")


@dataclass
class Catalogue:
    """Instance types by name, where each has capacity, and images."""

    types: dict[str, Json]
    capacity: dict[str, list[str]]
    """Names of regions by names of types; a test may change it at any time."""
    images: list[Json] = field(default_factory=list)

    def listed(self) -> Json:
        """The `data` of GET /instance-types."""
        return {
            name: {
                "instance_type": kind,
                "regions_with_capacity_available": [region(at) for at in self.capacity.get(name, [])],
            }
            for name, kind in self.types.items()
        }


def built_in() -> Catalogue:
    """A small catalogue: single GPUs, eight of them, an ARM machine, one without GPU and one without capacity."""
    types = {name: _type(name, gpu, cents, sizes) for name, gpu, cents, sizes, _ in _ROWS}
    return Catalogue(types, {row[0]: row[4].split() for row in _ROWS}, _images())


def recorded() -> Catalogue | None:
    """The catalogue of recorded answers; None where there are none beside the project."""
    found = sorted(FIXTURES.glob("lambda_fixture_instance_types_*.json"))
    images = sorted(FIXTURES.glob("lambda_fixture_images_*.json"))
    if not found or not images:
        return None
    rows: dict[str, Any] = json.loads(found[-1].read_text(encoding="utf-8"))["data"]
    places = {name: row["regions_with_capacity_available"] for name, row in rows.items()}
    return Catalogue(
        {name: row["instance_type"] for name, row in rows.items()},
        {name: [at["name"] for at in row] for name, row in places.items()},
        json.loads(images[-1].read_text(encoding="utf-8"))["data"],
    )


def _type(name: str, gpu: str, cents: int, sizes: tuple[int, int, int, int]) -> Json:
    vcpus, memory_gib, storage_gib, gpus = sizes
    return {
        "name": name,
        "description": f"{gpus}x {gpu}" if gpus else f"{vcpus}x CPU General ({memory_gib} GiB)",
        "gpu_description": gpu,
        "price_cents_per_hour": cents,
        "specs": {"vcpus": vcpus, "memory_gib": memory_gib, "storage_gib": storage_gib, "gpus": gpus},
        "architecture": "arm64" if name == ARM else "x86_64",
    }


def _images() -> list[Json]:
    """One row for each family, architecture and region."""
    found: list[Json] = []
    for family in _FAMILIES:
        for architecture in ("x86_64", "arm64"):
            for at in ("us-east-1", "us-west-1", "us-west-2", "us-south-2", "europe-central-1"):
                number = len(found) + 1
                found.append(
                    {
                        "id": f"00000000-0000-4000-8000-{number:012x}",
                        "created_time": "2026-01-02T03:04:05.000000+00:00",
                        "updated_time": "2026-01-02T03:05:05.000000+00:00",
                        "name": family.replace("-", " ").title(),
                        "description": f"A stand-in for {family}",
                        "family": family,
                        "version": f"1.0.{number}",
                        "architecture": architecture,
                        "region": region(at),
                    }
                )
    return found

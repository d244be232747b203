"""What this device can do at most, measured within seconds: matrix products, and copies of its memory."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

_SIDES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512, 1024)}
"""Of square matrices: large enough to fill a GPU, small enough for a CPU."""
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_MEASURE_S = 0.4


def flops(device: Any, dtype: Any) -> float:
    """Floating-point operations a second of the best matrix product, 2 for a multiply-add."""
    import torch

    best = 0.0
    for side in _SIDES["cuda" if device.type == "cuda" else "cpu"]:
        one = torch.randn((side, side), device=device).to(dtype)  # (N, N)
        best = max(best, 2 * side**3 / _seconds(functools.partial(torch.matmul, one, one), device))
    return best


def copied(device: Any) -> float:
    """Bytes a second, read and written, of a plain copy."""
    import torch

    size = _COPIED_BYTES["cuda" if device.type == "cuda" else "cpu"]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def memory(device: Any) -> int:
    """Bytes that it has in all."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def name(device: Any) -> str:
    """What it is called; of a CPU its kind, and the threads that are used."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _seconds(work: Callable[[], Any], device: Any) -> float:
    """The shortest time that it took, of as often as there is time for."""
    import torch

    def waited() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    work()  # the first one also chooses its kernel
    waited()
    best, until = float("inf"), time.monotonic() + _MEASURE_S
    while time.monotonic() < until or best == float("inf"):
        began = time.perf_counter()
        work()
        waited()
        best = min(best, time.perf_counter() - began)
    return best

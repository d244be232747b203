"""What a speed measurement came to, counted from its steps at home; hours and prices on it, in lines for people."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean
from typing import Any

from jobs import durable, rows, rundir, training_memory
from jobs.decoders import Shape
from jobs.training_memory import Recipe
from jobs.training_speed import ASSUMED, Limits, Measured
from orchestrator import gpus, ledger
from orchestrator.plain import plain
from orchestrator.providers.base import Offer
from orchestrator.runs import Run

GB = 1e9
_MILLION = 1e6
_SHOWN = 12
_NUMBERS = ("step", "tokens", "targets", "slots", "slots_most", "tokens_per_second", "memory_bytes")


def summarise(run: Run) -> dict[str, Any]:
    """The block `speed` of summary.json: of the newest attempt that came to a step, whose times alone count."""
    for copy in run.home.copies():
        for attempt in reversed(copy.attempts()):
            with contextlib.suppress(KeyError, TypeError, ValueError, ArithmeticError):  # a machine may send anything
                if lines := _lines(attempt):
                    return _counted(lines, durable.load_news(attempt.env)["speed"], run)
    return {"steps_done": 0}


def _lines(attempt: rundir.Attempt) -> list[rows.Row]:
    found = []
    for _, line in rows.whole_lines(attempt.steps):
        with contextlib.suppress(rows.BadRow):
            row = rows.decode(line)
            if all(_is_positive(row.get(name)) for name in _NUMBERS):
                found.append(row)
    return found


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _counted(lines: list[rows.Row], about: dict[str, Any], run: Run) -> dict[str, Any]:
    """All figures that the steps that count come to; before there are any, those that do not."""
    counting = [line for line in lines if line.get("warm") is False] or lines
    spent = [line["tokens"] / line["tokens_per_second"] for line in counting]
    seconds, (tokens, targets, slots) = fmean(spent), (fmean(line[name] for line in counting) for name in _NUMBERS[1:4])
    known = [line["held_bytes"] for line in lines if _is_positive(line.get("held_bytes"))]
    total = about["total_tokens"]
    found: dict[str, Any] = {
        "steps_done": len(lines),
        "steps_counted": len(counting),
        "device": plain(str(about["device"])),
        "on_gpu": about["kind"] == "cuda",
        "seconds_per_step": seconds,
        "seconds_slowest": max(spent),
        "tokens_per_second": tokens / seconds,
        "targets_per_second": targets / seconds,
        "memory_bytes": max(line["memory_bytes"] for line in lines),
        "held_bytes": max(known, default=None),
        "peak_flops": float(about["peak_flops"]),
        "total_tokens": total,
        "hours": (total or _MILLION) / tokens * seconds / 3600,
        "price_usd_per_hour": _price(run),
    }
    limits = Limits(**{name: float(value) for name, value in about["limits"].items()})
    if about["shape"] is None:
        return {**found, "verdict": limits.verdict(seconds, None)}
    shape, recipe = Shape(**about["shape"]), Recipe(**about["recipe"])
    most = max(line["slots_most"] for line in lines if line.get("held_bytes"))
    at_most = replace(recipe, tokens=most, learned=targets / slots)
    measured = Measured(
        shape=shape,
        recipe=recipe,
        seconds=seconds,
        micros=float(about["micros"]),
        slots=slots,
        tokens=tokens,
        targets=targets,
        length=float(about["length"]),
        peak_flops=float(about["peak_flops"]),
        copied=float(about["copied"]),
        has_bytes=float(about["has_bytes"]),
    )
    change = measured.change()
    said = training_memory.needs(shape, at_most).tensors
    return {
        **found,
        **measured.shares(),
        "flops_per_token": measured.flops,
        "flops_recomputed_per_token": measured.recomputed,
        "formula_bytes": said,
        "formula_of_held": said / found["held_bytes"] if found["held_bytes"] else None,
        "needs_bytes": training_memory.needs(shape, recipe).on_gpu,
        "change": change,
        "verdict": limits.verdict(seconds, change["seconds_per_step"] if change else None),
    }


def _price(run: Run) -> float | None:
    """Of the machine it ran on, per hour; None where that is not rented."""
    from orchestrator import rentals

    rental = rentals.find(run.record.machine)
    return None if rental is None else rental.price_usd_per_hour


def facts(block: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures by name, as they are written."""
    if "seconds_per_step" not in block:
        return []
    memory = "RSS of the whole process" if not block["on_gpu"] else "allocated on the GPU"
    found = [
        ("verdict", block["verdict"]),
        ("seconds a step", f"{block['seconds_per_step']:.3g}, slowest {block['seconds_slowest']:.3g}"),
        ("tokens per second", f"{block['tokens_per_second']:.0f}, {block['targets_per_second']:.0f} of them learned"),
        ("peak memory", f"{block['memory_bytes'] / GB:.2f} GB ({memory})"),
        ("device", block["device"]),
        ("its matrix products", f"{block['peak_flops'] / 1e12:.3g} TFLOP/s, measured"),
    ]
    if "share_of_peak" in block:
        found += [
            (
                "of that peak",
                f"{_percent(block['share_of_peak'])}; {_percent(block['share_of_peak_with_recompute'])} "
                "with what is computed again",
            ),
            ("lost to padding", _percent(block["padding"])),
            ("lost to recomputing", _percent(block["recompute"])),
            ("lost to dequantizing, about", _percent(block["dequantization"])),
        ]
        if block["formula_of_held"] is not None:
            ratio = f"{block['formula_of_held']:.2f} times the {block['held_bytes'] / GB:.3g} GB of tensors counted"
            found.append(("memory formula", f"{block['formula_bytes'] / GB:.3g} GB, {ratio}"))
        change = block["change"]
        typed = " ".join(
            f"--set {name}={str(value).lower()}" for name, value in (change or {"settings": {}})["settings"].items()
        )
        found.append(
            ("best change", f"{typed}: about {change['gain']:.2g} times as fast" if change else "none gains 5 %")
        )
    return [*found, ("whole training", _whole(block))]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _whole(block: dict[str, Any]) -> str:
    total, price = block["total_tokens"], block["price_usd_per_hour"]
    what = f"{total} tokens" if total else "a million tokens (--set total_tokens=… says more)"
    cost = f", {ledger.shown(block['hours'] * price)} USD on this machine" if price else ""
    return f"{block['hours']:.3g} h for {what}{cost}"


def priced(block: dict[str, Any], offered: Iterable[Offer]) -> list[list[str]]:
    """Hours and USD of the whole training on each kind of GPU offered: name, memory, whether it fits, hours, USD.

    On a GPU a measured share of the peak carries over to the data sheet's of another; from a CPU `ASSUMED` is taken.
    """
    if "flops_per_token" not in block:
        return []
    whole = block["flops_per_token"] + block["flops_recomputed_per_token"]
    share = block["share_of_peak_with_recompute"] if block["on_gpu"] else ASSUMED
    cheapest: dict[tuple[str, float], Offer] = {}
    for offer in sorted(offered, key=lambda one: one.price_usd_per_hour):
        if offer.available and offer.gpu and offer.vram_gb and offer.count == 1:
            cheapest.setdefault((offer.gpu, round(offer.vram_gb)), offer)
    lines = []
    for offer in list(cheapest.values())[:_SHOWN]:
        peak = gpus.peak_flops(offer.gpu or "")
        hours = (block["total_tokens"] or _MILLION) * whole / (share * peak) / 3600 if peak else None
        fits = block["needs_bytes"] <= training_memory.FULL * (offer.vram_gb or 0.0) * GB
        said = [f"{hours:.3g}", ledger.shown(hours * offer.price_usd_per_hour)] if hours and fits else ["-", "-"]
        lines.append([f"{offer.gpu} {offer.vram_gb:g} GB", "yes" if fits else "no", *said])
    return lines

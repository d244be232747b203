"""How often a provider may be asked with one key: turns that all processes of this user take together."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import durable, locks
from orchestrator import clock, config

_LOCK_WAIT_S = 10.0
_WAIT_MAX_S = 120.0
"""After so long without a turn, others use the key all the time: the call is not made."""
_ROUNDS = 1000


@dataclass(frozen=True)
class Lane:
    """A kind of call that must not be made more often than this."""

    name: str
    every_s: float
    calls: int = 1
    """So many in that time, however close together."""


def account(provider: str, key: str) -> str:
    """What an account is called in a file name: the provider and a short digest of its key, which does not give it."""
    return f"{provider}-{hashlib.sha256(f'gpu pace {provider} {key}'.encode()).hexdigest()[:12]}"


def take_turn(name: str, *lanes: Lane) -> bool:
    """Return True once a call may be made on all the lanes, and note that it is made now; False after two minutes."""
    deadline = clock.monotonic() + _WAIT_MAX_S
    for _ in range(_ROUNDS):
        try:
            wait_s = _ask(name, lanes)
        except OSError:  # a full disk must not keep a machine from being given back: pace this process alone
            clock.sleep(max(lane.every_s / lane.calls for lane in lanes))
            return True
        if wait_s <= 0:
            return True
        if clock.monotonic() + wait_s > deadline:
            break
        clock.sleep(wait_s)
    return False


def _ask(name: str, lanes: tuple[Lane, ...]) -> float:
    """Seconds until there may be a turn; 0 when it is now, which is then noted."""
    folder = config.state_folder() / "pace"
    durable.have_folder(folder)
    with locks.held(folder / f"{name}.lock", _LOCK_WAIT_S):
        path, now = folder / f"{name}.json", clock.timestamp()
        before = durable.load_news(path)
        stamps = {lane: _stamps(before.get(lane.name), now)[-lane.calls :] for lane in lanes}
        full = [lane for lane in lanes if len(stamps[lane]) == lane.calls]
        wait_s = max((stamps[lane][0] + lane.every_s - now for lane in full), default=0.0)
        if wait_s <= 0:
            stamps = {lane: [*stamps[lane], now][-lane.calls :] for lane in lanes}
        _save(path, before, {lane.name: _noted(lane, stamps[lane]) for lane in lanes if stamps[lane]})
    return wait_s


def _stamps(value: Any, now: float) -> list[float]:
    """When a lane was used, oldest first. One in the future means the clock was set back: it counts as now, once."""
    listed = value if isinstance(value, list) else [value]
    known = [one for one in listed if isinstance(one, (int, float)) and math.isfinite(one)]
    return sorted(min(float(one), now) for one in known)


def _noted(lane: Lane, stamps: list[float]) -> Any:
    return stamps[-1] if lane.calls == 1 else stamps


def _save(path: Path, before: dict[str, Any], stamps: dict[str, Any]) -> None:
    if before | stamps != before:
        durable.save_json(path, before | stamps, synced=False)

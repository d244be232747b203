"""What is of no more use: folders of machines that are gone, worker code no run keeps, keys of ours in the accounts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import agents, clock, config, inventory, machines, providers, rentals, rescue, runs
from orchestrator.errors import GpuError
from orchestrator.providers.base import Provider, marked_at, marker_of
from orchestrator.rentals import ENDED, Rental

_OLD_S = 86_400.0


@dataclass
class Left:
    """What may be removed. True while there is anything."""

    machines: list[str] = field(default_factory=list)
    keys: list[tuple[Provider, str]] = field(default_factory=list)
    caches: list[Path] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.machines or self.keys or self.caches)

    def words(self) -> Iterator[str]:
        """A line for each."""
        for name in self.machines:
            yield f"the folder of {name}, which is gone"
        for account, name in self.keys:
            yield f"the public key {name} in your account at {account.name}, which no instance uses"
        for path in self.caches:
            yield f"{path}, which no run needs"


def look() -> Left:
    """What is left. A key counts once neither an instance nor a record uses it, at once if a gone machine had it."""
    known = rentals.known()
    left = Left(
        [rental.name for rental in known if _is_over(rental)],
        caches=list(_caches()),
    )
    used_here = {rental.record.key_name for rental in known if rental.record.state not in ENDED}
    done_here = {rental.record.key_name for rental in known if rental.record.state in ENDED}
    for name in providers.names():
        try:
            account = providers.open_if_any(name)
            if account is None:
                continue
            used = used_here | {key for entry in account.instances() for key in entry.key_names}
            free = [key for key in account.key_names() if marker_of(key, {}) is not None and key not in used]
            left.keys += [(account, key) for key in free if key in done_here or _is_old(key)]
        except GpuError:  # what cannot be asked is cleaned the next time
            continue
    return left


def _is_over(rental: Rental) -> bool:
    """Whether a machine is gone, and nothing that was there is waited for."""
    is_all_home = not inventory.not_home(rental.name) and not rescue.is_waiting(rental.name)
    return rental.record.state in ENDED and is_all_home


def _is_old(key: str) -> bool:
    """Whether a marker is from long ago: another laptop's launch may still need the key of a newer one."""
    return clock.timestamp() - marked_at(key) > _OLD_S


def _caches() -> Iterator[Path]:
    """Worker code that no run keeps, and what a killed command left half made; nothing that is younger than a day."""
    used = {run.record.agent for run in runs.everywhere()} | {agents.digest(agents.sources())}
    stores = (config.state_folder() / "agents", machines.folder(machines.LOCAL) / "agent")
    found = [path for store in stores for path in store.glob("*") if path.is_dir() and path.name not in used]
    found += machines.folder(machines.LOCAL).parent.glob(".gone-*")
    yield from sorted(path for path in found if time.time() - path.stat().st_mtime > _OLD_S)


def remove(left: Left) -> None:
    """Remove it; a key that is gone already counts as removed."""
    for name in left.machines:
        with machines.locked():
            rental = rentals.find(name)
            if rental is not None and _is_over(rental):  # somebody may have rented another one of that name since
                with rental.locked():
                    machines.remove(name)
    for account, name in left.keys:
        account.remove_key(name)
    for path in left.caches:
        shutil.rmtree(path, ignore_errors=True)

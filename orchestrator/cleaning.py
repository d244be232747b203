"""What machines that are gone have left: their folders here, and public keys of ours in the accounts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator import clock, inventory, machines, providers, rentals
from orchestrator.errors import GpuError
from orchestrator.providers.base import Provider, marked_at, marker_of
from orchestrator.rentals import ENDED

_OLD_S = 86_400.0


@dataclass
class Left:
    """What may be removed. True while there is anything."""

    machines: list[str] = field(default_factory=list)
    keys: list[tuple[Provider, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.machines or self.keys)

    def words(self) -> Iterator[str]:
        """A line for each."""
        for name in self.machines:
            yield f"the folder of {name}, which is gone"
        for account, name in self.keys:
            yield f"the public key {name} in your account at {account.name}, which no instance uses"


def look() -> Left:
    """What is left of machines that are gone. A key counts once neither an instance nor a record uses it."""
    known = rentals.known()
    left = Left(
        [rental.name for rental in known if rental.record.state in ENDED and not inventory.not_home(rental.name)]
    )
    used_here = {rental.record.key_name for rental in known if rental.record.state not in ENDED}
    for name in providers.names():
        try:
            account = providers.open_if_any(name)
            if account is None:
                continue
            used = used_here | {key for entry in account.instances() for key in entry.key_names}
            left.keys += [(account, key) for key in account.key_names() if _is_old(key) and key not in used]
        except GpuError:  # what cannot be asked is cleaned the next time
            continue
    return left


def _is_old(key: str) -> bool:
    """Whether a key bears a marker of ours from long ago: another laptop's launch may still need a newer one."""
    marker = marker_of(key, {})
    return marker is not None and clock.timestamp() - marked_at(marker) > _OLD_S


def remove(left: Left) -> None:
    """Remove it; a key that is gone already counts as removed."""
    for name in left.machines:
        with machines.locked():
            machines.remove(name)
    for account, name in left.keys:
        account.remove_key(name)

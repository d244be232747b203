"""The first login to a rented machine: by every way there is, and by a host key that is known beforehand, if one is."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from jobs import durable
from orchestrator import clock, enrolment, ssh, ssh_config
from orchestrator.errors import ConfigError, HostKeyChanged, NotReachable, Refused
from orchestrator.providers.base import Endpoint, Provider
from orchestrator.rentals import Rental
from orchestrator.ssh import SshMachine

CALL_S = 30.0
_KEY_PATIENCE_S = 90.0
"""How long an image may take to put the host key in place that it was given, or a provider to tell which it made."""
_WAYS_EVERY_S = 20.0


def asked(rental: Rental) -> enrolment.Asked:
    """The machine as `gpu add` would be told of it."""
    record = rental.record
    address = ssh_config.Address(record.user, record.host or "", record.port)
    return enrolment.Asked(rental.name, address, python=record.python)


def called(rental: Rental, words: list[str]) -> str:
    """What a command there says. Raises GpuError."""
    with SshMachine(rental.folder, Path("/"), "python3") as machine:
        return machine.call(words, b"", CALL_S).decode("utf-8", "replace")


def fingerprint(folder: Path) -> str:
    """Of the pinned host key."""
    blob = base64.b64decode((folder / "known_hosts").read_text(encoding="ascii").split()[2])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


@dataclass
class Door:
    """The door of one machine, tried again until it opens."""

    rental: Rental
    provider: Provider
    began: float = field(default_factory=clock.monotonic)
    _is_admitted: bool = False
    _ways: tuple[Endpoint, ...] = ()
    _looked_at: float | None = None
    _shown: str = ""
    """What the machine showed and is pinned, in words; empty while its key is to be one that is known beforehand."""

    def look(self) -> str | None:
        """Log in by the first way that leads there; returns how its host key was known, None while no way is known.

        Raises GpuError when no way leads there now.
        """
        instance_id = self.rental.record.instance_id or ""
        if not self._is_admitted:
            self._admit(instance_id)
        self._find_ways(instance_id)
        failure: ConfigError | NotReachable | None = None
        for way in self._ways:  # host and port of one way are never mixed with those of another
            self.rental.save(host=way.host, port=way.port)
            try:
                return self._enter(instance_id)
            except (ConfigError, NotReachable) as error:
                failure = failure or error
        if failure:
            raise failure
        return None

    def _admit(self, instance_id: str) -> None:
        """Have the machine's own key let in; a provider may not know of an instance yet that it lists already."""
        public_key = (self.rental.folder / "key.pub").read_text(encoding="ascii").strip()
        try:
            self.provider.admit(instance_id, public_key)
        except Refused as error:
            raise NotReachable(error.message) from None
        self._is_admitted = True

    def _find_ways(self, instance_id: str) -> None:
        """Ask for the ways now and then: an address may change while a machine boots."""
        now = clock.monotonic()
        if self._looked_at is not None and now < self._looked_at + _WAYS_EVERY_S:
            return
        self._looked_at = now
        found = self.provider.get(instance_id)
        if found is not None and found.endpoints:
            self._ways = found.endpoints
            self.rental.save(user=found.user)

    def _enter(self, instance_id: str) -> str:
        is_late = clock.monotonic() > self.began + _KEY_PATIENCE_S
        known = None if self._shown else self._known(instance_id)
        if known is None and not self._shown:
            if not is_late:
                raise NotReachable("Which host key it has is not known yet.")
            self._shown = self._pin_shown("nobody tells its host key")
        elif known is not None:
            self._pin(*known.split()[:2])
        enrolment.write_config(asked(self.rental), self.rental.folder)
        try:
            called(self.rental, ["true"])
        except HostKeyChanged:
            if not is_late:
                raise
            self._shown = self._pin_shown("it has another host key than it should")
            called(self.rental, ["true"])
        given = "it was given" if self.provider.takes_host_key else "that its provider's log tells"
        return self._shown or f"by the host key {given}"

    def _known(self, instance_id: str) -> str | None:
        """Type and key of the host key that it was given, or that its provider says it has."""
        if self.provider.takes_host_key:
            return (self.rental.folder / "host_key.pub").read_text(encoding="ascii")
        return self.provider.host_key(instance_id)

    def _pin_shown(self, why: str) -> str:
        """Pin the host key that the machine shows; returns words that say so."""
        key = ssh.host_key(self.rental.record.host or "", self.rental.record.port)
        self._pin(key.get_name(), key.get_base64())
        return f"{why}: first contact was NOT verified; pinned: {key.fingerprint}"

    def _pin(self, kind: str, blob: str) -> None:
        line = ssh_config.known_host_line(asked(self.rental).address, kind, blob)
        durable.replace_whole(self.rental.folder / "known_hosts", line.encode())

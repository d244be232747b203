"""A client of the containers of the stand-in for Vast for the tests of them: a key, pinned host keys, and ssh."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cloud import Fault, Vast
from tests.cloud.vast_asking import launch, said, shown
from tests.cloud.vast_instance import Place
from tests.cloud.vast_machines import Container
from tests.waiting import until

_DEADLINE_S = 20.0


@dataclass
class RentedContainer:
    """An instance, and how to log in to it."""

    renter: VastRenter
    instance_id: str

    @property
    def machine(self) -> Container:
        """Its container."""
        return self.renter.cloud.machine(self.instance_id)

    @property
    def faults(self) -> dict[str, Fault]:
        """What is wrong with it: what is taken out is over."""
        return self.renter.cloud.core.instances[self.instance_id].faults

    @property
    def direct(self) -> Place:
        """Where it says that its direct port is."""
        found = shown(self.renter.cloud.core, self.instance_id)
        return Place(found["public_ipaddr"].strip(), int(found["ports"]["22/tcp"][0]["HostPort"]))

    @property
    def proxy(self) -> Place:
        """Where it says that its proxy is."""
        found = shown(self.renter.cloud.core, self.instance_id)
        return Place(found["ssh_host"], found["ssh_port"])

    def run(self, command: str, via: str = "direct", key: str = "key") -> subprocess.CompletedProcess[str]:
        """What a command there wrote and how it ended."""
        place = self.direct if via == "direct" else self.proxy
        words = [*self.renter.ssh(place, key), f"root@{place.host}", command]
        return subprocess.run(words, capture_output=True, text=True, timeout=_DEADLINE_S)

    def said(self, command: str, via: str = "direct") -> str:
        """What a command wrote; fails the test when it did not end well."""
        done = self.run(command, via)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def asked(self, **order: Any) -> Any:
        """Manage the instance: its state or its label."""
        return said(self.renter.cloud.core, f"PUT /instances/{self.instance_id}/", order)

    def log(self) -> str:
        """What its container has written so far."""
        return self.renter.cloud.core.log_of(self.renter.cloud.core.instances[self.instance_id])


@dataclass
class VastRenter:
    """Rents containers of the stand-in and logs in to them."""

    cloud: Vast
    folder: Path
    known: Path = field(init=False)
    """Host keys that were seen: each place keeps its own."""

    def __post_init__(self) -> None:
        self.known = self.folder / "known_hosts"
        self.cloud.core.keys.add(self.made("key"))

    def made(self, name: str) -> str:
        """The public half of a key pair that is made now."""
        words = ["ssh-keygen", "-qt", "ed25519", "-N", "", "-C", name, "-f", str(self.folder / name)]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
        return (self.folder / f"{name}.pub").read_text().strip()

    def rent(self, onstart: str = "", **order: Any) -> RentedContainer:
        """An instance whose container has been started."""
        name = launch(self.cloud.core, order.pop("ask_id", None), onstart=onstart, **order)
        assert self.cloud.machines is not None
        all_of_them = self.cloud.machines.all
        until(lambda: name in all_of_them and "ssh_port" in shown(self.cloud.core, name), _DEADLINE_S)
        return RentedContainer(self, name)

    def ready(self, onstart: str = "", **order: Any) -> RentedContainer:
        """An instance that can be logged in to."""
        rented = self.rent(onstart, **order)
        until(lambda: "ports" in shown(self.cloud.core, rented.instance_id), _DEADLINE_S)
        until(lambda: rented.run("true").returncode == 0, _DEADLINE_S)
        return rented

    def ssh(self, place: Place, key: str = "key") -> list[str]:
        """The words of ssh up to whom to call."""
        options = {
            "UserKnownHostsFile": self.known,
            "GlobalKnownHostsFile": "none",
            "StrictHostKeyChecking": "accept-new",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "BatchMode": "yes",
            "KexAlgorithms": "curve25519-sha256",
        }
        words = ["ssh", "-F", "none", "-p", str(place.port), "-i", str(self.folder / key)]
        return words + [word for name, value in options.items() for word in ("-o", f"{name}={value}")]

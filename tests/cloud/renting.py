"""A client of the stand-in's machines for the tests of them: the account's key, host keys of its own, and ssh."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cloud import Cloud
from tests.cloud.asking import ask
from tests.cloud.asking import launch as launched
from tests.cloud.machines import Machine
from tests.waiting import until

_DEADLINE_S = 20.0


@dataclass
class Rented:
    """An instance, and how to log in to it."""

    instance_id: str
    machine: Machine
    words: list[str]
    """Of ssh, up to the command."""

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """What a command there wrote and how it ended."""
        return subprocess.run([*self.words, command], capture_output=True, text=True, timeout=_DEADLINE_S)

    def said(self, command: str) -> str:
        """What a command wrote; fails the test when it did not end well."""
        done = self.run(command)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout


@dataclass
class Renter:
    """Rents machines of the stand-in and logs in to them."""

    cloud: Cloud
    folder: Path
    made: int = field(default=0)

    def __post_init__(self) -> None:
        self._key("account")
        self.cloud.core.account.add_key(_as_json({"name": "mine", "public_key": self.text("account.pub")}))

    def text(self, name: str) -> str:
        """A file of the renter's."""
        return (self.folder / name).read_text()

    def rent(self, config: dict[str, Any] | str | None = None, **order: Any) -> Rented:
        """An instance that is active with an address; `config` is cloud-config beside the host key, or a script."""
        self.made += 1
        host = f"host{self.made}"
        self._key(host)
        keys = {"ed25519_private": self.text(host), "ed25519_public": self.text(f"{host}.pub")}
        data = (
            config
            if isinstance(config, str)
            else f"#cloud-config\n{yaml.safe_dump({'ssh_keys': keys} | (config or {}))}"
        )
        name = launched(self.cloud.core, **{"user_data": data} | order)
        until(lambda: "ip" in self.shown(name) and name in self._machines(), _DEADLINE_S)
        return Rented(name, self.cloud.machine(name), self._words(self.shown(name)["ip"], host))

    def ready(self, config: dict[str, Any] | str | None = None, **order: Any) -> Rented:
        """An instance that can be logged in to, its first boot over."""
        rented = self.rent(config, **order)
        until(lambda: rented.run("true").returncode == 0, _DEADLINE_S)
        rented.said("cloud-init status --wait")
        return rented

    def shown(self, name: str) -> dict[str, Any]:
        """The instance as the API has it; empty when it knows of none."""
        status, data = ask(self.cloud.core, "GET", f"/instances/{name}")
        return dict(data) if status == 200 else {}

    def _machines(self) -> dict[str, Machine]:
        assert self.cloud.machines is not None
        return self.cloud.machines.all

    def _key(self, name: str) -> None:
        words = ["ssh-keygen", "-qt", "ed25519", "-N", "", "-C", name, "-f", str(self.folder / name)]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)

    def _words(self, address: str, host: str) -> list[str]:
        assert self.cloud.machines is not None
        known = self.folder / f"{host}.known"
        known.write_text(f"{host} {self.text(f'{host}.pub')}")
        options = {
            "UserKnownHostsFile": known,
            "GlobalKnownHostsFile": "none",
            "HostKeyAlias": host,
            "StrictHostKeyChecking": "yes",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
            "KexAlgorithms": "curve25519-sha256",
        }
        words = ["ssh", "-F", "none", "-p", str(self.cloud.machines.port), "-i", str(self.folder / "account")]
        return (
            words
            + [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
            + [f"ubuntu@{address}"]
        )


def _cloud_config(content: dict[str, Any]) -> str:
    return "#cloud-config\n" + yaml.safe_dump(content)


def _as_json(content: Any) -> bytes:

    return json.dumps(content).encode()


GH200 = {"instance_type_name": "gpu_1x_gh200", "region_name": "us-east-1"}
H100S = {"instance_type_name": "gpu_8x_h100_sxm5", "region_name": "us-south-2"}
A100 = {"instance_type_name": "gpu_1x_a100_sxm4", "region_name": "us-east-1"}

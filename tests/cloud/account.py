"""What an account of the stand-in has beside instances: public keys, file systems and firewall rules."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tests.cloud.answers import Failure, Json, checked_text, need_list, need_text, parsed
from tests.cloud.catalogue import REGIONS, region

_PUBLIC_KEY = (
    r"(?s)(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp\d+|sk-\S+) \S+.{0,4000}|-----BEGIN .{1,4096}|---- BEGIN .{1,4096}"
)
_RULES_MAX = 20
_OWNER = {"id": "3da5a70a57a7422ea8a7203f98b2198b", "email": "someone@example.com", "status": "active"}


class Account:
    """Keys, file systems and firewall rules of one account."""

    def __init__(self, new_id: Callable[[], str], now: Callable[[], float]) -> None:
        self._new_id = new_id
        self._now = now
        self.keys: dict[str, Json] = {}
        self.file_systems: dict[str, Json] = {}
        self.rules: list[Json] = [_rule("tcp", [22, 22], "SSH"), _rule("icmp", None, "ping")]

    def public_key(self, name: str) -> str | None:
        """The public key of this name."""
        return next((str(key["public_key"]) for key in self.keys.values() if key["name"] == name), None)

    def file_system(self, name: str) -> Json | None:
        """The file system of this name."""
        return next((one for one in self.file_systems.values() if one["name"] == name), None)

    def add_key(self, body: bytes) -> Json:
        """Keep a public key, or make a pair where none is given; its private half is told this once."""
        content = parsed(body)
        name = need_text(content, "name", r"(?s).{1,64}")
        if self.public_key(name) is not None:
            raise Failure("global/invalid-parameters", f"name: An SSH key named {name!r} exists already.")
        secret: Json = {}
        if (public := content.get("public_key")) is None:
            private, public = generated_pair()
            secret = {"private_key": private}
        checked_text(public, "public_key", _PUBLIC_KEY)
        key = {"id": self._new_id(), "name": name, "public_key": public}
        self.keys[key["id"]] = key
        return key | secret

    def remove_key(self, key_id: str) -> Json:
        """Forget a public key; running instances keep it."""
        if self.keys.pop(key_id, None) is None:
            raise Failure("global/not-found")
        return {}

    def add_file_system(self, body: bytes) -> Json:
        """Make a file system."""
        content = parsed(body)
        name = need_text(content, "name", r"(?=.{1,60}$)[a-zA-Z]+[0-9a-zA-Z-]*")
        at = need_text(content, "region")
        if at not in REGIONS:
            raise Failure("global/invalid-parameters", "region: no such region")
        if self.file_system(name):
            raise Failure("global/duplicate")
        made: Json = {
            "id": self._new_id(),
            "name": name,
            "mount_point": f"/lambda/nfs/{name}",
            "created": datetime.fromtimestamp(self._now(), UTC).isoformat(),
            "created_by": _OWNER,
            "is_in_use": False,
            "region": region(at),
            "bytes_used": 0,
        }
        self.file_systems[made["id"]] = made
        return made

    def listed_file_systems(self, in_use: set[str]) -> list[Json]:
        """All file systems; those whose names are in `in_use` say so."""
        return [one | {"is_in_use": one["name"] in in_use} for one in self.file_systems.values()]

    def remove_file_system(self, identity: str, in_use: set[str]) -> Json:
        """Delete a file system that no instance uses."""
        if identity not in self.file_systems:
            raise Failure("global/object-does-not-exist", "Filesystem was not found.")
        if self.file_systems[identity]["name"] in in_use:
            raise Failure("filesystems/filesystem-in-use")
        del self.file_systems[identity]
        return {"deleted_ids": [identity]}

    def replace_rules(self, body: bytes) -> list[Json]:
        """Have these firewall rules and no others."""
        rules = need_list(parsed(body), "data", dict)
        if len(rules) > _RULES_MAX:
            raise Failure("global/invalid-parameters", f"data: at most {_RULES_MAX} rules")
        self.rules = [_checked_rule(rule) for rule in rules]
        return self.rules


def _rule(protocol: str, ports: list[int] | None, description: str) -> Json:
    rule = {"protocol": protocol, "source_network": "0.0.0.0/0", "description": description}
    return rule | ({"port_range": ports} if ports else {})


def _checked_rule(rule: Json) -> Json:
    protocol = need_text(rule, "protocol", "tcp|udp|icmp|all")
    text = need_text(rule, "source_network")
    try:
        network = str(ipaddress.IPv4Network(text))
    except ValueError:
        raise Failure("global/invalid-parameters", "source_network: not an IPv4 network") from None
    ports = rule.get("port_range")
    if (ports is None) != (protocol == "icmp") or not (ports is None or _are_ports(ports)):
        raise Failure("global/invalid-parameters", "port_range: a pair of ports, and none for icmp")
    return _rule(protocol, ports, need_text(rule, "description", r"(?s).{0,128}")) | {"source_network": network}


def _are_ports(ports: Any) -> bool:
    if not isinstance(ports, list) or len(ports) != 2 or not all(isinstance(port, int) for port in ports):
        return False
    return bool(1 <= ports[0] <= ports[1] <= 65535)


def generated_pair() -> tuple[str, str]:
    """A new RSA key as the provider makes it: the private half as PEM, the public one as OpenSSH has it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    formats = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, *formats).decode()
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private, public.decode()

"""A machine at the other end of a wire: a network namespace with a link of its own, where packets can be lost."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import random
import secrets
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tests.rig.sshd import Sshd

Chain = Literal["INPUT", "OUTPUT"]
"""Packets to the machine, and packets from it."""
CHAINS: tuple[Chain, Chain] = ("INPUT", "OUTPUT")
SSH_PORT = 22
_NETWORK = ipaddress.ip_network("198.18.0.0/15")
"""Set aside for tests of network devices (RFC 2544), so that no real network has it."""
_DEADLINE_S = 20.0


@functools.cache
def why_not() -> str:
    """Why there can be no wires here and what would help; empty when there can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    for program, package in (("ip", "iproute2"), ("iptables", "iptables")):
        if shutil.which(program) is None:
            return f"no {program} here. Type: apt-get install {package}"
    name = f"rig-probe-{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "exec", name, "iptables", "-w", "5", "-I", "INPUT", "-j", "DROP")
    except RuntimeError as error:
        return f"no network namespaces here: {error}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return ""


class Wire:
    """A machine (`sshd`) on a wire of its own; at the end of the block all of it is gone."""

    def __init__(self, folder: Path) -> None:
        tag = f"{os.getpid():x}{secrets.token_hex(2)}"
        self.name = f"rig-{tag}"
        self._here = f"r{tag}h"[:15]
        self._there = f"r{tag}m"[:15]
        network = _free_network()
        self._free = iter(network.hosts())
        self._prefix = network.prefixlen
        self.own_address = str(next(self._free))
        """The laptop's end."""
        self.sshd = Sshd(folder, inside=("ip", "netns", "exec", self.name))
        self.sshd.listen = "0.0.0.0"
        self.sshd.address, self.sshd.port = str(next(self._free)), SSH_PORT

    @property
    def address(self) -> str:
        """The machine's address as it is now."""
        return self.sshd.address

    @property
    def port(self) -> int:
        """The machine's port."""
        return self.sshd.port

    def __enter__(self) -> Wire:
        try:
            self._lay()
            self.sshd.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drop(self, chains: Iterable[Chain] = CHAINS) -> None:
        """Lose every packet without a word: what an unplugged cable or a dead router looks like to TCP."""
        for chain in chains:
            self._rule(chain, "-j", "DROP")

    def lose(self, share: float, chains: Iterable[Chain] = CHAINS) -> None:
        """Lose packets at random, `share` (0 to 1) of them."""
        for chain in chains:
            self._rule(chain, "-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")

    def reject_rst(self) -> None:
        """Answer every packet to the machine with a reset, as a firewall does that has forgotten the connection."""
        self._rule("INPUT", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")

    def heal(self) -> None:
        """Undo drop(), lose() and reject_rst()."""
        self._inside("iptables", "-w", "5", "-F")

    def link_down(self) -> None:
        """Take the machine's network card down; its address stays."""
        _run("ip", "-n", self.name, "link", "set", self._there, "down")

    def link_up(self) -> None:
        """Undo link_down()."""
        _run("ip", "-n", self.name, "link", "set", self._there, "up")

    def change_address(self) -> str:
        """Give the machine another address, as a provider may at a restart; connections to the old one hang."""
        old, self.sshd.address = self.sshd.address, self._next_address()
        self._readdress(["-n", self.name], self._there, old, self.sshd.address)
        return self.sshd.address

    def change_own_address(self) -> str:
        """Give the laptop another address, as another Wi-Fi does; its open connections hang."""
        old, self.own_address = self.own_address, self._next_address()
        self._readdress([], self._here, old, self.own_address)
        return self.own_address

    def close(self) -> None:
        """End the machine and take the wire away. May be called twice."""
        self.sshd.close()
        for words in (["ip", "link", "delete", self._here], ["ip", "netns", "delete", self.name]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(words, capture_output=True, timeout=_DEADLINE_S)

    def _lay(self) -> None:
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self.name)
        _run("ip", "address", "add", f"{self.own_address}/{self._prefix}", "dev", self._here)
        _run("ip", "-n", self.name, "address", "add", f"{self.address}/{self._prefix}", "dev", self._there)
        _run("ip", "-n", self.name, "link", "set", "lo", "up")
        _run("ip", "-n", self.name, "link", "set", self._there, "up")
        _run("ip", "link", "set", self._here, "up")

    def _next_address(self) -> str:
        found = next(self._free, None)
        assert found is not None, "a wire has few addresses, and all were used"
        return str(found)

    def _readdress(self, where: list[str], card: str, old: str, new: str) -> None:
        # the old one first: deleting the first address of a network deletes the later ones with it
        _run("ip", *where, "address", "delete", f"{old}/{self._prefix}", "dev", card)
        _run("ip", *where, "address", "add", f"{new}/{self._prefix}", "dev", card)

    def _rule(self, chain: Chain, *words: str) -> None:
        side = "-i" if chain == "INPUT" else "-o"
        self._inside("iptables", "-w", "5", "-A", chain, side, self._there, *words)

    def _inside(self, *words: str) -> None:
        _run("ip", "netns", "exec", self.name, *words)


def _free_network() -> ipaddress.IPv4Network:
    """A /29 of the test range that no network card here has."""
    assert isinstance(_NETWORK, ipaddress.IPv4Network)
    taken = subprocess.run(["ip", "-4", "-o", "address"], capture_output=True, text=True, check=True).stdout
    for _ in range(1000):
        start = int(_NETWORK.network_address) + 8 * random.randrange(_NETWORK.num_addresses // 8)
        network = ipaddress.ip_network((start, 29))
        assert isinstance(network, ipaddress.IPv4Network)
        if not any(f" {host}/" in taken for host in network.hosts()):
            return network
    raise RuntimeError(f"no network of {_NETWORK} is free")


def _run(*words: str) -> None:
    """Run one command; RuntimeError with what it said when it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=_DEADLINE_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")

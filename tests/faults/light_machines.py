"""What stands behind the instances of a storm: machines without processes that answer as real ones would."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from orchestrator import ssh_config
from orchestrator.errors import BadAnswer, HostKeyChanged, LoginRefused, NotReachable
from tests.cloud.instance import Instance
from tests.cloud.vast_instance import VastInstance

_KIND = "ssh-ed25519"
_HANGS_S = 30.0
A_LITTLE_DEARER = 1.03
"""Times the price that was offered: within what is let pass."""
Rented = Instance | VastInstance


@dataclass(frozen=True)
class HostKey:
    """A host key as `ssh.host_key` gives it."""

    blob: str

    @property
    def fingerprint(self) -> str:
        """As OpenSSH writes it."""
        digest = base64.b64encode(hashlib.sha256(base64.b64decode(self.blob)).digest())
        return f"SHA256:{digest.decode().rstrip('=')}"

    def get_name(self) -> str:
        """Its kind."""
        return _KIND

    def get_base64(self) -> str:
        """The key itself."""
        return self.blob


@dataclass
class Room:
    """Where the machines are: who finds one by its address, and what befalls each contact with it."""

    at: Callable[[str, int], Rented | None]
    now: Callable[[], float]
    contact: Callable[[str], None]
    """Called before anything is said to a machine; raises what befalls it."""
    wait: Callable[[float], None]
    logins: set[str]
    """Ids of the instances that somebody has logged in to."""

    def machine(self, folder: Path, root: Path, python: str, *_: object) -> LightMachine:
        """Stands for `SshMachine(folder, root, python, …)`."""
        return LightMachine(self, folder, root, python)

    def host_key(self, host: str, port: int) -> HostKey:
        """Stands for `ssh.host_key`."""
        self.contact("host key")
        return HostKey(self.shown_key(self.reached(host, port)))

    def reached(self, host: str, port: int) -> Rented:
        """The instance at an address, whose sshd listens; NotReachable when there is none."""
        found, now = self.at(host, port), self.now()
        if found is None or not found.runs(now) or now < found.sshd_at:
            raise NotReachable(f"{host} does not answer.")
        return found

    def shown_key(self, instance: Rented) -> str:
        """The host key that an instance shows now: its own or that it was given, unless a fault has it otherwise."""
        if isinstance(instance, VastInstance):
            is_other = "other-host-key" in instance.faults and instance.instance_id in self.logins
            return own_key(instance.instance_id[::-1] if is_other else instance.instance_id)
        given: str = json.loads(instance.order["user_data"].partition("\n")[2])["ssh_keys"]["ed25519_public"].split()[1]
        faults = instance.faults
        if "ignores-host-key" in faults or "ignores-user-data" in faults:
            return own_key(instance.instance_id)
        if "other-host-key" in faults and instance.instance_id in self.logins:
            return own_key(instance.instance_id[::-1])
        return given


def own_key(seed: str) -> str:
    """The host key of a machine that made its own."""
    blob = b"".join(
        len(part).to_bytes(4, "big") + part for part in (_KIND.encode(), hashlib.sha256(seed.encode()).digest())
    )
    return base64.b64encode(blob).decode()


class LightMachine:
    """A machine of a record's folder, reached by what its ssh_config, known_hosts and key say."""

    def __init__(self, room: Room, folder: Path, root: Path, python: str) -> None:
        self.name = folder.name
        self.root, self.python = root, python
        self._room = room
        self._folder = folder

    def __enter__(self) -> LightMachine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        """Nothing is open."""

    def call(self, words: list[str], data: bytes = b"", deadline_s: float = _HANGS_S) -> bytes:
        """What the machine says; errors as the real one has them."""
        self._room.contact(f"ssh {words[0]}")
        instance = self._let_in()
        if words[0] == "true":
            return b""
        if words[0] == "echo":
            return f"{words[1]}\n".encode()
        if words[0] == "nvidia-smi":
            return _smi(instance, self._room.wait, deadline_s).encode()
        if words[:3] == ["python3", "-I", "-c"]:
            return _cuda(instance).encode()
        if words[:2] == ["sh", "-c"] and words[2].startswith("df "):
            return b"90000000\n"
        if words[:2] == ["sh", "-c"] and "say home" in words[2]:
            return _probed(instance).encode()
        if words[-2:-1] == ["guard"] and isinstance(instance, VastInstance):
            return _guard(instance).encode()
        raise NotReachable(f"A light machine has nothing to say to {words[:3]}.")

    def push_agent(self, store: Path, name: str) -> None:
        """No run works on a light machine; a container takes the code that looks at its guard."""
        self._room.contact("push")
        if not isinstance(self._let_in(), VastInstance):
            raise NotReachable("A light machine takes no code.")

    def _let_in(self) -> Rented:
        """The instance that is logged in to."""
        settings = ssh_config.settings((self._folder / "ssh_config").read_text(encoding="utf-8"))
        instance = self._room.reached(settings["hostname"], int(settings.get("port", "22")))
        pinned = (self._folder / "known_hosts").read_text(encoding="ascii").split()[2]
        if self._room.shown_key(instance) != pinned:
            raise HostKeyChanged("It shows another host key. Nothing was sent.")
        own = (self._folder / "key.pub").read_text(encoding="ascii").split()[:2]
        known = [line.split()[:2] for line in _let_in_by(instance, self._room.now())]
        if not (self._folder / "key").exists() or own not in known:
            raise LoginRefused("It does not accept the key. Nothing was sent.")
        self._room.logins.add(instance.instance_id)
        return instance


def _let_in_by(instance: Rented, now: float) -> list[str]:
    """The public keys that are let in now."""
    if isinstance(instance, VastInstance):
        return instance.lets_in(now)
    denied = instance.faults.get("publickey-denied")
    return [] if denied and now < instance.sshd_at + denied.seconds else [instance.public_key]


def is_as_paid(instance: Rented) -> bool:
    """Whether a machine is what was paid for, by the faults it has."""
    wrong = [name for name in instance.faults if name.startswith(("smi-", "cuda-", "wrong-", "delivers-"))]
    return not wrong or (wrong == ["wrong-price"] and instance.faults["wrong-price"].detail == A_LITTLE_DEARER)


def _smi(instance: Rented, wait: Callable[[float], None], deadline_s: float) -> str:
    gpus, faults = instance.gpus, instance.faults
    if "smi-hangs" in faults:
        wait(min(deadline_s, faults["smi-hangs"].seconds))
        raise NotReachable("A command did not end in time.")
    if "smi-missing" in faults or "smi-fails" in faults or not gpus.count:
        raise BadAnswer("A command ended with exit code 127: nvidia-smi.")
    name = (faults["smi-wrong-gpu"].detail or "Tesla T4") if "smi-wrong-gpu" in faults else gpus.name
    memory_mib = gpus.memory_mib // 2 if "smi-wrong-memory" in faults else gpus.memory_mib
    count = gpus.count - 1 if "smi-wrong-count" in faults else gpus.count
    return f"{name}, {memory_mib}\n" * count


def _cuda(instance: Rented) -> str:
    if not instance.gpus.count:
        return "none\n"
    return f"{instance.faults['cuda-error'].detail or 802 if 'cuda-error' in instance.faults else 0}\n"


def _probed(instance: Rented) -> str:
    told = ["home=/home/ubuntu", "system=Linux x86_64", "python=3.10 /usr/bin/python3", "writable=yes"]
    gpus = [f"gpu={instance.gpus.name}"] * instance.gpus.count
    return "\n".join([*told, "free_kb=90000000", *gpus, "end=yes", ""])


def _guard(instance: VastInstance) -> str:
    alive = "ignores-user-data" not in instance.faults
    told = {"alive": alive, "phase": "armed", "deadline": None, "last_error": ""}
    return json.dumps(told | {"answered_at": instance.first_up_at if alive else None})

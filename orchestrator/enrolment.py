"""Adding a machine one already has: host key pinned, own key made, what is there found out; and undoing it."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import durable
from orchestrator import clock, machines, rentals, ssh, ssh_config
from orchestrator.channel import HANDSHAKE_S, Channel
from orchestrator.errors import BadAnswer, ConfigError, GpuError, NotReachable, UsageError
from orchestrator.machines import Record
from orchestrator.ssh import SshMachine

if TYPE_CHECKING:
    import paramiko

_OLDEST = (3, 10)
"""The supervisor's Python."""
_OLDEST_WORKER = (3, 11)
_FREE_MIN_KB = 200_000
_PROBE = r"""
say() { printf '%s=%s\n' "$1" "$2"; }
umask 077
say home "$HOME"
say system "$(uname -sm)"
for name in python3 python3.13 python3.12 python3.11 python3.10; do
  path=$(command -v "$name" 2>/dev/null) || continue
  version=$("$path" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
  say python "$version $path"
done
if mkdir -p "$HOME/.gpu" 2>/dev/null && echo test > "$HOME/.gpu/.probe" 2>/dev/null; then say writable yes; fi
rm -f "$HOME/.gpu/.probe" 2>/dev/null
say free_kb "$(df -Pk "$HOME" 2>/dev/null | tail -n 1 | tr -s ' ' | cut -d ' ' -f 4)"
if command -v nvidia-smi >/dev/null 2>&1; then
  nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | while read -r line; do say gpu "$line"; done
fi
say end yes
"""
"""Asked of a machine that has nothing of ours; a constant, and plain POSIX."""
_VERSION = 'import sys; print("%d.%d" % sys.version_info[:2])'
_AUTHORIZE = r"""
umask 077 && mkdir -p "$HOME/.ssh" && file="$HOME/.ssh/authorized_keys" && touch "$file" || exit 1
[ -z "$(tail -c 1 "$file")" ] || echo >> "$file"
cat >> "$file"
"""
_DISMISS = r"""
file="$HOME/.ssh/authorized_keys"; line=$(cat); rest="$file.gpu-$$"
[ -f "$file" ] && [ -n "$line" ] || exit 0
umask 077; grep -v -x -F -e "$line" "$file" > "$rest"; [ $? -le 1 ] && cat "$rest" > "$file"; rm -f "$rest"
"""


@dataclass(frozen=True)
class Asked:
    """What was typed after `gpu add`."""

    name: str
    address: ssh_config.Address
    key: Path | None = None
    python: str | None = None
    fingerprint: str | None = None
    """The host key that must be there; None: the one that is shown first is pinned."""


@dataclass(frozen=True)
class Found:
    """What a machine says of itself."""

    home: str
    system: str
    pythons: tuple[tuple[tuple[int, int], str], ...]
    writable: bool
    free_kb: int | None
    gpus: tuple[str, ...]


def add(asked: Asked) -> Record:
    """Make the machine's folder; nothing is left of it when something is not right. Raises GpuError."""
    try:
        return _add(asked)
    except NotReachable as error:
        where = f"-p {asked.address.port} {asked.address.user}@{asked.address.host}"
        raise NotReachable(error.message, f"Check host and port. Does this work: ssh {where}") from None


def _add(asked: Asked) -> Record:
    machines.check_name(asked.name)
    with machines.locked():
        target = machines.folder(asked.name)
        if (target / "machine.json").exists():
            raise UsageError(
                f"There is a machine {asked.name} already. Nothing was changed.",
                f"gpu forget {asked.name}, then again.",
            )
        _not_rented(asked.name, "Choose another name.")
        shutil.rmtree(target, ignore_errors=True)  # of an add that was killed: it has no record
        durable.have_folder(target)
        try:
            return _enrol(asked, target)
        except BaseException:
            _take_back(asked, target)
            shutil.rmtree(target, ignore_errors=True)
            raise


def _enrol(asked: Asked, target: Path) -> Record:
    make_key(target, asked.name)
    fingerprint = _pin(asked, target)
    with_passphrase = asked.key is not None and _has_passphrase(asked.key)
    if asked.key is None:
        _authorize(asked, target)
    write_config(asked, target, "SSH_AUTH_SOCK" if with_passphrase else None)
    return admit(asked, target, fingerprint, key_in_agent=with_passphrase)


def write_config(asked: Asked, target: Path, agent_socket: str | None = None) -> None:
    """Write the ssh_config by which everything of ours reaches the machine."""
    identity = asked.key.absolute() if asked.key else target / "key"
    text = ssh_config.text(asked.name, asked.address, identity, agent_socket, target)
    durable.replace_whole(target / "ssh_config", text.encode())


def admit(asked: Asked, target: Path, fingerprint: str, *, key_in_agent: bool = False) -> Record:
    """Make a machine that lets us in one of the known ones, with what it says of itself. Raises GpuError."""
    record = Record(
        name=asked.name,
        **asdict(asked.address),
        root="",
        python="",
        worker_python=asked.python,
        key=str(asked.key.absolute()) if asked.key else None,
        key_in_agent=key_in_agent,
        fingerprint=fingerprint,
        added_at=clock.now(),
        system="",
        gpu=None,
        gpus=0,
    )
    with SshMachine(target, Path("/"), "python3") as machine:
        record = _complete(record, machine)
    machines.save(record)
    machines.note(asked.name, True)
    return record


def _take_back(asked: Asked, target: Path) -> None:
    """Take our key off a machine that is not to be added after all, if it was put there."""
    if asked.key is not None or not (target / "ssh_config").exists():
        return
    with contextlib.suppress(GpuError), SshMachine(target, Path("/"), "python3") as machine:
        machine.call(["sh", "-c", _DISMISS], (target / "key.pub").read_bytes(), HANDSHAKE_S)


def make_key(target: Path, name: str, stem: str = "key") -> None:
    """Write a new ed25519 key pair, `<stem>` and `<stem>.pub`, in OpenSSH's format."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    durable.replace_whole(target / stem, private)
    durable.replace_whole(target / f"{stem}.pub", public + f" gpu-{name}\n".encode())


def _pin(asked: Asked, target: Path) -> str:
    """Pin the key that the host shows, which is the one asked for if one was; returns its fingerprint."""
    key = ssh.host_key(asked.address.host, asked.address.port)
    fingerprint = str(key.fingerprint)
    if asked.fingerprint and asked.fingerprint != fingerprint:
        raise ConfigError(
            f"{asked.address.host} shows the host key {fingerprint}, not {asked.fingerprint}. Nothing was sent.",
            "Compare it on the machine itself: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
        )
    line = ssh_config.known_host_line(asked.address, key.get_name(), key.get_base64())
    durable.replace_whole(target / "known_hosts", line.encode())
    return fingerprint


def _has_passphrase(key: Path) -> bool:
    """Whether a key must come from the agent; ConfigError when it cannot be used at all."""
    import paramiko

    ssh.identity(key)
    try:
        paramiko.PKey.from_path(key)
    except (paramiko.PasswordRequiredException, TypeError):
        return True
    return False


def _authorize(asked: Asked, target: Path) -> None:
    """Let the machine's own key in, by whatever key the user has there already."""
    settings = {"hostname": asked.address.host, "port": asked.address.port, "user": asked.address.user}
    own = {**settings, "identityfile": str(target / "key")}
    public = (target / "key.pub").read_bytes()
    client = ssh.connect(settings, target / "known_hosts")
    try:
        _told(client, _AUTHORIZE, public)
        try:
            ssh.connect(own, target / "known_hosts").close()
        except ConfigError:
            _told(client, _DISMISS, public)
            raise ConfigError(
                f"{asked.address.host} lets you in, but not by ~/.ssh/authorized_keys. Nothing was changed there.",
                "Name the key that it takes: gpu add … --key PATH",
            ) from None
    finally:
        client.close()


def _told(client: paramiko.SSHClient, script: str, data: bytes) -> None:
    """Have one of the constant scripts above run there, with data on its standard input."""
    channel = Channel.begun(client, ["sh", "-c", script], "the machine")
    channel.send([data])
    channel.end_input()
    deadline = clock.monotonic() + HANDSHAKE_S
    while channel.read(1 << 16, deadline):
        pass
    if channel.code(deadline) != 0:
        raise ConfigError(f"~/.ssh/authorized_keys there cannot be written: {channel.last_words()}")


def _complete(record: Record, machine: SshMachine) -> Record:
    """The record with what the machine says of itself; ConfigError when it cannot be used."""
    found = probe(machine)
    _check(record, found)
    python = next((path for version, path in found.pythons if version >= _OLDEST), None)
    if record.worker_python:
        version = _version(machine, record.worker_python)
        if version < _OLDEST_WORKER:
            raise ConfigError(f"{record.worker_python} on {record.name} is Python {_dotted(version)}; 3.11 is needed.")
        python = python or record.worker_python
    if python is None:
        newest = max(found.pythons, default=None)
        what = f"only Python {_dotted(newest[0])}" if newest else "no Python 3"
        raise ConfigError(
            f"{record.name} has {what}; its supervisor needs 3.10 or newer. Nothing was changed there.",
            "Install one there, or name one: gpu add … --python PATH",
        )
    return Record(
        **{
            **asdict(record),
            "root": f"{found.home}/.gpu",
            "python": python,
            "system": found.system,
            "gpu": found.gpus[0] if found.gpus else None,
            "gpus": len(found.gpus),
        }
    )


def _check(record: Record, found: Found) -> None:
    if not found.home.startswith("/") or not found.home.isprintable():
        raise ConfigError(f"The home folder on {record.name} has a name that cannot be used: {found.home!r}.")
    if not found.writable:
        raise ConfigError(
            f"{found.home}/.gpu on {record.name} cannot be written: the home folder is read-only, or its disk is full.",
            "Runs are kept there; make it writable.",
        )
    if found.free_kb is not None and found.free_kb < _FREE_MIN_KB:
        raise ConfigError(
            f"Only {found.free_kb // 1000} MB are free in {found.home} on {record.name}.", "Free some space there."
        )


def _version(machine: SshMachine, python: str) -> tuple[int, int]:
    try:
        major, minor = machine.call([python, "-I", "-c", _VERSION], b"").split(b".")
        return int(major), int(minor)
    except (BadAnswer, ValueError):
        raise ConfigError(f"{python} on {machine.name} is no Python that runs.", "Check --python.") from None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def probe(machine: SshMachine) -> Found:
    """Ask a machine what it has: home, Pythons, GPUs, space. Raises GpuError."""
    pairs = [
        line.partition("=") for line in machine.call(["sh", "-c", _PROBE], b"").decode("utf-8", "replace").split("\n")
    ]
    told = {name: value for name, _, value in pairs}
    if told.get("end") != "yes":
        raise BadAnswer(f"{machine.name} did not say what it has: {str(told)[:200]}")
    pythons = []
    for name, _, value in pairs:
        numbers, _, path = value.partition(" ")
        major, _, minor = numbers.partition(".")
        if name == "python" and major.isdigit() and minor.isdigit():
            pythons.append(((int(major), int(minor)), path))
    free = told.get("free_kb", "")
    return Found(
        home=told.get("home", ""),
        system=told.get("system", ""),
        pythons=tuple(pythons),
        writable=told.get("writable") == "yes",
        free_kb=int(free) if free.isdigit() else None,
        gpus=tuple(value for name, _, value in pairs if name == "gpu" and value),
    )


def _not_rented(name: str, hint: str) -> None:
    """Raise UsageError while a rented machine bears the name: its record is what it is given back by."""
    rental = rentals.find(name)
    if rental is not None and rental.record.state not in rentals.ENDED:
        raise UsageError(f"{name} is rented, and may cost money: it is not forgotten. Nothing was changed.", hint)


def forget(name: str) -> str:
    """Undo `add`: take our key off the machine if it answers, and delete the folder. Returns what is left, in words."""
    record = machines.load(name)
    left = ""
    with machines.locked():
        _not_rented(name, f"Give it back: gpu terminate {name}")
        if record.key is None:
            try:
                with machines.at(name) as machine:
                    machine.call(["sh", "-c", _DISMISS], (machines.folder(name) / "key.pub").read_bytes(), HANDSHAKE_S)
            except GpuError as error:
                left = f"Our key could not be taken off {name}: {error.message} It ends in gpu-{name}."
        machines.remove(name)
    return left

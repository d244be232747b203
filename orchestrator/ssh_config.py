"""The address of a machine, and the ssh_config and known_hosts lines that lead there and nowhere else."""

from __future__ import annotations

import binascii
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from jobs import rundir
from orchestrator.errors import ConfigError, UsageError

SSH_PORT = 22
USERS_AGENT = "SSH_AUTH_SOCK"
"""What ssh_config calls the agent that the environment names."""
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_HOST_MAX = 253
_PORT = re.compile(r"[0-9]{1,5}")
_KEY_TYPE = re.compile(r"[a-z0-9][a-z0-9@.-]{0,63}")
_TARGET = re.compile(r"([^@]*)@(\[[^\[\]]*\]|[^:\[\]]*)(?::(.*))?", re.DOTALL)
_EXPECTED = (
    "Expected USER@HOST or USER@HOST:PORT, such as ubuntu@203.0.113.7:2222; IPv6 in brackets: root@[2001:db8::1]."
)
_FIXED = """\
  IdentitiesOnly {only}
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  UpdateHostKeys no
  CheckHostIP no
  HashKnownHosts no
  ForwardAgent no
  ForwardX11 no
  ControlMaster no
  ControlPath none
  PermitLocalCommand no
  PreferredAuthentications publickey
  PasswordAuthentication no
  KbdInteractiveAuthentication no
  ServerAliveInterval 10
  ServerAliveCountMax 3
  ConnectTimeout 10
  TCPKeepAlive yes
  Compression no
  LogLevel ERROR
  RequestTTY auto
"""


@dataclass(frozen=True)
class Address:
    """Where a machine is logged in to. One that ssh could misread cannot be made: ConfigError."""

    user: str
    host: str
    """A name in lower case, or an IP address; IPv6 without brackets."""
    port: int = SSH_PORT

    def __post_init__(self) -> None:
        wrong = self._wrong()
        if wrong:
            raise ConfigError(f"{_shown(wrong[1])} is not a {wrong[0]} that can be used to log in.", _EXPECTED)

    def _wrong(self) -> tuple[str, object] | None:
        """Name and value of a part that cannot be used; fields may come from a file, so types are looked at."""
        if not isinstance(self.user, str) or not _USER.fullmatch(self.user):
            return "user name", self.user
        if not isinstance(self.host, str) or _host(self.host) is None or self.host != self.host.lower():
            return "host", self.host
        if type(self.port) is not int or not 1 <= self.port <= 65535:
            return "port", self.port
        return None

    def __str__(self) -> str:
        """The address as `parse` takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}" + (f":{self.port}" if self.port != SSH_PORT else "")


def parse(text: str) -> Address:
    """The address that USER@HOST[:PORT] stands for, its host in lower case. Raises UsageError."""
    found = _TARGET.fullmatch(text)
    if not found:
        raise UsageError(f"{_shown(text)} is not an address.", _EXPECTED)
    user, host, port = found.groups()
    bracketed = host.startswith("[")
    known = _host(host.strip("[]"))
    if known is None or bracketed != (":" in known):
        raise UsageError(f"{_shown(text)} has no usable host: {_shown(host)}.", _EXPECTED)
    if port is not None and not (_PORT.fullmatch(port) and 1 <= int(port) <= 65535):
        raise UsageError(f"{_shown(text)} has no usable port: {_shown(port)} is not in 1 to 65535.", _EXPECTED)
    try:
        return Address(user, known, int(port or SSH_PORT))
    except ConfigError as error:
        raise UsageError(error.message, _EXPECTED) from None


def _host(written: str) -> str | None:
    """The host as it is compared, None when it is none. What has digits and dots alone must be an IPv4 address."""
    if ":" in written or not written.strip("0123456789."):
        try:
            return None if "%" in written else str(ipaddress.ip_address(written))
        except ValueError:
            return None
    fits = len(written) <= _HOST_MAX and all(_LABEL.fullmatch(label) for label in written.split("."))
    return written.lower() if fits else None


def _shown(value: object) -> str:
    """What came from outside, harmless and short enough for a message."""
    return ascii(value)[:100]


def alias(name: str) -> str:
    """What `ssh` calls a machine. Raises ConfigError for a name that would be a pattern, or a path elsewhere."""
    if not rundir.is_safe_name(name):
        raise ConfigError(f"{_shown(name)} cannot be the name of a machine.", "Use letters, digits, dot, dash.")
    return f"gpu-{name}"


def text(name: str, address: Address, identity: Path | None, agent_socket: str | None, folder: Path) -> str:
    """The ssh_config of one machine, whose known_hosts lies in `folder`.

    `agent_socket` is a path, or the word SSH_AUTH_SOCK for whatever agent the user has when ssh is run. Without an
    identity ssh takes the user's usual keys, and what the agent holds. Raises ConfigError for a path that ssh_config
    cannot express.
    """
    lines = [f"Host {alias(name)}", f"  HostName {address.host}", f"  Port {address.port}", f"  User {address.user}"]
    if identity is not None:
        lines.append(f"  IdentityFile {_quoted(identity)}")
    lines.append(f"  IdentityAgent {_agent(agent_socket)}")
    lines.append(f"  UserKnownHostsFile {_quoted(folder / 'known_hosts')}")
    agent_alone = identity is None and agent_socket is not None
    return "\n".join(lines) + "\n" + _FIXED.format(only="no" if agent_alone else "yes")


def check_path(path: Path) -> str:
    """The path as text, when every ssh reads it alike once quoted; ConfigError else."""
    shown = str(path)
    if not path.is_absolute() or not shown.isprintable() or any(sign in shown for sign in ('"', "\\", "${")):
        raise ConfigError(
            f"The path {_shown(shown)} cannot stand in an ssh_config: it must be absolute, without double quotes, "
            "backslashes, control characters or ${.",
            "Move the file, or set GPU_HOME to a folder with a plainer name.",
        )
    return shown


def _agent(socket: str | None) -> str:
    if socket is None:
        return "none"
    return socket if socket == USERS_AGENT else _quoted(Path(socket))


def _quoted(path: Path) -> str:
    return '"' + check_path(path).replace("%", "%%") + '"'


def settings(written: str) -> dict[str, str]:
    """What a text made by `text` says, by keyword in lower case, paths as they were given.

    paramiko's reader does not undo `%%`, and puts the home folder wherever a path has a `~`.
    """
    found: dict[str, str] = {}
    for line in written.splitlines():
        keyword, _, value = line.strip().partition(" ")
        if value.startswith('"'):
            value = value.strip('"').replace("%%", "%")
        if keyword and not keyword.startswith("#"):
            found.setdefault(keyword.lower(), value)
    return found


def known_host_line(address: Address, key_type: str, base64: str) -> str:
    """The line of known_hosts, without its newline, that pins this key; ConfigError when it is none of that type."""
    try:
        blob = binascii.a2b_base64(base64.encode("ascii"), strict_mode=True)
    except ValueError:  # what binascii and the encoder raise are kinds of it
        blob = b""
    fields = _fields(blob)
    if not _KEY_TYPE.fullmatch(key_type) or len(fields) < 2 or fields[0] != key_type.encode():
        raise ConfigError(
            f"{_shown(address.host)} showed something that is no host key of type {_shown(key_type)}. "
            "It was not written down."
        )
    host = address.host if address.port == SSH_PORT else f"[{address.host}]:{address.port}"
    return f"{host} {key_type} {base64}"


def _fields(blob: bytes) -> list[bytes]:
    """The fields of a public key as SSH packs them: type, then numbers; empty when it is not packed so, or is cut."""
    fields, at = [], 0
    while at < len(blob):
        end = at + 4 + int.from_bytes(blob[at : at + 4], "big")
        fields.append(blob[at + 4 : end])
        at = end
    return fields if at == len(blob) else []

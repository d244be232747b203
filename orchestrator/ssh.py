"""A machine over SSH: hardened connections, commands as words, a deadline on everything, bulk by rsync."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import agents, bulk, clock, ssh_config
from orchestrator.channel import HANDSHAKE_S, Channel
from orchestrator.errors import BadAnswer, ConfigError, HostKeyChanged, LoginRefused, NotReachable
from orchestrator.transport import CALL_DEADLINE_S, Data

if TYPE_CHECKING:
    import paramiko

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # what it logs, our errors say
CONNECT_S = 10.0
"""For the TCP connection alone; the handshake has its own."""
_DEAD_PEER_MS = 15_000
_KEEPALIVE_S = (5, 5, 3)
"""Idle seconds, seconds between probes, probes: a silent peer is noticed within 20 s."""
_CHANNELS_MAX = 6
_BROKE_OFF = ("transport shut down", "timeout")
"""What paramiko calls an authentication that failed, but was never answered. Of a single key: with several, a server
that has seen enough of them ends so too."""
_TRIES = 3
_DROPPED_WITHIN_S = 5.0
"""A busy server drops a connection at once; one that takes longer to say nothing is not asked again."""
_CHUNK_BYTES = 1 << 16


def connect(settings: dict[str, Any], known_hosts: Path) -> paramiko.SSHClient:
    """A connection to what one machine's ssh_config says, to a host whose key is pinned; the caller closes it.

    Without an `identityfile` among the settings, every key that the user's agent and ~/.ssh hold is offered.
    Raises NotReachable, HostKeyChanged, or ConfigError when the machine does not let us in.
    """
    import paramiko

    host, port = settings["hostname"], int(settings.get("port", 22))
    client = paramiko.SSHClient()
    try:
        _load_pinned(client, known_hosts)
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        key = identity(Path(settings["identityfile"])) if "identityfile" in settings else None
        client.connect(
            host,
            port=port,
            username=settings["user"],
            pkey=key,
            sock=open_socket(host, port),
            allow_agent=key is None,
            look_for_keys=key is None,
            banner_timeout=HANDSHAKE_S,
            auth_timeout=HANDSHAKE_S,
            channel_timeout=HANDSHAKE_S,
        )
    except paramiko.BadHostKeyException as error:
        client.close()
        raise HostKeyChanged(*_changed(host, error.key.fingerprint, error.expected_key.fingerprint)) from None
    except paramiko.AuthenticationException as error:
        client.close()
        if key is not None and any(sign in str(error) for sign in _BROKE_OFF):
            raise NotReachable(_no_server(host, port, "it broke off during the login")) from None
        raise LoginRefused(*_refused(settings, error)) from None
    except (paramiko.SSHException, OSError, EOFError) as error:
        client.close()
        if "No authentication methods" in str(error):
            raise LoginRefused(*_refused(settings, "there is none.")) from None
        if "not found in known_hosts" in str(error):
            raise HostKeyChanged(*_changed(host, "a key of another kind", "the one pinned")) from None
        raise NotReachable(_no_server(host, port, error)) from None
    except BaseException:
        client.close()
        raise
    return client


def _no_server(host: str, port: int, why: object) -> str:
    return f"{host} port {port} does not answer as an SSH server: {str(why) or 'it hung up'}."


def _load_pinned(client: paramiko.SSHClient, known_hosts: Path) -> None:
    """Have the client know the pinned host key; ConfigError when it cannot be read."""
    from paramiko.hostkeys import InvalidHostKey

    try:
        client.load_host_keys(str(known_hosts))
    except (OSError, ValueError, InvalidHostKey):
        raise ConfigError(
            f"{known_hosts}, which holds the pinned host key, is damaged or gone. Nothing was sent.",
            "Forget the machine and add it again: gpu forget NAME. Runs at home are kept.",
        ) from None


def host_key(host: str, port: int) -> paramiko.PKey:
    """The key that a host shows: for the first contact only, before anything is sent. Raises NotReachable."""
    import paramiko

    transport = paramiko.Transport(open_socket(host, port))
    try:
        transport.start_client(timeout=HANDSHAKE_S)
        return transport.get_remote_server_key()
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise NotReachable(_no_server(host, port, error)) from None
    finally:
        transport.close()


def _changed(host: str, now: str, pinned: str) -> tuple[str, str]:
    return (
        f"{host} shows another host key than before: {now}, where {pinned} was pinned. It may be another machine, or "
        "someone between. Nothing was sent.",
        "If it was installed anew and you know why: gpu forget NAME, then gpu add it again. Runs at home are kept.",
    )


def _refused(settings: dict[str, Any], error: object) -> tuple[str, str]:
    where = f"{settings['user']}@{settings['hostname']}"
    key = settings.get("identityfile", "of your agent or ~/.ssh")
    return (
        f"{where} does not accept the key {key}: {error} Nothing was sent.",
        "Check the user name, and that the key's public half stands in ~/.ssh/authorized_keys there.",
    )


def identity(path: Path) -> paramiko.PKey:
    """The private key in a file, or, when that has a passphrase, the same key held by the user's agent."""
    import paramiko
    from paramiko.pkey import UnknownKeyType

    try:
        return paramiko.PKey.from_path(path)
    except (paramiko.PasswordRequiredException, TypeError):  # it has a passphrase
        held = from_agent(path)
    except (OSError, ValueError, paramiko.SSHException, UnknownKeyType) as error:
        raise ConfigError(f"{path} is not a private key that can be read: {error}.", "Check the path.") from None
    if held is None:
        raise ConfigError(
            f"The key {path} has a passphrase, and no SSH agent holds it.", f"Give it to your agent: ssh-add {path}"
        )
    return held


def from_agent(path: Path) -> paramiko.PKey | None:
    """The key of that file as the user's agent holds it; None when there is no agent, or it has another one."""
    import paramiko

    wanted = bulk.fingerprint(path)
    with contextlib.suppress(paramiko.SSHException, OSError):
        agent = paramiko.Agent()
        for key in agent.get_keys():
            if key.fingerprint == wanted:
                return key
        agent.close()
    return None


def open_socket(host: str, port: int) -> socket.socket:
    """A TCP connection that sends at once and notices a dead peer within 20 s. Raises NotReachable."""
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_S)
    except (OSError, UnicodeError) as error:
        why = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
        raise NotReachable(f"{host} port {port} cannot be reached: {why}.") from None
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    names = ("TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    for name, value in (*zip(names, _KEEPALIVE_S, strict=True), ("TCP_USER_TIMEOUT", _DEAD_PEER_MS)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    for option in options:
        connection.setsockopt(*option)
    return connection


class SshMachine:
    """A machine that is spoken to over SSH; each thread has a connection of its own. A context manager."""

    patience_s = 600.0

    def __init__(self, folder: Path, root: Path, python: str, is_gone: Callable[[], bool] = lambda: False) -> None:
        self.name = folder.name
        self.folder = folder
        self.root = root
        self.python = python
        self.is_gone = is_gone
        self._mine = threading.local()
        self._all: list[paramiko.SSHClient] = []
        self._given_up = threading.Event()
        self._slots = threading.BoundedSemaphore(_CHANNELS_MAX)

    def __enter__(self) -> SshMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; the next call opens a new one."""
        while self._all:
            self._all.pop().close()
        self._mine = threading.local()

    def cut(self) -> None:
        """See Machine."""
        self._given_up.set()
        self.close()

    def settings(self) -> dict[str, Any]:
        """What this machine's own ssh_config says."""
        return dict(ssh_config.settings((self.folder / "ssh_config").read_text(encoding="utf-8")))

    def _connected(self) -> paramiko.Transport:
        if self._given_up.is_set():
            raise NotReachable(f"What went on with {self.name} was given up.")
        client: paramiko.SSHClient | None = getattr(self._mine, "client", None)
        transport = client.get_transport() if client else None
        if transport is None or not transport.is_active():
            self._drop()
            client = _patiently(lambda: connect(self.settings(), self.folder / "known_hosts"))
            self._mine.client = client
            self._all.append(client)
            transport = client.get_transport()
        assert transport is not None
        return transport

    def _drop(self) -> None:
        client = getattr(self._mine, "client", None)
        if client:
            self._mine.client = None
            with contextlib.suppress(ValueError):
                self._all.remove(client)
            client.close()

    @contextlib.contextmanager
    def _running(self, words: list[str]) -> Iterator[Channel]:
        """A command that runs; its channel is closed when the block is left, the connection too if it went wrong."""
        with self._slots:
            channel = self._begun(words)
            try:
                yield channel
            except NotReachable:
                self._drop()
                raise
            finally:
                channel.close()

    def _begun(self, words: list[str]) -> Channel:
        import paramiko

        try:
            return Channel(self._connected().open_session(timeout=HANDSHAKE_S), words, self.name)
        except (paramiko.SSHException, EOFError, OSError) as error:
            self._drop()
            raise NotReachable(f"The connection to {self.name} was lost: {error or 'it hung up'}.") from None

    def call(self, words: list[str], data: Data, deadline_s: float = CALL_DEADLINE_S) -> bytes:
        """See Machine. Commands may be repeated: when an old connection turns out dead, a new one is tried once."""
        old = getattr(self._mine, "client", None) is not None
        try:
            return self._call(words, _pieces(data), deadline_s)
        except BadAnswer:
            raise
        except NotReachable:
            if not old:
                raise
        return self._call(words, _pieces(data), deadline_s)

    def _call(self, words: list[str], pieces: Iterable[bytes], deadline_s: float) -> bytes:
        with self._running(words) as channel:
            channel.send(pieces)
            channel.end_input()
            deadline = clock.monotonic() + deadline_s
            said = []
            while chunk := channel.read(_CHUNK_BYTES, deadline):
                said.append(chunk)
            code = channel.code(deadline)
            if code != 0:
                raise BadAnswer(f"A command on {self.name} ended with exit code {code}: {channel.last_words()}")
        return b"".join(said)

    @contextlib.contextmanager
    def open(self, words: list[str], data: bytes) -> Iterator[Channel]:
        """See Machine."""
        with self._running(words) as channel:
            channel.send([data])
            yield channel

    def push_agent(self, store: Path, name: str) -> None:
        """See Machine."""
        words = [self.python, "-I", "-c", agents.unpacker(), str(self.root / "agent" / name), name]
        if self.call(words, b"") == b"whole\n":
            return
        if self.call(words, agents.packed(store, name)) != b"whole\n":
            raise NotReachable(f"The worker's code did not arrive whole on {self.name}.")

    def push_files(self, files: list[tuple[Path, str]], progress: Callable[[int], None]) -> None:
        """See Machine. By rsync, which carries on with what an earlier try left; without it, over our own channel."""
        incoming = self.root / "store" / "incoming"
        self.call(["sh", "-c", 'umask 077; exec mkdir -p "$1"', "sh", str(incoming)], b"")
        if bulk.can_rsync(incoming) and self._has_rsync():
            with contextlib.suppress(bulk.Unclean):
                target = bulk.Target(self.folder / "ssh_config", f"gpu-{self.name}", incoming, self._given_up.is_set)
                bulk.push(target, files, progress)
                return
        before = 0
        for source, name in files:
            self._push_slowly(source, incoming / name, _from(before, progress))
            before += source.stat().st_size

    def _has_rsync(self) -> bool:
        return self.call(["sh", "-c", "command -v rsync >/dev/null && echo yes || echo no"], b"") == b"yes\n"

    def _push_slowly(self, source: Path, target: Path, progress: Callable[[int], None]) -> None:
        """Append to what is there already; whether it is the right content is for the hash to say."""
        here = int(self.call(["sh", "-c", 'cat -- "$1" 2>/dev/null | wc -c', "sh", str(target)], b"") or 0)
        pieces = bulk.pieces(source, here if here <= source.stat().st_size else 0, progress)
        redirect = 'umask 077; exec cat >> "$1"' if here <= source.stat().st_size else 'umask 077; exec cat > "$1"'
        self._call(["sh", "-c", redirect, "sh", str(target)], pieces, CALL_DEADLINE_S)


def _from(before: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    """Progress of one file among several: `before` bytes of others were sent already."""
    return lambda sent: progress(before + sent)


def _pieces(data: Data) -> Iterable[bytes]:
    return [data] if isinstance(data, bytes) else data()


def _patiently(attempt: Callable[[], paramiko.SSHClient]) -> paramiko.SSHClient:
    """A connection, tried a few times: a busy server drops some of many that begin at once (MaxStartups)."""
    began = clock.monotonic()
    for tried in range(1, _TRIES + 1):
        try:
            return attempt()
        except NotReachable as error:
            is_slow = clock.monotonic() - began > _DROPPED_WITHIN_S
            if tried == _TRIES or is_slow or "as an SSH server" not in error.message:
                raise
        time.sleep(random.uniform(0.1, 0.5) * tried)  # noqa: S311 -- jitter, not a secret
    raise AssertionError("the last try returns or raises")

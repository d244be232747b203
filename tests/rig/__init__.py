"""Machines over SSH for tests, with the faults that real ones have: `Sshd`, the `Proxy` before one, and the `Wire`."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.rig import netns, sshd
from tests.rig.netns import Wire as Wire
from tests.rig.proxy import Proxy as Proxy
from tests.rig.proxy import Reachable as Reachable
from tests.rig.proxy import free_address
from tests.rig.sshd import Sshd as Sshd

_DEADLINE_S = 10.0
_DAEMON = """
import os
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
for number in range(3): os.close(number)
if os.fork() == 0: os.execve("/bin/sleep", ["sleep", "300"], {})
os.execvp("sleep", ["sleep", "300"])
"""


@dataclass
class Place:
    """An address to connect to."""

    address: str
    port: int


def need_sshd() -> None:
    """Skip the test, saying what to type, where there is no sshd or no /proc to find its processes in."""
    if sshd.sshd_program() is None:
        pytest.skip("no sshd here. Type: apt-get install openssh-server")
    if not Path("/proc/self/environ").exists():
        pytest.skip("the machines of the rig are followed through /proc, which only Linux has")


def need_wires() -> None:
    """Skip the test, saying why, where there can be no network namespaces."""
    need_sshd()
    if reason := netns.why_not():
        pytest.skip(reason)


def machine_room(tmp_path: Path) -> Iterator[Callable[..., Sshd]]:
    """A fixture: makes started machines, `make(name="m1", **options of Sshd)`; at the end nothing of them is alive."""
    need_sshd()
    with contextlib.ExitStack() as room:

        def make(name: str = "m1", **options: Any) -> Sshd:
            return room.enter_context(Sshd(tmp_path / "machines" / name, **options))

        yield make


def proxies() -> Iterator[Callable[[Reachable], Proxy]]:
    """A fixture: makes started proxies, `make(target)`; at the end their threads have ended."""
    with contextlib.ExitStack() as room:
        yield lambda target: room.enter_context(Proxy(target))


def wires(tmp_path: Path) -> Iterator[Callable[..., Wire]]:
    """A fixture: makes machines on wires of their own, `make(name="w1")`; at the end nothing of them is left."""
    need_wires()
    with contextlib.ExitStack() as room:
        yield lambda name="w1": room.enter_context(Wire(tmp_path / "wires" / name))


def talkers() -> Iterator[Callable[[bytes], Place]]:
    """A fixture: makes servers that send `data`, read until their client ends, send what they read, and end."""
    with contextlib.ExitStack() as room:

        def make(data: bytes) -> Place:
            place = Place(*free_address())
            listener = socket.create_server((place.address, place.port))
            thread = threading.Thread(target=_answer_all, args=(listener, data))
            thread.start()
            room.callback(thread.join, _DEADLINE_S)
            room.callback(listener.close)
            room.callback(listener.shutdown, socket.SHUT_RDWR)
            return place

        yield make


def _answer_all(listener: socket.socket, data: bytes) -> None:
    """Serve every client of `listener` until that is shut, then wait for those that are still served."""
    threads = []
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            break
        threads.append(threading.Thread(target=_answer, args=(client, data)))
        threads[-1].start()
    for thread in threads:
        thread.join(_DEADLINE_S)


def _answer(client: socket.socket, data: bytes) -> None:
    client.settimeout(_DEADLINE_S)
    heard = b""
    with client, contextlib.suppress(OSError):
        client.sendall(data)
        while piece := client.recv(1 << 16):
            heard += piece
        client.sendall(heard)


def open_to(end: Reachable, timeout_s: float = _DEADLINE_S) -> socket.socket:
    """A connection to `end`; the timeout holds for its reads as well."""
    return socket.create_connection((end.address, end.port), timeout_s)


def read_all(connection: socket.socket) -> tuple[int, str]:
    """How many bytes came, and how it ended: "fin" or "rst"."""
    count = 0
    try:
        while piece := connection.recv(1 << 16):
            count += len(piece)
    except ConnectionResetError:
        return count, "rst"
    return count, "fin"


def has_banner(end: Reachable, timeout_s: float = _DEADLINE_S) -> bool:
    """Whether an SSH server speaks there; TimeoutError when nothing at all is said."""
    with open_to(end, timeout_s) as connection:
        return connection.recv(64).startswith(b"SSH-")


def push(connection: socket.socket, data: bytes) -> None:
    """Send all of `data` and end our side, or as much as the other side takes."""
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def echo(connection: socket.socket, data: bytes) -> bytes:
    """What comes back for `data`, read while it is sent."""
    sender = threading.Thread(target=push, args=(connection, data))
    sender.start()
    answer = b""
    while piece := connection.recv(1 << 16):
        answer += piece
    sender.join(_DEADLINE_S)
    return answer


@contextlib.contextmanager
def open_call(machine: Sshd, command: str = "read word; echo $word") -> Iterator[subprocess.Popen[bytes]]:
    """A call with unbuffered pipes that runs there by now; it is killed when the block is left."""
    from tests.waiting import until

    before = len(machine.processes())
    pipe = subprocess.PIPE
    words = machine.ssh_words(command)
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as child:
        try:
            until(lambda: len(machine.processes()) > before, _DEADLINE_S)
            yield child
        finally:
            child.kill()


def start_daemon(machine: Sshd) -> None:
    """Start two `sleep 300` there, in a session of their own: a daemon, and its child without environment."""
    from tests.waiting import until

    done = machine.run(shlex.join(["python3", "-c", _DAEMON]))
    assert done.returncode == 0, done.stderr
    until(lambda: [it.words for it in machine.processes()] == [["sleep", "300"]] * 2, _DEADLINE_S)

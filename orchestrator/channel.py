"""One command on an SSH connection: words joined once, a mark before its output, deadlines on every read."""

from __future__ import annotations

import contextlib
import math
import secrets
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from orchestrator import clock
from orchestrator.errors import ConfigError, NotReachable
from orchestrator.transport import last_line

if TYPE_CHECKING:
    import paramiko

HANDSHAKE_S = 15.0
"""For everything a server owes us before a command runs."""
_PROGRESS_S = 30.0
"""Sending stops being patient when nothing was taken for this long."""
_NOISE_MAX_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16


class Channel:
    """One command on a connection; what a login file prints before it is passed over."""

    def __init__(self, channel: paramiko.Channel, words: list[str], where: str) -> None:
        self._channel = channel
        self._where = where
        self._mark = f"gpu-{secrets.token_hex(8)}\n".encode()
        self._buffer = b""
        self._begun = False
        channel.exec_command(_line(self._mark, words))

    @classmethod
    def begun(cls, client: paramiko.SSHClient, words: list[str], where: str) -> Channel:
        """A command begun on a connection."""
        transport = client.get_transport()
        assert transport is not None
        return cls(transport.open_session(timeout=HANDSHAKE_S), words, where)

    def send(self, pieces: Iterable[bytes]) -> None:
        """Send all of it, patient for as long as some of it is taken."""
        self._channel.settimeout(_PROGRESS_S)
        try:
            for piece in pieces:
                self._channel.sendall(piece)
        except TimeoutError:
            raise NotReachable(f"{self._where} takes no data any more.") from None
        except (OSError, EOFError):  # the command ended, or the connection did: what it said tells which
            return

    def end_input(self) -> None:
        """Let the command see the end of its input."""
        with contextlib.suppress(OSError, EOFError):
            self._channel.shutdown_write()

    def read(self, size: int, deadline: float) -> bytes:
        """See Stream."""
        until = min(deadline, clock.monotonic() + HANDSHAKE_S)  # login files have no more time than a server's greeting
        while not self._begun:
            self._begin(until)
        if self._buffer:
            head, self._buffer = self._buffer[:size], self._buffer[size:]
            return head
        return self._receive(size, deadline)

    def read_error(self, size: int) -> bytes:
        """What the command writes to its standard error, b"" at the end; waits for it."""
        self._channel.settimeout(None)
        return self._channel.recv_stderr(size)

    def _begin(self, deadline: float) -> None:
        """Pass over everything before our mark."""
        _, mark, rest = self._buffer.partition(self._mark)
        if mark:
            self._buffer, self._begun = rest, True
            return
        chunk = self._receive(_CHUNK_BYTES, deadline)
        self._buffer += chunk
        if chunk and len(self._buffer) < _NOISE_MAX_BYTES:
            return
        if not chunk:
            self.code(deadline)  # raises when the connection was lost
        noise = self._buffer[: self._buffer.rfind(b"\n")] if chunk else self._buffer  # of a flood: the last whole line
        said = last_line(noise[-_CHUNK_BYTES:] + b"\n" + self._complaint()) or "nothing"
        raise ConfigError(
            f"The login shell of {self._where} ended, or goes on talking, before the command ran. It said: {said}",
            "The account needs a shell that runs commands, and login files (.bashrc) without tmux, exec or exit there.",
        )

    def _receive(self, size: int, deadline: float) -> bytes:
        self._channel.settimeout(None if math.isinf(deadline) else max(deadline - clock.monotonic(), 0.001))
        try:
            return self._channel.recv(size)
        except TimeoutError:
            raise NotReachable(f"{self._where} fell silent.") from None

    def code(self, deadline: float) -> int:
        """The exit code of the command, which has closed its output; NotReachable when the connection was lost."""
        ended = self._channel.status_event.wait(
            None if math.isinf(deadline) else max(deadline - clock.monotonic(), 0.001)
        )
        if not ended or self._channel.exit_status == -1:
            raise NotReachable(f"The connection to {self._where} was lost.")
        return int(self._channel.exit_status)

    def last_words(self) -> str:
        """See Stream."""
        return last_line(self._complaint())

    def close(self) -> None:
        """End the command's input and output; it is told by the end of its input."""
        with contextlib.suppress(OSError, EOFError):  # the connection may be gone
            self._channel.close()

    def _complaint(self) -> bytes:
        said = b""
        while self._channel.recv_stderr_ready() and len(said) < _NOISE_MAX_BYTES:
            said += self._channel.recv_stderr(_CHUNK_BYTES)
        return said


def _line(mark: bytes, words: list[str]) -> str:
    """The one line a remote shell is given: the mark, then the words in its place, each quoted."""
    return f"printf '%s\\n' {mark.decode().strip()} && exec {shlex.join(words)}"

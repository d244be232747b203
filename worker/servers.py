"""A model server started for a run: on a free port here, waited for until it answers, watched, and ended whole."""

from __future__ import annotations

import collections
import contextlib
import http.client
import os
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from jobs import durable
from jobs.engines import KEY_VARIABLE
from worker import devices
from worker.failures import ConfigFailure, EngineDied
from worker.offspring import Offspring

LOG_MAX_BYTES = 512 << 10
"""How much of what a server says is written as it comes; of what follows, the end is added when the server ends."""
TAIL_BYTES = 64 << 10
GRACE_S = 5.0
"""How long a server has to end by itself; less than a stopped worker has."""
HEALTH = ("/health", "/v1/models")
"""Asked in turn: vLLM and llama.cpp have the first, Ollama and mlx the second."""
_LOOK_S = 0.1
_ANSWER_S = 5.0
_WORDS_SHOWN = 15
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Command:
    """How a server is started: its words with `{port}`, `{model}` and others in them, and how long that may take."""

    text: str
    fill: Mapping[str, str]
    timeout_s: float

    def words(self, port: int) -> list[str]:
        """The words, each place in them filled; no shell ever reads them."""
        try:
            words = shlex.split(self.text)
        except ValueError as error:
            raise ConfigFailure(f"server={self.text!r} is no list of words: {error}.") from None
        for name, value in {**self.fill, "port": str(port)}.items():
            words = [word.replace(f"{{{name}}}", value) for word in words]
        return words


class Server:
    """A server from its start to its end. A context manager; `url` is where it answers."""

    def __init__(self, command: Command, log: Path, say: Callable[[str], None]) -> None:
        self._command = command
        self._say = say
        self._log = Log(log)
        self._devices: list[str] = []
        self._before: dict[str, int] = {}
        self.url = ""

    def __enter__(self) -> Server:
        """Start it and wait until it answers. ConfigFailure when it cannot be started, EngineDied when it ends or is
        not ready in time; nothing of it is left then.
        """
        self._before, self._devices = devices.memory_used(), devices.visible()
        port = _free_port()
        words = self._command.words(port)
        env = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
        self._say(f"starting the server: {shlex.join(words)}")
        try:
            self._offspring = Offspring(
                words, env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise ConfigFailure(
                f"The server {words[0]!r} cannot be started: {error.strerror}.", "Check the parameter server."
            ) from None
        self.url = f"http://{_HOST}:{port}/v1"
        try:
            assert self._offspring.process.stdout is not None
            self._log.follow(self._offspring.process.stdout)
            self._wait(port)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def check(self) -> None:
        """Raise EngineDied when it has ended."""
        if how := self._offspring.how_it_ended():
            raise EngineDied(
                f"The server {how}. Rows so far are kept. Its last words:\n{self._log.tail()}",
                "Mend that (its log: server.log of the attempt), then resume the run.",
            )

    def stop(self) -> str:
        """End it with all it started, and wait until the GPUs hold no more than before; words about what is left."""
        left = self._offspring.end(GRACE_S)
        self._log.close()
        said = devices.free_again(self._devices, self._before, self._offspring.pids, lambda: None)
        if left:
            said = f"Processes of the server that would not die: {left}. {said}".strip()
        if said:
            self._say(said)
        return said

    def _wait(self, port: int) -> None:
        began, deadline = time.monotonic(), time.monotonic() + self._command.timeout_s
        while not any(_answers(port, path) for path in HEALTH):
            self.check()
            if time.monotonic() >= deadline:
                raise EngineDied(
                    f"The server did not answer within {self._command.timeout_s:g} s, and was ended. "
                    f"Its last words:\n{self._log.tail()}",
                    "Look into server.log of the attempt; a large model may need more time: --set server_timeout_s=…",
                )
            time.sleep(_LOOK_S)
        self.check()  # what answers may be a stranger on the same port
        self._say(f"the server answers after {time.monotonic() - began:.1f} s")


class Log:
    """What a server says, as a file that only grows: its beginning as it comes, and once it is over its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tail: collections.deque[bytes] = collections.deque()
        self._held = 0
        self._written = 0
        self._left_out = 0
        self._thread: threading.Thread | None = None

    def follow(self, source: IO[bytes]) -> None:
        """Take all that comes from a pipe until its end, in a thread, so that whoever writes is never held up."""
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._thread = threading.Thread(target=self._take, args=(source, file), name="server-log", daemon=True)
        self._thread.start()

    def tail(self) -> str:
        """The last lines it said."""
        text = b"".join(list(self._tail)).decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-_WORDS_SHOWN:]) or "none"

    def close(self) -> None:
        """Wait for the end of what is said, for a while, and add what was left out."""
        if self._thread is not None:
            self._thread.join(_ANSWER_S)

    def _take(self, source: IO[bytes], file: int) -> None:
        with source, os.fdopen(file, "wb", 0):
            while data := os.read(source.fileno(), 1 << 16):
                self._remember(data)
                if self._written < LOG_MAX_BYTES:
                    self._write(file, data)
                else:
                    self._left_out += len(data)
            if self._left_out:
                end = b"".join(self._tail)[-min(self._left_out, TAIL_BYTES) :]
                self._write(file, b"\n[%d bytes left out]\n" % max(self._left_out - TAIL_BYTES, 0) + end)

    def _remember(self, data: bytes) -> None:
        self._tail.append(data)
        self._held += len(data)
        while self._held - len(self._tail[0]) >= TAIL_BYTES:
            self._held -= len(self._tail.popleft())

    def _write(self, file: int, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk is noticed by the rows
            durable.write_all(file, data)
        self._written += len(data)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int, path: str) -> bool:
    """Whether what listens there says that it is well."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=_ANSWER_S)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        answer.read()  # or the server may see its client break off, and fill its log with that
        return answer.status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

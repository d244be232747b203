"""A real HTTP server on loopback that answers as scripted, and a clock that only waiting moves."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from orchestrator import clock


@dataclass(frozen=True)
class Scripted:
    """One answer: a body as it is, or a document; or a way to fail instead."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    """close, reset, hang, half (of the body), drip (a byte now and then), chunked, half chunked."""


@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float


class Server:
    """Answers with what was scripted, in order, then with `usual`; remembers what it was asked."""

    def __init__(self) -> None:
        self.script: list[Scripted] = []
        self.usual: Callable[[Asked], Scripted] = lambda _: Scripted(404, {"error": {"code": "global/not-found"}})
        self.asked: list[Asked] = []
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                document = json.loads(body) if body else None
                asked = Asked(self.command, self.path, dict(self.headers), document, clock.timestamp())
                server.asked.append(asked)
                server.play(self, server.script.pop(0) if server.script else server.usual(asked))

            do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 -- as http.server calls it

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def play(self, handler: BaseHTTPRequestHandler, answer: Scripted) -> None:
        """Send an answer, or fail as told."""
        handler.close_connection = True
        if answer.fault == "hang":
            self.released.wait(30)
        if answer.fault == "reset":  # closing with linger 0 sends RST
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        if answer.fault in ("hang", "reset", "close"):
            return
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        length = {"Transfer-Encoding": "chunked"} if "chunked" in answer.fault else {"Content-Length": str(len(data))}
        with contextlib.suppress(OSError):  # the other side may have had enough
            handler.send_response(answer.status)
            for name, value in {**length, **answer.headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            for piece in self.pieces(data if handler.command != "HEAD" else b"", answer.fault):
                handler.wfile.write(piece)

    def pieces(self, data: bytes, fault: str) -> Iterator[bytes]:
        """What is written of a body, piece by piece."""
        middle = len(data) // 2
        if fault == "drip":
            for at in range(len(data)):
                yield data[at : at + 1]
                self.released.wait(0.02)
        elif "chunked" in fault:
            yield b"%x\r\n%b\r\n" % (middle, data[:middle])
            if fault == "chunked":
                yield b"%x\r\n%b\r\n0\r\n\r\n" % (len(data) - middle, data[middle:])
        else:
            yield data[:middle] if fault == "half" else data

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        """Serve inside the block."""
        thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self.http.shutdown()
            self.http.server_close()
            thread.join(10)

    def paths(self) -> list[str]:
        """What was asked, as `METHOD /path`."""
        return [f"{asked.method} {asked.path}" for asked in self.asked]


class Time:
    """A clock that stands still but for waiting."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.since = 0.0
        self.slept: list[float] = []

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.sleep(seconds)

    def sleep(self, seconds: float) -> None:
        """Let so much time pass at once."""
        self.slept.append(seconds)
        self.now += seconds
        self.since += seconds

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be the project's clock."""
        monkeypatch.setattr(clock, "sleep", self.sleep)
        monkeypatch.setattr(clock, "timestamp", lambda: self.now)
        monkeypatch.setattr(clock, "monotonic", lambda: self.since)


def closed_port() -> int:
    """A port of this computer that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


HTML = b"<!DOCTYPE html><html><title>502 Bad Gateway</title></html>"


def error(code: str, message: str = "It is so.") -> dict[str, Any]:
    """A complaint of Lambda's."""
    return {"error": {"code": code, "message": message, "suggestion": "Try something else."}}

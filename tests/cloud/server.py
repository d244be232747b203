"""The stand-in on a port of its own on loopback: a threaded HTTP server around the core."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.cloud import control
from tests.cloud.answers import Answer, Closed, CutShort, Failure, Hangs, NotSent, Unanswered, as_json, parsed
from tests.cloud.core import Core

_TICK_S = 0.02
_DEADLINE_S = 10.0
_RESET = struct.pack("ii", 1, 0)
"""Linger for no time: the connection ends with a reset."""


class Server:
    """A running server; `url` is what GPU_LAMBDA_URL is set to. At the end of its block nothing of it is left."""

    def __init__(self, core: Core, address: str = "127.0.0.1", port: int = 0, others: Iterable[Core] = ()) -> None:
        """`others` are served as well, each at its own place."""
        self.core = core
        self.cores = [core, *others]
        self.over = threading.Event()
        self._http = _Http((address, port), _Handler)
        self._http.owner = self
        for each in self.cores:
            each.url = self.url_of(each)
        self._threads = [threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)]
        self._threads.append(threading.Thread(target=self._tick, daemon=True))

    @property
    def url(self) -> str:
        """Where the API of the first one is, without `/api/v1`."""
        return self.url_of(self.core)

    def url_of(self, core: Core) -> str:
        """Where the API of one of them is."""
        address, port = self._http.server_address[:2]
        return f"http://{address!s}:{port}{core.place}"

    def asked_for(self, path: str) -> Core | None:
        """Which one a path is meant for; None: none of them."""
        return next((core for core in self.cores if path.startswith(f"{core.place}/")), None)

    def __enter__(self) -> Server:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.cut()
        self._http.server_close()
        for thread in self._threads:
            thread.join(_DEADLINE_S)

    def _tick(self) -> None:
        while not self.over.wait(_TICK_S):
            for core in self.cores:
                core.tick()


class _Http(ThreadingHTTPServer):
    """A server that can end the connections which clients keep open."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 64
    owner: Server

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is a fault of the stand-in, and shown."""
        import sys

        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def cut(self) -> None:
        """End all connections."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: _Http
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            answer = self._answer(body)
        except Unanswered as reason:
            self._leave(reason)
        else:
            self._send(answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815

    def _answer(self, body: bytes) -> Answer:
        core = self.server.owner.asked_for(self.path)
        if core is None:
            return Answer(404, {"Content-Type": "text/plain"}, b"No such place\n")
        path = self.path.removeprefix(core.place)
        if path == control.PATH:
            try:
                asked = parsed(body) if self.command == "POST" else {}
                return as_json(200, control.apply(core, asked))
            except Failure as failure:
                return failure.answer()
        return core.handle(self.command, path, dict(self.headers.items()), body)

    def _send(self, answer: Answer, length: int | None = None) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body) if length is None else length))
        self.end_headers()
        self.wfile.write(answer.body)

    def _leave(self, reason: Unanswered) -> None:
        """End the connection as the fault has it."""
        self.close_connection = True
        match reason:
            case Hangs(seconds=seconds):
                self.server.owner.over.wait(min(seconds, threading.TIMEOUT_MAX))
            case CutShort(answer=answer):
                self._send(answer._replace(body=answer.body[: len(answer.body) // 2]), len(answer.body))
            case NotSent():
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            case Closed():
                pass

    def log_message(self, *_: Any) -> None:
        """Nothing: the core keeps a list of calls."""


def as_text(cores: Iterable[Core]) -> str:
    """What the stand-ins say of themselves, for a person."""
    return json.dumps({core.place.strip("/"): control.report(core) for core in cores}, indent=2)

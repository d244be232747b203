"""A provider on loopback as a container's watchdog asks it: shows, stops and ends it, and misbehaves as told."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "51c0ffee" * 8
"""As long as such keys are, and nowhere else."""
OWN, FOREIGN = "7312345", "7312346"


@dataclass
class Fault:
    """What one call of a method gets instead of an answer; or after the work was done (`late`)."""

    method: str
    status: int = 500
    body: bytes = b"<html>bad gateway</html>"
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    drip: bool = False
    late: bool = False


class ContainerCloud:
    """What the stand-in has, was asked, and is to do wrong next."""

    def __init__(self) -> None:
        self.instances = {OWN: "running", FOREIGN: "running"}
        """The state that was asked for last; `gone` once it was ended."""
        self.calls: list[tuple[float, str, str, Any]] = []
        """When, which method and path, and the body."""
        self.keys: set[str | None] = set()
        """What stood in the header for keys."""
        self.faults: list[Fault] = []
        self.clock_ahead_s = 0.0
        self.over = threading.Event()
        self.url = ""

    def asked(self, method: str) -> list[float]:
        """When this was asked."""
        return [at for at, called, _, _ in self.calls if called == method]

    def ended(self) -> list[str]:
        """The ids whose end was asked for, in their order."""
        return [path.split("/")[-2] for _, method, path, _ in self.calls if method == "DELETE"]

    def stopped(self) -> list[Any]:
        """The bodies of all requests to change the state."""
        return [body for _, method, _, body in self.calls if method == "PUT"]

    def answer(self, method: str, path: str, body: Any, key: str | None) -> tuple[int, Any]:
        """The status and the document of an answer."""
        if key != f"Bearer {KEY}":  # as a bad key is really answered
            return 404, {"success": False, "error": "auth_error", "msg": "Invalid user key"}
        instance_id = path.removeprefix("/api/v0/instances/").removesuffix("/")
        if path != f"/api/v0/instances/{instance_id}/" or self.instances.get(instance_id, "gone") == "gone":
            return 404, {"success": False, "error": "no_such_instance", "msg": "error 404: no_such_instance"}
        if method == "GET":
            return 200, {"instances": {"id": int(instance_id), "actual_status": self.instances[instance_id]}}
        self.instances[instance_id] = "gone" if method == "DELETE" else body["state"]
        return 200, {"success": True}


def _handler(cloud: ContainerCloud) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self._serve()

        def do_PUT(self) -> None:
            self._serve()

        def do_DELETE(self) -> None:
            self._serve()

        def _serve(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"] or 0))
            body = json.loads(data) if data else None
            cloud.calls.append((time.time(), self.command, self.path, body))
            cloud.keys.add(self.headers["Authorization"])
            fault = next((each for each in cloud.faults if each.method == self.command), None)
            if fault:
                cloud.faults.remove(fault)
            if fault and not fault.late:
                self._misbehave(fault)
                return
            status, document = cloud.answer(self.command, self.path, body, self.headers["Authorization"])
            if fault:
                self._misbehave(fault)
                return
            self._send(status, json.dumps(document).encode(), {})

        def _misbehave(self, fault: Fault) -> None:
            if fault.hang:
                cloud.over.wait(60)
            elif fault.drip:
                self.send_response(200)
                self.end_headers()
                while not cloud.over.wait(0.05):
                    self.wfile.write(b" ")
                    self.wfile.flush()
            else:
                self._send(fault.status, fault.body, fault.headers)

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response_only(status)
            date = email.utils.formatdate(time.time() + cloud.clock_ahead_s, usegmt=True)
            for name, value in {"Date": date, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """Clients here are killed on purpose."""


@contextmanager
def serving() -> Iterator[ContainerCloud]:
    """A cloud that can be asked at its `url` while the block lasts."""
    cloud = ContainerCloud()
    server = _Server(("127.0.0.1", 0), _handler(cloud))
    cloud.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        cloud.over.set()
        server.shutdown()
        server.server_close()
        thread.join()

"""A provider on loopback as the guard asks it: lists instances, ends them, and misbehaves as told."""

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

KEY = "lambda_key_canary_51c0ffee"
MARKER = "gpu-20261121t120000-0123456789ab"


@dataclass
class Fault:
    """What one call to a path that ends so gets instead of an answer; or after the work was done (`late`)."""

    path: str
    status: int = 500
    body: bytes = b"<html>bad gateway</html>"
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    drip: bool = False
    late: bool = False


class Cloud:
    """What the stand-in has, was asked, and is to do wrong next."""

    def __init__(self) -> None:
        self.instances: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[float, str, Any]] = []
        """When, which path, and the body."""
        self.faults: list[Fault] = []
        self.ends = True
        """Whether what is ended goes."""
        self.clock_ahead_s = 0.0
        self.over = threading.Event()
        self.url = ""

    def add(self, instance_id: str, name: str | None = None, tag: str | None = None, **more: Any) -> None:
        """Have an instance, by name, tag or neither."""
        tags = [{"key": "gpu-marker", "value": tag}] if tag else None
        self.instances[instance_id] = {"id": instance_id, "name": name, "status": "active", "tags": tags, **more}

    def asked(self, path: str) -> list[Any]:
        """The bodies of the calls whose path ends so."""
        return [body for _, called, body in self.calls if called.endswith(path)]

    def ended(self) -> list[str]:
        """The ids that were asked to be ended, in their order."""
        return [each for body in self.asked("/terminate") for each in body["instance_ids"]]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """The status and the document of an answer."""
        if path == "/api/v1/instances":
            return 200, {"data": [each for each in self.instances.values() if each["status"] != "vanished"]}
        if path == "/api/v1/instance-operations/terminate":
            found = [self.instances.get(each) for each in body["instance_ids"]]
            if None in found:
                return 404, {"error": {"code": "global/object-does-not-exist", "message": "none"}}
            for each in found:
                if self.ends and each:
                    each["status"] = "terminating"
            return 200, {"data": {"terminated_instances": found}}
        return 404, {"error": {"code": "global/unknown"}}


def _handler(cloud: Cloud) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self._serve(None)

        def do_POST(self) -> None:
            self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _serve(self, body: Any) -> None:
            cloud.calls.append((time.time(), self.path, body))
            fault = next((each for each in cloud.faults if self.path.endswith(each.path)), None)
            if fault:
                cloud.faults.remove(fault)
            if fault and not fault.late:
                self._misbehave(fault)
                return
            status, document = cloud.answer(self.path, body)
            if self.headers["Authorization"] != f"Bearer {KEY}":
                status, document = 401, {"error": {"code": "global/invalid-api-key"}}
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
            self.send_header("Date", email.utils.formatdate(time.time() + cloud.clock_ahead_s, usegmt=True))
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
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
def serving() -> Iterator[Cloud]:
    """A cloud that can be asked at its `url` while the block lasts."""
    cloud = Cloud()
    server = _Server(("127.0.0.1", 0), _handler(cloud))
    cloud.url = f"http://127.0.0.1:{server.server_port}/api/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        cloud.over.set()
        server.shutdown()
        server.server_close()
        thread.join()

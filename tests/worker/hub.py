"""The few endpoints of the Hugging Face Hub that a mirror uses, on loopback, as its own client speaks to them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_canary_c0ffee"
REPO = "somebody/rows"


class Hub:
    """One private dataset repository: its files, its commits, and what it does wrong next."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.fail_next: list[int] = []
        """Status of each of the next commits; a negative one fails after it was made."""
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """The status, and a document or bytes."""
        api = f"/api/datasets/{REPO}/"
        if path.startswith(f"{api}tree/main"):
            folder = path[len(f"{api}tree/main") :].strip("/")
            found = [name for name in sorted(self.files) if not folder or name.startswith(f"{folder}/")]
            if folder and not found:
                return 404, "EntryNotFound"
            files = [{"path": name, "size": len(self.files[name])} for name in found]
            return 200, [{"type": "file", "oid": _oid(self.files[each["path"]]), **each} for each in files]
        if path == f"{api}preupload/main":
            asked = [each["path"] for each in json.loads(body)["files"]]
            known = {name: _oid(self.files[name]) for name in asked if name in self.files}
            said = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": known.get(name)} for name in asked
            ]
            return 200, {"files": said}
        if path == f"{api}commit/main" and method == "POST":
            return self._commit(body)
        if path.startswith(f"/datasets/{REPO}/resolve/main/"):
            name = path.split("/resolve/main/", 1)[1]
            return (200, self.files[name]) if name in self.files else (404, "EntryNotFound")
        if path == f"/api/datasets/{REPO}/revision/main":
            return 200, {"id": REPO, "sha": "0" * 40}
        return 404, "RepoNotFound"

    def _commit(self, body: bytes) -> tuple[int, Any]:
        status = self.fail_next.pop(0) if self.fail_next else 200
        if status == 200 or status < 0:
            files = [each["value"] for each in map(json.loads, body.splitlines()) if each["key"] == "file"]
            self.files |= {each["path"]: base64.b64decode(each["content"]) for each in files}
            self.commits.append([each["path"] for each in files])
        url = f"{self.url}/datasets/{REPO}/commit/{len(self.commits)}"
        return abs(status), {"commitUrl": url, "commitOid": "0" * 40, "success": True}


def _oid(data: bytes) -> str:
    """What git calls a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that can be asked at its `url` while the block lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self._serve(b"")

        def do_POST(self) -> None:
            self._serve(self._body())

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def _serve(self, body: bytes) -> None:
            status, said = hub.answer(self.command, unquote(urlsplit(self.path).path), body)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, said = 401, "RepoNotFound"
            code = said if isinstance(said, str) else ""
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

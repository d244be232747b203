"""A small server that speaks OpenAI's API, and misbehaves as told: in a thread of a test, or as a process."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "answers"


class Script:
    """What the server does, and what it was asked. Every fault is a setting; without any it answers."""

    def __init__(self, **how: Any) -> None:
        self.how = how
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.answered = 0
        self.at_once = self.at_once_max = 0

    def status(self, body: dict[str, Any], count: int) -> tuple[int, dict[str, str], Any] | None:
        """The failure for a request, the `count`-th there was; None: it is answered."""
        if count <= self.how.get("busy", 0):
            return 429, {"Retry-After": self.how.get("retry_after", "0")}, {"error": {"message": "slow down"}}
        if count <= self.how.get("broken", 0):
            return 500, {}, {"error": {"message": "out of order"}}
        if "status" in self.how:
            return self.how["status"], {"Location": "http://127.0.0.1:9/v1"}, {"error": {"message": self.how["says"]}}
        if body.get("model") != MODEL and not self.how.get("any_model"):
            return 404, {}, {"error": {"message": f"The model {body.get('model')} does not exist"}}
        if self.how.get("limit_name", "max_tokens") not in body:
            return 400, {}, {"error": {"message": "Use max_completion_tokens instead of max_tokens."}}
        if (word := self.how.get("refuses")) and word in json.dumps(body):
            return 400, {}, {"error": {"message": f"no {word} here"}}
        return None

    def answer(self, body: dict[str, Any], *, is_chat: bool) -> Any:
        """What it says: the same to the same request; a seed counts where there is a temperature."""
        asked = body["messages"][-1]["content"] if is_chat else body["prompt"]
        drawn = body["seed"] if body["temperature"] else 0
        number = int(hashlib.sha256(f"{asked}{drawn}".encode()).hexdigest()[:4], 16)
        text, reason = f"It is {number}.\n#### {number}", "stop"
        if (word := self.how.get("filters")) and word in asked:
            text, reason = "", "content_filter"
        choice = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        usage = {"prompt_tokens": len(asked.split()), "completion_tokens": len(text.split())}
        return {"choices": [{"index": 0, **choice, "finish_reason": reason}], "usage": usage}


def handler(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            healthy = self.path in ("/health", "/v1/models") and not script.how.get("never_healthy")
            self._send(200 if healthy else 503, {}, {"data": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with script.lock:
                script.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
                count = len(script.requests)
                script.at_once += 1
                script.at_once_max = max(script.at_once_max, script.at_once)
            try:
                self._post(body, count)
            finally:
                with script.lock:
                    script.at_once -= 1

        def _post(self, body: dict[str, Any], count: int) -> None:
            time.sleep(script.how.get("slow_s", 0))
            if failure := script.status(body, count):
                self._send(*failure)
            elif count <= script.how.get("garbage", 0):
                self._send(200, {}, "<html>not what you think</html>")
            elif count <= script.how.get("cuts", 0):
                self.close_connection = True
                self.connection.close()
            else:
                self._send(200, {}, script.answer(body, is_chat=self.path.endswith("/chat/completions")))
                with script.lock:
                    script.answered += 1
                    if script.answered == script.how.get("dies_after"):
                        say("the card has fallen off the bus")
                        os._exit(7)

        def _send(self, status: int, headers: dict[str, str], document: Any) -> None:
            data = document.encode() if isinstance(document, str) else json.dumps(document).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            with contextlib.suppress(OSError):  # whoever asked has gone
                self.end_headers()
                for start in range(0, len(data), size := 1 if script.how.get("drips") else len(data)):
                    time.sleep(0.02 if script.how.get("drips") else 0)
                    self.wfile.write(data[start : start + size])

    return Handler


@contextlib.contextmanager
def playing(**how: Any) -> Iterator[tuple[str, Script]]:
    """A server in a thread: its address, and what it was asked."""
    script = Script(**how)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(script))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def command(**how: Any) -> str:
    """The parameter `server` that starts one as a process."""
    words = [sys.executable, str(Path(__file__).resolve()), "--port", "{port}", json.dumps(how)]
    return " ".join(f"'{word}'" for word in words)


def say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def main() -> None:
    """Serve, with what else a process can do wrong: not start, leave children, not heed TERM, talk without end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("how", type=json.loads)
    words = parser.parse_args()
    how = words.how
    say("loading the weights")
    if how.get("dies_at_once"):
        sys.exit("there is no such model")
    if how.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(how.get("children", 0)):  # in sessions of their own, deaf, with nothing that ties them to us
        code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    if how.get("talks"):
        line = "x" * 999
        for _ in range(how["talks"]):
            say(line)
        say("that was all")
    script = Script(**how)
    ThreadingHTTPServer(("127.0.0.1", words.port), handler(script)).serve_forever()


if __name__ == "__main__":
    main()

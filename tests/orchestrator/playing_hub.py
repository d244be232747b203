"""A server on loopback that plays the Hugging Face Hub, with its refusals, and servers that misbehave."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""The public shape of Llama 3.1 8B."""
LLAMA_8B_PARAMETERS = 8_030_261_248
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Repository:
    """What the Hub has under one name. A large file is its size alone: nobody may ask for it."""

    files: dict[str, bytes | int]
    parameters: dict[str, int] = field(default_factory=dict)
    gated: bool = False
    revisions: tuple[str, ...] = ("main", COMMIT)


def document(value: Any) -> bytes:
    return json.dumps(value).encode()


def instruct_8b(**changes: Any) -> Repository:
    """An instruction model of 8 billion parameters, its files named and sized as such models' are."""
    shards = {f"model-0000{number}-of-00004.safetensors": size for number, size in enumerate(_SHARDS, start=1)}
    files: dict[str, bytes | int] = {
        "config.json": document(LLAMA_8B),
        "tokenizer.json": 9_085_657,
        "tokenizer_config.json": document({"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}),
        "generation_config.json": document({"eos_token_id": [2]}),
        "model.safetensors.index.json": document(
            {"metadata": {"total_size": 2 * LLAMA_8B_PARAMETERS}, "weight_map": {name: name for name in shards}}
        ),
        "original/consolidated.00.pth": 16_060_617_592,
        **shards,
        **changes.pop("files", {}),
    }
    return Repository(files, **{"parameters": {"BF16": LLAMA_8B_PARAMETERS}, **changes})


_SHARDS = (4_976_698_672, 4_999_802_720, 4_915_916_176, 1_168_138_808)


class PlayedHub(ThreadingHTTPServer):
    """Repositories by name; `tokens` are let into gated ones; `odd` answers a path in a way of its own."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.accounts: dict[str, bool] = {}
        """Each token that is one, and whether its account was let into gated repositories."""
        self.odd: dict[str, Callable[[Any], None]] = {}
        self.asked: list[tuple[str, str | None]] = []
        """Every path that was asked for, with the Authorization that came along."""
        self.released = threading.Event()
        self.sent = 0
        """Bytes of an endless answer."""

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        """Every path that was asked for, in order."""
        return [path for path, _ in self.asked]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    server: PlayedHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        path = urlsplit(self.path).path
        odd = next((act for suffix, act in self.server.odd.items() if path.endswith(suffix)), None)
        if odd is not None:
            odd(self)
            return
        words = [unquote(word) for word in path.strip("/").split("/")]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.accounts:
            self.refuse(401, None, "Invalid credentials in Authorization header")
        elif words[:2] == ["api", "models"] and words[-2] == "revision":
            self._list("/".join(words[2:-2]), words[-1])
        elif len(words) > 3 and "resolve" in words[1:3]:
            cut = words.index("resolve", 1)
            self._send("/".join(words[:cut]), words[cut + 1], "/".join(words[cut + 2 :]), token)
        else:
            self.refuse(404, None, "Not found")

    def refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, document({"error": message}), {**headers, "Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _find(self, name: str, revision: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None:  # as the Hub does, which does not tell strangers what is private
            self.refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
        elif revision not in found.revisions:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return found

    def _list(self, name: str, revision: str) -> None:
        if (found := self._find(name, revision)) is None:
            return
        sizes = {path: content if isinstance(content, int) else len(content) for path, content in found.files.items()}
        said = {
            "id": name,
            "sha": COMMIT,
            "gated": "manual" if found.gated else False,
            "siblings": [{"rfilename": path, "size": size} for path, size in sizes.items()],
        }
        if found.parameters:
            said["safetensors"] = {"parameters": found.parameters, "total": sum(found.parameters.values())}
        self.answer(200, document(said), {"Content-Type": "application/json"})

    def _send(self, name: str, revision: str, path: str, token: str) -> None:
        if (found := self._find(name, revision)) is None:
            return
        content = found.files.get(path)
        if found.gated and not self.server.accounts.get(token):
            self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        elif content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            assert isinstance(content, bytes), f"{path} is large, and was asked for"
            self.answer(200, content, {"Content-Type": "text/plain"})


def redirect(target: str, status: int = 307) -> Callable[[Any], None]:
    return lambda handler: handler.answer(status, b"", {"Location": target})


def page(status: int) -> Callable[[Any], None]:
    """What stands between answers, with a page for people."""
    return lambda handler: handler.answer(status, b"<html>Please log in</html>", {"Content-Type": "text/html"})


def hang(handler: Any) -> None:
    """Never answer."""
    handler.server.released.wait(60)
    handler.close_connection = True


def drip(begin: bytes) -> Callable[[Any], None]:
    """Answer one byte at a time, often enough for every time-out of a socket, and never come to an end."""

    def act(handler: Any) -> None:
        handler.close_connection = True
        handler.wfile.write(begin)
        with contextlib.suppress(OSError):
            while not handler.server.released.wait(0.02):
                handler.wfile.write(b"x")

    return act


def endless(handler: Any) -> None:
    """Send without end, as fast as it goes, never saying how much it will be."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    with contextlib.suppress(OSError):
        while not handler.server.released.is_set():
            handler.server.sent += handler.connection.send(b" " * 65536)


@contextlib.contextmanager
def running() -> Iterator[PlayedHub]:
    """A server that answers until the end of the block."""
    server = PlayedHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()

"""What an interpreter's libraries can do: looked at in its own process, said in plain words when it is not enough."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from worker import interpreters, libraries
from worker.installation import Place

MAIN = str(ROOT / "worker" / "__main__.py")
TOKEN = "hf_" + "secret" * 5
MODEL = "somebody/small"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "model.safetensors": b"w" * 70_000,
    "pytorch_model.bin": b"x" * 100,
    "original/consolidated.00.pth": b"y" * 100,
    "model.Q4.gguf": b"z" * 100,
}


class Listener:
    """Hears what is said."""

    def say(self, text: str) -> None:
        """Pass over it."""

    def tick(self) -> None:
        """Wait on."""


# --- imports ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Python with nothing installed."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder


def site(folder: Path) -> Path:
    [found] = folder.glob("lib/python3*/site-packages")
    return found


def look(python: str, *modules: str) -> dict[str, Any]:
    """What the command says, as the laptop asks it."""
    words = [sys.executable, "-I", "-X", "utf8", MAIN, "imports", "/nowhere"]
    request = json.dumps({"python": python, "modules": modules}).encode() + b"\n"
    ran = subprocess.run(words, input=request, capture_output=True, check=True, timeout=100)
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def test_a_python_that_has_what_is_needed_is_described() -> None:
    """A fitting interpreter is answered with its version, those of the modules, and whether it has CUDA."""
    answer = look(sys.executable, "torch", "safetensors")
    assert answer["ok"] is True
    assert answer["version"] == ".".join(map(str, sys.version_info[:2]))
    assert answer["versions"]["torch"].startswith("2.")
    assert answer["cuda"] is False


def test_what_is_missing_is_named(bare: Path) -> None:
    """A module that is not there is named, with both ways on: install it, or let gpu make an environment."""
    answer = look(str(bare / "bin" / "python"), "json", "peft")
    assert answer["ok"] is False
    assert "cannot import peft: ModuleNotFoundError" in answer["message"]
    assert answer["hint"].startswith("Install peft for that Python. Or: Leave out --python")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('\\x1e{}x'); raise RuntimeError('two lines\\nof it')", "cannot import odd: RuntimeError: two lines"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "cannot import odd: it crashed"),
        ("import os; os._exit(3)", "cannot import odd: it ended with exit code 3"),
        ("import os; os.write(2, b'half a line'); os._exit(3)", "cannot import odd: it ended with exit code 3"),
        ("def f(:", "cannot import odd: SyntaxError"),
    ],
)
def test_whatever_an_import_does_is_an_answer(bare: Path, body: str, said: str) -> None:
    """A module that raises, crashes, leaves or prints what it likes gives an answer that names it."""
    (site(bare) / "odd.py").write_text(body, encoding="utf-8")
    answer = look(str(bare / "bin" / "python"), "odd")
    assert answer["ok"] is False
    assert said in answer["message"]


def test_a_clash_of_numpy_and_torch_is_found(bare: Path) -> None:
    """Where torch cannot take NumPy's arrays, which imports alone do not show, that is said."""
    (site(bare) / "numpy.py").write_text("def zeros(n): return [0.0]\n", encoding="utf-8")
    clash = "def from_numpy(a): raise RuntimeError('Numpy is not available')\n"
    (site(bare) / "torch.py").write_text(clash, encoding="utf-8")
    answer = look(str(bare / "bin" / "python"), "torch", "numpy")
    assert "cannot use NumPy and torch together: RuntimeError: Numpy is not available" in answer["message"]


def test_what_is_no_fitting_python_is_refused(tmp_path: Path) -> None:
    """An older Python, something else, and nothing at all are told apart."""
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho 3 10\n", encoding="utf-8")
    old.chmod(0o755)
    assert "is Python 3.10; the worker needs 3.11 or newer" in look(str(old), "torch")["message"]
    assert "is no Python" in look("/bin/echo", "torch")["message"]
    assert "is no Python" in look(str(tmp_path / "none"), "torch")["message"]


def test_nothing_is_imported_into_our_own_process() -> None:
    """The check leaves the process that asks for it without the modules it looked at."""
    before = set(sys.modules)
    assert libraries.check(sys.executable, ["colorsys"], Listener())["ok"] is True
    assert "colorsys" not in set(sys.modules) - before


# --- models ----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The Hub's part of the protocol that a download needs, for one model that asks for a token."""

    asked: ClassVar[list[str]] = []
    seen_in_words: ClassVar[list[str]] = []
    commit = "c" * 40

    def do_HEAD(self) -> None:
        """Facts of a file."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """A file, or what the model holds."""
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        """Answer as the Hub does: 401 without the token, 404 for another model."""
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                self.seen_in_words.extend([str(entry)] if TOKEN.encode() in entry.read_bytes() else [])
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or MODEL not in path:
            return self.give(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body)
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in FILES.items()]
            return self.give(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            document = {"id": MODEL, "sha": self.commit, "siblings": siblings}
            return self.give(200, json.dumps(document).encode(), {"Content-Type": "application/json"}, body)
        name = path.partition(f"/resolve/{self.commit}/")[2] or path.partition("/resolve/main/")[2]
        if body:
            self.asked.append(name)
        tag = hashlib.sha256(FILES[name]).hexdigest()
        return self.give(200, FILES[name], {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit}, body)

    def give(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        """Send it."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class names it
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables with which huggingface_hub speaks to a Hub on this computer."""
    Hub.asked.clear()
    Hub.seen_in_words.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": "0"}
    yield {**variables, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.shutdown()
    server.server_close()


def fetched(root: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The last frame of the command, as the laptop asks it."""
    words = [sys.executable, "-I", "-X", "utf8", MAIN, "fetch", str(root), str(root / "pins")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        frames = [json.loads(line) for line in child.stdout]
    last: dict[str, Any] = frames[-1]
    return last


def test_a_model_is_fetched_ahead(hub: dict[str, str], tmp_path: Path) -> None:
    """Configuration, tokenizer and weights in one format come into the cache; the token stands in no command line."""
    request = {"python": sys.executable, "kind": "train", "model": MODEL, "revision": None}
    answer = fetched(tmp_path, {**request, "env": {**hub, "HF_TOKEN": TOKEN}})
    assert answer.get("ready") is True, answer
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in Path(answer["path"]).iterdir()) == names
    assert (Path(answer["path"]) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert sorted(Hub.asked) == names
    assert Hub.seen_in_words == []


def test_a_fetch_that_fails_says_why(hub: dict[str, str], tmp_path: Path) -> None:
    """A model that the Hub does not show is an answer with what may help, and without the token."""
    request = {"python": sys.executable, "kind": "train", "model": MODEL, "revision": None}
    answer = fetched(tmp_path, {**request, "env": {**hub, "HF_TOKEN": f"{TOKEN}x"}})
    assert "RepositoryNotFoundError" in answer["failed"]["message"]
    assert "HF_TOKEN" in answer["failed"]["hint"]
    assert TOKEN not in json.dumps(answer)


def test_a_fetch_uses_the_environment_as_soon_as_it_can(hub: dict[str, str], tmp_path: Path, bare: Path) -> None:
    """Without a Python given, the environment's is used once huggingface_hub is in it, long before it is ready."""
    pins = tmp_path / "pins"
    pins.mkdir()
    version = ".".join(map(str, sys.version_info[:2]))
    lock = pins / f"train-{version}.txt"
    lock.write_text("# packages: idna\nidna==3.10\n", encoding="utf-8")
    plan = interpreters.Plan("train", sys.executable, version, "", ["default"], str(lock), interpreters.seen())
    folder = tmp_path / "environments"
    (folder / plan.digest / "bin").mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(plan.document()), encoding="utf-8")
    (folder / plan.digest / "bin" / "python").symlink_to(bare / "bin" / "python")
    answers: list[dict[str, Any]] = []
    request = {"kind": "train", "model": MODEL, "revision": None, "env": {**hub, "HF_TOKEN": TOKEN}}
    asking = threading.Thread(target=lambda: answers.append(fetched(tmp_path, request)))
    asking.start()
    (folder / plan.digest / "bin" / "python").unlink()
    (folder / plan.digest / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    (folder / plan.digest / "bin" / "python").chmod(0o755)
    (folder / plan.digest / "hub.json").write_text("{}", encoding="utf-8")
    asking.join(60)
    assert answers[0].get("ready") is True, answers
    assert not Place(folder, plan.digest).ready()


WEIGHTS = ["model.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors", "pytorch_model.bin"]
SMALL = ["config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
OTHERS = ["README.md", "x.gguf", "tf_model.h5", "flax_model.msgpack", "original/params.json", "original/a.safetensors"]
NAMES = st.sampled_from([*WEIGHTS, *SMALL, *OTHERS, "onnx/model.onnx", "a/b.safetensors"])


@given(st.sets(NAMES))
def test_of_a_model_only_what_a_worker_loads_is_wanted(names: set[str]) -> None:
    """Weights come in one format: safetensors where there are any; nothing of another framework or layout comes."""
    found = set(libraries.wanted(sorted(names)))
    assert found <= names
    assert not [name for name in found if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".md")) or "/" in name]
    plain = {name for name in names if name.startswith("model") and name.endswith(".safetensors")}
    assert plain <= found
    assert ("consolidated.safetensors" in found) == ("consolidated.safetensors" in names and not plain)
    assert ("pytorch_model.bin" in found) == (
        "pytorch_model.bin" in names and not plain and "consolidated.safetensors" not in names
    )
    assert set(SMALL) & names <= found


def test_the_token_is_in_no_file(hub: dict[str, str], tmp_path: Path) -> None:
    """After a fetch, neither the machine's folder nor the Hub's cache holds the token."""
    request = {"python": sys.executable, "kind": "train", "model": MODEL, "revision": None}
    fetched(tmp_path, {**request, "env": {**hub, "HF_TOKEN": TOKEN}})
    for folder, _, files in os.walk(tmp_path):
        assert not [name for name in files if TOKEN.encode() in (Path(folder) / name).read_bytes()]

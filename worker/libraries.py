"""What an interpreter's libraries can do, asked in a process of that interpreter: import together, fetch a model."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import importlib
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from worker.programs import Asker, Program, environment, ran

OLDEST = (3, 11)
"""The oldest Python that the worker's libraries and stories run on."""
_MAIN = str(Path(__file__).resolve().parent / "__main__.py")
_MARK = "\x1e"  # begins a line of ours among whatever libraries print (the record separator of RFC 7464)
_START_S = 20.0
_CHECK_S = 120.0
_BUILD_CHECK_S = 600.0
_FETCH_S = 4 * 3600.0
_NOTE_S = 2.0
_TAIL_LINES = 15
_LINE_MAX = 500
_TOGETHER = "NumPy and torch together"
_NEVER = ("original/*", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*/*.bin", "*/*.safetensors", "*.pth")
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.vocab")
_EXCEPTION = re.compile(r"^(?:\w+\.)*(\w+)(?:: (.*))?$", re.MULTILINE)
_FETCH_HINTS = {
    "GatedRepoError": "Accept the model's conditions on its page on the Hub, and set HF_TOKEN.",
    "RepositoryNotFoundError": "Check the model's name. A private one needs HF_TOKEN.",
    "RevisionNotFoundError": "Check the revision.",
}
Frame = dict[str, Any]


class Unfit(Exception):
    """An interpreter lacks something; the message says what, the hint what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class _Child:
    """A process of that interpreter that runs this module; told apart by a mark: its frames, and what it prints."""

    def __init__(self, verb: str, python: str, request: Frame, asker: Asker) -> None:
        self.words = [python, "-I", "-X", "utf8", _MAIN, verb, "/", "here"]
        self.data = json.dumps(request).encode()
        self.asker = asker
        self.frames: list[Frame] = []
        self.said = ""

    def run(self, deadline_s: float, env: dict[str, str] | None = None) -> int:
        """The exit code, see Program; frames and words are then known."""
        with tempfile.NamedTemporaryFile() as out:
            self._file = Path(out.name)
            self._offset = 0
            program = Program(self.words, deadline_s, out.fileno(), environment(env), self.data)
            code = program.run(self)
            self._take()
            return code

    def say(self, text: str) -> None:
        """Pass on."""
        self.asker.say(text)

    def tick(self) -> None:
        """Take what it said since, and pass on its progress."""
        self._take()
        self.asker.tick()

    def _take(self) -> None:
        with self._file.open("rb") as file:
            file.seek(self._offset)
            news = file.read()
        news = news[: news.rfind(b"\n") + 1]
        self._offset += len(news)
        for line in news.decode("utf-8", "replace").split("\n"):  # splitlines would split at our mark
            self._take_line(line)

    def _take_line(self, line: str) -> None:
        frame = None
        with contextlib.suppress(ValueError):
            frame = json.loads(line[len(_MARK) :]) if line.startswith(_MARK) else None
        if not isinstance(frame, dict):
            self.said = f"{self.said}{line}\n"[-20_000:]
        elif "progress" in frame:
            self.asker.say(str(frame["progress"]))
        else:
            self.frames.append(frame)

    def tail(self) -> list[str]:
        """The last lines it printed."""
        return [line[:_LINE_MAX] for line in self.said.splitlines() if line.strip()][-_TAIL_LINES:]

    def error(self, code: int) -> tuple[str, str]:
        """Name and message of the exception that ended it; no name where it ended otherwise."""
        _, traceback, text = self.said.rpartition("Traceback (most recent call last):\n")
        found = _EXCEPTION.search(text) if traceback else None
        if found:
            return found[1][:_LINE_MAX], (found[2] or "")[:_LINE_MAX]
        why = {124: "it took too long", 127: "it cannot be started", -11: "it crashed (segmentation fault)"}
        return "", why.get(code) or (self.tail() or [f"it ended with exit code {code}"])[-1]


# --- imports ---------------------------------------------------------------------------------------------------------


def check(python: str, modules: list[str], asker: Asker) -> Frame:
    """Whether an interpreter of the user's has what a worker needs, as it is; says what it lacks."""
    try:
        code, text = ran([python, "-I", "-c", "import sys; print(*sys.version_info[:2])"], _START_S, asker)
        found = re.search(r"^(\d+) (\d+)\s*$", text)
        if code != 0 or not found:
            raise Unfit(f"{python} is no Python that runs on this machine.", "Check the path given to --python.")
        version = (int(found[1]), int(found[2]))
        if version < OLDEST:
            raise Unfit(f"{python} is Python {version[0]}.{version[1]}; the worker needs 3.11 or newer.", _hint([]))
        return {"ok": True, **_imported(python, modules, asker, _CHECK_S)}
    except Unfit as unfit:
        return {"ok": False, "message": unfit.message, "hint": unfit.hint}


def versions(python: str, modules: list[str], asker: Asker) -> dict[str, str]:
    """The versions of these modules, imported together in one process of that interpreter; Unfit when they cannot."""
    found: dict[str, str] = _imported(python, modules, asker, _BUILD_CHECK_S)["versions"]
    return found


def _imported(python: str, modules: list[str], asker: Asker, deadline_s: float) -> Frame:
    child = _Child("imports", python, {"modules": modules}, asker)
    code = child.run(deadline_s)
    done = next((frame["imported"] for frame in child.frames if "imported" in frame), None)
    if code == 0 and done is not None:
        return dict(done)
    at = next((frame["importing"] for frame in reversed(child.frames) if "importing" in frame), None)
    name, text = child.error(code)
    what = f"use {at}" if at == _TOGETHER else f"import {at}" if at else "run the worker's code"
    reason = f"{name}: {text}" if name else text
    raise Unfit(f"{python} cannot {what}: {reason}", _hint([at] if name == "ModuleNotFoundError" and at else []))


def _hint(lacking: list[str]) -> str:
    install = f"Install {', '.join(lacking)} for that Python. Or: " if lacking else ""
    return f"{install}Leave out --python, and gpu makes an environment of its own."


def _import_here(modules: list[str]) -> None:
    """Import them all in this process and say their versions; whatever is raised ends the process, said on stderr."""
    for module in modules:
        _send({"importing": module})
        importlib.import_module(module)
    cuda = False
    if "torch" in modules:
        torch, numpy = importlib.import_module("torch"), importlib.import_module("numpy")
        _send({"importing": _TOGETHER})
        torch.from_numpy(numpy.zeros(1)).numpy()  # where their binary interfaces clash, this raises
        cuda = bool(torch.cuda.is_available())
    found = {module: _version(module) for module in modules}
    _send({"imported": {"version": ".".join(map(str, sys.version_info[:2])), "versions": found, "cuda": cuda}})


def _version(module: str) -> str:
    import importlib.metadata  # slow to import, and needed in a child alone

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(module)
    return str(getattr(sys.modules[module], "__version__", ""))


# --- models ----------------------------------------------------------------------------------------------------------


def fetch(python: str, request: Frame, asker: Asker) -> Frame:
    """Have a model's files in the Hub's cache of this machine; the token travels in the child's variables alone."""
    began = time.monotonic()
    child = _Child("fetch", python, {"model": request["model"], "revision": request.get("revision")}, asker)
    env = {str(key): str(value) for key, value in request.get("env", {}).items()}
    code = child.run(_FETCH_S, {**env, "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    if code == 0 and child.frames:
        return {"ready": True, "seconds": round(time.monotonic() - began, 1), **child.frames[-1]}
    name, text = child.error(code)
    message = f"{request['model']} could not be fetched ahead: {f'{name}: ' if name else ''}{text}"
    return {"failed": {"message": message, "hint": _FETCH_HINTS.get(name, ""), "tail": child.tail()}}


def wanted(names: list[str]) -> list[str]:
    """Of a model's files those that a worker loads: configuration, tokenizer, and weights in one format."""
    fit = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in _NEVER)]
    weights = [name for name in fit if name.endswith(".safetensors")] or [name for name in fit if name.endswith(".bin")]
    if any(not name.startswith("consolidated") for name in weights):  # the same weights in another layout
        weights = [name for name in weights if not name.startswith("consolidated")]
    return sorted({*weights, *(name for name in fit if any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL))})


def _fetch_here(model: str, revision: str | None) -> None:
    """Download into the Hub's cache, saying how far it is; whatever is raised ends the process, said on stderr."""
    hub: Any = importlib.import_module("huggingface_hub")
    files = hub.HfApi().model_info(model, revision=revision, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    names = wanted(list(sizes))
    total_gb = sum(sizes[name] for name in names) / 1e9
    with _noted(Path(hub.constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "blobs", model, total_gb):
        path = hub.snapshot_download(model, revision=revision, allow_patterns=[glob.escape(name) for name in names])
    _send({"path": path, "gb": round(total_gb, 3)})


@contextlib.contextmanager
def _noted(blobs: Path, model: str, total_gb: float) -> Iterator[None]:
    """Say every few seconds how much of the model is here."""
    done = threading.Event()

    def note() -> None:
        while not done.wait(_NOTE_S):
            here_gb = 0.0
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                here_gb = sum(path.stat().st_blocks for path in blobs.glob("*")) * 512 / 1e9
            _send({"progress": f"fetching {model}: {min(here_gb, total_gb):.1f} of {total_gb:.1f} GB"})

    threading.Thread(target=note, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def here(verb: str, request: Frame) -> int:
    """What a child of that interpreter does; its exit code."""
    if verb == "imports":
        _import_here(request["modules"])
    else:
        _fetch_here(request["model"], request["revision"])
    return 0


def _send(frame: Frame) -> None:
    os.write(1, f"\n{_MARK}{json.dumps(frame)}\n".encode())

"""How one environment is made: step by step, from nothing, by a process that holds its lock and outlives the asker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import durable, locks
from worker import libraries, processes, programs
from worker.interpreters import Lock, Plan

ANOTHER_BUILDS = 75
"""Exit code of a builder that found another at work."""
TAIL_LINES = 15
LINE_MAX = 500
"""Longer lines of a log are cut."""
_LOCK_WAIT_S = 1.0
_VENV_S = 300.0
_INSTALL_S = 3600.0
_SWEEP_S = 20.0
_SWEEP_PAUSE_S = 0.05
_SPACE = 1.5  # downloads lie in a cache before they are unpacked
_FIRST = "huggingface_hub"
_HINTS = (
    (r"No space left|Errno 28\b|Disk quota", "Free some space on the machine's disk."),
    (
        r"name resolution|Name or service|dns error|NewConnectionError|Connection refused|[Tt]imed out|ProxyError",
        "The machine cannot reach its package index: look after its network, or its pip settings (pip config list).",
    ),
    (
        r"No matching distribution|Could not find a version|No solution found|ResolutionImpossible",
        "The package index that this machine uses lacks a pinned version, or has none for this kind of machine.",
    ),
)


class Broken(Exception):
    """A step of a build failed; the message says which, the hint what may help."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Place:
    """Where the files of one environment lie."""

    root: Path
    digest: str

    @property
    def folder(self) -> Path:
        """The environment itself."""
        return self.root / self.digest

    @property
    def lock(self) -> Path:
        """Held for life by the one who builds it."""
        return self.root / f"{self.digest}.lock"

    @property
    def log(self) -> Path:
        """What the last build said."""
        return self.root / f"{self.digest}.log"

    @property
    def failed(self) -> Path:
        """Why the last build failed."""
        return self.root / f"{self.digest}.failed.json"

    @property
    def hub(self) -> Path:
        """There as soon as models can be fetched with the environment's Python."""
        return self.folder / "hub.json"

    @property
    def python(self) -> str:
        """The environment's interpreter."""
        return str(self.folder / "bin" / "python")

    def ready(self) -> dict[str, Any]:
        """What the finished build left, empty when there is no whole environment."""
        known = durable.load_news(self.folder / "ready.json")
        return known if known.get("digest") == self.digest and os.access(self.python, os.X_OK) else {}

    def failure(self) -> tuple[int, int] | None:
        """What tells one failure from another."""
        with contextlib.suppress(FileNotFoundError):
            facts = self.failed.stat()
            return facts.st_ino, facts.st_mtime_ns
        return None

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """The last lines of the log."""
        with contextlib.suppress(FileNotFoundError):
            text = self.log.read_text(encoding="utf-8", errors="replace")
            return [line[:LINE_MAX] for line in text.splitlines() if line.strip()][-lines:]
        return []


def build(folder: Path, order: bytes) -> int:
    """Make the environment that was ordered, unless it is there or another process makes it; the process's exit code.

    Holds the environment's lock for life. Standard output is its log.
    """
    if not order.strip():  # the asker died before it had said what it wants
        return 1
    plan = Plan(**json.loads(order))
    place = Place(folder, plan.digest)
    held = locks.take(place.lock, _LOCK_WAIT_S)
    if held is None:
        return ANOTHER_BUILDS
    if place.ready():
        return 0
    os.ftruncate(sys.stdout.fileno(), 0)
    place.failed.unlink(missing_ok=True)
    try:
        Builder(plan, place, held).build()
    except (Broken, OSError) as error:
        found = getattr(error, "hint", "") or _hint("\n".join([*place.tail(40), str(error)]))
        failure = {"message": str(error), "hint": found, "tail": place.tail()}
        durable.save_json(place.failed, failure, synced=False)
        return 1
    return 0


def _hint(text: str) -> str:
    return next((hint for pattern, hint in _HINTS if re.search(pattern, text)), "")


class Builder:
    """Makes one environment, step by step, from nothing."""

    def __init__(self, plan: Plan, place: Place, held: int) -> None:
        self.plan = plan
        self.place = place
        self.held = held
        self.pins = Lock(Path(plan.lock), Path(plan.lock).read_text(encoding="utf-8"))
        self.mark = str(place.folder)  # not the digest alone: another root of this user may have the same

    def say(self, text: str) -> None:
        """A line of our own in the log."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def tick(self) -> None:
        """Nobody is waited for."""

    def build(self) -> None:
        """Remove what is there, install, check, and write ready.json as the very last; Broken when a step fails."""
        began = time.monotonic()
        self._clear()
        self._check_space()
        self.say(f"making an environment with Python {self.plan.version}: {self.plan.python} (process {os.getpid()})")
        self._make_folder()
        if _FIRST in self.pins.pins:  # models can be fetched with it while PyTorch comes
            self._install([[self.pins.pins[_FIRST]]], _FIRST)
            durable.save_json(self.place.hub, {"python": self.place.python})
        if "torch" in self.pins.pins:
            self._install_torch()
        self._install([[self.pins.pins[name] for name in self.pins.packages]], "the packages")
        self.say("checking that the packages work together")
        versions = self._check()
        os.sync()  # or a power cut might leave the marker without what it marks
        seconds = round(time.monotonic() - began, 1)
        known = {**self.plan.document(), "digest": self.plan.digest, "seconds": seconds, "versions": versions}
        durable.save_json(self.place.folder / "ready.json", known)

    def _check(self) -> dict[str, str]:
        try:
            return libraries.versions(self.place.python, self.pins.modules, self)
        except libraries.Unfit as unfit:
            raise Broken(f"Everything is installed, but does not work together: {unfit.message}") from None

    def _make_folder(self) -> None:
        folder, python = str(self.place.folder), self.plan.python
        venv = [self.plan.uv, "venv", "--no-project", "--python", python, folder] if self.plan.uv else []
        self._run("Making the environment", venv or [python, "-I", "-m", "venv", folder], _VENV_S)
        if not self.plan.uv:
            self._install([["pip>=24"]], "pip")  # older ones do not finish with the long lock of vLLM

    def _clear(self) -> None:
        """End what a killed build left running, and remove what it left lying."""
        deadline = time.monotonic() + _SWEEP_S
        while left := processes.marked(self.mark):
            processes.kill(left)
            if time.monotonic() >= deadline:
                raise Broken("What an earlier, killed installation left running does not end.")
            time.sleep(_SWEEP_PAUSE_S)
        if self.place.folder.exists():
            shutil.rmtree(self.place.folder)

    def _check_space(self) -> None:
        needed_gb = self.pins.gb("cuda" if self.plan.gpu else "cpu") * _SPACE
        free_gb = shutil.disk_usage(self.place.root).free / 1e9
        if needed_gb > free_gb:
            raise Broken(
                f"{self.place.root} has {free_gb:.1f} GB free; this environment needs about {needed_gb:.0f} GB.",
                "Free some space there, or take a machine with a larger disk.",
            )

    def _install_torch(self) -> None:
        torch, size_gb = self.pins.pins["torch"], self.pins.gb("cuda")
        if not self.plan.gpu and self.plan.builds[-1] == "default":
            self.say(f"no NVIDIA driver here: where pip brings PyTorch with CUDA all the same, it is {size_gb:.0f} GB")
        choices = [[torch] if build == "default" else ["--torch-backend", build, torch] for build in self.plan.builds]
        self._install(choices, f"PyTorch ({' or '.join(self.plan.builds)})")

    def _install(self, choices: list[list[str]], what: str) -> None:
        """Install by the first of the choices that works, by uv where there is one, else by pip."""
        self.say(f"installing {what}")
        only = ["--only-binary", ":all:", "-c", str(self.pins.path)]
        uv = [self.plan.uv, "--no-progress", "pip", "install", "--python", self.place.python, "--compile-bytecode"]
        pip = [self.place.python, "-I", "-m", "pip", "install", "--progress-bar", "off"]
        for choice in choices if self.plan.uv else []:
            with contextlib.suppress(Broken):
                return self._run(f"Installing {what}", [*uv, *only, *choice], _INSTALL_S)
        by_pip = [choice for choice in choices if choice[0] != "--torch-backend"]
        if not by_pip:
            raise Broken(f"Installing {what} failed: uv could not, and pip cannot choose between builds.")
        if self.plan.uv:
            self.say("uv could not, so pip tries: it may know of another index")
            self._run("Installing pip", [self.place.python, "-I", "-m", "ensurepip"], _VENV_S)
        return self._run(f"Installing {what}", [*pip, *only, *by_pip[0]], _INSTALL_S)

    def _run(self, what: str, words: list[str], deadline_s: float) -> None:
        env = programs.environment({processes.RUN_MARK: self.mark, "PIP_REQUIRE_VIRTUALENV": "1"})
        # Where the kernel does not end a program with its parent, the lock lasts until the program has ended too.
        held = () if sys.platform == "linux" else (self.held,)
        program = programs.Program(words, deadline_s, sys.stdout.fileno(), env, held=held)
        code = program.run(self)
        if code == -9:
            raise Broken(f"{what} was killed.", "The machine may be short of memory.")
        if code != 0:
            raise Broken(f"{what} {'took too long' if code == 124 else f'failed with exit code {code}'}.")

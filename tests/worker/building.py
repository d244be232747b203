"""Machines on which real environments are made quickly, and those who ask for them, for tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from worker.installation import Place

VERSION = ".".join(map(str, sys.version_info[:2]))
MAIN = str(ROOT / "worker" / "__main__.py")
TINY = "# packages: idna\n# gb_cpu: 0.05\nidna==3.10\n"
"""A lock that makes a real environment of one small package."""
BUILD_S = 90.0
Frame = dict[str, Any]


class Asking:
    """A process that asks for an environment, as the laptop starts it."""

    def __init__(self, root: Path, pins: Path, **variables: str) -> None:
        words = [sys.executable, "-I", "-X", "utf8", MAIN, "environment", str(root), str(pins)]
        env = {**os.environ, **variables}
        self.child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        assert self.child.stdin is not None
        self.child.stdin.write(b'{"kind": "train"}\n')
        self.child.stdin.flush()
        self.said: list[str] = []
        self._buffer = b""

    def frame(self, within_s: float = BUILD_S) -> Frame:
        """The next frame; fails the test when none comes."""
        assert self.child.stdout is not None
        deadline = time.monotonic() + within_s
        while b"\n" not in self._buffer:
            assert select.select([self.child.stdout], [], [], max(deadline - time.monotonic(), 0))[0], "it fell silent"
            self._buffer += os.read(self.child.stdout.fileno(), 65536)
        line, _, self._buffer = self._buffer.partition(b"\n")
        frame: Frame = json.loads(line)
        if "progress" in frame:
            self.said.append(frame["progress"])
        return frame

    def last(self) -> Frame:
        """The frame that ends it."""
        while not ({"ready", "failed"} & (frame := self.frame()).keys()):
            pass
        return frame

    def leave(self) -> None:
        """End its input, as a connection that closes does."""
        assert self.child.stdin is not None
        self.child.stdin.close()


@contextlib.contextmanager
def asking(root: Path, pins: Path, **variables: str) -> Iterator[Asking]:
    """Someone who asks, gone at the end of the block."""
    asked = Asking(root, pins, **variables)
    try:
        yield asked
    finally:
        asked.child.kill()
        for pipe in (asked.child.stdin, asked.child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        asked.child.wait()


def machine(folder: Path, lock: str = TINY) -> tuple[Path, Path]:
    """A machine's root where it is known that uv cannot be had, and a folder with a lock for this Python."""
    root, pins = folder / "root", folder / "pins"
    (root / "environments").mkdir(parents=True)
    pins.mkdir()
    (pins / f"train-{VERSION}.txt").write_text(lock, encoding="utf-8")
    (root / "environments" / "no-uv.json").write_text(json.dumps({"at": time.time()}), encoding="utf-8")
    return root, pins


def python_that(folder: Path, on_venv: str) -> str:
    """A PATH where the Python of this version is a script that says so, and does as told when it is to make a venv."""
    folder.mkdir()
    script = folder / f"python{VERSION}"
    said = f"printf '%s\\n' {VERSION} {script} True"
    script.write_text(f'#!/bin/sh\nif [ "$2" = -c ]; then {said}; exit; fi\n{on_venv}\n', encoding="utf-8")
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def quick_python(folder: Path) -> str:
    """A PATH where the Python of this version makes real environments quickly: their pip is copied from the tests'."""
    found = importlib.util.find_spec("pip")
    assert found is not None
    assert found.origin is not None
    pip = Path(found.origin).parent
    site = f'"$4/lib/python{VERSION}/site-packages/"'
    copy = f"cp -R {pip} {pip.parent}/pip-*.dist-info {site}"
    return python_that(folder, f'{sys.executable} -I -m venv --without-pip "$4" && {copy}')


def builder(root: Path) -> int | None:
    """The process that builds there, by its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes().rstrip(b"\0").endswith(f"\0build\0{root}".encode()):
                return int(entry.name)
    return None


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and nobody has asked about does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    return False


def place(root: Path) -> Place:
    [lock] = [path for path in (root / "environments").glob("*.lock") if path.stem != "choosing"]
    return Place(root / "environments", lock.stem)


def made_once(where: Place) -> int:
    """The process that made it, by the only such line of the log."""
    [line] = [line for line in where.log.read_text(encoding="utf-8").splitlines() if line.startswith("making")]
    return int(line.rpartition("process ")[2].rstrip(")"))


def at_work(root: Path) -> int | None:
    """The process that makes an environment there, by the log, once it has begun to."""
    with contextlib.suppress(ValueError, FileNotFoundError):
        return made_once(place(root))
    return None

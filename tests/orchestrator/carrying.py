"""A folder on a machine and one at home with a pull between them in this process, to be cut and repeated at will."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rundir
from orchestrator.home import Arrivals
from worker import outs, pieces, puller
from worker.puller import Puller

Frame = tuple[dict[str, Any], bytes]
LARGE = bytes(range(256)) * 21 + b"end"
"""What comes in six pieces."""


class Side:
    """A run on a machine, and its folder at home as the laptop holds it."""

    def __init__(self, folder: Path, name: str = "first", patterns: tuple[str, ...] = ("**",)) -> None:
        self.name = name
        self.home = rundir.Home(folder / "results" / "20261120-command")
        self.run = rundir.Run(folder / name / "runs" / "20261120-command")
        durable.have_folder(self.home.folder)
        durable.have_folder(self.run.work)
        durable.have_folder(self.run.attempt(1).folder)
        durable.save_json(self.run.job, {"story": "command", "out": list(patterns), "folder": ""})
        durable.save_json(self.run.current, {"attempt": 1})

    def make(self, name: str, data: bytes) -> Path:
        """Have that file in the command's folder."""
        path = self.run.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def seal(self, **more: Any) -> rundir.Seal:
        """Seal the run as its supervisor does once the command has ended."""
        made = outs.Outs(self.run).digests(lambda: None)
        seal = rundir.Seal(
            1, 0, None, "done", "", "", "", False, {}, "2026-01-01", made, rundir.outs_sha256(made), **more
        )
        durable.save_json(self.run.attempt(1).exit, seal.document())
        return seal

    def opened(self) -> Arrivals:
        """The folder at home, open for what comes from this machine."""
        arrivals = Arrivals.open(self.home, self.name)
        assert arrivals is not None
        return arrivals

    def sent(self, arrivals: Arrivals, wait_s: float = 0.0) -> list[Frame]:
        """What the machine answers a pull with."""
        out = io.BytesIO()
        request = json.loads(json.dumps(arrivals.request(wait_s)))
        Puller(self.run, request, out).pull()
        return list(parsed(out.getvalue()))

    def carry(self, spoil: Callable[[list[Frame]], list[Frame]] = list) -> list[Frame]:
        """One pull by a command of its own; returns what came."""
        with self.opened() as arrivals:
            frames = spoil(self.sent(arrivals))
            for frame, data in frames:
                if not frame.get("end"):
                    arrivals.take(frame, data)
        return frames

    def is_complete(self) -> bool:
        """Whether all that the seal on the machine names, as it is spoken of, is home."""
        seal = rundir.Seal.load(self.run.attempt(1).exit)
        assert seal is not None
        with self.opened() as arrivals:
            return arrivals.is_complete(rundir.Seal.of(json.loads(json.dumps(seal.outline()))))

    def view(self) -> dict[str, bytes]:
        """What the user sees."""
        return found(self.home.out)

    def copies(self) -> dict[str, bytes]:
        """The outs as they came from this machine."""
        return found(self.home.machine(self.name).folder / "out")


def parsed(said: bytes) -> Iterator[Frame]:
    """Every frame of an answer with its bytes."""
    source = io.BytesIO(said)
    while line := source.readline():
        assert len(line) < 64 << 10, "no header is long"
        frame = json.loads(line)
        yield frame, source.read(frame.get("bytes", 0))


def found(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextlib.contextmanager
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files are large from 2,000 bytes on, pieces have 1,000; nobody hangs up; the disk is not waited for."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None)
    monkeypatch.setattr(puller, "WHOLE_MAX_BYTES", 2000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield
    os.close(writing)

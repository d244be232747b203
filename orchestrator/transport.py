"""How a machine is spoken to: words for the agent, bytes both ways, a deadline on everything; here: this computer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from orchestrator import agents, clock
from orchestrator.errors import HomeDiskFull, JobFailed, NotReachable

CALL_DEADLINE_S = 60.0
SILENCE_S = 30.0
"""A stream that says nothing for this long is dead: the agent sends a beat every few seconds."""
_FRAME_LINE_MAX_BYTES = 64 * 1024
_FRAME_DATA_MAX_BYTES = 256 << 20
Frame = dict[str, Any]


class Stream(Protocol):
    """What a running agent command says."""

    def read(self, size: int, deadline: float) -> bytes:
        """Up to `size` bytes, b"" at the end; NotReachable when `deadline` (monotonic seconds) passes without any."""
        ...

    def last_words(self) -> str:
        """The last line of what it complained about, empty when it did not."""
        ...


class Machine(Protocol):
    """A place where runs are kept and agents can be started."""

    name: str
    root: Path
    """The folder that holds `agent/` and `runs/` there."""
    python: str

    def call(self, words: list[str], data: bytes, deadline_s: float = CALL_DEADLINE_S) -> bytes:
        """What a command wrote, once it has ended with exit code 0; NotReachable otherwise."""
        ...

    def open(self, words: list[str], data: bytes) -> contextlib.AbstractContextManager[Stream]:
        """A command that keeps talking; it sees the end of its input when the block is left."""
        ...

    def push_agent(self, store: Path, name: str) -> None:
        """Have the code snapshot `name` under `agent/<name>`; nothing is sent twice."""
        ...


def agent_words(machine: Machine, agent: str, verb: str, run_id: str, *more: str) -> list[str]:
    """The words that start an agent command for a run: the one place where they are put together."""
    main = machine.root / "agent" / agent / "worker" / "__main__.py"
    return [machine.python, "-I", str(main), verb, str(machine.root / "runs" / run_id), *more]


def ask(machine: Machine, words: list[str], data: bytes = b"", deadline_s: float = CALL_DEADLINE_S) -> Frame:
    """The JSON answer of an agent command."""
    answer = machine.call(words, data, deadline_s)
    try:
        frame = json.loads(answer)
    except (ValueError, RecursionError):
        frame = None
    if not isinstance(frame, dict):
        raise NotReachable(f"{machine.name} answered with something else than an answer: {answer[:200]!r}")
    if frame.get("error") == "disk_full":
        raise (HomeDiskFull if machine.name == "local" else JobFailed)(
            f"No space is left on the disk of {machine.name} that holds {frame['folder']}. Nothing was lost.",
            "Free some space there, then resume the run.",
        )
    return frame


def frames(stream: Stream) -> Iterator[tuple[Frame, bytes]]:
    """Each frame with its bytes, until the stream ends; a frame that is cut is not given."""
    buffer = b""
    while True:
        line, buffer = _until_newline(stream, buffer)
        if line is None:
            return
        frame = _frame(line)
        size = frame.get("bytes", 0)
        pieces = [buffer[:size]]
        missing = size - len(pieces[0])
        buffer = buffer[size:]
        while missing:
            chunk = stream.read(min(missing, 1 << 20), clock.monotonic() + SILENCE_S)
            if not chunk:
                return
            pieces.append(chunk)
            missing -= len(chunk)
        yield frame, b"".join(pieces)


def _frame(line: bytes) -> Frame:
    """The header of a frame, its few fields of the right types; NotReachable for anything else."""
    try:
        frame = json.loads(line)
    except (ValueError, RecursionError):
        frame = None
    names = ("file", "whole", "diverged", "sha256", "state")
    if (
        isinstance(frame, dict)
        and all(isinstance(frame.get(name, ""), str) for name in names)
        and all(type(frame.get(name, 0)) is int for name in ("bytes", "offset", "attempt"))
        and 0 <= frame.get("bytes", 0) <= _FRAME_DATA_MAX_BYTES
        and (not frame.get("end") or {"state", "attempt"} <= frame.keys())
        and ("file" not in frame or "offset" in frame)
    ):
        return frame
    raise NotReachable(f"The machine sent something that is no frame: {line[:80]!r}")


def _until_newline(stream: Stream, buffer: bytes) -> tuple[bytes | None, bytes]:
    while b"\n" not in buffer:
        if len(buffer) > _FRAME_LINE_MAX_BYTES:
            raise NotReachable("the machine sent an endless line")
        chunk = stream.read(1 << 16, clock.monotonic() + SILENCE_S)
        if not chunk:
            return None, b""
        buffer += chunk
    line, _, rest = buffer.partition(b"\n")
    return line, rest


class _Pipe:
    """The output of a process of ours, read with deadlines."""

    def __init__(self, descriptor: int, complaints: IO[bytes]) -> None:
        self._descriptor = descriptor
        self._complaints = complaints

    def last_words(self) -> str:
        """See Stream."""
        self._complaints.seek(0)
        return _last_line(self._complaints.read())

    def read(self, size: int, deadline: float) -> bytes:
        """See Stream."""
        if not select.select([self._descriptor], [], [], max(deadline - clock.monotonic(), 0))[0]:
            raise NotReachable("this computer's agent fell silent")
        return os.read(self._descriptor, size)


class LocalMachine:
    """This computer as a machine: the same agent, spoken to through a subprocess; its folder lies in `GPU_HOME`."""

    name = "local"

    def __init__(self, root: Path, python: str = sys.executable) -> None:
        self.root = root
        self.python = python

    def call(self, words: list[str], data: bytes, deadline_s: float = CALL_DEADLINE_S) -> bytes:
        """See Machine."""
        with _started(words) as child:
            try:
                out, said = child.communicate(data, timeout=deadline_s)
            except subprocess.TimeoutExpired:
                raise NotReachable(f"this computer's agent did not answer within {deadline_s:g} s") from None
        if child.returncode != 0:
            raise NotReachable(f"this computer's agent ended with exit code {child.returncode}: {_last_line(said)}")
        return out

    @contextlib.contextmanager
    def open(self, words: list[str], data: bytes) -> Iterator[Stream]:
        """See Machine."""
        with tempfile.TemporaryFile() as complaints, _started(words, complaints) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(data)
                child.stdin.flush()
            yield _Pipe(child.stdout.fileno(), complaints)

    def push_agent(self, store: Path, name: str) -> None:
        """See Machine."""
        agents.write(agents.kept(store, name), self.root / "agent" / name)


def _last_line(text: bytes) -> str:
    return (text.decode("utf-8", "replace").strip().splitlines() or [""])[-1]


@contextlib.contextmanager
def _started(words: list[str], errors: int | IO[bytes] = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """A child process in a group of its own, gone with its group when the block is left on whatever path."""
    child = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, process_group=0, bufsize=-1
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        child.wait()

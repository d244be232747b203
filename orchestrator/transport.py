"""How a machine is spoken to: words for the agent, bytes both ways, a deadline on everything; here: this computer."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from jobs import durable
from orchestrator import agents, clock
from orchestrator.errors import BadAnswer, HomeDiskFull, JobFailed, NotReachable

CALL_DEADLINE_S = 60.0
SILENCE_S = 20.0
"""A stream that says nothing for this long is dead: the agent sends a beat every few seconds."""
_LOOK_S = 0.05
_FRAME_LINE_MAX_BYTES = 64 * 1024
_FRAME_DATA_MAX_BYTES = 256 << 20
Frame = dict[str, Any]
Data = bytes | Callable[[], Iterable[bytes]]
"""What a command is sent: bytes, or, where they are many, a way to read them from the beginning."""


class Stream(Protocol):
    """What a running agent command says."""

    def read(self, size: int, deadline: float) -> bytes:
        """Up to `size` bytes, b"" at the end; NotReachable when `deadline` (monotonic seconds) passes without any."""
        ...

    def last_words(self) -> str:
        """The last line of what it complained about, empty when it did not."""
        ...

    def read_error(self, size: int) -> bytes:
        """Up to `size` bytes of what it complains about, as they come; b"" at the end."""
        ...

    def code(self, deadline: float) -> int:
        """Its exit code, once it has closed its output; NotReachable when that is not to be known."""
        ...


class Machine(Protocol):
    """A place where runs are kept and agents can be started."""

    name: str
    root: Path
    """The folder that holds `agent/` and `runs/` there."""
    python: str
    patience_s: float
    """How long a machine that does not answer is asked again by whoever follows a run on it."""

    def call(self, words: list[str], data: Data, deadline_s: float = CALL_DEADLINE_S) -> bytes:
        """What a command wrote, once it has ended with exit code 0; NotReachable otherwise."""
        ...

    def open(self, words: list[str], data: bytes) -> contextlib.AbstractContextManager[Stream]:
        """A command that keeps talking; it sees the end of its input when the block is left."""
        ...

    def close(self) -> None:
        """Cut every connection, of all threads; the next call opens a new one."""
        ...

    def cut(self) -> None:
        """Give up all that goes on, in every thread, for good: somebody does not want to wait any more."""
        ...

    def is_gone(self) -> bool:
        """Whether it is surely no more, by the word of whoever rents it out; asked when it does not answer."""
        ...

    def push_agent(self, store: Path, name: str) -> None:
        """Have the code snapshot `name` under `agent/<name>`; nothing is sent twice."""
        ...

    def push_files(self, files: list[tuple[Path, str]], progress: Callable[[int], None]) -> None:
        """Put large files at `store/incoming/<name>`, carrying on with what is there; `progress` gets bytes so far.

        Whether they arrived intact is for a hash to say. Repeat it when it raises NotReachable.
        """
        ...


def agent_words(machine: Machine, agent: str, verb: str, run_id: str, *more: str) -> list[str]:
    """The words that start an agent command for a run."""
    return [*_start(machine, agent, verb), str(machine.root / "runs" / run_id), *more]


def root_words(machine: Machine, agent: str, verb: str) -> list[str]:
    """The words that start an agent command for all of a machine."""
    return [*_start(machine, agent, verb), str(machine.root)]


def _start(machine: Machine, agent: str, verb: str) -> list[str]:
    """The beginning of every command: the one place where it is put together."""
    return [machine.python, "-I", "-X", "utf8", str(machine.root / "agent" / agent / "worker" / "__main__.py"), verb]


def ask(machine: Machine, words: list[str], data: Data = b"", deadline_s: float = CALL_DEADLINE_S) -> Frame:
    """The JSON answer of an agent command."""
    answer = machine.call(words, data, deadline_s)
    try:
        frame = json.loads(answer)
    except (ValueError, RecursionError):
        frame = None
    if not isinstance(frame, dict):
        raise BadAnswer(f"{machine.name} answered with something else than an answer: {answer[:200]!r}")
    if frame.get("error") == "disk_full":
        raise (HomeDiskFull if machine.name == "local" else JobFailed)(
            f"No space is left on the disk of {machine.name} that holds {frame.get('folder')}. Nothing was lost.",
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
    names = ("file", "whole", "piece", "diverged", "sha256", "digest", "state", "skipped", "why")
    if (
        isinstance(frame, dict)
        and all(isinstance(frame.get(name, ""), str) for name in names)
        and all(type(frame.get(name, 0)) is int for name in ("bytes", "offset", "attempt", "total"))
        and 0 <= frame.get("bytes", 0) <= _FRAME_DATA_MAX_BYTES
        and (not frame.get("end") or {"state", "attempt"} <= frame.keys())
        and (not {"file", "piece"} & frame.keys() or "offset" in frame)
        and ("piece" not in frame or {"digest", "total"} <= frame.keys())
    ):
        return frame
    raise BadAnswer(f"The machine sent something that is no frame: {line[:80]!r}")


def _until_newline(stream: Stream, buffer: bytes) -> tuple[bytes | None, bytes]:
    while b"\n" not in buffer:
        if len(buffer) > _FRAME_LINE_MAX_BYTES:
            raise BadAnswer("The machine sent an endless line.")
        chunk = stream.read(1 << 16, clock.monotonic() + SILENCE_S)
        if not chunk:
            return None, b""
        buffer += chunk
    line, _, rest = buffer.partition(b"\n")
    return line, rest


class _Pipe:
    """The output of a process of ours, read with deadlines."""

    def __init__(self, child: subprocess.Popen[bytes], complaints: IO[bytes]) -> None:
        assert child.stdout is not None
        self._child = child
        self._descriptor = child.stdout.fileno()
        self._complaints = complaints
        self._complained = 0

    def last_words(self) -> str:
        """See Stream."""
        self._complaints.seek(0)
        return last_line(self._complaints.read())

    def read(self, size: int, deadline: float) -> bytes:
        """See Stream."""
        left_s = None if math.isinf(deadline) else max(deadline - clock.monotonic(), 0)
        if not select.select([self._descriptor], [], [], left_s)[0]:
            raise NotReachable("this computer's agent fell silent")
        return os.read(self._descriptor, size)

    def read_error(self, size: int) -> bytes:
        """See Stream."""
        while True:
            ended = self._child.poll() is not None  # before the look: what it wrote until then is seen below
            said = os.pread(self._complaints.fileno(), size, self._complained)
            self._complained += len(said)
            if said or ended:
                return said
            time.sleep(_LOOK_S)

    def code(self, deadline: float) -> int:
        """See Stream."""
        try:
            return self._child.wait(None if math.isinf(deadline) else max(deadline - clock.monotonic(), 0))
        except subprocess.TimeoutExpired:
            raise NotReachable("this computer's agent does not end") from None


class ForgottenMachine:
    """A machine that a run was on and that is not known here any more: it cannot be asked; nothing of it is lost."""

    patience_s = 0.0
    python = ""

    def __init__(self, name: str, is_gone: Callable[[], bool] = lambda: False) -> None:
        self.name = name
        self.root = Path("/")
        self.is_gone = is_gone

    def _unknown(self, *_: object, **__: object) -> NoReturn:
        raise NotReachable(
            f"{self.name} is not known here any more, so it cannot be asked. What is home is kept.",
            "Add it again under this name, or go on elsewhere: gpu resume RUN --on NAME --take-over",
        )

    call = open = push_agent = push_files = _unknown

    def close(self) -> None:
        """See Machine."""

    def cut(self) -> None:
        """See Machine."""


class LocalMachine:
    """This computer as a machine: the same agent, spoken to through a subprocess; its folder lies in `GPU_HOME`."""

    name = "local"
    patience_s = 5.0

    def __init__(self, root: Path, python: str = sys.executable) -> None:
        self.root = root
        self.python = python

    def is_gone(self) -> bool:
        """See Machine."""
        return False

    def call(self, words: list[str], data: Data, deadline_s: float = CALL_DEADLINE_S) -> bytes:
        """See Machine."""
        with _spooled(data) as (pipe, given), _started(words, source=pipe) as child:
            try:
                out, said = child.communicate(given, timeout=deadline_s)
            except subprocess.TimeoutExpired:
                raise NotReachable(f"this computer's agent did not answer within {deadline_s:g} s") from None
        if child.returncode != 0:
            raise BadAnswer(f"this computer's agent ended with exit code {child.returncode}: {last_line(said)}")
        return out

    @contextlib.contextmanager
    def open(self, words: list[str], data: bytes) -> Iterator[Stream]:
        """See Machine."""
        with tempfile.TemporaryFile() as complaints, _started(words, complaints) as child:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(data)
                child.stdin.flush()
            yield _Pipe(child, complaints)

    def close(self) -> None:
        """See Machine. There are none."""

    def cut(self) -> None:
        """See Machine. What goes on here ends with this process."""

    def push_agent(self, store: Path, name: str) -> None:
        """See Machine."""
        agents.write(agents.kept(store, name), self.root / "agent" / name)

    def push_files(self, files: list[tuple[Path, str]], progress: Callable[[int], None]) -> None:
        """See Machine."""
        incoming = self.root / "store" / "incoming"
        durable.have_folder(incoming)
        copied = 0
        for source, name in files:
            try:
                shutil.copyfile(source, incoming / name)
            except OSError as error:
                if not durable.is_full(error):
                    raise
                raise HomeDiskFull(f"No space is left on the disk that holds {incoming}.", "Free some.") from None
            copied += source.stat().st_size
            progress(copied)


def last_line(text: bytes) -> str:
    """The last line of what was said, empty when nothing was."""
    return (text.decode("utf-8", "replace").strip().splitlines() or [""])[-1]


@contextlib.contextmanager
def _spooled(data: Data) -> Iterator[tuple[int | IO[bytes], bytes | None]]:
    """Standard input for a child, and what to write to it: what is read piece by piece goes through a file."""
    if isinstance(data, bytes):
        yield subprocess.PIPE, data
        return
    with tempfile.TemporaryFile() as spool:
        for piece in data():
            spool.write(piece)
        spool.seek(0)
        yield spool, None


@contextlib.contextmanager
def _started(
    words: list[str], errors: int | IO[bytes] = subprocess.PIPE, source: int | IO[bytes] = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process in a group of its own, gone with its group when the block is left on whatever path."""
    child = subprocess.Popen(words, stdin=source, stdout=subprocess.PIPE, stderr=errors, process_group=0, bufsize=-1)
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

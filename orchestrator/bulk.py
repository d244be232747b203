"""Large files to and from a machine by the system's rsync over ssh, killed as a group; and what ssh-keygen knows."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator import clock
from orchestrator.errors import ConfigError, NotReachable

_STALLED_S = 60.0
"""rsync that moves nothing for this long is given up; ssh's own ServerAlive notices a dead peer after 30 s."""
_SLOWEST_BYTES_PER_S = 20_000
_DEADLINE_S = 600.0
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")
_PROGRESS = re.compile(rb"\s*([0-9][0-9,.]*)\s+[0-9]+%")
_PIECE_BYTES = 1 << 20
_TOOL_DEADLINE_S = 10.0
_LOOK_S = 0.25
_PROTOCOL = 2  # rsync(1), EXIT VALUES


class Unclean(NotReachable):
    """A login file there prints, so that rsync cannot speak to its other half; another way is to be taken."""


def can_rsync(target: Path) -> bool:
    """Whether rsync is here and the target's name means the same to every rsync: some pass it through a shell."""
    return shutil.which("rsync") is not None and _PLAIN_PATH.fullmatch(str(target)) is not None


@dataclass(frozen=True)
class Target:
    """Where files go: a folder on the host of an ssh_config; `given_up` says when nobody waits any more."""

    config: Path
    host: str
    folder: Path
    given_up: Callable[[], bool]


def push(target: Target, files: list[tuple[Path, str]], progress: Callable[[int], None]) -> None:
    """Put each file at `<folder>/<name>`; a part left by an earlier try is carried on with.

    `progress` is told the bytes sent so far. Raises NotReachable when it breaks off or stalls; repeat it then.
    """
    total = sum(source.stat().st_size for source, _ in files)
    with tempfile.TemporaryDirectory(prefix="gpu-") as links:
        for source, name in files:
            (Path(links) / name).symlink_to(source.absolute())
        words = ["rsync", "-rL", "--inplace", "--partial", "--no-perms", "--chmod=F600", "--progress"]
        shell = f'ssh -F "{target.config}" -o ServerAliveInterval=5'  # so that a dead peer is noticed within 20 s
        words += ["-e", shell, "--", f"{links}/", f"{target.host}:{target.folder}/"]
        watch = _Watch(target.host, _DEADLINE_S + total / _SLOWEST_BYTES_PER_S, target.given_up, progress)
        _watched(words, watch, f"The copy to {target.host}")


@dataclass(frozen=True)
class Source:
    """What is copied here: a folder of a module of the rsync that the host of an ssh_config offers over ssh."""

    config: Path
    host: str
    path: str
    """MODULE/FOLDER."""
    file_max_bytes: int
    given_up: Callable[[], bool]
    """Says, some times a second, when it is to be broken off; it may raise, to say why."""


def pull(source: Source, folder: Path, rules: list[str], scratch: Path | None) -> None:
    """Copy the regular files that rsync's filter rules let through into a folder of ours.

    What only grows is written in place, so that a copy that breaks off leaves a beginning of it; with `scratch`, a
    folder on the same disk, files appear whole or not at all. Raises NotReachable when it breaks off, or is given up.
    """
    words = ["rsync", "-rm", "--no-inc-recursive", "--no-links", "--no-perms", "--chmod=D700,F600", "--whole-file"]
    words += ["--inplace"] if scratch is None else [f"--temp-dir={scratch}"]
    words += [f"--max-size={source.file_max_bytes}", *(f"--filter={rule}" for rule in rules)]
    shell = f'ssh -F "{source.config}" -o BatchMode=yes -o ServerAliveInterval=5'
    words += ["-e", shell, "--", f"{source.host}::{source.path}/", f"{folder}/"]
    _watched(words, _Watch(source.host, _DEADLINE_S, source.given_up, lambda _: None), f"The copy from {source.host}")


@dataclass(frozen=True)
class _Watch:
    """Over a running rsync."""

    host: str
    deadline_s: float
    given_up: Callable[[], bool]
    progress: Callable[[int], None]


def _watched(words: list[str], watch: _Watch, what: str) -> None:
    """Run rsync; whatever happens, nothing of its process group is left when this returns."""
    host = watch.host
    deadline = clock.monotonic() + watch.deadline_s
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, process_group=0
        )
        assert child.stdout is not None
        try:
            _read_progress(child.stdout.fileno(), deadline, watch.given_up, watch.progress)
            code = child.wait(timeout=_TOOL_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise NotReachable(f"{what} did not end.") from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.stdout.close()
            child.wait()
        complaints.seek(0)
        said = complaints.read().decode("utf-8", "replace").strip().splitlines() or ["nothing"]
    if code == _PROTOCOL and "shell clean" in " ".join(said):
        raise Unclean(f"{host} prints something when a command begins, which rsync cannot bear.")
    if code != 0:
        full = "No space left" in " ".join(said)
        kind = ConfigError if full else NotReachable
        raise kind(f"{what} broke off (rsync exit code {code}): {said[0]}", "Repeat it: it goes on there.")


def _read_progress(
    descriptor: int, deadline: float, given_up: Callable[[], bool], progress: Callable[[int], None]
) -> None:
    """Pass on the bytes that rsync says it sent, until its output ends; NotReachable when nothing moves."""
    moved_at, before, last, rest = clock.monotonic(), 0, 0, b""
    while True:
        now = clock.monotonic()
        if given_up():
            raise NotReachable("The copy was given up.")
        if now > min(deadline, moved_at + _STALLED_S):
            raise NotReachable("The copy stands still: nothing was taken for a minute.", "Repeat it: it goes on there.")
        if not select.select([descriptor], [], [], _LOOK_S)[0]:
            continue
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return
        *lines, rest = re.split(rb"[\r\n]", rest + chunk)
        for line in lines:
            if found := _PROGRESS.match(line):
                count = int(re.sub(rb"[,.]", b"", found[1]))
                before, last = (before + last, count) if count < last else (before, count)
                moved_at = now
        progress(before + last)


def pieces(source: Path, offset: int, progress: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of a file from `offset` on, in pieces."""
    with source.open("rb") as file:
        file.seek(offset)
        while piece := file.read(_PIECE_BYTES):
            yield piece
            offset += len(piece)
            progress(offset)


def fingerprint(key: Path) -> str | None:
    """The SHA256 fingerprint of a key file, as ssh-keygen reads it from its public part; None when it cannot."""
    asked = subprocess.run(
        ["ssh-keygen", "-l", "-E", "sha256", "-f", str(key)], capture_output=True, timeout=_TOOL_DEADLINE_S, check=False
    )
    words = asked.stdout.decode("utf-8", "replace").split()
    return words[1] if asked.returncode == 0 and len(words) > 1 else None

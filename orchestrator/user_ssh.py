"""One line in the user's own SSH configuration, so that `ssh gpu-NAME`, scp and editors find the chosen machines."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jobs import durable, locks, rundir
from orchestrator import config, ssh_config
from orchestrator.errors import ConfigError, UsageError

_LOCK_WAIT_S = 10.0
_BLOCK = re.compile(rb'^[ \t]*"?(?:host|match)["\s=]', re.IGNORECASE | re.MULTILINE)
_GLOB = re.compile(r"[\[\]{}*?%$]")
_READ_ONLY = "it is read-only"


@dataclass
class _Book:
    """What was set up, kept in the state folder so that it can be undone exactly."""

    machines: list[str] = field(default_factory=list)
    line: str = ""
    """The line put into the user's configuration; empty when there is none of ours."""
    made: list[str] = field(default_factory=list)
    """What was not there before: `config`, `folder`."""

    def save(self, state: Path) -> None:
        """Write the book and the fragment made from it, which is what ssh reads."""
        durable.save_json(state / "ssh_setup.json", asdict(self))
        lines = [_include(state / "machines" / name / "ssh_config") for name in self.machines]
        text = "\n".join(["# Written by: gpu setup-ssh", *lines]) + "\n"
        durable.replace_whole(state / "ssh_config", text.encode())


def chosen() -> list[str]:
    """The machines that are set up, by name."""
    return _load(config.state_folder()).machines


def choices() -> list[str]:
    """The machines that can be set up, by name: those with an ssh_config."""
    return sorted(path.parent.name for path in (config.state_folder() / "machines").glob("*/ssh_config"))


def set_up(name: str, home: Path) -> str:
    """Have `ssh gpu-NAME` lead to a machine; returns that name. May be repeated.

    Raises UsageError when there is no such machine, and ConfigError, with the line to add by hand, when the user's
    configuration cannot be written; it is as it was then.
    """
    state = config.state_folder()
    host = ssh_config.alias(name)
    if not (state / "machines" / name / "ssh_config").is_file():
        raise UsageError(f"There is no machine {name!r} to log in to.", "See the machines: gpu status")
    with _locked(state):
        book = _load(state)
        book.machines = sorted({*book.machines, name})
        line = _include(state / "ssh_config")
        with _words(home, f"Make this its first line by hand: {line}"):
            book.save(state)
            _add(home, line, book, state)
    return host


def undo(name: str, home: Path) -> bool:
    """Take a machine out again; whether it was in. With the last one the user's configuration is as it was before.

    Raises ConfigError, with the line to take out by hand, when that configuration cannot be written.
    """
    state = config.state_folder()
    if not (state / "ssh_setup.json").exists():
        return False
    with _locked(state):
        book = _load(state)
        was_in = name in book.machines
        book.machines = [other for other in book.machines if other != name]
        with _words(home, f"Take this line out by hand: {book.line}"):
            book.save(state)
            if not book.machines:
                _remove(home, book)
                for left in ("ssh_config", "ssh_setup.json"):
                    (state / left).unlink(missing_ok=True)
    return was_in


def _include(path: Path) -> str:
    """A line that includes this one file. Include takes a pattern: signs with a meaning are matched by `?`."""
    return f'Include "{_GLOB.sub("?", ssh_config.check_path(path))}"'


def _load(state: Path) -> _Book:
    """The book as it was saved; what is damaged is left out, since all it says can be set up again."""
    found = durable.load_news(state / "ssh_setup.json")
    words = {key: [str(word) for word in value] for key, value in found.items() if isinstance(value, list)}
    names = [name for name in words.get("machines", []) if rundir.is_safe_name(name)]
    return _Book(names, str(found.get("line", "")), words.get("made", []))


@contextlib.contextmanager
def _locked(state: Path) -> Iterator[None]:
    try:
        with locks.held(state / "ssh_setup.lock", _LOCK_WAIT_S):
            yield
    except TimeoutError:
        raise ConfigError("Another gpu setup-ssh is at work. Nothing was changed.", "Try again.") from None


@contextlib.contextmanager
def _words(home: Path, by_hand: str) -> Iterator[None]:
    """Turn what the disk says into words, and what the user can do instead."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ConfigError(f"{home / '.ssh' / 'config'} was not changed: {error.strerror}{where}.", by_hand) from None


def _add(home: Path, line: str, book: _Book, state: Path) -> None:
    """Make the line the first one, unless it stands before every Host block; the book says so before it is done."""
    path = _real(home)
    before = _read(path)
    content = before or b""
    if book.line and book.line != line:  # the state folder was moved
        content = _without(content, book.line)
    if _is_in(content, line):
        return
    made = {"config": before is None, "folder": not path.parent.exists()}
    book.made = sorted({*book.made, *(thing for thing, new in made.items() if new)})
    book.line = line
    newline = b"\r\n" if content.partition(b"\n")[0].endswith(b"\r") else b"\n"
    _check_ours(path, before)
    book.save(state)
    if made["folder"]:
        durable.make_folder(path.parent)
    _write(path, before, line.encode() + newline + content)


def _remove(home: Path, book: _Book) -> None:
    """Take our line out, and away with what was made for it and is empty now."""
    path = _real(home)
    before = _read(path)
    if before is None:
        return
    after = _without(before, book.line) if book.line else before
    if after != before:
        _check_ours(path, before)
        _write(path, before, after)
    if not after and "config" in book.made:
        path.unlink()
        if "folder" in book.made:
            with contextlib.suppress(OSError):  # it is in use by now
                path.parent.rmdir()


def _real(home: Path) -> Path:
    """The file behind ~/.ssh/config, which may be a link into a folder of dotfiles."""
    return Path(os.path.realpath(home / ".ssh" / "config"))


def _read(path: Path) -> bytes | None:
    """The user's configuration, None when there is none; OSError when it is no regular file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for ever
            raise OSError(errno.EINVAL, "it is not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _check_ours(path: Path, before: bytes | None) -> None:
    """OSError when the file is not this user's to write: a file replaced by another user is one that ssh refuses."""
    place = next(place for place in (path, *path.parents) if place.exists())
    facts = place.stat()
    if facts.st_uid != os.geteuid():
        raise OSError(errno.EPERM, f"{place} belongs to another user")
    if before is not None and not (facts.st_mode & 0o222 and os.access(place, os.W_OK)):
        raise OSError(errno.EACCES, _READ_ONLY)


def _write(path: Path, before: bytes | None, after: bytes) -> None:
    """Replace the file whole, its mode kept; OSError when it is not any more what it was when it was read."""
    if _read(path) != before:
        raise OSError(errno.EAGAIN, "another program is changing it; try again")
    mode = 0o600 if before is None else stat.S_IMODE(path.stat().st_mode)
    durable.replace_whole(path, after)
    path.chmod(mode)


def _is_in(content: bytes, line: str) -> bool:
    """Whether the line stands before the first Host or Match block, where it holds for every host."""
    block = _BLOCK.search(content)
    found = _pattern(line).search(content)
    return found is not None and (block is None or found.start() < block.start())


def _without(content: bytes, line: str) -> bytes:
    return _pattern(line).sub(b"", content, count=1)


def _pattern(line: str) -> re.Pattern[bytes]:
    return re.compile(rb"^[ \t]*" + re.escape(line.encode()) + rb"[ \t]*\r?(?:\n|\Z)", re.MULTILINE)

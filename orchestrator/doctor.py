"""What a working setup needs, looked at one by one: tools, folders, disks, machines and account keys."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestrator import clock, config, keys, providers
from orchestrator.errors import AuthRejected, ConfigError, GpuError
from orchestrator.plain import plain

OK, WARN, BAD = "ok", "warn", "bad"
ANSWER_S = 10.0
"""How long a machine or a provider may take to answer."""
_TOOL_S = 10.0
_PYTHON = (3, 11)
_RSYNC = (3, 4, 3)
_SSH = (7, 3)
_GB = 10**9
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
Reach = Callable[[str], str | None]
"""Asks a machine, by name; returns why it does not answer, or None when it does."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: str
    """ok, warn, bad."""
    words: str
    mend: str = ""
    """What to do about it."""


def checks(reach: Reach | None) -> Iterator[Check]:
    """Every check, in the order of a first setup; without `reach` nothing outside this computer is asked."""
    yield python(sys.version_info[:3])
    yield from tools()
    yield from state_folder()
    yield disk("disk of results", config.results_folder())
    yield from machines(reach)
    yield from accounts(reach is not None)


def python(version: tuple[int, ...]) -> Check:
    """Whether this interpreter is new enough."""
    shown = ".".join(map(str, version))
    if version >= _PYTHON:
        return Check("python", OK, shown)
    return Check("python", BAD, f"{shown}; 3.11 or newer is needed", "Install gpu with a newer Python.")


def tools() -> Iterator[Check]:
    """The programs that are called by name."""
    yield _ssh()
    yield _present("ssh-keygen", "keys with a passphrase cannot be recognized")
    yield rsync()
    yield _present("git", "runs do not remember the commit of your code")


def _present(name: str, loss: str) -> Check:
    if shutil.which(name) is None:
        return Check(name, WARN, f"not found: {loss}", f"Install {name}.")
    return Check(name, OK, "found")


def _ssh() -> Check:
    said = _said("ssh", "-V")
    if said is None:
        return Check("ssh", BAD, "not found, or it does not run: gpu ssh and fast copies need it", "Install OpenSSH.")
    version = _version(said)
    if version and version < _SSH:
        return Check("ssh", WARN, f"{said}: gpu setup-ssh needs OpenSSH 7.3 or newer", "Install a newer OpenSSH.")
    return Check("ssh", OK, said)


def rsync() -> Check:
    """Whether rsync is here, and no danger to this computer when the other side is hostile."""
    said = _said("rsync", "--version")
    slower = "files go through the slower tar path"
    if said is None:
        return Check("rsync", WARN, f"not found, or it does not run: {slower}", "Install rsync 3.4.3 or newer.")
    if "openrsync" in said:
        return Check("rsync", WARN, f"openrsync lacks what we use: {slower}", "Install rsync 3.4.3 or newer.")
    version = _version(said)
    if version is None or version < _RSYNC:
        danger = "before 3.4.3 a hostile machine can harm this computer through it"
        return Check("rsync", WARN, f"{said}: {danger}", "Install rsync 3.4.3 or newer.")
    return Check("rsync", OK, said)


def _said(*words: str) -> str | None:
    """The first line a program says of itself; None when it is not there or fails."""
    try:
        done = subprocess.run(
            words, capture_output=True, timeout=_TOOL_S, check=False, stdin=subprocess.DEVNULL, text=True
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    lines = (done.stdout + done.stderr).strip().splitlines()
    return plain(lines[0])[:100] if done.returncode == 0 and lines else None


def _version(said: str) -> tuple[int, ...] | None:
    found = _VERSION.search(said)
    return tuple(int(number or 0) for number in found.groups()) if found else None


def state_folder() -> Iterator[Check]:
    """Whether the state folder is there, private and writable, with space on its disk."""
    try:
        folder = config.state_folder()
    except ConfigError as error:
        yield Check("state folder", BAD, error.message, error.hint)
        return
    yield _writable(folder)
    yield _private_folder(folder)
    yield disk("disk of state", folder)


def _writable(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check("state folder", OK, str(folder))
    except OSError as error:
        words = f"{folder} cannot be written: {error.strerror}"
        return Check("state folder", BAD, words, "Make it writable, or set GPU_HOME to another folder.")


def _private_folder(folder: Path) -> Check:
    facts = folder.stat()
    mode = stat.S_IMODE(facts.st_mode)
    if facts.st_uid != os.geteuid():
        return Check(
            "state permissions", BAD, f"{folder} belongs to another user", "Set GPU_HOME to a folder of yours."
        )
    if mode & 0o077:
        state, words = (BAD, "can change") if mode & 0o022 else (WARN, "can look into")
        return Check("state permissions", state, f"others {words} {folder}", _chmod("700", folder))
    return Check("state permissions", OK, "private")


def _chmod(mode: str, path: Path) -> str:
    return f"chmod {mode} {shlex.quote(str(path))}"


def disk(name: str, folder: Path) -> Check:
    """Whether there is space where a folder is, or will be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    words = f"{free / _GB:.1f} GB free at {there}"
    state = BAD if free < _GB else WARN if free < 10 * _GB else OK
    return Check(name, state, words, "" if state == OK else "Free some space there: rows and weights come home to it.")


def machines(reach: Reach | None) -> Iterator[Check]:
    """Each machine of one's own: its files, and whether it answers."""
    try:
        folders = sorted(path for path in (config.state_folder() / "machines").glob("[!.]*") if path.is_dir())
    except ConfigError:
        return  # said by the check of that folder
    remote = [folder for folder in folders if folder.name != "local"]
    asked = {folder.name: _asking(reach, folder.name) for folder in remote} if reach else {}
    late: str | None = _LATE.words
    answers = _all_at_once(asked, late)
    for folder in remote:
        yield _machine_files(folder)
        if reach:
            why = answers[folder.name]
            mend = f"Look at it: gpu status {folder.name}. If it is gone for good: gpu forget {folder.name}"
            name = f"{folder.name} answers"
            yield Check(name, BAD, plain(why), mend) if why else Check(name, OK, "yes")


def _asking(reach: Reach, name: str) -> Callable[[], str | None]:
    def ask() -> str | None:
        try:
            return reach(name)
        except (GpuError, OSError) as error:
            return str(error)

    return ask


def _machine_files(folder: Path) -> Check:
    """Whether a machine's folder holds what ssh needs, its private key for this user alone."""
    name = f"{folder.name} files"
    missing = [file for file in ("machine.json", "ssh_config", "known_hosts") if not (folder / file).is_file()]
    if missing:
        first = f"rm -r {shlex.quote(str(folder))}" if "machine.json" in missing else f"gpu forget {folder.name}"
        return Check(name, BAD, f"{folder} lacks {', '.join(missing)}", f"{first}; then add it again.")
    for private in (folder, folder / "key"):
        if private.exists() and private.stat().st_mode & 0o077:
            mend = _chmod("700" if private == folder else "600", private)
            return Check(name, BAD, f"others can read {private}; ssh refuses such a key", mend)
    return Check(name, OK, "complete and private")


def accounts(online: bool) -> Iterator[Check]:
    """Each provider's key: where it was found, who else can read it, and whether the provider takes it."""
    found: dict[str, keys.Key | None] = {}
    for provider in providers.names():
        try:
            found[provider] = keys.find(provider)
        except ConfigError as error:
            yield Check(f"{provider} key", BAD, error.message, error.hint)
    tests = {name: _testing(name, key.value) for name, key in found.items() if key} if online else {}
    verdicts = _all_at_once(tests, _LATE)
    for provider, key in found.items():
        yield _account(provider, key, verdicts.get(provider)) if key else _missing(provider)


def lacking() -> list[str]:
    """The providers of which no key is known."""
    found = []
    for provider in providers.names():
        with contextlib.suppress(ConfigError):
            found += [provider] if keys.find(provider) is None else []
    return found


def _missing(provider: str) -> Check:
    mend = f"Make one at {providers.PROVIDERS[provider].key_page} and give it to: gpu doctor"
    return Check(f"{provider} key", WARN, f"none: nothing can be rented at {provider}", mend)


def _account(provider: str, key: keys.Key, verdict: Verdict | None) -> Check:
    where = f"found in {key.source}"
    check = _judged(provider, where, verdict) if verdict else Check(f"{provider} key", OK, f"{where}; not tested")
    if check.state == OK and key.path and key.path.stat().st_mode & 0o077:
        return Check(check.name, WARN, f"{check.words}; others can read that file", _chmod("600", key.path))
    return check


@dataclass(frozen=True)
class Verdict:
    """What a provider said to a key."""

    accepted: bool | None
    """None: it could not be asked, which says nothing about the key."""
    words: str


_LATE = Verdict(None, f"no answer within {ANSWER_S:g} s")


def _judged(provider: str, where: str, verdict: Verdict) -> Check:
    name = f"{provider} key"
    if verdict.accepted:
        return Check(name, OK, f"{where}; {provider} takes it")
    if verdict.accepted is None:
        return Check(name, WARN, f"{where}; not tested: {verdict.words}", "Check the network, then: gpu doctor")
    return Check(
        name,
        BAD,
        f"{where}; {provider} refuses it: {verdict.words}",
        f"Make a new one: {providers.PROVIDERS[provider].key_page}",
    )


def take_key(provider: str, value: str) -> Check:
    """Test a key that was typed, and keep it unless the provider refuses it. UsageError when it cannot be one."""
    keys.check(value)
    verdict = _all_at_once({provider: _testing(provider, value)}, _LATE)[provider]
    if verdict.accepted is False:
        return _judged(provider, "not kept", verdict)
    return _judged(provider, f"kept in {keys.store(provider, value)}", verdict)


def _testing(provider: str, value: str) -> Callable[[], Verdict]:
    return lambda: ask_provider(provider, value)


def ask_provider(provider: str, value: str) -> Verdict:
    """What a provider says to a key, asked by one small read; its words hold no secret."""
    try:
        providers.PROVIDERS[provider].kind()(value).check_key()
    except AuthRejected as error:
        return Verdict(False, error.message)
    except GpuError as error:
        return Verdict(None, error.message)
    return Verdict(True, "")


T = TypeVar("T")


def _all_at_once(asked: dict[str, Callable[[], T]], late: T) -> dict[str, T]:
    """The answer of each, asked at the same time; `late` for those that do not answer in time.

    The threads are daemons: one that hangs in a name lookup does not keep the command from ending.
    """
    answers: dict[str, T] = {}

    def ask(name: str) -> None:
        answers[name] = asked[name]()

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in asked]
    for thread in threads:
        thread.start()
    deadline = clock.monotonic() + ANSWER_S
    for thread in threads:
        thread.join(max(deadline - clock.monotonic(), 0))
    return {name: answers.get(name, late) for name in asked}

"""The laptop's records of machines: one folder each with the record, keys, ssh_config and pinned host key."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jobs import durable, locks, spec
from orchestrator import clock, config
from orchestrator.errors import ConfigError, UsageError
from orchestrator.transport import ForgottenMachine, LocalMachine, Machine

LOCAL = "local"
"""The name of this computer as a machine."""
_NAME_MAX = 63
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_NAME_MAX - 1}}}")
_LOCK_WAIT_S = 30.0


@dataclass(frozen=True)
class Record:
    """What machine.json says of a machine of one's own."""

    name: str
    user: str
    host: str
    port: int
    root: str
    """Our folder there, absolute."""
    python: str
    """The interpreter that runs our commands and supervisor there: 3.10 or newer, the standard library only."""
    worker_python: str | None
    """The interpreter asked for with --python, used as it is; None: an environment is made."""
    key: str | None
    """The user's private key for it; None: the machine's own, in this folder."""
    key_in_agent: bool
    """Whether that key has a passphrase, so that the user's SSH agent must hold it."""
    fingerprint: str
    """Of the pinned host key."""
    added_at: str
    system: str
    gpu: str | None
    """What GPU it has, in words."""
    gpus: int


def folder(name: str) -> Path:
    """The folder of a machine of that name, there or not."""
    return config.state_folder() / "machines" / name


def check_name(name: str) -> None:
    """Raise UsageError unless a new machine may have that name."""
    if name == LOCAL or not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:_NAME_MAX]!r} cannot be the name of a machine: letters, digits, dots and dashes, at most "
            f"{_NAME_MAX} of them, and not `local`. Nothing was asked for.",
            "For example: box, or a100-2",
        )


def known() -> list[Record]:
    """Every machine that was added, by name; this computer is not among them."""
    found = sorted((config.state_folder() / "machines").glob("[!.]*/machine.json"))
    records = []
    for path in found:
        try:
            records.append(_load(path))
        except ConfigError as error:  # one damaged record must not hide all others
            print(f"Passed over: {error.message}", file=sys.stderr)  # noqa: T201
    return records


def load(name: str) -> Record:
    """The record of a machine; UsageError naming the nearest one when there is none."""
    path = folder(name) / "machine.json"
    if not _NAME.fullmatch(name) or not path.is_file():
        names = [*(record.name for record in known()), LOCAL]
        raise UsageError(
            f"There is no machine {name!r}: {spec.nearest(name, names)}", "Add one: gpu add NAME USER@HOST"
        )
    return _load(path)


def _load(path: Path) -> Record:
    document = durable.load_news(path)
    wanted = {entry.name for entry in fields(Record)}
    try:
        return Record(**{name: value for name, value in document.items() if name in wanted})
    except TypeError:
        raise ConfigError(
            f"{path} is damaged: it is not the record of a machine. Nothing on the machine is affected.",
            f"Remove the folder {path.parent} and add the machine again.",
        ) from None


def save(record: Record) -> None:
    """Put a record on the disk, whole."""
    durable.save_json(folder(record.name) / "machine.json", asdict(record))


def choose(name: str | None) -> str:
    """The machine that is meant: the one named; else the only one there is; else this computer. UsageError else."""
    if name is not None:
        is_known = name == LOCAL or (_NAME.fullmatch(name) and (folder(name) / "rental.json").is_file())
        return name if is_known else load(name).name
    names = [record.name for record in known()]
    if len(names) > 1:
        raise UsageError(f"There are several machines: {', '.join(names)}.", "Say which one, by its name or `local`.")
    return names[0] if names else LOCAL


def choose_remote(name: str | None) -> Record:
    """The machine that is meant, which is not this computer. UsageError when there is none, or more than one."""
    chosen = choose(name)
    if chosen == LOCAL:
        raise UsageError("This is for another machine, and none is known yet.", "Add one: gpu add NAME USER@HOST")
    return load(chosen)


@contextlib.contextmanager
def at(name: str) -> Iterator[Machine]:
    """The machine of that name, ready to be spoken to; its connections are closed when the block is left.

    One that was forgotten is reachable by nobody: runs that were on it can still be shown, and moved.
    """
    if name == LOCAL:
        yield this_computer()
        return
    if not (folder(name) / "machine.json").is_file():
        yield ForgottenMachine(name, lambda: _is_gone(name))
        return
    record = load(name)
    from orchestrator.ssh import SshMachine

    with SshMachine(folder(name), Path(record.root), record.python, lambda: _is_gone(name)) as machine:
        yield machine


def _is_gone(name: str) -> bool:
    """Whether a machine that does not answer is surely no more: only the provider of a rented one can say so."""
    if not (folder(name) / "rental.json").is_file():
        return False
    from orchestrator import vanishing

    return vanishing.is_gone(name)


def this_computer() -> LocalMachine:
    """This computer as a machine."""
    return LocalMachine(folder(LOCAL))


def write_ssh_config(name: str) -> None:
    """Write the ssh_config of a machine anew, from its record and where its folder lies now."""
    from orchestrator import ssh_config

    record = load(name)
    address = ssh_config.Address(record.user, record.host, record.port)
    identity = Path(record.key) if record.key else folder(name) / "key"
    socket = "SSH_AUTH_SOCK" if record.key_in_agent else None
    text = ssh_config.text(name, address, identity, socket, folder(name))
    durable.replace_whole(folder(name) / "ssh_config", text.encode())


def note(name: str, reachable: bool) -> None:
    """Remember whether the machine answered just now; news, which a crash may lose."""
    if name != LOCAL and folder(name).is_dir():
        seen = clock.now() if reachable else last_seen(name)
        durable.save_json(folder(name) / "news.json", {"reachable": reachable, "last_seen": seen}, synced=False)


def last_seen(name: str) -> str | None:
    """When the machine last answered; None: never, or not known."""
    return news(name).get("last_seen")


def news(name: str) -> dict[str, Any]:
    """What was last found out about a machine: `reachable`, `last_seen`; empty at first."""
    return durable.load_news(folder(name) / "news.json")


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the lock under which machines are added and forgotten."""
    durable.have_folder(config.state_folder() / "machines")
    lock = locks.take(config.state_folder() / "machines" / ".lock", _LOCK_WAIT_S)
    if lock is None:
        raise ConfigError("Another command adds or forgets a machine just now. Nothing was changed.", "Try again.")
    try:
        yield
    finally:
        os.close(lock)


def remove(name: str) -> None:
    """Delete the folder of a machine, its keys with it."""
    aside = folder(name).with_name(f".gone-{name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder(name).rename(aside)
    shutil.rmtree(aside)

"""What a machine that was outbid had not sent: copied from its disk while it is stopped, then taken in as if it had."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs import durable, rundir
from orchestrator import bulk, clock, inventory, machines, mirrors, runs, ssh_config
from orchestrator.errors import ConfigError, GpuError, NotReachable
from orchestrator.home import Arrivals
from orchestrator.plain import plain
from orchestrator.providers.base import Provider
from orchestrator.rentals import Rental
from orchestrator.runs import Run

_DEADLINE_S = 60.0
"""For all of a machine. Its disk costs next to nothing, but it may wake at any moment and be paid in full, and its run
waits: a minute moves more rows than a machine makes in the hours that it takes to be outbid."""
_FILE_MAX_BYTES = 1 << 30
_MAX_BYTES = 2 << 30
_FILES_MAX = 20_000
_RESERVE_BYTES = 256 << 20
"""Left free on the disk here."""
_JSON_MAX_BYTES = 64 << 20
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9/._-]+")
_ATTEMPT = "/attempts/[0-9][0-9][0-9][0-9]/"
_CUT = "the copy was cut off here."
Say = Callable[[str], None]


def is_due(rental: Rental, provider: Provider) -> bool:
    """Whether a machine was outbid, by its provider's word now, with rows that may not be home. Once: not when it ends.

    Nobody is asked about a machine that is not a spot one, or whose rows are all home.
    """
    record = rental.record
    if record.state != "ready" or not record.offer.get("spot") or not inventory.not_home(rental.name):
        return False
    try:
        found = provider.get(record.instance_id or "")
    except GpuError:
        return False
    return found is not None and found.state == "stopped"


def fetch(rental: Rental, provider: Provider, say: Say) -> None:
    """Copy what runs have made on a stopped machine to a private place here, as far as it comes before the deadline.

    Raises nothing: the machine is ended next, whatever came of it, which is kept for `take_in` to say.
    """
    say(f"copying what is not home from {rental.name}, which was outbid")
    copying = _Copying(rental, provider)
    for run_id in inventory.not_home(rental.name):
        folder = _folder(rental.name, run_id)
        with contextlib.suppress(OSError, GpuError):
            durable.have_folder(folder / "files")
            durable.have_folder(folder / "scratch")
            _note(folder, _CUT)
            _note(folder, copying.tried(runs.find(run_id), folder))


def _folder(name: str, run_id: str) -> Path:
    return machines.folder(name) / "rescued" / run_id


def _note(folder: Path, why: str) -> None:
    """Keep why not all could be copied; empty: all of it was."""
    durable.save_json(folder / "outcome.json", {"why": why})


def is_waiting(name: str, run_id: str = "*") -> bool:
    """Whether something was rescued from a machine, of a run or of any, that is not taken in yet."""
    found = _folder(name, run_id)
    return any(found.parent.glob(found.name))


class _Copying:
    """One machine's disk, read by rsync through the gate that its provider opens, until a deadline."""

    def __init__(self, rental: Rental, provider: Provider) -> None:
        self._rental = rental
        self._provider = provider
        self._until = clock.monotonic() + _DEADLINE_S
        self._folder = rental.folder / "gate"
        self._module = ""
        self._why_shut = ""

    def tried(self, run: Run, folder: Path) -> str:
        """Copy one run's files; returns why that did not wholly work, in words, empty when it did."""
        try:
            self._copy(run, folder)
        except GpuError as error:
            return error.message
        except OSError as error:
            return f"{error.filename or folder}: {error.strerror}."
        return ""

    def _copy(self, run: Run, folder: Path) -> None:
        from orchestrator import doctor

        if doctor.rsync().state != doctor.OK:  # through an older one a hostile host reads, and writes, files here
            raise ConfigError("that takes rsync 3.4.3 or newer on this computer.")
        path = f"{machines.load(self._rental.name).root}/runs/{run.run_id}"
        if not _PLAIN_PATH.fullmatch(path):
            raise ConfigError(f"rsync may take {path} for something else.")
        self._open(path)
        config, host = self._folder / "ssh_config", ssh_config.alias(self._rental.name)
        limits = _Limits(folder, self._until)
        source = bulk.Source(config, host, self._module + path, _FILE_MAX_BYTES, limits)
        growing, whole = _rules(run.job())
        bulk.pull(source, folder / "files", growing, None)
        bulk.pull(source, folder / "files", whole, folder / "scratch")

    def _open(self, path: str) -> None:
        """Have the gate opened, once, and the key pinned that its host shows: nothing more can be known of it."""
        if self._why_shut:
            raise NotReachable(self._why_shut)
        if self._module:
            return
        self._why_shut = "its gate was tried for another run."
        gate = self._provider.gate(self._rental.record.instance_id or "", path)
        if gate is None:
            raise ConfigError("its provider has no way to its disk.")
        from orchestrator import ssh

        address = ssh_config.Address(gate.user, gate.endpoint.host, gate.endpoint.port)
        durable.have_folder(self._folder)
        config = ssh_config.text(self._rental.name, address, self._rental.folder / "key", None, self._folder)
        durable.replace_whole(self._folder / "ssh_config", config.encode())
        if not (self._folder / "known_hosts").exists():
            key = ssh.host_key(address.host, address.port)
            line = ssh_config.known_host_line(address, key.get_name(), key.get_base64())
            durable.replace_whole(self._folder / "known_hosts", f"{line}\n".encode())
        self._module, self._why_shut = gate.module, ""


class _Limits:
    """Breaks a copy off, saying why, that takes too long, or brings more than there is room for."""

    def __init__(self, folder: Path, until: float) -> None:
        free = shutil.disk_usage(folder).free - _RESERVE_BYTES
        self._folder = folder
        self._until = until
        self._max_bytes = min(_MAX_BYTES, free // 2)  # what is taken in is there twice for a moment
        if self._max_bytes <= 0:
            raise ConfigError(f"the disk of {folder} is full.")

    def __call__(self) -> bool:
        """Whether it is to be broken off: never without words. NotReachable then."""
        if clock.monotonic() > self._until:
            raise NotReachable(f"not all of it came within {_DEADLINE_S:.0f} s.")
        sizes = [path.lstat().st_size for path in _files(self._folder)]
        if sum(sizes) > self._max_bytes or len(sizes) > _FILES_MAX:
            raise NotReachable(f"more was sent than is taken: {sum(sizes)} bytes in {len(sizes)} files.")
        return False


def _files(folder: Path) -> Iterator[Path]:
    """The regular files below a folder, no link followed; those that vanish meanwhile are none."""
    for below, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(below) / name
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG(path.lstat().st_mode):
                    yield path


def _rules(job: dict[str, Any]) -> tuple[list[str], list[str]]:
    """rsync's filter rules for a run's folder: for the files that grow, and for those that appear whole."""
    folders, files = _outs(job)
    above = ["+ /attempts/", f"+ {_ATTEMPT}", *folders]
    growing = [f"+ {_ATTEMPT}{name}" for name in rundir.GROWING]
    whole = [f"+ {_ATTEMPT}{name}" for name in rundir.WHOLE if name != "status.json"]
    alone = ["+ /resolved.json", "+ /examples.json"]
    return [*above, *growing, "-! *.jsonl", *files, "- *"], [*above, *whole, *alone, "- *.jsonl", *files, "- *"]


def _outs(job: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Rules for the files that a command brings home, as worker/outs.py finds them, and for the folders above them."""
    base = ["work", *filter(None, str(job.get("folder") or "").split("/"))]
    folders, files = [], []
    for pattern in map(str, job.get("out") or ()):
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        if not pattern or pattern.startswith("/") or ".." in parts:
            continue
        is_folder = pattern.endswith("/") or not any(sign in pattern for sign in "*?[")
        shapes = [parts] if not pattern.endswith("/") else []
        shapes += [[*parts, "*"], [*parts, "**", "*"]] if is_folder else []
        for shape in itertools.chain.from_iterable(map(_closed, shapes)):
            files.append(_rule(base, shape))
            last = len(shape) + (shape[-1:] == ["**"])
            folders += [f"{_rule(base[:end], [])}/" for end in range(1, len(base) + 1)]
            folders += [f"{_rule(base, shape[:end])}/" for end in range(1, last)]
    return list(dict.fromkeys(folders)), list(dict.fromkeys(files))


def _rule(base: list[str], shape: list[str]) -> str:
    """The rule that lets through what a pattern matches below a folder; only `**` by itself leads over folders.

    To rsync a backslash takes away the sense of the sign behind it, but in a rule without such signs it is a letter.
    """
    above = [re.sub(r"([*?\[\\])", r"\\\1", part) for part in base]
    parts = [part if part == "**" else re.sub(r"\*+", "*", part) for part in shape]
    if any(sign in part for part in (*base, *parts) for sign in "*?["):
        return "+ /" + "/".join([*above, *(part.replace("\\", "\\\\") for part in parts)])
    return "+ /" + "/".join([*base, *parts])


def _closed(shape: list[str]) -> list[list[str]]:
    """The same pattern with each `**` also taken for nothing."""
    if "**" not in shape[:-1]:
        return [shape]
    at = shape.index("**")
    return [[*shape[:at], *skipped, *rest] for rest in _closed(shape[at + 1 :]) for skipped in (["**"], [])]


class Copies:
    """What was copied of one run, as a source whose files are taken in like those of a mirror."""

    def __init__(self, run: Run, name: str) -> None:
        self._name = name
        self._base = _folder(name, run.run_id) / "files"
        folder = str(run.job().get("folder") or "").strip("/")
        self._outs = f"work/{folder}/" if folder else "work/"

    def machines(self) -> list[str]:
        """See mirrors.Source."""
        return [self._name]

    def names(self, machine: str) -> list[str]:  # noqa: ARG002 -- there is only one
        """See mirrors.Source. What cannot be what its name says is left out."""
        paths = [path.relative_to(self._base).as_posix() for path in _files(self._base)]
        sound = [path for path in paths if path.startswith(self._outs) or _is_sound(self._base / path)]
        return [self._named(path) for path in sound]

    def _named(self, path: str) -> str:
        return f"{rundir.OUT}/{path.removeprefix(self._outs)}" if path.startswith(self._outs) else path

    def read(self, machine: str, name: str) -> Iterator[bytes]:  # noqa: ARG002
        """See mirrors.Source."""
        path = name if not name.startswith(f"{rundir.OUT}/") else self._outs + name.partition("/")[2]
        try:
            with durable.opened(self._base / path, os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
                while chunk := os.read(descriptor, mirrors.CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise NotReachable(f"what was rescued of {name} cannot be read: {error.strerror}.") from None


def _is_sound(path: Path) -> bool:
    """Whether a file is what its name says, as far as one can see: a host may send, or keep, anything."""
    if path.suffix != ".json":
        return True
    try:
        if path.lstat().st_size > _JSON_MAX_BYTES:
            return False
        document = durable.load_json(path)
        if path.name == "exit.json":
            rundir.Seal.of(document)
    except (ValueError, TypeError, AttributeError, RecursionError, OSError):
        return False
    return isinstance(document, dict) or path.name == "examples.json"


def take_in(run: Run, arrivals: Arrivals, say: Say) -> dict[str, Any] | None:
    """Take in what was rescued of a run, once, and say in a line what that was.

    Returns how the run stood there, as a pull's last frame has it; None when there was nothing, or it cannot be taken
    in yet, for want of room: then it stays, and is taken in at the next look.
    """
    name = arrivals.copy.folder.name
    folder = _folder(name, run.run_id)
    if not folder.is_dir():
        return None
    why = plain(str(durable.load_news(folder / "outcome.json").get("why", _CUT)))
    rows, size = arrivals.rows.good, _size(arrivals.copy.folder / rundir.OUT)
    end = None
    try:
        end = mirrors.gather(Copies(run, name), name, arrivals)
    except GpuError as error:
        why = why or error.message
    except OSError as error:
        if not durable.is_full(error):
            raise
        say(f"What was rescued from {name} waits in {folder}: the disk is full. Free some space: gpu pull {run.run_id}")
        return None
    say(_said(name, arrivals.rows.good - rows, _size(arrivals.copy.folder / rundir.OUT) - size, why))
    shutil.rmtree(folder, ignore_errors=True)
    return end


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in _files(folder))


def _said(name: str, rows: int, size: int, why: str) -> str:
    """What came of a rescue, in a line."""
    found = [f"{rows} rows"] if rows > 0 else []
    found += [f"{size} bytes of its files"] if size > 0 else []
    if found:
        rest = f"; the rest could not be copied: {why}" if why else ""
        return f"rescued {' and '.join(found)} from {name} before it was given back{rest}"
    if why:
        return f"{name} could not be copied from: {why} What came up to the last pull is home."
    return f"nothing that was not home was found on {name} before it was given back"

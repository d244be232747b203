"""What this laptop knows of machines and runs as one private file, and such a file taken in on another laptop."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import durable
from orchestrator import config, keys, machines
from orchestrator.errors import ConfigError, UsageError

MACHINE_FILES = ("machine.json", "key", "key.pub", "known_hosts")
"""The files of a machine's folder that travel; its ssh_config is written anew for where the folder lies."""
_FORMAT = 1
_CONTENTS = "contents.json"
_CONFIG = "config.json"
_NAME = re.compile(
    r"machines/([A-Za-z0-9][A-Za-z0-9._-]{0,62})/(?:machine\.json|key|key\.pub|known_hosts)"
    r"|runs/[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.json|config\.json"
)
_MEMBER_MAX_BYTES = 1 << 20
_TOTAL_MAX_BYTES = 64 << 20
_STAGING = ".import-"
Files = dict[str, bytes]
"""What travels, by its name in the archive."""
Undo = list[tuple[Path, Path]]
"""What was put in place, each with where it goes when the import fails."""


@dataclass(frozen=True)
class Report:
    """What travelled."""

    machines: list[str]
    runs: list[str]
    keys: list[str]
    """Providers whose account keys are in it."""
    notes: list[str]
    """What the user should know or do, in sentences."""


def export_state(target: Path, replace: bool) -> Report:
    """Write what this laptop knows into one file that only this user can read. ConfigError when it cannot be.

    UsageError when there is nothing to write, or when a file is there already and `replace` was not asked for.
    """
    if os.path.lexists(target) and not replace:
        raise UsageError(f"{target} is there already. Nothing was written.", "Overwrite it with -y.")
    with machines.locked():
        found = _collected()
    files = {name: data for name, data in found.items() if _is_sound(found, name)}
    if not files:
        raise UsageError(
            "There is nothing to export: no machine, no run, no key.", "Add a machine: gpu add NAME USER@HOST"
        )
    names, providers = _machine_names(files), _providers(files)
    try:
        _write_private(target, _packed(files))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}.", "Name another place.") from None
    notes = [f"{target} holds private keys: whoever reads it can log in to your machines. Delete it once it is used."]
    if target.stat().st_mode & 0o077:
        notes.append(f"The disk of {target} keeps no permissions: others who can reach it can read it.")
    notes += [f"{name} is damaged, and was left out." for name in sorted(found.keys() - files.keys())]
    notes += [_own_key_note(name, files) for name in names]
    return Report(names, _run_names(files), providers, [note for note in notes if note])


def import_state(source: Path) -> Report:
    """Take in what another laptop exported, all of it or nothing; returns what is new here. May be repeated.

    Raises ConfigError when the file is not such a file, or when a machine of the same name is here and differs.
    """
    files = _unpacked(_read(source))
    unsound = [name for name in sorted(files) if not _is_sound(files, name)]
    if unsound:
        raise _bad(f"{unsound[0]} in it is damaged")
    with machines.locked():
        new = [name for name in _machine_names(files) if _is_new(name, files)]
        notes = [_missing_key_note(name, files) for name in new]
        with _undone_on_failure() as undo:
            _put_machines(new, files, undo)
            for name in _machine_names(files):
                machines.write_ssh_config(name)
            new_runs = _put_runs(files, undo, notes)
            taken = _put_config(files, notes)
    return Report(new, new_runs, taken, [note for note in notes if note])


def _collected() -> Files:
    """Every file that travels, by its name in the archive."""
    state = config.state_folder()
    paths = [record.parent / name for record in state.glob("machines/*/machine.json") for name in MACHINE_FILES]
    files: Files = {}
    for path in [*paths, *state.glob("runs/*.json"), state / _CONFIG]:
        name = path.relative_to(state).as_posix()
        if _is_ours(name) and path.is_file():
            files[name] = _read(path, _MEMBER_MAX_BYTES)
    return files


def _is_ours(name: str) -> bool:
    """Whether a name is one that may stand in an archive; this computer, which is no machine to take along, is not."""
    found = _NAME.fullmatch(name)
    return found is not None and found[1] != machines.LOCAL


def _packed(files: Files) -> bytes:
    """The archive: first what it holds, with digests, then each file. The same files give the same bytes."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    contents = json.dumps({"format": _FORMAT, "files": digests}, indent=1).encode()
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as squeezed, tarfile.open(fileobj=squeezed, mode="w") as tar:
        for name, data in [(_CONTENTS, contents), *sorted(files.items())]:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o600
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def _write_private(target: Path, data: bytes) -> None:
    """Put the data at `target`, whole, in a file that nobody else could read at any moment."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            durable.write_all(file.fileno(), data)
            durable.sync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    durable.sync_folder(target.parent)


def _read(path: Path, most: int = _TOTAL_MAX_BYTES) -> bytes:
    """The bytes of a regular file; ConfigError when there are too many, or it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a file.")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > most:
        raise ConfigError(f"{path} is larger than {most >> 20} MiB: it is not what it should be.")
    return data


def _unpacked(data: bytes) -> Files:
    """The files of an archive, every name, type, size and digest checked before one is looked at."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as squeezed:
            plain = squeezed.read(_TOTAL_MAX_BYTES + 1)
        if len(plain) > _TOTAL_MAX_BYTES:
            raise _bad("it is too large")
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
            files = _members(tar)
        contents = json.loads(files.pop(_CONTENTS, b"null"))
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise _bad(f"it is damaged, or something else ({error})") from None
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if not isinstance(contents, dict) or contents.get("format") != _FORMAT:
        raise _bad("it was made by another version of gpu, or by something else")
    if contents.get("files") != digests:
        raise _bad("it is not complete, or was changed")
    return files


def _members(tar: tarfile.TarFile) -> Files:
    """What an archive holds: plain files with names of ours alone, each once, each small."""
    files: Files = {}
    for member in tar:
        plain_file = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
        if not plain_file or member.name in files or not (_is_ours(member.name) or member.name == _CONTENTS):
            raise _bad(f"it has the entry {ascii(member.name)[:100]}, which does not belong there")
        if not 0 <= member.size <= _MEMBER_MAX_BYTES:
            raise _bad(f"{member.name} in it is too large")
        read = tar.extractfile(member)
        assert read is not None  # it is a plain file
        files[member.name] = read.read()
    return files


def _bad(why: str) -> ConfigError:
    return ConfigError(
        f"The file is none that gpu state export made: {why}. Nothing was changed.",
        "Export it again, and copy it whole.",
    )


def _document(files: Files, name: str) -> dict[str, Any]:
    """The JSON object of that name, empty when it is none."""
    try:
        document = json.loads(files.get(name, b""))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _is_sound(files: Files, name: str) -> bool:
    """Whether a machine's file belongs to a record of that machine, and a run's entry names a folder."""
    if name.startswith("runs/"):
        return isinstance(_document(files, name).get("path"), str)
    if name.startswith("machines/"):
        machine = name.split("/")[1]
        record = _document(files, f"machines/{machine}/machine.json")
        return record.get("name") == machine and isinstance(record.get("key", 0), str | None)
    return True


def _machine_names(files: Files) -> list[str]:
    return sorted({name.split("/")[1] for name in files if name.startswith("machines/")})


def _run_names(files: Files) -> list[str]:
    return sorted(name[len("runs/") : -len(".json")] for name in files if name.startswith("runs/"))


def _providers(files: Files) -> list[str]:
    return sorted(keys.parse(files[_CONFIG].decode("utf-8", "replace"), _CONFIG)["keys"]) if _CONFIG in files else []


def _is_new(name: str, files: Files) -> bool:
    """Whether there is no such machine here; ConfigError when there is one that differs in any file."""
    folder = machines.folder(name)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    differing = [file for file in MACHINE_FILES if _here(folder / file) != files.get(f"machines/{name}/{file}")]
    if differing:
        raise ConfigError(
            f"The machine {name} is here already and differs in {', '.join(differing)}. Nothing was changed.",
            f"To take the other one, move this folder away first: {folder}",
        )
    return False


def _here(path: Path) -> bytes | None:
    return _read(path, _MEMBER_MAX_BYTES) if path.is_file() else None


@contextlib.contextmanager
def _undone_on_failure() -> Iterator[Undo]:
    """Take back, on any failure, what was put in place inside the block; a full or read-only disk becomes words."""
    state = config.state_folder()
    for left in state.glob(f"{_STAGING}*"):  # of an import that was killed
        shutil.rmtree(left, ignore_errors=True)
    done: Undo = []
    try:
        yield done
    except BaseException as error:
        for place, back in reversed(done):
            with contextlib.suppress(OSError):
                place.rename(back)
        if isinstance(error, OSError):
            raise ConfigError(f"{state} cannot be written: {error.strerror}. Nothing was taken in.") from None
        raise
    finally:
        for left in state.glob(f"{_STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)


def _put_machines(names: list[str], files: Files, undo: Undo) -> None:
    """Make the folders aside, whole, then give each its name."""
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=config.state_folder()))
    for name in names:
        durable.make_folder(staging / name)
        for file in MACHINE_FILES:
            if f"machines/{name}/{file}" in files:
                durable.replace_whole(staging / name / file, files[f"machines/{name}/{file}"])
    for name in names:
        (staging / name).rename(machines.folder(name))
        undo.append((machines.folder(name), staging / name))
    durable.sync_folder(config.state_folder() / "machines")


def _put_runs(files: Files, undo: Undo, notes: list[str]) -> list[str]:
    """Remember the runs that are not known here; a note tells of folders that did not travel."""
    book = config.state_folder() / "runs"
    durable.have_folder(book)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=config.state_folder()))
    new = [run for run in _run_names(files) if not (book / f"{run}.json").exists()]
    for run in new:
        durable.replace_whole(book / f"{run}.json", files[f"runs/{run}.json"])
        undo.append((book / f"{run}.json", staging / run))
    elsewhere = [path for run in new if not Path(path := _document(files, f"runs/{run}.json")["path"]).exists()]
    if elsewhere:
        notes.append(
            f"{len(elsewhere)} of the run folders are not on this computer; copy each to the same path to see it here, "
            f"such as {elsewhere[0]!a}."
        )
    return new


def _put_config(files: Files, notes: list[str]) -> list[str]:
    """Add account keys that are not known here; those that are stay as they are."""
    if _CONFIG not in files:
        return []
    document = keys.parse(files[_CONFIG].decode("utf-8", "replace"), "config.json in the file")
    here = keys.stored()["keys"]
    kept = sorted(provider for provider, key in document["keys"].items() if here.get(provider, key) != key)
    if kept:
        notes.append(f"Your own account key was kept for: {', '.join(kept)}.")
    return keys.merge(document, replace=False)


def _own_key_note(name: str, files: Files) -> str:
    """A sentence about a machine that is logged in to by the user's own key, which does not travel."""
    key = _document(files, f"machines/{name}/machine.json")["key"]
    return f"{name} is logged in to by your own key {key!a}, which is not in the file: copy it yourself." if key else ""


def _missing_key_note(name: str, files: Files) -> str:
    key = _document(files, f"machines/{name}/machine.json")["key"]
    return f"{name} needs the key {key!a}, which is not here: copy it there." if key and not Path(key).exists() else ""

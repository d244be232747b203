"""What a mirror holds of a run whose machine is gone, brought home as if the machine itself had sent it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from jobs import durable, rundir
from orchestrator.errors import ConfigError, NotReachable
from orchestrator.home import Arrivals

CHUNK_BYTES = 1 << 20
_SHARD = re.compile(r"([0-9]{15})-([0-9]{15})-([0-9a-f]{16})")
_HUB = re.compile(r"hf://(?:(datasets|models)/)?([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)((?:/[A-Za-z0-9._-]+)*)/?")
_PAGES_MAX = 200
_CALL_S = 60.0
_FILES_MAX = 100_000
_LINE_MAX_BYTES = 64 << 20


class Source(Protocol):
    """Where the files of a run's machines lie, under `machines/<name>/…` as at home."""

    def machines(self) -> list[str]:
        """The names of the machines of which something is there."""
        ...

    def names(self, machine: str) -> list[str]:
        """The files there of one machine, by the names they have in a run's folder."""
        ...

    def read(self, machine: str, name: str) -> Iterator[bytes]:
        """The content of a file, in pieces; NotReachable when it cannot be had."""
        ...


class FolderSource:
    """A mirror in a folder that this computer sees, too."""

    def __init__(self, folder: Path, run_id: str) -> None:
        """ConfigError when there is no such folder here."""
        if not folder.is_dir():
            raise ConfigError(f"The mirror {folder} is not a folder of this computer.", "Mount it, or copy it here.")
        self._base = folder / run_id / "machines"

    def machines(self) -> list[str]:
        """See Source."""
        found = sorted(self._base.iterdir()) if self._base.is_dir() else []
        return [path.name for path in found if rundir.is_safe_name(path.name) and path.is_dir()]

    def names(self, machine: str) -> list[str]:
        """See Source."""
        base = self._base / machine
        return sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())[:_FILES_MAX]

    def read(self, machine: str, name: str) -> Iterator[bytes]:
        """See Source."""
        try:
            descriptor = os.open(self._base / machine / name, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise NotReachable(f"The mirror's {name} cannot be read: {error.strerror}.") from None


class HubSource:
    """A mirror in a repository of the Hugging Face Hub, read by plain HTTP; `token` is sent to the Hub alone."""

    def __init__(self, target: str, run_id: str, token: str | None) -> None:
        """ConfigError for what names no repository."""
        found = _HUB.fullmatch(target)
        if not found or {".", ".."} & set(target.split("/")):
            raise ConfigError(f"{target!r} names no repository.", "hf://datasets/OWNER/NAME")
        self._kind, self._repo = found[1] or "models", found[2]
        self._base = "/".join(filter(None, [found[3].strip("/"), run_id, "machines"]))
        self._endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._paths = sorted(self._listed())

    def _listed(self) -> Iterator[str]:
        """The paths of all files of the run, below its folder of machines; none when there are none."""
        url = f"{self._endpoint}/api/{self._kind}/{self._repo}/tree/main/{quote(self._base)}?recursive=true"
        for _ in range(_PAGES_MAX):
            answer = self._get(url)
            if answer.status_code == 404 and "EntryNotFound" in answer.headers.get("X-Error-Code", ""):
                return
            entries = self._good(answer).json()
            if not isinstance(entries, list):
                raise NotReachable("The Hub's list of files is none.")
            texts = [
                str(entry.get("path")) for entry in entries if isinstance(entry, dict) and entry.get("type") == "file"
            ]
            yield from (text[len(self._base) + 1 :] for text in texts if text.startswith(f"{self._base}/"))
            url = answer.links.get("next", {}).get("url", "")
            if not url.startswith(f"{self._endpoint}/"):
                return

    def _get(self, url: str) -> Any:
        import requests

        try:
            return requests.get(url, headers=self._headers, timeout=_CALL_S, stream=True)
        except requests.RequestException as error:
            raise NotReachable(f"The Hub did not answer ({type(error).__name__}).", "Try again: gpu resume") from None

    def _good(self, answer: Any) -> Any:
        if answer.status_code in (401, 403, 404):
            raise ConfigError(f"The Hub does not show {self._repo} (HTTP {answer.status_code}).", "Check HF_TOKEN.")
        if answer.status_code != 200:
            raise NotReachable(f"The Hub answered with HTTP {answer.status_code}.", "Try again: gpu resume")
        return answer

    def machines(self) -> list[str]:
        """See Source."""
        return sorted({name for name in (path.split("/")[0] for path in self._paths) if rundir.is_safe_name(name)})

    def names(self, machine: str) -> list[str]:
        """See Source: shards of one file are one name."""
        found = [path[len(machine) + 1 :] for path in self._paths if path.startswith(f"{machine}/")]
        return sorted({name.rpartition("/")[0] if _shard(name) else name for name in found})[:_FILES_MAX]

    def read(self, machine: str, name: str) -> Iterator[bytes]:
        """See Source: shards one after another, each checked against the hash in its name."""
        offset = 0
        shards = {path: _shard(path) for path in self._paths if path.rpartition("/")[0] == f"{machine}/{name}"}
        if not any(shards.values()):
            yield from self._content(f"{machine}/{name}")
            return
        while True:
            follow = [(shard[1], path, shard[2]) for path, shard in shards.items() if shard and shard[0] == offset]
            if not follow:
                return
            end, path, digest = max(follow)
            data = b"".join(self._content(path))
            if len(data) != end - offset or end <= offset or hashlib.sha256(data).hexdigest()[:16] != digest:
                raise NotReachable(f"The mirror's {name} is damaged from byte {offset} on.")
            yield data
            offset = end

    def _content(self, path: str) -> Iterator[bytes]:
        import requests

        kind = "" if self._kind == "models" else f"{self._kind}/"
        url = f"{self._endpoint}/{kind}{self._repo}/resolve/main/{quote(f'{self._base}/{path}')}"
        try:
            yield from self._good(self._get(url)).iter_content(CHUNK_BYTES)
        except requests.RequestException as error:
            raise NotReachable(f"The Hub broke off ({type(error).__name__}).", "Try again: gpu resume") from None


def _shard(path: str) -> tuple[int, int, str] | None:
    """First byte, end and hash, of the name of a shard; None for what is none."""
    found = _SHARD.fullmatch(path.rpartition("/")[2])
    return (int(found[1]), int(found[2]), found[3]) if found else None


def source(target: str, run_id: str, token: str | None = None) -> Source:
    """The mirror that a run was given with `--mirror`. ConfigError, NotReachable."""
    if target.startswith("hf://"):
        return HubSource(target, run_id, token)
    return FolderSource(Path(target), run_id)


def gather(mirror: Source, machine: str, arrivals: Arrivals) -> dict[str, Any]:
    """Merge what the mirror holds of one machine; returns the end frame that machine would have answered a pull with.

    `arrivals` is open for that machine. Nothing at home becomes older or less by it; may be repeated.
    """
    names = [name for name in mirror.names(machine) if rundir.may_come_home(name)]
    numbers = {name: rundir.checkpoint_number(name.partition("/")[0]) for name in names}
    whole = sorted({number for name, number in numbers.items() if number and name.endswith(rundir.MANIFEST)})
    for checkpoint in reversed(whole):  # the newest, and where that is damaged the one before it
        _bring(mirror, machine, arrivals, [name for name in names if numbers[name] == checkpoint])
        if rundir.damage(arrivals.copy.folder / rundir.checkpoint_name(*checkpoint)) is None:
            break
    _bring(mirror, machine, arrivals, [name for name in names if numbers[name] is None])
    return _end(arrivals.copy)


def _bring(mirror: Source, machine: str, arrivals: Arrivals, names: list[str]) -> None:
    """Merge these files of a machine, manifests and seals last."""
    request = arrivals.request(0.0)
    for name in sorted(names, key=lambda name: (name.endswith("/exit.json"), name.endswith(rundir.MANIFEST), name)):
        if rundir.grows(name):
            offset, digest = request["have"].get(name, (0, ""))
            _grow(arrivals, name, mirror.read(machine, name), (offset, digest))
        elif name not in request["have_whole"] and not name.endswith("/status.json"):
            _whole(arrivals, name, mirror.read(machine, name))


def _grow(arrivals: Arrivals, name: str, content: Iterator[bytes], have: tuple[int, str]) -> None:
    """Add what the mirror has beyond what is home; when what is home is no beginning of it, nothing."""
    hasher, offset, pending = hashlib.sha256(), have[0], b""
    left = offset
    for chunk in content:
        if left:
            hasher.update(chunk[:left])
            chunk, left = chunk[left:], max(left - len(chunk), 0)
            if left:
                continue
        if have[0] and hasher.hexdigest() != have[1]:
            return
        end = chunk.rfind(b"\n") + 1 if name.endswith(".jsonl") else len(chunk)
        if not end and len(pending) > _LINE_MAX_BYTES:
            return  # nothing of ours writes such a line
        if end:
            data = pending + chunk[:end]
            _take(arrivals, {"file": name, "offset": offset}, data)
            offset, pending = offset + len(data), b""
        pending += chunk[end:]


def _whole(arrivals: Arrivals, name: str, content: Iterator[bytes]) -> None:
    """Bring a file that is not home; larger ones go through the hidden folder of parts, as from a machine."""
    part = arrivals.copy.folder / ".mirrored.part"
    durable.have_folder(part.parent)
    digest = hashlib.sha256()
    try:
        with durable.opened(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW) as descriptor:
            for chunk in content:
                durable.write_all(descriptor, chunk)
                digest.update(chunk)
        total = part.stat().st_size
        with part.open("rb") as file:
            if total <= CHUNK_BYTES:
                _take(arrivals, {"whole": name}, file.read())
                return
            for offset in range(0, total, CHUNK_BYTES):
                frame = {"piece": name, "offset": offset, "total": total, "digest": digest.hexdigest()}
                _take(arrivals, frame, file.read(CHUNK_BYTES))
    finally:
        part.unlink(missing_ok=True)


def _take(arrivals: Arrivals, frame: dict[str, Any], data: bytes) -> None:
    arrivals.take({**frame, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, data)


def _end(copy: rundir.Run) -> dict[str, Any]:
    """How the run stands on that machine, as far as what is home says."""
    attempts = copy.attempts()
    if not attempts:
        return {"end": True, "state": "none", "attempt": 0, "seal": None}
    seal = rundir.Seal.load(attempts[-1].exit)
    ended = seal is not None and not seal.restarting
    said = seal.outline() if seal else None
    return {"end": True, "state": "ended" if ended else "died", "attempt": attempts[-1].number, "seal": said}

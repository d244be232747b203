"""A repository of the Hugging Face Hub as a mirror: growing files as shards that never change, one commit a look."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from worker.mirror import Unusable

_TARGET = re.compile(
    r"hf://(?:(datasets|models)/)?([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96})(/[A-Za-z0-9._/-]*)?"
)
_SHARD = re.compile(r"([0-9]{15})-([0-9]{15})-([0-9a-f]{16})")
_MESSAGE = "Rows of {} so far"


@dataclass(frozen=True)
class Target:
    """What `hf://[datasets/]OWNER/NAME[/FOLDER]` names; without a kind, as the Hub's own tools have it, a model."""

    kind: str
    repo: str
    folder: str

    @classmethod
    def of(cls, text: str) -> Target:
        """Raises Unusable for what names no repository."""
        found = _TARGET.fullmatch(text)
        parts = (found[3] or "").strip("/").split("/") if found else []
        if not found or any(part in (".", "..") for part in parts):
            raise Unusable(f"{text!r} is none: hf://datasets/OWNER/NAME, or with a folder behind it")
        return cls((found[1] or "models")[:-1], found[2], "/".join(filter(None, parts)))


class HubStore:
    """Shards are named by first byte, last byte and hash: who starts anew sees from the list alone what is there."""

    pause_s = 300.0  # a commit each: the Hub allows about a hundred an hour

    def __init__(self, target: str, base: str) -> None:
        """`base` is the folder of the run and its machine; Unusable when there is no client or no such repository."""
        self._target = Target.of(target)
        self._base = "/".join(filter(None, [self._target.folder, base]))
        self._pending: list[tuple[str, bytes | BinaryIO]] = []
        try:
            self._hub: Any = importlib.import_module("huggingface_hub")
        except ImportError:
            raise Unusable("the run's environment has no huggingface_hub, which a mirror on the Hub needs") from None
        self._api = self._hub.HfApi()
        self._there = set(self._listed())

    def _listed(self) -> list[str]:
        with _told():
            listed: list[str] = self._api.list_repo_files(self._target.repo, repo_type=self._target.kind)
        return [name for name in listed if name.startswith(f"{self._base}/")]

    def size(self, name: str, source: BinaryIO) -> int:
        """See Store: as far as shards that are what `source` holds follow one another."""
        shards: dict[int, list[tuple[int, str]]] = {}
        for path in self._there:
            found = _SHARD.fullmatch(path.rpartition("/")[2])
            if found and path.rpartition("/")[0] == f"{self._base}/{name}":
                shards.setdefault(int(found[1]), []).append((int(found[2]), found[3]))
        offset = 0
        while offset in shards:
            source.seek(offset)
            ends = [end for end, digest in shards[offset] if _digest(source, offset, end) == digest and end > offset]
            if not ends:
                break
            offset = max(ends)
        return offset

    def append(self, name: str, offset: int, data: bytes) -> None:
        """See Store."""
        end = offset + len(data)
        digest = hashlib.sha256(data).hexdigest()[:16]
        self._pending.append((f"{self._base}/{name}/{offset:015d}-{end:015d}-{digest}", data))

    def put(self, name: str, source: BinaryIO) -> None:
        """See Store. The file is kept open until `flush`; the Hub's client leaves out what is there as it is."""
        self._pending.append((f"{self._base}/{name}", os.fdopen(os.dup(source.fileno()), "rb")))

    def flush(self) -> None:
        """See Store: one commit of all that is new."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        operations = [self._hub.CommitOperationAdd(path, data) for path, data in pending]
        message = _MESSAGE.format(self._base)
        try:
            with _told():
                where = {"repo_id": self._target.repo, "repo_type": self._target.kind}
                self._api.create_commit(**where, operations=operations, commit_message=message)
        finally:
            for _, data in pending:
                if not isinstance(data, bytes):
                    data.close()
        self._there |= {path for path, _ in pending}

    def retire(self) -> None:
        """See Store. Nothing goes: the repository's history would keep it."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what the Hub's client raises into words of ours."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 -- code that is not ours
        raise Unusable(f"the Hub's client failed: {_words(error)}") from None


def _digest(source: BinaryIO, start: int, end: int) -> str:
    source.seek(start)
    return hashlib.sha256(source.read(end - start)).hexdigest()[:16]


def _words(error: Exception) -> str:
    """The kind of an error and its HTTP status, if it has one; its own words may hold addresses that are secrets."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"{type(error).__name__}{f', HTTP {status}' if status else ''}"

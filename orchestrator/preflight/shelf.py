"""A model's files by name and size, wherever they lie: what a folder here holds, and what a Hub repository lists."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.preflight.findings import error, unknown

FILE_MAX_BYTES = 20_000_000
"""Of one small file; the largest that are read, indices of weights with experts, have a few megabytes."""
LISTING_MAX_BYTES = 20_000_000
_FILES_MAX = 20_000
_COUNT_MAX = 10**15
"""Bytes or parameters beyond this are nobody's model."""


@dataclass(frozen=True)
class Listing:
    """Files by name with their size in bytes (None: not said), and how many parameters there are of each dtype."""

    files: Mapping[str, int | None]
    parameters: Mapping[str, int] = field(default_factory=dict)
    """By safetensors' names: BF16, F32; empty: not known."""

    @classmethod
    def of_hub(cls, document: dict[str, Any]) -> Listing:
        """What the Hub's answer says; entries of another form are passed over."""
        files: dict[str, int | None] = {}
        for entry in document["siblings"][:_FILES_MAX]:
            name = entry.get("rfilename") if isinstance(entry, dict) else None
            if isinstance(name, str):
                size = entry.get("size")
                files[name] = size if _is_count(size) else None
        said = document.get("safetensors")
        counts = said.get("parameters") if isinstance(said, dict) else None
        counts = counts if isinstance(counts, dict) else {}
        return cls(files, {str(dtype): count for dtype, count in counts.items() if _is_count(count)})


class Shelf(Protocol):
    """Where a model's files lie. Both methods raise Fault."""

    asked: str
    """What was asked for, as it was typed: `model=…`."""

    def listing(self) -> Listing:
        """All files."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file; None when there is none of that name."""
        ...


class Folder:
    """A folder on this computer."""

    def __init__(self, parameter: str, path: Path) -> None:
        self.asked = f"{parameter}={path}"
        self._path = path

    def listing(self) -> Listing:
        """Its files, without those of sub-folders; parameters as the headers of its weights have them."""
        try:
            files = {path.name: path.stat().st_size for path in sorted(self._path.iterdir()) if path.is_file()}
        except OSError as failure:
            raise error("unreadable", f"{self.asked} cannot be read: {failure.strerror or failure}.") from None
        counts: dict[str, int] = {}
        for name in files:
            if name.startswith("model") and name.endswith(".safetensors"):
                for dtype, count in self._parameters(name, files[name]).items():
                    counts[dtype] = counts.get(dtype, 0) + count
        return Listing(files, counts)

    def read(self, name: str) -> bytes | None:
        """See Shelf."""
        path = self._path / name
        try:
            with path.open("rb") as file:
                content = file.read(FILE_MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as failure:
            raise error("unreadable", f"{path} cannot be read: {failure.strerror or failure}.") from None
        if len(content) > FILE_MAX_BYTES:
            raise unknown("too_large", f"{path} has more than {FILE_MAX_BYTES // 1_000_000} MB: it was not read.")
        return content

    def _parameters(self, name: str, size: int) -> dict[str, int]:
        """How many parameters of each dtype a file of weights holds, by its header; Fault when it is cut short."""
        path = self._path / name
        try:
            with path.open("rb") as file:
                length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
                header = json_object(file.read(min(length, FILE_MAX_BYTES)))
        except OSError as failure:
            raise error("unreadable", f"{path} cannot be read: {failure.strerror or failure}.") from None
        tensors = [entry for key, entry in (header or {}).items() if key != "__metadata__"]
        try:
            ends = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
            counted = _counted((str(entry["dtype"]), math.prod(map(int, entry["shape"]))) for entry in tensors)
        except (KeyError, TypeError, ValueError, IndexError):
            header = None
        if header is None or 8 + length + ends != size:
            raise error(
                "damaged_weights",
                f"{path} is cut short or no safetensors file: {size} bytes are not what its header says.",
                "Copy it again; with git, fetch large files first: git lfs pull",
            )
        return counted


def _counted(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for dtype, count in pairs:
        counts[dtype] = counts.get(dtype, 0) + count
    return counts


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object of these bytes; None when they are none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _COUNT_MAX

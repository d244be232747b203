"""Takes a snapshot of our code onto a machine that has nothing of ours yet; run by its text, so it imports nothing."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import sys
import tempfile
from typing import BinaryIO

_SUFFIXES = (".py", ".toml", ".txt", ".jsonl")


def present(target: str) -> dict[str, bytes]:
    """Every file of the snapshot in `target` by its path; compiled Python is none of it."""
    found = {}
    for folder, _, names in os.walk(target):
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118 -- run by its text on any Python
            if name.endswith(_SUFFIXES):
                with open(path, "rb") as file:  # noqa: PTH123
                    found[os.path.relpath(path, target)] = file.read()
    return found


def digest(files: dict[str, bytes]) -> str:
    """What names a snapshot: 16 hex digits of the SHA-256 over names and contents."""
    total = hashlib.sha256()
    for path, data in sorted(files.items()):
        total.update(f"{path}\0{len(data)}\0".encode() + data)
    return total.hexdigest()[:16]


def received(source: BinaryIO) -> dict[str, bytes]:
    """The files sent: for each the lengths of name and content, 32 bits each, then both."""
    files = {}
    while len(head := source.read(8)) == 8:
        name_bytes, data_bytes = struct.unpack(">II", head)
        path = source.read(name_bytes).decode()
        files[path] = source.read(data_bytes)
    return files


def write(files: dict[str, bytes], target: str) -> None:
    """Put the files at `target`, whole or not at all; what was there before is kept beside it."""
    above, name = os.path.split(target)
    staging = tempfile.mkdtemp(prefix=".new-", dir=above)
    try:
        for path, data in files.items():
            full = os.path.join(staging, path)  # noqa: PTH118
            os.makedirs(os.path.dirname(full), 0o700, exist_ok=True)  # noqa: PTH103, PTH120
            with open(full, "xb") as file:  # noqa: PTH123
                file.write(data)
        os.sync()
        if os.path.isdir(target):  # noqa: PTH112
            os.rename(target, os.path.join(tempfile.mkdtemp(prefix=".damaged-", dir=above), name))  # noqa: PTH104, PTH118
        os.rename(staging, target)  # noqa: PTH104
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(target: str, name: str) -> None:
    """Say `whole` when the snapshot `name` is in `target`, with what was sent put there first if need be."""
    files = received(sys.stdin.buffer)
    if digest(files) == name:
        above = os.path.dirname(target)  # noqa: PTH120
        os.makedirs(above, 0o700, exist_ok=True)  # noqa: PTH103
        with open(os.path.join(above, ".writing"), "ab") as lock:  # noqa: PTH118, PTH123
            fcntl.flock(lock, fcntl.LOCK_EX)
            if digest(present(target)) != name:  # nobody else made it meanwhile
                write(files, target)
    sys.stdout.write("whole\n" if digest(present(target)) == name else "missing\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

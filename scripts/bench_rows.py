"""Cost of a durable row against a sync for each and none at all; a resume's scan; how soon a reader sees a row."""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from figures import Figure, show

from jobs import durable, rows

ROOT = Path(__file__).resolve().parent.parent
ROWS = 20_000
ROWS_SYNCED_EACH = 500
SCANNED, SCANNED_PARSED = 1_000_000, 100_000
SEEN = 500
ROUNDS = 3
"""Of each cost per row the best of so many: a busy disk only ever adds."""


def make(number: int) -> rows.Row:
    """A row of 0.5 kB, as of an evaluation."""
    return {
        "key": f"gsm8k/test/{number // 5}#{number % 5}",
        "error": None,
        "completion": "She has 16 - 3 - 4 = 9 eggs left. She makes 9 * 2 = $18 every day.\n#### 18" * 3,
        "answer": "18",
        "target": "18",
        "score": 1.0,
        "tokens_in": 120,
        "tokens_out": 91,
        "finish_reason": "stop",
        "seed": 3_735_928_559 + number,
        "at": "2026-11-20T10:57:12.345Z",
    }


def appended(folder: Path, count: int) -> None:
    """As a worker writes them."""
    with rows.Appender(folder / "appended") as out:
        for number in range(count):
            out.append(make(number))


def synced_each(folder: Path, count: int) -> None:
    """A write and an fsync for each row."""
    with durable.opened(folder / "each", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        for number in range(count):
            os.write(descriptor, rows.encode(make(number)))
            os.fsync(descriptor)


def never_synced(folder: Path, count: int) -> None:
    """A write for each row, nothing more."""
    with durable.opened(folder / "never", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        for number in range(count):
            os.write(descriptor, rows.encode(make(number)))


def cost_us(write: Callable[[Path, int], None], folder: Path, count: int) -> float:
    """Microseconds a row, the making of the row left out."""
    found = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            began = time.perf_counter()
            write(Path(inner), count)
            written = time.perf_counter()
            for number in range(count):
                make(number)
            found.append((written - began - (time.perf_counter() - written)) / count * 1e6)
    return min(found)


def appending(folder: Path) -> Iterator[Figure | str]:
    """What a row costs."""
    each = cost_us(synced_each, folder, ROWS_SYNCED_EACH)
    never = cost_us(never_synced, folder, ROWS)
    said = f"a sync for each: {each:.0f}, none at all: {never:.0f}"
    yield Figure("append a row of 0.5 kB", cost_us(appended, folder, ROWS), "us", said, at_most=60)


def in_child(what: str, path: Path) -> tuple[float, float, int]:
    """Seconds, peak memory in MB, and rows found, by a process of its own."""
    words = [sys.executable, __file__, what, str(path)]
    seconds, peak, count = subprocess.run(words, capture_output=True, check=True).stdout.split()
    return float(seconds), float(peak), int(count)


def child(what: str, path: Path) -> None:
    """Index a file of rows, or parse each of its lines into an index; prints what it took."""
    began = time.perf_counter()
    if what == "index":
        count = len(rows.index(path).keys)
    else:
        keys: dict[str, bool] = {}
        with path.open("rb") as file:
            for line in file:
                row: dict[str, Any] = json.loads(line)
                keys[row["key"]] = row["error"] is None
        count = len(keys)
    seconds = time.perf_counter() - began
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, count)


def scanning(folder: Path) -> Iterator[Figure | str]:
    """What a resume reads first."""
    path, part = folder / "million", folder / "part"
    for target, count in ((path, SCANNED), (part, SCANNED_PARSED)):
        with target.open("wb") as out:
            out.writelines(rows.encode(make(number)) for number in range(count))
    seconds, peak_mb, found = in_child("index", path)
    assert found == SCANNED
    parsed_s, parsed_mb, found = in_child("parse", part)
    assert found == SCANNED_PARSED
    said = f"json.loads of each line: {parsed_s * SCANNED / SCANNED_PARSED:.1f} (from {SCANNED_PARSED:,} rows)"
    yield Figure("scan 1,000,000 rows of 0.5 kB to resume", seconds, "s", said, at_most=8)
    said = f"the file: {path.stat().st_size / 1e6:.0f}; {SCANNED_PARSED:,} rows parsed: {parsed_mb:.0f}"
    yield Figure("peak memory of that scan", peak_mb, "MB", said, at_most=300)


def reader(path: Path) -> None:
    """Look at the file without pause; say of each new whole line when it was seen, as the monotonic clock's seconds."""
    with path.open("rb", buffering=0) as file:
        rest = b""
        while True:
            *lines, rest = (rest + file.read(1 << 16)).split(b"\n")
            for _ in lines:
                os.write(1, struct.pack("d", time.monotonic()))


def seeing(folder: Path) -> Iterator[Figure | str]:
    """How soon another process sees a row after `append` returned; before it did is 0."""
    path = folder / "seen"
    late_us = []
    with rows.Appender(path) as out:
        words = [sys.executable, __file__, "reader", str(path)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            for number in itertools.count():
                out.append(make(number))
                returned = time.monotonic()
                (seen,) = struct.unpack("d", process.stdout.read(8))
                late_us.append(max(0.0, seen - returned) * 1e6)
                if number == SEEN:
                    break
            process.kill()
    late_us = sorted(late_us[1:])  # the first waits for the reader to start
    said = f"for another process that reads without pause; 99 of 100 within {late_us[SEEN * 99 // 100]:.0f}"
    yield Figure("from append's return until a reader sees the row", statistics.median(late_us), "us", said)


def main() -> int:
    """Measure on the disk that the project lies on."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rows-", dir=ROOT / "build") as name:
        return show(itertools.chain(*(part(Path(name)) for part in (appending, scanning, seeing))))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(main())
    what, path = sys.argv[1], Path(sys.argv[2])
    reader(path) if what == "reader" else child(what, path)

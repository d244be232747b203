"""A process that appends rows until it is ended, and says what is written by pipe."""

from __future__ import annotations

import itertools
import os
import signal
import struct
import sys
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from jobs import rows

STOPPED = 143


def text(seed: int, number: int) -> str:
    """The text of a row: 0.1 kB to 1.2 MB in UTF-8, the same each time."""
    source = Random(f"{seed}/{number}")
    size = source.choice((100, 400, 400, 4000, 40_000, 300_000))
    return source.choice(("ä", "漢", "🙂", "a\\", "x")) * size


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(STOPPED)


def say(number: int) -> None:
    """Pass a number on, as four bytes."""
    os.write(1, struct.pack("<i", number))


def talk(path: Path, seed: int) -> None:
    """Append rows of all sizes; say each one's number once it is written."""
    with rows.Appender(path) as out:
        for number in itertools.count():
            out.append({"key": str(number), "error": None, "text": text(seed, number)})
            say(number)


def rush(path: Path) -> None:
    """Append small rows and do nothing else; say 0 after the first, and at the end how many are written and synced."""
    signal.signal(signal.SIGTERM, _end)
    try:
        with rows.Appender(path) as out:
            for number in itertools.count():
                out.append({"key": str(number), "error": None})
                if number == 0:
                    say(0)
    finally:
        say(out.written)
        say(out.synced)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        rush(Path(sys.argv[1]))
    else:
        talk(Path(sys.argv[1]), int(sys.argv[2]))

"""A process that appends rows until it is ended, and says after each, by pipe, that it is written."""

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


def main(path: str, seed: str, kind: str) -> None:
    """Append to a new file; each row's number goes to standard output, as four bytes, once the row is written."""
    signal.signal(signal.SIGTERM, _end)
    with rows.Appender(Path(path)) as out:
        for number in itertools.count():
            words = "" if kind == "small" else text(int(seed), number)
            out.append({"key": str(number), "error": None, "text": words})
            os.write(1, struct.pack("<i", number))


if __name__ == "__main__":
    main(*sys.argv[1:])

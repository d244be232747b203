"""Disks that fail: the n-th change fails, for every n, and what is left is valid; small disks that are really full."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import durable, rows, rundir
from tests.faults.disk import FailingOs, Fault, instead_of_os

ROOT = Path(__file__).parent.parent.parent
FAULTS = [
    pytest.param(Fault(errno.EIO), id="one EIO"),
    pytest.param(Fault(errno.EIO, from_then_on=True), id="EIO from then on"),
    pytest.param(Fault(errno.EIO, from_then_on=True, half=True), id="half a write, then EIO"),
    pytest.param(Fault(errno.ENOSPC), id="one ENOSPC"),
    pytest.param(Fault(errno.ENOSPC, from_then_on=True), id="ENOSPC from then on"),
    pytest.param(Fault(errno.ENOSPC, from_then_on=True, half=True), id="half a write, then ENOSPC"),
    pytest.param(Fault(errno.EINTR), id="one EINTR"),  # as when a signal's handler raises
]


def every_failure(fault: Fault, operation: Callable[[], object]) -> Iterator[None]:
    """Run the operation with the 1st, 2nd, ... change of the disk failing, until it needs no more; stops after each.

    A disk that failed must have made the operation raise OSError: no failure goes unsaid.
    """
    for n in itertools.count(1):
        disk = FailingOs(n, fault)
        with instead_of_os(disk):
            try:
                operation()
                raised = False
            except OSError:
                raised = True
        if not disk.has_failed:
            assert not raised
            assert n > 1
            return
        assert raised, f"change {n} failed, and nobody was told"
        yield


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_save_leaves_the_old_document_or_the_new_one(fault: Fault, tmp_path: Path) -> None:
    """Whatever fails in `save_json`: it raises, the document is whole, no temporary file stays, and a retry works."""
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "run.json"
    old, new = {"version": 1, "text": "old" * 5000}, {"version": 2, "text": "ä" * 9000}
    durable.save_json(path, old)
    failures = 0
    for _ in every_failure(fault, lambda: durable.save_json(path, new)):
        failures += 1
        assert durable.load_json(path) in (old, new)
        if fault.can_remove:
            assert left_behind(folder) == ["run.json"]
        durable.save_json(path, new)
        assert durable.load_json(path) == new
        durable.save_json(path, old)
        for name in set(left_behind(folder)) - {"run.json"}:
            (folder / name).unlink()
    assert failures >= 5  # open, write, sync, rename, sync of the folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_append_leaves_whole_rows_only(fault: Fault, tmp_path: Path) -> None:
    """Whatever fails in an appender: exactly the rows whose `append` returned are there, and the next attempt works."""
    numbers = itertools.count(1)
    written: list[str] = []
    path = tmp_path

    def session() -> None:
        nonlocal path
        path = tmp_path / f"{next(numbers):04d}.jsonl"
        written.clear()
        with rows.Appender(path) as appender:
            for key in "abcd":
                appender.append({"key": key, "error": None, "completion": "ü" * 3000})
                written.append(key)
                if key == "b":
                    appender.sync()

    failures = 0
    for _ in every_failure(fault, session):
        failures += 1
        found = rows.index(path)
        assert list(found.keys) == written
        assert found.corrupt == 0
        rows.repair(path)
        with rows.Appender(path.with_suffix(".next")) as appender:
            appender.append({"key": "e", "error": None})
        assert [row["key"] for row in rows.read([path, path.with_suffix(".next")])] == [*written, "e"]
    assert failures >= 8  # made, folder synced, four writes, two syncs


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_repair_can_be_repeated(fault: Fault, tmp_path: Path) -> None:
    """Whatever fails in `repair`: whole rows stay, the torn tail is in the file or set aside, and a retry works."""
    whole = b"".join(rows.encode({"key": key, "error": None}) for key in "abc")
    tail = rows.encode({"key": "d", "error": None, "completion": "ü" * 3000})[:-100]
    path = tmp_path / "rows.jsonl"
    torn = tmp_path / "rows.jsonl.torn"
    path.write_bytes(whole + tail)
    failures = 0
    for _ in every_failure(fault, lambda: rows.repair(path)):
        failures += 1
        content = path.read_bytes()
        assert content == whole + tail or (content == whole and torn.read_bytes().endswith(tail + b"\n"))
        assert rows.repair(path) in (0, len(tail))
        assert path.read_bytes() == whole
        path.write_bytes(whole + tail)
        torn.unlink(missing_ok=True)
    assert failures >= 6  # the aside made, written, synced, its folder synced; cut, synced


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("make", [durable.make_folder, lambda path: os.close(durable.make_file(path))])
def test_what_could_not_be_made_can_be_made_later(fault: Fault, make: Callable[[Path], None], tmp_path: Path) -> None:
    """Whatever fails in `make_folder` and `make_file`: it is not there afterwards (where it can be removed)."""
    numbers = itertools.count(1)
    last = tmp_path

    def operation() -> None:
        nonlocal last
        last = tmp_path / f"made-{next(numbers)}"
        make(last)

    for _ in every_failure(fault, operation):
        assert not (fault.can_remove and last.exists())
        if fault.can_remove:
            make(last)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        refusal = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError as error:
        refusal = str(error)
    if refusal:
        pytest.skip(f"FULL DISK NOT TESTED: a 1 MB disk needs root and mount ({refusal})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def append_until_full(path: Path, size: int) -> list[str]:
    """Append rows of so many characters until the disk is full; the keys of those whose `append` returned."""
    numbers = itertools.count()
    with rows.Appender(path) as appender, contextlib.suppress(OSError):
        while True:
            appender.append({"key": f"{next(numbers)}", "error": None, "completion": "é" * size})
    assert appender.synced == appender.written == next(numbers) - 1
    return [f"{number}" for number in range(appender.written)]


def fill(path: Path) -> None:
    """Take every byte that is left on the disk."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x")


@pytest.mark.parametrize("size", [7, 1000, 100_000])
def test_a_full_disk_holds_whole_rows_and_the_reserve_lets_the_last_word_through(size: int, small_disk: Path) -> None:
    """On a disk that is really full every written row is synced and whole, and giving up the reserve frees the seal."""
    with durable.opened(small_disk / "reserve", os.O_WRONLY | os.O_CREAT) as descriptor:
        durable.write_all(descriptor, b"\0" * rundir.RESERVE_BYTES)
    durable.save_json(small_disk / "status.json", {"state": "running"})
    path = small_disk / "rows.jsonl"
    written = append_until_full(path, size)
    fill(small_disk / "log.txt")
    assert path.read_bytes().endswith(b"\n")
    assert list(rows.index(path).keys) == written
    with pytest.raises(OSError, match="No space left"):
        durable.save_json(small_disk / "status.json", {"state": "ended"})
    assert durable.load_json(small_disk / "status.json") == {"state": "running"}
    (small_disk / "reserve").unlink()
    durable.save_json(small_disk / "exit.json", {"reason": "failed", "message": "x" * 1000})
    assert left_behind(small_disk) == ["exit.json", "log.txt", "rows.jsonl", "status.json"]


def test_a_file_at_its_size_limit_holds_whole_rows(tmp_path: Path) -> None:
    """Where a limit on file sizes ends the writing (no root needed), every written row is whole as well."""
    script = (
        "import itertools, resource, sys; from pathlib import Path; from jobs import rows\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "appender = rows.Appender(Path(sys.argv[1]))\n"
        "for number in itertools.count():\n"
        "    try: appender.append({'key': str(number), 'error': None, 'completion': 'é' * number})\n"
        "    except OSError as error: code = error.errno; break\n"
        "appender.close(); print(code, number)"
    )
    path = tmp_path / "rows.jsonl"
    words = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    code, count = map(int, done.stdout.split())
    assert code == errno.EFBIG
    assert list(rows.index(path).keys) == [str(number) for number in range(count)]
    assert path.read_bytes().endswith(b"\n")

"""The appender of rows: what a kill cannot lose, how few rows stand unsynced, and that a failure is final."""

from __future__ import annotations

import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import pytest

from jobs import rows
from tests.faults.disk import FullOs, LosingOs, RecordingOs, ShortOs, StallingOs, instead_of_os
from tests.jobs import row_writer
from tests.waiting import until

ROUNDS = [pytest.param(30, id="quick"), pytest.param(500, id="long", marks=pytest.mark.slow)]
SYNC_MARGIN_S = 1.0
"""What a busy machine may add to the promised half second."""


def row(number: int, size: int = 0) -> rows.Row:
    return {"key": str(number), "error": None, "text": "ü" * size}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def start_writer(*words: object) -> subprocess.Popen[bytes]:
    """A process that appends rows to a file; with a seed, rows of all sizes that follow from it."""
    command = [sys.executable, "-I", "-S", row_writer.__file__, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def numbers(process: subprocess.Popen[bytes], seconds: float, how: int) -> list[int]:
    """Let it write for so long after its first row, then send the signal; every number it said."""
    assert process.stdout is not None
    said = process.stdout.read(4)
    deadline = time.monotonic() + seconds
    while (left_s := deadline - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], left_s)[0]:
            said += process.stdout.read(4000)
    process.send_signal(how)
    while more := process.stdout.read(4000):
        said += more
    return [number for (number,) in struct.iter_unpack("<i", said)]


@pytest.mark.parametrize("count", ROUNDS)
def test_a_kill_loses_no_written_row(count: int, path: Path) -> None:
    """After SIGKILL at a random moment each row whose `append` returned is there, exact; at most one more is."""
    for seed in range(count):
        with start_writer(path, seed) as process:
            said = numbers(process, Random(seed).random() * 0.05, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        found = list(rows.read([path]))
        assert rows.index(path).corrupt == 0
        assert [each["key"] for each in found] == [str(number) for number in range(len(found))]
        assert len(said) <= len(found) <= len(said) + 1
        assert all(each["text"] == row_writer.text(seed, number) for number, each in enumerate(found))
        path.unlink()


@pytest.mark.parametrize("count", ROUNDS)
def test_a_stop_at_any_moment_ends_through_close(count: int, path: Path) -> None:
    """A TERM whose handler raises, in the midst of appending, ends the process at once, with every row synced."""
    for seed in range(count):
        with start_writer(path) as process:
            killer = threading.Timer(20, process.kill)
            killer.start()
            _, written, synced = numbers(process, Random(seed).random() * 0.02, signal.SIGTERM) or (0, 0, 0)
            killer.cancel()
            assert process.wait() == row_writer.STOPPED, process.stderr and process.stderr.read()
        assert written == synced
        assert written <= len(rows.index(path).keys) <= written + 1
        path.unlink()


def test_a_file_has_one_writer(path: Path) -> None:
    """A second appender on the same file fails, whether the first still runs or not, and changes nothing."""
    with rows.Appender(path) as appender:
        appender.append(row(1))
        with pytest.raises(FileExistsError):
            rows.Appender(path)
    with pytest.raises(FileExistsError):
        rows.Appender(path)
    assert list(rows.read([path])) == [row(1)]


def test_a_row_is_visible_when_append_returns(path: Path) -> None:
    """Another reader sees each row as soon as `append` has returned."""
    with rows.Appender(path) as appender:
        for number in range(100):
            appender.append(row(number, 50 * number))
            assert len(rows.index(path).keys) == appender.written == number + 1


def test_threads_may_append_together(path: Path) -> None:
    """Rows of several threads are all there, each whole, on a system that writes in pieces."""
    with instead_of_os(ShortOs(100)), rows.Appender(path) as appender:

        def work(first: int) -> None:
            for number in range(first, first + 200):
                appender.append(row(number, 300))

        threads = [threading.Thread(target=work, args=(1000 * each,)) for each in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = rows.index(path)
    assert (len(found.keys), found.corrupt, appender.synced) == (800, 0, 800)


def test_no_more_than_the_promised_rows_stand_unsynced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever `append` returns, at most 64 rows stand outside completed syncs, and `synced` counts none of these."""
    monkeypatch.setattr(rows, "_SYNC_EARLY_S", 3600.0)  # rows alone make it sync
    recorder = RecordingOs()
    with instead_of_os(recorder), rows.Appender(path) as appender:
        for number in range(2000):
            appender.append(row(number))
            said = appender.synced  # looked at before the disk's own record of it
            effects = list(recorder.effects)
            covered = max((each.covers for each in effects if each.kind == "sync"), default=0)
            synced = sum(each.kind == "write" for each in effects[:covered])
            assert number + 1 - synced <= rows.SYNC_ROWS
            assert said <= synced
    assert appender.synced == 2000


def test_append_waits_for_a_disk_that_stalls(path: Path) -> None:
    """While the disk does not finish a sync, 64 rows are taken and the next waits; then all go on."""
    disk = StallingOs()
    with instead_of_os(disk), rows.Appender(path) as appender:
        thread = threading.Thread(target=lambda: [appender.append(row(number)) for number in range(200)], daemon=True)
        thread.start()
        until(lambda: appender.written == rows.SYNC_ROWS)
        thread.join(0.2)
        assert appender.written == rows.SYNC_ROWS
        assert appender.synced == 0
        disk.go_on.set()
        thread.join(30)
        assert appender.written == 200
    assert appender.synced == 200


def test_no_row_stands_unsynced_for_long(path: Path) -> None:
    """Rows that come slowly are each synced within half a second and a margin, with nobody asking."""
    written_at: list[float] = []
    oldest_s = 0.0
    with rows.Appender(path) as appender:
        while appender.synced < 60:
            if len(written_at) < 60:
                appender.append(row(len(written_at)))
                written_at.append(time.monotonic())
            time.sleep(0.02)
            unsynced = written_at[appender.synced :]
            oldest_s = max(oldest_s, time.monotonic() - unsynced[0] if unsynced else 0.0)
            assert oldest_s <= rows.SYNC_S + SYNC_MARGIN_S
    assert oldest_s > 0.02  # they were not synced one by one either


def test_sync_waits_for_the_disk_and_for_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sync` returns once every row written so far is synced, and does not wait for the next group to be due."""
    monkeypatch.setattr(rows, "_SYNC_EARLY_S", 3600.0)
    disk = StallingOs()
    with instead_of_os(disk), rows.Appender(path) as appender:
        appender.sync()
        for number in range(3):
            appender.append(row(number))
        thread = threading.Thread(target=appender.sync, daemon=True)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        disk.go_on.set()
        thread.join(30)
        assert not thread.is_alive()
        assert appender.synced == 3


def test_only_rows_that_a_sync_found_written_count_as_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are written while the disk syncs are not counted when that sync is done: it may not cover them."""
    monkeypatch.setattr(rows, "_SYNC_EARLY_S", 3600.0)
    disk = StallingOs()
    with instead_of_os(disk), rows.Appender(path) as appender:
        for number in range(rows.SYNC_ROWS // 2):
            appender.append(row(number))
        until(lambda: disk.syncs == 1)
        for number in range(8):
            appender.append(row(number))
        disk.go_on.set()
        until(lambda: appender.synced > 0)
        assert appender.synced == rows.SYNC_ROWS // 2


def test_closing_syncs_and_is_final(path: Path) -> None:
    """`close` syncs what is left, may be repeated, and no row comes after it."""
    appender = rows.Appender(path)
    appender.append(row(1))
    appender.close()
    assert appender.synced == 1
    appender.close()
    with pytest.raises(ValueError, match="after close"):
        appender.append(row(2))
    assert list(rows.read([path])) == [row(1)]


def test_an_unfit_row_changes_nothing(path: Path) -> None:
    """A row that JSON cannot hold is refused before anything is written, and the next one is taken."""
    with rows.Appender(path) as appender:
        for unfit in (row(1) | {"score": float("nan")}, row(1) | {"key": 1}, row(1) | {"text": {1, 2}}):
            with pytest.raises((ValueError, TypeError)):
                appender.append(unfit)
        appender.append(row(2))
    assert list(rows.read([path])) == [row(2)]


def test_a_failed_write_is_final_and_what_was_written_is_synced(path: Path) -> None:
    """After a write fails no row is taken, even if the disk has recovered; `sync` and `close` do their work."""
    disk = FullOs()
    with instead_of_os(disk):
        appender = rows.Appender(path)
        appender.append(row(1))
        for disk.is_full in (True, False):
            with pytest.raises(OSError, match="No space left"):
                appender.append(row(2))
        appender.sync()
        assert appender.synced == 1
        appender.close()
    assert list(rows.read([path])) == [row(1)]


def test_a_failed_sync_is_final(path: Path) -> None:
    """After a sync fails nothing counts as synced, no sync is tried again, and append, sync and close all raise."""
    disk = LosingOs()
    disk.go_on.set()
    with instead_of_os(disk):
        appender = rows.Appender(path)
        appender.append(row(1))
        for again in (appender.sync, lambda: appender.append(row(2)), appender.sync, appender.close):
            with pytest.raises(OSError, match="the disk lost it"):
                again()
    assert (appender.written, appender.synced, disk.syncs) == (1, 0, 1)


def test_a_waiting_append_hears_of_a_failed_sync(path: Path) -> None:
    """An append that waits for the disk raises when the sync it waits for fails: it does not wait for ever."""
    disk = LosingOs()
    with instead_of_os(disk):
        appender = rows.Appender(path)
        for number in range(rows.SYNC_ROWS):
            appender.append(row(number))
        threading.Timer(0.05, disk.go_on.set).start()
        for again in (lambda: appender.append(row(rows.SYNC_ROWS)), appender.close):
            with pytest.raises(OSError, match="the disk lost it"):
                again()
    assert (appender.written, appender.synced) == (rows.SYNC_ROWS, 0)

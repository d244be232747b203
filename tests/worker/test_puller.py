"""What a pull sends, and when: files that are still, rows in whole lines, weights in pieces, the end at once."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import locks, rundir
from tests.orchestrator import carrying
from tests.orchestrator.carrying import LARGE, Side
from tests.waiting import until
from worker import pieces, puller
from worker.pieces import Pieces
from worker.puller import Puller


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The other side of the connection stays there."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield
    os.close(writing)


@pytest.fixture
def side(tmp_path: Path) -> Side:
    return Side(tmp_path)


def pull(made: Puller) -> list[carrying.Frame]:
    """The frames of a pull, by an object that may pull again."""
    made.out = io.BytesIO()
    made.pull()
    return list(carrying.parsed(made.out.getvalue()))


def names(frames: list[carrying.Frame]) -> list[str]:
    """What the frames are about, in their order."""
    kinds = ("whole", "piece", "file", "diverged", "skipped")
    return [next((frame[kind] for kind in kinds if kind in frame), "") for frame, _ in frames if "end" not in frame]


def test_a_file_is_sent_once_it_is_still(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the run goes on, a file comes when it has not changed for a while, and again after it has changed."""
    monkeypatch.setattr(puller, "STILL_S", 0.3)
    with locks.held(side.run.run_lock, 0):
        made = Puller(side.run, {}, io.BytesIO())
        path = side.make("best.pt", b"half")
        assert names(pull(made)) == []
        assert names(until(lambda: [each for each in pull(made) if "whole" in each[0]])) == ["out/best.pt"]
        assert names(pull(made)) == []
        path.write_bytes(b"whole")
        assert names(pull(made)) == []
        assert until(lambda: [each for each in pull(made) if "whole" in each[0]])[0][1] == b"whole"
        path.write_bytes(b"at the end")
    assert names(pull(made)) == ["out/best.pt"], "after the end nobody writes any more"


def test_two_looks_count_where_clocks_differ(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose times lie in the future is still when two looks, some time apart, saw the same."""
    monkeypatch.setattr(puller, "STILL_S", 0.2)
    path = side.make("best.pt", b"x")
    os.utime(path, (time.time() + 1000, time.time() + 1000))
    with locks.held(side.run.run_lock, 0):
        made = Puller(side.run, {}, io.BytesIO())
        assert names(pull(made)) == []
        until(lambda: names(pull(made)) == ["out/best.pt"])


def test_the_end_is_noticed_at_once(side: Side) -> None:
    """However rarely files are looked at, the end of the run ends the pull, and what came last is sent before that."""
    lock = locks.take(side.run.run_lock)
    assert lock is not None
    out = io.BytesIO()
    side.run.attempt(1).log.write_bytes(b"first words, ")
    made = Puller(side.run, {"wait_s": 60, "poll_s": 60}, out)
    thread = threading.Thread(target=made.pull)
    thread.start()
    until(lambda: made.growing)  # it has looked
    with side.run.attempt(1).log.open("ab") as log:
        log.write(b"last words")
    os.close(lock)
    thread.join(timeout=5)
    assert not thread.is_alive()
    frames = list(carrying.parsed(out.getvalue()))
    assert frames[-1][0]["state"] == "died"
    assert frames[-2][1] == b"last words"


@pytest.mark.parametrize(("poll_s", "least", "most"), [(0.05, 4, 16), (60.0, 2, 2)])
def test_files_are_looked_at_as_often_as_asked(
    side: Side, monkeypatch: pytest.MonkeyPatch, poll_s: float, least: int, most: int
) -> None:
    """Between the first look and the last one there is one every `poll_s` seconds."""
    looks: list[None] = []
    real = Puller._look
    monkeypatch.setattr(Puller, "_look", lambda *words: (looks.append(None), real(*words))[1])
    with locks.held(side.run.run_lock, 0):
        Puller(side.run, {"wait_s": 0.6, "poll_s": poll_s}, io.BytesIO()).pull()
    assert least <= len(looks) <= most


def test_a_silent_pull_says_that_it_lives(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull that has nothing to send sends beats, and one that reads a large file does, too."""
    monkeypatch.setattr(puller, "_BEAT_S", 0.02)
    monkeypatch.setattr(pieces, "_HASH_STEP_BYTES", 1 << 20)
    with side.make("large", b"").open("r+b") as file:
        file.truncate(64 << 20)
    frames = pull(Puller(side.run, {}, io.BytesIO()))
    first = next(at for at, (frame, _) in enumerate(frames) if "piece" in frame)
    assert len([frame for frame, _ in frames[:first] if "beat" in frame]) >= 1
    with locks.held(side.run.run_lock, 0):
        (side.run.work / "large").unlink()
        quiet = pull(Puller(side.run, {"wait_s": 0.3, "poll_s": 0.02}, io.BytesIO()))
    assert len([frame for frame, _ in quiet if "beat" in frame]) >= 2


class Sink(io.RawIOBase):
    """Counts what is written, and remembers headers."""

    def __init__(self) -> None:
        self.headers: list[bytes] = []
        self.largest = 0

    def write(self, data: Any) -> int:
        """Take all of it."""
        self.headers.append(bytes(data[:200]).partition(b"\n")[0])
        self.largest = max(self.largest, len(data))
        return len(data)


def weights(run: rundir.Run, size: int, folder: str = "model") -> Path:
    """A folder of weights with a file of that size, zeros only."""
    made = run.folder / folder
    made.mkdir()
    (made / rundir.MANIFEST).write_bytes(b"{}")
    with (made / "model.safetensors").open("wb") as file:
        file.truncate(size)
    return made


def test_weights_of_any_size_are_sent_in_pieces(side: Side) -> None:
    """A file of weights larger than any frame comes in pieces, never as a whole in memory, its manifest after it."""
    weights(side.run, 80 << 20)
    sink = Sink()
    tracemalloc.start()
    Puller(side.run, {}, sink).pull()  # type: ignore[arg-type]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 24 << 20
    assert sink.largest < (4 << 20) + 1000
    kinds = [line.partition(b",")[0] for line in sink.headers if b"model/" in line]
    assert kinds == [b'{"piece":"model/model.safetensors"'] * 20 + [b'{"whole":"model/MANIFEST.json"']


def test_weights_come_home_and_are_whole_or_not_there(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of weights has its manifest at home only when all its files are there; cut, it goes on."""
    with carrying.small(monkeypatch):
        weights(side.run, 5000, "checkpoint-500")
        copy = side.home.machine(side.name)
        while not [*copy.folders()]:
            frames = side.carry(lambda frames: frames[:2])
            assert len(frames) == 2
        assert (copy.folder / "checkpoint-500" / "model.safetensors").read_bytes() == bytes(5000)
        assert names(side.carry()) == []


def test_a_checkpoint_removed_while_it_is_sent_harms_nothing(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are gone before they were sent are passed over, and the pull ends well."""
    with carrying.small(monkeypatch):
        folder = weights(side.run, 5000, "checkpoint-1")
        (folder / "inner").mkdir()
        real = Pieces.step

        def step(queue: Pieces) -> Any:
            (folder / "model.safetensors").unlink(missing_ok=True)
            return real(queue)

        monkeypatch.setattr(Pieces, "step", step)
        assert names(pull(Puller(side.run, {}, io.BytesIO())))[0] == "checkpoint-1/inner", "what is no file is said"


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_large_file_that_changes_under_a_pull_is_sent_anew(
    side: Side, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """No piece is sent of a file that has changed since it was hashed; the newer version comes whole."""
    steps: list[None] = []
    real = Pieces.step

    def changing(queue: Pieces) -> Any:
        steps.append(None)
        if len(steps) == step:
            side.make("large", LARGE[::-1])
        return real(queue)

    monkeypatch.setattr(Pieces, "step", changing)
    with carrying.small(monkeypatch):
        side.make("large", LARGE)
        frames = pull(Puller(side.run, {}, io.BytesIO()))
    sent = b"".join(data for frame, data in frames if "piece" in frame)
    before = max(step - 2, 0) * 1000  # the first step hashes
    assert sent == LARGE[:before] + LARGE[::-1]


def test_a_large_file_is_hashed_once(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of a large file is kept for later pulls, until the file changes in whatever way."""
    hashed: list[str] = []
    real = Pieces._hash
    monkeypatch.setattr(Pieces, "_hash", lambda queue, file: (hashed.append(file.name), real(queue, file))[1])
    monkeypatch.setattr(pieces, "_SETTLED_NS", 0)
    with carrying.small(monkeypatch):
        path = side.make("large", LARGE)
        for _ in range(3):
            side.carry()
        assert hashed == ["out/large"]
        facts = path.stat()
        path.write_bytes(LARGE[::-1])
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        side.carry()
        assert hashed == ["out/large"] * 2
        assert side.view() == {"large": LARGE[::-1]}
        monkeypatch.setattr(pieces, "_SETTLED_NS", 10**12)
        path.write_bytes(LARGE)
        for _ in range(2):
            side.carry()
        assert hashed == ["out/large"] * 4, "a file that is too young is not trusted to show every change"


def test_only_endless_lines_are_cut(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is never cut, however long; a command's line that fills a frame is, so that it needs no memory."""
    monkeypatch.setattr(puller, "CHUNK_BYTES", 100)
    side.run.attempt(1).rows.write_bytes(b"r" * 350)
    side.make("x.jsonl", b"x" * 350)
    with locks.held(side.run.run_lock, 0):
        frames = pull(Puller(side.run, {}, io.BytesIO()))
    assert [frame["bytes"] for frame, _ in frames if frame.get("file") == "out/x.jsonl"] == [100, 100, 100]
    assert [frame for frame, _ in frames if "rows.jsonl" in frame.get("file", "")] == []


def test_a_growing_file_that_is_replaced_while_it_is_followed_is_noticed(side: Side) -> None:
    """A file that shrinks, or is another one, is compared anew: it goes on where it is alike, or is sent anew."""
    with locks.held(side.run.run_lock, 0):
        made = Puller(side.run, {}, io.BytesIO())
        side.make("x.jsonl", b"1\n2\n")
        assert pull(made)[0][1] == b"1\n2\n"
        fresh = side.make("fresh", b"1\n2\n3\n")
        fresh.replace(side.run.work / "x.jsonl")
        assert pull(made)[0][1] == b"3\n"
        side.make("x.jsonl", b"9\n")
        frames = pull(made)
        assert (frames[0][0], frames[1][1]) == ({"diverged": "out/x.jsonl"}, b"9\n")


def test_one_file_does_not_keep_the_others_waiting(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a growing file with much to send, only a part is sent before rows are looked at again; nothing is left out."""
    monkeypatch.setattr(puller, "CHUNK_BYTES", 100)
    monkeypatch.setattr(puller, "_BURST_BYTES", 300)
    monkeypatch.setattr(puller, "_LOOK_SHARE", 0)
    side.make("x.jsonl", b"123456789\n" * 100)
    with locks.held(side.run.run_lock, 0):
        made = Puller(side.run, {"wait_s": 0.5, "poll_s": 0.0}, io.BytesIO())
        looks: list[int] = []
        real = Puller._look
        monkeypatch.setattr(Puller, "_look", lambda *words: (looks.append(1), real(*words))[1])
        frames = pull(made)
    assert b"".join(data for _, data in frames) == b"123456789\n" * 100
    assert len(looks) > 3


def test_what_is_passed_over_is_said_once(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that cannot come home is said once in a pull, however often one looks, and not by the thousand."""
    monkeypatch.setattr(puller, "_SKIPPED_MAX", 3)
    for number in range(10):
        side.make(f"bad\n{number}", b"")
    with locks.held(side.run.run_lock, 0):
        frames = pull(Puller(side.run, {"wait_s": 0.2, "poll_s": 0.01}, io.BytesIO()))
    said = [frame for frame, _ in frames if "skipped" in frame]
    assert [frame["skipped"] for frame in said] == [f"out/bad\\n{number}" for number in range(3)]
    assert all(frame["why"] for frame in said)
    assert side.carry()[0][0].keys() == {"skipped", "why"}, "and the laptop passes them over, too"

"""Durable files: a reader sees the old document or the new one, whoever writes, dies or is in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs import durable
from tests.faults.disk import RecordingOs, ShortOs, instead_of_os

ROOT = Path(__file__).parent.parent.parent
ROUNDS = [pytest.param(20, id="quick"), pytest.param(300, id="long", marks=pytest.mark.slow)]
SAVER = """
import itertools, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from jobs import durable
for number in itertools.count(1):
    durable.save_json(Path(sys.argv[2]), {"number": number, "text": "ä" * (number % 7 * 20_000)}, synced=number % 2 > 0)
    os.write(1, b"%10d" % number)
"""
documents = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
              st.text(st.characters())),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(st.characters()), inner, max_size=4)),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None)
@given(documents)
@example({"\ud800": ["\\\udfff", "\u2028"]})
def test_every_document_comes_back(tmp_path_factory: pytest.TempPathFactory, document: object) -> None:
    """Any JSON document, lone surrogates and all, is loaded as JSON itself would bring it back."""
    path = tmp_path_factory.getbasetemp() / "document.json"
    durable.save_json(path, document, synced=False)
    assert durable.load_json(path) == json.loads(json.dumps(document))


def test_a_missing_document_is_none_and_a_damaged_one_an_error(tmp_path: Path) -> None:
    """Absent is None; present but not JSON is a ValueError, never a part of something."""
    path = tmp_path / "run.json"
    assert durable.load_json(path) is None
    path.write_bytes(b'{"a": 1')
    with pytest.raises(ValueError, match="Expecting"):
        durable.load_json(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 100, b'{"a": 1', b"[1]", b"7", b"\xff", b"[" * 100_000],
    ids=lambda content: repr(content[:9]),
)
def test_news_that_are_damaged_are_no_news(content: bytes, tmp_path: Path) -> None:
    """A file that was never synced is empty news when damaged, absent or no object, and itself when whole."""
    path = tmp_path / "status.json"
    assert durable.load_news(path) == {}
    path.write_bytes(content)
    assert durable.load_news(path) == {}
    durable.save_json(path, {"phase": "generating"}, synced=False)
    assert durable.load_news(path) == {"phase": "generating"}


def test_what_is_not_json_leaves_the_old_document(tmp_path: Path) -> None:
    """NaN and things JSON does not know are refused, and change nothing."""
    path = tmp_path / "state" / "run.json"
    path.parent.mkdir()
    durable.save_json(path, {"version": 1})
    for unfit in ({"score": float("nan")}, {"score": {1, 2}}):
        with pytest.raises((ValueError, TypeError)):
            durable.save_json(path, unfit)
    assert durable.load_json(path) == {"version": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("count", ROUNDS)
def test_a_kill_leaves_the_last_document_or_the_next(count: int, tmp_path: Path) -> None:
    """After SIGKILL at a random moment the document is whole, and the last saved one or the one after it."""
    path = tmp_path / "run.json"
    for seed in range(count):
        words = [sys.executable, "-I", "-S", "-c", SAVER, str(ROOT), str(path)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            said = process.stdout.read(10)
            deadline = time.monotonic() + Random(seed).random() * 0.05
            while time.monotonic() < deadline:
                said = process.stdout.read(10)
            process.send_signal(signal.SIGKILL)
            while more := process.stdout.read(10):
                said = more
        document = durable.load_json(path)
        assert document["number"] in (int(said), int(said) + 1)
        assert document["text"] == "ä" * (document["number"] % 7 * 20_000)
        path.unlink()


def test_threads_that_save_the_same_document_do_not_mix_theirs(tmp_path: Path) -> None:
    """While threads replace one document together, each load gives a whole one, and none of the saves fails."""
    path = tmp_path / "state" / "run.json"
    path.parent.mkdir()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(100):
                durable.save_json(path, [number] * 1000 * (number + 1), synced=False)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        document = durable.load_json(path)
        assert document is None or document == [document[0]] * 1000 * (document[0] + 1)
    assert not failures
    assert list(path.parent.iterdir()) == [path]


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    """What is made here can be read by its owner only, whatever the umask."""
    before = os.umask(0)
    try:
        durable.save_json(tmp_path / "run.json", {})
        durable.make_folder(tmp_path / "run")
        os.close(durable.make_file(tmp_path / "run" / "rows.jsonl"))
        with durable.opened(tmp_path / "log.txt", os.O_WRONLY | os.O_CREAT):
            pass
    finally:
        os.umask(before)
    for name, mode in {"run.json": 0o600, "run": 0o700, "run/rows.jsonl": 0o600, "log.txt": 0o600}.items():
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name


def test_what_must_be_new_is_not_taken_over(tmp_path: Path) -> None:
    """`make_folder` and `make_file` raise FileExistsError for what is there, and leave it alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "rows.jsonl").write_bytes(b"here first")
    with pytest.raises(FileExistsError):
        durable.make_folder(tmp_path / "run")
    with pytest.raises(FileExistsError):
        durable.make_file(tmp_path / "rows.jsonl")
    assert (tmp_path / "run").is_dir()
    assert (tmp_path / "rows.jsonl").read_bytes() == b"here first"


def test_folders_above_are_made_too(tmp_path: Path) -> None:
    """`have_folder` makes what is missing, syncing each new name, and may be called again."""
    recorder = RecordingOs()
    with instead_of_os(recorder):
        durable.have_folder(tmp_path / "a" / "b" / "c")
        durable.have_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert [(effect.kind, effect.path.relative_to(tmp_path).as_posix()) for effect in recorder.effects] == [
        ("mkdir", "a"), ("sync folder", "."), ("mkdir", "a/b"), ("sync folder", "a"), ("mkdir", "a/b/c"),
        ("sync folder", "a/b"),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 1000])
def test_short_writes_are_finished(size: int, tmp_path: Path) -> None:
    """A system that writes only a part at a time still gets every byte written, in order."""
    data = bytes(number % 251 for number in range(size))
    path = tmp_path / "file"
    with instead_of_os(ShortOs(7)), durable.opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        assert durable.append(descriptor, data, 0) == size
    assert path.read_bytes() == data


def test_an_opened_file_is_closed(tmp_path: Path) -> None:
    """`opened` closes its descriptor, also when the block raises."""
    with durable.opened(tmp_path / "file", os.O_WRONLY | os.O_CREAT) as first:
        os.fstat(first)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
    with pytest.raises(KeyError), durable.opened(tmp_path / "file", os.O_RDONLY) as second:
        raise KeyError
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)

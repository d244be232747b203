"""Power cuts: real workloads are recorded, cut anywhere, and replayed into what a disk may then hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from jobs import durable, rows
from tests.faults.disk import Effect, PowerCut, RecordingOs, instead_of_os

CUTS = [pytest.param(300, id="quick"), pytest.param(10_000, id="long", marks=pytest.mark.slow)]
_ALPHABET = 'abcdefghij klmnopqrst\\"\nxyzäöü€漢字🙂'


def some_row(source: Random, number: int) -> rows.Row:
    """A row of 0.1 to 10 kB; one in five has an error, and a good row of its key comes later."""
    size = source.choice((10, 100, 400, 1000, 4000, 10_000))
    key = f"task/test/{number // 2 if number % 10 == 1 else number}#0"
    return {
        "key": key,
        "error": "timed out" if number % 5 == 0 else None,
        "completion": "".join(source.choices(_ALPHABET, k=size)),
        "number": number,
    }


@pytest.fixture
def saving(tmp_path: Path) -> Path:
    """Where a document is to be saved, in a folder of its own."""
    (tmp_path / "saving").mkdir()
    return tmp_path / "saving" / "run.json"


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """A folder for what a power cut left."""
    (tmp_path / "found").mkdir()
    return tmp_path / "found"


@pytest.fixture(scope="module")
def appended(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Effect], list[rows.Row], Path]:
    """What appending 300 rows did to the disk; after each a mark says how many are written and said to be synced."""
    path = tmp_path_factory.mktemp("appended") / "rows.jsonl"
    source = Random(1)
    made = [some_row(source, number) for number in range(300)]
    recorder = RecordingOs()
    with instead_of_os(recorder):
        appender = rows.Appender(path)
        for row in made:
            recorder.mark((appender.written, appender.synced))
            appender.append(row)
        recorder.mark((appender.written, appender.synced))
        appender.close()
        recorder.mark((appender.written, appender.synced))
    return recorder.effects, made, path


def cuts(effects: list[Effect], count: int) -> Iterator[PowerCut]:
    """So many power cuts, each after some first part of the effects."""
    for seed in range(count):
        source = Random(seed)
        yield PowerCut(effects[: source.randrange(len(effects) + 1)], source)


def accepted(path: Path) -> list[rows.Row]:
    """Every row of a file that passes, doubles included."""
    found = []
    for _, line in rows.whole_lines(path):
        try:
            found.append(rows.decode(line))
        except rows.BadRow:
            continue
    return found


@pytest.mark.parametrize("count", CUTS)
def test_a_power_cut_loses_only_rows_that_were_not_said_to_be_synced(
    count: int, appended: tuple[list[Effect], list[rows.Row], Path], found: Path
) -> None:
    """Every row said to be synced is readable, at most 64 others are lost, and no row is read that was not written."""
    effects, made, path = appended
    for cut in cuts(effects, count):
        written, synced = cut.marks[-1] if cut.marks else (0, 0)
        cut.put_into(found, path.parent)
        assert not cut.marks or path in cut.files, "the file itself is durable once the appender is there"
        read = accepted(found / path.name)
        numbers = {row["number"] for row in read}
        assert all(row == made[row["number"]] for row in read)
        assert numbers >= set(range(synced))
        assert len(set(range(written)) - numbers) <= rows.SYNC_ROWS


@pytest.mark.parametrize("count", CUTS)
def test_work_goes_on_after_a_power_cut(
    count: int, appended: tuple[list[Effect], list[rows.Row], Path], found: Path
) -> None:
    """After `repair`, the same rows are there, each key's final row is read, and a row appended next is whole."""
    effects, _, path = appended
    file = found / path.name
    for cut in cuts(effects, count // 5):
        cut.put_into(found, path.parent)
        before = accepted(file)
        rows.repair(file)
        assert accepted(file) == before
        with file.open("ab") as again:
            again.write(rows.encode({"key": "next", "error": None}))
        assert accepted(file) == [*before, {"key": "next", "error": None}]
        good = {row["key"] for row in before if row["error"] is None}
        for row in rows.read([file]):
            assert row["error"] is None or row["key"] not in good


@pytest.mark.slow
def test_without_checksums_the_same_power_cuts_give_wrong_rows(
    appended: tuple[list[Effect], list[rows.Row], Path], found: Path
) -> None:
    """The power cuts above are cruel enough: a reader that takes any line that is JSON reads rows nobody wrote."""
    effects, made, path = appended
    checksum_bytes = len(b',"crc":"00000000"}')
    bodies = {rows.encode(row)[: -checksum_bytes - 1] for row in made}
    wrong = 0
    for cut in cuts(effects, 300):
        cut.put_into(found, path.parent)
        for _, line in rows.whole_lines(found / path.name):
            try:
                wrong += "key" in json.loads(line) and line[:-checksum_bytes] not in bodies
            except (ValueError, TypeError):  # no JSON, or a bare number
                continue
    assert wrong > 0


def versions(source: Random) -> list[dict[str, Any]]:
    """Documents of very different sizes, numbered."""
    return [{"version": number, "text": "ä" * source.choice((0, 10, 3000, 9000))} for number in range(1, 31)]


def saved(path: Path, *, synced: bool) -> list[Effect]:
    """What saving all versions to `path` one after the other does to the disk; a mark is the version that is safe."""
    recorder = RecordingOs()
    with instead_of_os(recorder):
        for document in versions(Random(2)):
            durable.save_json(path, document, synced=synced)
            recorder.mark(document["version"])
    return recorder.effects


@pytest.mark.parametrize("count", CUTS)
def test_a_saved_document_is_the_old_or_the_new_one(count: int, saving: Path, found: Path) -> None:
    """After any power cut the document is the last that `save_json` returned for, or the one after it, whole."""
    documents = [None, *versions(Random(2))]
    effects = saved(saving, synced=True)
    seen = set()
    for cut in cuts(effects, count):
        cut.put_into(found, saving.parent)
        safe = cut.marks[-1] if cut.marks else 0
        document = durable.load_json(found / saving.name)
        assert document in documents[safe : safe + 2]
        seen.add(documents.index(document) - safe)
    assert seen == {0, 1}


def test_without_syncs_the_same_power_cuts_spoil_a_document(saving: Path, found: Path) -> None:
    """The power cuts above are cruel enough: documents saved without syncs are lost, old or unreadable after some."""
    effects = saved(saving, synced=False)
    fates = set()
    for cut in cuts(effects, 300):
        cut.put_into(found, saving.parent)
        try:
            document = durable.load_json(found / saving.name)
            fates.add("lost" if document is None else "old" if document["version"] < cut.marks[-1] else "new")
        except ValueError:
            fates.add("unreadable")
        except IndexError:  # cut before the first was saved
            continue
    assert fates == {"lost", "old", "new", "unreadable"}


@pytest.mark.parametrize("count", [pytest.param(20, id="quick"), pytest.param(500, id="long", marks=pytest.mark.slow)])
def test_a_repair_loses_no_byte(count: int, saving: Path, found: Path) -> None:
    """A power cut at any moment of `repair` leaves every whole row, and the torn tail in the file or beside it."""
    whole = b"".join(rows.encode(some_row(Random(number), number)) for number in range(3))
    tail = rows.encode(some_row(Random(8), 8))[:-7]
    recorder = RecordingOs()
    with instead_of_os(recorder):
        descriptor = durable.make_file(saving)
        durable.write_all(descriptor, whole + tail)
        durable.sync(descriptor)
        first = len(recorder.effects)
        assert rows.repair(saving) == len(tail)
    for end in range(first, len(recorder.effects) + 1):
        for seed in range(count):
            PowerCut(recorder.effects[:end], Random(seed)).put_into(found, saving.parent)
            content = (found / saving.name).read_bytes()
            torn = found / "run.json.torn"
            assert content == whole + tail or (content == whole and torn.read_bytes() == tail + b"\n")
    assert content == whole


def test_what_was_made_is_there(saving: Path) -> None:
    """A folder and a file that `make_folder` and `make_file` returned for are there after any power cut."""
    recorder = RecordingOs()
    with instead_of_os(recorder):
        durable.make_folder(saving.parent / "0001")
        recorder.mark("folder")
        durable.make_file(saving.parent / "0001" / "rows.jsonl")
        recorder.mark("file")
    for cut in cuts(recorder.effects, 300):
        assert "folder" not in cut.marks or saving.parent / "0001" in cut.folders
        assert "file" not in cut.marks or saving.parent / "0001" / "rows.jsonl" in cut.files

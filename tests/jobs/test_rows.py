"""Lines of rows: what is written comes back, what is damaged is noticed, and a torn or spoiled file gives the rest."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs import rows

TRICKY = [
    '"error":null',
    '"',
    "\\",
    '\\"',
    '","error":null',
    ',"crc":"00000000"}',
    "\n",
    "\x00",
    "\u2028",
    "\ud800",
    "🙂",
]
texts = st.one_of(
    st.text(st.characters()),  # lone surrogates and all
    st.lists(st.one_of(st.sampled_from(TRICKY), st.text(st.characters(), max_size=3)), max_size=6).map("".join),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
extras = st.dictionaries(texts.filter(lambda name: name not in ("crc", "key", "error")), values, max_size=5)
some_rows = st.builds(
    lambda key, error, before, after: {**before, "key": key, "error": error, **after}, texts, values, extras, extras
)


def sealed(body: bytes) -> bytes:
    """A line with the right checksum around any bytes: what only somebody else would write."""
    return b'%b,"crc":"%08x"}' % (body, zlib.crc32(body + b"}"))


def row(key: str, error: str | None = None, **fields: Any) -> rows.Row:
    return {"key": key, "error": error, **fields}


@settings(max_examples=300, deadline=None)
@given(some_rows)
@example(row("\ud83d\ude00", text="the two halves of one character"))
def test_every_row_comes_back(given_row: rows.Row) -> None:
    """Any JSON row becomes one line, and comes back as JSON itself would bring it back."""
    line = rows.encode(given_row)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert rows.decode(line) == rows.decode(line[:-1]) == json.loads(json.dumps(given_row))


@settings(max_examples=300, deadline=None)
@given(some_rows)
@example(row('a","error":null,"b":"', "failed"))
@example(row("a\\", "failed", text='"error":null'))
@example(row("a", "null"))
@example({"error": "failed", "key": "a", "text": '{"key":"b","error":null'})
def test_the_head_is_what_the_whole_row_says(given_row: rows.Row) -> None:
    """Key and goodness found without parsing are those of the parsed row, whatever its texts hold."""
    line = rows.encode(given_row)
    parsed = rows.decode(line)
    assert rows.head(line) == (parsed["key"], parsed["error"] is None)


def test_ordinary_rows_are_not_parsed_for_their_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a row with an ordinary key is found without parsing JSON: a million are scanned in seconds."""
    monkeypatch.delattr(rows.json, "loads")
    assert rows.head(rows.encode(row("gsm8k/test/11#0", completion='"quotes" and \\'))) == ("gsm8k/test/11#0", True)
    assert rows.head(rows.encode(row("für/ä#1", "out of memory"))) == ("für/ä#1", False)


@pytest.mark.parametrize(
    "bad",
    [
        row("a", score=float("nan")),
        row("a", deep=[{"x": float("-inf")}]),
        row("a", crc="mine"),
        {"key": 7, "error": None},
        {"key": None, "error": None},
    ],
    ids=repr,
)
def test_what_would_not_come_back_is_refused(bad: rows.Row) -> None:
    """NaN, infinities, keys that are not text, and a field with the checksum's name are refused when written."""
    with pytest.raises(ValueError, match=r"JSON|key is text"):
        rows.encode(bad)


@pytest.mark.parametrize("field", ["key", "error"])
def test_a_row_has_a_key_and_an_error(field: str) -> None:
    """A row without `key` or `error` is refused when written: leaving out an error must be said."""
    with pytest.raises(KeyError, match=field):
        rows.encode({name: None if name == "error" else "a" for name in ("key", "error") if name != field})


def assert_bad(line: bytes) -> None:
    """Neither reader takes the line."""
    for reader in (rows.decode, rows.head):
        with pytest.raises(rows.BadRow):
            reader(line)


@pytest.mark.parametrize("key", ["gsm8k/test/1#0", 'a "key"'])
def test_every_flipped_bit_is_noticed(key: str) -> None:
    """A line with any one bit of it flipped, its checksum's included, is no row."""
    line = rows.encode(row(key, completion="ä\\🙂", score=1.0))[:-1]
    for at in range(len(line)):
        for bit in range(8):
            assert_bad(line[:at] + bytes([line[at] ^ 1 << bit]) + line[at + 1 :])


def test_every_changed_byte_is_noticed() -> None:
    """A long line with any one byte made another, or lost, or doubled, is no row (5,000 samples of each)."""
    source = Random(1)
    line = rows.encode(row("gsm8k/test/1#0", completion="".join(map(chr, range(32, 3000))), score=1.0))[:-1]
    for _ in range(5000):
        at = source.randrange(len(line))
        other = source.choice([byte for byte in (0, 10, 34, source.randrange(256)) if byte != line[at]])
        assert_bad(line[:at] + bytes([other]) + line[at + 1 :])
        assert_bad(line[:at] + line[at + 1 :])
        assert_bad(line[:at] + line[at : at + 1] + line[at:])


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"}",
        b'{"key":"a","error":null}',
        b'{"key":"a","error":null,"crc":"0000000"}',
        b"\x00" * 100,
        sealed(b'{"key":"\xff","error":null'),
        sealed(b'{"key":"\xed\xa0\x80","error":null'),
        sealed(b'{"key":"a","error":null,"text":"\xff"')[:-1],
        sealed(b'{"error":null,"text":"\xff"'),
        sealed(b'{"error":null,"deep":' + b"[" * 100_000),
        sealed(b'{"error":null,"number":' + b"1" * 10_000),
        sealed(b'["key"'),
        sealed(b'{"error":null,"key":7'),
        sealed(b'{"error":null'),
        sealed(b'\xef\xbb\xbf{"key":"a","error":null'),
    ],
    ids=lambda line: repr(line[:40]),
)
def test_no_line_is_fatal(line: bytes) -> None:
    """Whatever stands in a line, even with a right checksum, is a row or is counted as damaged."""
    assert_bad(line)


def test_a_file_cut_anywhere_gives_the_rows_before_the_cut(tmp_path: Path) -> None:
    """Cut at every byte: readers give exactly the whole rows, repair sets the tail aside, and appending goes on."""
    made = [row("a", completion="ä🙂"), row("b", "failed\n"), row('"c"'), row("b")]
    lines = [rows.encode(each) for each in made]
    content = b"".join(lines)
    path, torn = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.torn"
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        end = sum(map(len, lines[:whole]))
        found = rows.index(path)
        assert (list(found.keys), found.corrupt, found.end) == (["a", "b", '"c"'][:whole], 0, end)
        expected = [each for each in made[:whole] if not (whole == 4 and each["error"])]
        assert list(rows.read([path])) == expected
        assert [line + b"\n" for _, line in rows.whole_lines(path)] == lines[:whole]

        assert rows.repair(path) == cut - end
        assert path.read_bytes() == content[:end]
        assert (torn.read_bytes() if torn.exists() else b"") == (content[end:cut] + b"\n" if cut > end else b"")
        assert rows.repair(path) == 0
        torn.unlink(missing_ok=True)
        with path.open("ab") as file:
            file.write(content[end:])
        assert path.read_bytes() == content


def test_repair_sets_every_torn_tail_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torn tails of several repairs stand one after the other, whole files that are one torn line included."""
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 3)
    path = tmp_path / "rows.jsonl"
    assert rows.repair(path) == 0
    assert not path.exists()
    for tail in (b"first torn tail", b"\xf0\x9f\x99"):
        path.write_bytes(tail)
        assert rows.repair(path) == len(tail)
        assert path.read_bytes() == b""
    assert (tmp_path / "rows.jsonl.torn").read_bytes() == b"first torn tail\n\xf0\x9f\x99\n"


def test_damage_in_the_middle_costs_only_what_it_hit(tmp_path: Path) -> None:
    """Damaged lines are passed over and counted; a lost newline costs the two rows beside it; all others are read."""
    lines = [rows.encode(row(key, completion="x" * 50)) for key in "abcdefgh"]
    lines[1] = lines[1].replace(b"x", b"y", 1)
    lines[3] = b"\x00" * 40 + b"\n"
    lines[5] = lines[5][:-1]  # and so g stands on the same line
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(lines))
    found = rows.index(path)
    assert list(found.keys) == ["a", "c", "e", "h"]
    assert (found.corrupt, found.good, found.end) == (3, 4, path.stat().st_size)
    assert [each["key"] for each in rows.read([path])] == ["a", "c", "e", "h"]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=12)), st.integers(1, 30))
def test_lines_do_not_depend_on_how_the_file_is_read(pieces: list[bytes], chunk_bytes: int) -> None:
    """Whatever the size of a read, the same whole lines come with the same offsets, from any line on."""
    content = b"\n".join(pieces)
    with TemporaryDirectory() as folder, mock.patch.object(rows, "_CHUNK_BYTES", chunk_bytes):
        path = Path(folder, "rows.jsonl")
        path.write_bytes(content)
        found = list(rows.whole_lines(path))
        assert [line for _, line in found] == content.split(b"\n")[:-1]
        for at, (offset, line) in enumerate(found):
            assert content[offset : offset + len(line) + 1] == line + b"\n"
            assert list(rows.whole_lines(path, offset)) == found[at:]


some_files = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=6), min_size=1, max_size=4
)
"""Files of rows; of each row its key, whether it is good, and whether its line is damaged."""


def write_files(folder: Path, files: list[list[tuple[str, bool, bool]]]) -> list[rows.Row]:
    """Write them, numbering their rows; returns the rows that can be read, in order."""
    readable = []
    numbers = itertools.count()
    for at, file in enumerate(files):
        with (folder / f"{at}.jsonl").open("wb") as out:
            for key, good, damaged in file:
                made = row(key, None if good else "failed", number=next(numbers))
                line = rows.encode(made)
                out.write(line[:-9] + b"!" + line[-8:] if damaged else line)
                readable += [] if damaged else [made]
    return readable


@settings(deadline=None)
@given(some_files)
def test_a_keys_final_row_is_its_first_good_one_else_its_first(files: list[list[tuple[str, bool, bool]]]) -> None:
    """Over several files with errors, repeats and damage, `read` gives what a plain search of all rows gives."""
    with TemporaryDirectory() as folder:
        readable = write_files(Path(folder), files)
        paths = [Path(folder, "absent.jsonl"), *(Path(folder, f"{at}.jsonl") for at in range(len(files)))]
        expected = []
        for key in "abc":
            of_key = [each for each in readable if each["key"] == key]
            expected += ([each for each in of_key if each["error"] is None] or of_key)[:1]
        assert list(rows.read(paths)) == sorted(expected, key=lambda each: each["number"])
        merged = rows.Index()
        for path in paths:
            rows.index(path, merged)
        assert merged.keys == {each["key"]: each["error"] is None for each in expected}
        assert merged.corrupt == sum(damaged for file in files for *_, damaged in file)


def test_an_index_knows_what_is_still_wanted() -> None:
    """A key's first row is wanted, then only a good one after an error, then nothing more."""
    known = rows.Index({"good": True, "failed": False})
    assert [known.wants(key, True) for key in ("new", "failed", "good")] == [True, True, False]
    assert [known.wants(key, False) for key in ("new", "failed", "good")] == [True, False, False]
    assert known.good == 1

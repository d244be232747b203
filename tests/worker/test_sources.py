"""Datasets from files in every form, from generated problems and from the Hub, and the words for all that is wrong."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from worker import sources
from worker.failures import BadRecord, ConfigFailure
from worker.sources import Source

ROOT = Path(__file__).parents[2]
ROWS = [{"question": "Zwölf\u2028?", "answer": "#### 12", "tags": ["a"]}, {"question": "Q", "answer": "#### 1"}]
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def parquet_file(path: Path) -> None:
    parquet.write_table(
        pa.Table.from_pylist(
            ROWS,
            schema=pa.schema([("answer", pa.string()), ("question", pa.string()), ("tags", pa.list_(pa.string()))]),
        ),
        path,
    )


FORMS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.JSONL": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n").rstrip()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "b.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.parquet": parquet_file,
}


def refused(dataset: object) -> ConfigFailure:
    """The failure with which a dataset is refused."""
    with pytest.raises(ConfigFailure) as failed:
        sources.load(Source(str(dataset)))
    return failed.value


@pytest.mark.parametrize("name", FORMS)
def test_the_same_rows_come_out_of_every_form(name: str, tmp_path: Path) -> None:
    """Whatever form a file has, its rows and their digest are the same; a null field counts as absent."""
    FORMS["a.jsonl"](tmp_path / "plain.jsonl")
    FORMS[name](tmp_path / name)
    found = sources.load(Source(str(tmp_path / name)))
    assert found.digest == sources.load(Source(str(tmp_path / "plain.jsonl"))).digest
    assert [{key: value for key, value in row.items() if value is not None} for row in found.rows] == ROWS
    assert found.name == str(tmp_path / name)


@given(st.permutations(range(3)), st.integers(0, 2))
def test_the_digest_tells_rows_and_order_apart(order: list[int], changed: int) -> None:
    """Another order or another value is another digest; another order of a row's fields is not."""
    rows = [{"n": number, "text": "x"} for number in range(3)]
    digest = sources._records(rows, "rows").digest
    assert (sources._records([rows[place] for place in order], "rows").digest == digest) == (order == [0, 1, 2])
    assert sources._records([dict(reversed(row.items())) for row in rows], "rows").digest == digest
    other = [{**row, "text": "y"} if row["n"] == changed else row for row in rows]
    assert sources._records(other, "rows").digest != digest


BAD = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "is empty"),
    "none.json": (b"[]", "has no rows"),
    "word.jsonl": (b'{"a": 1}\n\n{"a": }\n', "word.jsonl, line 3: not JSON"),
    "torn.jsonl": (b'{"a": 1}\n{"a": "b', "line 2: not JSON"),
    "list.jsonl": (b'{"a": 1}\n[1]\n', "line 2: a list, not an object"),
    "number.json": (b'[{"a": 1}, 7]', "row 2: a number, not an object"),
    "null.json": (b'[{"a": 1}, null]', "row 2: null, not an object"),
    "object.json": (b'{"a": 1}', "no list"),
    "lists.json": (b'{"a": [], "b": []}', "2 lists"),
    "half.json": (b'[{"a": 1}', "not JSON"),
    "deep.json": (b"[" * 100_000, "not JSON"),
    "latin.jsonl": ('{"a": 1}\n{"a": "é"}\n'.encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
    "latin.json": ('[{"a":\n"é"}]'.encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
    "wide.jsonl": ('{"a": 1}\n'.encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "surrogate.jsonl": (b'{"a": 1}\n{"a": "\\ud800"}\n', "row 2: half of a surrogate pair"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-20], "cannot be unzipped"),
    "garbled.jsonl.gz": (gzip.compress(LINES)[:12] + b"\xff" * 40, "cannot be unzipped"),
    "plain.json.gz": (b"[]", "cannot be unzipped"),
    "table.tsv": (b"a\tb\n", "suffix"),
    "ragged.csv": (b"a,b\n1,2\n1,2,3\n", "row 2: 3 columns, not 2"),
    "empty.csv": (b"a,b\n", "has no rows"),
    "no.parquet": (b"PAR1 not really", "cannot be read as Parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name_and_place(name: str, tmp_path: Path) -> None:
    """Whatever is wrong with a file, one paragraph names the file, the place in it and what is wrong."""
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    failure = refused(tmp_path / name)
    assert words in failure.message
    assert name in failure.message
    assert "\n" not in failure.message + failure.hint


def test_the_hint_says_how_to_convert(tmp_path: Path) -> None:
    """A file in another encoding is refused with the command that converts it, by line and byte as a BadRecord."""
    (tmp_path / "a.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    (tmp_path / "b.jsonl").write_bytes('{"a": 1}'.encode("utf-16"))
    assert isinstance(refused(tmp_path / "a.jsonl"), BadRecord)
    assert "iconv -f LATIN1 -t UTF-8" in refused(tmp_path / "a.jsonl").hint
    assert "iconv -f UTF-16 -t UTF-8" in refused(tmp_path / "b.jsonl").hint


def test_a_file_of_the_other_json_form_is_recognised(tmp_path: Path) -> None:
    """JSON lines named .json and a JSON list named .jsonl are refused with the suffix they should have."""
    (tmp_path / "a.json").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS, indent=1))
    assert "name it .jsonl" in refused(tmp_path / "a.json").hint
    assert "name it .json." in refused(tmp_path / "b.jsonl").hint


def test_a_missing_path_and_a_folder_are_refused(tmp_path: Path) -> None:
    """A path that is not there is named; of a folder, the files that could be meant are named."""
    (tmp_path / "test.jsonl").write_bytes(LINES)
    assert "does not exist" in refused(tmp_path / "typo.jsonl").message
    assert "does not exist" in refused("typo.jsonl").message
    assert "is a folder" in refused(tmp_path).message
    assert "test.jsonl" in refused(tmp_path).hint


def test_what_json_lacks_is_read_from_parquet_or_refused(tmp_path: Path) -> None:
    """Dates, decimals and bytes in Parquet have a stable digest; what has no text is refused by its row."""
    column = pa.array([b"\x00", None], pa.binary())
    parquet.write_table(pa.table({"raw": column, "day": pa.array([1, 2], pa.date32())}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"raw": "b\'\\\\x00\'", "day": "1970-01-02"}\n{"day": "1970-01-03"}\n')
    digests = {sources.load(Source(str(tmp_path / name))).digest for name in ("a.parquet", "a.jsonl")}
    assert len(digests) == 1
    with pytest.raises(BadRecord, match="images, row 2: a field holds a object"):
        sources._records([{"a": 1}, {"a": object()}], "images")


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path) -> None:
    """In a Python without pyarrow, a Parquet file is refused with words, and JSON lines are still read."""
    parquet_file(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from worker import failures, sources\n"
        "print(len(sources.load(sources.Source(sys.argv[3])).rows))\n"
        "try: sources.load(sources.Source(sys.argv[2]))\n"
        "except failures.ConfigFailure as failed: print(failed.message, failed.hint)\n"
    )
    words = [sys.executable, "-I", "-S", "-c", program, ROOT, tmp_path / "a.parquet", tmp_path / "a.jsonl"]
    said = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("2\n")
    assert "pyarrow" in said


def test_generated_problems_are_a_source() -> None:
    """`generated` needs no file: its rows have what a task asks for, and its splits differ."""
    test, train = (sources.load(Source(sources.GENERATED, split)) for split in ("test", "train"))
    assert {"question", "answer"} <= set(test.rows[0])
    assert test.digest != train.digest


@pytest.mark.parametrize(
    ("dataset", "path"),
    [
        *(("openai/gsm8k", False), ("gsm8k", False), ("org/data-v1.5", False)),
        *(("data.jsonl", True), ("data/test.json", True), ("./data", True), ("~/data", True), ("a/b/c", True)),
        *((r"data\test", True), ("test.csv", True), ("org/", True), ("/tmp", True)),
    ],
)
def test_a_path_is_told_from_a_hub_name(dataset: str, path: bool) -> None:
    """A name with one slash and no file suffix is the Hub's unless it exists here; all else is a path."""
    assert sources.is_path(dataset) is path


# --- the Hub, played on loopback -------------------------------------------------------------------------------------

README = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test.jsonl\n---\n"
FILES = {"README.md": README, "main/test.jsonl": LINES}
LOAD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from worker import failures, sources
dataset, split, revision = json.loads(sys.argv[2])
try:
    found = sources.load(sources.Source(dataset, split, revision))
    print(json.dumps([found.rows, found.digest]))
except failures.ConfigFailure as failed:
    print(json.dumps({"message": failed.message, "hint": failed.hint}))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Plays the Hub for one public dataset at one commit, one that is gated, and none else."""

    def do_GET(self) -> None:
        """Answer as the Hub does for metadata, listings and files."""
        repository, _, rest = self.path.removeprefix("/api").partition("?")[0].removeprefix("/datasets/").partition("/")
        name, _, rest = rest.partition("/")
        revision = sources.HUB_PINS["openai/gsm8k"][1]
        if (repository, name) == ("org", "gated"):
            self.answer(403, b"{}", "GatedRepo")
        elif (repository, name) != ("openai", "gsm8k"):
            self.answer(404, b"{}", "RepoNotFound")
        elif revision not in rest:
            self.answer(404, b"{}", "RevisionNotFound")
        elif rest.startswith("resolve/"):
            content = FILES.get(rest.partition(revision + "/")[2])
            self.answer(*((404, b"{}", "EntryNotFound") if content is None else (200, content, "")))
        elif rest.startswith("tree/"):
            folder = rest.partition(revision)[2].strip("/")
            inside = [(path, content) for path, content in FILES.items() if path.startswith(folder)]
            self.answer(200, json.dumps([{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in inside]))
        else:
            files = [{"rfilename": path} for path in FILES]
            self.answer(200, json.dumps({"id": "openai/gsm8k", "sha": revision, "siblings": files}))

    do_HEAD = do_GET  # noqa: N815 — the server looks the method up by this name

    def answer(self, status: int, body: bytes | str, code: str = "") -> None:
        """Send a body with the headers the Hub's clients look at."""
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", sources.HUB_PINS["openai/gsm8k"][1])
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Where the played Hub listens."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(endpoint: str, home: Path, asked: tuple[str, str, str | None], offline: str = "0") -> Any:
    """What loading from the Hub gives in a fresh process: rows and digest, or the words of the failure."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline}
    words = [sys.executable, "-c", LOAD, str(ROOT), json.dumps(asked)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


def test_gsm8k_comes_from_the_hub_at_its_pinned_commit(hub: str, tmp_path: Path) -> None:
    """openai/gsm8k is read in its `main` configuration at the pinned commit; its digest is that of the same file."""
    (tmp_path / "same.jsonl").write_bytes(LINES)
    rows, digest = ask(hub, tmp_path / "home", ("openai/gsm8k", "test", None))
    assert [row["question"] for row in rows] == [row["question"] for row in ROWS]
    assert digest == sources.load(Source(str(tmp_path / "same.jsonl"))).digest


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("org/gated", "test", None), ("org/gated is gated", "HF_TOKEN")),
        (("org/typo", "test", None), ("org/typo was not found", "HF_TOKEN")),
        (("openai/gsm8k", "tset", None), ("tset", "Check the name")),
        (("openai/gsm8k", "test", "0000000"), ("no revision '0000000'", "revision")),
    ],
    ids=["gated", "not found", "no such split", "no such revision"],
)
def test_what_the_hub_refuses_is_said_in_our_words(
    hub: str, tmp_path: Path, asked: tuple[str, str, str | None], words: tuple[str, str]
) -> None:
    """Each refusal of the Hub becomes one paragraph that names the dataset, and a hint."""
    failure = ask(hub, tmp_path, asked)
    assert words[0] in failure["message"]
    assert words[1] in failure["hint"]


def test_offline_is_said(tmp_path: Path) -> None:
    """With the Hub forbidden by HF_HUB_OFFLINE, a Hub name is refused at once, saying so."""
    failure = ask("http://127.0.0.1:9", tmp_path, ("openai/gsm8k", "test", None), offline="1")
    assert "HF_HUB_OFFLINE" in failure["message"]
    assert "generated" in failure["hint"]


def test_a_folder_of_a_split_is_its_files_each_with_its_subject(tmp_path: Path) -> None:
    """Every file of the folder of a split is read, by name; a row without a subject has that of its file."""
    for split in ("test", "dev"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"b_{split}.csv").write_text('question,n\n"Which,\nof two?",1\n', encoding="utf-8")
        (tmp_path / split / f"a_{split}.csv").write_text("subject,question\nown,What?\n", encoding="utf-8")
    found = sources.load(Source(str(tmp_path), "dev")).rows
    assert found == [
        {"subject": "own", "question": "What?"},
        {"subject": "b", "question": "Which,\nof two?", "n": "1"},
    ]
    with pytest.raises(ConfigFailure, match="has no folder of the split"):
        sources.load(Source(str(tmp_path), "train"))


def test_a_table_without_header_is_named_by_its_task(tmp_path: Path) -> None:
    """Where the first line of a .csv file holds none of the names given for its columns, it is a row."""
    path = tmp_path / "law_test.csv"
    path.write_text("What?,1\nWhich?,2\n", encoding="utf-8")
    found = sources.load(Source(str(path), columns=("question", "answer"))).rows
    assert found[0] == {"subject": "law", "question": "What?", "answer": "1"}
    assert len(found) == 2


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    """A .txt file is one row, whatever lines it has."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert sources.load(Source(str(tmp_path / "a.txt"))).rows == [{"text": "one\n\ntwo\n"}]

"""What a machine takes from home: never under a running run, never over what it has, never through a link."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, locks, rundir
from worker import intake
from worker.intake import Intake


@pytest.fixture
def run(tmp_path: Path) -> rundir.Run:
    """A run whose project is on the machine, and which is not running there."""
    made = rundir.Run(tmp_path / "run")
    durable.have_folder(made.work / "in" / "here")
    return made


def frame(name: str, data: bytes, **more: Any) -> bytes:
    header = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **more}
    return json.dumps(header).encode() + b"\n" + data


def take(run: rundir.Run, *frames: bytes) -> dict[str, Any]:
    return Intake(run, io.BytesIO(b"".join(frames))).take()


def files(run: rundir.Run) -> dict[str, bytes]:
    """Every file of the run but its locks."""
    found = (path for path in run.folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(run.folder).as_posix(): path.read_bytes() for path in found}


def test_rows_are_renewed_and_all_else_is_kept(run: rundir.Run) -> None:
    """A run that comes back to a machine gets the newer rows from home; what was resolved there, and weights, stay."""
    first = [
        frame("home.jsonl", b"1\n"), frame("home-selections.jsonl", b"a\n"), frame("resolved.json", b"{}"),
        frame("model/weights", b"w"), frame("model/MANIFEST.json", b"m"),
    ]  # fmt: skip
    names = ["home.jsonl", "home-selections.jsonl", "resolved.json", "model/weights", "model/MANIFEST.json"]
    assert take(run, *first) == {"put": names}
    begun = files(run)
    durable.save_json(run.current, {"attempt": 3})
    second = [frame("home.jsonl", b"1\n2\n"), frame("resolved.json", b"[]"), frame("model/weights", b"other")]
    assert take(run, *second) == {"put": ["home.jsonl"], "left": ["resolved.json", "model/weights"]}
    assert files(run) == begun | {"home.jsonl": b"1\n2\n", "current.json": run.current.read_bytes()}


def test_weights_without_a_manifest_are_none(run: rundir.Run) -> None:
    """A folder of weights that a cut left without its manifest is taken anew."""
    assert take(run, frame("model/weights", b"half"))["put"] == ["model/weights"]
    assert take(run, frame("model/weights", b"whole"), frame("model/MANIFEST.json", b"m"))["put"]
    assert (run.folder / "model" / "weights").read_bytes() == b"whole"


def test_a_running_run_takes_nothing(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the run goes on nothing is taken, also when it began after the bytes had come."""
    take(run, frame("home.jsonl", b"1\n"))
    before = files(run)
    with locks.held(run.run_lock, 0):
        assert take(run, frame("home.jsonl", b"2\n"), frame("out/a", b"a")) == {"put": []}
        answers = iter([False, True])
        monkeypatch.setattr(Intake, "_is_running", lambda _: next(answers))
        assert take(run, frame("home.jsonl", b"2\n"), frame("out/a", b"a")) == {"put": []}
    assert files(run) == before


def test_a_start_under_way_is_waited_for(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the run is going on is asked under the lock that every start holds."""
    monkeypatch.setattr(intake, "_LOCK_WAIT_S", 0.1)
    with locks.held(run.start_lock, 0), pytest.raises(TimeoutError):
        take(run, frame("home.jsonl", b"1\n"))
    assert files(run) == {}


def test_outs_are_put_where_the_command_runs_unless_something_is_there(run: rundir.Run) -> None:
    """What a command made elsewhere is put into its folder here; what it or the project has there already stays."""
    (run.work / "in" / "here" / "have.txt").write_bytes(b"the machine's")
    (run.work / "in" / "here" / "link").symlink_to("nowhere")
    (run.work / "in" / "here" / "file").write_bytes(b"a file")
    more = {"folder": "in/here"}
    answer = take(
        run, frame("out/x/log.jsonl", b"1\n", **more), frame("out/have.txt", b"home's", **more),
        frame("out/link", b"l", **more), frame("out/file/inner", b"i", **more),
    )  # fmt: skip
    assert answer == {"put": ["out/x/log.jsonl"], "left": ["out/have.txt", "out/link", "out/file/inner"]}
    found = files(run)
    assert found == {
        "work/in/here/x/log.jsonl": b"1\n", "work/in/here/have.txt": b"the machine's", "work/in/here/file": b"a file",
    }  # fmt: skip
    assert take(run, frame("out/x/log.jsonl", b"1\n2\n", **more)) == {"put": [], "left": ["out/x/log.jsonl"]}


@pytest.mark.parametrize("level", ["work/in", "work/in/here", "work/in/here/x", "model"])
def test_nothing_is_put_behind_a_link(run: rundir.Run, tmp_path: Path, level: str) -> None:
    """A link in the way, wherever it leads, keeps a file from being put, and what it leads to stays as it is."""
    target = tmp_path / "elsewhere"
    target.mkdir()
    if (run.folder / level).exists():
        (run.folder / level).rename(tmp_path / "before")
    (run.folder / level).symlink_to(target)
    name = "model/weights" if level == "model" else "out/x/a"
    assert take(run, frame(name, b"x", folder="in/here")) == {"put": [], "left": [name]}
    assert list(target.iterdir()) == []


def test_outs_need_the_project(tmp_path: Path) -> None:
    """Before its project is on the machine, or with a folder that leads out of it, a run takes no outs."""
    run = rundir.Run(tmp_path / "run")
    assert take(run, frame("out/a", b"x")) == {"error": "unstaged", "name": "out/a"}
    run.work.mkdir()
    assert take(run, frame("out/a", b"x", folder="../..")) == {"error": "unstaged", "name": "out/a"}
    assert take(run, frame("out/a", b"x", folder="")) == {"put": ["out/a"]}


@pytest.mark.parametrize(
    "name", ["out/../x", "out/", "out", "out//a", "out/a\n", "/out/a", "work/a", "x/out/a", "model/../x", "rows.jsonl"]
)
def test_other_names_are_refused(run: rundir.Run, name: str) -> None:
    """A name that is none of those a start needs is refused before its bytes are written anywhere."""
    assert take(run, frame(name, b"x", folder="in/here")) == {"error": "refused", "name": name}
    assert files(run) == {}


@pytest.mark.parametrize("cut", [1, 4, 5])
def test_bytes_that_are_cut_or_wrong_are_not_taken(run: rundir.Run, cut: int) -> None:
    """Of a file that does not arrive whole, or has another digest, nothing is left; those before it are taken."""
    second = frame("resolved.json", b"12345")
    spoilt = second[:-cut] if cut < 5 else second[:-5] + b"54321"
    assert take(run, frame("home.jsonl", b"1\n"), spoilt) == {"error": "torn", "name": "resolved.json"}
    assert files(run) == {"home.jsonl": b"1\n"}
    assert [path for path in run.folder.iterdir() if path.name.startswith(".put")] == []


def test_large_files_are_not_held_in_memory(run: rundir.Run) -> None:
    """A file of any size goes from the connection to the disk through a small buffer."""
    size = 32 << 20
    digest = hashlib.sha256(bytes(size)).hexdigest()
    header = json.dumps({"name": "out/a", "bytes": size, "sha256": digest}).encode() + b"\n"
    with (run.folder / "source").open("w+b") as source:
        source.write(header)
        source.truncate(len(header) + size)
        source.seek(0)
        tracemalloc.start()
        assert Intake(run, source).take() == {"put": ["out/a"]}
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 6 << 20
    assert (run.work / "a").stat().st_size == size

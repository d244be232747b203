"""What is copied from an outbid machine's disk, which of it is believed, and that it is taken in once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rows, rundir
from orchestrator import cleaning, rentals, rescue
from orchestrator.home import Arrivals
from orchestrator.providers.base import Need
from orchestrator.rentals import Caps, Terms
from orchestrator.runs import Run
from tests.faults.disk import FullOs, instead_of_os
from worker import outs

Make = Callable[..., Run]
FILES = ("a.txt", "b.jsonl", ".hidden", "x/a.txt", "x/y/a.txt", "x/y/b.jsonl", "x/y/z/c.txt", "xx/a.txt", "[1]/a.txt")
FILES += ("back\\slash", "dir.jsonl/a.txt", "no/b.jsonl")
PATTERNS = ("*.txt", "*", "**/*.jsonl", "x/**", "x/**/c.txt", "x/*/a.txt", "x*/a.txt", "./x//y/b.jsonl", "x/y", "x/*/")
PATTERNS += ("[[]1]/*", "?.txt", "[!a].jsonl", "none/*", "", ".", "x/y/b.jsonl/", "**/**/z/*", "**", "/etc/*", "../*")
PATTERNS += ("dir.jsonl", "x**", "back\\slash", "back\\*")


@pytest.mark.parametrize("folder", ["", "in/[he]*re"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_files_copied_are_those_that_would_have_come(tmp_path: Path, pattern: str, folder: str) -> None:
    """rsync's rules let the same files through as the machine itself sends, each in one of the two copies."""
    run, target = rundir.Run(tmp_path / "run"), tmp_path / "copy"
    for name in FILES:
        path = run.work / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    durable.save_json(run.job, {"out": [pattern], "folder": folder})
    durable.make_folder(target)
    growing, whole = rescue._rules({"out": [pattern], "folder": folder})
    found = []
    for rules in (growing, whole):
        words = ["rsync", "-rm", "--out-format=%n", *(f"--filter={rule}" for rule in rules)]
        told = subprocess.run([*words, f"{run.folder}/", f"{target}/"], check=True, capture_output=True, text=True)
        assert told.stderr == ""
        found.append({path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()})
    names = outs.Outs(run).find(lambda *_: None)
    base = f"work/{folder}".rstrip("/")
    assert found[1] == {f"{base}/{name.partition('/')[2]}" for name in names}
    assert found[0] == {name for name in found[1] if name.endswith(".jsonl")}


def row(index: int) -> bytes:
    return rows.encode({"key": f"t/s/{index}#0", "error": None})


@pytest.fixture
def run(counting_run: Make) -> Run:
    return counting_run()


def rescued(run: Run, files: dict[str, bytes], why: str = "") -> Path:
    """What was copied of a run from the machine `box`."""
    folder = rescue._folder("box", run.run_id)
    for name, data in files.items():
        path = folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    durable.save_json(folder / "outcome.json", {"why": why})
    return folder


def taken(run: Run) -> tuple[dict[str, Any] | None, str]:
    """How the run stood there, and what is said."""
    said: list[str] = []
    arrivals = Arrivals.open(run.home, "box")
    assert arrivals is not None
    with arrivals:
        end = rescue.take_in(run, arrivals, said.append)
    return end, " ".join(said)


def keys(run: Run) -> list[str]:
    return list(rows.index(run.home.rows).keys)


ROWS = "attempts/0001/rows.jsonl"


def test_rows_are_taken_in_once(run: Run) -> None:
    """Good rows are merged, a torn or damaged one is not; said in a line; a second time there is nothing."""
    damaged = row(2).replace(b"null", b"nulI")
    folder = rescued(run, {ROWS: row(0) + row(1) + damaged + row(3) + row(4)[:-9]})
    assert taken(run)[1] == "rescued 3 rows from box before it was given back"
    assert keys(run) == ["t/s/0#0", "t/s/1#0", "t/s/3#0"]
    assert not folder.exists()
    assert taken(run) == (None, "")


def test_what_is_home_stays(run: Run) -> None:
    """A file that does not begin with what is home adds nothing; one that does adds what is new."""
    rescued(run, {ROWS: row(0) + row(1)})
    taken(run)
    before = run.home.rows.read_bytes()
    for other in (row(7) * 9, b"x" * 5000, row(0), b""):
        rescued(run, {ROWS: other}, "cut off.")
        assert taken(run)[1].startswith("box could not be copied from: cut off.")
        assert run.home.rows.read_bytes() == before
    rescued(run, {ROWS: row(0) + row(1) + row(2)}, "cut off.")
    assert taken(run)[1] == "rescued 1 rows from box before it was given back; the rest could not be copied: cut off."


def test_a_host_that_lies_harms_nothing(run: Run, tmp_path: Path) -> None:
    """Links, names that are none of a run's, and documents that are none do not come home."""
    secret = tmp_path / "secret"
    secret.write_bytes(row(9))
    folder = rescued(
        run,
        {
            "run.json": b"{}",
            "job.json": b"{}",
            "attempts/0001/exit.json": b'{"reason": 7}',
            "attempts/0001/env.json": b"[1]",
            "attempts/0001/failure.json": b"\xff",
            "resolved.json": b"[" * 100_000,
            "elsewhere/x": b"x",
        },
    )
    (folder / "files" / ROWS).symlink_to(secret)
    (folder / "files" / "work").symlink_to(tmp_path)
    before = {path: path.read_bytes() for path in run.home.folder.rglob("*") if path.is_file() and path.suffix}
    end, said = taken(run)
    assert end is not None
    assert end["state"] == "none"
    assert said == "nothing that was not home was found on box before it was given back"
    assert {path: path.read_bytes() for path in run.home.folder.rglob("*") if path.is_file() and path.suffix} == before


def test_a_run_that_had_ended_there_is_known_to_have(run: Run) -> None:
    """With its seal a run is as it was there; the copy says so in the form of a pull's last frame."""
    seal = {"attempt": 1, "code": 0, "signal": None, "reason": "done", "kind": "", "message": "", "hint": ""}
    seal |= {"restarting": False, "files": {}, "ended_at": "2026-01-01T00:00:00.000Z"}
    rescued(run, {ROWS: row(0), "attempts/0001/exit.json": json.dumps(seal).encode()})
    end, _ = taken(run)
    assert end is not None
    assert (end["state"], end["attempt"]) == ("ended", 1)


def test_on_a_full_disk_it_waits(run: Run) -> None:
    """What cannot be taken in for want of room stays where it is, and is taken in at the next look."""
    rescued(run, {ROWS: row(0)})
    disk = FullOs()
    with instead_of_os(disk):
        arrivals = Arrivals.open(run.home, "box")
        assert arrivals is not None
        said: list[str] = []
        with arrivals:
            disk.is_full = True
            assert rescue.take_in(run, arrivals, said.append) is None
    assert "the disk is full" in said[0]
    rental = rentals.create("box", "vast", Terms(Need(), Caps(), "container"), state="gone")
    assert cleaning.look().machines == []
    assert rescue.is_waiting("box", run.run_id)
    assert taken(run)[1].startswith("rescued 1 rows")
    assert not rescue.is_waiting("box", run.run_id)
    assert cleaning.look().machines == [rental.name]

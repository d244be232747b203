"""What a command made as its user sees it: one folder for all machines, in which nothing that grew is ever lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import durable
from orchestrator import outs
from orchestrator.errors import ConfigError
from tests.orchestrator import carrying
from tests.orchestrator.carrying import LARGE, Side, found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small pieces, and nobody hangs up."""
    with carrying.small(monkeypatch):
        yield


@pytest.fixture
def side(tmp_path: Path) -> Side:
    return Side(tmp_path)


def test_a_rewritten_growing_file_is_kept_beside_the_new_one(side: Side) -> None:
    """A growing file that is no continuation of what is home is sent anew; copy and view of before are kept."""
    side.make("log.jsonl", b"one\ntwo\n")
    side.carry()
    side.make("log.jsonl", b"other\n")
    side.carry()
    assert side.copies() == {"log.jsonl": b"other\n"}
    assert side.view() == {"log.jsonl": b"other\n", "log.jsonl.from-first": b"one\ntwo\n"}
    assert found(side.home.machine("first").folder / ".aside") == {"log.jsonl.diverged-1": b"one\ntwo\n"}
    side.make("log.jsonl", b"third\n")
    side.carry()
    assert side.view()["log.jsonl.from-first-1"] == b"other\n"


def test_the_newest_version_of_a_whole_file_is_the_one_at_home(side: Side) -> None:
    """A file that changes is replaced, at home and in the view, by its newer version, whichever size both have."""
    for data in (b"small", LARGE, LARGE[::-1], b"small again"):
        side.make("best.pt", data)
        side.carry()
        assert side.view() == side.copies() == {"best.pt": data}
    assert [path.name for path in side.home.out.iterdir()] == ["best.pt"]


@pytest.mark.parametrize("level", ["out", "out/x", "out/x/a.txt", "out/x/log.jsonl"])
@pytest.mark.parametrize("where", ["view", "copy"])
def test_nothing_is_written_through_a_link(side: Side, tmp_path: Path, level: str, where: str) -> None:
    """A link at home in the place of a file or folder that is to be written is refused, and what it leads to stays."""
    base = side.home.folder if where == "view" else side.home.machine("first").folder
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "file").write_text("untouched", encoding="utf-8")
    (base / level).parent.mkdir(parents=True, exist_ok=True)
    (base / level).symlink_to(target / "file" if "." in level else target)
    side.make("x/a.txt", b"new")
    side.make("x/log.jsonl", b"{}\n")
    with pytest.raises(ConfigError, match="is a link"):
        side.carry()
    assert found(target) == {"file": b"untouched"}
    (base / level).unlink()
    side.carry()
    assert side.view() == {"x/a.txt": b"new", "x/log.jsonl": b"{}\n"}


def test_a_file_that_becomes_a_folder_is_kept(side: Side) -> None:
    """Where a file was and a folder is now, or the other way round, what came before is kept under another name."""
    side.make("x", b"a file")
    side.make("y/inner", b"in a folder")
    side.carry()
    (side.run.work / "x").unlink()
    (side.run.work / "y" / "inner").unlink()
    (side.run.work / "y").rmdir()
    side.make("x/inner", b"1")
    side.make("y", b"2")
    side.seal()
    side.carry()
    assert side.copies() == {"x/inner": b"1", "y": b"2"}
    assert side.view() == {
        "x/inner": b"1",
        "y": b"2",
        "x.was-a-file": b"a file",
        "y.was-a-folder/inner": b"in a folder",
    }
    assert side.is_complete()


@pytest.mark.parametrize("harm", ["gone", "shorter", "older"])
def test_a_view_that_a_crash_left_behind_is_mended(side: Side, harm: str) -> None:
    """What was safe in the copy but not yet shown when the command died is shown by the next one."""
    side.make("log.jsonl", b"one\ntwo\n")
    side.make("best.pt", b"old")
    side.carry()
    copy = side.home.machine("first").folder / "out"
    if harm == "gone":
        (side.home.out / "log.jsonl").unlink()
        (side.home.out / "best.pt").unlink()
    elif harm == "shorter":
        (side.home.out / "log.jsonl").write_bytes(b"one\n")
    else:
        durable.replace_whole(copy / "best.pt", b"new")
    side.opened().close()
    assert side.view() == side.copies()
    assert (harm == "older") is (side.view()["best.pt"] == b"new")


def test_a_second_machine_goes_on_in_the_same_view(tmp_path: Path) -> None:
    """A second machine that continues a growing file extends the view; nothing in it is doubled or set aside."""
    first, second = Side(tmp_path), Side(tmp_path, "second")
    first.make("log.jsonl", b"one\ntwo\n")
    first.make("best.pt", b"old")
    first.carry()
    assert dict(outs.newest(first.home)) == {
        "out/best.pt": first.home.out / "best.pt",
        "out/log.jsonl": first.home.out / "log.jsonl",
    }
    for grown in (b"one\n", b"one\ntwo\n", b"one\ntwo\nthree\n"):
        second.make("log.jsonl", grown)
        second.carry()
        assert second.view()["log.jsonl"] == max(grown, b"one\ntwo\n", key=len)
    second.make("best.pt", b"new")
    second.carry()
    assert second.view() == {"best.pt": b"new", "log.jsonl": b"one\ntwo\nthree\n"}
    assert first.copies() == {"best.pt": b"old", "log.jsonl": b"one\ntwo\n"}
    first.opened().close()
    assert second.view()["best.pt"] == b"new", "coming back to the first machine does not bring the old one back"


def test_a_second_machine_that_begins_anew_overwrites_nothing(tmp_path: Path) -> None:
    """When a second machine's growing file does not begin with what the view holds, the view is set aside first."""
    first, second = Side(tmp_path), Side(tmp_path, "second")
    first.make("x/log.jsonl", b"one\ntwo\n")
    first.carry()
    second.make("x/log.jsonl", b"one\nother\n")
    second.carry()
    assert second.view() == {"x/log.jsonl": b"one\nother\n", "x/log.jsonl.from-first": b"one\ntwo\n"}
    assert [name for name, _ in outs.newest(first.home)] == ["out/x/log.jsonl"]


def test_a_view_is_one_with_the_copy_where_the_disk_can(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole file takes its room on the disk once; where links cannot be made it is copied."""
    side.make("a", LARGE)
    side.carry()
    assert (side.home.out / "a").samefile(side.home.machine("first").folder / "out" / "a")

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    side.make("b", LARGE)
    side.carry()
    assert side.view() == {"a": LARGE, "b": LARGE}
    assert (side.home.out / "b").stat().st_nlink == 1
    assert (side.home.out / "b").read_bytes() == LARGE

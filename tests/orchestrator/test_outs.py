"""Files of a command on their way home: verified, resumed after a cut, never torn, never lost to a stranger's."""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import durable, locks, rundir
from orchestrator.errors import NotReachable
from tests.faults.disk import FailingOs, Fault, instead_of_os
from tests.orchestrator import carrying
from tests.orchestrator.carrying import LARGE, Frame, Side, found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small pieces, and nobody hangs up."""
    with carrying.small(monkeypatch):
        yield


@pytest.fixture
def side(tmp_path: Path) -> Side:
    return Side(tmp_path)


def test_everything_a_command_made_is_home(side: Side) -> None:
    """Small files, large ones, growing and empty ones come home as they are, and the run is complete only then."""
    made = {"a/b.txt": b"text", "large": LARGE, "log.jsonl": b"{}\n{", "rows.jsonl": b"1\n2\n", "none": b""}
    made |= {"none.jsonl": b"", "x" * 255: b"long name", "y" * 249 + ".jsonl": b"1\n", "ä b.txt": b"umlaut"}
    for name, data in made.items():
        side.make(name, data)
    side.seal()
    assert not side.is_complete()
    side.carry()
    assert side.view() == side.copies() == made
    assert side.is_complete()
    assert [frame for frame, _ in side.carry() if "end" not in frame] == [], "nothing is sent twice"
    assert not list(side.home.folder.rglob("*.part"))


def test_a_large_file_goes_on_where_it_was_cut(side: Side) -> None:
    """Cut after any frame, a pull sends only what is missing; until the file is whole it has no name at home."""
    side.make("model.bin", LARGE)
    side.seal()
    pulls = 0
    while not side.is_complete():
        assert side.view() == side.copies() == {}
        before = [
            frame["offset"] for frame, _ in side.carry(lambda frames: cut_after_piece(frames, 1)) if "piece" in frame
        ]
        assert before == [1000 * pulls]
        pulls += 1
    assert pulls == 6
    assert side.view() == side.copies() == {"model.bin": LARGE}


def cut_after_piece(frames: list[Frame], number: int) -> list[Frame]:
    """The frames up to the so-manieth that is a piece."""
    ends = [at for at, (frame, _) in enumerate(frames) if "piece" in frame]
    return frames[: ends[number - 1] + 1] if len(ends) >= number else frames


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_grows_comes_home_whatever_is_cut(data: st.DataObject) -> None:
    """However files grow and are replaced while pulls are cut anywhere, the end is what the machine has."""
    with tempfile.TemporaryDirectory() as folder:
        side, grown = Side(Path(folder)), b""
        step = st.tuples(st.sampled_from(["grow", "replace", "large"]), st.binary(max_size=9), st.integers(0, 12))
        for kind, content, cut in data.draw(st.lists(step, max_size=6)):
            if kind == "grow":
                grown += content.replace(b"0", b"\n")
                side.make("x/log.jsonl", grown)
            else:
                side.make(kind, content * (900 if kind == "large" else 1))
            with locks.held(side.run.run_lock, 0):
                side.carry(lambda frames, cut=cut: frames[:cut])  # type: ignore[misc]
            assert grown.startswith(side.view().get("x/log.jsonl", b""))
        side.seal()
        side.carry()
        assert side.is_complete()
        assert side.view() == side.copies() == found(side.run.work)


def test_a_line_is_whole_until_the_run_has_ended(side: Side) -> None:
    """While the run goes on a growing file comes in whole lines; once it has ended, an unfinished one comes too."""
    path = side.make("log.jsonl", b"one\ntw")
    with locks.held(side.run.run_lock, 0):
        side.carry()
        assert side.view() == {"log.jsonl": b"one\n"}
    side.carry()
    assert side.view() == {"log.jsonl": b"one\ntw"}
    path.write_bytes(b"one\ntwo\nthree\n")
    side.carry()
    assert side.view() == side.copies() == {"log.jsonl": b"one\ntwo\nthree\n"}


def test_a_file_that_changes_while_it_is_sent_is_never_mixed(side: Side) -> None:
    """Of a large file that is replaced between two pulls no piece is used for the newer version."""
    side.make("model.bin", LARGE)
    side.carry(lambda frames: cut_after_piece(frames, 3))
    side.make("model.bin", LARGE[:-1] + b"?")
    side.carry(lambda frames: cut_after_piece(frames, 1))
    side.make("model.bin", LARGE[::-1])
    side.carry()
    assert side.view() == {"model.bin": LARGE[::-1]}
    side.make("model.bin", LARGE)
    side.carry(lambda frames: cut_after_piece(frames, 3))
    side.make("model.bin", b"small")
    side.carry()
    assert side.view() == {"model.bin": b"small"}
    assert found(side.home.machine("first").folder / ".parts") == {}, "nothing is kept of what nobody waits for"


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "0" * 64}, {"bytes": 5}, {"offset": 0}, {"offset": 999}, {"offset": None}, {"digest": "x"},
        {"digest": None}, {"digest": "0" * 64}, {"total": "9"}, {"total": 1000}, {"piece": "out/../x"},
        {"piece": "attempts/0001/rows.jsonl"}, {"piece": 7}, {"piece": "out/log.jsonl"},
    ],
    ids=str,
)  # fmt: skip
def test_a_piece_that_lies_is_refused(side: Side, change: dict[str, Any]) -> None:
    """A piece that is damaged, does not fit, or names another file is refused; what is home stays, and is completed."""
    side.make("model.bin", LARGE)
    side.carry(lambda frames: cut_after_piece(frames, 1))
    before = found(side.home.folder)
    with side.opened() as arrivals:
        frame, data = next(each for each in side.sent(arrivals) if "piece" in each[0])
        assert frame["offset"] == 1000
        if change == {"offset": 0}:
            frame = frame | {"digest": "0" * 64, "total": 1}  # one of another file would begin anew
        with pytest.raises(NotReachable):
            arrivals.take(frame | change, data)
    after = found(side.home.folder)
    assert {name: data for name, data in after.items() if ".parts" not in name} == {
        name: data for name, data in before.items() if ".parts" not in name
    }
    side.carry()
    assert side.view() == {"model.bin": LARGE}


def test_a_whole_that_is_not_what_was_promised_is_dropped(side: Side) -> None:
    """When the pieces together have another digest than was said, the file gets no name, and comes anew."""
    side.make("model.bin", LARGE)
    with side.opened() as arrivals:
        sent = [each for each in side.sent(arrivals) if "piece" in each[0]]
        for frame, data in sent[:-1]:
            arrivals.take(frame | {"digest": "0" * 64}, data)
        with pytest.raises(NotReachable, match="arrived damaged"):
            arrivals.take(sent[-1][0] | {"digest": "0" * 64}, sent[-1][1])
        assert side.copies() == {}
    side.carry()
    assert side.view() == {"model.bin": LARGE}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_home_tears_nothing(tmp_path: Path, error: int) -> None:
    """Whatever change of the disk fails while files arrive, no file is torn, and the next pull brings the rest."""
    made = {"a": b"small", "log.jsonl": b"1\n2\n", "z/large": LARGE}
    for n in itertools.count(1):
        side = Side(tmp_path / str(n))
        for name, data in made.items():
            side.make(name, data)
        side.seal()
        disk = FailingOs(n, Fault(error, from_then_on=True))
        try:
            with instead_of_os(disk):
                side.carry()
        except OSError:
            assert disk.has_failed
        assert all(made[name].startswith(data) for name, data in side.copies().items() | side.view().items())
        assert {"a": b"small", "z/large": LARGE}.items() >= {
            n: d for n, d in side.view().items() if n != "log.jsonl"
        }.items()
        side.carry()
        assert side.is_complete()
        assert side.view() == made
        if not disk.has_failed:
            break
    assert n > 15


def test_the_seal_is_borne_out_by_every_file(side: Side) -> None:
    """A run is complete only while each out at home has the size and digest the seal gives it."""
    for name in ("a", "log.jsonl", "large"):
        side.make(name, LARGE if name == "large" else b"1\n")
    side.seal()
    side.carry()
    assert side.is_complete()
    for name in ("a", "log.jsonl", "large"):
        path = side.home.machine("first").folder / "out" / name
        right = path.read_bytes()
        for wrong in (right[:-1], right + b"1", b"x" + right[1:]):
            path.write_bytes(wrong)
            assert not side.is_complete()
        path.write_bytes(right)
        assert side.is_complete()
        path.unlink()
        assert not side.is_complete()
        path.write_bytes(right)
    exit_json = side.home.machine("first").attempt(1).exit
    document = durable.load_json(exit_json)
    durable.save_json(exit_json, document | {"outs": {}})
    assert not side.is_complete(), "the list is proven by its own digest"
    exit_json.unlink()
    assert not side.is_complete()
    side.carry()
    assert side.is_complete()


def test_a_seal_without_outs_is_one(side: Side) -> None:
    """Seals from before there were outs are read as ever, and are complete without any."""
    document = {key: value for key, value in side.seal().document().items() if not key.startswith("outs")}
    seal = rundir.Seal.of(document)
    assert (seal.outs, seal.outs_sha256) == ({}, "")
    with side.opened() as arrivals:
        assert arrivals.is_complete(seal)


@pytest.mark.parametrize(
    "outs", [None, [], {"x": {}}, {"out/../x": {"bytes": 1, "sha256": "0" * 64}}, {"out/x": {"bytes": "1"}},
             {"out/x": {"bytes": 1, "sha256": "0"}}, {"attempts/0001/rows.jsonl": {"bytes": 1, "sha256": "0" * 64}}],
    ids=str,
)  # fmt: skip
def test_a_seal_with_other_names_is_none(side: Side, outs: Any) -> None:
    """A seal whose outs are no list of safe names with sizes and digests is not taken for a seal."""
    with pytest.raises(TypeError):
        rundir.Seal.of(side.seal().document() | {"outs": outs})


def test_a_seal_of_thousands_of_files_is_spoken_of_in_a_line(side: Side) -> None:
    """However many outs a seal has, every line of a pull is short; the list comes home as a file, in pieces."""
    for number in range(300):
        side.make(f"folder/{number:04d}" + "x" * 250, b"")
    seal = side.seal()
    assert len(seal.outs) == 300
    frames = side.carry()
    assert frames[-1][0]["seal"]["outs"] == {}
    assert side.is_complete()


def test_a_file_has_its_name_only_when_its_bytes_are_on_the_disk(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that came in pieces every byte was synced before it got its name; the name is, before it is counted."""
    done: list[str] = []
    sync, replace, folder = durable.sync, Path.replace, durable.sync_folder
    monkeypatch.setattr(durable, "sync", lambda fd: (done.append(f"{os.fstat(fd).st_size}"), sync(fd))[1])
    monkeypatch.setattr(durable, "sync_folder", lambda path: (done.append(path.name), folder(path))[1])
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append(f"is {to.name}"), replace(path, to))[1])
    side.make("x/model.bin", LARGE)
    side.seal()
    side.carry()
    assert done.index("is model.bin") > done.index(str(len(LARGE)))
    done.clear()
    with side.opened() as arrivals:
        for frame, data in side.sent(arrivals)[:-1]:
            arrivals.take(frame, data)
        side.make("x/model.bin", LARGE[::-1])
        for frame, data in side.sent(arrivals)[:-1]:
            arrivals.take(frame, data)
        seal = side.seal()
        frame, data = next(each for each in side.sent(arrivals) if each[0].get("whole", "").endswith("exit.json"))
        arrivals.take(frame, data)
        done.clear()
        assert arrivals.is_complete(seal)
    assert done == ["x", "x"], "the folder of the copy, and that of the view"

"""The store of pushed files: verified before they have their names, whole after any death, never outside the root."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from jobs import locks
from tests.faults import test_nth_failure
from tests.waiting import until
from tests.worker import pushing
from tests.worker.pushing import answer, ask, assert_no_scratch, assert_sound, framed, push, sha256, tree_of
from worker import store

FILES: pushing.Files = {
    "a.py": b"print(1)\n",
    "empty/__init__.py": b"",
    "run.sh": b"#!/bin/sh\n",
    "ü/漢 字.txt": b"x" * 3000,
    "link": "ü/漢 字.txt",
}
small_disk = test_nth_failure.small_disk
OLD: pushing.Files = {"a.py": b"old", "gone/b": b"b", "run.sh": b"#!/bin/sh\n", "empty": b""}
CONTENTS = [data for data in FILES.values() if isinstance(data, bytes)]
BIG = b"weights" * 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "outer" / "root"


def blobs(root: Path) -> set[str]:
    return {path.name for path in (root / "store" / "blobs").glob("*/*")}


def incoming(root: Path, name: str, data: bytes) -> Path:
    """What a sender of a big file has left so far."""
    path = store.Store(root).incoming / name
    path.write_bytes(data)
    return path


def test_a_pushed_tree_is_there_byte_for_byte(root: Path) -> None:
    """What was missing is taken, the tree is kept, and from then on nothing is missing and the tree is there."""
    tree = tree_of(FILES)
    assert ask(root, "have", {"digests": [tree.digest()]}) == {"have": []}
    missing = ask(root, "missing", {"trees": [tree.document(), tree.document()]})["missing"]
    assert sorted(missing) == sorted({sha256(data) for data in CONTENTS})
    assert ask(root, "keep", {"tree": tree.document()}) == {"missing": missing}
    assert ask(root, "take", framed(*CONTENTS)) == {"taken": len(CONTENTS)}
    assert ask(root, "missing", {"trees": [tree.document()]}) == {"missing": []}
    assert ask(root, "have", {"digests": [tree.digest()]}) == {"have": []}
    assert ask(root, "keep", {"tree": tree.document()}) == {"kept": tree.digest()}
    (root / "x.json").write_bytes(b"no manifest")
    assert ask(root, "have", {"digests": [tree.digest(), "0" * 64, "../../x", 7]}) == {"have": [tree.digest()]}
    assert_sound(root)


def test_a_stream_cut_anywhere_leaves_whole_files_only(root: Path) -> None:
    """Wherever a stream of files ends, those that came whole are kept, no other, and the rest can be sent again."""
    stream = framed(*CONTENTS)
    ends = [len(framed(*CONTENTS[:count])) for count in range(len(CONTENTS) + 1)]
    for cut in [*range(0, ends[3], 7), *ends, ends[3] + 1, ends[4] - 1]:
        said = answer(root, "take", stream[:cut])
        whole = sum(end <= cut for end in ends) - 1
        assert said == {"taken": whole} if cut in ends else said["error"] == "torn"
        assert blobs(root) == {sha256(data) for data in CONTENTS[:whole]}
        shutil.rmtree(root / "store" / "blobs")
    assert answer(root, "take", stream) == {"taken": len(CONTENTS)}
    assert_sound(root)
    assert_no_scratch(root)


def test_a_file_that_is_not_what_it_is_called_is_named_and_not_kept(root: Path) -> None:
    """A frame with a flipped byte ends the stream with its name; the files before it are kept."""
    stream = framed(b"good", b"bad", b"after").replace(b"\nbad", b"\nbed")
    assert ask(root, "take", stream) == {"error": "damaged", "sha256": sha256(b"bad")}
    assert blobs(root) == {sha256(b"good")}


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ({"sha256": "../../../evil", "bytes": 1}, "torn"),
        ({"sha256": "A" * 64, "bytes": 1}, "torn"),
        ({"sha256": "0" * 64, "bytes": (64 << 20) + 1}, "refused"),
        ({"sha256": "0" * 64, "bytes": -1}, "refused"),
        ({"sha256": "0" * 64, "bytes": True}, "refused"),
        ({"sha256": "0" * 64}, "refused"),
        ([], "torn"),
    ],
)
def test_a_header_that_cannot_be_ends_the_stream(root: Path, header: Any, error: str) -> None:
    """A frame with another name than a SHA-256, or another size than one up to 64 MiB, is not taken."""
    assert answer(root, "take", framed(b"good") + json.dumps(header).encode() + b"\nx")["error"] == error
    assert blobs(root) == {sha256(b"good")}


def test_the_largest_frame_is_taken_in_little_memory(root: Path) -> None:
    """A file of 64 MiB passes through a process that may not have that much memory."""
    data = bytes(64 << 20)
    header = json.dumps({"sha256": sha256(data), "bytes": len(data)}).encode() + b"\n"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (48 << 20, 48 << 20))

    done = subprocess.run(pushing.words("take", root), input=header + data, stdout=-1, preexec_fn=limit, check=True)
    assert json.loads(done.stdout) == {"taken": 1}
    assert blobs(root) == {sha256(data)}


def test_thousands_of_files_cost_two_syncs(root: Path) -> None:
    """All files of a batch are on the disk before the first has its name, and all names before the answer."""
    answer(root, "have", {"digests": []})
    with pushing.unsynced() as seen:
        assert answer(root, "take", framed(*(b"%d" % each for each in range(300)))) == {"taken": 300}
    what = [name for name, _ in itertools.groupby(each for each in seen if each in ("write", "fsync", "replace"))]
    assert what == ["write", "fsync", "replace", "fsync"]
    assert seen.count("fsync") == 2


# --- big files, which grow -------------------------------------------------------------------------------------------


def test_a_big_file_grows_until_it_can_be_adopted(root: Path) -> None:
    """A sender is told how much is there, at first nothing; what is whole becomes a blob, and stays one when asked."""
    asked = {"sha256": sha256(BIG), "bytes": len(BIG)}
    assert ask(root, "adopt", {**asked, "look": True}) == {"bytes": 0}
    assert ask(root, "adopt", asked) == {"adopted": False, "why": "absent", "bytes": 0}
    incoming(root, sha256(BIG), BIG[:100])
    assert ask(root, "adopt", {**asked, "look": True}) == {"bytes": 100}
    assert ask(root, "adopt", asked) == {"adopted": False, "why": "size", "bytes": 100}
    partial = incoming(root, sha256(BIG), BIG)
    assert ask(root, "adopt", asked) == ask(root, "adopt", asked) == {"adopted": True}
    assert ask(root, "adopt", {**asked, "look": True}) == {"bytes": len(BIG)}
    assert not partial.exists()
    assert_sound(root)


@pytest.mark.parametrize(("data", "why"), [(b"?" + BIG[1:], "hash"), (BIG + b"?", "size")])
def test_a_big_file_that_can_never_be_right_is_removed(root: Path, data: bytes, why: str) -> None:
    """What is as long as it should be but different, or longer, is removed, so that its sender begins anew."""
    incoming(root, sha256(BIG), data)
    asked = {"sha256": sha256(BIG), "bytes": len(BIG)}
    assert ask(root, "adopt", asked) == {"adopted": False, "why": why, "bytes": 0}
    assert blobs(root) == set()
    assert list((root / "store" / "incoming").iterdir()) == []


def test_a_link_in_the_place_of_a_big_file_is_not_adopted(root: Path, tmp_path: Path) -> None:
    """A link left in the folder of incoming files is no file, whatever it points to, and that stays as it is."""
    (tmp_path / "elsewhere").write_bytes(BIG)
    store.Store(root).incoming.joinpath(sha256(BIG)).symlink_to(tmp_path / "elsewhere")
    assert answer(root, "adopt", {"sha256": sha256(BIG), "bytes": len(BIG)})["why"] == "absent"
    assert (tmp_path / "elsewhere").stat().st_mode & 0o200


def test_a_file_that_is_still_written_to_is_not_adopted(root: Path) -> None:
    """A sender that writes while the file is read is noticed: nothing becomes a blob, and it is asked for again."""
    path = incoming(root, sha256(BIG), BIG)
    real = store.pour

    def pour(*words: int) -> tuple[int, str]:
        done = real(*words)
        os.utime(path, ns=(1, 1))  # as a write does
        return done

    asked = {"sha256": sha256(BIG), "bytes": len(BIG)}
    with mock.patch.object(store, "pour", pour):
        assert answer(root, "adopt", asked)["error"] == "busy"
    assert blobs(root) == set()
    assert answer(root, "adopt", asked) == {"adopted": True}


# --- damage ----------------------------------------------------------------------------------------------------------


def spoil(root: Path, name: str) -> None:
    """Flip the first byte of a blob, behind everybody's back: size and times stay."""
    path = store.Store(root).blob(name)
    times = path.stat().st_mtime_ns
    path.chmod(0o600)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    os.utime(path, ns=(times, times))


@pytest.mark.parametrize("verb", ["stage", "view", "project"])
@pytest.mark.parametrize("how", ["spoiled", "cut", "gone"])
def test_a_damaged_blob_is_named_forgotten_and_sent_again(root: Path, verb: str, how: str) -> None:
    """A blob that rotted, shrank or went is never given out: it goes with its trees alone, and a resend mends."""
    digest, other = push(root, FILES), push(root, {"other": b"other", "link": "other"})
    answer(root, "view", {"digest": digest if how == "gone" else other})
    path = store.Store(root).blob(sha256(CONTENTS[0]))
    if how == "spoiled":
        spoil(root, path.name)
    else:
        os.truncate(path, 1) if how == "cut" else path.unlink()
    request = {"run_id": "r", "code": digest, "needs": [], "digest": digest, "name": "p"}
    if not (verb == "view" and how == "gone"):
        assert answer(root, verb, request) == {"error": "damaged", "sha256": path.name}
        assert answer(root, "have", {"digests": [digest, other]}) == {"have": [other]}
        assert not (root / "store" / "views" / digest).exists()
        assert answer(root, "missing", {"trees": [tree_of(FILES).document()]}) == {"missing": [path.name]}
    assert push(root, FILES) == digest
    said = answer(root, verb, request)
    assert pushing.found(Path(said.get("work") or said["path"])) == FILES
    assert_sound(root)


def test_a_big_blob_is_not_read_again_unless_somebody_wrote_into_it(root: Path) -> None:
    """A big blob under its seal is used as it is; one whose seal is broken is read, and damaged when it has changed."""
    digest = push(root, {"big": BIG})
    blob = store.Store(root).blob(sha256(BIG))
    with mock.patch.object(store, "TRUSTED_FROM_BYTES", len(BIG)):
        with mock.patch.object(store, "pour", side_effect=AssertionError("it was read")):
            assert answer(root, "view", {"digest": digest})["path"]
        os.utime(blob)  # somebody opened it for writing, and wrote what was there
        assert answer(root, "stage", {"run_id": "same", "code": digest, "needs": []})["made"]
        assert blob.stat().st_mtime_ns == store.SEALED_NS
        with blob.open("r+b") as file:
            file.write(b"W")
        said = answer(root, "stage", {"run_id": "other", "code": digest, "needs": []})
    assert said == {"error": "damaged", "sha256": blob.name}


def test_a_damaged_manifest_is_no_manifest(root: Path) -> None:
    """A manifest with a changed byte is not believed: its tree counts as never kept, and can be kept again."""
    digest = push(root, FILES)
    manifest = store.Store(root).manifest(digest)
    manifest.write_bytes(manifest.read_bytes().replace(b"run.sh", b"ran.sh"))
    request = {"run_id": "r", "code": digest, "needs": []}
    assert answer(root, "stage", request) == {"error": "absent", "digest": digest}
    assert answer(root, "have", {"digests": [digest]}) == {"have": []}
    push(root, FILES)
    assert answer(root, "stage", request)["made"]


# --- deaths, full disks, two at once ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Something asked of a root, what is in the answer once it is done, and a copy of the root from before."""

    root: Path
    verb: str
    request: Any
    right: dict[str, Any]

    def begin(self) -> None:
        """Put the root back to where it was."""
        shutil.rmtree(self.root)
        shutil.copytree(self.root.parent.parent / "before", self.root, symlinks=True)

    def do(self) -> dict[str, Any]:
        """What it answers."""
        return answer(self.root, self.verb, self.request)

    def assert_repeated(self) -> None:
        """Asking again gives the right answer, what it names is whole, and nothing else is left."""
        with pushing.unsynced():
            said = self.do()
        assert self.right.items() <= said.items()
        if place := said.get("work") or said.get("path"):
            assert pushing.found(Path(place)) == FILES
        assert_sound(self.root)
        assert_no_scratch(self.root)


def cases(root: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """For every verb that changes something, what is asked of a root that is made ready for it, and the answer."""
    digest, old = (
        push(root, FILES),
        push(root, OLD),
    )
    answer(root, "project", {"name": "p", "digest": old})
    incoming(root, sha256(BIG), BIG)
    tree = tree_of({**FILES, "more": b"print(1)\n"})
    return {
        "take": (framed(b"one", b"two"), {"taken": 2}),
        "adopt": ({"sha256": sha256(BIG), "bytes": len(BIG)}, {"adopted": True}),
        "keep": ({"tree": tree.document()}, {"kept": tree.digest()}),
        "stage": ({"run_id": "r", "code": digest, "needs": []}, {"work": str(root / "runs" / "r" / "work")}),
        "view": ({"digest": digest}, {"path": str(root / "store" / "views" / digest)}),
        "project": ({"name": "p", "digest": digest}, {"path": str(root / "projects" / "p" / "tree")}),
    }


@pytest.fixture(params=["take", "adopt", "keep", "stage", "view", "project"])
def case(request: pytest.FixtureRequest, root: Path) -> Case:
    asked, right = cases(root)[request.param]
    shutil.copytree(root, root.parent.parent / "before", symlinks=True)
    return Case(root, request.param, asked, right)


def test_a_death_at_any_step_leaves_what_is_sound_and_can_be_repeated(case: Case) -> None:
    """Killed before any change of the disk, a verb leaves nothing half made under a name, and can be asked again."""
    for _ in pushing.every_death(case.do):
        assert_sound(case.root)
        work, tree = case.root / "runs" / "r" / "work", case.root / "projects" / "p" / "tree"
        assert not work.exists() or pushing.found(work) == FILES
        assert all(data in (FILES.get(name), OLD.get(name)) for name, data in pushing.found(tree).items())
        case.assert_repeated()
        case.begin()


def test_an_update_that_was_killed_leaves_nothing_to_the_next(root: Path) -> None:
    """After a death in the midst of a project's update, another tree is there alone: all of the cut off one is gone."""
    (asked, _), third = cases(root)["project"], push(root, {"x": b"x"})
    shutil.copytree(root, root.parent.parent / "before", symlinks=True)
    case = Case(root, "project", asked, {})
    for _ in pushing.every_death(case.do):
        with pushing.unsynced():
            assert "path" in answer(root, "project", {"name": "p", "digest": third})
        assert pushing.found(root / "projects" / "p" / "tree") == {"x": b"x"}
        case.begin()


def test_a_disk_that_is_full_at_any_step_is_said_and_can_be_repeated(case: Case) -> None:
    """When a change fails for want of space the answer says so, what is there is sound, and with space it is done."""
    for n in itertools.count(1):
        case.begin()
        with pushing.at_effect(n, pushing.disk_full) as seen:
            said = case.do()
        if len(seen) < n:
            break
        assert said == {"error": "disk_full", "folder": str(case.root)} or case.right.items() <= said.items()
        assert_sound(case.root)
        case.assert_repeated()
    assert n > 3


def test_a_small_disk_says_so_and_is_left_with_room(small_disk: Path) -> None:
    """On a disk that is really full neither a push nor a copy takes more than it can use: the room is free again."""
    data = [bytes([each]) * 200_000 for each in range(3)]
    digest = push(small_disk, {"a": data[0], "b": data[1]})
    free = os.statvfs(small_disk).f_bfree
    for verb, request in (
        ("take", framed(data[2], bytes(600_000))),
        ("stage", {"run_id": "r", "code": digest, "needs": [{"digest": digest, "path": "more"}]}),
    ):
        assert ask(small_disk, verb, request) == {"error": "disk_full", "folder": str(small_disk)}
    assert free - os.statvfs(small_disk).f_bfree < 60
    assert ask(small_disk, "stage", {"run_id": "r", "code": digest, "needs": []})["made"]


def test_takes_at_the_same_time_do_not_disturb_each_other(root: Path) -> None:
    """While one sender is in the midst of a file, another's whole push goes through, and so does the first one's."""
    stream = framed(b"first" * 100, b"second")
    with subprocess.Popen(pushing.words("take", root), stdin=-1, stdout=-1) as slow:
        assert slow.stdin is not None
        assert slow.stdout is not None
        slow.stdin.write(stream[:200])
        slow.stdin.flush()
        until(lambda: list(root.glob("store/incoming/.new-*/0")))
        assert ask(root, "take", framed(b"first" * 100, b"third")) == {"taken": 2}
        slow.stdin.write(stream[200:])
        slow.stdin.close()
        assert json.loads(slow.stdout.read()) == {"taken": 2}
    assert blobs(root) == {sha256(b"first" * 100), sha256(b"second"), sha256(b"third")}
    assert_sound(root)


@pytest.mark.parametrize(
    ("verb", "folder"), [("keep", "store"), ("stage", "runs/r"), ("view", "store/views"), ("project", "projects/p")]
)
def test_what_another_does_is_waited_for(root: Path, verb: str, folder: str) -> None:
    """While another process writes in the same place, nothing is done; when that takes too long, the answer says so."""
    asked, right = cases(root)[verb]
    (root / folder).mkdir(parents=True, exist_ok=True)
    with mock.patch.object(store, "LOCK_WAIT_S", 0.1), locks.held(root / folder / ".writing", 0):
        assert answer(root, verb, asked) == {"error": "busy", "folder": str(root)}
    assert right.items() <= answer(root, verb, asked).items()


@pytest.mark.parametrize("verb", ["adopt", "stage", "view", "project"])
def test_the_same_asked_four_times_at_once_is_done_once(root: Path, verb: str) -> None:
    """Four processes that ask for the same at the same time all get it, and what they get is whole."""
    asked, right = cases(root)[verb]
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda _: ask(root, verb, asked), range(4)))
    assert all(right.items() <= each.items() for each in said)
    if verb == "stage":
        assert sum(each["made"] for each in said) == 1
    if verb == "project":
        assert sorted(each["changed"] for each in said) == [0, 0, 0, 4]
    assert_sound(root)
    assert_no_scratch(root)

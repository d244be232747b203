"""Where pushed trees are used: a run's own copy, views, projects beside outputs; nothing is ever written elsewhere."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.trees import BadTree
from tests.worker import pushing
from tests.worker.pushing import answer, ask, assert_sound, found, push, tree_of
from worker import store

CODE: pushing.Files = {"a.py": b"a", "bin/run.sh": b"#!/bin/sh\n", "data/old": b"old", "latest": "data/old"}
QUICK = settings(max_examples=40, deadline=None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "outer" / "root"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is none of our business, with a file in it."""
    folder = tmp_path / "outer" / "outside"
    folder.mkdir(parents=True)
    (folder / "kept").write_bytes(b"kept")
    return folder


@contextmanager
def world(factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A root and a folder outside of it, for one example; what is outside must be the same afterwards."""
    outer = factory.mktemp("outer")
    (outer / "outside").mkdir()
    (outer / "outside" / "kept").write_bytes(b"kept")
    with pushing.unsynced():
        yield outer / "root", outer / "outside"
    others = {name: data for name, data in found(outer).items() if not name.startswith("root/")}
    assert others == {"outside/kept": b"kept"}
    shutil.rmtree(outer)


def stage(root: Path, code: str | None, *needs: dict[str, Any], run_id: str = "r") -> dict[str, Any]:
    return answer(root, "stage", {"run_id": run_id, "code": code, "needs": list(needs)})


def project(root: Path, digest: str, name: str = "p") -> dict[str, Any]:
    return answer(root, "project", {"name": name, "digest": digest})


# --- a run's own work folder -----------------------------------------------------------------------------------------


def test_a_run_gets_a_copy_of_its_own(root: Path) -> None:
    """A work folder holds the code, its modes and links; what a job writes into it reaches no blob and no other run."""
    digest = push(root, CODE)
    work = root / "runs" / "r" / "work"
    request = {"run_id": "r", "code": digest, "needs": []}
    assert ask(root, "stage", request) == {"work": str(work), "made": True}
    assert found(work) == CODE
    assert os.access(work / "bin/run.sh", os.X_OK)
    assert not (work / "a.py").stat().st_mode & stat.S_IXUSR
    for path in ("a.py", "bin/run.sh"):
        assert (work / path).stat().st_mode & stat.S_IWUSR
        with (work / path).open("r+b") as file:
            file.write(b"job was here")
    assert stage(root, digest, run_id="other")["made"]
    assert found(root / "runs" / "other" / "work") == CODE
    assert_sound(root)


def test_a_resumed_run_keeps_its_work_folder(root: Path) -> None:
    """A work folder that is there stays as the job left it, whatever code is named, known or not."""
    stage(root, push(root, CODE))
    work = root / "runs" / "r" / "work"
    (work / "a.py").unlink()
    (work / "out").write_bytes(b"rows")
    assert stage(root, "0" * 64) == stage(root, None) == {"work": str(work), "made": False}
    assert found(work) == {**{name: data for name, data in CODE.items() if name != "a.py"}, "out": b"rows"}


def test_needs_are_placed_below_their_paths(root: Path) -> None:
    """A needed tree lands below its path, one marked as a file at it; what comes later replaces what is there."""
    code, data, one = push(root, CODE), push(root, {"new": b"new", "sub/x.sh": b"x"}), push(root, {"w.sh": b"w"})
    needs = [
        {"digest": data, "path": "data"},
        {"digest": data, "path": "."},
        {"digest": one, "path": "m/weights", "file": True},
        {"digest": one, "path": "a.py", "file": True},
    ]
    work = Path(stage(root, code, *needs)["work"])
    added = {"data/new": b"new", "data/sub/x.sh": b"x", "new": b"new", "sub/x.sh": b"x", "m/weights": b"w"}
    assert found(work) == {**CODE, **added, "a.py": b"w"}
    assert os.access(work / "m/weights", os.X_OK)
    assert found(Path(stage(root, None, run_id="empty")["work"])) == {}
    alone = Path(stage(root, None, {"digest": data, "path": "."}, run_id="alone")["work"])
    assert found(alone) == {"new": b"new", "sub/x.sh": b"x"}


@pytest.mark.parametrize(
    "need",
    [{"path": path} for path in ("..", "/tmp/x", "a.py", "latest", "a\nb", "", "./x", "x/../../y", "data/old/x")]
    + [{"path": "x", "file": True}, {"path": ".", "file": True}, {"path": 3}, {"path": "x", "digest": "../x"}],
)
def test_a_need_that_cannot_be_placed_is_refused(root: Path, outside: Path, need: dict[str, Any]) -> None:
    """A path that leads elsewhere, through a file or a link, or no path at all, makes no work folder."""
    code, data = push(root, CODE), push(root, {"x": b"x", "y": b"y"})
    assert stage(root, code, {"digest": data, **need})["error"] == "refused"
    assert found(root / "runs").keys() <= {"r/.writing"}
    assert found(outside) == {"kept": b"kept"}


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp", "-r", "a\n", "a\0b", "ü", "x" * 129, None, 3, ["a"]])
def test_a_name_that_is_none_is_refused(root: Path, outside: Path, name: Any) -> None:
    """A run or a project whose name is no plain name is refused, and nothing is made."""
    digest = push(root, CODE)
    assert stage(root, digest, run_id=name)["error"] == "refused"
    assert project(root, digest, name)["error"] == "refused"
    assert sorted(path.name for path in root.iterdir()) == ["store"]


def test_a_run_or_project_that_is_a_link_is_left_alone(root: Path, outside: Path) -> None:
    """Where a link stands in the place of a run, a project, or a project's tree, nothing goes where it points."""
    digest = push(root, CODE)
    for path in ("runs/r", "projects/p", "projects/q/tree"):
        (root / path).parent.mkdir(parents=True)
        (root / path).symlink_to(outside)
    for said in (stage(root, digest), project(root, digest), project(root, digest, "q"), project(root, digest, "q")):
        assert said["error"] == "in_the_way"
    assert found(outside) == {"kept": b"kept"}
    tree = Path(project(root, digest, "moved")["path"])
    tree.symlink_to(tree.rename(outside / "tree"))
    assert project(root, digest, "moved")["error"] == "in_the_way"


@pytest.mark.parametrize("stop", [None, 0, 3], ids=["in the kernel", "refused", "refused in the midst"])
def test_big_blobs_are_copied_whole_by_whatever_means(root: Path, stop: int | None) -> None:
    """A big file is the same whether the kernel copies it, refuses, or does so after a part of it."""
    data = bytes(range(256)) * 9000
    digest = push(root, {"big": data})
    real, calls = os.copy_file_range, []

    def copy(source: int, target: int, count: int) -> int:
        calls.append(count)
        if stop is not None and len(calls) > stop:
            raise OSError(errno.EXDEV, "across disks")
        return real(source, target, min(count, 500_000))

    with (
        mock.patch.object(store, "TRUSTED_FROM_BYTES", 1000),
        mock.patch.object(store.fcntl, "ioctl", side_effect=OSError(errno.EOPNOTSUPP, "no clones")),
        mock.patch.object(os, "copy_file_range", copy),
    ):
        work = Path(stage(root, digest)["work"])
    assert (work / "big").read_bytes() == data
    assert calls
    assert (work / "big").stat().st_mtime_ns != store.SEALED_NS


def test_the_order_of_changes_outlives_a_power_cut(root: Path) -> None:
    """A work folder has its name once it is on the disk; a project says what it is about to change before it does."""
    first, second = push(root, {"a": b"1", "b": b"1"}), push(root, {"a": b"2", "c": b"2"})
    with pushing.unsynced() as seen:
        project(root, first)
        seen.clear()
        project(root, second)
        changes = [each for each in seen if each in ("fsync", "fdatasync", "replace", "unlink", "rmdir")]
        record = ["fdatasync", "replace", "fsync"]
        assert changes[:4] == [*record, "unlink"]
        assert changes[-4:] == ["fsync", *record]
        seen.clear()
        stage(root, first)
    assert seen[seen.index("rename") - 1] == "fsync"
    assert seen[seen.index("rename") + 1] == "fsync"


# --- views -----------------------------------------------------------------------------------------------------------


def test_a_view_costs_no_space_and_is_made_once(root: Path) -> None:
    """A view holds the blobs themselves under their paths; asked for again it is the same folder."""
    digest = push(root, CODE)
    view = root / "store" / "views" / digest
    assert ask(root, "view", {"digest": digest}) == {"path": str(view)}
    assert found(view) == CODE
    assert (view / "a.py").samefile(store.Store(root).blob(pushing.sha256(b"a")))
    inode = view.stat().st_ino
    answer(root, "view", {"digest": digest})
    assert view.stat().st_ino == inode
    assert answer(root, "view", {"digest": "0" * 64}) == {"error": "absent", "digest": "0" * 64}
    assert answer(root, "view", {"digest": "../../x"})["error"] == "refused"


@pytest.mark.parametrize("harm", ["unlink", "write", "link", "folder"])
def test_a_view_that_somebody_changed_is_made_anew(root: Path, harm: str) -> None:
    """A view in which a file is gone, another, or a link, is right again when it is asked for, and so is the store."""
    digest = push(root, CODE)
    path = Path(answer(root, "view", {"digest": digest})["path"]) / "bin" / "run.sh"
    if harm == "folder":
        shutil.rmtree(path.parent)
        path.parent.symlink_to("..")
    else:
        path.unlink()
    if harm == "write":
        path.write_bytes(b"#!/bin/sh\n")
    if harm == "link":
        path.symlink_to("../a.py")
    assert found(Path(answer(root, "view", {"digest": digest})["path"])) == CODE
    assert_sound(root)


def test_where_there_can_be_no_more_links_a_view_has_a_copy(root: Path) -> None:
    """On a disk without hard links, or with too many, the view is a sealed copy, made once as well."""
    digest = push(root, CODE)
    with mock.patch.object(os, "link", side_effect=OSError(errno.EMLINK, "too many")):
        view = Path(answer(root, "view", {"digest": digest})["path"])
        inode = view.stat().st_ino
        assert found(view) == CODE
        assert answer(root, "view", {"digest": digest}) == {"path": str(view)}
    assert view.stat().st_ino == inode


# --- projects --------------------------------------------------------------------------------------------------------


def test_a_project_follows_the_laptop_and_keeps_its_outputs(root: Path) -> None:
    """What changed is put there, what went is removed with its empty folders, and outputs and caches stay."""
    first = {"a": b"1", "b": b"1", "gone/x": b"1", "mixed/x": b"1", "s": "a", "f": b"1", "d/x": b"1"}
    second = {"a": b"2", "b": b"1", "new/x.sh": b"2", "s": "b", "f/x": b"2", "d": b"2"}
    one, two = push(root, first), push(root, second)
    tree = root / "projects" / "p" / "tree"
    said = ask(root, "project", {"name": "p", "digest": one})
    assert said == {"path": str(tree), "changed": 7, "deleted": 0}
    assert found(tree) == first
    assert ask(root, "project", {"name": "p", "digest": one}) == {"path": str(tree), "changed": 0, "deleted": 0}
    outputs = {"mixed/rows": b"rows", "out/log": b"log", "b": b"edited by a job"}
    for name, data in outputs.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(data)
    assert project(root, two) == {"path": str(tree), "changed": 5, "deleted": 4}
    assert found(tree) == {**second, **outputs}
    assert not (tree / "gone").exists()
    assert os.access(tree / "new/x.sh", os.X_OK)
    (tree / "a").unlink()
    assert project(root, two)["changed"] == 1
    assert found(tree) == {**second, **outputs}


def test_a_folder_that_a_job_replaced_by_a_link_is_not_written_through(root: Path, outside: Path) -> None:
    """Where a job put a link in the place of a folder, an update says so, and leaves what it points to as it is."""
    (outside / "x").write_bytes(b"not ours")
    one, two, three = push(root, {"d/x": b"1"}), push(root, {"d/x": b"2"}), push(root, {"e": b"3"})
    tree = Path(project(root, one)["path"])
    shutil.rmtree(tree / "d")
    (tree / "d").symlink_to(outside)
    assert project(root, two) == {"error": "in_the_way", "path": "d/x", "project": str(tree)}
    assert project(root, three) == {"path": str(tree), "changed": 1, "deleted": 0}
    assert found(outside) == {"kept": b"kept", "x": b"not ours"}
    assert found(tree) == {"d": str(outside), "e": b"3"}


FILE_NAMES = ["a", "b", "c", "a/x", "a/y", "b/x", "b/x/z"]
OUTPUT_NAMES = ["out", "a/out", "b/out", "b/x/out"]
FOLDERS = ["a", "b", "b/x"]
pushed = st.dictionaries(st.sampled_from(FILE_NAMES), st.sampled_from([b"1", b"2", "c", "nowhere"]), max_size=5).filter(
    lambda files: not any(f"{one}/" in other for one in files for other in files)
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), pushed),
        st.tuples(st.just("output"), st.sampled_from(OUTPUT_NAMES)),
        st.tuples(st.just("plant"), st.sampled_from(FOLDERS)),
        st.tuples(st.just("clear"), st.sampled_from(FOLDERS)),
    ),
    min_size=2,
    max_size=10,
)


class Job:
    """A user's job in the tree of a project: makes outputs, and puts links in the place of folders."""

    def __init__(self, tree: Path, outside: Path) -> None:
        self.tree = tree
        self.outside = outside
        self.own: dict[str, bytes | str] = {}

    def do(self, what: str, name: str) -> None:
        """Make an output, put a link in the place of a folder, or clear that away; where it cannot be, do nothing."""
        path = self.tree / name
        if not path.parent.is_dir() or any(each.is_symlink() for each in (path.parent, path.parent.parent)):
            return
        if what == "output" and not os.path.lexists(path):
            path.write_bytes(b"output")
            self.own[name] = b"output"
        elif what == "plant" and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            path.symlink_to(self.outside)
            self.own = {each: data for each, data in self.own.items() if not each.startswith(f"{name}/")}
            self.own[name] = str(self.outside)
        elif what == "clear" and self.own.get(name) == str(self.outside):
            path.unlink()
            del self.own[name]


@QUICK
@given(steps)
def test_an_update_touches_nothing_but_what_was_pushed(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any]]
) -> None:
    """Whatever a job leaves in a project, an update makes the pushed tree beside it, or names what stands there."""
    with world(tmp_path_factory) as (root, outside):
        job = Job(root / "projects" / "p" / "tree", outside)
        for what, value in steps:
            if what != "push":
                job.do(what, value)
                continue
            said = project(root, push(root, value))
            ours = found(job.tree)
            stands = {name: ours.pop(name, None) for name in job.own if name not in value}
            assert stands == {name: data for name, data in job.own.items() if name not in value}
            assert said.get("error", "in_the_way") == "in_the_way"
            if "error" in said:
                assert any(f"{said['path']}/" in f"{own}/" or f"{own}/" in f"{said['path']}/" for own in job.own)
            else:
                assert ours == value
                job.own = {name: data for name, data in job.own.items() if name not in value}


# --- whatever a document says ----------------------------------------------------------------------------------------

parts = st.sampled_from(["..", ".", "", "a", "b", "~", "a\nb", "\0", "ü", "\udc80", "x" * 256, "outside", "kept"])
odd_paths = st.one_of(st.lists(parts, min_size=1, max_size=4).map("/".join), st.text(max_size=6))
plain_paths = st.lists(st.sampled_from(["a", "b", "l", "outside"]), min_size=1, max_size=3).map("/".join)
paths = st.one_of(plain_paths, plain_paths, plain_paths, odd_paths)
entries = st.fixed_dictionaries(
    {"path": paths, "size": st.just(1), "sha256": st.just(pushing.sha256(b"x"))},
    optional={"link": paths, "executable": st.booleans()},
).map(lambda entry: {**entry, "sha256": "", "size": 0} if entry.get("link") else entry)
documents = st.lists(entries, max_size=4, unique_by=lambda entry: entry["path"]).map(
    lambda made: {"entries": sorted(made, key=lambda entry: entry["path"])}
)


@QUICK
@given(documents, documents, paths, paths)
def test_nothing_is_written_outside_the_root(
    tmp_path_factory: pytest.TempPathFactory, one: Any, two: Any, path: str, name: str
) -> None:
    """Whatever names, links and paths two trees and the requests for them hold, all is answered inside the root."""
    with world(tmp_path_factory) as (root, _):
        answer(root, "take", pushing.framed(b"x"))
        kept = [answer(root, "keep", {"tree": each}) for each in (one, two)]
        digests = [said.get("kept", "0" * 64) for said in kept]
        for run_id in ("r", name):
            stage(root, digests[0], {"digest": digests[1], "path": path}, run_id=run_id)
            stage(root, None, {"digest": digests[1], "path": path, "file": True}, run_id=f"{run_id}2")
        for digest in [*digests, name]:
            answer(root, "view", {"digest": digest})
            project(root, digest)
            project(root, digest, name)
            answer(root, "adopt", {"sha256": name, "bytes": 1})
        assert_sound(root)


def test_links_that_lead_out_are_not_followed(root: Path, outside: Path) -> None:
    """Links that each stay inside but together lead out are refused; nothing is written through a planted one."""
    with pytest.raises(BadTree):
        push(root, {"a/b/up": "../..", "out": "a/b/up/../outside"})
    project(root, push(root, {"here": b"kept"}))
    (root / "projects" / "p" / "tree" / "deep").symlink_to(outside)
    assert project(root, push(root, {"deep/kept": b"changed"}))["error"] == "in_the_way"
    assert found(outside) == {"kept": b"kept"}


@pytest.mark.parametrize("count", [200, 201, 1500])
def test_deep_paths_are_made_or_refused(root: Path, count: int) -> None:
    """A path of 200 names can be made, used and removed; a deeper one is refused before anything is written."""
    tree = tree_of({"/".join("d" * count): b"x"})
    answer(root, "take", pushing.framed(b"x"))
    said = answer(root, "keep", {"tree": tree.document()})
    assert said.get("error") == (None if count == 200 else "refused")
    if count == 200:
        assert stage(root, tree.digest())["made"]
        assert project(root, tree.digest())["changed"] == 1
        assert project(root, push(root, {}))["deleted"] == 1
        assert list((root / "projects" / "p" / "tree").iterdir()) == []
        assert stage(root, None, {"digest": tree.digest(), "path": "more"}, run_id="deeper")["error"] == "refused"

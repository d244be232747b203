"""Which files a command brings home: those its patterns name, never through a link, never under a hostile name."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import durable, rundir, trees
from worker import outs

FILES = ("a.txt", "b.json", ".hidden", "x/a.txt", "x/y/a.txt", "x/y/b.json", "x/y/z/c.txt", "xx/a.txt", "[1]/a.txt")


@pytest.fixture
def run(tmp_path: Path) -> rundir.Run:
    """A run whose command works in an empty folder of its own, below the project's."""
    made = rundir.Run(tmp_path / "run")
    durable.have_folder(made.work / "in" / "here")
    return made


def put(run: rundir.Run, name: str, text: str = "x") -> Path:
    path = run.work / "in" / "here" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def find(run: rundir.Run, *patterns: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The names that are found, and what is said to be passed over."""
    durable.save_json(run.job, {"out": list(patterns), "folder": "in/here"})
    skipped: list[tuple[str, str]] = []
    found = list(outs.Outs(run).find(lambda text, why: skipped.append((text, why))))
    assert all(rundir.may_come_home(name) for name in found)
    return [name.removeprefix("out/") for name in found], skipped


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> rundir.Run:
    """A run with a small tree of files."""
    made = rundir.Run(tmp_path_factory.mktemp("tree") / "run")
    durable.have_folder(made.work / "in" / "here")
    for name in FILES:
        put(made, name)
    return made


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ((), []),
        (("*.txt",), ["a.txt"]),
        (("*",), [".hidden", "a.txt", "b.json"]),
        (("**/*.json",), ["b.json", "x/y/b.json"]),
        (("x/**",), ["x/a.txt", "x/y/a.txt", "x/y/b.json", "x/y/z/c.txt"]),
        (("x/**/c.txt", "b.json"), ["b.json", "x/y/z/c.txt"]),
        (("x/*/a.txt",), ["x/y/a.txt"]),
        (("x*/a.txt",), ["x/a.txt", "xx/a.txt"]),
        (("./x//y/b.json",), ["x/y/b.json"]),
        (("x/y",), ["x/y/a.txt", "x/y/b.json", "x/y/z/c.txt"]),
        (("x/*/",), ["x/y/a.txt", "x/y/b.json", "x/y/z/c.txt"]),
        (("[[]1]/*",), ["[1]/a.txt"]),
        (("?.txt", "[!a].json"), ["a.txt", "b.json"]),
        (("A.TXT", "none/*"), []),
        (("",), []),
        ((".",), sorted(FILES)),
        (("x/y/b.json/",), []),
    ],
)
def test_patterns_name_files(tree: rundir.Run, patterns: tuple[str, ...], found: list[str]) -> None:
    """Patterns mean what they mean to pathlib; a folder named outright, or with a slash behind it, means all in it."""
    assert find(tree, *patterns) == (found, [])


@given(st.lists(st.sampled_from(["**", "*", "x", "y", "a.txt", "*.txt", "?", "z*"]), min_size=1, max_size=5))
def test_two_stars_stand_for_any_number_of_folders(tree: rundir.Run, parts: list[str]) -> None:
    """Of the files exactly those are found that a pattern matches, tried in every possible way."""

    def matches(name: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
        if not pattern:
            return not name
        if pattern[0] == "**":
            return any(matches(name[cut:], pattern[1:]) for cut in range(len(name) + 1))
        return bool(name) and fnmatch.fnmatchcase(name[0], pattern[0]) and matches(name[1:], pattern[1:])

    pattern = "/".join([*parts, "*"])  # so that it names files
    expected = [name for name in FILES if matches(tuple(name.split("/")), (*parts, "*"))]
    assert sorted(find(tree, pattern)[0]) == sorted(expected)


@pytest.mark.parametrize("pattern", ["/etc/*", "../*", "x/../../*", "/"])
def test_a_pattern_that_leads_out_finds_nothing(tree: rundir.Run, pattern: str) -> None:
    """A pattern with a root or a parent in it is passed over, and said to be."""
    assert find(tree, pattern) == ([], [(pattern, "a pattern that leads out of the command's folder")])


def test_links_are_never_followed(run: rundir.Run, tmp_path: Path) -> None:
    """Neither a linked file nor a file behind a linked folder is found, wherever the link leads; a link is named."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a.txt").write_text("s", encoding="utf-8")
    inside = put(run, "real/a.txt")
    for name, target in (("file.txt", secret / "a.txt"), ("loop", run.work), ("away", secret), ("near.txt", inside)):
        (run.work / "in" / "here" / name).symlink_to(target)
    (run.work / "in" / "here" / "dead.txt").symlink_to("nowhere")
    found, skipped = find(run, "**/*")
    assert found == ["real/a.txt"]
    assert sorted(skipped) == [
        (f"out/{name}", "a link") for name in ("away", "dead.txt", "file.txt", "loop", "near.txt")
    ]
    assert find(run, "away/*", "loop/**/a.txt") == ([], [])


@pytest.mark.parametrize("level", ["work", "work/in", "work/in/here"])
def test_a_link_in_the_place_of_a_folder_leads_nowhere(run: rundir.Run, tmp_path: Path, level: str) -> None:
    """When the command's folder, or one above it, has become a link, nothing is found and no file can be opened."""
    put(run, "a.txt")
    durable.save_json(run.job, {"out": ["*"], "folder": "in/here"})
    found = outs.Outs(run)
    os.close(found.open("out/a.txt"))
    (run.folder / level).rename(tmp_path / "moved")
    (run.folder / level).symlink_to(tmp_path / "moved")
    assert (run.work / "in" / "here" / "a.txt").exists()
    assert find(run, "*") == ([], [])
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        found.open("out/a.txt")


def test_only_regular_files_come_home(run: rundir.Run) -> None:
    """A pipe or a socket is passed over without being opened, so that nothing waits for it."""
    put(run, "a")
    os.mkfifo(run.work / "in" / "here" / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(run.work / "in" / "here")
        server.bind("socket")
        found, skipped = find(run, "*")
    assert found == ["a"]
    assert skipped == [("out/pipe", "not a regular file"), ("out/socket", "not a regular file")]
    with pytest.raises(OSError, match="not a regular file"):
        outs.Outs(run).open("out/pipe")


@pytest.mark.parametrize("name", [b"a\nb", b"a\x1b[31mb", b"a\xffb", "a\u202eb".encode(), b"\x7f"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_hostile_names_are_passed_over_and_said(run: rundir.Run, name: bytes, as_folder: bool) -> None:
    """A name with control characters, or that is no UTF-8, stays there; it is named in plain ASCII, once per look."""
    path = os.fsencode(run.work / "in" / "here") + b"/" + name
    if as_folder:
        Path(os.fsdecode(path)).mkdir()
        path += b"/inner"
    with open(path, "wb"):  # noqa: PTH123 -- a path of bytes
        pass
    put(run, "good")
    found, skipped = find(run, "**/*")
    assert found == ["good"]
    assert len(skipped) == 1
    assert skipped[0][0].isascii()
    assert skipped[0][0].isprintable()


def test_no_more_than_so_many_files_come_home(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many files the first ones are found, always the same, and the first one left out is named."""
    monkeypatch.setattr(outs, "FILES_MAX", 3)
    for name in ("d", "b/z", "a", "c", "b/y"):
        put(run, name)
    assert find(run, "**") == (["a", "b/y", "b/z"], [("out/c", "more than 3 files")])


def test_folders_without_end_are_not_followed(run: rundir.Run) -> None:
    """A folder deeper than the limit is passed over, and said to be; nothing runs out of file descriptors."""
    path = run.work / "in" / "here"
    for _ in range(70):
        path = path / "d"
        path.mkdir()
        (path / "f").touch()
    found, skipped = find(run, "**")
    assert len(found) == 64
    assert [why for _, why in skipped] == ["deeper than 64 folders"]


def test_a_folder_that_may_not_be_read_is_said(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that this user may not read is passed over with words, and the rest is found."""
    put(run, "closed/a")
    put(run, "open/a")
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refusing)
    assert find(run, "*/a") == (["open/a"], [("out/closed", "a folder that may not be read")])


def test_the_seal_names_what_is_there(run: rundir.Run) -> None:
    """Every file that is found stands in the seal with its size and SHA-256, under a name that may come home."""
    put(run, "a.bin", "y" * 3_000_000)
    put(run, "x/rows.jsonl", "{}\nunfinished")
    put(run, "empty", "")
    durable.save_json(run.job, {"out": ["**"], "folder": "in/here"})
    ticks: list[None] = []
    found = outs.Outs(run).digests(lambda: ticks.append(None))
    assert found == {
        f"out/{name}": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (("a.bin", b"y" * 3_000_000), ("empty", b""), ("x/rows.jsonl", b"{}\nunfinished"))
    }
    assert all(trees.is_safe_path(name) for name in found)
    assert len(ticks) == 4, "three pieces of the large one, one of the rows"


def test_a_run_of_another_kind_has_none(run: rundir.Run) -> None:
    """A job without patterns, or no job at all yet, brings nothing home in this way."""
    put(run, "a")
    assert outs.Outs(run).digests(lambda: None) == {}
    durable.save_json(run.job, {"story": "evaluate"})
    assert outs.Outs(run).digests(lambda: None) == {}

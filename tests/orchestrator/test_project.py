"""A project as trees: what is hashed is what is there, nothing is read twice, and what is needed is found or named."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import durable
from jobs.trees import Entry, Tree
from orchestrator import config, project
from orchestrator.errors import ConfigError, UsageError
from orchestrator.project import Content, Hashes

LATER_NS = 10**10
"""Files made just now are old enough to be trusted by a clock that is this much ahead."""


def make(files: Mapping[str, str]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def known(ahead_ns: int = LATER_NS) -> Hashes:
    """What is kept of earlier reads, with a clock that is ahead."""
    return Hashes(config.state_folder() / "hashes.json", lambda: time.time_ns() + ahead_ns)


def here() -> Path:
    return Path.cwd()


def shown(content: Content) -> dict[str, str]:
    """Each path with its content as it lies where the content says, or `-> ` and where a link leads."""
    return {
        entry.path: f"-> {entry.link}" if entry.link else content.files[entry.sha256].read_text(encoding="utf-8")
        for entry in content.tree.entries
    }


def test_the_project_is_the_nearest_folder_with_git(tmp_path: Path) -> None:
    """The root is the nearest folder upwards that holds `.git`, as a folder or a file, else the folder itself."""
    make({"a/.git/config": "", "a/b/c/x": "", "a/d/.git": "gitdir: elsewhere", "a/d/e/x": "", "f/x": ""})
    roots = {"a": "a", "a/b/c": "a", "a/d": "a/d", "a/d/e": "a/d", "f": "f"}
    assert {name: project.root(Path(name)) for name in roots} == {name: here() / root for name, root in roots.items()}


def test_a_snapshot_holds_what_travels_and_names_what_does_not() -> None:
    """The tree of a snapshot is every file that travels, with content, size, mode and links as they are on the disk."""
    make({"a.py": "print()", "b/run.sh": "#!", "b/é.txt": "", ".gitignore": "*.pt\n", "ckpt.pt": "12345"})
    Path("b/run.sh").chmod(0o755)
    Path("link").symlink_to("b/run.sh")
    made = project.snapshot(here(), known())
    assert made.tree == Tree.from_entries(
        [
            Entry(".gitignore", 5, sha256("*.pt\n")),
            Entry("a.py", 7, sha256("print()")),
            Entry("b/run.sh", 2, sha256("#!"), executable=True),
            Entry("b/é.txt", 0, sha256("")),
            Entry("link", 0, "", link="b/run.sh"),
        ]
    )
    assert shown(made)["a.py"] == "print()"
    assert [(left.path, left.rule, left.size) for left in made.left_out] == [("ckpt.pt", ".gitignore:1: *.pt", 5)]


NAMES = st.sampled_from(["a", "b", "a b", "é", "c.py", "[x]", "x\\y", "new\nline", ".hidden", "__pycache__", "d.pt"])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    files=st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.text(max_size=5), max_size=8),
    links=st.dictionaries(NAMES, st.lists(NAMES | st.just(".."), min_size=1, max_size=3).map("/".join), max_size=3),
)
def test_any_snapshot_is_a_tree_that_a_machine_takes(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str], links: dict[str, str]
) -> None:
    """Whatever lies in a project, its snapshot is a tree by the contract, and made again it is the same."""
    folder = tmp_path_factory.mktemp("any")
    for name, content in files.items():
        if not any((folder / above).is_file() for above in Path(name).parents) and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
    for name, target in links.items():
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(target)
    made = project.snapshot(folder, known())
    assert Tree.of(made.tree.document()) == made.tree
    assert project.snapshot(folder, known()).tree.digest() == made.tree.digest()
    there = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    assert len(made.tree.entries) <= len(there)


def test_what_did_not_change_is_not_read_again() -> None:
    """A second snapshot reads no file; after a change of content, of time or of inode it reads that file alone."""
    make({"a": "one", "b": "two", "c/d": "three"})
    assert reads(LATER_NS, LATER_NS) == [3, 0]
    Path("a").write_text("ONE", encoding="utf-8")
    assert reads(LATER_NS, LATER_NS) == [1, 0]
    os.utime("b", (1, 1))
    assert reads(LATER_NS, LATER_NS) == [1, 0]
    durable.replace_whole(here() / "c/d", b"THREE")
    os.utime("c/d", (1, 1))
    assert reads(LATER_NS, LATER_NS) == [1, 0]


def test_a_change_that_keeps_size_and_time_is_seen() -> None:
    """A file rewritten to the same size with its time of last change set back is read again."""
    make({"a": "one"})
    before = Path("a").stat()
    assert shown(project.snapshot(here(), known())) == {"a": "one"}
    Path("a").write_text("two", encoding="utf-8")
    os.utime("a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert project.snapshot(here(), known()).tree.entries[0].sha256 == sha256("two")


def reads(*ahead_ns: int) -> list[int]:
    """How many files each of some snapshots reads, by clocks that are so much ahead."""
    made = [(hashes := known(ahead), project.snapshot(here(), hashes)) for ahead in ahead_ns]
    return [hashes.read for hashes, _ in made]


def test_a_young_file_is_read_again() -> None:
    """What was changed less than 2 s before it was read, or later, is not remembered: it could change unseen."""
    make({"a": "one"})
    assert reads(0, 0, 1_500_000_000, 2_500_000_000, 2_500_000_000) == [1, 1, 1, 1, 0]
    os.utime("a", (time.time() + 1e6, time.time() + 1e6))
    assert reads(LATER_NS, LATER_NS) == [1, 1]


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"[]", b"\xff", b'{"%s": 5}', b'{"%s": [3, 1]}', b'{"%s": [1, 2, 3, 4, "x", 9]}', b'{"%s": {"a": 1}}'],
)
def test_damaged_hashes_are_made_anew(damaged: bytes) -> None:
    """Whatever became of the file of hashes, files are read and it is whole again."""
    make({"a": "one"})
    path = config.state_folder() / "hashes.json"
    path.write_bytes(damaged.replace(b"%s", os.fsencode(here() / "a")))
    assert shown(project.snapshot(here(), known())) == {"a": "one"}
    assert reads(LATER_NS) == [0]


def test_a_hash_that_is_none_is_not_believed() -> None:
    """Something else than a SHA-256 in the file of hashes is not taken for one."""
    make({"a": "one"})
    path = config.state_folder() / "hashes.json"
    reads(LATER_NS)
    path.write_bytes(path.read_bytes().replace(sha256("one").encode(), b"x"))
    assert reads(LATER_NS, LATER_NS) == [1, 0]


def test_hashes_that_nobody_asks_for_are_dropped() -> None:
    """A hash is kept for 30 days after it was last asked for."""
    make({"a": "one", "b": "two"})
    day_ns = 86_400 * 10**9
    project.snapshot(here(), known())
    Path("b").unlink()
    for day in (29, 58, 59):
        project.snapshot(here(), known(day * day_ns))
        kept = json.loads((config.state_folder() / "hashes.json").read_bytes())
        assert sorted(Path(name).name for name in kept) == (["a", "b"] if day == 29 else ["a"])


def test_hashes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many hashes are kept; those asked for last stay."""
    monkeypatch.setattr(project, "_KEPT_MAX", 3)
    make({f"old/{number}": "x" for number in range(3)})
    project.snapshot(here() / "old", known())
    make({f"new/{number}": "x" for number in range(2)})
    project.snapshot(here() / "new", known(LATER_NS + 86_400 * 10**9))
    kept = json.loads((config.state_folder() / "hashes.json").read_bytes())
    assert sorted(Path(name).parent.name for name in kept) == ["new", "new", "old"]


def test_no_hashes_can_be_kept_and_all_goes_on() -> None:
    """Where the hashes cannot be written, a snapshot is made all the same."""
    make({"a": "one"})
    hashes = Hashes(config.state_folder() / "other" / "hashes.json", lambda: time.time_ns() + LATER_NS)
    assert shown(project.snapshot(here(), hashes)) == {"a": "one"}


def meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int], object]) -> list[int]:
    """Have something happen each time a file has been read and before it is looked at again."""
    calls: list[int] = []
    real = hashlib.file_digest

    def digest(*words: object) -> object:
        found = real(*words)  # type: ignore[arg-type]
        calls.append(len(calls))
        happens(len(calls))
        return found

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return calls


def test_a_file_that_changes_while_it_is_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of a file that grew while it was read is that of what it has become."""
    make({"a": "one"})
    calls = meanwhile(monkeypatch, lambda call: call == 1 and make({"a": "longer"}))
    made = project.snapshot(here(), known())
    assert made.tree.entries == (Entry("a", 6, sha256("longer")),)
    assert len(calls) == 2


def test_a_file_that_keeps_changing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes three times while it is read ends the snapshot with its name."""
    make({"a": "one"})
    calls = meanwhile(monkeypatch, lambda call: make({"a": "x" * call}))
    with pytest.raises(ConfigError, match=f"{here() / 'a'} changes while it is read. Nothing was started"):
        project.snapshot(here(), known())
    assert len(calls) == 3


def test_a_file_that_is_replaced_while_others_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that disappears between the listing and the reading is no error: what is there then is taken."""
    make({"a": "one", "b": "two"})
    meanwhile(monkeypatch, lambda call: call == 1 and [Path(name).unlink() for name in "ab"] and make({"c": "three"}))
    assert shown(project.snapshot(here(), known())) == {"c": "three"}


def test_files_that_keep_disappearing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """When files come and go at every try, the snapshot ends with the name of one."""
    make({"a0": "", "b0": ""})

    def swap(call: int) -> None:
        for name in "ab":
            Path(f"{name}{call - 1}").unlink()
            make({f"{name}{call}": ""})

    meanwhile(monkeypatch, swap)
    with pytest.raises(ConfigError, match=r"/[ab]2 disappeared while it was read. Nothing was started"):
        project.snapshot(here(), known())


@pytest.mark.parametrize("name", ["a/b", "a"])
def test_what_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A file or folder that may not be read ends the snapshot with its name, before anything starts."""
    make({"a/b": "one"})
    function = "open" if name == "a/b" else "scandir"
    real = getattr(os, function)

    def denying(path: str | bytes | Path, *words: object, **more: object) -> object:
        if os.fsencode(path).rstrip(b"/") == os.fsencode(here() / name):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *words, **more)

    monkeypatch.setattr(os, function, denying)
    for made in (lambda: project.snapshot(here(), known()), lambda: project.tree_of(here() / "a", known())):
        with pytest.raises(ConfigError, match=f"{here() / name} cannot be read: Permission denied. Nothing"):
            made()


def test_the_state_folder_never_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder with our keys and records stays, even where it lies in the project."""
    monkeypatch.setenv("GPU_HOME", str(here() / "state"))
    make({"state/machines/box/key": "secret", "a": "one"})
    made = project.snapshot(here(), known())
    assert shown(made) == {"a": "one"}
    assert [(left.path, left.rule) for left in made.left_out] == [("state", "(gpu's own folder)")]


def test_what_is_needed_is_found_whatever_the_rules_say() -> None:
    """A needed file or folder travels in full although ignore files leave it out, its links followed."""
    make({".gitignore": "*.pt\ndata/\n", "ckpt.pt": "weights", "../elsewhere/big": "outside", "code/x": "code"})
    make({"data/a": "1", "data/.gitignore": "*\n", "data/sub/__pycache__/b": "2", "data/.git/config": ""})
    Path("data/linked").symlink_to(here().parent / "elsewhere")
    Path("data/first").symlink_to("a")
    Path("link.pt").symlink_to("ckpt.pt")
    needs = project.needed(here(), here(), ["ckpt.pt", "data", "link.pt", "./ckpt.pt"], known())
    in_data = {".gitignore": "*\n", "a": "1", "first": "1", "linked/big": "outside", "sub/__pycache__/b": "2"}
    assert [(need.name, need.is_file, shown(need)) for need in needs] == [
        ("ckpt.pt", True, {"ckpt.pt": "weights"}),
        ("data", False, in_data),
        ("link.pt", True, {"link.pt": "weights"}),
    ]
    assert [[path for path, _ in need.paths] for need in needs[:2]] == [
        ["ckpt.pt"],
        ["data/.gitignore", "data/a", "data/first", "data/linked/big", "data/sub/__pycache__/b"],
    ]


def test_names_are_those_of_the_folder_they_were_typed_in() -> None:
    """A needed name counts from the working folder, also upwards or by its full path, as long as it stays inside."""
    make({"sub/here.pt": "1", "up.pt": "2", "other/x.pt": "3"})
    names = ["here.pt", "../up.pt", str(here() / "other"), ".."]
    needs = project.needed(here(), here() / "sub", names, known())
    assert [need.name for need in needs] == ["sub/here.pt", "up.pt", "other", "."]
    assert [path for path, _ in needs[3].paths] == ["other/x.pt", "sub/here.pt", "up.pt"]


@pytest.mark.parametrize("name", ["/etc/hosts", "..", "../../x", "sub/../../x", "../here-too/x", ""])
def test_a_name_outside_the_project_is_refused(name: str) -> None:
    """A needed name that leads out of the project is wrong usage, with what to do instead."""
    with pytest.raises(UsageError, match="Nothing was started") as said:
        project.needed(here(), here(), [name], known())
    assert said.value.hint


def test_all_that_is_missing_is_named() -> None:
    """Every needed name that leads to nothing, also by a broken link, is in the one error, before anything starts."""
    make({"there": "1"})
    Path("broken").symlink_to("nothing")
    with pytest.raises(ConfigError, match=r"^a\.pt does not exist\. Nothing was started\.$"):
        project.needed(here(), here(), ["there", "a.pt"], known())
    with pytest.raises(ConfigError, match=r"^a\.pt, sub/b, broken do not exist\. Nothing was started\.$"):
        project.needed(here(), here(), ["a.pt", "there", "sub/b", "broken"], known())
    assert project.lacking(here(), here(), ["a.pt", "there", "sub/b", "broken"]) == ["a.pt", "sub/b", "broken"]


def test_a_folder_or_file_from_elsewhere_is_a_tree() -> None:
    """A model's folder outside the project is a tree of all in it; a single file is one entry with its base name."""
    make({"../blobs/1": "weights", "../model/config.json": "{}", "../model/.gitignore": "*"})
    (here().parent / "model/model.safetensors").symlink_to("../blobs/1")
    model = project.tree_of(here().parent / "model", known())
    assert shown(model) == {".gitignore": "*", "config.json": "{}", "model.safetensors": "weights"}
    assert shown(project.tree_of(Path("../model/config.json"), known())) == {"config.json": "{}"}
    with pytest.raises(ConfigError, match=r"nowhere does not exist\. Nothing was started"):
        project.tree_of(Path("../nowhere"), known())


def test_an_empty_folder_is_an_empty_tree() -> None:
    """A needed folder with no file in it is a tree with no entry."""
    Path("empty/sub").mkdir(parents=True)
    (need,) = project.needed(here(), here(), ["empty"], known())
    assert (need.name, need.tree.entries, need.is_file) == ("empty", (), False)


def test_what_cannot_travel_although_it_is_needed_is_named() -> None:
    """In a needed folder, a pipe, a broken link, a link in a circle or an unsafe name is an error, never left out."""
    os.mkfifo("pipe")
    Path("folder").mkdir()
    faults: dict[str, Callable[[], object]] = {
        r"x' cannot travel \(not a regular file\)": lambda: os.mkfifo("folder/x"),
        r"/folder/x is a link to something that does not exist": lambda: Path("folder/x").symlink_to("nothing"),
        r"/folder/x is a link to a folder that it lies in": lambda: Path("folder/x").symlink_to("."),
        r"/folder/x cannot be read: Too many levels": lambda: Path("folder/x").symlink_to("x"),
        r"n\\nx' cannot travel \(a name": lambda: make({"folder/n\nx": ""}),
    }
    for said, fault in faults.items():
        fault()
        with pytest.raises(ConfigError, match=f"{said}.* Nothing was started"):
            project.needed(here(), here(), ["folder"], known())
        for path in Path("folder").iterdir():
            path.unlink()
    with pytest.raises(ConfigError, match=r"pipe' cannot travel \(not a regular file\)"):
        project.needed(here(), here(), ["pipe"], known())


def test_a_folder_behind_two_links_is_no_circle() -> None:
    """Two links to one folder are followed both; only a folder that lies in itself is refused."""
    make({"data/v1/x": "1"})
    Path("data/a").symlink_to("v1")
    Path("data/b").symlink_to("v1")
    (need,) = project.needed(here(), here(), ["data"], known())
    assert shown(need) == {"a/x": "1", "b/x": "1", "v1/x": "1"}


def test_what_is_needed_lies_where_the_links_of_the_code_lead() -> None:
    """Laid over the code, needed files behind links that travel go where these lead, so that both names work."""
    make({".gitignore": "*.pt\n", "runs/7/config": "c", "runs/7/model.pt": "m", "own.pt": "o", "runs/z/x.pt": "x"})
    links = {"latest": "runs/7", "deep/latest": "../latest", "around": "latest/../z", "file.pt": "own.pt"}
    for name, target in links.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(target)
    code = project.snapshot(here(), known())
    needs = project.needed(here(), here(), ["latest/model.pt", "deep", "own.pt", "around/x.pt", "file.pt"], known())
    over = project.placed(code.tree, needs)
    assert shown(over) == {
        "own.pt": "o",
        "runs/7/config": "c",
        "runs/7/model.pt": "m",
        "runs/z/x.pt": "x",
        "file.pt": "o",
    }
    both = {entry.path: entry for entry in (*code.tree.entries, *over.tree.entries)}
    assert Tree.from_entries(both.values()).entries, "the two fit together"


@pytest.mark.parametrize("target", ["a", "a/b", "a/../a"])
def test_links_in_a_circle_are_not_followed_for_ever(target: str) -> None:
    """A link of the code that leads to itself ends the search for where it leads."""
    Path("a").symlink_to(target)
    code = project.snapshot(here(), known())
    need = project.Need(Tree((Entry("x", 0, sha256("")),)), {}, "a/x", True)
    assert len(project.placed(code.tree, [need]).tree.entries) == 1

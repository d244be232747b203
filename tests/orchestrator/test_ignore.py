"""What travels: ignore files mean what git takes them for; what cannot or must not travel stays, with its reason."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from orchestrator import ignore

GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "XDG_CONFIG_HOME": os.devnull}
"""So that git, too, knows only what lies in the project."""
PARTS = st.sampled_from(["a", "b", "ab", "a.pt", "b.pt", "x y", "é", "[a]", "#a", "!a", "a-b", "]", "\\", "1"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
BEGINNINGS = st.sampled_from(["", "!", "/", "!/"])
ENDS = st.sampled_from(["", "/", "/*", "/**", "/**/", " "])
ODD = ["*", "!*", "*/", "!*/", "/*", "**", "*.pt", "!*.pt", "", " ", "#", "!", "/", "a \\ ", "a\t", "\\", "a\0b", "#a"]
LINES = st.tuples(BEGINNINGS, PATHS, ENDS).map("".join) | PATHS | st.sampled_from(ODD)
IGNORE_FILES = st.builds(
    lambda lines, end: end.join(lines), st.lists(LINES, max_size=6), st.sampled_from(["\n", "\r\n"])
)
NAMES = [
    "a",
    "b",
    "c",
    "ab",
    "aab",
    "-",
    "]",
    "^",
    "!",
    "[",
    "\\",
    ":",
    "1",
    "é",
    "B",
    "a b",
    "d/a",
    "d/b",
    "d/e/a",
    "da/b",
]
"""What each pattern is tried on."""
SIGNS = [*"abd1é-]!^:[\\ /?*", "*", "/**/", "**/", "/**", "**", "[ab]", "[!ab]", "[^/]", "[!a-]", "[a-c]", "[c-ab]"]
SIGNS += ["[\\]a]", "[a\\-c]", "[a-\\c]", "[[:alpha:]]", "[[:nope:]]", "[[:]", "[[:digit:]b]", "[[:upper:]-b]", "[]a]"]
SIGNS += ["[a-[:digit:]]", "[!]a]", "[^[:punct:]]", "[[:alnum]", "[a", "[--b]", "[a-]", "\\a", "d/", "/a", "d**/b"]
PATTERNS = st.lists(st.sampled_from(SIGNS), min_size=1, max_size=5).map("".join)
BOUNDED = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a difference names its rule; to shrink it takes minutes
)


def git(folder: Path, *words: str, said: bytes = b"") -> bytes:
    words = ("git", "-C", str(folder), *words)
    return subprocess.run(words, input=said, env=os.environ | GIT, stdout=subprocess.PIPE, check=False).stdout


def make(folder: Path, files: Mapping[str, str] | Iterable[str]) -> None:
    """Files below a folder, by path: with this content, or empty ones."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name].encode() if isinstance(files, Mapping) else b"")


def decided(folder: Path) -> dict[str, str]:
    """For every file, what git says of it: the rule that excludes it, empty when none does."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if ".git" not in path.parts]
    asked = "\0".join(paths).encode()
    fields = git(folder, "check-ignore", "-v", "--no-index", "--non-matching", "-z", "--stdin", said=asked)
    words = [word.decode() for word in fields.split(b"\0")[:-1]]
    said = {}
    for source, line, pattern, path in zip(*(words[start::4] for start in range(4)), strict=True):
        said[path] = f"{source}:{line}: {pattern}" if pattern and not pattern.startswith("!") else ""
    return {path: rule for path, rule in said.items() if (folder / path).is_file()}


def found(folder: Path) -> dict[str, str]:
    """For every file, what we say of it: the rule that leaves it or a folder above it out, empty when it travels."""
    walked = ignore.walk(folder)
    left = {entry.path: entry.rule for entry in walked.left_out}
    said = dict.fromkeys((file.path for file in walked.files), "")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and ".git" not in path.parts and name not in said:
            above = [name, *(parent.as_posix() for parent in Path(name).parents)]
            said[name] = next(left[part] for part in above if part in left)
    return said


def rules(folder: Path, own: Path | None = None) -> dict[str, str]:
    """What is left out, and the rule for each, but for git's own folder."""
    return {left.path: left.rule for left in ignore.walk(folder, own).left_out if left.rule != ignore.GIT}


def travelling(folder: Path) -> list[str]:
    return sorted(file.path for file in ignore.walk(folder).files)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the same files in each of 20 folders."""
    folder = tmp_path_factory.mktemp("many")
    git(folder, "init", "-q")
    make(folder, [f"{number}/{name}" for number in range(20) for name in NAMES])
    return folder


@BOUNDED
@given(patterns=st.lists(PATTERNS, min_size=20, max_size=20))
def test_a_pattern_matches_what_it_matches_for_git(many: Path, patterns: list[str]) -> None:
    """Whatever signs a pattern is made of, it leaves out the files that git leaves out with it, under the same rule."""
    make(many, {f"{number}/.gitignore": pattern for number, pattern in enumerate(patterns)})
    assert found(many) == decided(many)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that is emptied for each example."""
    folder = tmp_path_factory.mktemp("project")
    git(folder, "init", "-q")
    return folder


@BOUNDED
@given(
    files=st.lists(PATHS, min_size=1, max_size=12),
    texts=st.dictionaries(st.sampled_from(["", "a/", "ab/", "a/b/", "b/"]), IGNORE_FILES, min_size=1, max_size=3),
    exclude=IGNORE_FILES,
)
def test_ignore_files_mean_what_git_takes_them_for(
    project: Path, files: list[str], texts: dict[str, str], exclude: str
) -> None:
    """In any tree with any ignore files at any level, what travels and the rule against all else are git's own."""
    for entry in project.iterdir():
        if entry.name != ".git":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    make(project, {".git/info/exclude": exclude})
    for name in files:
        if not any((project / part).is_file() for part in Path(name).parents) and not (project / name).exists():
            make(project, [name])
    make(project, {f"{folder}.gitignore": text for folder, text in texts.items() if (project / folder).is_dir()})
    assert found(project) == decided(project)


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("data/**\n!data/keep\n", ["data/keep", "data/big", "data/more/keep"]),
        ("data/\n!data/keep\n", ["data/keep"]),
        ("\ufeff*.pt\n", ["a.pt", "a.py"]),
        ("*.pt   \n", ["a.pt"]),
        ("a/**/\n", ["a/b", "a/c/d"]),
        ("/*\n!/src\n", ["src/a", "b/c", "d"]),
        ("?.pt\n", ["é.pt", "e.pt"]),
        ("/a[!x]b\n", ["a/b", "ayb", "axb"]),
        ("run**/log\n", ["run1/2/log", "run1/log", "run/log", "runlog/x", "other/run/log"]),
        ("*.pt", ["x.pt/y", "z/x.pt"]),
    ],
)
def test_well_known_traps_are_as_git_has_them(tmp_path: Path, pattern: str, files: list[str]) -> None:
    """Where other readers of ignore files go wrong, the answer is git's."""
    git(tmp_path, "init", "-q", "repo")
    make(tmp_path / "repo", {".gitignore": pattern})
    make(tmp_path / "repo", files)
    assert found(tmp_path / "repo") == decided(tmp_path / "repo")


def test_a_linked_worktree_has_the_exclude_file_of_its_repository(tmp_path: Path) -> None:
    """In a linked worktree, where `.git` is a file, `.git/info/exclude` of the repository counts."""
    main, linked = tmp_path / "main", tmp_path / "linked"
    main.mkdir()
    git(main, "init", "-q")
    git(main, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first")
    git(main, "worktree", "add", "-q", str(linked))
    make(main, {".git/info/exclude": "*.pt\n"})
    make(linked, ["a.pt", "a.py"])
    assert rules(linked) == {"a.pt": ".git/info/exclude:1: *.pt"}
    assert travelling(linked) == ["a.py"]


def test_gpuignore_has_the_last_word_in_its_folder() -> None:
    """`.gpuignore` leaves out more, and brings back what `.gitignore` of the same folder or above leaves out."""
    here = Path.cwd()
    make(here, {".gitignore": "*.pt\n*.log\n", ".gpuignore": "!ckpt.pt\nnotes/\n", "sub/.gpuignore": "!*.log\n"})
    make(here, ["ckpt.pt", "other.pt", "a.log", "notes/x", "sub/a.log", "sub/b.pt"])
    assert rules(here) == {
        "other.pt": ".gitignore:1: *.pt",
        "sub/b.pt": ".gitignore:1: *.pt",
        "a.log": ".gitignore:2: *.log",
        "notes": ".gpuignore:2: notes/",
    }
    assert travelling(here) == [".gitignore", ".gpuignore", "ckpt.pt", "sub/.gpuignore", "sub/a.log"]


def test_gpuignore_brings_nothing_back_below_an_excluded_folder() -> None:
    """What lies in an excluded folder stays, whatever is said of it; the folder itself can be brought back."""
    here = Path.cwd()
    make(here, {".gitignore": "data/\nmore/\n", ".gpuignore": "!data/keep\n!more/\n"})
    make(here, ["data/keep", "more/x"])
    assert rules(here) == {"data": ".gitignore:1: data/"}


def test_what_is_never_code_stays(tmp_path: Path) -> None:
    """Git's folder, virtual environments, compiled Python, runs and our own folder stay, even against a `!` rule."""
    here = Path.cwd()
    make(here, [".git/config", "sub/.git", "env/pyvenv.cfg", "env/bin/python", "a/__pycache__/a.pyc", "a/a.py"])
    make(here, ["results/r1/run.json", "results/r1/job.json", "results/r1/rows.jsonl", "results/r2/run.json"])
    make(here, {"state/key": "secret", ".gpuignore": "!*\n!__pycache__/\n!env/\n!state/\n!.git\n"})
    left = {entry.path: entry.rule for entry in ignore.walk(here, here / "state").left_out}
    assert left == {
        ".git": "(git's own folder)",
        "sub/.git": "(git's own folder)",
        "env": "(a virtual environment)",
        "a/__pycache__": "(compiled Python)",
        "results/r1": "(a run's folder)",
        "state": "(gpu's own folder)",
    }


def test_a_project_may_itself_look_like_what_stays() -> None:
    """The project's own folder travels, even when a `pyvenv.cfg` lies in it or it is called `__pycache__`."""
    here = Path.cwd() / "__pycache__"
    make(here, ["pyvenv.cfg", "run.json", "job.json", "a.py"])
    assert travelling(here) == ["a.py", "job.json", "pyvenv.cfg", "run.json"]


def test_what_is_no_file_stays() -> None:
    """Pipes and sockets stay, and are not opened."""
    here = Path.cwd()
    os.mkfifo(here / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket")
        assert rules(here) == dict.fromkeys(["pipe", "socket"], "(not a regular file)")


@pytest.mark.parametrize(
    ("link", "target", "rule"),
    [
        ("a/link", "b", ""),
        ("a/link", "../x/y", ""),
        ("a/link", "nothing", ""),
        ("link", "a/../a/./b", ""),
        ("link", "link", ""),
        ("link", "..", ignore.OUTSIDE),
        ("a/link", "../../x", ignore.OUTSIDE),
        ("a/link", "../../here/x", ignore.OUTSIDE),
        ("link", "a/../../here/x", ignore.OUTSIDE),
        ("link", "/etc/hosts", ignore.OUTSIDE),
        ("link", "deep/up/..", ignore.OUTSIDE),
        ("link", "a\nb", ignore.NAME),
    ],
)
def test_links_travel_as_links_as_long_as_they_stay_inside(link: str, target: str, rule: str) -> None:
    """A link inside the project travels as a link, broken or not; one that leads out, by name or in truth, stays."""
    here = Path.cwd()
    make(here, ["a/b", "x/y", "deep/z/w"])
    (here / "deep/up").symlink_to("..")
    (here / link).symlink_to(target)
    assert rules(here) == ({link: rule} if rule else {})
    links = {file.path: file.link for file in ignore.walk(here).files if file.link}
    assert links == {"deep/up": "..", **({} if rule else {link: target})}


def test_an_absolute_link_into_the_project_stays() -> None:
    """A link by an absolute path stays, even to a file of the project: that path is another one on a machine."""
    make(Path.cwd(), ["a"])
    Path("link").symlink_to(Path.cwd() / "a")
    assert rules(Path.cwd()) == {"link": ignore.OUTSIDE}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"new\nline", "new\\nline"),
        (b"\xff\xfe.txt", "\\xff\\xfe.txt"),
        (b"\x1b[2J", "\\x1b[2J"),
        ("rtl\u202e".encode(), "rtl\\u202e"),
    ],
)
def test_a_name_that_cannot_travel_stays(name: bytes, shown: str) -> None:
    """Names with control characters, or that are not UTF-8, stay, folders as a whole; they are shown by escapes."""
    path = Path(os.fsdecode(name))
    for part in (path, "folder-" / path / "x"):
        part.parent.mkdir(exist_ok=True, parents=True)
        part.write_bytes(b"12345")
    left = {entry.path: (entry.rule, entry.size) for entry in ignore.walk(Path.cwd()).left_out}
    assert left == {shown: (ignore.NAME, 5), f"folder-/{shown}": (ignore.NAME, 5)}
    assert not ignore.walk(Path.cwd()).files


def test_a_rule_is_shown_without_control_characters() -> None:
    """What an ignore file says is shown by escapes where it would move a terminal's cursor."""
    make(Path.cwd(), {".gitignore": "[\x1bx]\x07*\nb\n", "b": ""})
    make(Path.cwd(), ["x\x07"])
    assert rules(Path.cwd()) == {"x\\x07": ".gitignore:1: [\\x1bx]\\x07*", "b": ".gitignore:2: b"}


def test_an_ignore_file_that_is_a_link_says_nothing() -> None:
    """As with git, rules do not come from behind a link."""
    make(Path.cwd(), {"rules": "*.pt\n", "sub/a.pt": ""})
    Path("sub/.gitignore").symlink_to("../rules")
    assert travelling(Path.cwd()) == ["rules", "sub/.gitignore", "sub/a.pt"]


def test_a_folder_that_stays_is_named_once_with_all_its_bytes() -> None:
    """An excluded folder is one entry; its size is that of all regular files in it, links not followed."""
    make(Path.cwd(), {".gitignore": "data/\n", "data/a": "12", "data/b/c": "345", "data/b/.gitignore": "c\n"})
    Path("data/link").symlink_to(Path.cwd() / "data/a")
    (left,) = ignore.walk(Path.cwd()).left_out
    assert (left.path, left.rule, left.size) == ("data", ".gitignore:1: data/", 7)


def test_an_excluded_folder_is_not_looked_into() -> None:
    """Of a folder that a rule excludes not even the names are read."""
    make(Path.cwd(), {".gitignore": "data/\n", "data/a": ""})
    looked: list[str] = []
    real = os.scandir

    def watched(path: bytes) -> object:
        looked.append(os.fsdecode(path).rpartition("/")[2])
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", watched)
        assert rules(Path.cwd()) == {"data": ".gitignore:1: data/"}
    assert looked == [""]


def test_a_walk_is_fast() -> None:
    """5,000 files in 100 folders under 20 patterns are walked in a quarter of a second of CPU time."""
    lines = ["*.pt", "*.py[cod]", "build/", "dist/", "*.egg-info/", "/data", "wandb/", ".venv", "*.log", "logs/**"]
    lines += [
        "!logs/keep",
        "docs/_build/",
        "*.swp",
        ".DS_Store",
        "**/tmp/*.bin",
        "*~",
        "ckpt/[0-9]*",
        "*.o",
        "?x",
        "/a/b",
    ]
    make(Path.cwd(), {".gitignore": "\n".join(lines)})
    make(Path.cwd(), [f"{folder % 10}/{folder}/{name}.py" for folder in range(100) for name in range(50)])
    ignore.walk(Path.cwd())
    took = []
    for _ in range(3):
        began = time.process_time()
        assert len(ignore.walk(Path.cwd()).files) == 5001
        took.append(time.process_time() - began)
    assert min(took) <= 0.25

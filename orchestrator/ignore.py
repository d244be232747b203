"""What of a project stays at home: `.gitignore` as git reads it, `.gpuignore` after it, and what never travels."""

from __future__ import annotations

import os
import re
import stat
import string
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jobs import trees

GIT = "(git's own folder)"
ENVIRONMENT = "(a virtual environment)"
COMPILED = "(compiled Python)"
RUN = "(a run's folder)"
OURS = "(gpu's own folder)"
SPECIAL = "(not a regular file)"
OUTSIDE = "(a link to outside the project)"
NAME = "(a name that cannot travel)"
_RULE_FILES = (b".gitignore", b".gpuignore")
"""In the order in which they are read: of two lines that match, the later one decides."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TRIMMED = re.compile(rb"((?:\\.|[^\\])*?) *", re.DOTALL)
_CLASSES = {
    "alpha": string.ascii_letters,
    "digit": string.digits,
    "alnum": string.ascii_letters + string.digits,
    "upper": string.ascii_uppercase,
    "lower": string.ascii_lowercase,
    "xdigit": string.hexdigits,
    "punct": string.punctuation,
    "blank": " \t",
    "space": " \t\n\r",
    "graph": string.ascii_letters + string.digits + string.punctuation,
    "print": string.ascii_letters + string.digits + string.punctuation + " ",
    "cntrl": "".join(map(chr, (*range(32), 127))),
}
_NEVER = "(?!)"


@dataclass(frozen=True)
class Found:
    """One file that travels, or one link."""

    path: str
    """Relative to the project, with `/`."""
    where: str
    stat: os.stat_result
    """Of itself: a link is not followed."""
    link: str = ""
    """What it points to; empty for a file."""


@dataclass(frozen=True)
class LeftOut:
    """A file or a whole folder that stays at home, and the rule that says so."""

    path: str
    rule: str
    """Where it stands and what it says (`.gitignore:3: *.pt`), or one of this module's own, in parentheses."""
    where: bytes

    @cached_property
    def size(self) -> int:
        """Bytes of all regular files in it, counted when first asked for; what cannot be read counts as nothing."""
        return _bytes_in(self.where)


@dataclass(frozen=True)
class Walked:
    """What was found below a folder, in no order."""

    files: list[Found]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class _Rule:
    said: str
    keeps: bool
    folders_only: bool
    by_name: bool
    """Whether it is about the last part of a path alone."""
    pattern: str


class _Rules:
    """The rules of one folder, for what lies at any depth below it."""

    def __init__(self, rules: list[_Rule], base: int) -> None:
        self._base = base
        self._rules = [(rule, _compiled([rule])) for rule in reversed(rules)]
        self._about_names = _compiled([rule for rule in rules if rule.by_name])
        self._about_paths = _compiled([rule for rule in rules if not rule.by_name])

    def deciding(self, path: bytes, name: bytes, is_folder: bool) -> _Rule | None:
        """The last rule that matches; None when none does."""
        if self._about_names.fullmatch(name) or self._about_paths.fullmatch(path, self._base):
            for rule, regex in self._rules:
                if is_folder or not rule.folders_only:
                    matched = regex.fullmatch(name) if rule.by_name else regex.fullmatch(path, self._base)
                    if matched:
                        return rule
        return None


def walk(root: Path, own: Path | None = None) -> Walked:
    """What lies below `root` and travels, and what stays: an excluded folder is named once and not looked into.

    `own` is a folder of ours that never travels, wherever it lies. Raises OSError for what cannot be read.
    """
    walking = _Walk(root, own)
    pending = [(b"", _rules_of_git(root))]
    while pending:
        prefix, rules = pending.pop()
        pending += walking.folder(prefix, rules)
    return Walked(walking.files, walking.left_out)


class _Walk:
    """A walk under way."""

    def __init__(self, root: Path, own: Path | None) -> None:
        self.files: list[Found] = []
        self.left_out: list[LeftOut] = []
        self._top = os.fsencode(root).rstrip(b"/") + b"/"  # bytes: a name need not be text
        self._real = os.path.realpath(self._top).rstrip(b"/") + b"/"
        self._own = os.path.realpath(os.fsencode(own)) if own else b""

    def folder(self, prefix: bytes, rules: tuple[_Rules, ...]) -> list[tuple[bytes, tuple[_Rules, ...]]]:
        """Sort what lies directly in a folder; returns the folders in it that are to be looked into, with rules."""
        with os.scandir(self._top + prefix) as scan:
            entries = list(scan)
        names = {entry.name for entry in entries}
        if prefix and (why := _by_content(names)):
            self._leave(prefix[:-1], why)
            return []
        if own := _rules_in(self._top, prefix, names):
            rules = (_Rules(own, len(prefix)), *rules)
        folders = []
        for entry in entries:
            path = prefix + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if why := self._rule_against(path, entry, rules):
                self._leave(path, why)
            elif is_folder:
                folders.append((path + b"/", rules))
            else:
                self._take(path.decode(), entry)
        return folders

    def _rule_against(self, path: bytes, entry: os.DirEntry[bytes], rules: tuple[_Rules, ...]) -> str:
        """The rule that keeps this at home, empty when none does."""
        if entry.name == b".git":
            return GIT
        is_folder = entry.is_dir(follow_symlinks=False)
        for level in rules:
            if rule := level.deciding(path, entry.name, is_folder):
                if not rule.keeps:
                    return rule.said
                break
        if not _is_text(path):
            return NAME
        if is_folder:
            if self._real + path == self._own:
                return OURS
            return COMPILED if entry.name == b"__pycache__" else ""
        if entry.is_symlink():
            return self._rule_against_link(path)
        return "" if entry.is_file(follow_symlinks=False) else SPECIAL

    def _rule_against_link(self, path: bytes) -> str:
        target = _target(self._top + path)
        if not target.isprintable():
            return NAME
        inside = (os.path.realpath(self._top + path) + b"/").startswith(self._real)
        return "" if inside and _stays_inside(path, target) else OUTSIDE

    def _take(self, path: str, entry: os.DirEntry[bytes]) -> None:
        where = os.fsdecode(entry.path)
        link = _target(entry.path) if entry.is_symlink() else ""
        self.files.append(Found(path, where, entry.stat(follow_symlinks=False), link))

    def _leave(self, path: bytes, why: str) -> None:
        self.left_out.append(LeftOut(_shown(path), why, self._top + path))


def _by_content(names: set[bytes]) -> str:
    """The rule that keeps a folder with these names in it at home, empty when none does."""
    if b"pyvenv.cfg" in names:
        return ENVIRONMENT
    return RUN if {b"run.json", b"job.json"} <= names else ""


def _is_text(path: bytes) -> bool:
    try:
        return trees.is_safe_path(path.decode())
    except UnicodeDecodeError:
        return False


def _shown(name: bytes) -> str:
    """A name, or a rule, as a terminal may have it: what is not UTF-8 or moves the cursor stands as an escape."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _target(link: bytes) -> str:
    return os.fsdecode(os.readlink(link))  # noqa: PTH115 -- of bytes


def _stays_inside(path: bytes, target: str) -> bool:
    """Whether a link, followed name by name from its folder, never leaves the project: what a tree may hold."""
    depth = path.count(b"/")
    for part in target.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            return False
    return not target.startswith("/")


def _bytes_in(where: bytes) -> int:
    total, pending = 0, [where]
    while pending:
        path = pending.pop()
        try:
            about = os.lstat(path)
            if stat.S_ISREG(about.st_mode):
                total += about.st_size
            elif stat.S_ISDIR(about.st_mode):
                with os.scandir(path) as scan:
                    pending += [entry.path for entry in scan]
        except OSError:
            continue
    return total


def _rules_of_git(root: Path) -> tuple[_Rules, ...]:
    """The rules of `.git/info/exclude`, which every `.gitignore` may overrule."""
    dot = root / ".git"
    if dot.is_file():  # a linked worktree, or a submodule: it says where the folder is
        dot = root / dot.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("gitdir:").strip()
        common = dot / "commondir"
        if common.is_file():
            dot = dot / common.read_text(encoding="utf-8", errors="surrogateescape").strip()
    exclude = dot / "info" / "exclude"
    if not exclude.is_file():
        return ()
    return (_Rules(_parsed(exclude.read_bytes(), ".git/info/exclude"), 0),)


def _rules_in(top: bytes, prefix: bytes, names: set[bytes]) -> list[_Rule]:
    """The rules that stand in a folder, in the order in which they are read; as with git, not in a link."""
    rules = []
    for name in _RULE_FILES:
        where = top + prefix + name
        if name in names and stat.S_ISREG(os.lstat(where).st_mode):
            content = Path(os.fsdecode(where)).read_bytes()
            rules += _parsed(content, _shown(prefix + name))
    return rules


def _parsed(content: bytes, said: str) -> list[_Rule]:
    """The rules in the content of an ignore file, line by line as git takes it apart."""
    rules = []
    for number, line in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        if line and not line.startswith(b"#"):
            line = line.partition(b"\0")[0].removesuffix(b"\r")
            trimmed = _TRIMMED.fullmatch(line)
            text = (trimmed[1] if trimmed else line).decode("latin-1")
            if text:
                rules.append(_rule(text, f"{said}:{number}: {_shown(text.encode('latin-1'))}"))
    return rules


def _rule(text: str, said: str) -> _Rule:
    keeps = text.startswith("!")
    text = text[keeps:]
    folders_only = text.endswith("/")
    text = text.removesuffix("/")
    by_name = "/" not in text
    return _Rule(said, keeps, folders_only, by_name, _translated(text.removeprefix("/")))


def _compiled(rules: list[_Rule]) -> re.Pattern[bytes]:
    """One expression for all of them: it matches what one of them matches."""
    union = "|".join(f"(?:{rule.pattern})" for rule in rules) or _NEVER
    return re.compile(union.encode("latin-1"), re.DOTALL)


def _translated(glob: str) -> str:
    """The regular expression for a pattern of git, whose bytes stand as characters (Latin-1); see its wildmatch.c.

    Not by pathspec: asked about a folder, it lets `data/**` exclude `data` itself, and so what `!data/keep` keeps.
    """
    parts, at = [], 0
    literal = re.match(r"[^*?\[\\]*", glob)
    begins = literal.end() if literal else 0
    while at < len(glob):
        sign = glob[at]
        if sign == "*":
            part, at = _stars(glob, at, begins)
        elif sign == "[":
            part, at = _bracket(glob, at + 1)
        elif sign == "\\":
            part, at = (re.escape(glob[at + 1]) if at + 1 < len(glob) else _NEVER), at + 2
        else:
            part, at = ("[^/]" if sign == "?" else re.escape(sign)), at + 1
        parts.append(part)
    return "".join(parts)


def _stars(glob: str, at: int, begins: int) -> tuple[str, int]:
    """What the stars at `at` mean, and where they end: two stand for folders where they are a whole part of a path.

    `begins`: git compares what comes before the first special character by itself, and takes what follows for a start.
    """
    end = at
    while glob[end : end + 1] == "*":
        end += 1
    opens = at == begins or glob[at - 1] == "/"
    if end - at > 1 and opens and (end == len(glob) or glob.startswith(("/", "\\/"), end)):
        return ("(?:.*/)?", end + 1) if glob.startswith("/", end) else (".*", end)
    return "[^/]*", end


def _bracket(glob: str, at: int) -> tuple[str, int]:
    """One of the characters from `at` up to the closing bracket, never a slash, and where that ends."""
    negated = glob.startswith(("!", "^"), at)
    found = _members(glob, at + negated)
    if found is None:  # not closed, or with a class that there is not: git matches nothing with it
        return _NEVER, len(glob)
    members, end = found
    if negated:
        members = {chr(code) for code in range(256)} - members
    listed = "".join(f"\\x{ord(sign):02x}" for sign in sorted(members - {"/"}))
    return (f"[{listed}]" if listed else _NEVER), end


def _members(glob: str, at: int) -> tuple[set[str], int] | None:
    """The characters of a bracket expression whose first stands at `at`, and where it ends; None when it is none."""
    members: set[str] = set()
    before, start = "", at
    while (sign := glob[at : at + 1]) != "]" or at == start:
        if sign == "-" and before and glob[at + 1 : at + 2] not in ("", "]"):
            at += 2 if glob[at + 1] == "\\" else 1
            members.update(map(chr, range(ord(before), ord(glob[at : at + 1] or "\0") + 1)))
            before = ""
        elif sign == "[" and (named := re.compile(r"\[:([^\]]*):\]").match(glob, at)):
            if named[1] not in _CLASSES:
                return None
            members.update(_CLASSES[named[1]])
            before, at = "", named.end() - 1
        else:
            at += sign == "\\"
            before = glob[at : at + 1]
            members.add(before)
        if at >= len(glob):
            return None
        at += 1
    return members, at + 1

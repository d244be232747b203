"""A tree: the files of a folder by name, size and SHA-256, and one digest over all of them; safe names only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from jobs import spec

_PART_MAX_BYTES = 255
_PATH_MAX_BYTES = 4096
_LINKS_MAX = 40
_HEX = frozenset("0123456789abcdef")


class BadTree(ValueError):
    """A document is not a tree, or a name in it points elsewhere; the message says which."""


def is_safe_path(path: str) -> bool:
    """Whether a relative path stays inside its folder and on its line: no `..`, no root, no control character."""
    parts = path.split("/")
    return (
        all(part not in ("", ".", "..") and len(_bytes(part)) <= _PART_MAX_BYTES for part in parts)
        and len(_bytes(path)) <= _PATH_MAX_BYTES
        and path.isprintable()
    )


def is_sha256(text: object) -> bool:
    """Whether it is a SHA-256 in hex, as files are named by in a store."""
    return isinstance(text, str) and len(text) == 64 and _HEX.issuperset(text)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Entry:
    """One file of a tree, or one symbolic link that stays inside it."""

    path: str
    size: int
    """Bytes; 0 for a link."""
    sha256: str
    """Of the content, in hex; empty for a link."""
    executable: bool = False
    link: str = ""
    """What a link points to, relative to its own folder; empty for a file."""


@dataclass(frozen=True)
class Tree:
    """Entries sorted by path, each path once."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, document: Any) -> Tree:
        """The tree a document stands for; BadTree when it is none, or when a name in it would lead elsewhere."""
        try:
            tree = cls(tuple(Entry(**entry) for entry in document["entries"]))
            paths = [entry.path for entry in tree.entries]
            sound = all(_is_sound(entry) for entry in tree.entries)
        except (TypeError, KeyError, AttributeError):
            raise BadTree("this is no tree") from None
        if not sound or paths != sorted(set(paths)):
            raise BadTree("a tree with a name, a size or a digest that cannot be")
        links = {entry.path: entry.link for entry in tree.entries if entry.link}
        if not all(_lands_inside(links, path) for path in links):
            raise BadTree("a tree with links that lead out of it together")
        folders = {path[:cut] for path in paths for cut, sign in enumerate(path) if sign == "/"}
        if folders.intersection(paths):
            raise BadTree("a tree in which something is a file and a folder")
        return tree

    @classmethod
    def from_entries(cls, entries: Iterable[Entry]) -> Tree:
        """A tree of these entries in any order; BadTree for what `of` would refuse."""
        return cls.of({"entries": [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.path)]})

    def document(self) -> dict[str, Any]:
        """The tree as a JSON object."""
        return {"entries": [asdict(entry) for entry in self.entries]}

    def digest(self) -> str:
        """What names the tree: SHA-256, in hex, over names, contents and modes."""
        lines = [[e.path, e.size, e.sha256, e.executable, e.link] for e in self.entries]
        return spec.digest(lines)

    @property
    def size(self) -> int:
        """Bytes of all its files together."""
        return sum(entry.size for entry in self.entries)


def _is_sound(entry: Entry) -> bool:
    """Whether the fields of an entry have the right types, its name is safe, and a link stays inside the tree."""
    if not (isinstance(entry.path, str) and isinstance(entry.link, str) and is_safe_path(entry.path)):
        return False
    if type(entry.size) is not int or entry.size < 0 or type(entry.executable) is not bool:
        return False
    if entry.link:
        return not entry.sha256 and entry.size == 0 and _stays_inside(entry)
    return is_sha256(entry.sha256)


def _lands_inside(links: dict[str, str], path: str) -> bool:
    """Whether following a path, and every link on its way, as the system does, never leaves the tree."""
    at: list[str] = []
    pending = path.split("/")
    hops = 0
    while pending and hops <= _LINKS_MAX:  # a circle of links leads nowhere, which is inside
        part = pending.pop(0)
        if part == ".." and not at:
            return False
        if part == "..":
            at.pop()
        elif part not in ("", "."):
            at.append(part)
            if target := links.get("/".join(at)):
                hops += 1
                at.pop()
                pending = [*target.split("/"), *pending]
    return True


def _stays_inside(entry: Entry) -> bool:
    """Whether a link, followed name by name from its folder, never leaves the tree."""
    depth = entry.path.count("/")
    if entry.link.startswith("/") or not entry.link.isprintable():
        return False
    for part in entry.link.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            return False
    return True

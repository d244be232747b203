"""What a run takes along: the project's code, the files it needs, and parameters that are paths; by content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import durable
from jobs.trees import BadTree, Tree
from orchestrator import clock, config, machines, project, sync
from orchestrator.errors import ConfigError
from orchestrator.project import Content, Hashes
from orchestrator.transport import Machine

PATHS = ("dataset", "shots_dataset", "mix_dataset", "model", "adapter", "chat_template")
"""Parameters that may be a path: a file or folder that travels, and is called by another name there."""
_SAY_EVERY_S = 2.0
_COPIED_BYTES = 16 << 20
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cargo:
    """All of it. `work`: what a run works in; `params`: for each such parameter its content, and the name in it."""

    work: Content | None = None
    params: dict[str, tuple[Content, str]] = field(default_factory=dict)
    root: str = ""
    """The project here."""
    at_home: bool = False
    """Packed for this computer, where parameters that are paths are used where they are."""

    def contents(self) -> list[Content]:
        """Everything that travels."""
        return [*([self.work] if self.work else []), *(content for content, _ in self.params.values())]

    def save(self, path: Path) -> None:
        """Write it down beside the run: a resume elsewhere sends the same content, or says what has changed."""
        params = {key: [_document(content), name] for key, (content, name) in self.params.items()}
        work = _document(self.work) if self.work else None
        durable.save_json(path, {"work": work, "params": params, "root": self.root, "at_home": self.at_home})

    @classmethod
    def load(cls, path: Path) -> Cargo | None:
        """What was written down; None when the run never had to leave this computer. ConfigError when damaged."""
        document = durable.load_json(path)
        if document is None:
            return None
        try:
            work = _content(document["work"]) if document["work"] else None
            params = {key: (_content(given), name) for key, (given, name) in document["params"].items()}
            return cls(work, params, str(document.get("root", "")), bool(document.get("at_home")))
        except (BadTree, KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(f"{path} is damaged.", "Start the run anew.") from None


def _document(content: Content) -> dict[str, Any]:
    return {"tree": content.tree.document(), "files": {sha256: str(path) for sha256, path in content.files.items()}}


def _content(document: Any) -> Content:
    files = {sha256: Path(path) for sha256, path in document["files"].items()}
    return Content(Tree.of(document["tree"]), files)


def pack(job: dict[str, Any], needs: tuple[str, ...], folder: Path, *, at_home: bool) -> Cargo:
    """What the job takes along from the project around `folder`; raises ConfigError, UsageError for what is missing.

    At home a parameter that is a path is used where it is.
    """
    hashes = project.hashes()
    root = project.root(folder)
    reranker = (job["params"].get("reranker") or "").rpartition(":")[0]
    inside = bool(reranker) and Path(reranker).is_relative_to(root)
    paths = {} if at_home else _paths(job["params"])
    if reranker and not inside and not at_home:
        paths["reranker"] = reranker
    code = job["story"] == "command" or (inside and not at_home)
    work = _work(root, folder, needs, hashes, code=code) if code or needs else None
    params = {key: _of_path(Path(path), hashes) for key, path in paths.items()}
    return Cargo(work, params, str(root), at_home)


def _paths(params: dict[str, Any]) -> dict[str, str]:
    """The parameters that were found to be paths: planning has made those absolute."""
    return {
        key: value
        for key, value in params.items()
        if may_be_path(key) and isinstance(value, str) and value.startswith("/")
    }


def may_be_path(key: str) -> bool:
    """Whether a parameter, of a part of the job too, may be a path."""
    return key.rpartition(".")[2] in PATHS


def _of_path(path: Path, hashes: Hashes) -> tuple[Content, str]:
    """A file or folder wherever it lies, and the name of the file in it."""
    return project.tree_of(path, hashes), "" if path.is_dir() else path.name


def _work(root: Path, folder: Path, needs: tuple[str, ...], hashes: Hashes, *, code: bool) -> Content:
    """What a run works in: the code that travels, if asked for, and over it what is needed."""
    wanted = project.needed(root, folder, needs, hashes)
    base = project.snapshot(root, hashes) if code else Content(Tree(()), {})
    return merged(base, project.placed(base.tree, wanted))


def merged(base: Content, over: Content) -> Content:
    """One content: `over` wins where both have a file."""
    entries = {entry.path: entry for entry in (*base.tree.entries, *over.tree.entries)}
    return Content(Tree.from_entries(entries.values()), {**base.files, **over.files})


def folder_in_project(folder: Path) -> str:
    """Where a folder lies in its project; empty for the project's own folder."""
    inside = folder.relative_to(project.root(folder)).as_posix()
    return "" if inside == "." else inside


def kept_here(cargo: Cargo, agent: str) -> Cargo:
    """The same cargo, its code copied into this computer's store: what is edited here later does not change the run.

    Large files stay where they are, known by their hash: a resume elsewhere says when they have changed.
    """
    if cargo.work is None:
        return cargo
    here = machines.this_computer()
    here.push_agent(config.state_folder() / "agents", agent)
    small = Tree(tuple(entry for entry in cargo.work.tree.entries if entry.size <= _COPIED_BYTES))
    sync.push(here, agent, [Content(small, cargo.work.files)], lambda _done, _total: None)
    blobs = here.root / "store" / "blobs"
    copies = {entry.sha256: blobs / entry.sha256[:2] / entry.sha256 for entry in small.entries if not entry.link}
    return replace(cargo, work=Content(cargo.work.tree, {**cargo.work.files, **copies}))


def for_elsewhere(cargo: Cargo | None, job: dict[str, Any], folder: Path) -> Cargo:
    """What a run that began on this computer takes along: its parameters as they are now, and what it had."""
    packed = pack(job, (), folder, at_home=False)
    if cargo is None or cargo.work is None:
        return packed
    return replace(packed, work=merged(packed.work, cargo.work) if packed.work else cargo.work)


def send(cargo: Cargo, machine: Machine, agent: str, say: Say) -> None:
    """Have all of it on the machine, verified there; what it has already does not travel."""
    sync.push(machine, agent, cargo.contents(), _Progress(machine.name, say))
    if machine.name != machines.LOCAL:
        known = sent_before(machine.name)
        now = known | {content.tree.digest() for content in cargo.contents()}
        if now != known:
            durable.save_json(machines.folder(machine.name) / "sent.json", {"trees": sorted(now)}, synced=False)


class _Progress:
    """Says now and then how far a push has come; nothing when it is over at once."""

    def __init__(self, name: str, say: Say) -> None:
        self._name = name
        self._say = say
        self._said_at = clock.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """See sync.Progress."""
        if clock.monotonic() - self._said_at >= _SAY_EVERY_S:
            self._said_at = clock.monotonic()
            self._say(f"{size_in_words(done)} of {size_in_words(total)} are on {self._name}")


def size_in_words(size: int) -> str:
    """Bytes as people say them: 512 B, 3.4 kB, 729.0 MB."""
    power = next((power for power in (3, 2, 1) if size >= 1000**power), 0)
    return f"{size / 1000**power:.1f} {('', 'k', 'M', 'G')[power]}B" if power else f"{size} B"


def new_bytes(cargo: Cargo, name: str) -> int:
    """How much of it may have to travel to the machine: trees it was never sent."""
    known = sent_before(name)
    return sum(content.tree.size for content in cargo.contents() if content.tree.digest() not in known)


def sent_before(name: str) -> set[str]:
    """Digests of the trees that were sent to a machine; news, for a question to the user only."""
    return set(durable.load_news(machines.folder(name) / "sent.json").get("trees", []))

"""`gpu sync`: the project on a machine as it is here now, for `gpu exec`; and what would travel, before it does."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import durable, spec
from orchestrator import cargo, config, delivery, machines, project, sync, transport
from orchestrator.cargo import Cargo
from orchestrator.errors import BadAnswer, ConfigError
from orchestrator.project import Content, Need, Snapshot
from orchestrator.transport import Machine

_SLUG = re.compile(r"[^a-z0-9]+")
_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Project:
    """What travels of a project, what is needed of it in any case, and what is needed but not there."""

    root: Path
    snapshot: Snapshot
    needs: list[Need]
    missing: list[str]

    def content(self) -> Content:
        """All that travels."""
        return cargo.merged(self.snapshot, project.placed(self.snapshot.tree, self.needs))


def looked_at(folder: Path, needs: tuple[str, ...]) -> Project:
    """The project around `folder`, with what was named and what its own jobs need. Raises ConfigError."""
    hashes = project.hashes()
    root = project.root(folder)
    names = [*needs, *(str(root / name) for name in _needed_by_jobs())]
    missing = project.lacking(root, folder, names)
    present = [name for name in names if not project.lacking(root, folder, [name])]
    return Project(root, project.snapshot(root, hashes), project.needed(root, folder, present, hashes), missing)


def _needed_by_jobs() -> list[str]:
    """The files that the project's own jobs need, relative to its root."""
    own = [folder for folder in config.job_folders() if folder != spec.CATALOG]
    return [name for job in spec.names(own) for name in spec.find(job, own).needs]


def plan(found: Project) -> dict[str, Any]:
    """The document of `gpu sync --plan --json`."""
    return sync.plan(found.snapshot, found.needs, found.missing)


def new_bytes(found: Project, name: str) -> int:
    """How much may have to travel to a machine."""
    return cargo.new_bytes(Cargo(found.content()), name)


def push(found: Project, machine: Machine, say: Callable[[str], None]) -> dict[str, Any]:
    """Have the project on the machine as it is here; files that its commands made there stay. Returns what changed."""
    if found.missing:
        raise ConfigError(
            f"{', '.join(found.missing)}: needed, and not in {found.root}. Nothing was sent.", "Make it, or mend needs."
        )
    agent = delivery.prepared_agent(machine)
    content = found.content()
    cargo.send(Cargo(content), machine, agent, say)
    request = {"name": project_name(found.root), "digest": content.tree.digest()}
    answer = transport.ask(
        machine, transport.root_words(machine, agent, "project"), spec.canonical(request), _DEADLINE_S
    )
    if "path" not in answer:
        raise BadAnswer(f"{machine.name} could not lay out the project: {answer}", "Try again.")
    book = _book(machine.name)
    with machines.locked():
        durable.save_json(book, {**durable.load_news(book), str(found.root): answer["path"]})
    return answer


def project_name(root: Path) -> str:
    """What a project is called on machines: its folder's name, and a digest of where it lies here."""
    slug = _SLUG.sub("-", root.name.lower()).strip("-")[:40] or "project"
    return f"{slug}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"


def folder_there(name: str, folder: Path) -> str | None:
    """Where a folder of a synced project lies on a machine; None when it was never synced there."""
    root = project.root(folder)
    there = durable.load_news(_book(name)).get(str(root))
    return str(Path(there) / folder.relative_to(root)) if isinstance(there, str) else None


def _book(name: str) -> Path:
    return machines.folder(name) / "projects.json"

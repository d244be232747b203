"""Every file name of a run folder on both sides, who writes it, and the seal that ends an attempt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jobs import durable, locks, spec, trees

RESERVE_BYTES = 64 * 1024
"""Kept on a machine's disk and let go when it is full, so that the last rows and the seal can still be written."""
_CHUNK_BYTES = 1 << 20
_SAFE = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,127}")
_ATTEMPT = re.compile(r"[0-9]{4}")
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,9})(?:\.([0-9]{1,6}))?")
_FOLDER = re.compile(rf"model|adapter|merged|{_CHECKPOINT.pattern}")

CURVES = "events.out.tfevents"
"""What TensorBoard knows its files by."""
GROWING = ("rows.jsonl", "noise.jsonl", "selections.jsonl", "steps.jsonl", CURVES, "log.txt", "server.log")
"""Files of an attempt that only grow; they come home piece by piece, by offset."""
WHOLE = ("env.json", "failure.json", "status.json", "exit.json")
"""Files of an attempt that appear whole; exit.json last."""
MANIFEST = "MANIFEST.json"
"""Written last into a folder of weights: its files with sizes and SHA-256. A folder without one does not exist yet."""
OUT = "out"
"""First part of the name of every file a command brings home; the rest is its path below the folder it ran in."""


def is_safe_name(name: str) -> bool:
    """Whether a single name may be used in a path: no separator, no leading dash, not `.` or `..`, plain ASCII."""
    return _SAFE.fullmatch(name) is not None and name not in (".", "..")


def may_come_home(name: str) -> bool:
    """Whether a relative name sent by a machine is one of the files a machine may send; anything else is refused."""
    parts = name.split("/")
    if parts[0] == OUT:
        return len(parts) > 1 and trees.is_safe_path(name)
    if not all(is_safe_name(part) for part in parts):
        return False
    if len(parts) == 3 and parts[0] == "attempts" and _ATTEMPT.fullmatch(parts[1]):
        return parts[2] in GROWING + WHOLE
    if len(parts) == 2 and _FOLDER.fullmatch(parts[0]):
        return True
    return parts in (["resolved.json"], ["examples.json"])


def grows(name: str) -> bool:
    """Whether a file of that name only grows and comes home by offset; all others come whole."""
    first, _, rest = name.partition("/")
    return rest.endswith(".jsonl") if first == OUT else first == "attempts" and rest.rpartition("/")[2] in GROWING


def is_of_weights(folder: Path) -> bool:
    """Whether a folder has the name of one that holds weights, finished or not."""
    return _FOLDER.fullmatch(folder.name) is not None


def checkpoint_name(step: int, micro: int = 0) -> str:
    """The folder of a checkpoint after so many steps and, of the next one, so many micro-batches."""
    return f"checkpoint-{step}.{micro}" if micro else f"checkpoint-{step}"


def checkpoint_number(name: str) -> tuple[int, int] | None:
    """Steps and micro-batches in the name of a checkpoint's folder, its place among the others; None for any other."""
    found = _CHECKPOINT.fullmatch(name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def entry_of(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def damage(folder: Path) -> str | None:
    """What is wrong with a folder of weights by its manifest, in words; None when every byte is as it was written."""
    try:
        listed = durable.load_json(folder / MANIFEST)
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, dict) or not listed:
        return f"{MANIFEST} is missing or cannot be read"
    for file, entry in listed.items():
        if not is_safe_name(file):
            return f"{MANIFEST} names {file!r}"
        try:
            found = {"bytes": (folder / file).stat().st_size, "sha256": file_sha256(folder / file)}
        except OSError as error:
            return f"{file}: {error.strerror}"
        if found != entry:
            return f"{file} is not what was written"
    return None


def outs_sha256(outs: dict[str, Any]) -> str:
    """What names the outs of a seal: SHA-256, in hex, over names, sizes and digests; empty when there are none."""
    return spec.digest(outs) if outs else ""


def weights(folder: Path) -> list[Path]:
    """The files of a folder of weights in the order they are copied: by name, the manifest last."""
    return sorted(folder.iterdir(), key=lambda path: (path.name == MANIFEST, path.name))


def file_sha256(path: Path, size: int | None = None) -> str:
    """SHA-256, in hex, of a file or of its first `size` bytes; ValueError when the file is shorter than that."""
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ValueError(f"{path} is shorter than {size} bytes")
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Seal:
    """The last word on an attempt, written by the supervisor once nobody else writes: how it ended, and its rows."""

    attempt: int
    code: int | None
    signal: int | None
    reason: str
    """`done`, `stopped`, `failed` (on purpose, see message) or `crashed`."""
    kind: str
    """What sort of failure, as in worker/failures.py; empty when there was none."""
    message: str
    hint: str
    restarting: bool
    """The supervisor meant to go on with another attempt: this is not the end of the run."""
    files: dict[str, dict[str, Any]]
    """For every growing file: bytes (for rows, up to the last newline) and sha256 of that many bytes."""
    ended_at: str
    outs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For every file the command brings home, under its name there: bytes and sha256."""
    outs_sha256: str = ""
    """Names `outs`, which is left out where a seal is only spoken of: it may be long."""

    def document(self) -> dict[str, Any]:
        """What stands in exit.json."""
        return dict(self.__dict__)

    def outline(self) -> dict[str, Any]:
        """The same without the list of outs, short enough to be said in a line; exit.json has it."""
        return {**self.__dict__, "outs": {}}

    @classmethod
    def load(cls, path: Path) -> Seal | None:
        """The seal at `path`, or None when there is none yet."""
        document = durable.load_json(path)
        return None if document is None else cls.of(document)

    @classmethod
    def of(cls, document: dict[str, Any]) -> Seal:
        """The seal in a document, without what newer code has added. TypeError when it is none."""
        known = {entry.name for entry in fields(cls)}
        seal = cls(**{name: value for name, value in document.items() if name in known})
        words = (seal.reason, seal.kind, seal.message, seal.hint)
        facts = isinstance(seal.files, dict) and seal.files.keys() <= set(GROWING) and seal.files.values()
        if (
            not isinstance(seal.attempt, int)
            or not all(isinstance(text, str) for text in words)
            or facts is False
            or not all(_are_facts(each) for each in facts)
            or not _are_outs(seal.outs)
            or not isinstance(seal.outs_sha256, str)
        ):
            raise TypeError("not a seal")
        return seal


def _are_facts(facts: object) -> bool:
    """Whether it says the size and the digest of a file."""
    return isinstance(facts, dict) and type(facts.get("bytes")) is int and trees.is_sha256(facts.get("sha256"))


def _are_outs(outs: object) -> bool:
    """Whether it is a list of outs: names that may come home, each with a size and a digest."""
    return isinstance(outs, dict) and all(
        isinstance(name, str) and name.startswith(f"{OUT}/") and may_come_home(name) and _are_facts(facts)
        for name, facts in outs.items()
    )


class Attempt:
    """The files of one attempt; the same names on the machine and, below `machines/<name>/`, at home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = int(folder.name)
        self.env = folder / "env.json"  # worker, once: GPU, driver, packages
        self.rows = folder / "rows.jsonl"  # worker, made new, appended
        self.noise = folder / "noise.jsonl"  # worker, made new, appended: rows that were made a second time
        self.selections = folder / "selections.jsonl"  # worker, made new, appended
        self.steps = folder / "steps.jsonl"  # worker, made new, appended: a line for each step of a training
        self.curves = folder / CURVES  # worker, made new, appended: the same as TensorBoard reads it, where it is there
        self.log = folder / "log.txt"  # worker's own stdout and stderr, appended
        self.server_log = folder / "server.log"  # what a model server said that was started for the run
        self.progress = folder / "progress.json"  # worker, replaced: phase, rows written and synced
        self.failure = folder / "failure.json"  # worker, once: why it gave up on purpose
        self.pids = folder / "pids.json"  # supervisor, once: whom a stop may signal
        self.stop = folder / "stop.json"  # the stop command, once: who asked, how long to wait
        self.status = folder / "status.json"  # supervisor, replaced: news with a heartbeat
        self.exit = folder / "exit.json"  # supervisor, once, last: the seal


class Run:
    """The folder of a run on a machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = folder / "job.json"
        self.home = folder / "home.jsonl"
        self.home_noise = folder / "home-noise.jsonl"
        self.home_selections = folder / "home-selections.jsonl"
        self.resolved = folder / "resolved.json"
        self.examples = folder / "examples.json"  # worker, once, before that: the ids of all examples, in their order
        self.start_lock = folder / "start.lock"
        self.run_lock = folder / "run.lock"
        self.current = folder / "current.json"
        self.reserve = folder / "reserve"
        self.supervisor_log = folder / "supervisor.txt"
        self.work = folder / "work"  # the project as the run began with it, and what its command makes there
        self.digests = folder / "digests.json"  # the pull command: digests of large files, so that each is read once
        self.acknowledged = folder / "acknowledged.json"  # the acknowledge command, replaced: what is durable at home
        self.acknowledge_lock = folder / "acknowledge.lock"
        self.mirror = folder / "mirror.json"  # the process that mirrors the run, replaced: its news
        self.mirror_lock = folder / "mirror.lock"
        self.mirror_log = folder / "mirror.txt"

    def identity(self) -> dict[str, Any]:
        """What the first attempt resolved of all that changes results; empty before it has."""
        resolved = durable.load_json(self.resolved)
        return dict(resolved["identity"]) if resolved else {}

    def attempt(self, number: int) -> Attempt:
        """The files of attempt `number`, counted from 1; the folder may not exist."""
        return Attempt(self.folder / "attempts" / f"{number:04d}")

    def attempts(self) -> list[Attempt]:
        """Every attempt folder there is, oldest first."""
        try:
            names = sorted(path.name for path in (self.folder / "attempts").iterdir())
        except FileNotFoundError:
            return []
        return [Attempt(self.folder / "attempts" / name) for name in names if _ATTEMPT.fullmatch(name)]

    def last_attempt(self) -> int:
        """The number of the newest attempt ever begun, 0 when none was."""
        current = durable.load_json(self.current)
        return int(current["attempt"]) if current else 0

    def row_files(self) -> list[Path]:
        """Every file of rows there is or may be here, what came from home first."""
        return [self.home, *(attempt.rows for attempt in self.attempts())]

    def noise_files(self) -> list[Path]:
        """The same for rows that were made a second time."""
        return [self.home_noise, *(attempt.noise for attempt in self.attempts())]

    def selection_files(self) -> list[Path]:
        """The same for the re-ranker's choices."""
        return [self.home_selections, *(attempt.selections for attempt in self.attempts())]

    def folders(self) -> Iterator[Path]:
        """The finished folders of weights in this run; of checkpoints the newest, which stands for the others."""
        for path in (*(self.folder / name for name in ("adapter", "merged", "model")), *self.checkpoints()[-1:]):
            if (path / MANIFEST).is_file():
                yield path

    def checkpoints(self) -> list[Path]:
        """The finished checkpoints in this run, by number, the newest last."""
        found = {path: number for path in self.folder.glob("checkpoint-*") if (number := checkpoint_number(path.name))}
        return [path for path in sorted(found, key=found.__getitem__) if (path / MANIFEST).is_file()]

    def state(self) -> MachineState:
        """Where the run stands here, read in the order in which it is not mistaken while a supervisor starts or ends.

        The attempt first: a lock found free after that means that the supervisor of this attempt is gone. The seal
        last: it was written before the lock was let go, so the other order calls finished runs dead.
        """
        number = self.last_attempt()
        if locks.is_held(self.run_lock):
            return MachineState("running", number, None)
        if number == 0:
            return MachineState("accepted" if self.job.exists() else "none", 0, None)
        seal = Seal.load(self.attempt(number).exit)
        if seal is None or seal.restarting:
            return MachineState("died", number, seal)
        return MachineState("ended", number, seal)


@dataclass(frozen=True)
class MachineState:
    """Where a run stands on its machine: `none`, `accepted`, `running`, `ended` (sealed) or `died` (without a seal)."""

    state: str
    attempt: int
    seal: Seal | None


class Home:
    """The folder of a run at home: `results/<run_id>/`, written by the one process that holds its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id = folder.name
        self.lock = folder / ".lock"
        self.job = folder / "job.json"
        self.record = folder / "run.json"
        self.rows = folder / "rows.jsonl"
        self.noise = folder / "noise.jsonl"
        self.selections = folder / "selections.jsonl"
        self.summary = folder / "summary.json"
        self.report = folder / "report.html"
        self.frozen = folder / "frozen.json"  # of a baseline that is done, once: digests of what it has made
        self.cargo = folder / "cargo.json"  # what the run takes along to another machine, by content
        self.adapter = folder / "adapter"  # what a training made, as its user sees it
        self.merged = folder / "merged"  # the same as a whole model
        self.curves = folder / "tensorboard"  # a training's curves, of all attempts
        self.out = folder / OUT  # the files a command brought home, as its user sees them
        self.parts = folder / "parts"  # of a run that several machines share: a run folder for each share
        self.shared = Run(folder / "shared")  # what its first machine resolved, and all others start with
        self.notes = folder / "notes.jsonl"  # the note command, appended: what its user wrote of it
        self.notes_lock = folder / ".notes.lock"
        self.stop = folder / "stop.json"  # the stop command: no further share is to begin

    def machine(self, name: str) -> Run:
        """Verified copies of what the machine of that name wrote; the same file names as there."""
        return Run(self.folder / "machines" / name)

    def copies(self) -> list[Run]:
        """Verified copies of what every machine wrote, those of the run's shares too."""
        found = [*self.folder.glob("machines/*"), *self.parts.glob("*/machines/*")]
        return [Run(folder) for folder in sorted(found)]

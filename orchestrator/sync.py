"""What travels to a machine: trees by content, nothing twice, nothing unverified; and what a plan of it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import spec
from orchestrator import ignore, transport
from orchestrator.errors import BadAnswer, ConfigError, NotReachable, UsageError
from orchestrator.project import Content, Need, Snapshot
from orchestrator.transport import Frame, Machine

SIZE_GUARD_BYTES = 2_000_000_000
"""More than this is sent only when somebody says so: a data set in the project by mistake takes hours."""
_BIG_BYTES = 4 << 20
_BATCH_BYTES = 32 << 20
_GROUP_BYTES = 1 << 30
"""Big files go by this much at a time: a connection for each would take longer than what it carries."""
_HEADER_BYTES = 128
"""At most, of the line before each content in a batch."""
_ROUNDS = 3
_SLOWEST_BYTES_PER_S = 20_000
_VERIFIED_BYTES_PER_S = 20_000_000
_AGAIN = "Repeat it: what has arrived is not sent again."
Progress = Callable[[int, int], None]
"""Is told how many bytes have been sent, of how many."""


@dataclass(frozen=True)
class Sent:
    """What had to travel for the machine to have all trees."""

    digests: tuple[str, ...]
    """Of the trees, in the order in which they were given."""
    files: int
    bytes_total: int


@dataclass
class _Sending:
    """Trees on their way to a machine."""

    machine: Machine
    agent: str
    progress: Progress
    sizes: dict[str, int] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    done_bytes: int = 0
    told_bytes: int = 0
    total_bytes: int = 0

    def ask(self, verb: str, data: bytes, deadline_s: float = transport.CALL_DEADLINE_S) -> Frame:
        """The machine's answer."""
        return transport.ask(self.machine, transport.root_words(self.machine, self.agent, verb), data, deadline_s)

    def expect(self, verb: str, request: Frame, answer: str) -> list[str]:
        """A list of names that is the answer; BadAnswer for anything else."""
        data = spec.canonical(request)
        said = self.ask(verb, data, _deadline_s(len(data)))
        names = said.get(answer)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadAnswer(f"{self.machine.name} does not say what it has: {_why(said)}. Nothing was started.")
        return names

    def blobs(self, wanted: Sequence[str]) -> None:
        """Send the contents of these names, each verified on both sides."""
        wanted = list(dict.fromkeys(wanted))
        for name in wanted:
            if name not in self.sizes:
                raise BadAnswer(f"{self.machine.name} asks for a file that it was not offered. Nothing was started.")
        self.sent.update(wanted)
        self.total_bytes += sum(self.sizes[name] for name in wanted)
        for batch in _cut([name for name in wanted if self.sizes[name] < _BIG_BYTES], self.sizes, _BATCH_BYTES):
            self._take(batch)
        for group in _cut([name for name in wanted if self.sizes[name] >= _BIG_BYTES], self.sizes, _GROUP_BYTES):
            self._push(group)

    def told(self, further: int) -> None:
        """Pass on that so many bytes more have been sent since what is done; what is sent twice counts once."""
        self.told_bytes = max(self.told_bytes, min(self.done_bytes + further, self.total_bytes))
        self.progress(self.told_bytes, self.total_bytes)

    def _take(self, names: list[str]) -> None:
        data = b"".join(frame for name in names for frame in self._frame(name))
        answer = self.ask("take", data, _deadline_s(len(data)))
        if answer.get("taken") != len(names):
            what = self.files[names[0]] if len(names) == 1 else f"{len(names)} files"
            raise NotReachable(f"{what} did not arrive at {self.machine.name} intact: {_why(answer)}.", _AGAIN)
        self._done(names)

    def _frame(self, name: str) -> Iterator[bytes]:
        path = self.files[name]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _changed(path) from error
        if hashlib.sha256(data).hexdigest() != name:
            raise _changed(path)
        yield json.dumps({"sha256": name, "bytes": len(data)}).encode() + b"\n"
        yield data

    def _push(self, names: list[str]) -> None:
        """Send big files, and once more those that did not become what they are called."""
        left = names
        for _ in range(2):
            sources = [self.files[name] for name in left]
            before = [_identity(source) for source in sources]
            try:
                self.machine.push_files(list(zip(sources, left, strict=True)), self.told)
            except OSError:
                _check_same(sources, before)  # it may be one of them that is gone
                raise
            _check_same(sources, before)
            left = [name for name in left if not self._adopted(name)]
            if not left:
                return self._done(names)
        path = self.files[left[0]]
        raise NotReachable(f"{path} did not arrive at {self.machine.name} intact, twice. Nothing was started.", _AGAIN)

    def _adopted(self, name: str) -> bool:
        """Whether the machine has verified the file; ConfigError when it is this side's that is another one now."""
        request = spec.canonical({"sha256": name, "bytes": self.sizes[name]})
        answer = self.ask("adopt", request, transport.CALL_DEADLINE_S + self.sizes[name] / _VERIFIED_BYTES_PER_S)
        if answer.get("adopted") is True:
            return True
        if answer.get("adopted") is not False:
            raise BadAnswer(f"{self.machine.name} did not take {self.files[name]}: {_why(answer)}.", _AGAIN)
        if _sha256(self.files[name]) != name:
            raise _changed(self.files[name])
        return False

    def _done(self, names: Iterable[str]) -> None:
        self.done_bytes += sum(self.sizes[name] for name in names)
        self.told(0)


def push(machine: Machine, agent: str, trees: Sequence[Content], progress: Progress) -> Sent:
    """Have these trees in the machine's store, under their digests; what it has is not sent. May be repeated.

    One call when it has all. Raises NotReachable and ConfigError; what has arrived by then stays there.
    """
    sending = _Sending(machine, agent, progress)
    wanted = {content.tree.digest(): content for content in trees}
    for content in trees:
        sending.sizes |= {entry.sha256: entry.size for entry in content.tree.entries if not entry.link}
        sending.files |= content.files
    there = sending.expect("have", {"digests": list(wanted)}, "have") if wanted else []
    left = {digest: content for digest, content in wanted.items() if digest not in there}
    for _ in range(_ROUNDS):
        if left:
            documents = [content.tree.document() for content in left.values()]
            sending.blobs(sending.expect("missing", {"trees": documents}, "missing"))
            left = {digest: content for digest, content in left.items() if not _is_kept(sending, digest, content)}
    if left:
        raise NotReachable(f"{machine.name} loses files as soon as they arrive. Nothing was started.", _AGAIN)
    sizes = [sending.sizes[name] for name in sending.sent]
    return Sent(tuple(content.tree.digest() for content in trees), len(sizes), sum(sizes))


def _is_kept(sending: _Sending, digest: str, content: Content) -> bool:
    """Whether the machine has written the tree down; False when it lacks files again by now."""
    data = spec.canonical({"tree": content.tree.document()})
    answer = sending.ask("keep", data, _deadline_s(len(data)))
    if answer.get("kept") != digest and not answer.get("missing"):
        raise BadAnswer(f"{sending.machine.name} did not keep what was sent: {_why(answer)}.", _AGAIN)
    return answer.get("kept") == digest


def _deadline_s(size: int) -> float:
    return transport.CALL_DEADLINE_S + size / _SLOWEST_BYTES_PER_S


def _why(answer: Frame) -> str:
    """What the machine gives as its reason, as far as it is words."""
    return " ".join(str(answer[key]) for key in ("error", "why", "sha256", "folder") if key in answer) or "no reason"


def _changed(path: Path) -> ConfigError:
    return ConfigError(f"{path} changed while it was sent. Nothing was started.", "Run it again.")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _changed(path) from error


def _identity(path: Path) -> tuple[int, int, int]:
    """What is another once the file was written to or replaced; ConfigError when it is gone."""
    try:
        about = path.stat()
    except OSError as error:
        raise _changed(path) from error
    return about.st_size, about.st_mtime_ns, about.st_ino


def _check_same(paths: list[Path], before: list[tuple[int, int, int]]) -> None:
    """Raise ConfigError when one of the files is another one than before."""
    for path, identity in zip(paths, before, strict=True):
        if _identity(path) != identity:
            raise _changed(path)


def _cut(names: list[str], sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """The names in groups whose contents and headers stay within the limit, or that are one name."""
    group: list[str] = []
    held = 0
    for name in names:
        size = sizes[name] + _HEADER_BYTES
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def plan(snapshot: Snapshot, needs: Sequence[Need], missing: Iterable[str]) -> dict[str, Any]:
    """What a push of this would send and leave out, as the JSON document of `gpu sync --plan`."""
    named = {path: entry.size for need in needs for path, entry in need.paths}
    sent = {entry.path: entry.size for entry in snapshot.tree.entries} | named
    below = _sums(named)
    left_out = [
        {"path": left.path, "rule": left.rule, "bytes": max(left.size - below.get(left.path, 0), 0)}
        for left in snapshot.left_out
        if left.rule == ignore.GIT or not any(_covers(need, left.path) for need in needs)
    ]
    return {
        "sent": [{"path": path, "bytes": size} for path, size in sorted(sent.items())],
        "left_out": left_out,
        "needed_missing": list(missing),
        "bytes_total": sum(sent.values()),
    }


def _covers(need: Need, path: str) -> bool:
    """Whether a path is what was asked for, or in it."""
    return need.name in (".", path) or path.startswith(f"{need.name}/")


def _sums(sizes: dict[str, int]) -> dict[str, int]:
    """For each folder on the way to a path, the bytes of all that lies in it."""
    sums: dict[str, int] = {}
    for path, size in sizes.items():
        while path := path.rpartition("/")[0]:
            sums[path] = sums.get(path, 0) + size
    return sums


def guard(bytes_total: int, yes: bool, ask: Callable[[str], bool] | None) -> None:
    """Return when so much may be sent: it is little, or `yes`, or whoever is asked says so; else UsageError.

    `ask` is None where nobody can be asked.
    """
    if bytes_total <= SIZE_GUARD_BYTES or yes:
        return
    size = f"{bytes_total / 1e9:.1f} GB"
    if ask is None or not ask(f"{size} are to be sent to the machine. Send them?"):
        raise UsageError(
            f"{size} are to be sent to the machine, and nobody said yes. Nothing was sent.",
            "See what it is: gpu sync --plan. Leave it out by a line in .gpuignore, or say yes: -y",
        )

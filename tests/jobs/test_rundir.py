"""Run folders: which names a machine may send, and what lock, files and seal together say about a run."""

from __future__ import annotations

import hashlib
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobs import durable, locks, rundir

HOSTILE = [
    "..",
    ".",
    "",
    "-",
    "\\",
    "\n",
    "\x00",
    "/",
    " ",
    ":",
    "~",
    "$",
    "*",
    "ä",
    "\u2024",
    "\u2025",
    "\uff0f",
    "\u2215",
]
"""Parents, separators, shells' favourites, and characters that look like dots and slashes."""
SAFE = string.ascii_letters + string.digits + "._-"
PIECES = [
    *HOSTILE,
    "out",
    "attempts",
    "0001",
    "rows.jsonl",
    "exit.json",
    "resolved.json",
    "model",
    "checkpoint-7",
    "a",
    ".a",
]
attempts = st.builds(
    lambda number, name: f"attempts/{number:04d}/{name}",
    st.integers(0, 9999),
    st.sampled_from(rundir.GROWING + rundir.WHOLE),
)
safe_names = st.text(SAFE, min_size=1, max_size=128).filter(lambda name: name[0] != "-" and name not in (".", ".."))
folders = st.one_of(
    st.sampled_from(["model", "adapter", "merged"]),
    st.builds(rundir.checkpoint_name, st.integers(0, 999_999_999), st.integers(0, 999_999)),
)
weights = st.builds(lambda folder, name: f"{folder}/{name}", folders, safe_names)
outs = st.lists(st.sampled_from(["a", "ä b", "-", "..a", "x" * 255, "log.jsonl"]), min_size=1, max_size=4).map(
    lambda parts: "/".join(["out", *parts])
)
legal_names = st.one_of(attempts, weights, outs, st.just("resolved.json"))
SEAL: dict[str, Any] = {
    "attempt": 1, "code": 0, "signal": None, "reason": "done", "kind": "", "message": "", "hint": "",
    "restarting": False, "files": {"rows.jsonl": {"bytes": 0, "sha256": "0" * 64}}, "ended_at": "2026-01-01",
}  # fmt: skip


@given(legal_names)
@example("attempts/0001/rows.jsonl")
@example("checkpoint-500/model-00001-of-00002.safetensors")
@example("model/" + "x" * 128)
@example("out/a file of the user's, with $(any) name")
def test_what_a_run_is_made_of_may_come_home(name: str) -> None:
    """Growing and whole files of attempts, resolved.json, files in folders of weights, and outs are accepted."""
    assert rundir.may_come_home(name)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "/", "/etc/passwd", "//resolved.json", "~/.ssh/authorized_keys", "-rf", ".lock", ".bashrc",
        "job.json", "run.json", "rows.jsonl", "report.html", "current.json", "run.lock", "reserve", "home.jsonl",
        "attempts", "attempts/0001", "attempts/0001/", "attempts/1/rows.jsonl", "attempts/00001/rows.jsonl",
        "attempts/0001/pids.json", "attempts/0001/stop.json", "attempts/0001/rows.jsonl.torn", "attempts/0001/LOG.txt",
        "attempts/0001/../0002/rows.jsonl", "attempts/./0001/rows.jsonl", "attempts//0001/rows.jsonl",
        "attempts/٠٠٠١/rows.jsonl", "attempts\\0001\\rows.jsonl", "./attempts/0001/rows.jsonl",
        "attempts/0001/rows.jsonl\n", "resolved.json\n", "\nresolved.json", "resolved.json/", "/resolved.json",
        "model", "model/", "model/.", "model/..", "model/-rf", "model/a/b", "model/a\\b", "model/a b", "model/a\x00",
        "model/a\n", "model/\n", "model/ä", "model/․․", "model∕a", "models/a", "Model/a", "model/" + "x" * 129,
        "checkpoint-/a", "checkpoint-1000000000/a", "checkpoint--1/a", "checkpoint-1x/a", "checkpoint-٣/a",
        "checkpoint-1./a", "checkpoint-.1/a", "checkpoint-1.1234567/a", "checkpoint-1.2.3/a", "checkpoint-1.٣/a",
        "../model/a", "model/../../a", "a/" * 2000 + "a", "out", "out/", "/out/a", "out//a", "out/..", "out/a/../b",
        "out/./a", "out/a\n", "out/a\x00", "out/a\x1b[0m", "out/\udcff", "out/a\u202e", "out/" + "x" * 256,
        "out/" + "x/" * 2050 + "x", "Out/a", "out\\a", "x/out/a",
    ],
    ids=lambda name: repr(name[:40]),
)  # fmt: skip
def test_anything_else_is_refused(name: str) -> None:
    """Hostile names, names that only look right, and the names of our own files are refused."""
    assert not rundir.may_come_home(name)


@given(legal_names, st.sampled_from(HOSTILE), st.data())
def test_a_legal_name_with_something_hostile_in_it_is_refused(name: str, hostile: str, data: st.DataObject) -> None:
    """A legal name that has a hostile character, or a part that is one, put into it is refused, or is a legal name."""
    at = data.draw(st.integers(0, len(name)))
    changed = name[:at] + hostile + name[at:]
    assert rundir.may_come_home(changed) is is_legal(changed)
    parts = name.split("/")
    at = data.draw(st.integers(0, len(parts)))
    changed = "/".join([*parts[:at], hostile, *parts[at:]])
    assert rundir.may_come_home(changed) is is_legal(changed)


@given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=5).map(glue) for glue in ("/".join, "".join)))
def test_no_other_text_is_accepted(name: str) -> None:
    """Of arbitrary texts exactly the legal ones are accepted, and none of these leads out of the run's folder."""
    assert rundir.may_come_home(name) is is_legal(name)
    if rundir.may_come_home(name):
        assert os.path.normpath(f"/run/{name}") == f"/run/{name}"


def is_legal(name: str) -> bool:
    """The same question, asked without patterns."""
    first, *rest = name.split("/")
    if not rest:
        return name == "resolved.json"
    if first == "out":
        fits = all(part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 255 for part in rest)
        return fits and len(name.encode("utf-8", "replace")) <= 4096 and name.isprintable()
    if first == "attempts":
        return (
            len(rest) == 2
            and len(rest[0]) == 4
            and set(rest[0]) <= set(string.digits)
            and rest[1] in {*rundir.GROWING, *rundir.WHOLE}
        )
    at = first.removeprefix("checkpoint-")
    step, dot, micro = at.partition(".")
    is_checkpoint = first != at and is_number(step, 9) and (not dot or is_number(micro, 6))
    is_folder = first in ("model", "adapter", "merged") or is_checkpoint
    return is_folder and len(rest) == 1 and is_safe(rest[0])


def is_number(text: str, digits: int) -> bool:
    return 1 <= len(text) <= digits and set(text) <= {*string.digits}


def is_safe(part: str) -> bool:
    return 1 <= len(part) <= 128 and set(part) <= set(SAFE) and part[0] != "-" and part not in (".", "..")


@pytest.mark.parametrize(
    ("name", "grows"),
    [
        ("attempts/0001/rows.jsonl", True), ("attempts/0001/log.txt", True), ("attempts/0001/exit.json", False),
        ("resolved.json", False), ("model/rows.jsonl", False), ("out/x/rows.jsonl", True), ("out/log.txt", False),
        ("out/a.jsonl/b", False), ("out/.jsonl", True), ("output/a.jsonl", False),
    ],
)  # fmt: skip
def test_what_grows_is_known_by_its_name(name: str, grows: bool) -> None:
    """Rows and logs of attempts grow, and so do outs that end in .jsonl; all else comes whole."""
    assert rundir.grows(name) is grows


@pytest.fixture
def run(tmp_path: Path) -> rundir.Run:
    """A run's folder, empty."""
    folder = tmp_path / "runs" / "20261120-test"
    folder.mkdir(parents=True)
    return rundir.Run(folder)


def begin(run: rundir.Run, number: int, seal: dict[str, Any] | None) -> None:
    """Make what a begun attempt leaves; with what its seal says, a sealed one."""
    durable.have_folder(run.attempt(number).folder)
    durable.save_json(run.current, {"attempt": number})
    if seal is not None:
        durable.save_json(run.attempt(number).exit, SEAL | {"attempt": number} | seal)


DONE, FAILED = {"reason": "done"}, {"reason": "failed"}
RESTARTING = {"reason": "crashed", "restarting": True}
Call = Callable[[], None]


@pytest.mark.parametrize(
    ("has_job", "seals", "state"),
    [
        (False, [], "none"),
        (True, [], "accepted"),
        (True, [None], "died"),
        (True, [DONE], "ended"),
        (True, [FAILED], "ended"),
        (True, [RESTARTING], "died"),
        (True, [RESTARTING, None], "died"),
        (True, [RESTARTING, DONE], "ended"),
        (True, [FAILED, None], "died"),
        (True, [FAILED, DONE], "ended"),
    ],
)
def test_states(has_job: bool, seals: list[dict[str, Any] | None], state: str, run: rundir.Run) -> None:
    """Job, attempts and the last one's seal give the state; while the lock is held it is running, whatever they say."""
    if has_job:
        durable.save_json(run.job, {})
    for number, seal in enumerate(seals, start=1):
        begin(run, number, seal)
    found = run.state()
    assert (found.state, found.attempt) == (state, len(seals))
    assert (found.seal and found.seal.reason) == (seals[-1]["reason"] if seals and seals[-1] else None)
    with locks.held(run.run_lock, 0.0):
        assert run.state() == rundir.MachineState("running", len(seals), None)
    assert run.state() == found


def nothing() -> None:
    """What happens mostly."""


def look_while(monkeypatch: pytest.MonkeyPatch, *, before: Call = nothing, after: Call = nothing) -> None:
    """Let something happen just before, or just after, the lock is looked at for the first time."""
    real = locks.is_held
    calls = iter([before, after])

    def look(path: Path) -> bool:
        next(calls, nothing)()
        found = real(path)
        next(calls, nothing)()
        return found

    monkeypatch.setattr(locks, "is_held", look)


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_run_that_ends_while_it_is_looked_at_is_not_called_dead(
    at: str, run: rundir.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is sealed and lets go just before or after the lock is looked at is running or ended."""
    durable.save_json(run.job, {})
    begin(run, 1, None)
    lock = locks.take(run.run_lock)
    assert lock is not None

    def end() -> None:
        begin(run, 1, DONE)
        os.close(lock)

    look_while(monkeypatch, before=end if at == "before" else nothing, after=end if at == "after" else nothing)
    assert [run.state().state, run.state().state] == ["ended" if at == "before" else "running", "ended"]


def test_a_run_that_starts_while_it_is_looked_at_is_not_called_dead(
    run: rundir.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose supervisor begins an attempt just after the lock was seen free is accepted or running."""
    durable.save_json(run.job, {})
    taken: list[int | None] = []

    def start() -> None:
        taken.append(locks.take(run.run_lock))
        begin(run, 1, None)

    look_while(monkeypatch, after=start)
    assert run.state().state in ("accepted", "running")
    assert run.state().state == "running"
    assert taken[0] is not None
    os.close(taken[0])


def test_a_run_that_is_resumed_while_it_is_looked_at_is_not_called_dead(
    run: rundir.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended, and whose next attempt begins just after the lock was seen free, is ended or running."""
    durable.save_json(run.job, {})
    begin(run, 1, FAILED)
    taken: list[int | None] = []

    def start() -> None:
        taken.append(locks.take(run.run_lock))
        begin(run, 2, None)

    look_while(monkeypatch, after=start)
    assert run.state().state in ("ended", "running")
    assert taken[0] is not None
    os.close(taken[0])


def test_a_seal_comes_back(run: rundir.Run) -> None:
    """A seal that was saved is loaded with everything it said; where none is, there is None."""
    path = run.attempt(1).exit
    durable.have_folder(path.parent)
    assert rundir.Seal.load(path) is None
    seal = rundir.Seal(**SEAL)
    durable.save_json(path, seal.document())
    assert rundir.Seal.load(path) == seal


def test_attempts_are_the_numbered_folders_in_order(run: rundir.Run) -> None:
    """Attempts are given oldest first, and nothing else that lies beside them."""
    assert run.attempts() == []
    for name in ("0010", "0002", "0001", "1", "00003", "0004.tmp", "٠٠٠٥", "x"):
        (run.folder / "attempts" / name).mkdir(parents=True)
    assert [attempt.number for attempt in run.attempts()] == [1, 2, 10]
    assert run.attempt(2).folder == run.attempts()[1].folder
    assert run.last_attempt() == 0  # none was begun: that is said by current.json alone


def test_a_folder_of_weights_exists_once_its_manifest_does(run: rundir.Run) -> None:
    """Only folders of weights that have a manifest are given."""
    for name in ("model", "adapter", "checkpoint-100", "checkpoint-200", "attempts", "checkpoint-x"):
        (run.folder / name).mkdir()
    for name in ("adapter", "checkpoint-200", "attempts", "checkpoint-x"):
        (run.folder / name / rundir.MANIFEST).write_text("{}")
    assert [path.name for path in run.folders()] == ["adapter", "checkpoint-200"]


def test_digests_of_files_and_of_their_first_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of a file, or of exactly its first bytes, however it is read; a file that is too short is an error."""
    monkeypatch.setattr(rundir, "_CHUNK_BYTES", 7)
    data = bytes(range(100))
    path = tmp_path / "file"
    path.write_bytes(data)
    assert rundir.file_sha256(path) == hashlib.sha256(data).hexdigest()
    for size in (0, 1, 7, 8, 99, 100):
        assert rundir.file_sha256(path, size) == hashlib.sha256(data[:size]).hexdigest()
    with pytest.raises(ValueError, match="shorter than 101 bytes"):
        rundir.file_sha256(path, 101)


def test_both_sides_use_the_same_names(tmp_path: Path) -> None:
    """A file of an attempt has the same relative name on the machine and in the copy of it at home."""
    home = rundir.Home(tmp_path / "results" / "20261120-test")
    machine = rundir.Run(tmp_path / "machine")
    copy = home.machine("first")
    assert home.run_id == "20261120-test"
    assert copy.folder.parent == home.folder / "machines"
    for name in ("rows", "selections", "log", "env", "failure", "status", "exit"):
        there = getattr(machine.attempt(3), name).relative_to(machine.folder)
        assert getattr(copy.attempt(3), name).relative_to(copy.folder) == there
        assert rundir.may_come_home(there.as_posix())

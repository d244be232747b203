"""Run folders: which names a machine may send, and what lock, files and seal together say about a run."""

from __future__ import annotations

import hashlib
import os
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobs import durable, locks, rundir

HOSTILE = ["..", ".", "", "-", "\\", "\n", "\x00", "/", " ", ":", "~", "$", "*", "ä", "\u2024", "\u2025", "\uff0f", "\u2215"]
"""Parents, separators, shells' favourites, and characters that look like dots and slashes."""
SAFE = string.ascii_letters + string.digits + "._-"
attempts = st.builds(
    lambda number, name: f"attempts/{number:04d}/{name}",
    st.integers(0, 9999),
    st.sampled_from(rundir.GROWING + rundir.WHOLE),
)
safe_names = st.text(SAFE, min_size=1, max_size=128).filter(lambda name: name[0] != "-" and name not in (".", ".."))
folders = st.one_of(
    st.sampled_from(["model", "adapter"]), st.integers(0, 999_999_999).map(lambda step: f"checkpoint-{step}")
)
weights = st.builds(lambda folder, name: f"{folder}/{name}", folders, safe_names)
legal_names = st.one_of(attempts, weights, st.just("resolved.json"))
SEAL: dict[str, Any] = {
    "attempt": 1, "code": 0, "signal": None, "reason": "done", "kind": "", "message": "", "hint": "",
    "restarting": False, "files": {"rows.jsonl": {"bytes": 0, "sha256": "0" * 64}}, "ended_at": "2026-01-01",
}  # fmt: skip


@given(legal_names)
@example("attempts/0001/rows.jsonl")
@example("checkpoint-500/model-00001-of-00002.safetensors")
@example("model/" + "x" * 128)
def test_what_a_run_is_made_of_may_come_home(name: str) -> None:
    """Growing and whole files of attempts, resolved.json, and files in folders of weights are accepted."""
    assert rundir.may_come_home(name)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "/", "/etc/passwd", "//resolved.json", "~/.ssh/authorized_keys", "-rf", ".lock", ".bashrc",
        "job.json", "run.json", "rows.jsonl", "report.html", "current.json", "run.lock", "reserve", "home.jsonl",
        "attempts", "attempts/0001", "attempts/0001/", "attempts/1/rows.jsonl", "attempts/00001/rows.jsonl",
        "attempts/0001/pids.json", "attempts/0001/stop.json", "attempts/0001/rows.jsonl.torn", "attempts/0001/rows.JSONL",
        "attempts/0001/../0002/rows.jsonl", "attempts/./0001/rows.jsonl", "attempts//0001/rows.jsonl",
        "attempts/٠٠٠١/rows.jsonl", "attempts\\0001\\rows.jsonl", "./attempts/0001/rows.jsonl",
        "attempts/0001/rows.jsonl\n", "resolved.json\n", "\nresolved.json", "resolved.json/", "/resolved.json",
        "model", "model/", "model/.", "model/..", "model/-rf", "model/a/b", "model/a\\b", "model/a b", "model/a\x00",
        "model/a\n", "model/\n", "model/ä", "model/․․", "model∕a", "models/a", "Model/a", "model/" + "x" * 129,
        "checkpoint-/a", "checkpoint-1000000000/a", "checkpoint--1/a", "checkpoint-1x/a", "checkpoint-٣/a",
        "../model/a", "model/../../a", "a/" * 2000 + "a",
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


@given(st.text(st.sampled_from([*SAFE, "/", *HOSTILE]), max_size=40))
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
    if first == "attempts":
        return (
            len(rest) == 2
            and len(rest[0]) == 4
            and set(rest[0]) <= set(string.digits)
            and rest[1] in {*rundir.GROWING, *rundir.WHOLE}
        )
    step = first.removeprefix("checkpoint-")
    is_folder = first in ("model", "adapter") or (first != step and 1 <= len(step) <= 9 and set(step) <= {*string.digits})
    return is_folder and len(rest) == 1 and is_safe(rest[0])


def is_safe(part: str) -> bool:
    return 1 <= len(part) <= 128 and set(part) <= set(SAFE) and part[0] != "-" and part not in (".", "..")


@pytest.fixture
def run(tmp_path: Path) -> rundir.Run:
    """A run's folder, empty."""
    folder = tmp_path / "runs" / "20261120-test"
    folder.mkdir(parents=True)
    return rundir.Run(folder)


def begin(run: rundir.Run, number: int, **seal: Any) -> None:
    """Make the files of a begun attempt; with words for its seal, of a sealed one."""
    durable.have_folder(run.attempt(number).folder)
    durable.save_json(run.current, {"attempt": number})
    if seal:
        durable.save_json(run.attempt(number).exit, SEAL | {"attempt": number} | seal)


@pytest.mark.parametrize(
    ("has_job", "seals", "state", "attempt"),
    [
        (False, [], "none", 0),
        (True, [], "accepted", 0),
        (True, [{}], "died", 1),
        (True, [{"reason": "done"}], "ended", 1),
        (True, [{"reason": "failed"}], "ended", 1),
        (True, [{"reason": "crashed", "restarting": True}], "died", 1),
        (True, [{"reason": "crashed", "restarting": True}, {}], "died", 2),
        (True, [{"reason": "crashed", "restarting": True}, {"reason": "done"}], "ended", 2),
        (True, [{"reason": "stopped"}, {}], "died", 2),
    ],
)
@pytest.mark.parametrize("is_locked", [False, True])
def test_states(
    has_job: bool, seals: list[dict[str, Any]], state: str, attempt: int, is_locked: bool, run: rundir.Run
) -> None:
    """Lock, job, current attempt and seal give the state; a held lock means running, whatever else there is."""


def test_the_lock_is_looked_at_before_the_seal(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends just while its state is asked for is running or ended, and never called dead."""



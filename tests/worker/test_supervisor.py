"""A real supervisor with a real worker process: started once, restarted within bounds, stopped whole, sealed last."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, locks, rows, rundir, spec
from orchestrator import advance, config, machines, transport
from orchestrator.runs import Run
from tests.waiting import until
from worker import agent, processes

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and the subreaper of Linux")
Folder = Callable[[Run], rundir.Run]


def ask(run: Run, verb: str, *more: str, data: bytes = b"") -> dict[str, Any]:
    machine = machines.this_computer()
    return transport.ask(machine, transport.agent_words(machine, run.record.agent, verb, run.run_id, *more), data)


def order(run: Run, expect_attempt: int = 0) -> bytes:
    machine = machines.this_computer()
    return spec.canonical(
        {
            "job": run.job(),
            "order": {
                "expect_attempt": expect_attempt,
                "python": sys.executable,
                "agent": str(machine.root / "agent" / run.record.agent),
                "cwd": run.record.cwd,
                "env": {"PATH": os.environ["PATH"], "SECRET_FOR_TEST": "s3cr3t-canary"},
            },
        }
    )


def unseen(_frame: object, _data: bytes) -> None:
    """Nobody watches."""


def begin(run: Run) -> dict[str, Any]:
    advance.push(run, machines.this_computer(), unseen)
    return ask(run, "start", data=order(run))


def ended(run: Run) -> rundir.Seal:
    answer = until(lambda: (found := ask(run, "state"))["state"] == "ended" and found)
    return rundir.Seal(**answer["seal"])


def pids(attempt: rundir.Attempt) -> dict[str, int]:
    known = until(lambda: durable.load_json(attempt.pids))
    return {name: identity["pid"] for name, identity in known.items()}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def test_a_run_ends_with_a_seal_that_names_its_rows(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """A finished run is sealed with the size and SHA-256 of exactly the rows on the disk."""
    run = counting_run(count=20)
    assert begin(run)["started"] is True
    seal = ended(run)
    attempt = on_machine(run).attempt(1)
    assert (seal.code, seal.reason, seal.restarting) == (0, "done", False)
    facts = seal.files["rows.jsonl"]
    assert facts == {"bytes": attempt.rows.stat().st_size, "sha256": rundir.file_sha256(attempt.rows)}
    assert rows.index(attempt.rows).good == 20


def test_twenty_starts_at_once_start_one_worker(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """Asked by twenty at the same time, a run starts one attempt, and one of them is told that it did."""
    run = counting_run(count=3, pace_s=0.2)
    advance.push(run, machines.this_computer(), unseen)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(run, "start", data=order(run)), range(20)))
    assert sum(answer["started"] for answer in answers) == 1
    ended(run)
    assert len(on_machine(run).attempts()) == 1


def test_a_start_after_the_end_changes_nothing(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """A repeated start of a run that has ended meanwhile is answered with how it ended."""
    run = counting_run(count=2)
    begin(run)
    ended(run)
    answer = ask(run, "start", data=order(run))
    assert (answer["started"], answer["state"], answer["attempt"]) == (False, "ended", 1)
    assert len(on_machine(run).attempts()) == 1


def test_another_job_under_the_same_id_is_a_conflict(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """A start with another job under a known id is refused and changes nothing."""
    run = counting_run(count=2)
    begin(run)
    before = on_machine(run).job.read_bytes()
    other = json.loads(order(run))
    other["job"]["params"]["count"] = 3
    assert ask(run, "start", data=spec.canonical(other)) == {"error": "conflict", "started": False}
    assert on_machine(run).job.read_bytes() == before


@pytest.mark.parametrize("moment", [b"", b'{"job"', b'{"job":{},"order":'])
def test_a_start_cut_off_while_it_is_read_starts_nothing(
    counting_run: Callable[..., Run], on_machine: Folder, moment: bytes
) -> None:
    """A connection that dies inside the request leaves no supervisor and no job."""
    run = counting_run(count=2)
    machine = machines.this_computer()
    advance.push(run, machine, unseen)
    words = transport.agent_words(machine, run.record.agent, "start", run.run_id)
    subprocess.run(words, input=moment, capture_output=True, check=False, timeout=30)
    assert ask(run, "state")["state"] == "none"


@linux_only
def test_a_killed_worker_is_started_again_and_redoes_only_what_is_missing(
    counting_run: Callable[..., Run], on_machine: Folder
) -> None:
    """After kill -9 of the worker the supervisor goes on in a new attempt folder; every row is there once."""
    run = counting_run(count=30, pace_s=0.03)
    begin(run)
    first = on_machine(run).attempt(1)
    until(lambda: rows.index(first.rows).good >= 5)
    os.kill(pids(first)["worker"], signal.SIGKILL)
    assert ended(run).reason == "done"
    counts = [rows.index(attempt.rows).good for attempt in on_machine(run).attempts()]
    assert len(counts) == 2
    assert sum(counts) == 30


def test_a_worker_that_crashes_without_progress_is_given_up(
    counting_run: Callable[..., Run], on_machine: Folder
) -> None:
    """Two crashes of its own making without a new row between end the run, and the seal says how."""
    run = counting_run(count=5, crash_after=0)
    begin(run)
    seal = ended(run)
    assert (seal.reason, seal.attempt, seal.code) == ("crashed", 2, 7)
    assert "exit code 7" in seal.message


def test_a_crashing_worker_that_makes_progress_goes_on(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """Crashes with new rows between them are restarted until the work is done."""
    run = counting_run(count=9, crash_after=2)
    begin(run)
    until(lambda: ask(run, "state")["state"] == "ended", within_s=60)
    good = sum(rows.index(attempt.rows).good for attempt in on_machine(run).attempts())
    assert good == 9


def test_a_refusal_on_purpose_is_not_retried(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """A worker that says what is wrong with the request ends the run at once, with its words in the seal."""
    run = counting_run(refuse=True)
    begin(run)
    seal = ended(run)
    assert (seal.attempt, seal.reason, seal.kind, seal.message) == (1, "failed", "config", "the dataset is not one")


@linux_only
def test_a_stop_leaves_nothing_alive(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """A stop ends a worker that ignores TERM and its child that double-forked away, within the grace; rows stay."""
    run = counting_run(count=1000, pace_s=0.05, ignore_term=True, escape=True)
    begin(run)
    attempt = on_machine(run).attempt(1)
    until(lambda: rows.index(attempt.rows).good >= 3)
    assert len(processes.marked(str(on_machine(run).folder))) >= 2, "the worker and its runaway child"
    answer = ask(run, "stop", "1")
    assert answer["seal"]["reason"] == "stopped"
    assert processes.marked(str(on_machine(run).folder)) == []
    assert not locks.is_held(on_machine(run).run_lock)
    assert ask(run, "stop", "1") == answer, "stopping twice is stopping once"


@linux_only
def test_a_killed_supervisor_takes_its_worker_along(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """After kill -9 of the supervisor no worker goes on unwatched, the run counts as died, and a start continues it."""
    run = counting_run(count=40, pace_s=0.03, escape=True)
    begin(run)
    first = on_machine(run).attempt(1)
    until(lambda: rows.index(first.rows).good >= 3)
    known = pids(first)
    os.kill(known["supervisor"], signal.SIGKILL)
    until(lambda: not is_alive(known["worker"]))
    until(lambda: ask(run, "state")["state"] == "died")
    assert ask(run, "start", data=order(run, expect_attempt=1))["started"] is True
    assert ended(run).attempt == 2
    assert processes.marked(str(on_machine(run).folder)) == [], "the escaped child of the first attempt was swept up"
    assert sum(rows.index(attempt.rows).good for attempt in on_machine(run).attempts()) == 40


@linux_only
def test_the_supervisor_is_small(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """The supervisor needs at most 30 MB of memory."""
    run = counting_run(count=1000, pace_s=0.05)
    begin(run)
    pid = pids(on_machine(run).attempt(1))["supervisor"]
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    resident_kb = int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1])
    assert resident_kb <= 30 * 1024


def test_status_has_a_heartbeat_and_counts(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """While it runs, status.json says how many rows of how many are done, at what pace, and when that was."""
    run = counting_run(count=200, pace_s=0.03)
    begin(run)
    attempt = on_machine(run).attempt(1)
    status = until(lambda: (found := durable.load_json(attempt.status)) and found["rows_per_second"] and found)
    assert status["rows_total"] == 200
    assert 0 < status["rows_done"] <= 200
    assert status["heartbeat"].endswith("Z")


@linux_only
def test_a_reused_pid_is_never_taken_for_ours() -> None:
    """A stored identity is the same process only while pid, start time and boot all agree."""
    me = processes.identity(os.getpid())
    assert processes.is_same(me)
    assert not processes.is_same({**me, "start_time": "1"})
    assert not processes.is_same({**me, "boot_id": "another"})


@linux_only
def test_secrets_stay_in_memory(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """A value of the job's environment stands in no file of the run, the machine's folder or home, and in no argv."""
    run = counting_run(count=100, pace_s=0.05)
    begin(run)
    until(lambda: rows.index(on_machine(run).attempt(1).rows).good >= 1)
    files = [path for path in config.state_folder().rglob("*") if path.is_file()] + list(run.home.folder.rglob("*"))
    assert not [path for path in files if path.is_file() and b"s3cr3t-canary" in path.read_bytes()]
    words = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes.marked(str(on_machine(run).folder))]
    assert words
    assert not [line for line in words if b"s3cr3t-canary" in line]


def test_a_running_run_takes_no_files(counting_run: Callable[..., Run], on_machine: Folder) -> None:
    """Rows from home are taken before and after a run, never under a worker; the next attempt finds them."""
    run = counting_run(count=40, pace_s=0.05)
    piece = put(b"{}\n")
    advance.push(run, machines.this_computer(), unseen)
    assert ask(run, "put", data=piece) == {"put": ["home.jsonl"]}
    ask(run, "start", data=order(run))
    assert ask(run, "put", data=put(b"{}\n{}\n")) == {"put": []}
    assert on_machine(run).home.read_bytes() == b"{}\n"
    ask(run, "stop", "5")
    good = rows.index(on_machine(run).attempt(1).rows).good
    others = b"".join(rows.encode({"key": f"t/s/{number}#0", "error": None}) for number in range(good, 40))
    assert ask(run, "put", data=put(others)) == {"put": ["home.jsonl"]}
    ask(run, "start", data=order(run, expect_attempt=1))
    assert ended(run).reason == "done"
    assert rows.index(on_machine(run).attempt(2).rows).good == 0


def put(data: bytes) -> bytes:
    """The frame that renews the rows from home."""
    header = {"name": "home.jsonl", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return spec.canonical(header) + b"\n" + data


def test_a_supervisor_that_seals_is_not_killed(
    counting_run: Callable[..., Run], on_machine: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop leaves a supervisor alone that hashes large files, by its own recent word; one that is silent it ends."""
    monkeypatch.setattr(agent, "_STOP_MARGIN_S", 0.1)
    killed: list[str] = []
    monkeypatch.setattr(agent, "_kill_all", lambda run: killed.append(run.folder.name))
    run = on_machine(counting_run())
    durable.have_folder(run.attempt(1).folder)
    durable.save_json(run.current, {"attempt": 1})
    with locks.held(run.run_lock, 0):
        for state, age_s, is_killed in (("sealing", 0, False), ("sealing", 60, True), ("stopping", 0, True)):
            durable.save_json(run.attempt(1).status, {"state": state})
            os.utime(run.attempt(1).status, (time.time() - age_s, time.time() - age_s))
            killed.clear()
            assert agent.stop(run, 0.0)["state"] == "running"
            assert bool(killed) is is_killed


@pytest.mark.parametrize("name", ["job.json", "../../escape", "attempts/0001/rows.jsonl", "run.lock", "/etc/x"])
def test_only_what_comes_from_home_is_taken(counting_run: Callable[..., Run], on_machine: Folder, name: str) -> None:
    """A file that a start does not need is refused by name, and nothing is written."""
    run = counting_run(count=2)
    advance.push(run, machines.this_computer(), unseen)
    header = {"name": name, "bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    assert ask(run, "put", data=spec.canonical(header) + b"\nx") == {"error": "refused", "name": name}
    assert list(on_machine(run).folder.iterdir()) == []

"""One look at how idle a machine is: what counts as use, what does not, and what is not home."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import durable, rows, rundir
from orchestrator import machines
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import machine
from tests.worker.guarding import RUN, add_row, aged, home
from worker import acknowledged, idle
from worker.acknowledged import Acknowledged

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a rented machine runs Linux")
LONG_S = 5000.0


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's folder with one run; it was started long ago, and other tests' transfers are not its own."""
    monkeypatch.setattr(idle.steady, "since_boot", lambda: 2 * LONG_S)
    monkeypatch.setattr(idle, "_TRANSFERS", ())
    run = rundir.Run(tmp_path / "machine" / "runs" / RUN)
    durable.have_folder(run.attempt(1).folder)
    durable.save_json(run.job, {"story": "command", "out": ["*.txt", "*.jsonl"], "folder": ""})
    durable.save_json(run.current, {"attempt": 1})
    durable.have_folder(run.work)
    aged(tmp_path / "machine", LONG_S)
    return tmp_path / "machine"


@pytest.fixture
def run(root: Path) -> rundir.Run:
    return rundir.Run(root / "runs" / RUN)


def idle_s(root: Path) -> float:
    """How idle the machine is, without the terminals of who runs the tests."""
    return float(idle.look(root, root / "no-terminals")["idle_s"])


@pytest.mark.parametrize("name", ["rows.jsonl", "selections.jsonl", "log.txt", "failure.json"])
def test_what_grows_is_use(root: Path, run: rundir.Run, name: str) -> None:
    """A row, a choice, a line of the log: the machine was in use then, and ages from there."""
    path = run.attempt(1).folder / name
    path.write_text("x\n", encoding="utf-8")
    assert idle_s(root) < 60
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert 99 < idle_s(root) < 160


def test_a_heartbeat_is_no_use(root: Path, run: rundir.Run) -> None:
    """Files that also change while nothing gets on, the supervisor's status and what a pull remembers, do not count."""
    durable.save_json(run.attempt(1).status, {"state": "running", "heartbeat": "now"})
    durable.save_json(run.digests, {})
    durable.save_json(run.acknowledged, {})
    assert idle_s(root) > LONG_S - 1


def test_a_worker_that_hangs_is_idle(counting_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """A live worker under a live supervisor that makes nothing any more lets its machine become idle."""
    monkeypatch.setattr(idle, "_TRANSFERS", ())
    made = counting_run(count=5, pace_s=1000)
    machines.this_computer().push_agent(Path(os.environ["GPU_HOME"]) / "agents", made.record.agent)
    machine.start(made)
    there = machine.there(made)
    root = there.folder.parent.parent
    until(lambda: there.attempt(1).rows.exists() and there.attempt(1).rows.stat().st_size)
    until(lambda: idle_s(root) > 1.5)
    assert there.state().state == "running"
    assert time.time() - there.attempt(1).status.stat().st_mtime < 1.5


def test_a_time_ahead_of_the_clock_says_nothing(root: Path, run: rundir.Run) -> None:
    """A row noted before the clock was set back does not keep the machine until the clock has caught up."""
    add_row(run, 1)
    os.utime(run.attempt(1).rows, (time.time() + 9000, time.time() + 9000))
    assert idle_s(root) > LONG_S - 1


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_somebody_who_types_uses_the_machine(root: Path, terminal: tuple[int, int]) -> None:
    """A terminal counts from when somebody last typed there, not for as long as it is open."""
    ours, theirs = terminal
    path = Path(os.ttyname(theirs))
    os.utime(path, (time.time() - 3000, time.time() - 3000))
    looked = idle.look(root, path.parent)
    others = [each for each in path.parent.iterdir() if each.name.isdigit() and each != path]
    assert others or 2999 < looked["idle_s"] < 3100
    os.write(theirs, b"what a program prints is nobody's use")
    assert others or idle.look(root, path.parent)["idle_s"] > 2999
    os.write(ours, b"ls\n")
    assert os.read(theirs, 10) == b"ls\n"
    looked = idle.look(root, path.parent)
    assert looked["idle_s"] < 30  # the kernel notes it every 8 s
    assert any(f"terminal {path.name}: somebody typed" in words for words in looked["why"])


@pytest.mark.parametrize(("percent", "busy"), [("87", True), ("0", False), ("[N/A]", False), ("", False)])
def test_a_gpu_that_computes_is_use(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, percent: str, busy: bool
) -> None:
    """A GPU that computes just now counts; one that rests, or of which nothing is known, does not."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '0, {percent}'\n", encoding="ascii")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert (idle_s(root) == 0) is busy


@pytest.mark.parametrize(
    ("verb", "busy"), [("exec", True), ("take", True), ("build", True), ("pull", False), ("state", False)]
)
def test_only_work_of_the_laptop_is_use(root: Path, verb: str, busy: bool) -> None:
    """A command or a transfer of the laptop counts while it runs; a laptop that only watches does not."""
    entry = root / "agent" / "0" / "worker" / "__main__.py"
    entry.parent.mkdir(parents=True)
    entry.write_text("import signal; print(flush=True); signal.pause()", encoding="ascii")
    child = subprocess.Popen([sys.executable, "-I", str(entry), verb, str(root)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert (idle_s(root) == 0) is busy
    finally:
        child.kill()
        child.communicate()


def test_a_transfer_counts_while_bytes_flow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's rsync or scp is use as long as something flows through it, and none when it only stays open."""
    monkeypatch.setattr(idle, "_TRANSFERS", ("gpu-test-copy",))
    copy = root / "gpu-test-copy"
    copy.symlink_to("/bin/cat")
    source, sink = os.pipe()
    child = subprocess.Popen([str(copy)], stdin=source, stdout=subprocess.DEVNULL)
    try:
        assert idle_s(root) > LONG_S - 1
        feed = subprocess.Popen(["sh", "-c", "while echo x; do sleep 0.01; done"], stdout=sink)
        try:
            until(lambda: idle_s(root) == 0)
        finally:
            feed.kill()
            feed.wait()
    finally:
        os.close(source)
        os.close(sink)
        child.kill()
        child.wait()


def names(run: rundir.Run) -> list[str]:
    return list(Acknowledged(run).missing())


def test_rows_are_home_up_to_what_was_acknowledged(root: Path, run: rundir.Run) -> None:
    """Every whole line beyond what the laptop has is missing; a torn last line is nobody's row."""
    wire = "attempts/0001/rows.jsonl"
    add_row(run, 1)
    assert names(run) == [wire]
    assert idle.look(root)["unpulled"] == [RUN]
    told = home(run, wire)
    assert acknowledged.take(run, told)["refused"] == []
    assert names(run) == []
    with run.attempt(1).rows.open("ab") as file:
        file.write(b'{"key":"torn')
    assert (names(run), idle.look(root)["unpulled"]) == ([], [])
    with run.attempt(1).rows.open("ab") as file:
        file.write(b'"}\n')
    assert names(run) == [wire]
    assert acknowledged.take(run, told)["refused"] == [], "told twice"
    assert names(run) == [wire]


def test_what_this_machine_cannot_confirm_is_not_recorded(run: rundir.Run) -> None:
    """Too many bytes, another hash, a file that is not there, a name that leads elsewhere: none counts as home."""
    add_row(run, 1)
    wire, size = "attempts/0001/rows.jsonl", run.attempt(1).rows.stat().st_size
    good, other = rundir.file_sha256(run.attempt(1).rows), "0" * 64
    for entry in ([size, other], [size + 1, good], [-1, good], ["1", good], [True, good], [size, None]):
        acknowledged.take(run, {"have": {wire: entry}})
        assert names(run) == [wire], entry
    answer = acknowledged.take(run, {"have": {"attempts/0009/rows.jsonl": [1, good]}, "have_whole": {"../x": good}})
    assert answer["refused"] == ["attempts/0009/rows.jsonl"]
    run.acknowledged.write_text(f'{{"{wire}": [5, "x"], "y": 7}}', encoding="ascii")
    assert names(run) == [wire], "a record that is none"


def test_a_file_that_changes_after_it_was_acknowledged_is_not_home(run: rundir.Run) -> None:
    """A file of a command that is written again, to the same size too, is missing until it is home anew."""
    path, wire = run.work / "best.txt", "out/best.txt"
    path.write_bytes(b"first")
    assert names(run) == [wire]
    assert acknowledged.take(run, home(run, wire))["refused"] == []
    assert names(run) == []
    path.write_bytes(b"other")
    assert names(run) == [wire]
    log = run.work / "made.jsonl"
    log.write_bytes(b"{}\n")
    acknowledged.take(run, home(run, wire, "out/made.jsonl"))
    assert names(run) == []
    log.write_bytes(b"[]\n")
    assert names(run) == ["out/made.jsonl"]


def test_rows_of_another_file_under_the_name_are_not_home(run: rundir.Run) -> None:
    """When the file was replaced or has become shorter, what was acknowledged of it does not count any more."""
    wire = "attempts/0001/rows.jsonl"
    add_row(run, 1)
    add_row(run, 2)
    acknowledged.take(run, home(run, wire))
    data = run.attempt(1).rows.read_bytes()
    os.truncate(run.attempt(1).rows, len(data) // 2)
    assert names(run) == [wire]
    run.attempt(1).rows.unlink()
    run.attempt(1).rows.write_bytes(data + rows.encode({"key": "t/s/3#0", "error": None}))
    assert names(run) == [wire]


def test_weights_are_missing_until_every_file_is_home(run: rundir.Run) -> None:
    """A finished folder of weights counts file by file; an unfinished one does not exist yet."""
    folder = run.folder / "checkpoint-10"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"w" * 1000)
    assert names(run) == []
    (folder / rundir.MANIFEST).write_bytes(b"{}")
    assert len(names(run)) == 2
    acknowledged.take(run, home(run, "checkpoint-10/weights.bin"))
    assert names(run) == [f"checkpoint-10/{rundir.MANIFEST}"]
    acknowledged.take(run, home(run, "checkpoint-10/weights.bin", f"checkpoint-10/{rundir.MANIFEST}"))
    assert names(run) == []


def test_an_acknowledgement_takes_a_bounded_time(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be checked in the time of a call is left for the next one, which is asked for."""
    for name in ("a", "b"):
        (run.work / f"{name}.txt").write_bytes(b"x")
    told = home(run, "out/a.txt", "out/b.txt")
    monkeypatch.setattr(acknowledged, "_BUDGET_S", 0.0)
    assert acknowledged.take(run, told) == {"acknowledged": 0, "refused": [], "more": True}
    monkeypatch.setattr(acknowledged, "_BUDGET_S", 30.0)
    assert acknowledged.take(run, told) == {"acknowledged": 2, "refused": [], "more": False}


def test_a_run_that_is_not_there_is_no_trouble(root: Path) -> None:
    """An acknowledgement for a run this machine has not, or no more, is answered and makes nothing."""
    gone = rundir.Run(root / "runs" / "gone")
    assert acknowledged.take(gone, {"have": {}})["acknowledged"] == 0
    assert not gone.folder.exists()

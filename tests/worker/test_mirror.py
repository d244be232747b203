"""A mirror while a real run goes on, killed, full, missing, on the Hub; and its rows merged at home afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rows, rundir
from orchestrator import machines, mirrors
from orchestrator.errors import ConfigError, NotReachable
from orchestrator.home import Arrivals
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import hub as hubs
from tests.worker import machine
from tests.worker.guarding import ENTRY, RUN, add_row
from tests.worker.hub import REPO, TOKEN, Hub
from worker.mirror import Copying, FolderStore, Unusable

TARGET = f"hf://datasets/{REPO}/evals"


@pytest.fixture
def run(tmp_path: Path) -> rundir.Run:
    """A run of a command on a machine, with nothing in it yet."""
    run = rundir.Run(tmp_path / "machine" / "runs" / RUN)
    durable.have_folder(run.attempt(1).folder)
    durable.have_folder(run.work)
    durable.save_json(run.job, {"story": "command", "out": ["*"], "folder": ""})
    durable.save_json(run.current, {"attempt": 1})
    return run


def started(made: Run, mirror: str, **order: Any) -> rundir.Run:
    """Start a run with a mirror; its folder on the machine."""
    machines.this_computer().push_agent(Path(os.environ["GPU_HOME"]) / "agents", made.record.agent)
    machine.start(made, mirror=mirror, machine="first", **order)
    return machine.there(made)


def keys(path: Path) -> list[str]:
    return [row["key"] for row in rows.read([path])]


def once(run: rundir.Run, target: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """One whole copy, by a process of its own."""
    words = [sys.executable, "-I", str(ENTRY), "mirror", str(run.folder), target, "first", "once"]
    return subprocess.run(words, capture_output=True, check=False, timeout=60, env={**os.environ, **env})


def test_rows_are_in_the_mirror_while_the_run_goes_on(counting_run: Callable[..., Run], mirror: Path) -> None:
    """Rows are copied as they are made; at the end the mirror holds the same bytes and the seal, which came last."""
    there = started(counting_run(count=60, pace_s=0.1), str(mirror))
    copy = rundir.Run(mirror / there.folder.name / "machines" / "first").attempt(1)
    until(lambda: copy.rows.exists() and copy.rows.stat().st_size)
    assert there.state().state == "running"
    assert not copy.exit.exists()
    until(copy.exit.exists)
    seal = rundir.Seal.load(copy.exit)
    assert seal is not None
    assert len(keys(copy.rows)) == 60
    for name, facts in seal.files.items():
        if facts["bytes"]:
            assert rundir.file_sha256(copy.folder / name) == facts["sha256"]
    until(lambda: there.state().state == "ended")
    status = durable.load_news(there.attempt(1).status)
    assert (status["state"], status["mirror"]["failed"], status["rows_done"]) == ("ended", "", 60)


def test_a_mirror_that_fails_never_stops_the_run(counting_run: Callable[..., Run], tmp_path: Path) -> None:
    """A mirror that is not there is said in the status and the log; the run is done and sealed as without one."""
    made = counting_run(count=10, pace_s=0.05)
    there = started(made, str(tmp_path / "not-mounted" / "mirror"))
    assert machine.ended(made).reason == "done"
    assert "is not there" in durable.load_news(there.attempt(1).status)["mirror"]["failed"]
    assert "is not there" in there.mirror_log.read_text("utf-8")
    assert "does not have all of it" in there.supervisor_log.read_text("utf-8")
    assert not (tmp_path / "not-mounted").exists(), "it may be a disk that is not mounted"


def test_the_folder_of_a_mirror_is_made_alone(run: rundir.Run, tmp_path: Path) -> None:
    """A folder that is not there is made; a path of which more is missing is none, and nothing of it is made."""
    assert once(run, str(tmp_path / "new")).returncode == 0
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert once(run, str(tmp_path / "not" / "mounted")).returncode != 0
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
def test_a_mirror_that_is_killed_goes_on(counting_run: Callable[..., Run], mirror: Path) -> None:
    """Kill what copies again and again: the run does not notice, and all is in the mirror in the end, once."""
    made = counting_run(count=80, pace_s=0.05)
    there = started(made, str(mirror))
    killed: set[int] = set()
    while there.state().state == "running" and len(killed) < 3:
        for path in Path("/proc").glob("[0-9]*"):
            words = b""
            with contextlib.suppress(OSError):  # it may end while it is looked at
                words = (path / "cmdline").read_bytes()
            if b"\0mirror\0" in words and str(there.folder).encode() in words and int(path.name) not in killed:
                os.kill(int(path.name), signal.SIGKILL)
                killed.add(int(path.name))
    copy = rundir.Run(mirror / there.folder.name / "machines" / "first").attempt(1)
    assert machine.ended(made).reason == "done"
    assert killed
    assert copy.rows.read_bytes() == there.attempt(1).rows.read_bytes()


def test_a_copy_goes_on_where_the_mirror_is(run: rundir.Run, mirror: Path) -> None:
    """Whole lines only; a torn end is cut off; what is no beginning of the file is kept aside, not overwritten."""
    add_row(run, 1)
    with run.attempt(1).rows.open("ab") as file:
        file.write(b'{"key":"torn')
    Copying(run, FolderStore(mirror, "x")).step(final=False)
    copy = mirror / "x" / "attempts" / "0001" / "rows.jsonl"
    assert keys(copy) == ["t/s/1#0"]
    first = copy.read_bytes()
    with copy.open("ab") as file:
        file.write(b"cut off here")
    with run.attempt(1).rows.open("ab") as file:
        file.write(b'"}\n')
    Copying(run, FolderStore(mirror, "x")).step(final=False)
    assert copy.read_bytes() == run.attempt(1).rows.read_bytes()
    copy.write_bytes(b"another machine's\n")
    Copying(run, FolderStore(mirror, "x")).step(final=False)
    assert copy.read_bytes() == run.attempt(1).rows.read_bytes()
    assert copy.with_name("rows.jsonl.diverged-1").read_bytes() == b"another machine's\n"
    assert first


def test_one_that_writes_there_too_is_noticed(run: rundir.Run, mirror: Path) -> None:
    """A file that somebody else appends to in the mirror is not appended to blindly."""
    add_row(run, 1)
    copying = Copying(run, FolderStore(mirror, "x"))
    copying.step(final=False)
    with (mirror / "x" / "attempts" / "0001" / "rows.jsonl").open("ab") as file:
        file.write(b"{}\n")
    add_row(run, 2)
    with pytest.raises(Unusable, match="somebody else"):
        copying.step(final=False)


def test_a_seal_is_copied_last(run: rundir.Run, mirror: Path) -> None:
    """As long as anything it names is not there, the mirror has no seal."""
    add_row(run, 1)
    durable.save_json(run.attempt(1).exit, {"reason": "done"})

    class Broken(FolderStore):
        def append(self, name: str, offset: int, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Copying(run, Broken(mirror, "x")).step(final=True)
    assert not (mirror / "x" / "attempts" / "0001" / "exit.json").exists()
    Copying(run, FolderStore(mirror, "x")).step(final=True)
    assert (mirror / "x" / "attempts" / "0001" / "exit.json").exists()


def test_what_a_mirror_holds_comes_home_when_the_machine_is_gone(
    run: rundir.Run, mirror: Path, home: rundir.Home
) -> None:
    """Rows beyond those at home, files and weights are merged as if the machine had sent them; twice is as once."""
    add_row(run, 1)
    with opened(home) as arrivals:
        arrivals.take(*grown(run, "attempts/0001/rows.jsonl"))
    add_row(run, 2)
    (run.work / "best.bin").write_bytes(b"b" * 3_000_000)
    (run.folder / "checkpoint-5").mkdir()
    (run.folder / "checkpoint-5" / rundir.MANIFEST).write_bytes(b"{}")
    assert once(run, str(mirror)).returncode == 0
    source = mirrors.source(str(mirror), RUN)
    assert source.machines() == ["first"]
    for _ in range(2):
        with opened(home) as arrivals:
            end = mirrors.gather(source, "first", arrivals)
        assert (end["state"], end["attempt"]) == ("died", 1)
        assert keys(home.rows) == ["t/s/1#0", "t/s/2#0"]
        assert (home.out / "best.bin").read_bytes() == b"b" * 3_000_000
        assert (home.machine("first").folder / "checkpoint-5" / rundir.MANIFEST).exists()


def grown(run: rundir.Run, name: str) -> tuple[dict[str, Any], bytes]:
    """The frame with all of a growing file."""
    data = (run.folder / name).read_bytes()
    return {"file": name, "offset": 0, "bytes": len(data), "sha256": rundir.file_sha256(run.folder / name)}, data


def opened(home: rundir.Home) -> Arrivals:
    arrivals = Arrivals.open(home, "first")
    assert arrivals is not None
    return arrivals


def test_nothing_at_home_becomes_less_by_a_mirror(run: rundir.Run, mirror: Path, home: rundir.Home) -> None:
    """A mirror that is behind, or holds something else, adds nothing and takes nothing."""
    add_row(run, 1)
    once(run, str(mirror))
    add_row(run, 2)
    with opened(home) as arrivals:
        arrivals.take(*grown(run, "attempts/0001/rows.jsonl"))
    before = home.rows.read_bytes()
    source = mirrors.source(str(mirror), RUN)
    with opened(home) as arrivals:
        mirrors.gather(source, "first", arrivals)
    there = mirror / RUN / "machines" / "first" / "attempts" / "0001" / "rows.jsonl"
    there.write_bytes(b"x" * 5000 + b"\n")
    with opened(home) as arrivals:
        mirrors.gather(source, "first", arrivals)
    assert home.rows.read_bytes() == before


def test_names_in_a_mirror_are_data(mirror: Path, home: rundir.Home) -> None:
    """Links and names that are none of a run's are not followed, and lead nowhere."""
    base = mirror / RUN / "machines" / "first"
    (base / "attempts" / "0001").mkdir(parents=True)
    (mirror / "secret").write_bytes(b"{}\n")
    (base / "attempts" / "0001" / "rows.jsonl").symlink_to(mirror / "secret")
    (base / "run.json").write_bytes(b"{}")
    (mirror / RUN / "machines" / "-x").mkdir()
    source = mirrors.source(str(mirror), RUN)
    assert source.machines() == ["first"]
    with opened(home) as arrivals, pytest.raises(NotReachable):
        mirrors.gather(source, "first", arrivals)
    assert not home.record.exists()
    with pytest.raises(ConfigError):
        mirrors.source(str(mirror / "none"), RUN)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hubs.serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_the_hub_gets_shards_that_never_change(run: rundir.Run, hub: Hub, home: rundir.Home) -> None:
    """Each copy adds shards with what is new, the seal apart and last; read by plain HTTP they are the same rows."""
    add_row(run, 1)
    assert once(run, TARGET).returncode == 0
    first = dict(hub.files)
    add_row(run, 2)
    (run.work / "best.bin").write_bytes(b"b" * 2_500_000)
    durable.save_json(run.attempt(1).exit, {"reason": "done"})
    assert once(run, TARGET).returncode == 0
    assert all(hub.files[name] == data for name, data in first.items())
    assert [name.rpartition("/")[2] for name in hub.commits[-1]] == ["exit.json"]
    made = len(hub.commits)
    assert once(run, TARGET).returncode == 0
    assert len(hub.commits) == made, "nothing new, no commit"
    run.attempt(1).exit.unlink()
    hub.files = {name: data for name, data in hub.files.items() if not name.endswith("exit.json")}
    source = mirrors.source(TARGET, RUN, TOKEN)
    assert source.machines() == ["first"]
    with opened(home) as arrivals:
        mirrors.gather(source, "first", arrivals)
    assert keys(home.rows) == ["t/s/1#0", "t/s/2#0"]
    assert (home.out / "best.bin").read_bytes() == b"b" * 2_500_000


def test_a_commit_that_fails_is_made_anew(run: rundir.Run, hub: Hub) -> None:
    """Whether a failed commit was made or not: the next copy sees what is there, and no row is twice or lacking."""
    add_row(run, 1)
    hub.fail_next = [400]
    done = once(run, TARGET)
    assert done.returncode == 1
    assert "HTTP 400" in durable.load_news(run.mirror)["failed"]
    assert TOKEN not in json.dumps(durable.load_news(run.mirror)) + done.stderr.decode()
    hub.fail_next = [-400]
    assert once(run, TARGET).returncode == 1
    add_row(run, 2)
    assert once(run, TARGET).returncode == 0
    shards = sorted(name for name in hub.files if "/rows.jsonl/" in name)
    assert b"".join(hub.files[name] for name in shards) == run.attempt(1).rows.read_bytes()


@pytest.mark.parametrize("target", ["hf://nobody/none", "hf://x", "hf://datasets/a/b/../c", "hf://"])
def test_a_repository_that_is_none_is_said(run: rundir.Run, hub: Hub, target: str) -> None:
    """No such repository, or a name that is none: words in the news, nothing else happens."""
    assert once(run, target).returncode == 1
    assert durable.load_news(run.mirror)["failed"]
    with pytest.raises(ConfigError):
        mirrors.source(target, RUN, TOKEN)


def test_a_damaged_shard_is_not_taken(run: rundir.Run, hub: Hub, home: rundir.Home) -> None:
    """A shard whose bytes are not what its name says brings nothing home."""
    add_row(run, 1)
    once(run, TARGET)
    name = next(name for name in hub.files if "/rows.jsonl/" in name)
    hub.files[name] = hub.files[name][:-5] + b"xxx}\n"
    with opened(home) as arrivals, pytest.raises(NotReachable, match="damaged"):
        mirrors.gather(mirrors.source(TARGET, RUN, TOKEN), "first", arrivals)
    assert keys(home.rows) == []

"""What an outbid container had not sent: rescued from its disk, then it is destroyed, whatever became of that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import doctor, machines, rentals, runs
from orchestrator.runs import Run
from tests.cloud import Both, Stand, Timings
from tests.cloud.vast_machines import Container, Containers
from tests.journeys.hurried import begun, gpu
from tests.waiting import until

A100 = ("--gpu", "A100", "--spot", "--budget", "5", "--terminate", "-y", "--environment", "none")
SHORT = {"ssh.SshMachine.patience_s": 2.0}
MADE = 60
_COUNT = """
import json, os, sys, time
os.makedirs("out", exist_ok=True)
done = len(open("out/rows.jsonl").readlines()) if os.path.exists("out/rows.jsonl") else 0
with open("out/rows.jsonl", "a") as file, open(sys.argv[2], "a") as computed:
    for index in range(done, int(sys.argv[1])):
        file.write(json.dumps({"index": index, "pad": "x" * int(sys.argv[3])}) + "\\n")
        file.flush()
        computed.write("%d\\n" % index)
        computed.flush()
        time.sleep(0.03)
"""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own is touched; a project with a program that notes elsewhere what it computes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("count.py").write_text(_COUNT)


class Outbid:
    """A run whose container goes on, unheard, until it is outbid; no other one can be bid for then."""

    def __init__(self, both: Both, tmp_path: Path) -> None:
        for stand in (both.vast, both.lambda_cloud):
            stand.core.timings = Timings(boot_s=0.2, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
        self.both = both
        self.computed = tmp_path / "computed"
        self.pad = 10
        """How long a row is."""
        self.command: subprocess.Popen[str] | None = None
        assert isinstance(both.vast.machines, Containers)
        self.containers: Containers = both.vast.machines

    def begin(self, number: int = 3 * MADE, waits: dict[str, float] | None = None) -> None:
        """Have the run make rows that come home, and then some that do not."""
        words = ("--", sys.executable, "count.py", str(number), str(self.computed), str(self.pad))
        self.command = begun("run", *A100, "--out", "out/*.jsonl", *words, waits={**SHORT, **(waits or {})})
        until(lambda: len(list(runs.remembered())) == 1 and len(lines_home()) >= 5, 90)
        self.container.sshd.freeze()
        before = len(self.indices())
        until(lambda: len(self.indices()) >= before + MADE, 60)

    @property
    def container(self) -> Container:
        """The newest one."""
        return list(self.containers.all.values())[-1]

    def indices(self) -> list[int]:
        """What was computed so far, anywhere."""
        return [int(line) for line in self.computed.read_text().split()] if self.computed.exists() else []

    def outbid(self) -> None:
        """Have somebody bid more, and everything else taken."""
        core = self.both.vast.core
        for slot in core.market.slots:
            core.market.hold(slot)
        core.outbid(self.container.one.instance_id)

    def files(self) -> Path:
        """The run's folder on the container's disk."""
        return self.container.home / ".gpu" / "runs" / newest().run_id

    def said(self, code: int = 0) -> str:
        """What the command said until it ended."""
        assert self.command is not None
        _, said = self.command.communicate(timeout=150)
        assert self.command.returncode == code, said
        assert "Traceback" not in said
        return " ".join(said.split())


@pytest.fixture
def lost(both_clouds: Both, tmp_path: Path) -> Outbid:
    """A run at Vast.ai, which may go on at Lambda."""
    if doctor.rsync().state != doctor.OK:
        pytest.skip("this rsync is not used against hosts of others. Type: apt-get install rsync (3.4.3 or newer)")
    return Outbid(both_clouds, tmp_path)


def newest() -> Run:
    return runs.find(None)


def billing(cloud: Stand) -> list[str]:
    return [instance.instance_id for instance in cloud.core.still_billing()]


def lines_home() -> list[Any]:
    path = newest().home.folder / "out" / "out" / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_done(lost: Outbid, number: int = 3 * MADE) -> None:
    """Every row is home, once, as it should be; nothing costs money, and nothing of a rescue is left."""
    assert lines_home() == [{"index": index, "pad": "x" * lost.pad} for index in range(number)]
    assert billing(lost.both.vast) == billing(lost.both.lambda_cloud) == []
    assert lost.both.vast.core.count("/commands/rsync/") <= 1, "once for one loss"
    assert not any(path.name != "gate" for rental in rentals.known() for path in rental.folder.glob("rescued/*"))


@pytest.mark.slow
def test_rows_are_rescued_from_an_outbid_container(lost: Outbid) -> None:
    """What the container had not sent comes from its disk, it is destroyed, and no rescued row is computed again."""
    lost.begin()
    home = len(lines_home())
    lost.outbid()
    said = lost.said()
    assert "bytes of its files from" in said
    assert "before it was given back" in said
    assert len(lost.both.lambda_cloud.core.ours()) == 1
    is_done(lost)
    assert max(Counter(lost.indices()).values()) == 1, "computed twice"
    assert home + MADE < 3 * MADE
    assert lost.container.is_over
    name = next(rental.name for rental in rentals.known() if rental.record.provider == "vast")
    assert (machines.folder(name) / "gate" / "known_hosts").read_text().startswith("[127.")
    assert not (Path(os.environ["HOME"]) / ".ssh" / "known_hosts").exists()


Spoil = Callable[[Outbid], None]


def gate_refuses(lost: Outbid) -> None:
    lost.both.vast.fault("no-copy")


def gate_is_silent(lost: Outbid) -> None:
    lost.containers.gate()
    assert lost.containers.copier is not None
    lost.containers.copier.freeze()


def gate_is_dead(lost: Outbid) -> None:
    lost.both.vast.fault("closed", when="^copy$")


def folder_is_a_link(lost: Outbid) -> None:
    (lost.files() / "work").rename(lost.files() / "elsewhere")
    (lost.files() / "work").symlink_to(lost.files() / "elsewhere")


def other_bytes(lost: Outbid) -> None:
    (lost.files() / "work" / "out" / "rows.jsonl").write_bytes(os.urandom(5000) + b"\n{}\n")


def file_is_huge(lost: Outbid) -> None:
    with (lost.files() / "work" / "out" / "rows.jsonl").open("r+b") as file:
        file.truncate(64 << 30)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (gate_refuses, "could not be copied from"),
        (gate_is_silent, "could not be copied from"),
        (gate_is_dead, "could not be copied from"),
        (folder_is_a_link, "nothing that was not home was found"),
        (other_bytes, "nothing that was not home was found"),
        (file_is_huge, "nothing that was not home was found"),
    ],
)
@pytest.mark.slow
def test_a_rescue_that_fails_costs_nothing(lost: Outbid, spoil: Spoil, words: str) -> None:
    """Whatever a host does, or sends: what is home stays as it was, the container is destroyed, and the run ends."""
    lost.begin()
    lost.outbid()
    spoil(lost)
    assert words in lost.said()
    is_done(lost)


def slowly(lost: Outbid, waits: dict[str, float] | None = None) -> None:
    """A container that is outbid and copied from slowly; returns once rows of it are here, where they are copied to."""
    lost.pad = 6000
    lost.begin(waits=waits)
    lost.containers.copies_kb_per_s = 20
    lost.outbid()
    until(lambda: lost.containers.copyings() == 1, 60)
    copied = machines.folder(first()) / "rescued" / newest().run_id / "files" / "work" / "out" / "rows.jsonl"
    until(lambda: copied.exists() and copied.stat().st_size > 20_000 + size_home(), 60)


def size_home() -> int:
    return (newest().home.folder / "out" / "out" / "rows.jsonl").stat().st_size


def first() -> str:
    """The name of the machine at Vast.ai."""
    return next(rental.name for rental in rentals.known() if rental.record.provider == "vast")


@pytest.mark.slow
def test_what_came_of_a_copy_that_is_cut_is_taken(lost: Outbid) -> None:
    """The gate dies in the middle: whole rows of what came are home, the torn one is computed again."""
    slowly(lost)
    assert lost.containers.copier is not None
    lost.containers.copier.kill_all()
    said = lost.said()
    assert "bytes of its files from" in said
    assert "the rest could not be copied" in said
    is_done(lost)
    twice = sum(1 for times in Counter(lost.indices()).values() if times > 1)
    assert 0 < twice < MADE, said


@pytest.mark.slow
def test_a_rescue_ends_in_time(lost: Outbid) -> None:
    """A copy that takes longer is broken off, and what came is taken; its machine is not waited for."""
    slowly(lost, {"rescue._DEADLINE_S": 30.0})
    assert lost.containers.copier is not None
    lost.containers.copier.freeze()
    said = lost.said()
    assert "not all of it came within 30 s" in said, said
    assert "bytes of its files from" in said, said
    is_done(lost)


@pytest.mark.slow
def test_a_host_cannot_fill_the_disk_here(lost: Outbid) -> None:
    """More than is taken breaks the copy off."""
    lost.pad = 3000
    lost.begin(waits={"rescue._MAX_BYTES": 60_000.0})
    lost.containers.copies_kb_per_s = 100
    lost.outbid()
    assert "more was sent than is taken" in lost.said()
    is_done(lost)


@pytest.mark.slow
@pytest.mark.parametrize("command", [("advance", "--all"), ("resume",), ("audit", "--fix", "-y")])
def test_a_killed_rescue_is_not_begun_again(lost: Outbid, command: tuple[str, ...]) -> None:
    """SIGKILL in the middle: the next command ends the container at once, and what was copied so far is home."""
    slowly(lost)
    assert lost.command is not None
    lost.command.kill()
    lost.command.communicate(timeout=10)
    (found,) = [rental for rental in rentals.known() if rental.record.provider == "vast"]
    assert found.record.state == "stopping"
    before = size_home()
    done = gpu(*command)
    words = "the rest could not be copied: the copy was cut off here"
    assert command[0] == "resume" or words in " ".join(done.stderr.split()), done.stderr
    assert billing(lost.both.vast) == []
    assert lost.both.vast.core.count("/commands/rsync/") == 1
    assert size_home() > before + 15_000
    assert [line["index"] for line in lines_home()] == list(range(len(lines_home())))


@pytest.mark.slow
def test_a_container_that_wakes_meanwhile_is_ended(lost: Outbid) -> None:
    """Its bid wins again while it is copied from: it is destroyed all the same, and bills no second time."""
    slowly(lost)
    one = lost.container.one
    with lost.both.vast.core.lock:
        one.rival_until = one.taken_until = 0.0
    until(lambda: one.starts == 2, 30)
    said = lost.said()
    assert "before it was given back" in said
    assert lost.container.is_over
    is_done(lost)


@pytest.mark.slow
@pytest.mark.parametrize("version", [None, "3.2.7"])
def test_without_a_sound_rsync_the_machine_is_ended_and_that_is_said(
    lost: Outbid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    """A laptop without rsync, or with one that a hostile host gets through, says so, and goes on with what is home."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for path in Path(folder).iterdir():
            if path.name != "rsync" and not (programs / path.name).exists():
                (programs / path.name).symlink_to(path)
    if version:
        (programs / "rsync").write_text(f"#!/bin/sh\necho 'rsync  version {version}  protocol version 31'\n")
        (programs / "rsync").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(programs))
        lost.begin()
    lost.outbid()
    assert "that takes rsync 3.4.3 or newer on this computer" in lost.said()
    assert lost.both.vast.core.count("/commands/rsync/") == 0
    is_done(lost)


SPOT = ("launch", "v", "--gpu", "A100", "--spot", "-y")


def left_alone(lost: Outbid, *look: str) -> None:
    """A container on which a run has ended that nobody has looked at, unless by `gpu LOOK`, and which is outbid."""
    assert gpu(*SPOT).returncode == 0
    words = ("--", sys.executable, "count.py", "40", str(lost.computed), "10")
    wish = ("run", "--on", "v", "--environment", "none", "--out", "out/*.jsonl", "--detach")
    assert gpu(*wish, *words).returncode == 0
    until(lambda: (lost.files() / "attempts" / "0001" / "exit.json").exists(), 60)
    assert not look or gpu(*look).returncode == 0
    lost.outbid()


@pytest.mark.slow
@pytest.mark.parametrize("command", [("advance", "--all"), ("terminate", "v", "-y")])
def test_whoever_ends_an_outbid_container_rescues_its_rows(lost: Outbid, command: tuple[str, ...]) -> None:
    """Cron, or who gives it back, copies what is not home and destroys it; a run that had ended there is sealed."""
    left_alone(lost)
    done = gpu(*command)
    assert done.returncode == 0, done.stderr
    assert "before it was given back" in done.stderr
    assert newest().record.state == "sealed"
    is_done(lost, 40)


@pytest.mark.slow
def test_nothing_is_copied_when_all_is_home_or_given_up(lost: Outbid) -> None:
    """Who gives up what is there waits for nothing; nor does one whose rows are home."""
    left_alone(lost)
    done = gpu("terminate", "v", "-y", "--discard")
    assert done.returncode == 0, done.stderr
    for slot in lost.both.vast.core.market.slots:
        lost.both.vast.core.market.release(slot)
    left_alone(lost, "pull")
    done = gpu("advance", "--all")
    assert done.returncode == 0, done.stderr
    assert lost.both.vast.core.count("/commands/rsync/") == 0
    assert billing(lost.both.vast) == []

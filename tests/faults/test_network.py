"""A network that drops, resets, loses and moves: it is said in time, nothing starts anew, and all rows come home."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from jobs import rows, rundir
from orchestrator import enrolment, machines, ssh, ssh_config
from orchestrator.errors import NotReachable
from orchestrator.runs import Run
from tests.rig import Proxy, Reachable, Sshd, Wire
from tests.rig.netns import Chain
from tests.waiting import until

GPU = [sys.executable, "-m", "orchestrator.cli"]
SAID_WITHIN_S = 30.0
"""The promise: what is silent is said to be unreachable within this time."""
LARGE_BYTES = 400_000_000
Make = Callable[..., Run]
Commands = Callable[..., subprocess.Popen[str]]


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def started() -> Iterator[Commands]:
    """Starts commands; those that still live at the end of the test are ended."""
    commands: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        commands.append(subprocess.Popen([*GPU, *words], stdout=pipe, stderr=pipe, text=True))
        return commands[-1]

    yield start
    for command in commands:
        command.kill()
        command.communicate()


@pytest.fixture
def wire(wires: Callable[..., Wire]) -> Wire:
    """A machine on a wire of its own, added as `box`."""
    wire = wires()
    add(wire)
    return wire


def add(wire: Wire) -> None:
    address = ssh_config.Address(wire.sshd.user, wire.address, wire.port)
    enrolment.add(enrolment.Asked("box", address, wire.sshd.key, sys.executable))


def made_there(wire: Wire, run: Run) -> int:
    """How many whole rows there are on the machine; asserts that no attempt but the first was started."""
    attempts = rundir.Run(wire.sshd.home / ".gpu" / "runs" / run.run_id).attempts()
    assert len(attempts) <= 1, "the run was started anew"
    return sum(rows.index(attempt.rows).good for attempt in attempts if attempt.rows.exists())


def home(run: Run) -> int:
    return rows.index(run.home.rows).good if run.home.rows.exists() else 0


def assert_home(wire: Wire, run: Run, count: int) -> None:
    """One attempt, every row once at home, and nothing of the run alive."""
    run.reload()
    assert run.record.state == "sealed", run.record
    assert made_there(wire, run) == count
    keys = [row["key"] for row in (rows.decode(line) for _, line in rows.whole_lines(run.home.rows))]
    assert sorted(keys) == sorted(f"t/s/{index}#0" for index in range(count))
    until(lambda: not wire.sshd.processes(), 10)


def is_silent() -> bool:
    return machines.news("box").get("reachable") is False


def assert_goes_on(wire: Wire, run: Run, command: subprocess.Popen[str], count: int) -> None:
    """The command that said it could not reach the machine reaches it again and ends with all rows."""
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    assert "answers again" in said
    assert_home(wire, run, count)


@pytest.mark.slow
def test_a_dropped_connect_is_said(wire: Wire, counting_run: Make) -> None:
    """Packets dropped before a run begins: unreachable within 30 s, with its address; later it starts, once."""
    run = counting_run(on="box", count=20)
    wire.drop()
    began = time.monotonic()
    refused = gpu("resume", run.run_id)
    assert time.monotonic() - began < SAID_WITHIN_S
    assert refused.returncode == NotReachable.exit_code, refused.stderr
    assert wire.address in refused.stderr
    assert made_there(wire, run) == 0
    wire.heal()
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert_home(wire, run, 20)


@pytest.mark.parametrize(
    "chains",
    [
        pytest.param(("INPUT", "OUTPUT"), id="both"),
        pytest.param(("INPUT",), id="to it", marks=pytest.mark.slow),
        pytest.param(("OUTPUT",), id="from it", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_packets_dropped_during_a_follow(
    wire: Wire, counting_run: Make, started: Commands, chains: tuple[Chain, ...]
) -> None:
    """Packets dropped in mid-run, both ways or one: said within 30 s, the run goes on there, and all comes home."""
    run = counting_run(on="box", count=100, pace_s=0.05)
    command = started("resume", run.run_id)
    until(lambda: home(run) >= 5)
    wire.drop(chains)
    until(is_silent, SAID_WITHIN_S)
    wire.heal()
    assert_goes_on(wire, run, command, 100)


@pytest.mark.slow
def test_packets_dropped_during_a_push(wire: Wire, started: Commands) -> None:
    """Packets dropped while a large file is sent: said within a minute, and repeated, the run has the file whole."""
    with Path("large.bin").open("wb") as file:
        file.truncate(LARGE_BYTES)
        file.write(b"end")
    words = "import hashlib, pathlib; print(hashlib.file_digest(open('large.bin', 'rb'), 'sha256').hexdigest())"
    asked = ["--on", "box", "--environment", "none", "--need", "large.bin", "-y", "--", "python", "-c", words]
    command = started("run", *asked)
    incoming = wire.sshd.home / ".gpu" / "store" / "incoming"
    until(lambda: incoming.exists() and any(path.stat().st_size for path in incoming.iterdir()))
    wire.drop()
    began = time.monotonic()
    _, said = command.communicate(timeout=120)
    assert command.returncode == NotReachable.exit_code, said
    assert time.monotonic() - began < 2 * SAID_WITHIN_S, said
    wire.heal()
    done = gpu("resume")
    assert done.returncode == 0, done.stderr
    [found] = json.loads(gpu("runs", "--json").stdout)
    assert found["state"] == "sealed"
    digest = rundir.file_sha256(Path("large.bin"))
    assert digest in gpu("logs", found["run_id"]).stdout


def test_resets_during_a_follow(wire: Wire, counting_run: Make, started: Commands) -> None:
    """A firewall that resets all connections and refuses new ones is said, waited for, and nothing starts anew."""
    run = counting_run(on="box", count=80, pace_s=0.05)
    command = started("resume", run.run_id)
    until(lambda: home(run) >= 5)
    wire.reject_rst()
    until(is_silent, SAID_WITHIN_S)
    wire.heal()
    assert_goes_on(wire, run, command, 80)


@pytest.mark.slow
def test_a_link_that_is_down_for_a_moment_is_not_noticed(wire: Wire, counting_run: Make, started: Commands) -> None:
    """A cable out for less than 20 s: the same connection goes on, and nothing is said."""
    run = counting_run(on="box", count=100, pace_s=0.05)
    command = started("resume", run.run_id)
    until(lambda: home(run) >= 5)
    before = made_there(wire, run)
    wire.link_down()
    until(lambda: made_there(wire, run) >= before + 30)
    wire.link_up()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    assert "answers again" not in said
    assert_home(wire, run, 100)


@pytest.mark.slow
def test_a_link_that_is_down_for_long(wire: Wire, counting_run: Make, started: Commands) -> None:
    """A cable out until the connection is dead is said within 30 s; once it is in again all comes home."""
    run = counting_run(on="box", count=100, pace_s=0.05)
    command = started("resume", run.run_id)
    until(lambda: home(run) >= 5)
    wire.link_down()
    until(is_silent, SAID_WITHIN_S)
    wire.link_up()
    assert_goes_on(wire, run, command, 100)


@pytest.mark.slow
def test_another_address_of_the_laptop(wire: Wire, counting_run: Make, started: Commands) -> None:
    """The laptop moves to another network in mid-run: the old connection is given up, a new one follows to the end."""
    run = counting_run(on="box", count=100, pace_s=0.05)
    command = started("resume", run.run_id)
    until(lambda: home(run) >= 5)
    wire.change_own_address()
    until(is_silent, SAID_WITHIN_S)
    assert_goes_on(wire, run, command, 100)


@pytest.mark.slow
def test_another_address_of_the_machine(wire: Wire, counting_run: Make) -> None:
    """A machine at another address is unreachable, not dead; forgotten and added anew, its run comes home as it was."""
    run = counting_run(on="box", count=20, pace_s=0.01)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    old = wire.address
    wire.change_address()
    began = time.monotonic()
    refused = gpu("resume", run.run_id)
    assert time.monotonic() - began < SAID_WITHIN_S
    assert refused.returncode == NotReachable.exit_code, refused.stderr
    assert old in refused.stderr
    assert "may still run" in gpu("forget", "box").stderr
    forgotten = gpu("forget", "box", "--discard")
    assert forgotten.returncode == 0, forgotten.stderr
    add(wire)
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert_home(wire, run, 20)


@pytest.mark.slow
def test_one_packet_in_ten_lost(wire: Wire, counting_run: Make) -> None:
    """With 10 % of all packets lost, both ways and all the time, the run needs no second command."""
    run = counting_run(on="box", count=100, pace_s=0.02, size=5000)
    wire.lose(0.1)
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    assert_home(wire, run, 100)


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.first(1)
def test_a_login_cut_at_any_byte_is_no_refusal(
    machine_room: Callable[..., Sshd],
    proxies: Callable[[Reachable], Proxy],
    monkeypatch: pytest.MonkeyPatch,
    how: Literal["rst", "fin"],
) -> None:
    """Wherever the server's half of a login ends, the machine did not answer; it never looks like a wrong key."""
    server = machine_room("box")
    proxy = proxies(server)
    address = ssh_config.Address(server.user, proxy.address, proxy.port)
    enrolment.add(enrolment.Asked("box", address, server.key, sys.executable))
    monkeypatch.setattr(ssh, "_TRIES", 1)
    before = proxy.bytes_down
    with machines.at("box") as machine:
        machine.call(["true"], b"")
    whole = proxy.bytes_down - before
    cuts = 0
    for count in range(0, whole, 47):
        proxy.cut_after(count, "down", how)
        with machines.at("box") as machine:
            try:
                machine.call(["true"], b"")
            except NotReachable:
                cuts += 1
        proxy.pass_all()
    assert cuts > whole // 47 // 2

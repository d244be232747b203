"""`gpu doctor`: what it says of tools, folders, disks and machines is so."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs import durable
from orchestrator import config, doctor, machines, ssh_config
from orchestrator.cli import house
from orchestrator.doctor import BAD, OK, WARN, Check
from orchestrator.errors import NotReachable, UsageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own; nothing outside loopback is asked, whatever a test forgets."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # loopback must not be asked through it
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    for variable in ("GPU_LAMBDA_URL", "GPU_VAST_URL"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return folder


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program of that name, with that shell text, in place of all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return put


def machine(name: str = "box") -> Path:
    """Makes the folder of a machine as it should be."""
    folder = config.state_folder() / "machines" / name
    durable.have_folder(folder)
    for file in ("machine.json", "key", "known_hosts", "ssh_config"):
        durable.replace_whole(folder / file, b"{}")
    return folder


def named(checks: Iterator[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def run(*words: str) -> Result:
    return CliRunner().invoke(house.doctor, words)


def test_everything_is_looked_at_here() -> None:
    """Each check has a name of its own, a state, words, and a way to mend it when it is not ok."""
    machine()
    found = list(doctor.checks(lambda _: None))
    expected = ["python", "ssh", "ssh-keygen", "rsync", "git", "state folder", "state permissions", "disk of state"]
    expected += ["disk of results", "box files", "box answers", "lambda key", "vast key"]
    assert [check.name for check in found] == expected
    assert {check.state for check in found} <= {OK, WARN, BAD}
    assert all(check.words for check in found)
    assert all(bool(check.mend) == (check.state != OK) for check in found)


def test_an_old_python_is_bad() -> None:
    """Python below 3.11 is bad, from there on fine."""
    assert doctor.python((3, 10, 14)).state == BAD
    assert doctor.python((3, 11, 0)).state == OK
    assert doctor.python((4, 0, 0)).state == OK


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        ("echo 'rsync  version 3.5.0  protocol version 32'", OK, "3.5.0"),
        ("echo 'rsync  version 3.4.3  protocol version 32'", OK, "3.4.3"),
        ("echo 'rsync  version v3.10.0  protocol version 33'", OK, "3.10.0"),
        ("echo 'rsync  version 3.4.2  protocol version 32'", WARN, "hostile machine"),
        ("echo 'rsync  version 3.2.7  protocol version 31'", WARN, "hostile machine"),
        ("echo 'openrsync: protocol version 29'; echo 'rsync version 2.6.9 compatible'", WARN, "tar"),
        ("echo something else", WARN, "hostile machine"),
        ("exit 1", WARN, "tar"),
        ("kill -9 $$", WARN, "tar"),
    ],
)
def test_rsync_is_known_by_its_version(tool: Callable[[str, str], None], script: str, state: str, words: str) -> None:
    """Old versions and the other program of that name are warned of, with the reason."""
    tool("rsync", script)
    found = named(doctor.tools())["rsync"]
    assert found.state == state
    assert words in found.words


@pytest.mark.parametrize(
    ("script", "state"),
    [("echo 'OpenSSH_9.2p1 Debian-2, OpenSSL 3.0' >&2", OK), ("echo 'OpenSSH_7.2p2' >&2", WARN), ("exit 127", BAD)],
)
def test_ssh_is_known_by_its_version(tool: Callable[[str, str], None], script: str, state: str) -> None:
    """An ssh too old to include files is warned of; one that does not run is bad."""
    tool("ssh", script)
    assert named(doctor.tools())["ssh"].state == state


def test_missing_tools_are_said(tool: Callable[[str, str], None]) -> None:
    """Where no program is found, each is named with what its lack means."""
    assert {name: check.state for name, check in named(doctor.tools()).items()} == {
        "ssh": BAD,
        "ssh-keygen": WARN,
        "rsync": WARN,
        "git": WARN,
    }


def test_a_tool_that_hangs_is_given_up(tool: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that never ends does not keep the doctor waiting."""
    monkeypatch.setattr(doctor, "_TOOL_S", 0.2)
    tool("ssh", "while :; do :; done")
    assert named(doctor.tools())["ssh"].state == BAD


@pytest.mark.parametrize(("mode", "state"), [(0o700, OK), (0o755, WARN), (0o750, WARN), (0o770, BAD), (0o777, BAD)])
def test_others_should_not_reach_the_state(mode: int, state: str) -> None:
    """A state folder others can read is warned of, one they can change is bad, with the command that mends it."""
    folder = config.state_folder()
    folder.chmod(mode)
    found = named(doctor.state_folder())["state permissions"]
    assert found.state == state
    if state != OK:
        subprocess.run(found.mend, shell=True, check=True, timeout=10)
        assert named(doctor.state_folder())["state permissions"].state == OK


def test_a_state_folder_that_cannot_be_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file lies in the way of the state folder, that is said, and the other checks still come."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPU_HOME", str(tmp_path / "file" / "state"))
    done = run("--offline", "--json")
    assert done.exit_code == 3
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["state folder"]["state"] == BAD
    assert found["python"]["state"] == OK


def test_a_state_folder_without_room_for_a_file_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the folder can be written is found out by writing."""
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    assert doctor._writable(Path("/proc/self")).state == BAD


@pytest.mark.parametrize(
    ("free", "state"), [(10**9 - 1, BAD), (10**9, WARN), (10**10 - 1, WARN), (10**10, OK), (10**13, OK)]
)
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    """Below 1 GB is bad, below 10 GB is warned of, also for a folder that is not there yet."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage(10**14, 0, free if place.exists() else -1))
    assert doctor.disk("disk", tmp_path / "not" / "yet").state == state


def spoil(folder: Path, what: str) -> None:
    if what == "key":
        (folder / "key").chmod(0o640)
    elif what == "folder":
        folder.chmod(0o755)
    else:
        (folder / what).unlink()


@pytest.mark.parametrize("what", ["key", "folder", "ssh_config", "machine.json", "known_hosts"])
def test_a_machine_with_a_wrong_folder_is_bad(what: str) -> None:
    """A key that others can read, or a missing file, is bad; other machines and this computer are not blamed."""
    spoil(machine(), what)
    machine("fine")
    (config.state_folder() / "machines" / "local" / "runs").mkdir(parents=True)
    (config.state_folder() / "machines" / ".gone-x").mkdir()
    found = named(doctor.machines(None))
    assert {name: check.state for name, check in found.items()} == {"box files": BAD, "fine files": OK}
    if what in ("key", "folder"):
        subprocess.run(found["box files"].mend, shell=True, check=True, timeout=10)
        assert named(doctor.machines(None))["box files"].state == OK


def test_machines_are_asked_at_once_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine is asked; one that fails, or never answers, is bad, and none keeps the others waiting."""
    monkeypatch.setattr(doctor, "ANSWER_S", 0.3)
    never = threading.Event()

    def reach(name: str) -> str | None:
        if name == "raises":
            raise NotReachable("it hung up")
        return never.wait(20) and None if name.startswith("never") else None if name == "fine" else "no \x1b[31mroute"

    for name in ("fine", "never1", "never2", "lost", "raises"):
        machine(name)
    began = time.monotonic()
    found = named(doctor.machines(reach))
    never.set()
    assert time.monotonic() - began < 5
    said = {name: found[f"{name} answers"] for name in ("fine", "never1", "never2", "lost", "raises")}
    assert [check.state for check in said.values()] == [OK, BAD, BAD, BAD, BAD]
    assert "no answer" in said["never2"].words
    assert said["lost"].words == "no route"
    assert said["raises"].words == "it hung up"


def test_a_real_machine_that_is_not_there() -> None:
    """The command asks a machine by its record, and says in words that nobody listens there."""
    folder = machine()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    record = machines.Record("box", "u", "127.0.0.1", port, "/r", "python3", None, None, False, "", "", "", None, 0)
    machines.save(record)
    durable.replace_whole(folder / "ssh_config", b"")
    machines.write_ssh_config("box")
    blob = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(32)).decode()
    key_line = ssh_config.known_host_line(ssh_config.Address("u", "127.0.0.1", port), "ssh-ed25519", blob)
    durable.replace_whole(folder / "known_hosts", key_line.encode())
    done = run("--json")
    assert done.exit_code == 3
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["box answers"]["state"] == BAD
    assert "box" in found["box answers"]["mend"]


def test_setup_ssh_by_command(home: Path) -> None:
    """`gpu setup-ssh` sets the only machine up, says what to type, and undoes it."""
    machine()
    machines.save(machines.Record("box", "u", "h", 22, "/r", "p", None, None, False, "", "", "", None, 0))
    done = CliRunner().invoke(house.setup_ssh, [])
    assert (done.exit_code, done.stdout.split("    ")[0]) == (0, "Type: ssh gpu-box")
    assert (home / ".ssh" / "config").exists()
    done = CliRunner().invoke(house.setup_ssh, ["--undo"])
    assert (done.exit_code, done.stdout) == (0, "ssh no longer knows gpu-box.\n")
    assert not (home / ".ssh").exists()
    done = CliRunner().invoke(house.setup_ssh, ["--undo"])
    assert isinstance(done.exception, UsageError)
    done = CliRunner().invoke(house.setup_ssh, ["box", "--undo"])
    assert (done.exit_code, done.stdout) == (0, "box was not set up; nothing was changed.\n")

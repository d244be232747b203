"""Machines that are wrong, broken, full or talkative: each is named, and nothing is left over here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError, NotReachable, UsageError
from tests import rig
from tests.rig import Sshd
from tests.waiting import until

GPU = [sys.executable, "-m", "orchestrator.cli"]
TOOLS = ("sh", "bash", "mkdir", "rm", "df", "tail", "tr", "cut", "uname", "cat", "env")
talkers = pytest.fixture(rig.talkers)
Box = Callable[..., Sshd]
Room = Callable[..., Sshd]


def gpu(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    done = subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def place(server: Sshd) -> str:
    return f"{server.user}@{server.address}:{server.port}"


def added(server: Sshd, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`gpu add box`, with a key that the machine takes unless another is named."""
    key = [] if "--key" in more else ["--key", str(server.key)]
    return gpu("add", "box", place(server), *key, *more, **variables)


def assert_refused(done: subprocess.CompletedProcess[str], kind: type[Exception], *said: str) -> None:
    """The right exit code, words that name the thing, and nothing of the machine left here."""
    assert done.returncode == kind.exit_code, done.stderr  # type: ignore[attr-defined]
    for word in said:
        assert word in done.stderr
    assert not [path.name for path in (Path(os.environ["GPU_HOME"]) / "machines").glob("box*")]
    listed = [machine["name"] for machine in json.loads(gpu("status", "--json").stdout)]
    assert "box" not in listed


def assert_works(server: Sshd, *more: str) -> None:
    """It can be added, and what a command prints there is all that comes."""
    done = added(server, *more)
    assert done.returncode == 0, done.stderr
    said = gpu("exec", "box", "--", "echo", "hi")
    assert (said.returncode, said.stdout) == (0, "hi\n"), said.stderr


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own of that size; the test is skipped, saying so, where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here: it needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("address", "kind", "said"),
    [
        ("nohost.invalid", UsageError, "USER@HOST"),
        ("root@ho st", UsageError, "ho st"),
        ("root@-oProxyCommand=x", UsageError, "-oProxyCommand"),
        ("root@127.0.0.1:99999", UsageError, "99999"),
        ("root@nohost.invalid", NotReachable, "nohost.invalid port 22"),
        ("root@127.0.0.1:1", NotReachable, "127.0.0.1 port 1"),
    ],
)
def test_a_wrong_address_is_named(address: str, kind: type[Exception], said: str) -> None:
    """An address that is none, or where nobody is, is named."""
    assert_refused(gpu("add", "box", address), kind, said)


def test_another_service_at_the_port_is_no_machine(talkers: Callable[[bytes], Any]) -> None:
    """A port where something else than SSH speaks is said to be just that."""
    web = talkers(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert_refused(gpu("add", "box", f"root@{web.address}:{web.port}"), NotReachable, "SSH server", str(web.port))


@pytest.mark.parametrize("name", ["local", "-x", "a/b", "..", "", "a b", "größer"])
def test_a_name_that_no_machine_may_have(machine_room: Room, name: str) -> None:
    """A name that is taken by this computer, or could not be a folder and a host, is refused."""
    server = machine_room()
    done = gpu("add", "--key", str(server.key), "--", name, place(server))
    assert_refused(done, UsageError, repr(name))
    folder = Path(os.environ["GPU_HOME"]) / "machines"
    assert [path.name for path in folder.glob("*") if path.is_dir() and path.name != "local"] == []


def test_a_wrong_user_or_key_is_named(machine_room: Room, tmp_path: Path) -> None:
    """A user or a key that the machine does not take, and a file that is no key, are named; no key here: said so."""
    server = machine_room()
    other, junk, absent = tmp_path / "other", tmp_path / "junk", tmp_path / "absent"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    junk.write_text("junk", encoding="utf-8")
    for key in (other, junk, absent):
        assert_refused(added(server, "--key", str(key)), ConfigError, str(key))
    done = gpu("add", "box", f"nobodyhere@{server.address}:{server.port}", "--key", str(server.key))
    assert_refused(done, ConfigError, "nobodyhere@")
    done = gpu("add", "box", place(server), HOME=str(tmp_path), SSH_AUTH_SOCK="")
    assert_refused(done, ConfigError, "there is none")


def test_a_python_that_is_none_is_named(machine_room: Room) -> None:
    """--python is checked on the machine."""
    done = added(machine_room(), "--python", "/nonexistent/python")
    assert_refused(done, ConfigError, "/nonexistent/python", "--python")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """The socket of a real ssh-agent, empty; the agent has ended after the test."""
    folder = tmp_path.parent / f"agent-{tmp_path.name[-12:]}"
    folder.mkdir(mode=0o700)
    socket = folder / "s"
    child = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    until(socket.exists)
    yield str(socket)
    child.terminate()
    child.wait(10)


def give(agent: str, key: Path, passphrase: str) -> None:
    """ssh-add, as its user does it by hand."""
    ask = key.with_name("ask")
    ask.write_text(f"#!/bin/sh\necho {passphrase}\n", encoding="utf-8")
    ask.chmod(0o700)
    how = {**os.environ, "SSH_AUTH_SOCK": agent, "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(["ssh-add", str(key)], env=how, check=True, capture_output=True, stdin=subprocess.DEVNULL)


def test_a_key_with_a_passphrase_comes_from_the_agent(machine_room: Room, tmp_path: Path, agent: str) -> None:
    """Without an agent that holds it, such a key is refused with the line to type; with one, it works."""
    server = machine_room()
    key = Path(shutil.copy(server.key, tmp_path / "locked"))
    key.chmod(0o600)
    change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)]
    subprocess.run(change, check=True, capture_output=True)
    for socket in ("", str(tmp_path / "nothing"), agent):
        done = added(server, "--key", str(key), SSH_AUTH_SOCK=socket)
        assert_refused(done, ConfigError, f"ssh-add {key}")
    give(agent, key, "secret")
    done = added(server, "--key", str(key), SSH_AUTH_SOCK=agent)
    assert done.returncode == 0, done.stderr
    assert gpu("exec", "box", "--", "echo", "hi", SSH_AUTH_SOCK=agent).stdout == "hi\n"
    later = gpu("exec", "box", "--", "echo", "hi", SSH_AUTH_SOCK="")
    assert later.returncode == ConfigError.exit_code
    assert f"ssh-add {key}" in later.stderr


def test_a_host_key_that_is_not_the_one(machine_room: Room) -> None:
    """A fingerprint that differs from the one asked for adds nothing; one that changes later stops every command."""
    server = machine_room()
    assert_refused(added(server, "--fingerprint", "SHA256:abc"), ConfigError, server.host_fingerprint(), "SHA256:abc")
    assert added(server, "--fingerprint", server.host_fingerprint()).returncode == 0
    before = server.host_fingerprint()
    server.new_host_key()
    for words in (["exec", "box", "--", "echo", "hi"], ["sync", "box"], ["run", "--on", "box", "--", "true"]):
        done = gpu(*words)
        assert done.returncode == ConfigError.exit_code, done.stderr
        assert before in done.stderr
        assert server.host_fingerprint() in done.stderr
        assert "hi" not in done.stdout.split()


@pytest.mark.parametrize(
    ("shell", "said"), [("/bin/false", "login shell of box"), ("/usr/sbin/nologin", "not available")]
)
def test_a_login_shell_that_runs_nothing(machine_room: Room, shell: str, said: str) -> None:
    """An account without a shell is said to be one, with what it says itself."""
    server = machine_room()
    server.shell = shell
    server.restart()
    assert_refused(added(server), ConfigError, said)


@pytest.mark.parametrize(
    ("bashrc", "said"),
    [
        ('[ -z "$TMUX" ] && exec tmux\n', "terminal"),
        ("exec cat\n", "login shell of box"),
        ("echo bye; exit 3\n", "bye"),
        ("while true; do echo spam; done\n", "spam"),
        ("while true; do printf spam; done\n", "spam"),
    ],
    ids=["tmux", "exec", "exit", "endless", "endless line"],
)
@pytest.mark.first(2)
def test_login_files_that_stop_every_command(machine_room: Room, bashrc: str, said: str) -> None:
    """A .bashrc that replaces, ends or floods every session is named, with what it said last."""
    server = machine_room()
    server.write_bashrc(bashrc)
    assert_refused(added(server), ConfigError, "login files", said)


@pytest.mark.slow
def test_a_login_file_that_hangs(machine_room: Room) -> None:
    """A .bashrc that never ends is a machine that fell silent, and nothing is left of it here."""
    server = machine_room()
    server.write_bashrc("sleep 100\n")
    assert_refused(added(server), NotReachable, "box", "silent")


@pytest.mark.parametrize(
    "bashrc",
    ["echo welcome; printf 'no newline'\n", "echo oops >&2\n", "set -u\nalias exec=false\n", "printf '\\377\\000'\n"],
    ids=["prints", "complains", "options", "bytes"],
)
@pytest.mark.first(2)
def test_login_files_that_print(machine_room: Room, bashrc: str) -> None:
    """What a .bashrc prints is in nobody's way."""
    server = machine_room()
    server.write_bashrc(bashrc)
    assert_works(server)


def test_a_banner_and_another_shell(machine_room: Room) -> None:
    """A long banner and dash as login shell change nothing."""
    server = machine_room()
    server.shell, server.banner = "/bin/dash", "WELCOME \N{SNOWMAN}\n" * 50
    server.restart()
    assert_works(server)


def test_a_python_that_is_too_old(machine_room: Room, tmp_path: Path) -> None:
    """A machine whose newest Python is too old is refused with both versions; without any, that is said."""
    server = machine_room()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    server.path = str(tools)
    server.restart()
    assert_refused(added(server), ConfigError, "no Python 3")
    (tools / "python3").write_text("#!/bin/sh\necho 3.8\n", encoding="utf-8")
    (tools / "python3").chmod(0o755)
    assert_refused(added(server), ConfigError, "Python 3.8", "3.10")


def test_a_home_without_space_or_read_only(machine_room: Room) -> None:
    """A home folder on a full or a read-only disk is named."""
    server = machine_room()
    with mounted(server.home, "100k"):
        assert_refused(added(server), ConfigError, str(server.home), "free")
        subprocess.run(["mount", "-o", "remount,ro", str(server.home)], check=True)
        assert_refused(added(server), ConfigError, f"{server.home}/.gpu", "read-only")


@pytest.mark.parametrize("locale", ["de_DE.ISO-8859-1", "C"])
@pytest.mark.first(1)
def test_a_locale_without_utf8(box: Box, tmp_path: Path, locale: str) -> None:
    """Names beyond ASCII are sent, run and brought home whatever the machine's locale is."""
    server = box()
    if locale != "C":
        make = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(tmp_path / locale)]
        if shutil.which(make[0]) is None or subprocess.run(make, capture_output=True, check=False).returncode != 0:
            pytest.skip("no such locale can be made here. Type: apt-get install locales")
    server.write_bashrc(f"export LOCPATH={tmp_path} LANG={locale} LC_ALL={locale}\n")
    Path("größer 数.py").write_text(
        "import os, sys\nopen('ergebnis-é.txt'.encode('utf-8'), 'wb').write(os.fsencode(sys.argv[1]))\n",
        encoding="utf-8",
    )
    words = ["--on", "box", "--environment", "none", "--need", "größer 数.py", "--out", "*.txt", "--json", "--"]
    done = gpu("run", *words, "python", "größer 数.py", "naïve")
    assert done.returncode == 0, done.stderr
    [folder] = Path("results").iterdir()
    assert (folder / "out" / "ergebnis-é.txt").read_text(encoding="utf-8") == "naïve"

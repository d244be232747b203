"""Addresses and the ssh_config made of them, read back by the real ssh, a real sshd, and paramiko."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import ssh_config
from orchestrator.errors import ConfigError, UsageError
from orchestrator.ssh_config import Address
from tests.waiting import until

BOX = Address("ubuntu", "203.0.113.7", 2222)
HOSTILE_FOLDERS = [
    "plain",
    "with space",
    "unicodé-ключ",
    "100% %h %%",
    "it's",
    "a#b",
    "$HOME $x",
    "[x]*?",
    "~",
    "a=b,c",
]
HOSTS = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
    st.from_regex(r"[a-z][a-z0-9-]{0,20}[a-z0-9](\.[a-z]{2,8}){0,2}", fullmatch=True),
)
USERS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,20}", fullmatch=True)
HOSTILE = [
    "",
    "host",
    "@host",
    "root@",
    "root@:22",
    "-oProxyCommand=touch x@host",
    "root@-oProxyCommand=x",
    "-l@host",
    "root@host:",
    "root@host:0",
    "root@host:65536",
    "root@host:-1",
    "root@host: 22",
    "root@host:22 ",
    "root@host:٢٢",
    "root@host:22:22",
    "root@ho st",
    " root@host",
    "root@host\n",
    "root@host\nProxyCommand x",
    "ro\tot@host",
    "root@host\x00",
    "root@h\x1b[31m",
    'root@"host"',
    "ro'ot@host",
    "root@%h",
    "root@host%eth0",
    "root@[fe80::1%eth0]",
    "root@$HOST",
    "root@${HOST}",
    "root@a,b",
    "root@`id`",
    "root@a;b",
    "root@*",
    "root@!a",
    "root@a..b",
    "root@.a",
    "root@a.",
    "root@a@b",
    "root@2001:db8::1",
    "root@[2001:db8::1",
    "root@[203.0.113.7]",
    "root@[host]",
    "root@[]",
    "root@203.0.113.256",
    "root@010.0.0.1",
    "root@1.2.3",
    "root@хост",
    "root@" + "a" * 300,
    "u" * 300 + "@host",
    "ssh://root@host",
]


def asked(config: Path, host: str) -> dict[str, str]:
    """What the real ssh makes of a config file for a host."""
    words = ["ssh", "-G", "-F", str(config), host]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10, stdin=subprocess.DEVNULL)
    return dict(line.split(" ", 1) for line in said.stdout.splitlines() if " " in line)


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ssh_config"
    path.write_text(text, encoding="utf-8")
    return path


@settings(deadline=None)
@given(USERS, HOSTS, st.one_of(st.none(), st.integers(1, 65535)))
def test_an_address_reads_back(user: str, host: str, port: int | None) -> None:
    """Every well-formed address is taken apart rightly, and its text gives the same address again."""
    found = ssh_config.parse(f"{user}@{host}" + ("" if port is None else f":{port}"))
    assert (found.user, found.host, found.port) == (user, host.strip("[]"), port or 22)
    assert ssh_config.parse(str(found)) == found


def parsed(text: str) -> Address | UsageError:
    try:
        return ssh_config.parse(text)
    except UsageError as error:
        return error


@settings(deadline=None)
@given(st.one_of(st.text(), st.text("ab@.:[]-%1", max_size=12)))
def test_any_text_is_an_address_or_a_usage_error(text: str) -> None:
    """Whatever is typed, the answer is an address of harmless signs or words about what is expected."""
    found = parsed(text)
    if isinstance(found, UsageError):
        assert "USER@HOST" in found.hint
        assert found.message.isascii()
        assert found.message.isprintable()
    else:
        assert re.fullmatch("[a-zA-Z0-9_.+:-]+", found.user + found.host)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_addresses_are_refused(text: str) -> None:
    """What ssh would read as an option, a pattern, a token or two words is a usage error."""
    with pytest.raises(UsageError):
        ssh_config.parse(text)


@pytest.mark.parametrize(
    ("user", "host", "port"),
    [
        ("root", "a b", 22),
        ("-x", "host", 22),
        ("root", "Host", 22),
        ("root", "h", 0),
        ("root", "h", True),
        (None, "h", 22),
    ],
)
def test_a_record_cannot_smuggle_an_address_in(user: str, host: str, port: int) -> None:
    """An address from a file is checked like a typed one, its types too."""
    with pytest.raises(ConfigError):
        Address(user, host, port)


@pytest.mark.parametrize("name", HOSTILE_FOLDERS)
def test_ssh_reads_back_what_was_written(tmp_path: Path, name: str) -> None:
    """The real ssh finds host, port, user, files and every safety setting as meant, whatever the folder is called."""
    folder = tmp_path / name
    text = ssh_config.text("box", BOX, folder / "key", str(folder / "agent"), folder)
    found = asked(write(folder, text), "gpu-box")
    assert (found["hostname"], found["port"], found["user"]) == ("203.0.113.7", "2222", "ubuntu")
    for keyword, file in [("identityfile", "key"), ("identityagent", "agent"), ("userknownhostsfile", "known_hosts")]:
        path = str(folder / file)
        assert found[keyword] in (path, path.replace("%", "%%"))  # ssh -G shows some of them as written
    expected = {
        "identitiesonly": "yes",
        "globalknownhostsfile": "/dev/null",
        "stricthostkeychecking": "true",
        "updatehostkeys": "false",
        "checkhostip": "no",
        "hashknownhosts": "no",
        "forwardagent": "no",
        "forwardx11": "no",
        "controlmaster": "false",
        "permitlocalcommand": "no",
        "preferredauthentications": "publickey",
        "passwordauthentication": "no",
        "kbdinteractiveauthentication": "no",
        "serveraliveinterval": "10",
        "serveralivecountmax": "3",
        "connecttimeout": "10",
        "tcpkeepalive": "yes",
        "compression": "no",
        "loglevel": "ERROR",
        "requesttty": "auto",
    }
    assert {key: found[key] for key in expected} == expected
    assert "controlpath" not in found


@pytest.mark.parametrize("name", HOSTILE_FOLDERS)
def test_settings_reads_back_what_was_written(tmp_path: Path, name: str) -> None:
    """Our own reader gives every path of a config back exactly."""
    folder = tmp_path / name
    found = ssh_config.settings(ssh_config.text("box", BOX, folder / "key", str(folder / "agent"), folder))
    assert found["identityfile"] == str(folder / "key")
    assert found["identityagent"] == str(folder / "agent")
    assert found["userknownhostsfile"] == str(folder / "known_hosts")
    assert (found["hostname"], found["port"], found["user"]) == ("203.0.113.7", "2222", "ubuntu")


@pytest.mark.parametrize("name", ["plain", "with space", "unicodé-ключ", "it's", "a#b", "a=b,c"])
@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::1", "box.example.com"])
def test_paramiko_reads_the_same(tmp_path: Path, name: str, host: str) -> None:
    """paramiko finds host, port, user and key as ssh does."""
    folder = tmp_path / name
    path = write(folder, ssh_config.text("box", Address("u", host, 2222), folder / "key", None, folder))
    found, real = paramiko.SSHConfig.from_path(str(path)).lookup("gpu-box"), asked(path, "gpu-box")
    assert (found["hostname"], found["port"], found["user"]) == (host, "2222", "u")
    assert (real["hostname"], real["port"], real["user"]) == (host, "2222", "u")
    assert found["identityfile"] == [str(folder / "key")] == [real["identityfile"]]


def test_only_its_own_name_leads_to_a_machine(tmp_path: Path) -> None:
    """The config says nothing about any other host."""
    path = write(tmp_path, ssh_config.text("box", BOX, tmp_path / "key", None, tmp_path))
    assert asked(path, "gpu-box")["identityagent"] == "none"
    assert asked(path, "gpu-boxes")["hostname"] == "gpu-boxes"


@pytest.mark.parametrize("name", ['a"b', "a\nProxyCommand x", "a\\b", "a${HOME}b", "a\x00b", "a\udcffb"])
def test_a_path_that_cannot_be_expressed_is_refused(tmp_path: Path, name: str) -> None:
    """A path that ssh would read as something else is a configuration error, wherever it stands."""
    for identity, agent, folder in [(name, None, "f"), ("key", f"{tmp_path}/{name}", "f"), ("key", None, name)]:
        with pytest.raises(ConfigError):
            ssh_config.text("box", BOX, tmp_path / identity, agent, tmp_path / folder)


@pytest.mark.parametrize("name", ["*", "a b", "a\nHost *", "", "..", "-x", "a/b", "!a"])
def test_a_name_that_is_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    """A machine's name cannot make its block hold for other hosts."""
    with pytest.raises(ConfigError):
        ssh_config.text(name, BOX, tmp_path / "key", None, tmp_path)


def test_a_relative_key_is_refused(tmp_path: Path) -> None:
    """A path that would depend on the folder ssh is run in, or be a word with a meaning, is refused."""
    for agent in ("agent", "$SOCK", "none", ""):
        with pytest.raises(ConfigError):
            ssh_config.text("box", BOX, None, agent, tmp_path)
    with pytest.raises(ConfigError):
        ssh_config.text("box", BOX, Path("key"), None, tmp_path)


def test_the_users_own_agent_can_be_meant(tmp_path: Path) -> None:
    """The agent that the environment names is found when ssh is run, for the one key given or for all it holds."""
    path = write(tmp_path, ssh_config.text("box", BOX, tmp_path / "key", "SSH_AUTH_SOCK", tmp_path))
    found = asked(path, "gpu-box")
    assert (found["identityagent"], found["identitiesonly"]) == ("SSH_AUTH_SOCK", "yes")
    path = write(tmp_path, ssh_config.text("box", BOX, None, "SSH_AUTH_SOCK", tmp_path))
    found = asked(path, "gpu-box")
    assert (found["identityagent"], found["identitiesonly"]) == ("SSH_AUTH_SOCK", "no")


def new_key(path: Path) -> list[str]:
    """Makes an ed25519 key pair; returns type and base64 of its public half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=10)
    return path.with_suffix(".pub").read_text().split()[:2]


@pytest.mark.parametrize(
    "address", [BOX, Address("u", "2001:db8::1"), Address("u", "2001:db8::1", 23), Address("u", "h")]
)
def test_the_pinned_key_is_found(tmp_path: Path, address: Address) -> None:
    """ssh-keygen and paramiko find the line of known_hosts under the name ssh looks for."""
    key_type, base64 = new_key(tmp_path / "host")
    known = tmp_path / "known_hosts"
    known.write_text(ssh_config.known_host_line(address, key_type, base64) + "\n")
    asked_for = address.host if address.port == 22 else f"[{address.host}]:{address.port}"
    words = ["ssh-keygen", "-F", asked_for, "-f", str(known)]
    assert base64 in subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout
    assert paramiko.HostKeys(str(known)).lookup(asked_for)[key_type].get_base64() == base64  # type: ignore[index]


@pytest.mark.parametrize(
    ("key_type", "base64"),
    [
        ("ssh-rsa", "KEY"),
        ("ssh-ed25519", "AAAA"),
        ("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5"),
        ("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIEEE"),
        ("ssh-ed25519", "not base64"),
        ("ssh-ed25519 x", "KEY"),
        ("", ""),
        ("ssh-ed25519", "é"),
        ("ssh-ed25519", "KEY\n*"),
        ("ssh-ed25519", "KEY *"),
    ],
)
def test_what_is_no_key_is_not_pinned(tmp_path: Path, key_type: str, base64: str) -> None:
    """A type that is not the blob's own, or a blob with more than base64 in it, is refused."""
    real = new_key(tmp_path / "k")[1]
    with pytest.raises(ConfigError):
        ssh_config.known_host_line(BOX, key_type, base64.replace("KEY", real))


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[tuple[int, list[str], Path]]:
    """A real sshd on loopback in a folder of its own: port, host key, and the file of keys it lets in."""
    server = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(server).exists():
        pytest.skip("no sshd on this computer")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    host_key = new_key(tmp_path / "sshd" / "host")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "sshd" / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path}/sshd/host\nAuthorizedKeysFile {tmp_path}/sshd/allowed\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    child = subprocess.Popen([server, "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        until(lambda: _listens(port), 10)
        yield port, host_key, tmp_path / "sshd" / "allowed"
    finally:
        child.terminate()
        child.wait(timeout=10)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_real_connection_in_a_folder_with_a_hostile_name(tmp_path: Path, sshd: tuple[int, list[str], Path]) -> None:
    """ssh logs in by the written config alone, key and pinned host key found in a folder with percent and spaces."""
    port, host_key, allowed = sshd
    folder = tmp_path / "100% of é [x]"
    new_key(folder / "key")
    shutil.copy(folder / "key.pub", allowed)
    here = Address(getpass.getuser(), "127.0.0.1", port)
    config = write(folder, ssh_config.text("box", here, folder / "key", None, folder))
    (folder / "known_hosts").write_text(ssh_config.known_host_line(here, *host_key) + "\n")
    words = ["ssh", "-F", str(config), "gpu-box", "echo in"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "in\n", "")
    stranger = new_key(tmp_path / "other")
    (folder / "known_hosts").write_text(ssh_config.known_host_line(here, *stranger) + "\n")
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (255, "")

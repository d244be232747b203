"""The line in the user's own SSH configuration: it works, harms nothing, and goes without a trace."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import durable, locks
from orchestrator import config, ssh_config, user_ssh
from orchestrator.errors import ConfigError, UsageError
from orchestrator.ssh_config import Address

CONTENTS = [
    b"",
    b"\n",
    b"Host other\n  HostName other.example\n",
    b"Host other\n  HostName other.example",
    b"User somebody\r\nHost other\r\n  HostName other.example\r\n",
    b"# caf\xe9 \xff\xfe\nHost other\n  HostName other.example\n",
    b"Host *\n  User everyone\n  ServerAliveInterval 99\n",
    b"\n\n# mine\nHostName ignored.example\n",
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True, mode=0o700)
    return folder


def machine(name: str = "box", host: str = "203.0.113.7") -> None:
    """Makes the folder of a machine."""
    folder = config.state_folder() / "machines" / name
    folder.mkdir(parents=True)
    text = ssh_config.text(name, Address("ubuntu", host, 2222), folder / "key", None, folder)
    (folder / "ssh_config").write_text(text, encoding="utf-8")


def asked(home: Path, host: str) -> dict[str, str]:
    """What the real ssh makes of the user's configuration for a host."""
    words = ["ssh", "-G", "-F", str(home / ".ssh" / "config"), host]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10, stdin=subprocess.DEVNULL)
    return dict(line.split(" ", 1) for line in said.stdout.splitlines() if " " in line)


def line() -> str:
    return f'Include "{config.state_folder()}/ssh_config"'


def everything(folder: Path) -> dict[str, Any]:
    """Every name below a folder with its mode and content."""
    return {
        str(path.relative_to(folder)): (stat.S_IMODE(path.stat().st_mode), path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_ssh_finds_the_machine_and_all_else_as_before(home: Path, content: bytes) -> None:
    """With the line in, ssh resolves gpu-NAME by the machine's own file, and any other host exactly as before."""
    path = home / ".ssh" / "config"
    path.write_bytes(content)
    before = asked(home, "other")
    machine()
    assert user_ssh.set_up("box", home) == "gpu-box"
    found = asked(home, "gpu-box")
    assert (found["hostname"], found["port"], found["user"]) == ("203.0.113.7", "2222", "ubuntu")
    assert found["serveraliveinterval"] == "10"
    assert asked(home, "other") == before
    assert path.read_bytes().split(b"\n", 1)[0].strip().decode() == line()
    assert path.read_bytes().endswith(content)


@pytest.mark.parametrize("name", ["with space", "unicodé-ключ", "100% %h", "[x]*?{a,b}", "$HOME it's", "a#b"])
def test_the_state_folder_may_have_any_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The machine is found though the state folder's name is full of signs with a meaning."""
    monkeypatch.setenv("GPU_HOME", str(tmp_path / name))
    machine()
    user_ssh.set_up("box", home)
    assert asked(home, "gpu-box")["hostname"] == "203.0.113.7"
    user_ssh.undo("box", home)
    assert everything(home / ".ssh") == {}


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\\b"])
def test_a_state_folder_that_cannot_be_written_down_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A state folder whose name cannot stand in the user's configuration leaves it alone."""
    monkeypatch.setenv("GPU_HOME", str(tmp_path / name))
    (config.state_folder() / "machines" / "box").mkdir(parents=True)
    (config.state_folder() / "machines" / "box" / "ssh_config").touch()
    with pytest.raises(ConfigError):
        user_ssh.set_up("box", home)
    assert everything(home / ".ssh") == {}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [b"Host *\n", b"LINE\n", b"  LINE\r\n", b"LINE", b"\r", b"\n", b" ", b"User x", b"# \xff", b"Match all\n"]
        ),
        max_size=8,
    ).map(b"".join)
)
def test_what_is_undone_is_as_before(content: bytes) -> None:
    """Whatever bytes the configuration holds, setting up twice and undoing gives them back."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_HOME", f"{folder}/state")
        home = Path(folder) / "home"
        (home / ".ssh").mkdir(parents=True)
        content = content.replace(b"LINE", line().encode())
        path = home / ".ssh" / "config"
        path.write_bytes(content)
        path.chmod(0o640)
        machine()
        user_ssh.set_up("box", home)
        once = path.read_bytes()
        user_ssh.set_up("box", home)
        assert path.read_bytes() == once
        assert once.endswith(content)
        assert user_ssh.undo("box", home)
        assert everything(home) == {".ssh": (0o755, False), ".ssh/config": (0o640, content)}


def test_a_line_that_holds_for_one_host_only_does_not_count(home: Path) -> None:
    """Where our line stands in a Host block already, ssh finds the machine all the same, and undo keeps that one."""
    path = home / ".ssh" / "config"
    path.write_text(f"Host other\n{line()}\n")
    machine()
    user_ssh.set_up("box", home)
    assert asked(home, "gpu-box")["hostname"] == "203.0.113.7"
    user_ssh.undo("box", home)
    assert path.read_text() == f"Host other\n{line()}\n"


def test_a_line_added_by_hand_counts(home: Path) -> None:
    """A line that the user pasted before every Host block is found, and is not taken out by undo."""
    path = home / ".ssh" / "config"
    path.write_text(f"# by hand\n{line()}\nHost other\n")
    machine()
    user_ssh.set_up("box", home)
    user_ssh.undo("box", home)
    assert path.read_text() == f"# by hand\n{line()}\nHost other\n"


def test_what_was_made_is_removed_again(tmp_path: Path) -> None:
    """Folder and configuration are made private where there are none, and are gone after the last undo."""
    home = tmp_path / "home"
    home.mkdir()
    machine()
    user_ssh.set_up("box", home)
    assert stat.S_IMODE((home / ".ssh").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / ".ssh" / "config").stat().st_mode) == 0o600
    user_ssh.undo("box", home)
    assert everything(home) == {}
    assert not list(config.state_folder().glob("ssh_*.json"))
    assert not (config.state_folder() / "ssh_config").exists()


def test_what_the_user_added_since_stays(tmp_path: Path) -> None:
    """A configuration that was made here but is the user's by now is kept, our line taken out of its middle."""
    home = tmp_path / "home"
    home.mkdir()
    machine()
    user_ssh.set_up("box", home)
    path = home / ".ssh" / "config"
    path.write_bytes(b"User first\n" + path.read_bytes() + b"Host mine\n")
    user_ssh.undo("box", home)
    assert path.read_bytes() == b"User first\nHost mine\n"


def test_the_line_stays_until_the_last_machine_goes(home: Path) -> None:
    """Two machines share one line; each goes alone, and undoing what was never set up changes nothing."""
    machine("one", "203.0.113.1")
    machine("two", "203.0.113.2")
    user_ssh.set_up("one", home)
    user_ssh.set_up("two", home)
    assert (home / ".ssh" / "config").read_text() == line() + "\n"
    assert user_ssh.undo("one", home)
    assert asked(home, "gpu-one")["hostname"] == "gpu-one"
    assert asked(home, "gpu-two")["hostname"] == "203.0.113.2"
    assert not user_ssh.undo("one", home)
    assert user_ssh.chosen() == ["two"]
    assert user_ssh.undo("two", home)
    assert not user_ssh.undo("two", home)
    assert everything(home / ".ssh") == {}


def test_a_machine_that_was_not_chosen_is_not_found(home: Path) -> None:
    """Only chosen machines are in the user's configuration."""
    machine("one", "203.0.113.1")
    machine("two", "203.0.113.2")
    user_ssh.set_up("one", home)
    assert asked(home, "gpu-two")["hostname"] == "gpu-two"
    assert user_ssh.choices() == ["one", "two"]


@pytest.mark.parametrize("name", ["nobody", "local"])
def test_an_unknown_machine_is_a_usage_error(home: Path, name: str) -> None:
    """A machine without an ssh_config cannot be set up, and nothing is touched."""
    with pytest.raises(UsageError):
        user_ssh.set_up(name, home)
    assert everything(home / ".ssh") == {}


@pytest.mark.parametrize("name", ["../x", "*", ""])
def test_an_impossible_name_is_refused(home: Path, name: str) -> None:
    """A name that would lead elsewhere is refused before any file is looked at."""
    with pytest.raises(ConfigError):
        user_ssh.set_up(name, home)


def test_a_link_to_dotfiles_stays_a_link(home: Path, tmp_path: Path) -> None:
    """The file behind a link is changed, with its mode; the link stays, and undo restores the file."""
    real = tmp_path / "dotfiles" / "ssh"
    real.parent.mkdir()
    real.write_bytes(b"Host x\n")
    real.chmod(0o644)
    (home / ".ssh" / "config").symlink_to(real)
    machine()
    user_ssh.set_up("box", home)
    assert (home / ".ssh" / "config").readlink() == real
    assert real.read_bytes() == line().encode() + b"\nHost x\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o644
    user_ssh.undo("box", home)
    assert everything(real.parent) == {"ssh": (0o644, b"Host x\n")}


def test_a_link_to_nothing_is_filled_and_emptied(home: Path, tmp_path: Path) -> None:
    """A link whose file does not exist yet gets one, and loses it again."""
    (home / ".ssh" / "config").symlink_to(tmp_path / "later")
    machine()
    user_ssh.set_up("box", home)
    assert asked(home, "gpu-box")["hostname"] == "203.0.113.7"
    user_ssh.undo("box", home)
    assert not (tmp_path / "later").exists()
    assert (home / ".ssh" / "config").is_symlink()


def read_only(home: Path) -> None:
    (home / ".ssh" / "config").write_bytes(b"Host x\n")
    (home / ".ssh" / "config").chmod(0o400)


def strangers(home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    (home / ".ssh" / "config").write_bytes(b"Host x\n")
    os.chown(home / ".ssh" / "config", 12345, 12345)


CASES = {
    "read-only": read_only,
    "another user's": strangers,
    "a folder": lambda home: (home / ".ssh" / "config").mkdir(),
    "a pipe": lambda home: os.mkfifo(home / ".ssh" / "config", 0o600),
    "a loop": lambda home: (home / ".ssh" / "config").symlink_to("config"),
    "a link to a missing folder": lambda home: (home / ".ssh" / "config").symlink_to("/nowhere/at/all"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_that_cannot_be_written_is_left_alone(home: Path, case: str) -> None:
    """Where the file cannot be replaced, the user is told the line to add by hand, and the file is as it was."""
    CASES[case](home)
    before = sorted((path.name, path.lstat().st_mode) for path in (home / ".ssh").iterdir())
    machine()
    with pytest.raises(ConfigError) as caught:
        user_ssh.set_up("box", home)
    assert caught.value.hint.endswith(line())
    assert sorted((path.name, path.lstat().st_mode) for path in (home / ".ssh").iterdir()) == before


def test_undo_in_a_read_only_configuration_says_what_to_take_out(home: Path) -> None:
    """When the line cannot be taken out the user is told to, and a later undo goes on."""
    machine()
    path = home / ".ssh" / "config"
    path.write_bytes(b"Host x\n")
    user_ssh.set_up("box", home)
    path.chmod(0o400)
    with pytest.raises(ConfigError) as caught:
        user_ssh.undo("box", home)
    assert line() in caught.value.hint
    assert asked(home, "gpu-box")["hostname"] == "gpu-box"
    path.chmod(0o600)
    user_ssh.undo("box", home)
    assert path.read_bytes() == b"Host x\n"


def test_a_moved_state_folder_takes_its_old_line_along(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the state folder was moved, setting up again replaces the old line, and undo leaves nothing."""
    machine()
    user_ssh.set_up("box", home)
    (tmp_path / "state").rename(tmp_path / "moved")
    monkeypatch.setenv("GPU_HOME", str(tmp_path / "moved"))
    user_ssh.set_up("box", home)
    assert (home / ".ssh" / "config").read_text() == line() + "\n"
    user_ssh.undo("box", home)
    assert everything(home / ".ssh") == {}


def test_a_change_made_meanwhile_is_not_lost(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When an editor writes the configuration between our reading and writing, it is not overwritten."""
    machine()
    path = home / ".ssh" / "config"
    path.write_bytes(b"Host old\n")
    save, edits = durable.save_json, iter([b"Host old\n", b"Host new\n"])

    def save_while_an_editor_writes(target: Path, document: Any) -> None:
        save(target, document)
        path.write_bytes(next(edits))

    monkeypatch.setattr(durable, "save_json", save_while_an_editor_writes)
    with pytest.raises(ConfigError):
        user_ssh.set_up("box", home)
    assert path.read_bytes() == b"Host new\n"


def test_two_at_once(home: Path) -> None:
    """Processes that set up a machine each at the same time lose none of them, and put one line in."""
    names = [f"m{number}" for number in range(4)]
    for name in names:
        machine(name)
    (home / ".ssh" / "config").write_bytes(b"Host x\n")
    script = (
        "import sys, pathlib; from orchestrator import user_ssh as u; u.set_up(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    children = [subprocess.Popen([sys.executable, "-c", script, name, str(home)]) for name in names]
    assert [child.wait(timeout=30) for child in children] == [0] * len(names)
    assert (home / ".ssh" / "config").read_bytes() == line().encode() + b"\nHost x\n"
    assert user_ssh.chosen() == names


def test_a_lock_held_for_long_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is changed while another process is at it."""
    machine()
    monkeypatch.setattr(user_ssh, "_LOCK_WAIT_S", 0.1)
    with locks.held(config.state_folder() / "ssh_setup.lock", 1), pytest.raises(ConfigError, match="at work"):
        user_ssh.set_up("box", home)
    assert everything(home / ".ssh") == {}

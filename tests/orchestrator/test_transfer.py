"""State taken from one laptop to another: all of it, private, nothing overwritten, nothing from elsewhere let in."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs import durable, locks
from orchestrator import config, keys, machines, transfer
from orchestrator.cli import house
from orchestrator.errors import ConfigError, UsageError

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n"
Switch = Callable[[str], Path]


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Switches to the state folder of a laptop of that name."""

    def switch(name: str) -> Path:
        monkeypatch.setenv("GPU_HOME", str(tmp_path / name))
        return config.state_folder()

    monkeypatch.setenv("HOME", str(tmp_path))
    return switch


def machine(name: str, key: str | None = None) -> None:
    """Makes a machine's folder as `gpu add` does."""
    folder = machines.folder(name)
    durable.have_folder(folder)
    record = machines.Record(
        name,
        "ubuntu",
        "203.0.113.7",
        2222,
        "/home/ubuntu/.gpu",
        "/usr/bin/python3",
        None,
        key,
        False,
        "SHA256:x",
        "",
        "",
        None,
        0,
    )
    for file, content in (("key", SECRET + name), ("key.pub", "ssh-ed25519 AAAA\n"), ("known_hosts", "h k\n")):
        durable.replace_whole(folder / file, content.encode())
    machines.save(record)
    machines.write_ssh_config(name)


def remember(run_id: str, path: str) -> None:
    durable.have_folder(config.state_folder() / "runs")
    durable.save_json(config.state_folder() / "runs" / f"{run_id}.json", {"path": path})


@pytest.fixture
def exported(laptop: Switch, tmp_path: Path) -> Path:
    """What a laptop with two machines, a key and two runs exports; the test goes on at another laptop."""
    laptop("old")
    machine("box")
    machine("other", key="/nowhere/id_ed25519")
    keys.store("lambda", "stored-lambda-key")
    remember("20260101-run-a", "/nowhere/results/a")
    remember("20260101-run-b", str(tmp_path))
    transfer.export_state(tmp_path / "mine.tar.gz", False)
    laptop("new")
    return tmp_path / "mine.tar.gz"


def everything(folder: Path) -> dict[str, Any]:
    """Every name below a folder with its mode and content, lock files aside."""
    return {
        str(path.relative_to(folder)): (stat.S_IMODE(path.stat().st_mode), path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
        if not path.name.endswith("lock")
    }


def test_state_arrives_whole(exported: Path, laptop: Switch) -> None:
    """All that was exported is on the other laptop as it was, the ssh_config written for the new place."""
    report = transfer.import_state(exported)
    assert (report.machines, report.keys) == (["box", "other"], ["lambda"])
    assert report.runs == ["20260101-run-a", "20260101-run-b"]
    new, old = everything(laptop("new")), everything(laptop("old"))
    assert {**new, "machines/box/ssh_config": 0, "machines/other/ssh_config": 0} == {
        **old,
        "machines/box/ssh_config": 0,
        "machines/other/ssh_config": 0,
    }
    written = laptop("new") / "machines" / "box" / "ssh_config"
    assert f'IdentityFile "{laptop("new")}/machines/box/key"' in written.read_text()
    assert str(laptop("old")) not in written.read_text()
    assert {mode for mode, content in new.values() if content is not False} == {0o600}
    assert {mode for mode, content in new.values() if content is False} == {0o700}


def test_what_the_user_must_know_is_said(exported: Path) -> None:
    """Notes tell of a key that did not travel, and of run folders that are not on this computer."""
    notes = " ".join(transfer.import_state(exported).notes)
    assert "/nowhere/id_ed25519" in notes
    assert "1 of the run folders" in notes


def test_import_may_be_repeated(exported: Path) -> None:
    """A second import of the same file finds nothing new and changes nothing."""
    transfer.import_state(exported)
    before = everything(config.state_folder())
    assert transfer.import_state(exported) == transfer.Report([], [], [], [])
    assert everything(config.state_folder()) == before


def test_the_file_is_private_from_its_first_byte(
    laptop: Switch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no write, whatever the umask, can another user read what is written."""
    laptop("old")
    machine("box")
    modes: list[int] = []
    write = durable.write_all

    def watched(descriptor: int, data: bytes) -> None:
        modes.append(os.fstat(descriptor).st_mode & 0o777)
        write(descriptor, data)
        modes.append(os.fstat(descriptor).st_mode & 0o777)

    monkeypatch.setattr(durable, "write_all", watched)
    before = os.umask(0)
    try:
        transfer.export_state(tmp_path / "mine.tar.gz", False)
    finally:
        os.umask(before)
    assert set(modes) == {0o600}
    assert stat.S_IMODE((tmp_path / "mine.tar.gz").stat().st_mode) == 0o600


def test_a_file_is_overwritten_only_on_request(exported: Path, laptop: Switch) -> None:
    """Export leaves a file alone that is there, even a dangling link, unless told to overwrite it."""
    laptop("old")
    exported.write_bytes(b"precious")
    link = exported.with_name("link")
    link.symlink_to("nowhere")
    for path in (exported, link):
        with pytest.raises(UsageError, match="is there already"):
            transfer.export_state(path, False)
    assert exported.read_bytes() == b"precious"
    transfer.export_state(exported, True)
    assert exported.read_bytes()[:2] == b"\x1f\x8b"


def test_the_same_state_gives_the_same_bytes(laptop: Switch, tmp_path: Path) -> None:
    """Two exports of an unchanged state are equal, so that a backup can tell."""
    laptop("old")
    machine("box")
    transfer.export_state(tmp_path / "a", False)
    transfer.export_state(tmp_path / "b", False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes()[4:8] == bytes(4)  # no time


def test_what_does_not_travel(laptop: Switch, tmp_path: Path) -> None:
    """This computer's own machine folder, half-made machines and stray files stay; what is damaged is said."""
    state = laptop("old")
    machine("box")
    machine("broken")
    (state / "machines" / "broken" / "machine.json").write_text("{")
    for stray in ("machines/local/machine.json", "machines/half/key", "machines/.gone-x/machine.json", "other"):
        (state / stray).parent.mkdir(parents=True, exist_ok=True)
        (state / stray).write_text("{}")
    remember("bad", "x")
    (state / "runs" / "bad.json").write_text("[]")
    report = transfer.export_state(tmp_path / "mine", False)
    assert (report.machines, report.runs) == (["box"], [])
    with tarfile.open(tmp_path / "mine") as tar:
        names = tar.getnames()
    assert sorted(names[1:]) == [f"machines/box/{name}" for name in ("key", "key.pub", "known_hosts", "machine.json")]
    assert "runs/bad.json is damaged" in " ".join(report.notes)
    assert "machines/broken/machine.json is damaged" in " ".join(report.notes)


def test_nothing_to_export_is_said(laptop: Switch, tmp_path: Path) -> None:
    """Without anything to take along no file is made."""
    laptop("empty")
    with pytest.raises(UsageError, match="nothing to export"):
        transfer.export_state(tmp_path / "mine", False)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("file", transfer.MACHINE_FILES)
@pytest.mark.parametrize("change", ["other", "gone"])
def test_a_machine_that_differs_is_never_overwritten(exported: Path, file: str, change: str) -> None:
    """When a machine here differs in any file, or lacks it, the error names it and nothing at all is taken in."""
    machine("box")
    path = machines.folder("box") / file
    if change == "other":
        path.write_bytes(b"{}")
    else:
        path.unlink()
    before = everything(config.state_folder())
    with pytest.raises(ConfigError, match=f"machine box is here already and differs in .*{file}"):
        transfer.import_state(exported)
    assert everything(config.state_folder()) == before


def test_a_machine_that_is_the_same_is_fine(exported: Path) -> None:
    """A machine that is here with the same content is left alone, and the rest comes."""
    machine("box")
    assert transfer.import_state(exported).machines == ["other"]


def test_own_keys_and_runs_stay(exported: Path, tmp_path: Path) -> None:
    """An account key and the path of a run that are known here are kept."""
    keys.store("lambda", "my-own-key")
    remember("20260101-run-a", str(tmp_path / "mine"))
    report = transfer.import_state(exported)
    assert (report.keys, report.runs) == ([], ["20260101-run-b"])
    assert "Your own account key was kept for: lambda." in report.notes
    assert keys.stored()["keys"] == {"lambda": "my-own-key"}
    assert durable.load_json(config.state_folder() / "runs" / "20260101-run-a.json") == {"path": str(tmp_path / "mine")}


def effects(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> list[str]:
    """Lets the effect of that number fail as a full disk does; returns the effects that happened before."""
    seen: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) == fail_at:
                raise OSError(28, "No space left on device")
            return real(*args, **options)

        return act

    for owner, name in ((durable, "replace_whole"), (durable, "make_folder"), (durable, "save_json")):
        monkeypatch.setattr(owner, name, failing(name, getattr(owner, name)))
    return seen


def test_a_failure_anywhere_takes_nothing_in(exported: Path, laptop: Switch) -> None:
    """Whichever write fails, no machine, run or key of the file is here afterwards, and the next try succeeds."""
    number, failed = 0, True
    while failed:
        number += 1
        laptop(f"new-{number}")
        machines.folder("x").parent.mkdir(parents=True)
        (config.state_folder() / "runs").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            seen = effects(patch, number)
            try:
                transfer.import_state(exported)
                failed = False
            except ConfigError as error:
                assert "No space left" in error.message  # noqa: PT017 -- the loop ends when there is none
                assert set(everything(config.state_folder())) == {"machines", "runs"}
        if failed:
            assert transfer.import_state(exported).machines == ["box", "other"]
    assert number == len(seen) + 1
    assert number > 10


def test_what_a_killed_import_left_is_swept_up(exported: Path) -> None:
    """Keys that a killed import left aside are gone after the next one."""
    left = config.state_folder() / ".import-left" / "box"
    left.mkdir(parents=True)
    (left / "key").write_text(SECRET)
    transfer.import_state(exported)
    assert not list(config.state_folder().glob(".import-*"))


@pytest.mark.parametrize("place", ["missing/mine.tar.gz", "."])
def test_a_place_that_cannot_be_written_is_said(laptop: Switch, tmp_path: Path, place: str) -> None:
    """Export to a folder that is not there, or over a folder, is an error in words and leaves nothing."""
    laptop("old")
    machine("box")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        transfer.export_state(tmp_path / "there" / place, True)
    assert list((tmp_path / "there").iterdir()) == []


def test_another_command_at_work_is_said(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While machines are added or forgotten, import waits and then says so."""
    monkeypatch.setattr(machines, "_LOCK_WAIT_S", 0.1)
    durable.have_folder(config.state_folder() / "machines")
    with (
        locks.held(config.state_folder() / "machines" / ".lock", 1),
        pytest.raises(ConfigError, match="Another command"),
    ):
        transfer.import_state(exported)


def test_the_commands(laptop: Switch, tmp_path: Path) -> None:
    """`gpu state export` and `import` say what travelled and warn of the secrets, which they do not show."""
    laptop("old")
    machine("box")
    keys.store("vast", "stored-vast-key")
    file = str(tmp_path / "mine.tar.gz")
    done = CliRunner().invoke(house.state, ["export", file])
    assert done.exit_code == 0
    assert "Written: machines box" in done.stdout
    assert "private keys" in done.stderr
    again = CliRunner().invoke(house.state, ["export", file])
    assert isinstance(again.exception, UsageError)
    assert CliRunner().invoke(house.state, ["export", "-y", file]).exit_code == 0
    laptop("new")
    taken = CliRunner().invoke(house.state, ["import", file])
    assert taken.stdout.splitlines() == [
        "New here: machines box",
        "New here: account keys vast",
        "New here: 0 entries in the list of runs",
    ]
    assert "stored-vast-key" not in done.output + taken.output

"""Checkpoints: whole or not at all, the newest whole one found past every kind of damage, removed by number."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import durable, locks, rundir
from worker import checkpoints
from worker.failures import DiskFull

FILES = {"adapter_model.safetensors": b"weights" * 100, "state.json": b"{}\n"}


@pytest.fixture
def run(tmp_path: Path) -> rundir.Run:
    durable.make_folder(tmp_path / "run")
    return rundir.Run(tmp_path / "run")


def names(run: rundir.Run) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir())


def flip(folder: Path) -> None:
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped byte": flip,
    "a truncated file": lambda folder: os.truncate(folder / "adapter_model.safetensors", 5),
    "a missing file": lambda folder: (folder / "state.json").unlink(),
    "an empty manifest": lambda folder: (folder / rundir.MANIFEST).write_bytes(b""),
    "a manifest of nothing": lambda folder: (folder / rundir.MANIFEST).write_bytes(b"{}"),
    "a manifest that leads out": lambda folder: (folder / rundir.MANIFEST).write_bytes(b'{"..": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_one_is_used_and_a_damaged_one_is_said(run: rundir.Run, damage: str) -> None:
    """Whatever happened to the newest, the one before it is found, and the damage told by name."""
    for step in (9, 10):
        checkpoints.save(run, rundir.checkpoint_name(step), FILES)
    DAMAGES[damage](run.folder / "checkpoint-10")
    said: list[str] = []
    assert next(checkpoints.whole(run, said.append)) == run.folder / "checkpoint-9"
    assert len(said) == 1
    assert said[0].startswith("checkpoint-10 is damaged")
    assert [path.name for path in run.checkpoints()] == ["checkpoint-9"]


def test_one_without_its_manifest_does_not_exist(run: rundir.Run) -> None:
    """A folder that never got its manifest is neither found nor said, and swept away."""
    checkpoints.save(run, "checkpoint-9", FILES)
    checkpoints.save(run, "checkpoint-10", FILES)
    (run.folder / "checkpoint-10" / rundir.MANIFEST).unlink()
    said: list[str] = []
    assert next(checkpoints.whole(run, said.append)) == run.folder / "checkpoint-9"
    assert said == []
    checkpoints.sweep(run)
    assert names(run) == ["checkpoint-9"]


def test_what_was_staged_is_swept_away(run: rundir.Run) -> None:
    """Folders that an attempt left when it was killed are removed; whole ones and the user's own stay."""
    checkpoints.save(run, "checkpoint-9", FILES)
    for name in (".checkpoint-10.staged", ".checkpoint-3.1.gone", ".adapter.staged", ".checkpoint-4.damaged"):
        shutil.copytree(run.folder / "checkpoint-9", run.folder / name)
    (run.folder / "work").mkdir()
    checkpoints.sweep(run)
    assert names(run) == ["checkpoint-9", "work"]


def test_the_newest_by_number_stay_whatever_their_times(run: rundir.Run) -> None:
    """Two stay, by steps and micro-batches, though the clock says that they are the oldest."""
    for name in ("checkpoint-900", "checkpoint-1000", "checkpoint-1000.2", "checkpoint-99"):
        checkpoints.save(run, name, FILES)
    for age, name in enumerate(("checkpoint-99", "checkpoint-900", "checkpoint-1000", "checkpoint-1000.2")):
        os.utime(run.folder / name, (10_000 - age, 10_000 - age))
    checkpoints.retire(run)
    assert names(run) == ["checkpoint-1000", "checkpoint-1000.2"]
    assert next(checkpoints.whole(run, print)) == run.folder / "checkpoint-1000.2"


def test_one_that_is_being_copied_stays_until_the_next_time(run: rundir.Run) -> None:
    """While a pull holds it, it is not removed; afterwards it is."""
    for step in (1, 2, 3):
        checkpoints.save(run, f"checkpoint-{step}", FILES)
    with locks.held(run.folder / "checkpoint-1" / rundir.MANIFEST, 0):
        checkpoints.retire(run)
        assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    checkpoints.retire(run)
    assert names(run) == ["checkpoint-2", "checkpoint-3"]


def test_a_name_goes_before_its_files(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its files are removed no folder has the name: nobody can take what is left of it for the whole."""
    folder = checkpoints.save(run, "checkpoint-1", FILES)
    seen = []
    removes = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (seen.append(folder.exists()), removes(path, **how)))
    checkpoints.remove(folder)
    assert seen == [True, False]  # first what an earlier removal may have left
    assert names(run) == []


def test_every_byte_is_on_the_disk_before_the_folder_has_its_name(
    run: rundir.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files, then the manifest, are synced while the name does not exist; the parent is once it does."""
    synced: list[int] = []
    parents: list[bool] = []
    folder = run.folder / "checkpoint-1"
    sync, sync_folder = durable.sync, durable.sync_folder

    def spy(descriptor: int) -> None:
        assert not folder.exists()
        sync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def spy_folder(path: Path) -> None:
        sync_folder(path)
        parents.extend([folder.exists()] if path == run.folder else [])

    monkeypatch.setattr(durable, "sync", spy)
    monkeypatch.setattr(durable, "sync_folder", spy_folder)
    checkpoints.save(run, "checkpoint-1", FILES)
    assert {path.stat().st_ino for path in folder.iterdir()} == set(synced)
    assert synced[-1] == (folder / rundir.MANIFEST).stat().st_ino
    assert parents[-1]


def test_a_whole_one_is_not_written_again_and_a_damaged_one_is(run: rundir.Run) -> None:
    """Coming to the same step again keeps what is whole, byte and time, and puts what is not right."""
    folder = checkpoints.save(run, "checkpoint-1", FILES)
    before = (folder / "state.json").stat().st_mtime_ns
    assert checkpoints.save(run, "checkpoint-1", FILES) == folder
    assert (folder / "state.json").stat().st_mtime_ns == before
    flip(folder)
    checkpoints.save(run, "checkpoint-1", FILES)
    assert rundir.damage(folder) is None


def test_a_disk_without_room_gives_up_older_ones_first(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where room is short the older checkpoints go, never the newest; then DiskFull says what is safe."""
    for step in (1, 2):
        checkpoints.save(run, f"checkpoint-{step}", FILES)
    monkeypatch.setattr(checkpoints, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(DiskFull, match="checkpoint-2 is safe"):
        checkpoints.save(run, "checkpoint-3", FILES)
    assert names(run) == ["checkpoint-2"]


@given(step=st.integers(0, 10**9 - 1), micro=st.integers(0, 10**6 - 1))
def test_names_and_numbers_of_checkpoints_are_one_another(step: int, micro: int) -> None:
    """A name gives back its numbers, may come home, and is a folder of weights."""
    name = rundir.checkpoint_name(step, micro)
    assert rundir.checkpoint_number(name) == (step, micro)
    assert rundir.may_come_home(f"{name}/{rundir.MANIFEST}")
    assert rundir.is_of_weights(Path(name))
    assert rundir.checkpoint_number(f".{name}.staged") is None


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root makes a small disk")
def test_a_disk_that_fills_up_within_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the room that was seen is gone before the last byte, nothing half is left, and what is safe is said."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode()}")
    try:
        run = rundir.Run(disk)
        monkeypatch.setattr(checkpoints, "_SPARE_BYTES", 0)
        checkpoints.save(run, "checkpoint-1", FILES)
        monkeypatch.setattr(checkpoints, "_free", lambda run: 1 << 30)
        with pytest.raises(DiskFull, match=r"checkpoint-2 needs 2 MB .* checkpoint-1 is safe"):
            checkpoints.save(run, "checkpoint-2", {**FILES, "state.safetensors": bytes(2_000_000)})
        assert names(run) == ["checkpoint-1"]
        assert rundir.damage(disk / "checkpoint-1") is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)

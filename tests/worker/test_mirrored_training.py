"""A training whose machine vanished goes on from what its mirror has: the newest whole checkpoint, to the same end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, locks, rundir
from orchestrator import mirrors, weights
from orchestrator.home import Arrivals
from tests.worker import schooling
from tests.worker.guarding import RUN
from worker import checkpoints, train
from worker.mirror import Copying, FolderStore

SHORT = {"steps": 6, "accumulation": 2, "lr": 0.01, "dropout": 0.1, "warmup": 2, "save_every": 1}


def copying(run: rundir.Run, mirror: Path) -> Copying:
    return Copying(run, FolderStore(mirror / RUN, "machines/first"))


def gathered(mirror: Path, home: rundir.Home) -> Path | None:
    """What a next machine would be sent, once the mirror's part of the vanished one is home."""
    arrivals = Arrivals.open(home, "first")
    assert arrivals is not None
    with arrivals:
        end = mirrors.gather(mirrors.source(str(mirror), RUN), "first", arrivals)
    assert end["state"] == "died"
    return weights.to_send(home)


def saving(monkeypatch: pytest.MonkeyPatch, then: Callable[[rundir.Run, int], None]) -> None:
    """Have something happen after each checkpoint of a training; its number is the steps done."""
    made = train.Training.save

    def save(training: train.Training) -> None:
        made(training)
        then(training.run, training.at.step)

    monkeypatch.setattr(train.Training, "save", save)


class Vanished(BaseException):
    """The machine is no more."""


def vanish_after(monkeypatch: pytest.MonkeyPatch, run: rundir.Run, mirror: Path, document: dict[str, Any]) -> None:
    """A training that is mirrored after each of three steps, does a fourth that no mirror sees, and is gone."""
    mirroring = copying(run, mirror)

    def then(_: rundir.Run, step: int) -> None:
        if step == 4:
            shutil.rmtree(run.folder)
            raise Vanished
        mirroring.step(final=False)

    with monkeypatch.context() as patch:
        saving(patch, then)
        with pytest.raises(Vanished):
            schooling.attend(run, document)


def elsewhere(folder: Path, models: Path, home: rundir.Home, sent: Path) -> rundir.Run:
    """The run's folder on another machine, with what it is sent."""
    run = schooling.run_in(folder, models)
    shutil.copy(home.machine("first").resolved, run.resolved)
    shutil.copytree(sent, run.folder / sent.name)
    return run


def test_it_goes_on_elsewhere_from_the_newest_checkpoint_in_the_mirror(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, mirror: Path, home: rundir.Home
) -> None:
    """Nothing else of the machine is left; the adapter is byte for byte that of a run that nobody disturbed."""
    document = schooling.job(**SHORT)
    calm = schooling.run_in(tmp_path / "calm", models)
    schooling.attend(calm, document)
    vanish_after(monkeypatch, schooling.run_in(tmp_path / "first", models), mirror, document)
    sent = gathered(mirror, home)
    assert sent is not None
    assert sent.name == "checkpoint-3"
    there = elsewhere(tmp_path / "second", models, home, sent)
    schooling.attend(there, document)
    assert [line["step"] for line in schooling.steps(there)] == [4, 5, 6]
    assert schooling.essence(there) == schooling.essence(calm)[3:]
    assert schooling.files(there.folder / "adapter") == schooling.files(calm.folder / "adapter")


def test_a_checkpoint_that_the_mirror_has_damaged_is_passed_over(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, mirror: Path, home: rundir.Home
) -> None:
    """A flipped byte, or one without its manifest: the one before it is what is gone on from."""
    vanish_after(monkeypatch, schooling.run_in(tmp_path / "first", models), mirror, schooling.job(**SHORT))
    copy = rundir.Run(mirror / RUN / "machines" / "first")
    newest = copy.folder / "checkpoint-3" / train.TENSORS
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    sent = gathered(mirror, home)
    assert sent is not None
    assert sent.name == "checkpoint-2"


def test_a_mirror_keeps_two_checkpoints(tmp_path: Path, mirror: Path) -> None:
    """A long training does not fill the other disk: as on the machine, the newest two stay, by number."""
    run = rundir.Run(tmp_path / "run")
    durable.have_folder(run.folder)
    copy = copying(run, mirror)
    for step in (8, 9, 10, 11):
        checkpoints.save(run, f"checkpoint-{step}", {"state.json": b"%d" % step})
        copy.step(final=False)
    kept = rundir.Run(mirror / RUN / "machines" / "first").folder
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_a_checkpoint_is_held_while_it_is_copied(tmp_path: Path, mirror: Path) -> None:
    """On a slow mirror training would otherwise remove each one before its manifest is there."""
    run = rundir.Run(tmp_path / "run")
    durable.have_folder(run.folder)
    checkpoints.save(run, "checkpoint-1", {"state.json": b"1"})
    seen: list[bool] = []

    class Slow(FolderStore):
        def put(self, name: str, source: Any) -> None:
            seen.append(locks.is_held(run.folder / "checkpoint-1" / rundir.MANIFEST))
            super().put(name, source)

    Copying(run, Slow(mirror / RUN, "machines/first")).step(final=False)
    assert seen == [True, True]
    assert not locks.is_held(run.folder / "checkpoint-1" / rundir.MANIFEST)

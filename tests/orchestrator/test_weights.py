"""Checkpoints and adapters on their way home: one at a time, held while they travel, the newest whole one kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import rundir
from orchestrator import weights
from tests.orchestrator import carrying
from tests.orchestrator.carrying import LARGE, Side
from worker import checkpoints
from worker.pieces import Pieces

FILES = {"adapter_model.safetensors": LARGE, "state.json": b"{}\n"}


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with carrying.small(monkeypatch):
        yield Side(tmp_path)


def at_home(side: Side) -> list[str]:
    """The folders of weights at home, whole or not."""
    return sorted(path.name for path in side.home.machine(side.name).folder.glob("[ca]*-*"))


def test_of_checkpoints_only_the_newest_travels_and_replaces_the_one_before(side: Side) -> None:
    """Each pull brings what is newest then; what it stands for goes once it is whole here, and is not sent again."""
    for step in (1, 2, 3):
        checkpoints.save(side.run, f"checkpoint-{step}", FILES)
        if step > 1:
            side.carry()
            assert at_home(side) == [f"checkpoint-{step}"]
    assert [frame for frame, _ in side.carry() if "end" not in frame] == []


def test_the_old_one_stays_until_the_new_one_is_whole(side: Side) -> None:
    """While the newer one is only partly here the older one is what a resume elsewhere would get."""
    checkpoints.save(side.run, "checkpoint-1", FILES)
    side.carry()
    checkpoints.save(side.run, "checkpoint-2", FILES)
    side.carry(lambda frames: frames[:3])
    assert "checkpoint-1" in at_home(side)
    assert weights.to_send(side.home) == side.home.machine(side.name).folder / "checkpoint-1"


def test_a_checkpoint_on_its_way_is_not_removed_under_it(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training saves and retires after every piece that is sent; the checkpoint that travels still comes home whole."""
    checkpoints.save(side.run, "checkpoint-1", FILES)
    real = Pieces.step
    steps = iter(range(2, 1000))

    def step(queue: Pieces) -> Any:
        if (number := next(steps)) < 20:
            checkpoints.save(side.run, f"checkpoint-{number}", FILES)
            checkpoints.retire(side.run)
        return real(queue)

    monkeypatch.setattr(Pieces, "step", step)
    seen = [str(frame.get("whole")) for frame, _ in side.carry()]
    monkeypatch.undo()
    assert "checkpoint-1/MANIFEST.json" in seen
    side.carry()
    assert at_home(side) == ["checkpoint-19"]


def test_one_that_began_to_travel_is_finished_by_the_next_pull(side: Side) -> None:
    """A cut pull goes on with the same checkpoint though a newer one is there: else none would ever arrive."""
    checkpoints.save(side.run, "checkpoint-1", FILES)
    side.carry(lambda frames: frames[:2])
    checkpoints.save(side.run, "checkpoint-2", FILES)
    frames = [str(frame.get("piece") or frame.get("whole")) for frame, _ in side.carry()]
    assert frames[0] == "checkpoint-1/adapter_model.safetensors"
    assert at_home(side) == ["checkpoint-2"]


def test_parts_of_a_checkpoint_that_is_gone_are_dropped(side: Side) -> None:
    """What had begun to travel and was removed on its machine leaves nothing here once a newer one is whole."""
    checkpoints.save(side.run, "checkpoint-1", FILES)
    side.carry(lambda frames: frames[:2])
    checkpoints.save(side.run, "checkpoint-2", FILES)
    checkpoints.remove(side.run.folder / "checkpoint-1")
    side.carry()
    assert at_home(side) == ["checkpoint-2"]
    assert [*(side.home.machine(side.name).folder / ".parts").iterdir()] == []


def test_a_command_that_died_before_it_tidied_up_is_made_good(side: Side) -> None:
    """Two checkpoints at home, as a kill may leave them, are one after the next command; a damaged one is none."""
    copy = side.home.machine(side.name)
    for step in (1, 2):
        (copy.folder).mkdir(parents=True, exist_ok=True)
        checkpoints.save(copy, f"checkpoint-{step}", FILES)
    (copy.folder / "checkpoint-2" / "state.json").write_bytes(b"[]")
    side.opened().close()
    assert at_home(side) == ["checkpoint-1", "checkpoint-2"]
    assert weights.to_send(side.home) == copy.folder / "checkpoint-1"
    (copy.folder / "checkpoint-2" / "state.json").write_bytes(FILES["state.json"])
    side.opened().close()
    assert at_home(side) == ["checkpoint-2"]


def test_another_machine_goes_on_from_the_furthest_whole_one(side: Side, tmp_path: Path) -> None:
    """Of two machines' checkpoints the one with more steps is sent along; neither copy touches the other."""
    other = Side(tmp_path, "second")
    checkpoints.save(other.run, "checkpoint-7", FILES)
    other.carry()
    checkpoints.save(side.run, "checkpoint-10", FILES)
    side.carry()
    assert at_home(side) + at_home(other) == ["checkpoint-10", "checkpoint-7"]
    assert weights.to_send(side.home) == side.home.machine("first").folder / "checkpoint-10"


def test_a_finished_adapter_lies_in_the_run_s_own_folder(side: Side) -> None:
    """It is shown whole under its own name, is what another machine would get, and ends the checkpoints."""
    checkpoints.save(side.run, "checkpoint-7", FILES)
    side.carry()
    checkpoints.save(side.run, "adapter", {"adapter_model.safetensors": LARGE})
    checkpoints.retire(side.run, 0)
    side.carry()
    assert rundir.damage(side.home.adapter) is None
    assert (side.home.adapter / "adapter_model.safetensors").read_bytes() == LARGE
    assert at_home(side) == []
    assert weights.to_send(side.home) == side.home.machine(side.name).folder / "adapter"


def test_a_training_is_not_sealed_without_its_adapter(side: Side) -> None:
    """That it is done does not count as home before what it made is here, byte for byte."""
    copy, job = side.home.machine(side.name), {"story": "train", "params": {"merge": False}}
    seal = side.seal()
    assert weights.is_owed(copy, job, seal)
    checkpoints.save(side.run, "adapter", {"adapter_model.safetensors": LARGE})
    side.carry()
    assert not weights.is_owed(copy, job, seal)
    merging = {"story": "train", "params": {"merge": True}}
    assert weights.is_owed(copy, merging, seal)
    checkpoints.save(side.run, "merged", {"model.safetensors": LARGE})
    side.carry()
    assert not weights.is_owed(copy, merging, seal)
    assert (side.home.merged / "model.safetensors").read_bytes() == LARGE
    listed = json.loads((copy.folder / "adapter" / rundir.MANIFEST).read_text())
    (copy.folder / "adapter" / rundir.MANIFEST).write_text(json.dumps({**listed, "more": {"bytes": 1, "sha256": ""}}))
    assert weights.is_owed(copy, job, seal)
    assert not weights.is_owed(copy, {"story": "evaluate"}, seal)

"""Snapshots of the worker's code: named by content, durable, verified when used, made anew when damaged."""

from __future__ import annotations

import py_compile
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from jobs import durable
from orchestrator import agents, config, journey, machines
from orchestrator.errors import ConfigError
from orchestrator.runs import Run
from tests.conftest import COUNTING
from tests.faults.disk import PowerCut, RecordingOs, instead_of_os
from worker import unpack

Damage = Callable[[Path], object]
DAMAGES = [
    pytest.param(lambda folder: (folder / "worker/agent.py").write_bytes(b""), id="emptied"),
    pytest.param(lambda folder: (folder / "jobs/rows.py").unlink(), id="lacking"),
    pytest.param(lambda folder: (folder / "worker/more.py").write_bytes(b"import os\n"), id="added-to"),
    pytest.param(lambda folder: (folder / "jobs/rows.py").rename(folder / "jobs/row.py"), id="renamed"),
    pytest.param(shutil.rmtree, id="gone"),
]
"""What may have become of a snapshot's folder."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "agents"


def follow(run: Run) -> None:
    journey.go(run, lambda _frame, _data: None, lambda _: None)


def test_both_sides_count_the_same_files(tmp_path: Path) -> None:
    """What is sent as a snapshot and what is counted where it arrives have the same endings, each of them."""
    assert agents._SUFFIXES == unpack._SUFFIXES
    for suffix in (*agents._SUFFIXES, ".pyc", ".md"):
        (tmp_path / f"file{suffix}").write_bytes(b"x")
    assert {Path(name).suffix for name in unpack.present(str(tmp_path))} == set(agents._SUFFIXES)


def test_a_snapshot_is_the_installed_code(store: Path) -> None:
    """What is kept is every file of `jobs` and `worker`, under a name that is the same for the same content."""
    name = agents.keep(store)
    assert agents.kept(store, name) == agents.sources()
    assert {"jobs/rows.py", "worker/__main__.py", "worker/locks/train-3.11.txt"} <= agents.sources().keys()
    assert agents.keep(store) == name
    assert [path.name for path in store.glob("[!.]*")] == [name]


def test_other_code_has_another_name() -> None:
    """A name stands for names and contents: a byte moved from one to the other gives another name."""
    digests = [agents.digest(files) for files in ({"a.py": b"bc"}, {"a.pyb": b"c"}, {"a.py": b"b"}, {"a.py": b"bd"})]
    assert len(set(digests)) == 4
    assert agents.digest({"b": b"2", "a": b"1"}) == agents.digest({"a": b"1", "b": b"2"})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_never_used(store: Path, damage: Damage) -> None:
    """A snapshot that is not what its name says, or is gone, is refused with what to type instead."""
    name = agents.keep(store)
    damage(store / name)
    with pytest.raises(ConfigError, match=f"{name} .* damaged") as said:
        agents.kept(store, name)
    assert "--new-code" in said.value.hint


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_made_anew(store: Path, damage: Damage) -> None:
    """Keeping the same code again mends the folder; what was found there stays beside it under another name."""
    name = agents.keep(store)
    damage(store / name)
    found = {path.name: path.read_bytes() for path in (store / name).rglob("*.py")}
    assert agents.keep(store) == name
    assert agents.kept(store, name) == agents.sources()
    aside = {path.name: path.read_bytes() for path in store.glob(".damaged-*/*/**/*.py")}
    assert aside == found


def test_compiled_files_are_no_part_of_a_snapshot(store: Path) -> None:
    """What Python compiles into the folder while the code runs does not make it a damaged one."""
    name = agents.keep(store)
    compiled = py_compile.compile(str(store / name / "jobs" / "rows.py"), doraise=True)
    assert compiled is not None
    assert Path(compiled).is_relative_to(store / name)
    assert agents.kept(store, name) == agents.sources()
    before = (store / name).stat().st_ino
    agents.keep(store)
    assert (store / name).stat().st_ino == before, "not made anew"


def test_a_power_cut_harms_no_snapshot_that_was_written(store: Path) -> None:
    """Once written, every file is whole after any power cut, and the last thing done is to sync the folder's name."""
    files = {"jobs/rows.py": b"x = 1\n" * 2000, "worker/agent.py": b"y = 2\n", "worker/locks/train-3.11.txt": b"t\n"}
    recorder = RecordingOs()
    with instead_of_os(recorder):
        agents.write(files, store / agents.digest(files))
    for seed in range(100):
        cut = PowerCut(recorder.effects, Random(seed))
        there = {path.relative_to(store).as_posix().partition("/")[2]: data for path, data in cut.files.items()}
        assert there.items() >= files.items()
    last = recorder.effects[-1]
    assert (last.kind, last.path) == ("sync folder", store)


def test_a_folder_has_its_name_only_when_it_is_whole(store: Path) -> None:
    """A write that fails in the middle leaves no folder of that name, and no half-made one beside it."""
    files = {"jobs/rows.py": b"x = 1\n", "worker": b"in the way of a folder", "worker/agent.py": b"y = 2\n"}
    recorder = RecordingOs()
    with instead_of_os(recorder), pytest.raises(OSError, match="worker"):
        agents.write(files, store / "name")
    assert not [effect for effect in recorder.effects if effect.path.is_relative_to(store / "name")]
    assert not (store / "name").exists()
    assert not list(store.glob(".new-*"))


@pytest.mark.parametrize("begins", ["missing", "damaged"])
def test_many_may_write_the_same_snapshot(store: Path, begins: str) -> None:
    """Written by eight at once, again and again, a snapshot is whole, is moved aside only when damaged, and no more."""
    files = {f"jobs/part{number}.py": bytes(100) for number in range(10)}
    name = agents.digest(files)
    for _ in range(5):
        shutil.rmtree(store, ignore_errors=True)
        if begins == "damaged":
            (store / name / "jobs").mkdir(parents=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: agents.write(files, store / name), range(8)))
        assert agents.kept(store, name) == files
        assert not list(store.glob(".new-*"))
        assert len(list(store.glob(".damaged-*"))) == (begins == "damaged")


def test_a_damaged_copy_on_the_machine_is_sent_again(counting_run: Callable[..., Run]) -> None:
    """A run whose code was damaged on its machine gets the kept code once more, and ends well."""
    run = counting_run(count=3)
    machine = machines.this_computer()
    machine.push_agent(config.state_folder() / "agents", run.record.agent)
    for path in (machine.root / "agent" / run.record.agent).rglob("*.py"):
        path.write_bytes(b"")
    follow(run)
    assert run.record.state == "sealed"


def test_a_run_whose_kept_code_is_damaged_starts_nothing(counting_run: Callable[..., Run]) -> None:
    """Without the code it began with a run is not started; with newer code, asked for, it goes on."""
    run = counting_run(count=3)
    kept = config.state_folder() / "agents" / run.record.agent
    (kept / "worker" / "counting.py").write_bytes(b"")
    with pytest.raises(ConfigError, match="damaged"):
        follow(run)
    assert not (machines.this_computer().root / "runs").exists()
    assert durable.load_json(run.home.record)["state"] == "planned"
    agents.write(agents.sources() | {"worker/counting.py": COUNTING.encode()}, kept)
    follow(run)
    assert run.record.state == "sealed"

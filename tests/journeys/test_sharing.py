"""Several machines at work on one run: the rows of one machine, each once, whichever machine, or laptop, is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import rows
from orchestrator import runs
from tests.journeys import sharers
from tests.journeys.sharers import gpu, lines, shared, started
from tests.rig import Sshd
from tests.waiting import until

Box = Callable[..., Sshd]
NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def boxes(box: Box) -> list[Sshd]:
    """Two machines, `a` and `b`."""
    return [box(name) for name in NAMES[:2]]


@pytest.fixture
def more(box: Box, boxes: list[Sshd]) -> list[Sshd]:
    """Four machines."""
    return [*boxes, *(box(name) for name in NAMES[2:])]


def home(run: runs.Run) -> int:
    return rows.index(run.home.rows).good


def leading(run: runs.Run) -> list[runs.Run]:
    """The shares that began before it was known what the first machine resolved, and run."""
    return [share for share in runs.shares(runs.find(run.run_id)) if share.record.leads and is_running(share)]


def asked(run: runs.Run, name: str) -> int:
    """How many shares a machine was given."""
    return sum(share.record.machine == name for share in runs.shares(run))


def is_running(share: runs.Run) -> bool:
    return share.record.state == "running"


def test_four_machines_make_the_rows_of_one(more: list[Sshd]) -> None:
    """A run of four machines has every row of a run of one, once, and each machine has made a part of them alone."""
    run = shared(NAMES, 41, samples=2)
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    sharers.assert_whole(run, 41, 2)
    made = [sharers.made_on(each, run) for each in more]
    assert all(20 <= len(keys) <= 22 for keys in made), [len(keys) for keys in made]
    assert len(set().union(*made)) == sum(map(len, made)) == 82
    (listed,) = json.loads(gpu("runs", "--json").stdout)
    assert (listed["run_id"], listed["rows_home"], listed["machine"]) == (run.run_id, 82, "a, b, c, d")


def test_what_two_lost_machines_had_is_done_by_the_others(more: list[Sshd]) -> None:
    """Two of four machines go down in the midst of it, the first one among them: each row is home, once, the same."""
    run = shared(NAMES, 120, pace_s=0.1)
    command = started("resume", run.run_id)
    until(lambda: home(run) >= 12)
    more[0].power_off()
    until(lambda: home(run) >= 30)
    more[2].power_off()
    (Path.cwd() / "calm").touch()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    assert "goes to others" in said
    sharers.assert_whole(run, 120)
    assert sharers.disjoint(run)
    assert [asked(run, name) for name in "ac"] == [1, 1], "one that is gone is not asked again"


@pytest.mark.slow
def test_a_killed_worker_or_supervisor_costs_no_row(boxes: list[Sshd]) -> None:
    """A worker that is killed is started again there; where the supervisor died, its machine goes on with the rest."""
    run = shared(NAMES[:2], 60, pace_s=0.1)
    command = started("resume", run.run_id)
    until(lambda: home(run) >= 4)
    sharers.kill(boxes[0], run, "worker")
    sharers.kill(boxes[1], run, "supervisor")
    (Path.cwd() / "calm").touch()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    sharers.assert_whole(run, 60)
    both = [*sharers.made_on(boxes[0], run), *sharers.made_on(boxes[1], run)]
    assert len(both) == 60, "nothing that was home, or could be fetched, was made again"


def test_a_machine_that_comes_to_nothing_is_not_asked_again(boxes: list[Sshd]) -> None:
    """Where the supervisor died before a row was made, another machine does all of it, though this one answers."""
    run = shared(NAMES[:2], 20, hold=str(Path.cwd() / "go"))
    command = started("resume", run.run_id)
    first = until(lambda: leading(run))[0]
    sharers.kill(boxes[NAMES.index(first.record.machine)], run, "supervisor")
    until(lambda: [share for share in leading(run) if share.run_id != first.run_id], 60)
    Path("go").touch()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    sharers.assert_whole(run, 20)
    assert asked(run, first.record.machine) == 1


@pytest.mark.slow
def test_a_part_given_away_while_its_machine_goes_on_is_merged_late_and_once(boxes: list[Sshd]) -> None:
    """A machine that only cannot be reached loses its part; the late rows that it made change none that is home."""
    run = shared(NAMES[:2], 60, pace_s=0.1)
    command = started("resume", run.run_id)
    until(lambda: home(run) >= 6)
    boxes[1].kill_all()
    until(lambda: len(runs.shares(runs.find(run.run_id))) == 3, 60)
    (Path.cwd() / "calm").touch()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    assert "b did not answer, and may still work on" in said
    sharers.assert_whole(run, 60)
    before = run.home.rows.read_bytes()
    until(lambda: len(sharers.made_on(boxes[1], run)) >= 30)
    boxes[1].start()
    assert gpu("pull", run.run_id).returncode == 0
    run.reload()
    assert runs.is_settled(run)
    assert run.home.rows.read_bytes() == before
    kept = [row["key"] for path in run.home.parts.glob("*/machines/b/attempts/*/rows.jsonl") for row in lines(path)]
    assert sorted(kept) == sorted(sharers.made_on(boxes[1], run)), "all that it made late is here"
    both = sharers.made_on(boxes[0], run) + sharers.made_on(boxes[1], run)
    assert len(both) > len(set(both)) == 60, "both have made some of the rows"


@pytest.mark.slow
def test_the_machines_that_are_not_first_wait_for_what_it_resolves(more: list[Sshd]) -> None:
    """One machine resolves for all; when it is lost before that is home, another one does, and only one."""
    run = shared(NAMES[:3], 30, hold=str(Path.cwd() / "go"))
    command = started("resume", run.run_id)
    first = until(lambda: leading(run))
    until(lambda: len([share for share in runs.shares(run) if share.record.state == "pushed"]) == 2)
    assert [share.run_id for share in runs.shares(run) if is_running(share)] == [first[0].run_id]
    more[NAMES.index(first[0].record.machine)].power_off()
    led = until(lambda: [share for share in leading(run) if share.run_id != first[0].run_id], 60)
    assert len(led) == 1
    Path("go").touch()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    sharers.assert_whole(run, 30)
    resolved = {path.read_bytes() for path in run.home.parts.rglob("machines/*/resolved.json")}
    assert resolved == {run.home.shared.resolved.read_bytes()}


def test_a_laptop_that_is_cut_off_gives_nothing_away(boxes: list[Sshd]) -> None:
    """When no machine answers, it is this computer: the command ends, the machines go on, nothing is made twice."""
    run = shared(["a", "b"], 60, pace_s=0.1)
    command = started("resume", run.run_id)
    until(lambda: min(len(sharers.made_on(each, run)) for each in boxes) >= 2)
    for each in boxes:
        each.kill_all()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 5, said
    assert [share.record.state for share in runs.shares(run)] == ["running", "running"]
    for each in boxes:
        each.start()
    assert gpu("resume", run.run_id).returncode == 0
    sharers.assert_whole(run, 60)
    assert len(sharers.made_on(boxes[0], run) + sharers.made_on(boxes[1], run)) == 60

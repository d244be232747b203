"""Several machines at work on one run: the rows of one machine, each once, whichever machine, or laptop, is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import rows
from orchestrator import runs
from tests.journeys import sharers
from tests.journeys.sharers import gpu, shared, started
from tests.rig import Sshd
from tests.waiting import until

Box = Callable[..., Sshd]
NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def boxes(box: Box) -> list[Sshd]:
    return [box(name) for name in NAMES]


def home(run: runs.Run) -> int:
    return rows.index(run.home.rows).good


def test_four_machines_make_the_rows_of_one(boxes: list[Sshd]) -> None:
    """A run of four machines has every row of a run of one, once, and each machine has made a part of them alone."""
    run = shared(NAMES, 41, samples=2)
    done = gpu("resume", run.run_id)
    assert done.returncode == 0, done.stderr
    sharers.assert_whole(run, 41, 2)
    made = [sharers.made_on(each, run) for each in boxes]
    assert all(20 <= len(keys) <= 22 for keys in made), [len(keys) for keys in made]
    assert len(set().union(*made)) == sum(map(len, made)) == 82
    (listed,) = json.loads(gpu("runs", "--json").stdout)
    assert (listed["run_id"], listed["rows_home"], listed["machine"]) == (run.run_id, 82, "a, b, c, d")

"""What the laptop asks of a machine's guard and tells it, through the agent that a machine really has."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import durable, spec
from orchestrator import advance, agents, machines, on_machine
from orchestrator.errors import BadAnswer, ConfigError
from orchestrator.home import Arrivals
from orchestrator.runs import Run
from orchestrator.transport import LocalMachine
from tests.waiting import until
from tests.worker import cloud as clouds
from tests.worker.cloud import MARKER, Cloud
from tests.worker.guarding import Guarded


@pytest.fixture
def agent() -> str:
    """The code installed now, on this computer as a machine."""
    store = Path(os.environ["GPU_HOME"]) / "agents"
    name = agents.keep(store)
    machines.this_computer().push_agent(store, name)
    return name


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with clouds.serving() as cloud:
        cloud.add("own", MARKER)
        yield cloud


def test_what_was_pulled_is_acknowledged_and_lets_the_machine_go(
    agent: str, counting_run: Callable[..., Run], cloud: Cloud, tmp_path: Path
) -> None:
    """A machine with rows of a run stays; once they are home and acknowledged, idleness ends it."""
    machine = machines.this_computer()
    run = counting_run(count=30)
    arrivals = Arrivals.open(run.home, machine.name)
    assert arrivals is not None
    box = Guarded(tmp_path, cloud)
    with arrivals:
        advance.carry_home(run, machine, arrivals, lambda *_: None)
        assert on_machine.idle(machine, agent)["unpulled"] == [run.run_id]
        box.root = machine.root
        box.arm(root=str(machine.root), idle_s=0.3)
        try:
            box.seen(lambda view: (view.get("idle_s") or 0) > 0.8)
            assert cloud.ended() == []
            assert on_machine.view(machine, agent)["alive"] is True
            assert on_machine.acknowledge(run, machine, arrivals) == []
            assert on_machine.acknowledge(run, machine, arrivals) == [], "told twice"
            assert on_machine.idle(machine, agent)["unpulled"] == []
            until(cloud.ended)
        finally:
            box.disarm()


def test_what_differs_there_is_named(agent: str, counting_run: Callable[..., Run]) -> None:
    """A file that is not on the machine what it is at home is not confirmed, and said so."""
    machine = machines.this_computer()
    run = counting_run(count=5)
    arrivals = Arrivals.open(run.home, machine.name)
    assert arrivals is not None
    with arrivals:
        advance.carry_home(run, machine, arrivals, lambda *_: None)
        there = machine.root / "runs" / run.run_id / "attempts" / "0001" / "rows.jsonl"
        there.write_bytes(there.read_bytes()[:-10] + b"another!}\n")
        assert on_machine.acknowledge(run, machine, arrivals) == ["attempts/0001/rows.jsonl"]
        assert on_machine.idle(machine, agent)["unpulled"] == [run.run_id]


def test_the_deadline_is_moved_durably_and_a_wrong_one_is_refused(agent: str) -> None:
    """What the laptop asks for stands on the machine's disk when it returns; what is no time is an error."""
    machine = machines.this_computer()
    assert on_machine.view(machine, agent) == {"alive": False, "deadline_asked": None}
    at = time.time() + 60
    assert on_machine.move_deadline(machine, agent, at)["deadline"] == at
    assert durable.load_json(machine.root / "guard" / "deadline.json")["deadline"] == at
    with pytest.raises((ConfigError, ValueError)):
        on_machine.move_deadline(machine, agent, float("nan"))
    assert on_machine.view(machine, agent)["deadline_asked"] == at


class _Odd(LocalMachine):
    """A machine that answers with something else."""

    def call(self, words: list[str], data: object, deadline_s: float = 0.0) -> bytes:
        return spec.canonical({"idle_s": "long", "alive": "yes", "refused": 3})


def test_answers_that_are_none_are_errors(agent: str, counting_run: Callable[..., Run]) -> None:
    """A machine that says something else is never taken to be idle, guarded, or to have confirmed anything."""
    odd = _Odd(machines.this_computer().root)
    run = counting_run(count=1)
    arrivals = Arrivals.open(run.home, odd.name)
    assert arrivals is not None
    with arrivals:
        for ask in (
            lambda: on_machine.idle(odd, agent),
            lambda: on_machine.view(odd, agent),
            lambda: on_machine.move_deadline(odd, agent, 1.0),
            lambda: on_machine.acknowledge(run, odd, arrivals),
        ):
            with pytest.raises(BadAnswer):
                ask()

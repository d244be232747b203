"""The rules of a crew that cost money or work when they are forgotten: each is seen at work by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from jobs import durable
from orchestrator import clock, crew, fleet, journey, rentals, renting, runs, shares, tenancy
from orchestrator.errors import NotReachable
from orchestrator.gathering import Gathering
from orchestrator.providers.base import Need
from orchestrator.rentals import Caps, Terms
from orchestrator.runs import Run
from tests.journeys import sharers


@contextmanager
def crewed(run: Run) -> Iterator[Any]:
    """The crew of a run, before any of its threads has begun."""
    gathering = Gathering.open(run)
    assert gathering is not None
    with gathering:
        yield crew._Crew(gathering, crew.Manner(lambda: nullcontext(lambda frame, data: None), lambda seconds: None))


@pytest.mark.usefixtures("light_cloud")
def test_machines_of_a_crew_are_planned_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that looked at the budget at once would both spend what is left of it."""
    run = sharers.rented(2, Caps(max_hours=4.0, budget_usd=6.0), 4)
    begin, second_is_in, inside = fleet.begin, threading.Event(), threading.Semaphore(1)

    def watched(run: Run, to_come: int) -> str | None:
        if not inside.acquire(blocking=False):
            second_is_in.set()
        assert not second_is_in.wait(0.3), "the other one is planned in the same moment"
        name = begin(run, to_come)
        inside.release()
        return name

    monkeypatch.setattr(fleet, "begin", watched)
    monkeypatch.setattr(renting, "ensure_ready", lambda *_, **__: None)
    with crewed(run) as found, ThreadPoolExecutor() as pool:
        assert list(pool.map(found._is_ready, found.board.seats)) == [True, True]
    assert sum(rental.caps().budget_usd or 0 for rental in fleet.of(run)) == pytest.approx(6.0)


@pytest.mark.usefixtures("light_cloud")
def test_a_machine_that_went_while_nobody_looked_gives_its_part_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share is lost and its seat gets another machine: waiting for the gone one would wait for ever."""
    run = sharers.rented(2, Caps(max_hours=4.0), 4)
    asked: list[str] = []
    monkeypatch.setattr(renting, "ensure_ready", lambda name, *_, **__: asked.append(name))
    with crewed(run) as found:
        seat = found.board.seats[0]
        seat.name = fleet.begin(run, 2) or ""
        share = found.board.next_share(seat, lambda: None, may_wait=False)
        share.save(state="running")
        gone = seat.name
        rentals.find(gone).save(state="lost")  # type: ignore[union-attr]
        assert found._is_ready(seat)
        assert seat.share is None
        assert seat.name != gone
    assert asked == [seat.name]
    assert runs.find(share.run_id).record.state == "lost"


def test_a_machine_whose_time_is_over_while_it_waits_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for what others may give up is not forgotten: at its deadline it is ended."""
    run = sharers.rented(2, Caps(max_hours=4.0), 4)
    run.save(terminate=False)
    ended: list[str] = []
    monkeypatch.setattr(tenancy, "end_machine", lambda rental, say: ended.append(rental.name))
    with crewed(run) as found:
        one, other = found.board.seats
        one.name, other.name = run.record.machine, f"{run.record.machine}-2"
        for seat in (one, other):
            rentals.create(seat.name, "lambda", Terms(Need(gpu="A10"), Caps(), "laptop")).save(
                state="ready", asked_at=clock.timestamp() - 7200, deadline=clock.timestamp() + 3600
            )
            found.board.next_share(seat, lambda: None, may_wait=False)
        one.share.save(state="sealed")
        found.board.ended(one, one.share, is_free=False)
        held = shares.create(found.gathering, other.name, {"only": ["e0", "e1", "e2", "e3"]})
        held.save(state="running")
        rentals.find(one.name).save(deadline=clock.timestamp() - 1)  # type: ignore[union-attr]
        assert not found._serve(one)
    assert ended == [one.name]


@pytest.mark.parametrize(("kind", "stopped"), [("expectation", 1), ("crash", 0)])
def test_what_ends_the_whole_run_stops_the_others_at_once(
    monkeypatch: pytest.MonkeyPatch, kind: str, stopped: int
) -> None:
    """A score that is surely not as expected ends every share where it is; a crash of one is its own."""
    run = sharers.shared(["a", "b"], 4)
    asked: list[str] = []

    def fails(share: Run, *_: Any) -> None:
        share.save(state="failed", failure={"kind": kind, "message": "", "hint": ""})

    monkeypatch.setattr(journey, "go", fails)
    monkeypatch.setattr(journey, "stop", lambda share, grace_s: asked.append(share.record.machine))
    with crewed(run) as found:
        one, other = found.board.seats
        share, its = (found.board.next_share(seat, lambda: None, may_wait=False) for seat in (one, other))
        its.save(state="running")
        durable.have_folder(its.home.machine("b").folder)
        durable.save_json(its.home.machine("b").resolved, {"fingerprint": "one", "weights": []})
        found.gathering.resolve(its.home.machine("b"))
        assert not found._carry(one, share, lambda: None)
    assert asked == ["b"] * stopped


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_silent_rented_machine_is_dead_only_by_its_providers_word(
    monkeypatch: pytest.MonkeyPatch, is_dead: bool
) -> None:
    """Its part is given away when its provider knows it and it stays silent; when it answers, it goes on."""
    run = sharers.rented(2, Caps(max_hours=4.0), 4)
    asked: list[str] = []

    def silent(*_: Any) -> None:
        raise NotReachable("it does not answer", "wait")

    def judged(share: Run, error: Exception, say: Any) -> bool:
        asked.append(share.run_id)
        return is_dead

    monkeypatch.setattr(journey, "go", silent)
    monkeypatch.setattr(tenancy, "is_dead", judged)
    with crewed(run) as found:
        one, other = found.board.seats
        one.name, other.name = "one", "other"
        other.heard_at = clock.monotonic()
        share = found.board.next_share(one, lambda: None, may_wait=False)
        assert found._go(one, share, lambda: None, is_last=False) is (True if is_dead else None)
    assert asked == [share.run_id]

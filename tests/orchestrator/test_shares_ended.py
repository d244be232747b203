"""Whose a share's examples are in each of its states, how a run stands by its shares, and who waits for whom."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobs import durable, rows
from orchestrator import crew, errors, machines, runs, shares, sharing
from orchestrator.board import Board, Seat
from orchestrator.gathering import ids_in
from orchestrator.rentals import Caps
from orchestrator.shares import Pool
from tests.journeys import sharers
from tests.orchestrator.test_handing_out import open_, row, sent

IDS = ["e0", "e1", "e2", "e3"]
HALVES = [("a", {"index": 0, "of": 2}), ("b", {"index": 1, "of": 2})]


@pytest.mark.parametrize("state", ["planned", "pushed", "running", "sealed", "stopped", "failed", "lost"])
def test_a_share_at_work_or_done_is_nobody_elses(state: str) -> None:
    """While it may be at work, or is done, its examples are not handed out, known by number or by their ids."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        first, _ = (shares.create(gathering, *each) for each in HALVES)
        first.save(state=state)
        is_free = state in ("stopped", "failed", "lost")
        assert Pool(gathering, set()).left == ([0] if is_free else [])
        gathering.resolve(sent(first, "one", ids=IDS))
        assert Pool(gathering, set()).left == (["e0", "e2"] if is_free else [])
        assert not Pool(gathering, {first.run_id}).left


def test_an_example_is_done_with_all_of_its_rows() -> None:
    """One of two samples is not all of an example; nor are both where a re-ranker has not chosen."""
    job: dict[str, Any] = {"task": "t", "params": {"split": "s", "samples": 2, "reranker": None}}
    done, choices = rows.Index(), rows.Index()
    done.keys.update({"t/s/e0#0": True, "t/s/e0#1": True, "t/s/e1#0": True, "t/s/e2#0": True, "t/s/e2#1": False})
    assert shares.missing(job, ["e0", "e1", "e2"], done, choices) == ["e1", "e2"]
    job["params"]["reranker"] = "rank.py:best"
    assert shares.missing(job, ["e0"], done, choices) == ["e0"]
    choices.keys["t/s/e0"] = True
    assert shares.missing(job, ["e0"], done, choices) == []


@pytest.mark.parametrize(
    ("states", "made", "becomes"),
    [
        (("sealed", "sealed"), IDS, "sealed"),
        (("lost", "lost"), IDS, "sealed"),
        (("sealed", "lost"), IDS[:3], "lost"),
        (("sealed", "failed"), IDS[:3], "failed"),
        (("sealed", "stopped"), IDS[:3], "stopped"),
        (("sealed", "running"), IDS[:3], "running"),
        (("sealed", "running"), IDS, "running"),
        (("lost", "planned"), IDS[:1], "running"),
    ],
)
def test_how_a_run_stands_is_told_by_its_shares(states: tuple[str, str], made: list[str], becomes: str) -> None:
    """Done is what has every row; with one missing it is what ended its share; while a share is at work, so is it."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        parts = [shares.create(gathering, *each) for each in HALVES]
        for part, state in zip(parts, states, strict=True):
            own = IDS[parts.index(part) :: 2]
            sent(part, "one", *(sharers.result(name) for name in own if name in made), ids=IDS)
            gathering.resolve(part.home.machine(part.record.machine))
            part.save(state=state, finished_at="2026-01-02" if state != "running" else None)
            gathering.take_in(part)
        shares.settle(gathering)
        assert (run.record.state, run.record.rows_home) == (becomes, len(made))


@pytest.mark.parametrize(("kind", "is_resolved"), [("expectation", True), ("config", False)])
def test_a_failure_that_speaks_of_all_ends_all(kind: str, is_resolved: bool) -> None:
    """A score that is not as expected, or any failure of the job before it is settled, lets nothing more begin."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        seats = [Seat("a"), Seat("b")]
        board = Board(gathering, seats)
        share = board.next_share(seats[0], lambda: None, may_wait=False)
        assert share
        if is_resolved:
            board.resolve(sent(share, "one", ids=IDS))
        share.save(state="failed", failure={"kind": kind, "message": "", "hint": ""})
        board.ended(seats[0], share, is_free=False)
        assert board.is_ending
        assert board.next_share(seats[1], lambda: None, may_wait=False) is None
        assert not board.has_left()


def test_what_is_home_of_an_ended_share_is_not_made_again() -> None:
    """Rows that came home with the end of a share, and were not looked at yet, count before its rest is handed out."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        seats = [Seat("b")]
        board = Board(gathering, seats)
        first = shares.create(gathering, *HALVES[0])
        shares.create(gathering, *HALVES[1])
        sent(first, "one", row("e0", "x"), ids=IDS)
        first.save(state="lost")
        rest = board.next_share(seats[0], lambda: None, may_wait=False)
        assert rest
        assert rest.job()["share"] == {"only": ["e2"]}


def test_nothing_is_rented_for_what_somebody_waits_for() -> None:
    """What is left is no reason to rent while a machine that is there has nothing to do."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        seats = [Seat("a"), Seat("")]
        board = Board(gathering, seats)
        assert board.has_left()
        seats[0].is_waiting = True
        assert not board.has_left()


def test_who_waits_is_told_when_the_last_other_one_is_over() -> None:
    """A machine that waits for what another may give up goes once that one is in the crew no more."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering, ThreadPoolExecutor() as pool:
        seats = [Seat("a"), Seat("b")]
        board = Board(gathering, seats)
        try:
            first, second = (board.next_share(seat, lambda: None, may_wait=False) for seat in seats)
            assert first
            assert second
            first.save(state="sealed")
            board.ended(seats[0], first, is_free=False)
            waiting = pool.submit(board.next_share, seats[0], lambda: None, may_wait=True)
            board.over(seats[1])
            assert waiting.result(timeout=10) is None
        finally:
            board.leave()


@pytest.mark.parametrize("is_over", [True, False])
def test_another_one_leads_when_the_first_came_to_nothing(is_over: bool) -> None:
    """When the share that began first ends, or its machine does, with nothing resolved, the next one may begin."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering, ThreadPoolExecutor() as pool:
        seats = [Seat("a"), Seat("b")]
        board = Board(gathering, seats)
        try:
            first, second = (board.next_share(seat, lambda: None, may_wait=False) for seat in seats)
            assert first
            assert second
            assert board.may_start(first)
            waiting = pool.submit(board.may_start, second)
            if is_over:
                board.over(seats[0])
            else:
                first.save(state="lost")
                board.ended(seats[0], first, is_free=False)
            assert waiting.result(timeout=10)
            assert second.record.leads
        finally:
            board.leave()


@pytest.mark.parametrize("ids", [["e0", "e0"], ["e0", 1], "e0", None, {"e0": 1}])
def test_a_list_of_examples_that_is_none_is_none(ids: Any) -> None:
    """A machine's list of ids with one twice, or that is no list of texts, is not believed."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        share = shares.create(gathering, *HALVES[0])
        assert ids_in(sent(share, "one", ids=ids)) is None


def test_each_machine_has_one_place() -> None:
    """A machine that is at work on a share, and is one of the run's, is followed once; the others come after it."""
    run = sharers.shared(["a", "b", "c"], 6)
    with open_(run) as gathering:
        shares.create(gathering, "b", HALVES[1][1]).save(state="running")
        assert [(seat.name, seat.share is not None) for seat in crew._seats(gathering)] == [
            ("b", True),
            ("a", False),
            ("c", False),
        ]


def test_no_more_are_rented_than_there_is_to_do() -> None:
    """Of five machines asked for, two are seated for two examples: one that has a share, and one to be rented."""
    run = sharers.rented(5, Caps(budget_usd=1.0), 2)
    durable.have_folder(run.home.shared.folder)
    durable.save_json(run.home.shared.examples, {"ids": IDS[:2]})
    with open_(run) as gathering:
        assert [seat.name for seat in crew._seats(gathering)] == ["", ""]
        shares.create(gathering, "theirs", {"only": ["e0"]}).save(state="running")
        assert [seat.name for seat in crew._seats(gathering)] == ["theirs", ""]


@pytest.fixture
def away() -> None:
    """A machine that does not answer."""
    record = {"root": "/r", "python": "python3", "worker_python": None, "key": None, "key_in_agent": False}
    record |= {"fingerprint": "", "added_at": "", "system": "", "gpu": None, "gpus": 0}
    durable.have_folder(machines.folder("away"))
    machines.save(machines.Record("away", "me", "127.0.0.1", 9, **record))


@pytest.mark.usefixtures("away")
def test_a_share_is_taken_only_by_who_says_so_from_a_machine_that_does_not_answer() -> None:
    """Unreachable is not dead: its share stays its own; taken over, it is given up, and its machine asked later."""
    run = sharers.shared(["away", "b"], 4)
    with open_(run) as gathering:
        shares.create(gathering, "away", HALVES[0][1]).save(state="running", attempt=1)
    with pytest.raises(errors.NotReachable):
        sharing.divide(run, sharing.Division(2, ["b", "c"]))
    assert [share.record.state for share in runs.shares(run)] == ["running"]
    sharing.divide(run, sharing.Division(2, ["b", "c"], take_over=True))
    (share,) = runs.shares(run)
    assert (share.record.state, share.record.former) == ("lost", [{"machine": "away", "settled": False}])
    assert run.record.boxes == ["b", "c"]


@pytest.mark.usefixtures("away")
def test_the_machine_that_a_run_leaves_is_remembered() -> None:
    """Taken over from a machine that does not answer, a run is divided among others; that one is asked again later."""
    run = sharers.shared(["away"], 4)
    run.save(state="running", attempt=1)
    with pytest.raises(errors.NotReachable):
        sharing.divide(run, sharing.Division(2, ["b", "c"]))
    assert (run.record.machines, run.record.former) == (0, [])
    sharing.divide(run, sharing.Division(2, ["b", "c"], take_over=True, changes={"machine": "b"}))
    assert run.record.former == [{"machine": "away", "settled": False}]
    assert (run.record.machines, run.record.boxes, run.record.state) == (2, ["b", "c"], "planned")


def test_a_stop_is_on_the_disk_before_anybody_is_asked() -> None:
    """A share whose machine cannot be reached is not known to be stopped; but no other begins any more."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        shares.create(gathering, *HALVES[0]).save(state="running")
    with pytest.raises(errors.GpuError):
        sharing.stop(run, 1.0)
    assert durable.load_json(run.home.stop)

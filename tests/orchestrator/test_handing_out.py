"""Shares of a run at home: handed out once, merged by key, never mixed with what another measurement made."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from jobs import durable, rows, rundir
from jobs.shares import chosen
from orchestrator import clock, fleet, inventory, ledger, rentals, runs, shares
from orchestrator.board import Board, Seat
from orchestrator.gathering import Gathering
from orchestrator.ledger import Lease
from orchestrator.providers.base import Need
from orchestrator.rentals import Caps, Terms
from orchestrator.runs import Run
from orchestrator.shares import Pool
from tests.journeys import sharers


def open_(run: Run) -> Gathering:
    gathering = Gathering.open(run)
    assert gathering is not None
    return gathering


def row(name: str, completion: str, error: str | None = None) -> dict[str, Any]:
    return {"key": f"t/s/{name}#0", "error": error, "example_id": name, "sample_index": 0, "completion": completion}


def sent(share: Run, fingerprint: str, *made: dict[str, Any], ids: list[str] | None = None) -> rundir.Run:
    """Have at home what a machine made of a share, as a pull leaves it."""
    copy = share.home.machine(share.record.machine)
    durable.have_folder(copy.folder)
    durable.save_json(copy.resolved, {"fingerprint": fingerprint, "weights": []})
    if ids is not None:
        durable.save_json(copy.examples, {"ids": ids})
    durable.replace_whole(share.home.rows, b"".join(map(rows.encode, made)))
    return copy


def completions(run: Run) -> dict[str, str]:
    return {found["key"]: found["completion"] for found in rows.read([run.home.rows])}


def test_rows_of_another_measurement_are_kept_but_not_merged() -> None:
    """A share that began before the first machine's resolved.json was home counts only if it came to the same."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        first, second = (shares.create(gathering, name, {"index": at, "of": 2}) for at, name in enumerate("ab"))
        first.save(leads=True)
        second.save(leads=True)
        sent(first, "one", row("e0", "x"), ids=["e0", "e1", "e2", "e3"])
        sent(second, "other", row("e1", "y"))
        assert gathering.take_in(first)
        assert not gathering.take_in(second)
    with open_(run) as gathering:
        assert completions(run) == {"t/s/e0#0": "x"}
        assert gathering.example_ids() == ["e0", "e1", "e2", "e3"]
        sent(second, "one", row("e1", "y"))
        assert gathering.take_in(second)
    assert completions(run) == {"t/s/e0#0": "x", "t/s/e1#0": "y"}


def test_the_first_good_row_of_a_key_is_final_across_shares() -> None:
    """Two shares that made the same key: the first good row at home stays; an error row is replaced once."""
    run = sharers.shared(["a", "b"], 2)
    with open_(run) as gathering:
        first, second = (shares.create(gathering, name, {"index": at, "of": 2}) for at, name in enumerate("ab"))
        sent(first, "one", row("e0", "first"), row("e1", "", "out of memory"))
        sent(second, "one", row("e0", "second"), row("e1", "mended"))
        gathering.take_in(first)
        gathering.take_in(second)
    before = run.home.rows.read_bytes()
    assert completions(run) == {"t/s/e0#0": "first", "t/s/e1#0": "mended"}
    with open_(run):
        assert run.home.rows.read_bytes() == before, "merged once, however often it is opened"


def test_what_was_resolved_is_taken_over_once_its_weights_are_home() -> None:
    """Other machines start with the first one's resolved.json only when the model that it names is complete here."""
    run = sharers.shared(["a", "b"], 2)
    with open_(run) as gathering:
        share = shares.create(gathering, "a", {"index": 0, "of": 2})
        copy = sent(share, "one", row("e0", "x"))
        durable.save_json(copy.resolved, {"fingerprint": "one", "weights": ["model"]})
        assert not gathering.resolve(copy)
        durable.have_folder(copy.folder / "model")
        (copy.folder / "model" / "weights").write_bytes(b"w")
        assert not gathering.resolve(copy)
        durable.save_json(copy.folder / "model" / rundir.MANIFEST, {})
        assert gathering.resolve(copy)
    assert (run.home.shared.folder / "model" / "weights").read_bytes() == b"w"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("machines", [1, 3, 5])
def test_what_is_handed_out_is_all_and_nothing_twice(known: bool, machines: int) -> None:
    """Every machine gets a share as large as the others'; together they are what is missing, each example once."""
    run = sharers.shared([*"abcde"[: max(machines, 2)]], 17)
    run.save(machines=machines)
    ids = [f"e{number}" for number in range(17)]
    if known:
        durable.have_folder(run.home.shared.folder)
        durable.save_json(run.home.shared.examples, {"ids": ids})
        durable.replace_whole(run.home.rows, rows.encode(row("e3", "is home")))
    with open_(run) as gathering:
        seats = [Seat(name) for name in "abcde"[:machines]]
        board = Board(gathering, seats)
        for seat in seats:
            assert board.next_share(seat, lambda: None, may_wait=False)
        assert not Pool(gathering, set())
        for seat in seats:  # one that asks again has what it has
            assert board.next_share(seat, lambda: None, may_wait=False) is seat.share
    jobs = [share.job() for share in runs.shares(run)]
    parts = [chosen(job, ids) for job in jobs]
    missing = [name for name in ids if not (known and name == "e3")]
    assert sorted(name for part in parts for name in part) == sorted(missing)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_a_lost_share_lacks_is_handed_out_again_and_a_failed_ones_is_not() -> None:
    """The rest of a share whose machine was lost goes to another; rows it had sent are not made again."""
    run = sharers.shared(["a", "b"], 6)
    ids = [f"e{number}" for number in range(6)]
    with open_(run) as gathering:
        seats = [Seat("a"), Seat("b")]
        board = Board(gathering, seats)
        first, second = (board.next_share(seat, lambda: None, may_wait=False) for seat in seats)
        assert first
        assert second
        sent(first, "one", row("e0", "x"), ids=ids)
        first.save(state="lost")
        board.ended(seats[0], first, is_free=False)
        rest = board.next_share(seats[0], lambda: None, may_wait=False)
        assert rest
        assert rest.job()["share"] == {"only": ["e2"]}, "the other machine may have the other half"
        assert Pool(gathering, set()).left == ["e4"]
        second.save(state="failed")
        board.ended(seats[1], second, is_free=False)
        last = board.next_share(seats[1], lambda: None, may_wait=False)
        assert last
        assert last.job()["share"] == {"only": ["e4"]}
        assert not board.has_left()


@pytest.mark.parametrize(("kind", "left"), [("busy", 3), ("disk_full", 3), ("config", 0), ("crash", 0)])
def test_a_failure_of_the_machine_alone_is_not_one_of_the_job(kind: str, left: int) -> None:
    """What a machine without free GPUs or disk could not do others may; what the job itself failed at is left alone."""
    run = sharers.shared(["a", "b"], 6)
    with open_(run) as gathering:
        seats = [Seat("a"), Seat("b")]
        board = Board(gathering, seats)
        first, second = (board.next_share(seat, lambda: None, may_wait=False) for seat in seats)
        assert first
        assert second
        board.resolve(sent(second, "one", ids=[f"e{number}" for number in range(6)]))
        first.save(state="failed", failure={"kind": kind, "message": "", "hint": ""})
        board.ended(seats[0], first, is_free=False)
        assert board.has_left() is bool(left)
        assert not board.is_ending


def test_after_a_stop_nothing_begins() -> None:
    """Once a stop is asked for, no share is handed out, and none that waits for the first one starts."""
    run = sharers.shared(["a", "b"], 6)
    with open_(run) as gathering:
        seats = [Seat("a"), Seat("b")]
        board = Board(gathering, seats)
        first = board.next_share(seats[0], lambda: None, may_wait=False)
        assert first
        durable.save_json(run.home.stop, {})
        assert not board.may_start(first)
        assert board.next_share(seats[1], lambda: None, may_wait=True) is None


def test_one_share_starts_before_anything_is_resolved() -> None:
    """The first that is ready leads, durably; the others may start once what it resolved is home."""
    run = sharers.shared(["a", "b"], 6)
    with open_(run) as gathering:
        seats = [Seat("a"), Seat("b")]
        board = Board(gathering, seats)
        first, second = (board.next_share(seat, lambda: None, may_wait=False) for seat in seats)
        assert first
        assert second
        assert board.may_start(first)
        assert runs.find(first.run_id).record.leads
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(board.may_start, second)
            assert not wait([waiting], timeout=0.5).done
            board.resolve(sent(first, "one"))
            assert waiting.result(timeout=10)
        assert not runs.find(second.run_id).record.leads


def test_a_share_is_given_what_is_home_of_its_examples() -> None:
    """Samples that are there already go along with a share, so that only the others are made; errors do not."""
    run = sharers.shared(["a", "b"], 3, samples=2)
    durable.have_folder(run.home.shared.folder)
    durable.save_json(run.home.shared.examples, {"ids": ["e0", "e1", "e2"]})
    made = [row("e0", "x"), row("e1", "", "out of memory"), row("e2", "z")]
    durable.replace_whole(run.home.rows, b"".join(map(rows.encode, made)))
    with open_(run) as gathering:
        share = shares.create(gathering, "a", {"only": ["e0", "e1"]})
    assert completions(share) == {"t/s/e0#0": "x"}


class Crash(Exception):
    """The laptop died."""


@pytest.mark.parametrize("is_done", [True, False])
def test_dying_at_any_effect_is_mended_by_doing_it_again(monkeypatch: pytest.MonkeyPatch, is_done: bool) -> None:
    """Killed before or after the n-th thing put on the disk, for all n: each example has one owner in the end."""
    real, left = durable.replace_whole, 0

    def dying(path: Any, data: bytes, *, synced: bool = True) -> None:
        nonlocal left
        left -= 1
        if left == 0 and not is_done:
            raise Crash
        real(path, data, synced=synced)
        if left == 0:
            raise Crash

    ids = [f"e{number}" for number in range(6)]
    for number in range(1, 40):
        run = sharers.shared(["a", "b"], 6)
        left = number
        with monkeypatch.context() as patched, contextlib.suppress(Crash):
            patched.setattr(durable, "replace_whole", dying)
            _hand_out(run, ids)
        is_over, left = left > 0, 0
        _hand_out(run, ids)
        parts = [chosen(share.job(), ids) for share in runs.shares(run) if share.record.state in shares.COVERED]
        assert sorted(name for part in parts for name in part) == ids[1:]
        assert completions(run) == {"t/s/e0#0": "x"}
        if is_over:
            return
    raise AssertionError("more effects than were counted on")


def _hand_out(run: Run, ids: list[str]) -> None:
    """Both machines get a share, the first sends a row and is lost, and what it lacked is handed out again."""
    with open_(run) as gathering:
        seats = [Seat("a"), Seat("b")]
        board = Board(gathering, seats)
        first = next(iter(runs.shares(run)), None) or board.next_share(seats[0], lambda: None, may_wait=False)
        assert first
        if first.record.state == "planned":
            board.may_start(first)
            copy = sent(first, "one", row("e0", "x"), ids=ids)
            board.resolve(copy)
            first.save(state="lost")
        board.ended(seats[0], first, is_free=False)
        for seat in seats * 3:
            seat.share = None
            board.next_share(seat, lambda: None, may_wait=False)
        assert not Pool(gathering, set())


def test_a_folder_without_a_record_is_no_share() -> None:
    """What a crash leaves of a share that was being made belongs to nobody; the next one has a number of its own."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        durable.have_folder(run.home.parts / f"{run.run_id}.1")
        assert runs.shares(run) == []
        assert len(Pool(gathering, set())) == 2
        assert shares.create(gathering, "a", {"index": 0, "of": 2}).run_id == f"{run.run_id}.2"


def test_a_shared_run_is_listed_once_and_found_by_its_machines() -> None:
    """Of runs there is one; its shares are found by their ids, and by the machines that they are on."""
    run = sharers.shared(["a", "b"], 4)
    with open_(run) as gathering:
        for index, name in enumerate("ab"):
            shares.create(gathering, name, {"index": index, "of": 2}).save(state="running")
    assert [found.run_id for found in runs.remembered()] == [run.run_id]
    assert runs.find(f"{run.run_id}.2").record.machine == "b"
    assert inventory.runs_on("a") == inventory.runs_on("b") == [run.run_id]
    assert inventory.not_home("b") == [f"{run.run_id}.2"]
    assert runs.machine_names(run) == "a, b"


def _rent(run: Run, number: int, budget_usd: float | None, spent_h: float, *, gone: bool) -> None:
    """A machine of the run that costs 1 USD/h, as the records have it."""
    name = run.record.machine + ("" if number == 1 else f"-{number}")
    opened_at = clock.timestamp() - spent_h * 3600
    marker = f"m{number}"
    ledger.open_lease(Lease(marker, name, "lambda", 1.0, opened_at, instance_id=marker))
    rental = rentals.create(name, "lambda", Terms(Need(), Caps(budget_usd=budget_usd), "laptop"))
    rental.save(marker=marker, state="gone" if gone else "ready")
    if gone:
        ledger.close_lease(marker, clock.timestamp())


def test_caps_hold_for_all_machines_of_a_run_together() -> None:
    """A further machine gets what is spent by none and promised to none, of the hours that are left, or nothing."""
    run = sharers.rented(2, Caps(max_hours=4.0, budget_usd=6.0), 4)
    run.record.rents["since"] = clock.timestamp() - 7200
    caps = Caps(max_hours=4.0, budget_usd=6.0)
    assert fleet.caps_left(run, caps, 2) == Caps(max_hours=4.0, budget_usd=3.0)
    _rent(run, 1, 3.0, 1.0, gone=True)
    _rent(run, 2, 3.0, 1.0, gone=False)
    left = fleet.caps_left(run, caps, 1)
    assert left is not None
    assert left.budget_usd == pytest.approx(6.0 - 1.0 - 3.0, abs=0.05)
    assert left.max_hours == pytest.approx(3.0, abs=0.01)
    assert fleet.caps_left(run, Caps(max_hours=1.0), 1) is None
    assert fleet.caps_left(run, Caps(budget_usd=4.0), 1) is None
    for number in range(3, 2 + fleet.SPARE_MAX + 1):
        _rent(run, number, 0.1, 0.1, gone=True)
    assert fleet.caps_left(run, Caps(max_hours=None), 1) is None, "there were as many as there may be"

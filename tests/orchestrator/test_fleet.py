"""The machines rented for a run that several share: which are its own, what each may cost, and that all go back."""

from __future__ import annotations

import pytest

from orchestrator import clock, fleet, ledger, rentals, runs
from orchestrator.errors import MayCost
from orchestrator.gathering import Gathering
from orchestrator.ledger import Lease
from orchestrator.providers.base import Need
from orchestrator.rentals import Caps, Rental, Terms
from orchestrator.runs import Run
from tests.cloud import Cloud
from tests.journeys import sharers


def machine(name: str, state: str, caps: Caps | None = None, *, since_h: float = 0.0) -> Rental:
    """A machine that costs 1 USD/h, as the records have it; of one that is planned the ledger knows nothing."""
    rental = rentals.create(name, "lambda", Terms(Need(gpu="A10", count=1), caps or Caps(), "laptop"))
    rental.save(state=state, marker=f"m-{name}", instance_id=None if state == "planned" else f"i-{name}")
    if state != "planned":
        opened_at = clock.timestamp() - since_h * 3600
        ledger.open_lease(Lease(f"m-{name}", name, "lambda", 1.0, opened_at, instance_id=f"i-{name}"))
    return rental


def ended(run: Run, state: str = "stopped") -> Run:
    """The run, over, so that its machines are to go back."""
    run.save(state=state, finished_at=clock.now(), terminate=True)
    return run


def test_only_machines_named_as_the_run_are_its_own() -> None:
    """NAME, NAME-2, NAME-3 are the run's; what only begins like it, or ends like it, is somebody else's."""
    run = sharers.rented(2, Caps(max_hours=1.0), 4)
    base = run.record.machine
    for name in (base, f"{base}-3", f"{base}-2", f"{base}-2b", f"{base}-02", f"{base}-0", f"{base}-", f"x{base}"):
        if not name.endswith("-"):
            machine(name, "ready")
    assert [rental.name for rental in fleet.of(run)] == [base, f"{base}-2", f"{base}-3"]
    rental = rentals.find(f"{base}-2")
    assert rental
    rental.save(state="gone")
    assert [found.name for found in fleet.live(run)] == [base, f"{base}-3"]


def test_a_name_that_was_used_is_not_used_again(light_cloud: Cloud) -> None:
    """A machine that is gone, and even its record, keeps its name: rows and costs of two would be one's."""
    run = sharers.rented(3, Caps(max_hours=4.0), 4)
    base = run.record.machine
    run.save(legs=[{"machine": f"{base}-3"}])
    machine(f"{base}-2", "gone")
    rentals.find(f"{base}-2").folder.joinpath("rental.json").unlink()  # type: ignore[union-attr]
    assert [fleet.begin(run, 2), fleet.begin(run, 1)] == [base, f"{base}-4"]
    assert light_cloud.core.count("/instance-operations/launch") == 0


def test_a_machine_without_a_budget_of_its_own_may_spend_until_its_deadline() -> None:
    """What is left of the run's budget is what no other machine may still spend: two more hours of one at 1 USD/h."""
    run = sharers.rented(2, Caps(budget_usd=6.0), 4)
    run.record.rents["since"] = clock.timestamp() - 7200
    rental = machine(run.record.machine, "ready", Caps(), since_h=1.0)
    offer = {"provider": "lambda", "offer_id": "o", "type_name": "t", "gpu": "A10", "count": 1, "vram_gb": 24.0}
    offer |= {"vcpus": 1, "ram_gb": 1.0, "disk_gb": 1.0, "region": "r", "price_usd_per_hour": 1.0}
    rental.save(offer=offer, deadline=clock.timestamp() + 7200)
    left = fleet.caps_left(run, Caps(budget_usd=6.0), 1)
    assert left
    assert left.budget_usd == pytest.approx(6.0 - 1.0 - 2.0, abs=0.05)
    rental.save(deadline=None)
    assert fleet.caps_left(run, Caps(budget_usd=6.0), 1) is None, "it may spend all of it"


def test_a_machine_that_came_late_ends_with_the_others() -> None:
    """The hours of a run begin with its first machine; a deadline is made earlier by that, never later."""
    run = sharers.rented(2, Caps(max_hours=4.0), 4)
    run.record.rents["since"] = clock.timestamp() - 7200
    machine(run.record.machine, "ready", since_h=1.0)
    late = machine(f"{run.record.machine}-2", "ready")
    for asked_h, becomes_h in ((10.0, 3.0), (1.0, 1.0)):
        late.save(deadline=clock.timestamp() + asked_h * 3600)
        fleet.shorten(run, late.name)
        late.reload()
        assert late.record.deadline == pytest.approx(clock.timestamp() + becomes_h * 3600, abs=60)


def test_all_that_may_cost_is_named_to_who_leaves() -> None:
    """Every machine of the run, and every rented one that it was given, with their price together and the last end."""
    run = sharers.shared(["a", "b", "local"], 4)
    assert fleet.left(run) == ""
    offer = {"provider": "lambda", "offer_id": "o", "type_name": "t", "gpu": "A10", "count": 1, "vram_gb": 24.0}
    offer |= {"vcpus": 1, "ram_gb": 1.0, "disk_gb": 1.0, "region": "r", "price_usd_per_hour": 0.75}
    for name in "abc":
        machine(name, "ready").save(offer=offer, deadline=clock.parse("2027-01-01T00:00:00Z").timestamp())
    said = fleet.left(run)
    assert "a, b GO ON COSTING 1.50 USD/h; the last deadline is 2027-01-01T00:00:00Z" in said
    assert f"gpu resume {run.run_id}" in said
    assert "gpu terminate" in said
    rental = rentals.find("b")
    assert rental
    rental.save(deadline=None)
    assert "one has no end" in fleet.left(run)
    rental.save(state="gone")
    assert fleet.left(run).startswith("a GO")


@pytest.mark.usefixtures("light_cloud")
def test_all_machines_of_a_run_that_is_over_are_given_back() -> None:
    """When that was asked for: after a run that is done, failed or stopped, never while it is under way."""
    run = sharers.rented(2, Caps(max_hours=4.0), 4)
    names = [fleet.begin(run, 2), fleet.begin(run, 1)]
    run.save(state="running", terminate=True)
    fleet.after(run, lambda _: None)
    assert [rental.name for rental in fleet.live(run)] == names
    ended(run).save(terminate=False)
    fleet.after(run, lambda _: None)
    assert [rental.name for rental in fleet.live(run)] == names
    fleet.after(ended(run), lambda _: None)
    assert fleet.live(run) == []


@pytest.mark.usefixtures("light_cloud")
def test_a_machine_that_another_run_is_on_is_kept() -> None:
    """What is not home of another run is on it: it is said, and left to that one."""
    run = ended(sharers.rented(2, Caps(max_hours=4.0), 4))
    name = fleet.begin(run, 1)
    assert name
    other = sharers.shared([name], 4)
    other.save(state="running")
    said: list[str] = []
    fleet.after(run, said.append)
    assert [rental.name for rental in fleet.live(run)] == [name]
    assert said == [f"{name} is kept: {other.run_id} is there too."]


def test_what_cannot_be_given_back_is_told_and_the_others_go(light_cloud: Cloud) -> None:
    """One that its provider does not end may go on costing, which is the error; the next one is given back all the
    same."""
    run = ended(sharers.rented(2, Caps(max_hours=4.0), 4))
    first, second = fleet.begin(run, 2), fleet.begin(run, 1)
    assert first
    assert second
    stuck = rentals.find(first)
    assert stuck
    stuck.save(state="ready", marker="m", instance_id="i", account="another key's")
    with pytest.raises(MayCost, match=first):
        fleet.after(run, lambda _: None)
    assert [rental.name for rental in fleet.live(run)] == [first]
    assert light_cloud.core.still_billing() == []


@pytest.mark.usefixtures("light_cloud")
def test_in_turn_nothing_is_ended_of_a_run_that_goes_on() -> None:
    """Cron leaves the machines alone while a process follows the run, and those that were begun since it ended."""
    run = sharers.rented(2, Caps(max_hours=4.0), 4)
    name = fleet.begin(run, 1)
    ended(run)
    with Gathering.open(run) or pytest.fail("somebody follows it"):
        fleet.end_in_turn(run, lambda _: None)
        assert [rental.name for rental in fleet.live(run)] == [name]
    run.save(finished_at="2026-01-01T00:00:00.000Z")
    fleet.end_in_turn(run, lambda _: None)
    assert [rental.name for rental in fleet.live(run)] == [name], "it was begun since"
    fleet.end_in_turn(ended(runs.find(run.run_id)), lambda _: None)
    assert fleet.live(run) == []

"""What only a market does to a launch leaks nothing: each of its faults, and deaths between create and ready."""

from __future__ import annotations

import pytest

from orchestrator import rentals
from tests.cloud import Fault
from tests.cloud.fault_kinds import LAMBDA, VAST
from tests.cloud.vast_instance import VastInstance
from tests.faults import money_storm
from tests.faults.light_machines import A_LITTLE_DEARER
from tests.faults.money_commands import SPOT_VARIABLE
from tests.faults.money_storm import WAYS_OUT, Laptop
from tests.faults.money_world import Stage, World

ALONE = [name for name in VAST if name not in LAMBDA and name not in ("no-copy", "filter-ignored")]
_EVERY = 9
_USE_S = 600.0


def begun(stage: Stage, *faults: str) -> tuple[World, Laptop]:
    world = money_storm.with_foreign(stage.begin(1, clouds=("vast",)))
    for name in faults:
        world.core.faults.add(Fault(name, seconds=30.0))
    return world, Laptop(world)


@pytest.mark.parametrize("fault", ALONE)
def test_a_launch_lives_through_what_only_a_market_does(stage: Stage, fault: str) -> None:
    """Ready and what was paid for, or an error that is true; given back, nothing costs money."""
    _, laptop = begun(stage, fault)
    laptop.run("launch")
    money_storm.end(laptop, "repeat")


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_dying_anywhere_at_a_market_leaks_nothing(stage: Stage, way_out: str) -> None:
    """Killed at some effects of a launch, spread over all of it, each way out leaves nothing that costs money."""
    _, laptop = begun(stage)
    count = laptop.run("launch").effects
    for dies_at in range(1 + list(WAYS_OUT).index(way_out), count + 1, _EVERY):
        _, laptop = begun(stage)
        assert laptop.run("launch", dies_at).was_killed
        money_storm.end(laptop, way_out)


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_an_outbid_machine_does_not_wake_and_bill(stage: Stage, way_out: str) -> None:
    """Outbid after it was ready, each way out ends it before it can wake by itself: its disk costs until then."""
    world, laptop = begun(stage, "outbid")
    world.environment[SPOT_VARIABLE] = "1"
    assert laptop.run("launch").is_well
    (machine,) = world.ours()
    world.clock.advance(_USE_S)
    laptop.run("status")
    assert isinstance(machine, VastInstance)
    assert (machine.lost_by, machine.bill(world.clock()).ended) == ("outbid", None)
    money_storm.end(laptop, way_out)
    assert machine.bill(world.clock()).ended is not None


def test_what_a_host_takes_more_than_it_offered_is_in_the_ledger(stage: Stage) -> None:
    """A little dearer than offered a machine is kept: an hour and a half of it costs, by the ledger, what is billed."""
    world = money_storm.with_foreign(stage.begin(1, clouds=("vast",)))
    world.core.faults.add(Fault("wrong-price", detail=A_LITTLE_DEARER))
    laptop = Laptop(world)
    assert laptop.run("launch").is_well
    (machine,) = world.ours()
    with laptop.at():
        rental = rentals.choose(None)
    assert isinstance(machine, VastInstance)
    assert rental.price_usd_per_hour == pytest.approx(machine.usd_per_hour + machine.disk_usd_per_hour)
    assert rental.price_usd_per_hour > 1.02 * rental.offer().price_usd_per_hour
    world.clock.advance(5400.0)
    assert machine.instance_id in laptop.knows
    money_storm.end(laptop, "repeat")

"""No machine is leaked and none doubled: whatever fails at the provider, and wherever a command is killed."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import rentals
from tests.cloud import Fault
from tests.faults import money_storm
from tests.faults.money_commands import HOURS, JOURNEY, NAME
from tests.faults.money_faults import AT_END, AT_LAUNCH
from tests.faults.money_storm import SEED_VARIABLE, WAYS_OUT, Laptop
from tests.faults.money_world import Stage, World

ALL = {**AT_LAUNCH, **AT_END}
_USE_S = 600.0
_CHUNK = 500
_LONG = 110
"""Effects of a journey."""
_WELL_MIN, _WELL_SHARE = 3, 0.8
"""How many launches without trouble 200 storms have at least, and which share of them ends with a machine ready."""
CLOUDS = (("lambda",), ("vast",), ("lambda", "vast"))
"""Which clouds there are in a storm, by its seed."""
OUTCOMES = {
    "limited without an end": ("RateLimited", 0),
    "two made of one request": ("done", 2),
    "two made of one request, answer lost": ("done", 2),
    "two made of one request, the end of one ignored": ("done", 2),
    "launch not sent": ("ProviderDown", 0),
    "launch not sent, silence": ("ProviderDown", 0),
    "no capacity anywhere": ("NoCapacity", 0),
    "quota": ("Refused", 0),
    "account inactive": ("Refused", 0),
    "key refused at launch": ("AuthRejected", 0),
    "key refused while it boots": ("MayCost", 1),
    "all unhealthy": ("NoCapacity", 3),
    "no catalogue": ("ProviderDown", 0),
    **{name: ("LaunchUnknown", 0) for name in AT_LAUNCH if name.startswith("launch not made")},
    **dict.fromkeys(("unhealthy", "unhealthy for a while", "never boots", "vanishes", "preempted"), ("done", 2)),
    **dict.fromkeys(("no address", "odd status", "sshd never", "other host key", "no nvidia-smi"), ("done", 2)),
    **dict.fromkeys(("nvidia-smi hangs", "wrong GPU", "no GPU of one", "half the memory", "CUDA fails"), ("done", 2)),
    "bad machine whose end is ignored": ("done", 2),
}
"""How a launch ends, and how many instances it makes, where that is not a machine that is ready, and one."""
NOT_ENDED = ("key refused", "key refused after the end was asked for", "end too slow", "pages of 404, end ignored")
"""Where one `gpu terminate` cannot succeed, and says so."""


def begun(stage: Stage, fault: str, seed: int = 1) -> tuple[World, Laptop]:
    world = money_storm.with_foreign(stage.begin(seed))
    for one in AT_LAUNCH.get(fault, list)():
        world.core.faults.add(one)
    return world, Laptop(world)


def travel(laptop: Laptop, fault: str, dies_at: int | None = None) -> None:
    """Launch, look, give back; a command may be killed at an effect, counted over all of them."""
    left = dies_at
    for command in JOURNEY:
        if command == "terminate":
            for one in AT_END.get(fault, list)():
                laptop.world.core.faults.add(one)
        ended = laptop.run(command, left)
        if ended.was_killed:
            return
        left = None if left is None else left - ended.effects
        laptop.world.clock.advance(_USE_S)


def effects(stage: Stage, fault: str) -> int:
    """How many effects a journey with that fault has."""
    _, laptop = begun(stage, fault)
    travel(laptop, fault)
    return sum(ended.effects for ended in laptop.history)


def die(stage: Stage, fault: str, dies_at: int, way_out: str) -> None:
    _, laptop = begun(stage, fault)
    travel(laptop, fault, dies_at)
    assert laptop.history[-1].was_killed
    try:
        money_storm.end(laptop, way_out)
    except BaseException:
        print(f"{fault!r}, killed at effect {dies_at}, {way_out}", file=sys.stderr)  # noqa: T201
        raise


@pytest.mark.parametrize("fault", AT_LAUNCH)
def test_a_launch_lives_through_each_fault(stage: Stage, fault: str) -> None:
    """One command ends as the fault allows: ready, on the next machine, or an error that is true; nothing is left."""
    world, laptop = begun(stage, fault)
    ended = laptop.run("launch")
    assert (ended.how, len(world.core.ours())) == OUTCOMES.get(fault, ("done", 1)), ended.error
    money_storm.end(laptop, "repeat")


@pytest.mark.parametrize("fault", AT_END)
def test_an_end_is_asked_for_until_it_comes(stage: Stage, fault: str) -> None:
    """One `gpu terminate` ends a machine whatever is answered to it, or says that it may still cost money."""
    world, laptop = begun(stage, fault)
    travel(laptop, fault)
    assert laptop.history[-1].how == ("NotReturned" if fault in NOT_ENDED else "done")
    assert fault in NOT_ENDED or not world.core.still_billing()
    money_storm.end(laptop, "repeat")


@pytest.mark.parametrize("way_out", WAYS_OUT)
@pytest.mark.first(2)
def test_dying_somewhere_leaks_nothing(stage: Stage, way_out: str) -> None:
    """Killed at some effect of a journey with each fault, each way out leaves nothing that costs money.

    Two ways out of five for each fault: all of them at all effects are left to the slow tests.
    """
    chance, number = random.Random(way_out), list(WAYS_OUT).index(way_out)
    for fault in [name for at, name in enumerate(ALL) if (at - number) % len(WAYS_OUT) < 2]:
        die(stage, fault, chance.randint(1, effects(stage, fault)), way_out)


@pytest.mark.parametrize("way_out", WAYS_OUT)
@pytest.mark.first(3)
def test_dying_anywhere_leaks_nothing(stage: Stage, way_out: str) -> None:
    """Killed at every third effect of a journey without faults, each way out leaves nothing that costs money."""
    for dies_at in range(1 + list(WAYS_OUT).index(way_out) % 3, effects(stage, "nothing") + 1, 3):
        die(stage, "nothing", dies_at, way_out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", ALL)
def test_dying_anywhere_with_each_fault_leaks_nothing(stage: Stage, fault: str) -> None:
    """Killed at every effect of a journey with this fault, each way out leaves nothing that costs money.

    In a long one, where most effects are looks at a machine that does not come up, each effect has one way out.
    """
    count, ways = effects(stage, fault), list(WAYS_OUT)
    for dies_at in range(1, count + 1):
        for way_out in ways if count <= _LONG else [ways[dies_at % len(ways)]]:
            die(stage, fault, dies_at, way_out)


def rage(stage: Stage, first: int, count: int) -> dict[tuple[str, ...], list[str]]:
    """How the launches ended that nothing went wrong with, for each set of clouds."""
    given, calm = os.environ.get(SEED_VARIABLE), {clouds: list[str]() for clouds in CLOUDS}
    for seed in [int(given)] if given else range(first, first + count):
        clouds = CLOUDS[seed % len(CLOUDS)]
        try:
            laptop = money_storm.rage(stage.begin(seed, clouds=clouds), seed)
            calm[clouds] += laptop.launched() if laptop.is_calm else []
        except BaseException:
            print(f"{SEED_VARIABLE}={seed}", file=sys.stderr)  # noqa: T201
            raise
    return calm


def test_two_hundred_storms_leak_nothing(stage: Stage) -> None:
    """200 seeded storms of commands, faults and deaths leave nothing that costs money, and nothing doubled.

    They are storms around machines that come up: of launches that nothing goes wrong with, most end with one ready.
    """
    for clouds, ended in rage(stage, 0, 200).items():
        if SEED_VARIABLE not in os.environ:
            assert ended.count("done") >= max(_WELL_MIN, _WELL_SHARE * len(ended)), (clouds, ended)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(10_000, 20_000, _CHUNK))
def test_ten_thousand_storms_leak_nothing(stage: Stage, first: int) -> None:
    """10,000 more of them."""
    rage(stage, first, _CHUNK)


def test_a_storm_is_made_again_by_its_seed(stage: Stage) -> None:
    """The same seed gives the same commands, the same deaths and the same bills."""
    found = []
    for _ in range(2):
        world = stage.begin(77)
        laptop = money_storm.rage(world, 77)
        found.append((list(map(str, laptop.history)), [(bill.began, bill.ended) for bill in world.core.bills()]))
    assert found[0] == found[1]


def test_an_audit_that_dies_again_and_again_rents_nothing_and_ends_all(stage: Stage) -> None:
    """Killed twice anywhere while it ends what another laptop rented; what is typed next goes on with the end."""
    for dies_at in range(1, 30):
        world, first = begun(stage, "nothing", dies_at)
        first.run("launch")
        other = Laptop(world, "other")
        for _ in range(2):
            other.run("audit", dies_at)
        other.run("again" if other.remembers() else "audit")
        assert len(world.core.ours()) == 1
        money_storm.by_audit(other)
        money_storm.end(first, "repeat")


def test_a_second_instance_of_an_answered_request_is_found_by_an_audit(stage: Stage) -> None:
    """A provider that makes two and names one: `gpu audit --fix` ends the other and leaves the machine alone."""
    world, laptop = begun(stage, "nothing")
    world.core.faults.add(Fault("doubled"))
    laptop.run("launch")
    assert len(world.core.still_billing()) == 2
    assert laptop.run("audit").is_well
    with laptop.at():
        rental = rentals.find(NAME)
        assert rental is not None
        assert rental.record.state == "ready"
    assert [one.instance_id for one in world.core.still_billing()] == [rental.record.instance_id]
    money_storm.end(laptop, "audit")


def killed_when(stage: Stage, state: str, sent: int, *faults: Fault) -> tuple[World, Laptop]:
    """A laptop whose launch was killed at the first effect that left a record in that state, so much being sent."""
    for dies_at in range(1, 200):
        world, laptop = begun(stage, "nothing")
        for fault in faults:
            world.core.faults.add(replace(fault))
        laptop.run("launch", dies_at)
        with laptop.at():
            rental = rentals.find(NAME)
        if rental is not None and (rental.record.state, len(world.sent)) == (state, sent):
            return world, laptop
    raise AssertionError(f"no launch dies in {state} after {sent} requests")


def test_a_request_killed_before_it_was_sent_is_made_anew_in_the_end(stage: Stage) -> None:
    """What was never sent is looked for, said to be unknown, and ten minutes later taken for nothing: once, ready."""
    world, laptop = killed_when(stage, "launching", 0)
    assert laptop.run("wait").how == "LaunchUnknown"
    world.clock.advance(_USE_S)
    assert laptop.run("wait").is_well
    assert len(world.core.ours()) == len(world.sent) == 1
    money_storm.end(laptop, "repeat")


def test_one_list_without_it_proves_nothing(stage: Stage) -> None:
    """Long after a launch was killed, a list in which nothing bears a name is looked at again: it is taken over."""
    world, laptop = killed_when(stage, "launching", 1)
    world.clock.advance(2 * _USE_S)
    world.core.faults.add(Fault("bare-instances", "GET /instances$"))
    assert laptop.run("wait").is_well
    assert len(world.core.ours()) == len(world.sent) == 1
    money_storm.end(laptop, "repeat")


def test_cron_carries_on_an_end_that_died(stage: Stage) -> None:
    """`gpu advance --all` gives back what a killed `gpu terminate` had begun to, long before any deadline."""
    _, laptop = begun(stage, "nothing")
    laptop.run("launch")
    assert laptop.run("terminate", 3).was_killed
    with laptop.at():
        assert rentals.choose(NAME).record.state == "stopping"
    assert laptop.run("cron").is_well
    assert not laptop.world.core.still_billing()
    money_storm.end(laptop, "repeat")


@pytest.mark.parametrize("command", ["launch", "wait", "cron", "reap"])
def test_whatever_is_typed_after_the_deadline_ends_the_machine(stage: Stage, command: str) -> None:
    """Each command that rents or guards enforces the caps first."""
    _, laptop = begun(stage, "nothing")
    laptop.run("launch")
    first = laptop.world.core.ours()[0]
    laptop.world.clock.advance(HOURS * 3600)
    laptop.run(command)
    assert first not in laptop.world.core.still_billing()
    money_storm.end(laptop, "repeat")


def test_what_a_limit_made_and_hid_for_long_is_found_by_an_audit(stage: Stage) -> None:
    """A record that is planned again after a limit does not hide the instance that was made in spite of it."""
    hidden = Fault("lost-502", detail=429), Fault("invisible", seconds=100.0)
    world, laptop = killed_when(stage, "planned", 1, *hidden)
    world.clock.advance(_USE_S)
    assert len(world.core.still_billing()) == 1
    assert laptop.run("audit").is_well
    assert not world.core.still_billing()
    money_storm.end(laptop, "audit")


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_a_machine_not_listed_yet_is_not_taken_for_gone(stage: Stage, way_out: str) -> None:
    """Rented, looked at, and given back before the provider shows it at all, even to its end: it ends all the same."""
    world, laptop = begun(stage, "listed very late, no word of it before")
    assert laptop.run("rent").is_well
    laptop.run("status")
    laptop.run("terminate")
    assert not world.core.still_billing()
    money_storm.end(laptop, way_out)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # who is killed closes no socket
def test_over_sockets_the_storm_is_the_same(tmp_path: Path) -> None:
    """Storms over real connections to a real server end as those without: nothing leaked, nothing doubled."""
    with Stage(tmp_path / "wired", over_sockets=True).set() as wired:
        for seed in range(300, 312):
            money_storm.rage(wired.begin(seed), seed)

"""Launches, uses and gives back machines of a stand-in cloud while both misbehave and processes die; then looks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from orchestrator import idleness, inventory, ledger, machines, rentals
from orchestrator.errors import AuthRejected, GpuError, MayCost, ProviderError
from orchestrator.rentals import ENDED
from tests.cloud import Fault, Timings
from tests.cloud.core import Core
from tests.cloud.vast_cloud import VastCloud
from tests.faults.light_machines import is_as_paid
from tests.faults.money_clouds import is_dearer, is_on_its_way_out, is_second
from tests.faults.money_commands import COMMANDS, HOURS, NAME, SPOT_VARIABLE
from tests.faults.money_world import Killed, Process, World, name_of

SEED_VARIABLE = "GPU_STORM_SEED"
"""Set it to the seed that a failed storm names, and the same storm is made again."""
_SETTLED_S = 200.0
"""After so long everything that was made is listed."""
_FORGOTTEN_S = 700.0
_AGAIN_S = 400.0
_AGAIN_MAX = 8
_FLOAT_USD = 1e-9
"""What is lost by adding up numbers with a point."""
_BY_RECORD = ("repeat", "cron")
"""Ways out that look at what is remembered here alone."""
_RICH_USD = 250.0
_LOST = ("vanishes", "preempted", "goes-unhealthy")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    command: str
    effects: int
    error: GpuError | None = None
    was_killed: bool = False

    @property
    def is_well(self) -> bool:
        """Whether it did what it was to do."""
        return self.error is None and not self.was_killed

    @property
    def how(self) -> str:
        """In a word: `done`, `killed`, or the kind of its error."""
        return "killed" if self.was_killed else type(self.error).__name__ if self.error else "done"

    def __str__(self) -> str:
        return f"{self.command}({self.how} after {self.effects})"


class Laptop:
    """A computer of the user's, with the account's key and a state folder."""

    def __init__(self, world: World, name: str = "laptop") -> None:
        self.world = world
        self.home = world.folder / name
        self.history: list[Ended] = []
        self.is_calm = False
        """Whether nothing goes wrong where it rents: launches that are not killed end well."""
        self.knows: set[str] = set()
        """Ids of instances whose price was told here to a command that was not killed."""

    @contextmanager
    def at(self) -> Iterator[None]:
        """Be at this computer."""
        with mock.patch.dict(os.environ, {"GPU_HOME": str(self.home)} | self.world.environment):
            yield

    def remembers(self) -> bool:
        """Whether it remembers a machine that has not ended."""
        with self.at():
            return any(rental.record.state not in ENDED for rental in rentals.known())

    def run(self, command: str, dies_at: int | None = None) -> Ended:
        """Type a command, which may be killed at one of its effects."""
        world, error, was_killed = self.world, None, False
        world.process, world.heard = Process(dies_at), set()
        before = {one.instance_id for one in world.still_billing()}
        with self.at():
            rental = rentals.find(NAME)
            was_ready = rental is not None and rental.record.state == "ready"
            try:
                COMMANDS[command]()
            except GpuError as caught:
                error = caught
            except Killed:
                was_killed = True
            ended = Ended(command, len(world.process.effects), error, was_killed)
            self.history.append(ended)
            self.knows |= set() if was_killed else world.heard
            world.process = Process()
            if not was_ready:  # else nothing was to be done, and nothing was asked
                self._judge(ended, before)
        return ended

    def launched(self) -> list[str]:
        """How commands ended that were to have a machine ready, were not killed, and found its name free."""
        found = [ended for ended in self.history if ended.command in ("launch", "wait", "again")]
        return [ended.how for ended in found if ended.how not in ("killed", "UsageError")]

    def _judge(self, ended: Ended, before: set[str]) -> None:
        """What a command says of money must be so."""
        if ended.command not in ("launch", "wait", "again"):
            return
        world = self.world
        if ended.is_well:
            self._judge_ready()
        elif isinstance(ended.error, (ProviderError, AuthRejected)) and not (ended.command == "launch" and before):
            left = [one for one in world.still_billing() if name_of(one) == NAME and not is_on_its_way_out(one)]
            world.judge(not left, f"{ended.command} said that nothing is rented ({ended.error}), but it is")

    def _judge_ready(self) -> None:
        """After a launch that returned there is a machine that is ready, listed, and what was paid for."""
        world, rental = self.world, rentals.find(NAME)
        record = rental.record if rental else None
        if record is None or record.state != "ready":
            world.judge(False, f"a launch returned without a machine that is ready: {record and record.state}")
            return
        instance = world.instance(record.instance_id)
        if instance is None:
            world.judge(False, f"a launch returned with an instance that never was: {record.instance_id}")
            return
        lives = instance.bill(world.clock()).ended is None or any(name in instance.faults for name in _LOST)
        world.judge(lives, "a launch returned with a machine that has ended")
        world.judge(is_as_paid(instance), f"a launch returned with a machine that has {list(instance.faults)}")
        world.judge(record.deadline is not None, "a launch returned with a machine without its deadline")
        listed = [entry["name"] for entry in inventory.documents(None) if entry["state"] == "ready"]
        is_listed = NAME in listed and NAME in [machine.name for machine in machines.known()]
        world.judge(is_listed, "a launch returned with a machine that is not listed")

    def until_well(self, command: str, every_s: float = _AGAIN_S) -> Ended:
        """Type a command again, some minutes apart, while it says that something may cost money."""
        for _ in range(_AGAIN_MAX):
            ended = self.run(command)
            if not isinstance(ended.error, MayCost):
                break
            self.world.clock.advance(every_s)
        return ended


# --- ways out --------------------------------------------------------------------------------------------------------


def by_repeating(laptop: Laptop) -> None:
    """The command that died is typed again until it is well, and in the end the machine is given back."""
    last = laptop.history[-1].command if laptop.history else "launch"
    laptop.until_well("again" if last in ("launch", "wait") else last)
    laptop.until_well("terminate")


def by_audit(laptop: Laptop) -> None:
    """`gpu audit --fix -y` ends all that nobody means to have; what goes on is remembered, and shown."""
    laptop.until_well("audit")
    with laptop.at():
        remembered = {rental.record.instance_id: rental.record.state for rental in rentals.known()}
    for one in laptop.world.unended():
        state = remembered.get(one.instance_id)
        laptop.world.judge(state in ("booting", "ready"), f"after gpu audit --fix an instance costs money: {state}")
    laptop.until_well("terminate")


def by_audit_elsewhere(laptop: Laptop) -> None:
    """The same on another computer, that has nothing but the key: it ends all that bears a marker of ours."""
    laptop.world.clock.advance(_SETTLED_S)
    Laptop(laptop.world, "other").until_well("audit")


def by_reaper(laptop: Laptop) -> None:
    """After the deadline, the reaper on the same computer."""
    laptop.world.clock.advance(HOURS * 3600 + _SETTLED_S)
    laptop.until_well("reap")


def by_reaper_elsewhere(laptop: Laptop) -> None:
    """After the deadline, the reaper in scheduled CI, which has nothing but the key, anew each time."""
    world = laptop.world
    world.clock.advance(HOURS * 3600 + _SETTLED_S)
    for number in range(_AGAIN_MAX):
        if not isinstance(Laptop(world, f"ci-{number}").run("reap").error, MayCost):
            break
        world.clock.advance(_AGAIN_S)


def by_cron(laptop: Laptop) -> None:
    """After the deadline, `gpu advance --all` on the same computer."""
    laptop.world.clock.advance(HOURS * 3600 + _SETTLED_S)
    laptop.until_well("cron")


WAYS_OUT: dict[str, Callable[[Laptop], None]] = {
    "repeat": by_repeating,
    "audit": by_audit,
    "audit elsewhere": by_audit_elsewhere,
    "reaper": by_reaper,
    "reaper elsewhere": by_reaper_elsewhere,
    "cron": by_cron,
}


def end(laptop: Laptop, way_out: str) -> None:
    """The storm is over: nothing more goes wrong, the user does one thing, and every promise is looked at."""
    world = laptop.world
    for core in world.cores:
        core.faults.clear()
    world.ssh_trouble = 0.0
    WAYS_OUT[way_out](laptop)
    left = world.unended()
    if way_out in _BY_RECORD and left and all(map(is_second, left)):
        Laptop(world, "auditor").until_well("audit")
        left = world.unended()
    world.judge(not left, f"LEAKED after {way_out}: {[(one.name, sorted(one.faults)) for one in left]}")
    _settle(laptop)
    for marker, count in Counter(one.asked_name for one in world.ours()).items():
        lone = all("doubled" not in one.faults for one in world.ours() if one.asked_name == marker)
        world.judge(count == 1 or not lone, f"{count} instances bear the marker {marker}")
    world.judge(not any(core.touched_foreign for core in world.cores), "a foreign instance was touched")
    foreign = [one for core in world.cores for one in core.instances.values() if one.is_foreign]
    world.judge(all(one.ending_at is None for one in foreign), "a foreign instance was ended")
    for folder in sorted(world.folder.iterdir()):
        _judge_ledger(world, folder, laptop.knows)
    assert not world.violations, f"{'; '.join(world.violations)} -- after {', '.join(map(str, laptop.history))}"


def _settle(laptop: Laptop) -> None:
    """Later the first computer finds out what it has missed, and says that nothing of it costs money."""
    laptop.world.clock.advance(_FORGOTTEN_S)
    for command in ("audit", "terminate"):
        ended = laptop.run(command)
        laptop.world.judge(ended.is_well, f"in the end {command} says: {ended.error}")


def _judge_ledger(world: World, home: Path, known_prices: set[str]) -> None:
    """A closed lease covers what was billed; on the first computer every lease is closed in the end.

    What was dearer than offered is covered, too, once its provider has told the first computer its price.
    """
    with mock.patch.dict(os.environ, {"GPU_HOME": str(home)}):
        leases = {lease.instance_id: lease for lease in ledger.leases()}
        remembered = {rental.record.instance_id for rental in rentals.known()} - {None}
    world.judge(remembered <= set(leases), f"{home.name} remembers instances that its ledger does not know")
    for one in world.ours():
        bill = one.bill(world.clock())
        lease = leases.get(bill.instance_id)
        if lease is None or (lease.closed_at is None and home.name != "laptop"):
            continue
        words = f"the ledger of {home.name} for {bill.name}: {lease.opened_at} to {lease.closed_at}, billed {bill}"
        begins, closed_at = lease.opened_at <= bill.began, lease.closed_at
        covers = closed_at is not None and bill.ended is not None and closed_at >= bill.ended
        pays = lease.usd() >= float(bill.cents) / 100 - _FLOAT_USD
        pays |= home.name == "laptop" and is_dearer(one) and one.instance_id not in known_prices
        world.judge(begins and covers and pays, words)
    if home.name == "laptop":
        known = {one.instance_id for one in world.ours()}
        world.judge(all(lease.closed_at is not None for lease in leases.values()), "a lease is open in the end")
        world.judge(set(leases) <= known, "the ledger knows an instance that never was")


# --- storms ----------------------------------------------------------------------------------------------------------


def with_foreign(world: World) -> World:
    """The account is used by others, too, some of whose instances have names like ours."""
    for name in (None, "gpu", "gpu-20270115t080000-0123456789AB", "box", "gpu-20270115t080000-0123456789abc"):
        for core in world.cores:
            core.add_foreign(name)
    for core in (core for core in world.cores if not isinstance(core, VastCloud)):
        core.add_foreign("theirs", tags=[{"key": "gpu-name", "value": NAME}, {"key": "gpu-deadline", "value": "1"}])
    return world


_CALLS = ("", "", "launch", "terminate", "GET /instances$", "GET /instances/", "ssh-keys", "instance-types")
_CALLS_AT_VAST = ("", "", "^launch$", "^terminate$", "^list$", "^get$", "^offers$", "^account$", "^logs$", "^admit$")
_NOT_FOR_STORMS = ("clock-skew",)
_DETAILS: dict[str, tuple[object, ...]] = {
    "failed": (404, 404, 500, 502, 503),
    "lost-502": (500, 429, None),
    "error": (None, "global/object-does-not-exist", "global/unknown", "provider/internal-unavailable"),
    "rate-limited-json": (None, 3, 200),
    "rate-limited-text": (None, 20),
    "odd-status": ("rebalancing",),
    "not-sent": (None, "silent"),
    "goes-unhealthy": (None, 30.0),
    "doubled": ("both",),
    "invisible": (None, "wholly"),
}
_DETAILS_AT_VAST: dict[str, tuple[object, ...]] = {
    "error": (None, "no_such_instance", "invalid_args"),
    "bad-key": (None, 401, 403, "page"),
    "no-capacity": (None, 410, 400),
    "outbid": (None, 60.0, 3000.0),
    "odd-ports": (None, "list", "empty", "value-null"),
}
_SECONDS = {"invisible": 25.0, "hang": 400.0, "lost-hang": 400.0, "terminate-slow": 1500.0, "terminate-late": 1500.0}


def random_fault(world: World, core: Core) -> Fault:
    """Any fault of the stand-in's list, at any call that it may befall, some times."""
    chance, kinds = world.chance, core.faults.kinds
    is_vast = isinstance(core, VastCloud)
    what = chance.choice([name for name in kinds if name not in _NOT_FOR_STORMS])
    is_of_calls = kinds[what][0] == "call" and not kinds[what][1]
    when = chance.choice(_CALLS_AT_VAST if is_vast else _CALLS) if is_of_calls else ""
    lies = what == "error" or what == "bare-instances"
    times = 1 if lies else chance.choice((1, 1, 2, 5, 14))
    seconds = chance.uniform(0.0, _SECONDS.get(what, chance.choice((20.0, 300.0, 2500.0))))
    detail = chance.choice((_DETAILS_AT_VAST if is_vast else {}).get(what) or _DETAILS.get(what, (None,)))
    return Fault(what, when, times, chance.choice((0, 0, 1, 3)), seconds=seconds, detail=detail)


def random_timings(world: World) -> Timings:
    """How long things take, this time."""
    chance = world.chance
    return Timings(
        visibility_delay_s=chance.choice((0.0, 1.0, 20.0)),
        boot_s=chance.choice((0.0, 20.0, 60.0)),
        ip_delay_s=chance.choice((0.0, 15.0)),
        sshd_delay_s=chance.choice((0.0, 10.0)),
        term_s=chance.choice((0.0, 8.0, 60.0)),
        linger_s=chance.choice((0.0, 20.0, 120.0)),
    )


_TYPED = ("launch", "rent", "again", "again", "again", "terminate", "terminate", "audit", "reap", "status", "cron")


def market_of(world: World) -> None:
    """Whether what is launched is bid for, and what is left to spend, where there is a market."""
    found = [core for core in world.cores if isinstance(core, VastCloud)]
    for core in found:
        core.credit = world.chance.choice((_RICH_USD, _RICH_USD, _RICH_USD, 6.0))
        core.no_keys_status = world.chance.choice((200, 404))
        core.gone_status = world.chance.choice((200, 404))
    if found and world.chance.random() < 0.3:
        world.environment[SPOT_VARIABLE] = "1"


def is_poor(world: World) -> bool:
    """Whether an account has too little left for a machine."""
    return any(core.credit < _RICH_USD for core in world.cores if isinstance(core, VastCloud))


def befall(world: World) -> None:
    """What befalls a machine of a market while nobody types: others bid more, for a while or for ever."""
    for core in (core for core in world.cores if isinstance(core, VastCloud)):
        for one in [one for one in core.still_billing() if one.bid is not None]:
            if world.chance.random() < 0.3:
                core.outbid(one.instance_id, seconds=world.chance.choice((None, 30.0, 2000.0)))


def rage(world: World, seed: int) -> Laptop:
    """One seeded storm: commands typed in any order, faults at any call, deaths at any effect; then a way out."""
    chance, laptop = world.chance, Laptop(with_foreign(world))
    for core in world.cores:
        core.timings = random_timings(world)
    for _ in range(chance.choice((0, 1, 1, 2, 3, 4))):
        core = chance.choice(world.cores) if len(world.cores) > 1 else world.core
        core.faults.add(random_fault(world, core))
    market_of(world)
    world.ssh_trouble = chance.choice((0.0, 0.0, 0.2))
    laptop.is_calm = not (world.ssh_trouble or any(core.faults.all for core in world.cores) or is_poor(world))
    with mock.patch.object(idleness, "too_long", side_effect=lambda _: chance.choice(("", "", "it is idle"))):
        for number in range(chance.randint(1, 5)):
            dies_at = chance.choice((None, chance.randint(1, 20), chance.randint(1, 80), chance.randint(1, 160)))
            laptop.run(chance.choice(_TYPED[: 2 if number == 0 else None]), dies_at)
            world.clock.advance(chance.choice((0.0, 5.0, 60.0, 700.0, 4000.0)))
            befall(world)
    end(laptop, chance.choice(list(WAYS_OUT)))
    return laptop

"""A world for storms around money: a clock of its own, a stand-in cloud without sockets, processes that die."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import requests

from jobs import durable
from orchestrator import admission, agents, clock, enrolment, machines, market, onstart, ssh
from orchestrator.errors import GpuError, NotReachable
from orchestrator.providers import exchange, pace
from tests.cloud import Clock, Server, Timings
from tests.cloud.adapter import CloudAdapter
from tests.cloud.core import Core
from tests.faults import money_clouds
from tests.faults.light_machines import Room
from tests.faults.money_clouds import Rented

BEGAN = 1_800_000_000.25
_CALL_S = 0.15


class Killed(BaseException):
    """The process is killed here. Not an Exception: nothing of ours may catch it and go on."""


class Process:
    """Counts what a process does outside of itself, and dies at one of these effects."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.effects: list[str] = []
        self._dies_at = dies_at
        self._is_dead = False

    def effect(self, what: str) -> None:
        """Note an effect that is about to be, or has just been; raises Killed when this is the one, and ever after."""
        self.effects.append(what)
        if self._is_dead or len(self.effects) == self._dies_at:
            self._is_dead = True
            raise Killed(what)


class World:
    """One account at the stand-in, laptops that use it, and what must never happen, watched at every request."""

    def __init__(
        self, folder: Path, seed: int, timings: Timings | None = None, clouds: tuple[str, ...] = ("lambda",)
    ) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.clock = Clock(BEGAN)
        usual = timings or Timings(2.0, 20.0, 1.0, 5.0, 5.0, 5.0, 20.0)
        self.cores = [money_clouds.made(name, self.clock, seed, usual) for name in clouds]
        self.core = self.cores[0]
        """The cloud, where there is one."""
        self.process = Process()
        self.violations: list[str] = []
        self.ssh_trouble = 0.0
        """Which share of contacts over SSH fails."""
        self.sent: list[str] = []
        """Markers of paid requests, as often as they were sent."""
        self.end_asked: set[str] = set()
        self.heard: set[str] = set()
        """Ids of instances whose price was told since a command began."""
        self.environment = dict(pair for core in self.cores for pair in money_clouds.announced(core).items())
        """What leads to the cloud."""
        self._turns: dict[tuple[str, str], list[float]] = {}
        self.room = Room(self._at, self.clock, self._contact, self.clock.advance, set())

    def sleep(self, seconds: float) -> None:
        """Let a process wait."""
        self.process.effect(f"sleep {seconds:g}")
        self.clock.advance(max(seconds, 0.0))

    def turn_s(self, account: str, lanes: tuple[pace.Lane, ...]) -> float:
        """Seconds until there may be a turn, as `pace._ask` counts them in files; 0 when it is taken."""
        now = self.clock()
        stamps = {lane: self._turns.get((account, lane.name), []) for lane in lanes}
        full = [lane for lane in lanes if len(stamps[lane]) == lane.calls]
        wait_s = max((stamps[lane][0] + lane.every_s - now for lane in full), default=0.0)
        if wait_s <= 0:
            self._turns |= {(account, lane.name): [*stamps[lane], now][-lane.calls :] for lane in lanes}
        return wait_s

    def _at(self, host: str, port: int) -> Rented | None:
        return next((one for one in reversed(self.ours()) if money_clouds.answers_at(one, host, port)), None)

    def _contact(self, what: str) -> None:
        self.process.effect(what)
        self.clock.advance(_CALL_S)
        if self.ssh_trouble and self.chance.random() < self.ssh_trouble:
            raise NotReachable("The connection was lost.")

    # --- what is watched ---------------------------------------------------------------------------------------------

    def judge(self, is_well: bool, what: str) -> None:
        """Note a broken promise."""
        if not is_well:
            self.violations.append(what)

    def ours(self) -> list[Rented]:
        """All instances that were ever launched."""
        return [one for core in self.cores for one in core.ours()]

    def still_billing(self) -> list[Rented]:
        """Those of ours that cost money now."""
        return [one for core in self.cores for one in core.still_billing()]

    def unended(self) -> list[Rented]:
        """Instances of ours that cost money, and will for ever."""
        return [one for one in self.still_billing() if one.costs_until is None]

    def instance(self, instance_id: str | None) -> Rented | None:
        """The one with this id."""
        return next((one for one in self.ours() if one.instance_id == instance_id), None)

    def asked(self, core: Core, word: str, path: str, body: Any) -> None:
        """Look at a request before it reaches its cloud."""
        if word == "launch":
            self._look_at_order(body)
        if word == "terminate":
            ids = money_clouds.ending(core, path, body)
            foreign = {one.instance_id for one in core.instances.values() if one.is_foreign}
            self.judge(not ids & foreign, f"foreign instances were asked to end: {ids & foreign}")
            self.end_asked |= ids

    def _look_at_order(self, order: Any) -> None:
        marker, name = money_clouds.marker_of(order), money_clouds.name_told(order)
        self.judge(marker not in self.sent, f"the paid request {marker} was sent twice")
        self.sent.append(marker)
        known = (one for one in self.still_billing() if name_of(one) == name)
        others = [one for one in known if not (money_clouds.is_second(one) or money_clouds.is_on_its_way_out(one))]
        self.judge(not others, f"{name} was asked for while {len(others)} of it cost money")
        record = durable.load_news(machines.folder(name) / "rental.json")
        kept = (record.get("state"), record.get("marker"), record.get("instance_id"))
        self.judge(
            kept == ("launching", marker, None), f"a paid request was sent without its intent on the disk: {kept}"
        )
        deadline = record.get("deadline")
        told = "none" if deadline is None else str(int(deadline))
        said = money_clouds.deadline_told(order)
        self.judge(said == told, f"the deadline told is {said}, not {told}")
        hours = record.get("caps", {}).get("max_hours")
        if hours is not None:
            late = deadline is None or deadline > self.clock() + hours * 3600
            self.judge(not late, f"the deadline {deadline} is later than the cap of {hours} h")

    def answered(self, word: str) -> None:
        """Look at what a request has done."""
        if word != "launch":
            return
        live: dict[str, int] = {}
        for one in self.still_billing():
            if one.instance_id not in self.end_asked and "doubled" not in one.faults:
                live[name_of(one)] = live.get(name_of(one), 0) + 1
        self.judge(all(count == 1 for count in live.values()), f"doubled: {live}")


def name_of(instance: Rented) -> str:
    """What an instance is called here."""
    return money_clouds.name_told(instance.order)


class _Wire(CloudAdapter):
    """The way to the stand-in: a process may die before a request, and before it hears of the answer."""

    def __init__(self, world: World, core: Core, sockets: requests.adapters.HTTPAdapter | None) -> None:
        super().__init__(core, world.clock.advance)
        self._world = world
        self._sockets = sockets

    def send(self, request: requests.PreparedRequest, *words: Any, **how: Any) -> requests.Response:
        """See CloudAdapter; over a socket where there is a server."""
        world, method, whole = self._world, request.method or "", urlsplit(request.url or "").path
        path = self.core.stripped(whole[max(whole.find("/api/"), 0) :])
        body = json.loads(request.body) if request.body else {}
        call, word = f"{method} {path}", self.core.word_of(method, path, body)
        world.process.effect(f"before {call}")
        world.asked(self.core, word, path, body)
        world.clock.advance(_CALL_S)
        try:
            way = super() if self._sockets is None else self._sockets
            answer = way.send(request, *words, **how)
        finally:
            world.answered(word)
            world.process.effect(f"after {call}")
        if isinstance(self.core, money_clouds.GuardedVast) and self.core.priced is not None:
            world.heard.add(self.core.priced)
        return answer


class _OneAfterTheOther(Executor):
    """Clouds are asked in their order, so that a storm can be made again."""

    def __init__(self, *_: object, **__: object) -> None:
        """As a pool of threads is made."""

    def submit(self, work: Any, /, *words: Any, **how: Any) -> Future[Any]:
        """Do it now; what it raises is raised to who asks for its result."""
        done: Future[Any] = Future()
        try:
            done.set_result(work(*words, **how))
        except (GpuError, Killed) as error:  # a process that is killed is so in the thread that asks
            done.set_exception(error)
        return done


class Stage:
    """Puts worlds in the place of the real one, one after the other: patched once, since that takes time."""

    def __init__(self, folder: Path, *, over_sockets: bool = False) -> None:
        self._folder = folder
        self._sockets = requests.adapters.HTTPAdapter() if over_sockets else None
        self._server = contextlib.ExitStack()
        self._count = 0
        self._wires: dict[str, _Wire] = {}
        self.world = World(folder, 0)

    def begin(self, seed: int, timings: Timings | None = None, clouds: tuple[str, ...] = ("lambda",)) -> World:
        """A new world; what was left of the one before is removed."""
        shutil.rmtree(self.world.folder, ignore_errors=True)
        self._count += 1
        self.world = World(self._folder / str(self._count), seed, timings, clouds)
        self._wires = {}
        self._server.close()
        if self._sockets is not None:
            server = self._server.enter_context(Server(self.world.core))
            self.world.environment |= dict(money_clouds.announced(self.world.core)) | {"GPU_LAMBDA_URL": server.url}
        self._wires = {core.url: _Wire(self.world, core, self._sockets) for core in self.world.cores}
        random.seed(seed)  # waits are spread by it
        return self.world

    @contextlib.contextmanager
    def set(self) -> Iterator[Stage]:
        """Everything inside the block happens in this stage's world."""
        with contextlib.ExitStack() as stack:
            for target, name, stand_in in self._stand_ins():
                stack.enter_context(mock.patch.object(target, name, stand_in))
            stack.enter_context(self._server)
            yield self

    def _stand_ins(self) -> Iterator[tuple[Any, str, Any]]:
        yield clock, "sleep", lambda seconds: self.world.sleep(seconds)
        yield clock, "monotonic", lambda: self.world.clock()
        yield clock, "timestamp", lambda: self.world.clock()
        yield clock, "now", self._now
        yield exchange._Session, "get_adapter", lambda session, url: self._wire(url)
        yield importlib.metadata, "version", lambda name: "0"  # it is read from the disk anew for each request
        for module in (ssh, admission, enrolment):
            yield module, "SshMachine", lambda *words: self.world.room.machine(*words)
        yield ssh, "host_key", lambda host, port: self.world.room.host_key(host, port)
        yield pace, "_ask", lambda account, lanes: self.world.turn_s(account, lanes)
        yield agents, "keep", lambda store: "0" * 16
        yield onstart, "program", functools.lru_cache(onstart.program)
        yield market, "ThreadPoolExecutor", _OneAfterTheOther
        for name in ("replace_whole", "append", "make_folder"):
            yield durable, name, self._noted(name, getattr(durable, name))
        yield machines, "remove", self._noted("remove", machines.remove)
        for name in ("sync", "sync_folder"):  # power cuts have tests of their own
            yield durable, name, lambda what: None

    def _wire(self, url: str) -> _Wire:
        return next(wire for place, wire in self._wires.items() if url.startswith(place))

    def _now(self) -> str:
        return datetime.fromtimestamp(self.world.clock(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _noted(self, name: str, real: Any) -> Any:
        def effect(where: Any, *words: Any, **how: Any) -> Any:
            self.world.process.effect(f"{name} {getattr(where, 'name', where)}")
            return real(where, *words, **how)

        return effect

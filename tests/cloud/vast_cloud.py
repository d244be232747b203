"""A stand-in for the Vast.ai API without sockets: a market, contracts with their states, keys that take time, bills."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tests.cloud import vast_answers, vast_contracts, vast_market, vast_results, vast_routes, vast_shown, veils
from tests.cloud.answers import Answer, Failure, Json, as_page
from tests.cloud.core import Core, Request
from tests.cloud.faults import Fault
from tests.cloud.timings import Timings
from tests.cloud.vast_answers import Refused
from tests.cloud.vast_instance import Place, VastInstance
from tests.cloud.vast_keys import Keys
from tests.cloud.vast_market import Market
from tests.cloud.vast_results import Result

KEY = "stand-in-vast-key-0123456789abcdef"
CREDIT_USD = 250.0
_FIRST_NUMBER = 12_345_000
_CREDIT_DUST = 1e-9


class Machines(Protocol):
    """What stands behind the instances: containers that can be logged in to. The core works without any."""

    def places(self) -> tuple[Place, Place, Callable[[Place], Place]]:
        """Free addresses for a new instance: the direct one, its proxy's, and what gives another port to the first."""
        ...

    def follow(self, instance: VastInstance, now: float) -> None:
        """Have the container be as the instance is now: started, open, halted, gone."""
        ...

    def log_of(self, instance: VastInstance) -> str:
        """What the container has written."""
        ...

    def execute(self, instance: VastInstance, words: list[str]) -> str:
        """What a command wrote that was run on the container's disk."""
        ...

    def gate(self) -> Place:
        """Where disks can be copied from, running or not."""
        ...

    def copy(self, source: VastInstance, source_path: str, target: VastInstance, target_path: str) -> None:
        """Copy from one disk to another."""
        ...


class Words:
    """Addresses for instances that are nothing but words."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def places(self) -> tuple[Place, Place, Callable[[Place], Place]]:
        """As Machines has it."""
        host, number = f"203.0.113.{self._chance.randint(1, 254)}", self._chance.randint(1, 9)
        proxy = Place(f"ssh{number}.vast.ai", self._chance.randint(10000, 19999))
        return self._port(Place(host, 0)), proxy, self._port

    def _port(self, place: Place) -> Place:
        return Place(place.host, self._chance.randint(20000, 60000))


class VastCloud(Core):
    """One account at a stand-in provider. What is set on it (`timings`, knobs, ...) holds for what comes after."""

    place = "/vast"
    knobs = (
        "enforces_rates",
        "credit",
        "is_team",
        "bad_key_as",
        "gone_status",
        "gone_offer_status",
        "no_keys_status",
        "keys_in_object",
        "null_lists",
        "plain_key_lists",
        "keys_reach_all",
        "result_refusals",
    )
    acts = ("outbid", "take", "free", "log")

    def __init__(self, clock: Callable[[], float] = time.time, seed: int = 0, timings: Timings | None = None) -> None:
        """`clock` says seconds since 1970; the same seed and the same requests give the same ids."""
        super().__init__(clock, seed, timings)
        self.key = KEY
        self.machines: Machines | None = None
        self.words = Words(self.random)
        self.market = Market(lambda: self.clock())
        self.keys = Keys(self)
        self.instances: dict[str, VastInstance] = {}
        self.living: dict[str, VastInstance] = {}
        """Those that have not ended."""
        self.volumes: dict[int, Json] = {}
        self.results: dict[str, Result] = {}
        self.credit = CREDIT_USD
        """What was paid in, in USD; what instances cost goes off it."""
        self.is_team = False
        """Whether the key is a team's: it cannot add keys to the account."""
        self.bad_key_as: int | str = 404
        """How a wrong key is refused: 404, 401, or `page`."""
        self.gone_status = 200
        """How an instance that is not there is told of: 200 with null, or 404."""
        self.gone_offer_status = 404
        """How an offer that is gone is told of: 404, 410 or 400."""
        self.no_keys_status = 404
        """How no keys in the account are told of: 404, or 200 with an empty list."""
        self.keys_in_object = False
        """Whether the account's keys come in an object instead of a list."""
        self.null_lists = False
        """Whether a page without instances has null for them."""
        self.plain_key_lists = False
        """Whether an instance's keys come as a list instead of a text."""
        self.keys_reach_all = False
        """Whether a key added to the account reaches instances that are there already."""
        self.result_refusals = 1
        """So many fetches of a result are refused first."""
        self._last_number = _FIRST_NUMBER
        self._spent_before = 0.0
        self._ticking = threading.Lock()
        self._last_calls: dict[tuple[str, str], float] = {}
        self._settled_at = -math.inf

    # --- requests ----------------------------------------------------------------------------------------------------

    def stripped(self, path: str) -> str:
        """A path without the prefix of the API; that of the newer one is kept apart: `/v1/instances/`."""
        if path.startswith("/api/v0/"):
            return path.removeprefix("/api/v0")
        return path.removeprefix("/api") if path.startswith("/api/v1/") else path

    def word_of(self, method: str, path: str, content: Json) -> str:
        """What a call is, in the words that all clouds share."""
        return vast_routes.word_of(method, path, content)

    def answer(self, request: Request) -> Answer:
        """The answer when nothing goes wrong; raises Failure."""
        if request.word == "result":
            return vast_results.fetched(self, request)
        path = request.path
        if not path.endswith("/"):
            if request.method != "GET" and vast_routes.find(request.method, f"{path}/"):
                page = as_page(301, "Moved Permanently")
                return page._replace(headers=page.headers | {"Location": f"{self.url}/api/v0{path}/"})
            path = f"{path}/"
        found = vast_routes.find(request.method, path)
        if found is None:
            return as_page(404, "Not Found")
        route, numbers = found
        if (refused := self._refused(request, numbers)) or (refused := self._too_fast(request, route)):
            return refused
        return route.act(self, request, *numbers)

    def _refused(self, request: Request, numbers: tuple[str, ...]) -> Answer | None:
        """What a key is told that may not do this; without one, offers alone are shown."""
        how, _, key = request.headers.get("authorization", "").partition(" ")
        if request.word == "offers" and not key:
            return None
        if not key or how.lower() != "bearer":
            return Refused("auth_error", "Please log in or sign up", status=403).answer()
        allowed = vast_routes.is_allowed(self, key, request.word, tuple(str(int(number)) for number in numbers))
        if allowed is None:
            return vast_answers.bad_key(self.bad_key_as)
        return None if allowed else Refused("not_authorized").answer()

    def _too_fast(self, request: Request, route: vast_routes.Route) -> Answer | None:
        """What is told to who asks for one thing too often."""
        if not self.enforces_rates:
            return None
        who = (route.method + route.path, request.headers.get("authorization", ""))
        now = self.clock()
        if now - self._last_calls.get(who, -1e9) < route.threshold_s:
            return vast_answers.limited(route.threshold_s)
        self._last_calls[who] = now
        return None

    def refusal(self, fault: Fault) -> Answer:
        """What this cloud says instead of an answer."""
        return vast_answers.refusal(fault, self.clock())

    def spoiled(self, fault: Fault, answer: Answer | None) -> Answer:
        """As Core has it; an answer with null for its data depends on what was done."""
        if fault.what == "null-data" and answer is not None:
            return vast_answers.null_data(answer)
        return super().spoiled(fault, answer)

    def veiled(self, answer: Answer, faults: list[Fault]) -> Answer:
        """The answer as faults make it look."""
        changes = [_CHANGES[fault.what] for fault in faults if fault.what in _CHANGES]
        for fault in faults:
            if fault.what == "result-late":
                vast_results.postpone(self, answer, fault.detail)
        if any(fault.what == "nothing-terminated" for fault in faults) and answer.status == 200:
            answer = answer._replace(body=b'{"success": true}')
        if not changes or not answer.body.startswith((b"{", b"[")):
            return answer
        content = json.loads(answer.body)
        for change in changes:
            content = veils.everywhere(content, change)
        return answer._replace(body=json.dumps(content).encode())

    def ignored_filters(self, request: Request, query: Json) -> frozenset[str]:
        """The filters of a search that are not honoured."""
        found = [fault for fault in self.faults.every("answer", request) if fault.what == "filter-ignored"]
        return frozenset().union(*(vast_market.numeric(query) if it.detail is None else {it.detail} for it in found))

    # --- instances ---------------------------------------------------------------------------------------------------

    def known(self, number: str) -> VastInstance:
        """An instance that is there; Refused when the provider knows of none."""
        one, now = self.instances.get(str(int(number))), self.clock()
        if one is None or not one.exists(now) or (one.is_hidden_wholly and not one.is_visible(now)):
            raise Refused("no_such_instance")
        return one

    def new_number(self) -> int:
        """The next id."""
        self._last_number += self.random.randint(1, 40)
        return self._last_number

    def settle(self) -> None:
        """Let everything happen, in its order, that should have happened by now."""
        now = self.clock()
        while (coming := self._next()) is not None and coming[0] <= now:
            at, one, what = coming
            self._settled_at = max(self._settled_at, at)
            if one is None:
                for each in self.living.values():
                    each.lose(at, "credit")
            else:
                one.change(at, what)
        self._settled_at = max(self._settled_at, now)
        for one in [one for one in self.living.values() if not one.exists(now)]:
            self._spent_before += 0.0 if one.is_foreign else one.usd(now)
            del self.living[one.instance_id]

    def _next(self) -> tuple[float, VastInstance | None, str] | None:
        """What happens next, when, and to which; None for which: the credit is used up."""
        soon: list[tuple[float, VastInstance | None, str]] = []
        for one in self.living.values():
            if (change := one.next_change(self._settled_at)) is not None:
                soon.append((change[0], one, change[1]))
        rate = sum(one.usd_per_hour for one in self._ours_alive() if one.is_charged(self._settled_at))
        if rate:
            rate += sum(one.disk_usd_per_hour for one in self._ours_alive())
            left_s = max(0.0, self._credit_at(self._settled_at)) / rate * 3600.0
            soon.append((self._settled_at + left_s, None, "credit"))
        return min(soon, key=lambda it: it[0], default=None)

    def _ours_alive(self) -> Iterable[VastInstance]:
        return (one for one in self.living.values() if not one.is_foreign)

    def _credit_at(self, at: float) -> float:
        return self.credit - self._spent_before - sum(one.usd(at) for one in self._ours_alive())

    def credit_left(self) -> float:
        """What may still be spent, in USD."""
        left = self._credit_at(self.clock())
        return 0.0 if abs(left) < _CREDIT_DUST else left

    def log_of(self, instance: VastInstance) -> str:
        """What a container has written."""
        return self.machines.log_of(instance) if self.machines else instance.log

    # --- what tests ask ----------------------------------------------------------------------------------------------

    def add_foreign(self, name: str | None, **more: Any) -> VastInstance:
        """An instance that somebody else who uses the account has had for an hour."""
        with self.lock:
            slot = next(it for it in reversed(self.market.slots) if self.market.is_free(it) and it.row["rentable"])
            one = vast_contracts.make(self, {"image": "theirs", "disk": 20, "label": name, **more}, slot, {})
            one.is_foreign = True
            one.created_at -= 3600.0
            one.boot_from = self.clock() - 3600.0
            one.keys = []
            self.settle()
            return one

    def add_storage(self, name: str) -> None:
        """Have a volume of this name."""
        number = self.new_number()
        found = {"id": number, "label": name, "status": "active", "machine_id": 41_000, "disk_space": 40.0}
        self.volumes[number] = found | {"storage_total_cost": 0.0083, "start_date": self.clock(), "instances": []}

    def outbid(self, instance_id: str, price: float | None = None, seconds: float | None = None) -> None:
        """Somebody bids `price` (a little more) for what an instance has, for so long (for ever)."""
        with self.lock:
            self.settle()
            vast_contracts.outbid(self.instances[instance_id], self.clock(), price, seconds)
        self.tick()

    def act(self, word: str, how: Any) -> None:
        """`outbid`: {id, price?, seconds?}; `take`: {id, seconds}, its GPUs once it is stopped; `log`: {id, text}."""
        one = self.instances.get(str(how.get("id")))
        if one is None:
            raise Failure("global/invalid-parameters", f"{word}: no such instance")
        if word == "outbid":
            self.outbid(one.instance_id, how.get("price"), how.get("seconds"))
        elif word in ("take", "free"):
            one.taken_until = self.clock() + (how["seconds"] if word == "take" else 0.0)
        else:
            one.log = how["text"]

    # --- what goes on by itself --------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Have the machines do what is due: to be called often, where there are machines."""
        if self.machines is None:
            return
        with self._ticking:
            with self.lock:
                self.settle()
                now = self.clock()
                due = [one for one in self.instances.values() if not one.is_foreign]
            for one in due:
                self.machines.follow(one, now)


def _with_more(found: Json) -> Json:
    return found | {"surprise": {"level": [1, None]}, "z": True} if "id" in found else found


_CHANGES: dict[str, Callable[[Json], Json]] = {
    "unknown-fields": _with_more,
    "null-fields": vast_shown.with_nulls,
    "bare-instances": vast_shown.bare,
}

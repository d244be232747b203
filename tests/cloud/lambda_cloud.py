"""A stand-in for the Lambda Cloud API v1 without sockets: requests in, answers out, and a bill for every instance."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import random
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

from tests.cloud import catalogue, ordering, veils
from tests.cloud.account import Account
from tests.cloud.answers import Answer, Failure, Json, Unanswered, as_json, checked_text, need_list, parsed
from tests.cloud.faults import Fault, Faults
from tests.cloud.instance import Bill, Instance, Timings

PREFIX = "/api/v1"
KEY = "stand-in-key-0123456789abcdef"
GAP_S = 1.0
"""Between two requests of one account, where rates are enforced."""
LAUNCH_GAP_S = 12.0


class Machines(Protocol):
    """What stands behind the instances: computers that can be logged in to. The core works without any."""

    def address(self) -> str:
        """A free address for a new instance."""
        ...

    def boot(self, instance: Instance) -> None:
        """Do what a first boot does; nobody can log in yet."""
        ...

    def open(self, instance: Instance) -> None:
        """Let people log in."""
        ...

    def reboot(self, instance: Instance) -> None:
        """End all processes and begin again."""
        ...

    def end(self, instance: Instance) -> None:
        """End all processes, for good."""
        ...

    def power_off(self, instance: Instance) -> None:
        """End all processes, as it has asked for itself; it may be rebooted."""
        ...

    def look(self, instance: Instance, now: float) -> bool:
        """Do what is due by now; whether the machine still runs: it may have powered itself off."""
        ...


class Call(NamedTuple):
    """A request that came, and how it was answered."""

    at: float
    method: str
    path: str
    """Without the prefix."""
    status: int | None
    """None: the client got no answer."""


class LambdaCloud:
    """One account at a stand-in provider. What is set on it (`timings`, `quota`, ...) holds for what comes after."""

    def __init__(self, clock: Callable[[], float] = time.time, seed: int = 0, timings: Timings | None = None) -> None:
        """`clock` says seconds since 1970; the same seed and the same requests give the same ids."""
        self.clock = clock
        self.timings = timings or Timings()
        self.key = KEY
        self.catalogue = catalogue.built_in()
        self.machines: Machines | None = None
        self.faults = Faults()
        self.account = Account(self.new_id, clock)
        self.instances: dict[str, Instance] = {}
        """All that ever were."""
        self.calls: list[Call] = []
        self.touched_foreign: list[str] = []
        """Ids of other people's instances that somebody renamed, restarted or terminated."""
        self.enforces_rates = False
        self.quota: int | None = None
        """How many instances the account may have at once."""
        self.unknown_status = 400
        """The HTTP status of a launch that names what does not exist: 400 or 404."""
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._ticking = threading.Lock()
        self._machine_states: dict[str, str] = {}
        self._last_call = self._last_launch = -1e9

    # --- requests ----------------------------------------------------------------------------------------------------

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """The answer to a request; Unanswered when a fault keeps it from the client, done or not.

        When it comes, the machines have done what it says: what is terminating or restarting has no processes left.
        """
        try:
            return self._handled(method, path, headers, body)
        finally:
            if method != "GET":
                self.tick()

    def _handled(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        with self._lock:
            path = path.partition("?")[0].removeprefix(PREFIX)
            content: Json = {}
            with contextlib.suppress(Failure):
                content = parsed(body)
            call = f"{method} {path}"
            try:
                answer = self._with_faults(call, headers, body, content)
            except Unanswered:
                self.calls.append(Call(self.clock(), method, path, None))
                raise
            self.calls.append(Call(self.clock(), method, path, answer.status))
            return answer

    def _with_faults(self, call: str, headers: Mapping[str, str], body: bytes, content: Json) -> Answer:
        fault = self.faults.first("call", call, content)
        answer = None
        if fault is None or fault.is_done:
            try:
                answer = self._answer(call, headers, body)
            except Failure as failure:
                answer = failure.answer()
        if fault is not None:
            answer = fault.spoil(answer)
        assert answer is not None
        looks = self.faults.every("answer", call, content)
        date = email.utils.formatdate(self.clock() + veils.skew_s(looks), usegmt=True)
        answer = veils.veiled(answer, looks)
        return answer._replace(headers=answer.headers | {"Date": date})

    def _answer(self, call: str, headers: Mapping[str, str], body: bytes) -> Answer:
        self._authorize(headers)
        if self.enforces_rates and (refusal := self._too_fast(call)):
            return refusal
        method, _, path = call.partition(" ")
        methods = []
        for wanted, pattern, act in _ROUTES:
            if found := re.fullmatch(pattern, path):
                if wanted == method:
                    return as_json(200, {"data": act(self, body, *found.groups())})
                methods.append(wanted)
        if methods:
            return Answer(405, {"Allow": ", ".join(methods), "Content-Type": "text/plain"}, b"Method Not Allowed\n")
        raise Failure("global/not-found")

    def _authorize(self, headers: Mapping[str, str]) -> None:
        """Let in who has the key as a bearer, or as the user of a basic login, encoded or as it is."""
        given = {name.lower(): value for name, value in headers.items()}.get("authorization", "")
        how, _, word = given.partition(" ")
        encoded = base64.b64encode(f"{self.key}:".encode()).decode()
        if (how.lower(), word) not in {("bearer", self.key), ("basic", self.key), ("basic", encoded)}:
            raise Failure("global/invalid-api-key")

    def _too_fast(self, call: str) -> Answer | None:
        now, is_launch = self.clock(), call.endswith("/launch")
        if now - self._last_call < GAP_S or (is_launch and now - self._last_launch < LAUNCH_GAP_S):
            return Failure("global/quota-exceeded", "Too many requests", status=429).answer()
        self._last_call = now
        self._last_launch = now if is_launch else self._last_launch
        return None

    # --- instances ---------------------------------------------------------------------------------------------------

    def _launch(self, body: bytes) -> Json:
        order = parsed(body)
        ordering.check(order, self.account, self.catalogue, self.unknown_status)
        if self.quota is not None and len(self.still_billing()) >= self.quota:
            raise Failure("global/quota-exceeded")
        found = {fault.what: fault for fault in self.faults.every("launch", _LAUNCH, order)}
        made = [self._made(order, found).instance_id for _ in range(2 if "doubled" in found else 1)]
        named = made if "doubled" in found and found["doubled"].detail == "both" else made[:1]
        return {"instance_ids": named}

    def _made(self, order: Json, faults: dict[str, Fault]) -> Instance:
        address = (
            self.machines.address()
            if self.machines
            else f"198.{self._random.choice((18, 19))}." + ".".join(str(self._random.randint(1, 254)) for _ in range(2))
        )
        kind = self.catalogue.types[order["instance_type_name"]]
        made = Instance(self.new_id(), order, kind, address, self.timings, self.clock(), faults)
        made.name = order.get("name")
        made.public_key = self.account.public_key(order["ssh_key_names"][0]) or ""
        self.instances[made.instance_id] = made
        return made

    def _list(self, body: bytes) -> list[Json]:
        now = self.clock()
        return [one.shown(now) for one in self.instances.values() if one.is_visible(now)]

    def _get(self, body: bytes, instance_id: str) -> Json:
        return self._known(instance_id, is_shown=True).shown(self.clock())

    def _rename(self, body: bytes, instance_id: str) -> Json:
        content, instance = parsed(body), self._known(instance_id)
        if "name" in content:
            instance.name = checked_text(content["name"], "name", r"(?s).{0,64}")
        self._touch(instance)
        return instance.shown(self.clock())

    def _terminate(self, body: bytes) -> Json:
        content = parsed(body)
        wanted, now = [self._known(one) for one in _ids(content)], self.clock()
        for instance in wanted:
            found = {fault.what: fault for fault in self.faults.every("terminate", _TERMINATE, content)}
            self._touch(instance)
            if "terminate-ignored" in found or instance.ending_at is not None:
                continue
            instance.faults |= found
            instance.ending_at = now + (found["terminate-late"].seconds if "terminate-late" in found else 0.0)
        return {"terminated_instances": [one.shown(now) for one in wanted]}

    def _restart(self, body: bytes) -> Json:
        wanted, now = [self._known(one) for one in _ids(parsed(body))], self.clock()
        if any(one.status(now) not in ("active", "unhealthy") for one in wanted):
            raise Failure("global/conflict")
        for instance in wanted:
            self._touch(instance)
            instance.restarted_at = now
            instance.powered_off = False
            self._machine_states[instance.instance_id] = "restart"
        return {"restarted_instances": [one.shown(now) for one in wanted]}

    def _known(self, instance_id: str, is_shown: bool = False) -> Instance:
        """An instance; Failure when the provider knows of none, or with `is_shown` does not show it yet."""
        now, found = self.clock(), self.instances.get(instance_id)
        hides = found is not None and (is_shown or found.is_hidden_wholly) and not found.is_visible(now)
        if found is None or found.status(now) is None or hides:
            raise Failure("global/object-does-not-exist")
        return found

    def _touch(self, instance: Instance) -> None:
        if instance.is_foreign:
            self.touched_foreign.append(instance.instance_id)

    # --- what tests ask ----------------------------------------------------------------------------------------------

    def new_id(self) -> str:
        """An id like those of the provider."""
        return uuid.UUID(int=self._random.getrandbits(128), version=4).hex

    def add_foreign(self, name: str | None, type_name: str = "gpu_1x_a10", **more: Any) -> Instance:
        """An instance that somebody else who uses the account has had for an hour."""
        with self._lock:
            order = {"region_name": "us-east-1", "instance_type_name": type_name, "ssh_key_names": ["theirs"]}
            made = self._made(order | ({} if name is None else {"name": name}) | more, {})
            made.is_foreign = True
            made.launched_at -= 3600.0
            return made

    def ours(self) -> list[Instance]:
        """All instances that were ever launched through the API."""
        with self._lock:
            return [one for one in self.instances.values() if not one.is_foreign]

    def still_billing(self) -> list[Instance]:
        """Those of ours that cost money now: what is left at the end of a test was leaked."""
        now = self.clock()
        return [one for one in self.ours() if one.bill(now).ended is None]

    def bills(self) -> list[Bill]:
        """What each of ours cost until now."""
        now = self.clock()
        return [one.bill(now) for one in self.ours()]

    def cents(self) -> Fraction:
        """What all of ours cost until now."""
        return sum((bill.cents for bill in self.bills()), Fraction(0))

    def per_name(self) -> Counter[str | None]:
        """How many instances were launched under each name (a marker): more than one was doubled."""
        return Counter(one.order.get("name") for one in self.ours())

    def count(self, path: str, method: str = "") -> int:
        """How many requests came whose path ends in `path`."""
        return sum(call.path.endswith(path) and method in ("", call.method) for call in self.calls)

    # --- what goes on by itself --------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Have the machines do what is due: to be called often, where there are machines."""
        if self.machines is None:
            return
        with self._ticking:
            with self._lock:
                due = [one for one in self.instances.values() if not one.is_foreign]
            for instance in due:
                self._move(instance, self.machines)

    def _move(self, instance: Instance, machines: Machines) -> None:
        """Take one machine a step further: booted, open, ended."""
        now, name = self.clock(), instance.instance_id
        with self._lock:
            state = later = self._machine_states.get(name, "none")
            runs, is_off = instance.runs(now), instance.powered_off
        if state == "none" and runs:
            machines.boot(instance)
            later = "booted"
        elif state == "restart" and runs:
            machines.reboot(instance)
            later = "booted"
        elif state == "booted" and runs and now >= instance.sshd_at:
            machines.open(instance)
            later = "open"
        elif state in ("booted", "open", "restart", "off") and not runs and not is_off:
            machines.end(instance)
            later = "ended"
        elif state in ("booted", "open", "restart") and not runs:
            machines.power_off(instance)
            later = "off"
        elif state in ("booted", "open") and not machines.look(instance, now):
            instance.powered_off = True
        with self._lock:
            if self._machine_states.get(name, "none") == state:
                self._machine_states[name] = later


def _ids(content: Json) -> list[str]:
    found = need_list(content, "instance_ids", str)
    if not found:
        raise Failure("global/invalid-parameters", "instance_ids: List should have at least 1 item")
    return found


def _in_use(cloud: LambdaCloud) -> set[str]:
    """Names of the file systems that instances use."""
    now = cloud.clock()
    alive = [one for one in cloud.instances.values() if one.bill(now).ended is None]
    return {name for one in alive for name in one.order.get("file_system_names", [])}


_LAUNCH = "POST /instance-operations/launch"
_TERMINATE = "POST /instance-operations/terminate"
_ID = r"([^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/instance-types", lambda cloud, body: cloud.catalogue.listed()),
    ("GET", "/regions", lambda cloud, body: [catalogue.region(name) for name in catalogue.REGIONS]),
    ("GET", "/images", lambda cloud, body: cloud.catalogue.images),
    ("GET", "/instances", LambdaCloud._list),
    ("GET", f"/instances/{_ID}", LambdaCloud._get),
    ("POST", f"/instances/{_ID}", LambdaCloud._rename),
    ("POST", "/instance-operations/launch", LambdaCloud._launch),
    ("POST", "/instance-operations/terminate", LambdaCloud._terminate),
    ("POST", "/instance-operations/restart", LambdaCloud._restart),
    ("GET", "/ssh-keys", lambda cloud, body: list(cloud.account.keys.values())),
    ("POST", "/ssh-keys", lambda cloud, body: cloud.account.add_key(body)),
    ("DELETE", f"/ssh-keys/{_ID}", lambda cloud, body, key_id: cloud.account.remove_key(key_id)),
    ("GET", "/file-systems", lambda cloud, body: cloud.account.listed_file_systems(_in_use(cloud))),
    ("POST", "/filesystems", lambda cloud, body: cloud.account.add_file_system(body)),
    ("DELETE", f"/filesystems/{_ID}", lambda cloud, body, it: cloud.account.remove_file_system(it, _in_use(cloud))),
    ("GET", "/firewall-rules", lambda cloud, body: cloud.account.rules),
    ("PUT", "/firewall-rules", lambda cloud, body: cloud.account.replace_rules(body)),
]

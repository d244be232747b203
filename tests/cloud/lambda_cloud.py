"""A stand-in for the Lambda Cloud API v1 without sockets: requests in, answers out, and a bill for every instance."""

from __future__ import annotations

import base64
import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from tests.cloud import catalogue, ordering, veils
from tests.cloud.account import Account
from tests.cloud.answers import Answer, Failure, Json, as_json, checked_text, need_list, parsed
from tests.cloud.core import Core, Request
from tests.cloud.faults import Fault
from tests.cloud.instance import Instance
from tests.cloud.timings import Timings

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


class LambdaCloud(Core):
    """One account at a stand-in provider. What is set on it (`timings`, `quota`, ...) holds for what comes after."""

    place = "/lambda"
    knobs = ("quota", "enforces_rates", "unknown_status")
    acts = ("capacity",)

    def __init__(self, clock: Callable[[], float] = time.time, seed: int = 0, timings: Timings | None = None) -> None:
        """`clock` says seconds since 1970; the same seed and the same requests give the same ids."""
        super().__init__(clock, seed, timings)
        self.key = KEY
        self.catalogue = catalogue.built_in()
        self.machines: Machines | None = None
        self.account = Account(self.new_id, clock)
        self.instances: dict[str, Instance] = {}
        self.quota: int | None = None
        """How many instances the account may have at once."""
        self.unknown_status = 400
        """The HTTP status of a launch that names what does not exist: 400 or 404."""
        self._ticking = threading.Lock()
        self._machine_states: dict[str, str] = {}
        self._last_call = self._last_launch = -1e9

    # --- requests ----------------------------------------------------------------------------------------------------

    def stripped(self, path: str) -> str:
        """A path without the prefix of the API."""
        return path.removeprefix(PREFIX)

    def word_of(self, method: str, path: str, content: Json) -> str:
        """What a call is, in the words that all clouds share."""
        return next((word for wanted, it, word, _ in _ROUTES if wanted == method and re.fullmatch(it, path)), "")

    def answer(self, request: Request) -> Answer:
        """The answer when nothing goes wrong; raises Failure."""
        self._authorize(request)
        if self.enforces_rates and (refusal := self._too_fast(request.call)):
            return refusal
        methods = []
        for wanted, pattern, _, act in _ROUTES:
            if found := re.fullmatch(pattern, request.path):
                if wanted == request.method:
                    return as_json(200, {"data": act(self, request, *found.groups())})
                methods.append(wanted)
        if methods:
            return Answer(405, {"Allow": ", ".join(methods), "Content-Type": "text/plain"}, b"Method Not Allowed\n")
        raise Failure("global/not-found")

    def refusal(self, fault: Fault) -> Answer:
        """What this cloud says instead of an answer."""
        match fault.what:
            case "rate-limited-json":  # the code that also means an account's quota, as one stand-in in the wild has it
                answer = Failure("global/quota-exceeded", "Too many requests", status=429).answer()
                return answer._replace(headers=answer.headers | fault.retry_after)
            case "rate-limited-text":
                return Answer(429, {"Content-Type": "text/plain"} | fault.retry_after, b"Too Many Requests\n")
            case "null-data":
                return as_json(200, {"data": None})
        codes = {
            "bad-key": "global/invalid-api-key",
            "inactive": "global/account-inactive",
            "no-capacity": "instance-operations/launch/insufficient-capacity",
            "quota": "global/quota-exceeded",
        }
        return Failure(codes.get(fault.what) or fault.detail or "global/internal-error").answer()

    def veiled(self, answer: Answer, faults: list[Fault]) -> Answer:
        """The answer as faults make it look."""
        return veils.veiled(answer, faults)

    def _authorize(self, request: Request) -> None:
        """Let in who has the key as a bearer, or as the user of a basic login, encoded or as it is."""
        how, _, word = request.headers.get("authorization", "").partition(" ")
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

    def _launch(self, request: Request) -> Json:
        order = parsed(request.body)
        ordering.check(order, self.account, self.catalogue, self.unknown_status)
        if self.quota is not None and len(self.still_billing()) >= self.quota:
            raise Failure("global/quota-exceeded")
        found = {fault.what: fault for fault in self.faults.every("launch", request)}
        made = [self._made(order, found).instance_id for _ in range(2 if "doubled" in found else 1)]
        named = made if "doubled" in found and found["doubled"].detail == "both" else made[:1]
        return {"instance_ids": named}

    def _made(self, order: Json, faults: dict[str, Fault]) -> Instance:
        address = (
            self.machines.address()
            if self.machines
            else f"198.{self.random.choice((18, 19))}." + ".".join(str(self.random.randint(1, 254)) for _ in range(2))
        )
        kind = self.catalogue.types[order["instance_type_name"]]
        made = Instance(self.new_id(), order, kind, address, self.timings, self.clock(), faults)
        made.name = order.get("name")
        made.public_key = self.account.public_key(order["ssh_key_names"][0]) or ""
        self.instances[made.instance_id] = made
        return made

    def _list(self, request: Request) -> list[Json]:
        now = self.clock()
        return [one.shown(now) for one in self.instances.values() if one.is_visible(now)]

    def _get(self, request: Request, instance_id: str) -> Json:
        return self._known(instance_id, is_shown=True).shown(self.clock())

    def _rename(self, request: Request, instance_id: str) -> Json:
        content, instance = parsed(request.body), self._known(instance_id)
        if "name" in content:
            instance.name = checked_text(content["name"], "name", r"(?s).{0,64}")
        self.touch(instance)
        return instance.shown(self.clock())

    def _terminate(self, request: Request) -> Json:
        content = parsed(request.body)
        wanted, now = [self._known(one) for one in _ids(content)], self.clock()
        for instance in wanted:
            found = {fault.what: fault for fault in self.faults.every("terminate", request)}
            self.touch(instance)
            if "terminate-ignored" in found or instance.ending_at is not None:
                continue
            instance.faults |= found
            instance.ending_at = now + (found["terminate-late"].seconds if "terminate-late" in found else 0.0)
        return {"terminated_instances": [one.shown(now) for one in wanted]}

    def _restart(self, request: Request) -> Json:
        wanted, now = [self._known(one) for one in _ids(parsed(request.body))], self.clock()
        if any(one.status(now) not in ("active", "unhealthy") for one in wanted):
            raise Failure("global/conflict")
        for instance in wanted:
            self.touch(instance)
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

    # --- what tests ask ----------------------------------------------------------------------------------------------

    def new_id(self) -> str:
        """An id like those of the provider."""
        return uuid.UUID(int=self.random.getrandbits(128), version=4).hex

    def add_foreign(self, name: str | None, type_name: str = "gpu_1x_a10", **more: Any) -> Instance:
        """An instance that somebody else who uses the account has had for an hour."""
        with self.lock:
            order = {"region_name": "us-east-1", "instance_type_name": type_name, "ssh_key_names": ["theirs"]}
            made = self._made(order | ({} if name is None else {"name": name}) | more, {})
            made.is_foreign = True
            made.launched_at -= 3600.0
            return made

    def add_storage(self, name: str) -> None:
        """Have a file system of this name."""
        self.account.add_file_system(f'{{"name": "{name}", "region": "us-east-1"}}'.encode())

    def act(self, word: str, how: Any) -> None:
        """`capacity`: regions by type."""
        self.catalogue.capacity.update(how)

    # --- what goes on by itself --------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Have the machines do what is due: to be called often, where there are machines."""
        if self.machines is None:
            return
        with self._ticking:
            with self.lock:
                due = [one for one in self.instances.values() if not one.is_foreign]
            for instance in due:
                self._move(instance, self.machines)

    def _move(self, instance: Instance, machines: Machines) -> None:
        """Take one machine a step further: booted, open, ended."""
        now, name = self.clock(), instance.instance_id
        with self.lock:
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
        with self.lock:
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


_ID = r"([^/]+)"
_ROUTES: list[tuple[str, str, str, Callable[..., Any]]] = [
    ("GET", "/instance-types", "offers", lambda cloud, request: cloud.catalogue.listed()),
    ("GET", "/regions", "regions", lambda cloud, request: [catalogue.region(name) for name in catalogue.REGIONS]),
    ("GET", "/images", "images", lambda cloud, request: cloud.catalogue.images),
    ("GET", "/instances", "list", LambdaCloud._list),
    ("GET", f"/instances/{_ID}", "get", LambdaCloud._get),
    ("POST", f"/instances/{_ID}", "label", LambdaCloud._rename),
    ("POST", "/instance-operations/launch", "launch", LambdaCloud._launch),
    ("POST", "/instance-operations/terminate", "terminate", LambdaCloud._terminate),
    ("POST", "/instance-operations/restart", "reboot", LambdaCloud._restart),
    ("GET", "/ssh-keys", "keys", lambda cloud, request: list(cloud.account.keys.values())),
    ("POST", "/ssh-keys", "keys", lambda cloud, request: cloud.account.add_key(request.body)),
    ("DELETE", f"/ssh-keys/{_ID}", "keys", lambda cloud, request, key_id: cloud.account.remove_key(key_id)),
    ("GET", "/file-systems", "storage", lambda cloud, _: cloud.account.listed_file_systems(_in_use(cloud))),
    ("POST", "/filesystems", "storage", lambda cloud, request: cloud.account.add_file_system(request.body)),
    (
        "DELETE",
        f"/filesystems/{_ID}",
        "storage",
        lambda cloud, request, it: cloud.account.remove_file_system(it, _in_use(cloud)),
    ),
    ("GET", "/firewall-rules", "firewall", lambda cloud, request: cloud.account.rules),
    ("PUT", "/firewall-rules", "firewall", lambda cloud, request: cloud.account.replace_rules(request.body)),
]

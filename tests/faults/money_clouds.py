"""What a storm must know of each cloud: its stand-in, what an order says, and the guard that a container has."""

from __future__ import annotations

import base64
import functools
import json
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.providers import vast_answers, vast_label
from tests.cloud import LambdaCloud, Timings, VastCloud
from tests.cloud.answers import Answer
from tests.cloud.core import Core
from tests.cloud.instance import Instance
from tests.cloud.vast_instance import VastInstance
from tests.faults.light_machines import own_key

NAME = "box"
"""What every machine of a storm is called."""
_OTHERS = 12
"""So many machines that nobody here asks for are on the market: other people have some of them."""
LOOPBACK = "http://127.0.0.1:9"
Rented = Instance | VastInstance
_BLOB = re.compile(r"[A-Za-z0-9+/]{200,}={0,2}")


class GuardedVast(VastCloud):
    """Vast whose containers do what their start script says: they tell their host key, and end at their deadline."""

    priced: str | None = None
    """The id of the instance whose price the newest answer told."""

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """As VastCloud has it."""
        self.priced = None
        answer = super().handle(method, path, headers, body)
        self.priced = _priced(answer)
        return answer

    def log_of(self, instance: VastInstance) -> str:
        """What a container has written."""
        is_told = instance.first_up_at is not None and "ignores-user-data" not in instance.faults
        return f"gpu-host-key: ssh-ed25519 {own_key(instance.instance_id)}\n" if is_told else ""

    def settle(self) -> None:
        """Let everything happen that should have happened by now; what guards do, too."""
        super().settle()
        now = self.clock()
        for one in list(self.living.values()):
            if is_guarded(one) and one.runs(now) and one.ending_at is None:
                ends_at = told_deadline(one.order)
                if ends_at is not None and ends_at <= now:
                    one.end(max(ends_at, one.up_at or ends_at))


def is_guarded(one: VastInstance) -> bool:
    """Whether its container has begun with the guard that was sent along."""
    has_begun = one.first_up_at is not None and "ignores-user-data" not in one.faults
    return has_begun and not one.is_foreign and "onstart" in one.order


def told_deadline(order: Any) -> float | None:
    """The deadline that the guard in an order's start script is told; None: none."""
    found: float | None = _settings(str(order["onstart"])).get("deadline")
    return found


@functools.lru_cache(maxsize=64)
def _settings(script: str) -> dict[str, Any]:
    (blob,) = _BLOB.findall(script)
    told: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(blob)).partition(b"#")[0])
    return told


def made(name: str, clock: Callable[[], float], seed: int, timings: Timings) -> Core:
    """A stand-in at an address of its own."""
    core = {"lambda": LambdaCloud, "vast": GuardedVast}[name](clock, seed, timings)
    core.url = f"{LOOPBACK}{core.place}"
    if isinstance(core, VastCloud):
        others = [slot for slot in core.market.slots if "A100" not in slot.model.name]
        core.market.slots = [slot for slot in core.market.slots if "A100" in slot.model.name] + others[-_OTHERS:]
    return core


def announced(core: Core) -> dict[str, str]:
    """The variables that lead to it."""
    name = core.place.strip("/").upper()
    found = {f"GPU_{name}_URL": core.url, f"{name}_API_KEY": core.key}
    return found | ({"GPU_LAMBDA_SSH_PORT": "22"} if isinstance(core, LambdaCloud) else {})


def marker_of(order: Any) -> str:
    """Which marker a paid request bears."""
    return str(vast_label.decode(order["label"])[0] if "label" in order else order["name"])


def name_told(order: Any) -> str:
    """What a machine is called, by its paid request."""
    return tags_of(order).get("gpu-name", "?")


def deadline_told(order: Any) -> str:
    """The deadline in whole seconds that a paid request tells, to the guard in it, too; `none` for none."""
    found = tags_of(order).get("gpu-deadline", "?")
    if "onstart" in order:
        guarded = told_deadline(order)
        told = "none" if guarded is None else str(int(guarded))
        return found if told == found else f"{found}, and to the guard {told}"
    return found


def tags_of(order: Any) -> dict[str, str]:
    """What a paid request tells other computers, in tags or in its label."""
    if "label" in order:
        return vast_label.decode(order["label"])[1]
    return {tag["key"]: str(tag["value"]) for tag in order["tags"]}


def ending(core: Core, path: str, body: Any) -> set[str]:
    """The ids that a request asks the end of."""
    return set(body["instance_ids"]) if isinstance(core, LambdaCloud) else set(re.findall(r"[0-9]+", path))


def answers_at(one: Rented, host: str, port: int) -> bool:
    """Whether this is where somebody gets who connects there."""
    if isinstance(one, Instance):
        return one.address == host
    dead = {"direct": "direct-dead" in one.faults or "no-direct" in one.faults, "proxy": "proxy-dead" in one.faults}
    ways = {"direct": one.direct, "proxy": one.proxy}
    return any((way.host, way.port) == (host, port) and not dead[name] for name, way in ways.items())


def is_second(one: Rented) -> bool:
    """Whether it may be one of two that a request made, of which Vast's answer has room to name only the other.

    No record knows of it: what looks at records alone cannot find it.
    """
    return isinstance(one, VastInstance) and "doubled" in one.faults


def is_dearer(one: Rented) -> bool:
    """Whether it costs more than it was offered at, which nobody knows before its provider has told its price."""
    return isinstance(one, VastInstance) and "wrong-price" in one.faults


def is_on_its_way_out(one: Rented) -> bool:
    """Whether it was made, stopped, by a request that was refused, and its end was accepted: it never had a GPU."""
    if not isinstance(one, VastInstance) or "refused-yet-made" not in one.faults:
        return False
    return one.costs_until is not None and not one.spells


def _priced(answer: Answer) -> str | None:
    """The id of the one instance that an answer shows with its price; None when it shows none."""
    try:
        found = vast_answers.instance(json.loads(answer.body)["instances"]) if answer.status == 200 else None
    except (ValueError, KeyError, TypeError):
        return None
    return found.instance_id if found is not None and found.price_usd_per_hour else None

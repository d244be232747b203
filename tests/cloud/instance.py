"""One instance of the stand-in: what it is at any moment, when it cost money, and how the API writes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

from tests.cloud.answers import Json
from tests.cloud.catalogue import Gpus, gpus_of, region
from tests.cloud.faults import FOREVER, Fault
from tests.cloud.timings import Bill, Timings

_ACTIONS = ("migrate", "rebuild", "restart", "cold_reboot", "terminate")


@dataclass
class Instance:
    """What was launched. Everything it is follows from its times and the present one."""

    instance_id: str
    order: Json
    """The body of the launch."""
    kind: Json
    """Its instance type."""
    address: str
    timings: Timings
    launched_at: float
    faults: dict[str, Fault] = field(default_factory=dict)
    is_foreign: bool = False
    """Made by somebody else who uses the account."""
    name: str | None = None
    public_key: str = ""
    """What is let in: known at launch, and kept by the machine whatever becomes of the account's keys."""
    ending_at: float | None = None
    restarted_at: float | None = None
    powered_off: bool = False

    @property
    def asked_name(self) -> str | None:
        """What it was called when it was asked for."""
        return self.order.get("name")

    @property
    def gpus(self) -> Gpus:
        """What nvidia-smi shows there, unless a fault has it otherwise."""
        return gpus_of(self.kind)

    @property
    def active_at(self) -> float:
        """When it has booted."""
        return self.launched_at + self.timings.boot_s + self._late("boot-stuck")

    @property
    def sshd_at(self) -> float:
        """When sshd listens: after the boot, or the last restart."""
        began = self.active_at if self.restarted_at is None else self.restarted_at + self.timings.restart_s
        return began + self.timings.sshd_delay_s + (self._late("sshd-late") if self.restarted_at is None else 0.0)

    @property
    def terminated_at(self) -> float | None:
        """When it is terminated; None: nobody has asked for it."""
        return None if self.ending_at is None else self.ending_at + self.timings.term_s + self._late("terminate-slow")

    @property
    def lost_at(self) -> float | None:
        """When it ends by itself: preempted, or gone without a word; None: never."""
        found = [
            self.active_at + self.faults[what].seconds for what in ("vanishes", "preempted") if what in self.faults
        ]
        return min(found, default=None)

    @property
    def costs_until(self) -> float | None:
        """When it ceases to cost money; None: not foreseen."""
        return min((at for at in (self.terminated_at, self.lost_at) if at is not None), default=None)

    def status(self, now: float) -> str | None:
        """The provider's word for what it is at a moment; None when the provider knows of no such thing."""
        if self.lost_at is not None and now >= self.lost_at and self.costs_until == self.lost_at:
            gone = "vanishes" in self.faults or now >= self.lost_at + self.timings.linger_s
            return None if gone else "preempted"
        if self.terminated_at is not None and now >= self.terminated_at:
            return "terminated" if now < self.terminated_at + self.timings.linger_s else None
        if self.ending_at is not None and now >= self.ending_at:
            return "terminating"
        return self._living(now)

    def is_visible(self, now: float) -> bool:
        """Whether the provider shows it at a moment."""
        shown_at = self.launched_at + self.timings.visibility_delay_s + self._late("invisible")
        return now >= shown_at and self.status(now) is not None

    @property
    def is_hidden_wholly(self) -> bool:
        """Whether even its end cannot be asked for while it is not shown."""
        return "invisible" in self.faults and self.faults["invisible"].detail == "wholly"

    def runs(self, now: float) -> bool:
        """Whether there is a computer that has booted."""
        over = any(at is not None and now >= at for at in (self.ending_at, self.lost_at))
        return now >= self.active_at and not over and not self.powered_off and "boot-unhealthy" not in self.faults

    def cents(self, now: float) -> Fraction:
        """What it has cost until `now`."""
        until = min(now, self.costs_until) if self.costs_until is not None else now
        minutes = math.ceil(round((until - self.launched_at) / 60, 6))
        return Fraction(minutes * self.kind["price_cents_per_hour"], 60)

    def bill(self, now: float) -> Bill:
        """When it cost money and how much, until `now`."""
        ended = self.costs_until if self.costs_until is not None and self.costs_until <= now else None
        return Bill(self.instance_id, self.name, self.launched_at, ended, self.cents(now))

    def shown(self, now: float) -> Json:
        """The instance as the API writes it."""
        status = self.status(now) or "terminated"
        booted = now >= self.active_at
        region_name = self.order["region_name"]
        found: Json = {
            "id": self.instance_id,
            "status": status,
            "ssh_key_names": self.order["ssh_key_names"],
            "file_system_names": self.order.get("file_system_names", []),
            "region": region(region_name),
            "instance_type": self.kind,
            "actions": {name: self._action(status, name) for name in _ACTIONS},
            "is_reserved": False,
        }
        for key in ("tags", "file_system_mounts", "firewall_rulesets"):
            if self.order.get(key):
                found[key] = self.order[key]
        if self.name is not None:
            found["name"] = self.name
        if booted and now >= self.active_at + self.timings.ip_delay_s + self._late("no-ip"):
            found["ip"] = self.address
        return found | (self._of_booted() if booted else {})

    def _of_booted(self) -> Json:
        token = self.instance_id[::-1]
        return {
            "private_ip": "10.19." + ".".join(self.address.split(".")[2:]),
            "hostname": self.order.get("hostname") or self.address.replace(".", "-"),
            "jupyter_token": token,
            "jupyter_url": f"https://jupyter-{self.instance_id}.lambdaspaces.com/?token={token}",
        }

    def _living(self, now: float) -> str:
        if now < self.active_at:
            return "booting"
        if "boot-unhealthy" in self.faults or self.powered_off:
            return "unhealthy"
        if self.restarted_at is not None and now < self.restarted_at + self.timings.restart_s:
            return "booting"
        ill = self.faults.get("goes-unhealthy")
        if ill and 0 <= now - self.active_at - ill.seconds < (FOREVER if ill.detail is None else ill.detail):
            return "unhealthy"
        return str(self.faults["odd-status"].detail) if "odd-status" in self.faults else "active"

    def _action(self, status: str, name: str) -> Json:
        if status == "booting":
            code = "vm-has-not-launched"
        elif status in ("terminating", "terminated", "preempted"):
            code = "vm-is-terminating"
        else:
            return {"available": True}
        return {"available": False, "reason_code": code, "reason_description": f"It cannot {name} now."}

    def _late(self, what: str) -> float:
        return self.faults[what].seconds if what in self.faults else 0.0

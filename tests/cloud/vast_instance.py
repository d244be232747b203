"""One contract of the stand-in for Vast: what befalls it one after the other, and what it costs by the second."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from tests.cloud.answers import Json
from tests.cloud.catalogue import Gpus
from tests.cloud.faults import FOREVER, Fault
from tests.cloud.timings import Bill, Timings
from tests.cloud.vast_market import Market, Slot
from tests.cloud.vast_search import HOURS_PER_MONTH

_HOUR_S = 3600.0
DELETED_AFTER_S = 48 * _HOUR_S
"""A contract that was stopped for want of credit, or because its host's time was over, is deleted so much later."""
_OVERLAYS = {"offline": "offline", "goes-unhealthy": "offline", "unknown": "unknown", "exited": "exited"}
_OVERLAYS |= {"frozen": "frozen", "boot-unhealthy": "exited"}
_ENDS = {"outbid": "outbid", "vanishes": "vanish"}
_HOPELESS = ("boot-fails", "boot-created")


@dataclass(frozen=True)
class Place:
    """Where SSH may answer."""

    host: str
    port: int


@dataclass(frozen=True)
class Key:
    """A public key that was attached."""

    key_id: int
    public: str
    valid_at: float
    """From when on it is let in."""


@dataclass
class Spell:
    """A time in which the GPUs were charged."""

    began: float
    usd_per_hour: float
    ended: float | None = None


@dataclass
class VastInstance:
    """What was made by one request. `change` takes it from one state to the next; the rest follows from the time."""

    instance_id: str
    order: Json
    slot: Slot
    offer: Json
    """As it was when it was taken, without a disk."""
    market: Market
    timings: Timings
    created_at: float
    api_key: str
    """May show, stop, start and destroy this one."""
    direct: Place
    """Its port is another one after each start."""
    proxy: Place
    new_port: Callable[[Place], Place] = field(repr=False)
    faults: dict[str, Fault] = field(default_factory=dict)
    is_foreign: bool = False
    name: str | None = None
    """Its label."""
    bid: float | None = None
    """What is bid for the GPUs; None: on demand."""
    image_error: str = ""
    """Why its image cannot be had."""
    keys: list[Key] = field(default_factory=list)
    log: str = ""
    """What its container wrote, where there is no machine."""
    wants: bool = True
    """Whether it is to run, as far as its owner is concerned."""
    lost_by: str = ""
    """Why it was stopped though it is to run: outbid, credit, ended."""
    starts: int = 0
    """How often a container was started."""
    containers: int = 1
    """How many it has had: a recycled one is another."""
    up_at: float | None = None
    """Since when its container runs."""
    first_up_at: float | None = None
    boot_from: float | None = None
    """Since when its GPUs are its own, or since it was rebooted; None: it has none."""
    boot_word: str = "loading"
    stopped_at: float | None = None
    ending_at: float | None = None
    gone_at: float | None = None
    """When it was gone without a word."""
    taken_until: float = -math.inf
    """Its GPUs are in other hands until then."""
    rival_bid: float = 0.0
    rival_until: float = -math.inf
    powered_off: bool = False
    spells: list[Spell] = field(default_factory=list)
    befallen: set[str] = field(default_factory=set)
    _has_slot: bool = False

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Its id as the API writes it."""
        return int(self.instance_id)

    @property
    def asked_name(self) -> str | None:
        """What it was called when it was asked for."""
        return self.order.get("label")

    @property
    def address(self) -> str:
        """Where its direct port is."""
        return self.direct.host

    @property
    def disk_gb(self) -> float:
        """What was asked for."""
        return float(self.order.get("disk") or 8.0)

    @property
    def gpus(self) -> Gpus:
        """What nvidia-smi shows there, unless a fault has it otherwise."""
        if "delivers-gpu" in self.faults:
            return Gpus(f"NVIDIA GeForce {self.gpu_name}", self.slot.gpus.count, 12288, "8.6")
        return self.slot.gpus

    @property
    def gpu_name(self) -> str:
        """As the API calls what it has."""
        other = self.faults.get("delivers-gpu")
        return str(other.detail or "RTX 3060") if other else str(self.offer["gpu_name"])

    @property
    def usd_per_hour(self) -> float:
        """Of its GPUs."""
        dearer = self.faults.get("wrong-price")
        return (self.offer["dph_base"] if self.bid is None else self.bid) * ((dearer.detail or 2) if dearer else 1)

    @property
    def terminated_at(self) -> float | None:
        """When its end, once it was asked for, has come."""
        return None if self.ending_at is None else self.ending_at + self.timings.term_s + self.late("terminate-slow")

    @property
    def costs_until(self) -> float | None:
        """When it ceases to cost money; None: not foreseen."""
        return min((at for at in (self.terminated_at, self.gone_at) if at is not None), default=None)

    def exists(self, now: float) -> bool:
        """Whether there is a contract."""
        return self.costs_until is None or now < self.costs_until

    def is_visible(self, now: float) -> bool:
        """Whether the provider shows it."""
        return self.exists(now) and now >= self.created_at + self.timings.visibility_delay_s + self.late("invisible")

    @property
    def is_hidden_wholly(self) -> bool:
        """Whether even its end cannot be asked for while it is not shown."""
        return "invisible" in self.faults and self.faults["invisible"].detail == "wholly"

    def late(self, what: str) -> float:
        """How many seconds later something is for a fault."""
        return self.faults[what].seconds if what in self.faults else 0.0

    def overlay(self, now: float) -> str:
        """The provider's word for what is wrong with its first container now; empty when nothing is."""
        if self.powered_off:
            return "exited"
        if self.first_up_at is None or self.starts != 1:
            return ""
        for what, word in _OVERLAYS.items():
            if (fault := self.faults.get(what)) is not None:
                since_s = now - self.first_up_at - (0.0 if what == "boot-unhealthy" else fault.seconds)
                if 0 <= since_s < (FOREVER if fault.detail is None else fault.detail):
                    return word
        return ""

    def runs(self, now: float) -> bool:
        """Whether its container has processes."""
        begins = self.ending_at is None or now < self.ending_at
        return self.up_at is not None and begins and self.exists(now) and self.overlay(now) != "exited"

    @property
    def sshd_at(self) -> float:
        """When sshd listens; never before its container runs."""
        if self.up_at is None:
            return math.inf
        return self.up_at + self.timings.sshd_delay_s + (self.late("sshd-late") if self.starts == 1 else 0.0)

    def lets_in(self, now: float) -> list[str]:
        """The public keys that the provider has let in by now."""
        if "publickey-denied" in self.faults and now < self.sshd_at + self.faults["publickey-denied"].seconds:
            return []
        return [key.public for key in self.keys if now >= key.valid_at + self.late("keys-late")]

    def is_outbid(self, now: float) -> bool:
        """Whether somebody bids more."""
        return self.bid is not None and now < self.rival_until and self.bid <= self.rival_bid

    # --- what befalls it ---------------------------------------------------------------------------------------------

    def next_change(self, now: float) -> tuple[float, str] | None:
        """What befalls it next by itself, and when; None: nothing is foreseen."""
        if not self.exists(now):
            return None
        until = math.inf if self.ending_at is None else self.ending_at
        return min((it for it in self._coming(now) if it[0] < until), default=None)

    def _coming(self, now: float) -> list[tuple[float, str]]:
        if self.boot_from is None:
            soon = [(self.free_at(now), "grant")] if self.wants and self.lost_by in ("", "outbid") else []
            if self.lost_by in ("credit", "ended") and self.stopped_at is not None:
                soon.append((self.stopped_at + DELETED_AFTER_S, "delete"))
            return [it for it in soon if it[0] < math.inf]
        soon = [(self.market.ends_at(self.slot), "end")]
        if self.up_at is None and not self.is_hopeless:
            soon.append((self.boot_from + self.boot_s, "up"))
        if self.first_up_at is not None:
            told = [what for what in _ENDS if what in self.faults and what not in self.befallen]
            told = [what for what in told if what != "outbid" or self.bid is not None]
            soon += [(self.first_up_at + self.faults[what].seconds, _ENDS[what]) for what in told]
        return soon

    @property
    def is_hopeless(self) -> bool:
        """Whether it will never be up."""
        return bool(self.image_error) or any(what in self.faults for what in _HOPELESS)

    @property
    def boot_s(self) -> float:
        """How long its container takes to be up: an image is to be pulled, or not."""
        if self.boot_word == "loading" and self.starts:
            return self.timings.restart_s
        if self.boot_word == "rebooting":
            return self.timings.restart_s
        return self.timings.boot_s + (self.late("boot-stuck") if self.containers == 1 else 0.0)

    def free_at(self, now: float) -> float:
        """When it may have its GPUs; infinite: that is not foreseen."""
        if self.market.ends_at(self.slot) <= now or not (self._has_slot or self.market.is_free(self.slot)):
            return math.inf
        if self.bid is not None and self.bid < self.offer["min_bid"]:
            return math.inf
        outbid_until = self.rival_until if self.is_outbid(max(now, self.taken_until)) else -math.inf
        return max(now, self.taken_until, outbid_until)

    def change(self, at: float, what: str) -> None:
        """Have it befall now."""
        self.befallen.add({"vanish": "vanishes"}.get(what, what))
        match what:
            case "grant":
                self.lost_by, self.boot_from, self.boot_word, self.up_at = "", at, "loading", None
                self._hold()
            case "up":
                self.up_at = at
                self.first_up_at = at if self.first_up_at is None else self.first_up_at
                self.starts += 1
                if self.starts > 1:
                    self.direct = self.new_port(self.direct)
                if not self.spells or self.spells[-1].ended is not None:
                    self.spells.append(Spell(at, self.usd_per_hour))
            case "outbid":
                fault = self.faults["outbid"]
                self.outbid(at, (self.bid or 0.0) * 1.1 + 0.001, FOREVER if fault.detail is None else fault.detail)
            case "vanish":
                self.lose(at, "vanished")
                self.gone_at = at
            case "end":
                self.lose(at, "ended")
            case "delete":
                self.ending_at = at

    def outbid(self, at: float, price: float, seconds: float) -> None:
        """Somebody bids more for so long: the loser is stopped at once."""
        self.rival_bid, self.rival_until = price, at + seconds
        if self.boot_from is not None and self.is_outbid(at):
            self.lose(at, "outbid")

    def lose(self, at: float, why: str = "") -> None:
        """Be without GPUs from now on."""
        self._close_spell(at)
        if self.boot_from is not None and "start-queued" in self.faults and not why:
            self.taken_until = max(self.taken_until, at + self.faults["start-queued"].seconds)
        self.boot_from = self.up_at = None
        self.stopped_at, self.lost_by = at, why
        if why != "outbid":
            self._release()

    def again(self, at: float, word: str) -> None:
        """Have the container begin again: `rebooting`, or as another one: `recycling`."""
        self.boot_from, self.boot_word, self.up_at, self.powered_off = at, word, None, False
        self.containers += word == "recycling"

    def rebid(self, at: float, price: float) -> None:
        """Bid another price from now on."""
        self.bid = price
        if self._close_spell(at):
            self.spells.append(Spell(at, self.usd_per_hour))
        if self.boot_from is not None and (self.is_outbid(at) or price < self.offer["min_bid"]):
            self.lose(at, "outbid")

    def end(self, at: float) -> None:
        """Its end was asked for."""
        self.ending_at = at
        self._release()

    def _hold(self) -> None:
        if not self._has_slot:
            self.market.hold(self.slot)
        self._has_slot = True

    def _release(self) -> None:
        if self._has_slot:
            self.market.release(self.slot)
        self._has_slot = False

    def _close_spell(self, at: float) -> bool:
        if self.spells and self.spells[-1].ended is None:
            self.spells[-1].ended = at
            return True
        return False

    # --- what it costs -----------------------------------------------------------------------------------------------

    @property
    def disk_usd_per_hour(self) -> float:
        """From its making to its end, whatever it is."""
        return self.disk_gb * float(self.offer["storage_cost"] or 0.0) / HOURS_PER_MONTH

    def is_charged(self, now: float) -> bool:
        """Whether its GPUs cost money now."""
        return bool(self.spells) and self.spells[-1].ended is None and self.overlay(now) != "offline"

    def usd(self, now: float) -> float:
        """What it has cost until `now`."""
        until = min(now, self.costs_until) if self.costs_until is not None else now
        seconds = (until - self.created_at) * self.disk_usd_per_hour
        for spell in self.spells:
            ended = min(until, until if spell.ended is None else spell.ended)
            seconds += max(0.0, ended - spell.began - self._offline_s(spell.began, ended)) * spell.usd_per_hour
        return seconds / _HOUR_S

    def _offline_s(self, began: float, ended: float) -> float:
        """For how long of a time its host was away."""
        found = self.faults.get("offline") or self.faults.get("goes-unhealthy")
        if found is None or self.first_up_at is None:
            return 0.0
        away = self.first_up_at + found.seconds
        back = away + (FOREVER if found.detail is None else found.detail)
        return max(0.0, min(ended, back) - max(began, away))

    def bill(self, now: float) -> Bill:
        """When it cost money and how much, until `now`."""
        ended = self.costs_until if self.costs_until is not None and self.costs_until <= now else None
        return Bill(self.instance_id, self.name, self.created_at, ended, Fraction(self.usd(now) * 100))

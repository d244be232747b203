"""What every stand-in has: requests in, answers out, faults on their way, a list of calls, a bill for each instance."""

from __future__ import annotations

import contextlib
import email.utils
import json
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple, Protocol

from tests.cloud.answers import Answer, Failure, Json
from tests.cloud.faults import Fault, Faults, clock_skew_s
from tests.cloud.timings import Bill, Timings


class Rented(Protocol):
    """What every stand-in can say of an instance."""

    instance_id: str
    is_foreign: bool
    faults: dict[str, Fault]

    @property
    def asked_name(self) -> str | None:
        """What it was called when it was asked for: a marker."""
        ...

    @property
    def costs_until(self) -> float | None:
        """When it ceases to cost money; None: not foreseen."""
        ...

    def bill(self, now: float) -> Bill:
        """When it cost money and how much, until `now`."""
        ...


class Call(NamedTuple):
    """A request that came, and how it was answered."""

    at: float
    method: str
    path: str
    """Without the prefix."""
    status: int | None
    """None: the client got no answer."""
    word: str = ""
    """What it is in the words that all clouds share: see `Core.word_of`."""


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    method: str
    path: str
    """Without the prefix and without a query."""
    query: str
    headers: Mapping[str, str]
    """By their names in small letters."""
    body: bytes
    content: Json
    """The body, where it is an object; else empty."""
    word: str = ""

    @property
    def call(self) -> str:
        """Method and path."""
        return f"{self.method} {self.path}"


class Core(ABC):
    """One account at a stand-in provider. What is set on it (`timings`, knobs, ...) holds for what comes after."""

    place: ClassVar[str]
    """Below which a server has it: `/lambda`."""
    knobs: ClassVar[tuple[str, ...]]
    """What a test may set over HTTP."""
    acts: ClassVar[tuple[str, ...]]
    """What a test may have it do over HTTP."""
    key: str
    """The account's."""
    instances: dict[str, Any]
    """All that ever were, by their ids."""

    def __init__(self, clock: Callable[[], float] = time.time, seed: int = 0, timings: Timings | None = None) -> None:
        """`clock` says seconds since 1970; the same seed and the same requests give the same ids."""
        self.clock = clock
        self.timings = timings or Timings()
        self.faults = Faults(self.place.strip("/"))
        self.instances = {}
        self.calls: list[Call] = []
        self.touched_foreign: list[str] = []
        """Ids of other people's instances that somebody has changed or ended."""
        self.enforces_rates = False
        self.url = f"http://127.0.0.1:9{self.place}"
        """Where it is; set by its server."""
        self.random = random.Random(seed)
        self.lock = threading.RLock()

    # --- what each cloud has of its own ------------------------------------------------------------------------------

    @abstractmethod
    def stripped(self, path: str) -> str:
        """A path without the prefix of the API."""

    @abstractmethod
    def word_of(self, method: str, path: str, content: Json) -> str:
        """What a call is: `launch`, `terminate`, `list`, `get`, `offers`, `keys`, ...; empty when it is none."""

    @abstractmethod
    def answer(self, request: Request) -> Answer:
        """The answer when nothing goes wrong; raises Failure."""

    @abstractmethod
    def refusal(self, fault: Fault) -> Answer:
        """What this cloud says instead of an answer, for a fault that has it say something of its own."""

    @abstractmethod
    def veiled(self, answer: Answer, faults: list[Fault]) -> Answer:
        """The answer as faults make it look."""

    @abstractmethod
    def add_foreign(self, name: str | None, **more: Any) -> Any:
        """An instance that somebody else who uses the account has had for an hour."""

    @abstractmethod
    def add_storage(self, name: str) -> None:
        """Have something that keeps costing money beside instances."""

    @abstractmethod
    def tick(self) -> None:
        """Have the machines do what is due: to be called often, where there are machines."""

    def settle(self) -> None:  # noqa: B027 -- where what an instance is follows from the time there is nothing to do
        """Let everything happen that should have happened by now."""

    @abstractmethod
    def act(self, word: str, how: Any) -> None:
        """Do one of `acts`."""

    # --- requests ----------------------------------------------------------------------------------------------------

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """The answer to a request; Unanswered when a fault keeps it from the client, done or not.

        When it comes, the machines have done what it says: what is ending or restarting has no processes left.
        """
        try:
            return self._handled(method, path, headers, body)
        finally:
            if method != "GET":
                self.tick()

    def _handled(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        with self.lock:
            self.settle()
            whole, _, query = path.partition("?")
            path = self.stripped(whole)
            content = _object(body)
            word = self.word_of(method, path, content)
            names = {name.lower(): value for name, value in headers.items()}
            request = Request(method, path, query, names, body, content, word)
            status: int | None = None
            try:
                answer = self._with_faults(request)
                status = answer.status
            finally:
                self.calls.append(Call(self.clock(), method, path, status, word))
            return answer

    def _with_faults(self, request: Request) -> Answer:
        fault = self.faults.first("call", request)
        answer = None
        if fault is None or fault.is_done:
            try:
                answer = self.answer(request)
            except Failure as failure:
                answer = failure.answer()
        if fault is not None:
            answer = self.spoiled(fault, answer)
        assert answer is not None
        looks = self.faults.every("answer", request)
        date = email.utils.formatdate(self.clock() + clock_skew_s(looks), usegmt=True)
        answer = self.veiled(answer, looks)
        return answer._replace(headers=answer.headers | {"Date": date})

    def spoiled(self, fault: Fault, answer: Answer | None) -> Answer:
        """What is answered instead of `answer` (None: nothing was done); Unanswered when nothing is."""
        return fault.spoil(answer) or self.refusal(fault)

    def touch(self, instance: Rented) -> None:
        """Note that an instance was changed by whoever uses the key."""
        if instance.is_foreign:
            self.touched_foreign.append(instance.instance_id)

    # --- what tests ask ----------------------------------------------------------------------------------------------

    def ours(self) -> list[Any]:
        """All instances that were ever launched through the API."""
        with self.lock:
            self.settle()
            return [one for one in self.instances.values() if not one.is_foreign]

    def still_billing(self) -> list[Any]:
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
        return Counter(one.asked_name for one in self.ours())

    def count(self, what: str, method: str = "") -> int:
        """How many requests came that are such a thing (`launch`, ...), or whose path ends so."""
        alike = [call for call in self.calls if call.word == what or call.path.endswith(what)]
        return sum(method in ("", call.method) for call in alike)


def _object(body: bytes) -> Json:
    with contextlib.suppress(ValueError):
        content = json.loads(body)
        if isinstance(content, dict):
            return content
    return {}

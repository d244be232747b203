"""What can go wrong at the stand-in, as data: which call or instance it befalls, and how often."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.cloud.answers import Answer, Closed, CutShort, Hangs, Json, NotSent, as_page
from tests.cloud.fault_kinds import AT_ONCE, DONE, KINDS, OF, Stage

FOREVER = 1e9


class Befallen(Protocol):
    """A request, as far as faults look at it."""

    @property
    def call(self) -> str:
        """Method and path."""
        ...

    @property
    def word(self) -> str:
        """What it is, in the words that all clouds share."""
        ...

    @property
    def content(self) -> Json:
        """Its body."""
        ...


@dataclass
class Fault:
    """One thing that goes wrong: `Fault("lost-502")` is the next launch that is done and whose answer is lost."""

    what: str
    when: str = ""
    """A regular expression found in `POST /instance-operations/launch` and the like, or in the word for it that all
    clouds share (`launch`, `terminate`, `list`, `get`, ...: see `Core.word_of`); empty: as KINDS says."""
    times: int | None = 1
    """How often; None: always."""
    after: int = 0
    """So many calls or instances that it could befall go well first."""
    where: Json = field(default_factory=dict)
    """Fields of the request's body that must be so."""
    seconds: float = -1.0
    """How long, or how long after; left out: for ever, and at once where it is a time after which something happens."""
    detail: Any = None

    def __post_init__(self) -> None:
        if self.what not in KINDS:
            raise ValueError(f"no fault {self.what!r}; there are: {', '.join(KINDS)}")
        self.stage, usual, _ = KINDS[self.what]
        self.when = self.when or usual
        if self.seconds < 0:
            self.seconds = 0.0 if self.what in AT_ONCE else FOREVER

    @property
    def is_done(self) -> bool:
        """Whether the call it befalls has its effect."""
        return self.what in DONE

    def befalls(self, stage: Stage, request: Befallen) -> bool:
        """Whether it goes wrong here; counted, so ask once for each."""
        if stage != self.stage or self.times == 0:
            return False
        if not (re.search(self.when, request.call) or re.search(self.when, request.word)):
            return False
        if any(request.content.get(name) != value for name, value in self.where.items()):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True

    def spoil(self, answer: Answer | None) -> Answer | None:
        """What is answered instead of `answer` (None: nothing was done); Unanswered when nothing is.

        None when that is for the cloud to say: `Core.refusal`.
        """
        match self.what:
            case "not-sent":
                raise NotSent(self.detail == "silent")
            case "closed" | "lost-closed":
                raise Closed
            case "hang" | "lost-hang":
                raise Hangs(self.seconds)
            case "lost-half":
                raise CutShort(answer or Answer(200, {}, b"{}"))
            case "redirect":
                place = self.detail or "http://127.0.0.1:9/elsewhere"
                return as_page(301, "Moved")._replace(headers={"Content-Type": "text/html", "Location": place})
            case "failed" | "lost-502":
                return as_page(self.detail or 502, "Bad gateway")
            case "proxy-page":
                return as_page(200, "Please log in")
            case "empty" | "lost-empty":
                return Answer(200, {}, b"")
        return None

    @property
    def retry_after(self) -> dict[str, str]:
        """The header of a limit, where it has one."""
        return {} if self.detail is None else {"Retry-After": str(self.detail)}


class Faults:
    """The faults that are set, in the order they were."""

    def __init__(self, cloud: str) -> None:
        self.kinds = OF[cloud]
        """What this cloud plays."""
        self.all: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Set a fault from now on; returned, so that a test can see how often it is still to happen."""
        if fault.what not in self.kinds:
            raise ValueError(f"this cloud has no fault {fault.what!r}")
        self.all.append(fault)
        return fault

    def clear(self) -> None:
        """From now on nothing more goes wrong; instances that are made keep their faults."""
        self.all.clear()

    def first(self, stage: Stage, request: Befallen) -> Fault | None:
        """The first fault that befalls a call; the others stay for the next."""
        return next((fault for fault in self.all if fault.befalls(stage, request)), None)

    def every(self, stage: Stage, request: Befallen) -> list[Fault]:
        """All faults that befall here, together."""
        return [fault for fault in self.all if fault.befalls(stage, request)]


def clock_skew_s(faults: Iterable[Fault]) -> float:
    """How many seconds the provider's clock is ahead."""
    skewed = [fault for fault in faults if fault.what == "clock-skew"]
    return sum(3600.0 if fault.detail is None else float(fault.detail) for fault in skewed)

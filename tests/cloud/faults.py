"""What can go wrong at the stand-in, as data: which call or instance it befalls, and how often."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.cloud.answers import Answer, Closed, CutShort, Failure, Hangs, Json, NotSent, as_json, as_page

Stage = Literal["call", "launch", "terminate", "answer"]
"""A fault befalls a whole call, an instance as it is made, the end of an instance, or what answers look like."""
_LAUNCH = r"^POST /instance-operations/launch$"
_TERMINATE = r"^POST /instance-operations/terminate$"
FOREVER = 1e9
KINDS: dict[str, tuple[Stage, str, str]] = {
    # word: stage, the calls it befalls unless `when` says otherwise, what it does (`seconds` and `detail` are its own)
    "rate-limited-json": ("call", "", "429 with an envelope; detail: Retry-After"),
    "rate-limited-text": ("call", "", "429 in plain text; detail: Retry-After"),
    "not-sent": ("call", "", "the provider cannot be reached, nothing is done; detail: silent, for a time-out"),
    "closed": ("call", "", "the connection is closed without an answer, nothing is done"),
    "hang": ("call", "", "no answer for `seconds`, nothing is done"),
    "failed": ("call", "", "nothing is done; detail: the HTTP status of a page of HTML (502)"),
    "error": ("call", "", "nothing is done; detail: an error code of the table (global/internal-error)"),
    "lost-502": ("call", _LAUNCH, "done, then a 502 page of HTML"),
    "lost-closed": ("call", _LAUNCH, "done, then the connection is closed without an answer"),
    "lost-hang": ("call", _LAUNCH, "done, then no answer for `seconds`"),
    "lost-half": ("call", _LAUNCH, "done, then the answer ends in the middle of its body"),
    "lost-empty": ("call", _LAUNCH, "done, then 200 with an empty body"),
    "redirect": ("call", "", "301 to another host (detail: which), nothing is done"),
    "proxy-page": ("call", "", "200 with a page of HTML, nothing is done"),
    "empty": ("call", "", "200 with an empty body, nothing is done"),
    "null-data": ("call", "", 'done, then 200 with {"data": null}'),
    "bad-key": ("call", "", "401 whatever the key"),
    "inactive": ("call", "", "403: the account is inactive"),
    "no-capacity": ("call", _LAUNCH, "400: no capacity, although it is listed"),
    "quota": ("call", _LAUNCH, "400: the account's quota is used up"),
    "clock-skew": ("answer", "", "the Date header is detail seconds ahead (3600)"),
    "unknown-fields": ("answer", "", "objects have fields that nobody knows"),
    "null-fields": ("answer", "", "what an instance need not have is null instead of absent"),
    "bare-instances": ("answer", "", "instances lack whatever they need not have, and `actions`"),
    "nothing-terminated": ("answer", _TERMINATE, "done, but `terminated_instances` is empty"),
    "terminate-late": ("terminate", _TERMINATE, "200, but active for another `seconds`"),
    "terminate-ignored": ("terminate", _TERMINATE, "200, and nothing happens"),
    "terminate-slow": ("terminate", _TERMINATE, "terminating for `seconds` longer"),
    "doubled": ("launch", _LAUNCH, "two are made; detail: both, for an answer that names both (the first)"),
    "invisible": ("launch", _LAUNCH, "404 and not in the list for `seconds`; detail: wholly, for terminate, too"),
    "boot-unhealthy": ("launch", _LAUNCH, "unhealthy instead of active"),
    "boot-stuck": ("launch", _LAUNCH, "booting for `seconds` longer"),
    "goes-unhealthy": ("launch", _LAUNCH, "unhealthy `seconds` after it is active; detail: for how long"),
    "vanishes": ("launch", _LAUNCH, "gone without a word `seconds` after it is active"),
    "preempted": ("launch", _LAUNCH, "preempted `seconds` after it is active"),
    "no-ip": ("launch", _LAUNCH, "no `ip` for `seconds` after it is active"),
    "odd-status": ("launch", _LAUNCH, "detail instead of `active`"),
    "sshd-late": ("launch", _LAUNCH, "sshd refuses for `seconds` longer"),
    "publickey-denied": ("launch", _LAUNCH, "sshd denies every key for `seconds`"),
    "other-host-key": ("launch", _LAUNCH, "another host key after the first login"),
    "ignores-host-key": ("launch", _LAUNCH, "the host key of user_data is not used"),
    "ignores-user-data": ("launch", _LAUNCH, "nothing of user_data is done"),
    "smi-missing": ("launch", _LAUNCH, "no nvidia-smi"),
    "smi-fails": ("launch", _LAUNCH, "nvidia-smi cannot speak to the driver"),
    "smi-hangs": ("launch", _LAUNCH, "nvidia-smi says nothing for `seconds`"),
    "smi-wrong-gpu": ("launch", _LAUNCH, "another GPU; detail: its name (Tesla T4)"),
    "smi-wrong-count": ("launch", _LAUNCH, "another number of GPUs; detail: how many (one less)"),
    "smi-wrong-memory": ("launch", _LAUNCH, "another memory; detail: MiB (half of it)"),
    "cuda-error": ("launch", _LAUNCH, "CUDA cannot be initialised; detail: its error (802)"),
}
_SHOWN_ONLY = {"lost-502", "lost-closed", "lost-hang", "lost-half", "lost-empty", "null-data"}
"""What befalls the answer of a call that was done."""
_AT_ONCE = {"goes-unhealthy", "vanishes", "preempted"}


@dataclass
class Fault:
    """One thing that goes wrong: `Fault("lost-502")` is the next launch that is done and whose answer is lost."""

    what: str
    when: str = ""
    """A regular expression found in `POST /instance-operations/launch` and the like; empty: as KINDS says."""
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
            self.seconds = 0.0 if self.what in _AT_ONCE else FOREVER

    @property
    def is_done(self) -> bool:
        """Whether the call it befalls has its effect."""
        return self.what in _SHOWN_ONLY

    def befalls(self, stage: Stage, call: str, body: Json) -> bool:
        """Whether it goes wrong here; counted, so ask once for each."""
        if stage != self.stage or self.times == 0 or not re.search(self.when, call):
            return False
        if any(body.get(name) != value for name, value in self.where.items()):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True

    def spoil(self, answer: Answer | None) -> Answer:
        """What is answered instead of `answer` (None: nothing was done); Unanswered when nothing is."""
        if self.what == "not-sent":
            raise NotSent(self.detail == "silent")
        if self.what in ("closed", "lost-closed"):
            raise Closed
        if self.what in ("hang", "lost-hang"):
            raise Hangs(self.seconds)
        if self.what == "lost-half" and answer is not None:
            raise CutShort(answer)
        return self._instead()

    def _instead(self) -> Answer:
        wait = {} if self.detail is None else {"Retry-After": str(self.detail)}
        match self.what:
            case "rate-limited-json":  # the code that also means an account's quota, as one stand-in in the wild has it
                answer = Failure("global/quota-exceeded", "Too many requests", status=429).answer()
                return answer._replace(headers=answer.headers | wait)
            case "rate-limited-text":
                return Answer(429, {"Content-Type": "text/plain"} | wait, b"Too Many Requests\n")
            case "redirect":
                return as_page(301, "Moved")._replace(
                    headers={"Content-Type": "text/html", "Location": self.detail or "http://127.0.0.1:9/elsewhere"}
                )
            case "failed" | "lost-502":
                return as_page(self.detail or 502, "Bad gateway")
            case "proxy-page":
                return as_page(200, "Please log in")
            case "empty" | "lost-empty":
                return Answer(200, {}, b"")
            case "null-data":
                return as_json(200, {"data": None})
        codes = {
            "bad-key": "global/invalid-api-key",
            "inactive": "global/account-inactive",
            "no-capacity": "instance-operations/launch/insufficient-capacity",
            "quota": "global/quota-exceeded",
        }
        return Failure(codes.get(self.what) or self.detail or "global/internal-error").answer()


class Faults:
    """The faults that are set, in the order they were."""

    def __init__(self) -> None:
        self.all: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Set a fault from now on; returned, so that a test can see how often it is still to happen."""
        self.all.append(fault)
        return fault

    def clear(self) -> None:
        """From now on nothing more goes wrong; instances that are made keep their faults."""
        self.all.clear()

    def first(self, stage: Stage, call: str, body: Json) -> Fault | None:
        """The first fault that befalls a call; the others stay for the next."""
        return next((fault for fault in self.all if fault.befalls(stage, call, body)), None)

    def every(self, stage: Stage, call: str, body: Json) -> list[Fault]:
        """All faults that befall here, together."""
        return [fault for fault in self.all if fault.befalls(stage, call, body)]

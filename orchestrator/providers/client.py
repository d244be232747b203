"""One JSON client for all clouds: paced, redacted, and precise about what a failed call may have done."""

from __future__ import annotations

import base64
import email.utils
import html
import importlib.metadata
import json
import random
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from orchestrator import clock, keys
from orchestrator.errors import ConfigError
from orchestrator.plain import plain
from orchestrator.providers import pace
from orchestrator.providers.pace import Lane

if TYPE_CHECKING:
    import tenacity

    from orchestrator.providers import exchange

READ_S = 30.0
TRIES = 6
_REPEAT_MAX_S = 240.0
"""After so long nothing is asked once more."""
_RETRY_AFTER_MAX_S = 120.0
_WORDS_MAX = 300
_QUOTED_MAX_BYTES = 4096
_LINE_MIN = 12
"""A shorter line of a start script is no secret."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PRIVATE = re.compile(
    r"""(?ix) ( \b(?:bearer|basic)\s+ (?=[^\s"'<>,;]{16}) |
    (?:authorization|token|api_?key|jupyter_url|private_key|password|image_login|result_url)
    ["']?\s*[:=]\s*["']?(?:(?:bearer|basic)\s+)? )
    [^\s"'<>,;&]+"""
)
Outcome = Literal["ok", "not_sent", "limited", "refused", "moved", "unclear"]
"""What is known of a call.

ok: done, with JSON. not_sent: surely nothing was sent. limited: asked too often (429, or never our turn), not done.
refused: the provider says no, in its own form. moved: a redirect, not followed. unclear: it may have been done, or not.
"""


@dataclass(frozen=True)
class Complaint:
    """What a provider says is wrong, as its own file reads it."""

    code: str
    message: str
    unclear: bool = False
    """It does not say whether the thing was done: an inner error, an answer without what was asked for."""
    limited: bool = False
    """It was asked too often, and nothing was done, whatever the status says."""


@dataclass(frozen=True)
class Api:
    """How one cloud is spoken to, with one account's key."""

    provider: str
    title: str
    base: str
    """The address that paths are put after."""
    key: str = field(repr=False)
    complaint: Callable[[int, Any], Complaint | None] = field(repr=False)
    """Reads a status and a JSON document; None when nothing in it is a complaint."""
    every_s: float = 1.0


@dataclass(frozen=True)
class Call:
    """One thing to ask."""

    method: str
    path: str
    """Below the base, with a slash; what stands in it from outside is quoted."""
    body: Any = field(default=None, repr=False)
    query: dict[str, str] = field(default_factory=dict)
    read_s: float = READ_S
    lane: Lane | None = None
    """Its own pace, beside that of all calls."""
    final_codes: tuple[str, ...] = ()
    """Codes after which it is not asked again, whatever the status says."""
    final_statuses: tuple[int, ...] = ()
    """The same for statuses."""
    needs: str = ""
    """What a document must have that says all is well; one without it says nothing."""
    private: str = field(default="", repr=False)
    """Text that is sent and whose lines are not to be shown when they come back."""


@dataclass(frozen=True)
class Reply:
    """What came of a call."""

    outcome: Outcome
    words: str
    """What happened, for people, without secrets."""
    status: int | None = None
    code: str = ""
    """The provider's own, empty when it gave none."""
    document: Any = field(default=None, repr=False)
    """The JSON of the answer, which may hold secrets."""
    retry_after_s: float | None = None


class Client:
    """Speaks JSON with one cloud, as one account. Printing it shows no key."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._account = pace.account(api.provider, api.key)
        self._host = _checked(api)
        self.skew_s: float | None = None
        """By how much the provider's clock was ahead of this computer's at its last answer; None: it never said."""

    def __repr__(self) -> str:
        return f"Client({self._api.provider}, {self._host})"

    def once(self, call: Call) -> Reply:
        """Ask exactly once, in turn: for what spends money."""
        from orchestrator.providers import exchange

        lanes = [Lane("any", self._api.every_s), *([call.lane] if call.lane else [])]
        if not pace.take_turn(self._account, *lanes):
            return Reply("limited", "other commands of yours use the same key all the time")
        answer = exchange.exchange(self._request(call))
        if isinstance(answer, exchange.Failure):
            words = f"{self._host}: {answer.words}"
            return Reply("unclear" if answer.sent else "not_sent", words)
        if (told := _moment(answer.headers.get("Date"))) is not None:
            self.skew_s = told - clock.timestamp()
        return self._judged(answer, call)

    def repeat(self, call: Call) -> Reply:
        """Ask up to six times, until the answer says what is: for reads, and what may be done twice."""
        return self._repeat(call, ("not_sent", "limited", "unclear"))

    def until_sent(self, call: Call) -> Reply:
        """Ask up to six times while surely nothing was done: for what must not be done twice, but costs nothing."""
        return self._repeat(call, ("not_sent", "limited"))

    def hide(self, text: str, private: str = "") -> str:
        """The text on one line of at most 300 signs, without control signs, the key in any usual form, and secrets."""
        lines = [line.strip() for line in private.splitlines() if len(line.strip()) >= _LINE_MIN]
        secrets = [form for value in (self._api.key, *lines) for form in _forms(value)]
        shown = " ".join(keys.masked(plain(text), more=secrets).split())
        shown = _PRIVATE.sub(rf"\1{keys.MASK}", shown).encode("utf-8", "replace").decode()
        return shown if len(shown) <= _WORDS_MAX else f"{shown[:_WORDS_MAX]}…"

    def _repeat(self, call: Call, outcomes: tuple[Outcome, ...]) -> Reply:
        import tenacity

        deadline = clock.monotonic() + _REPEAT_MAX_S

        def again(reply: Reply) -> bool:
            late = (reply.retry_after_s or 0) > _RETRY_AFTER_MAX_S or clock.monotonic() > deadline
            final = reply.code in call.final_codes or reply.status in call.final_statuses
            return reply.outcome in outcomes and not final and not late

        retrying = tenacity.Retrying(
            sleep=clock.sleep,
            retry=tenacity.retry_if_result(again),
            wait=_wait_s,
            stop=tenacity.stop_after_attempt(TRIES),
            retry_error_callback=_last,
        )
        return retrying(self.once, call)

    def _request(self, call: Call) -> exchange.Request:
        from orchestrator.providers import exchange

        body = None if call.body is None else json.dumps(call.body, allow_nan=False).encode()
        headers = {"Accept": "application/json", "User-Agent": f"gpu-cli/{importlib.metadata.version('gpu')}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        address = self._api.base + call.path
        direct = self._host in _LOOPBACK
        return exchange.Request(call.method, address, self._api.key, headers, call.query, body, call.read_s, direct)

    def _judged(self, answer: exchange.Answer, call: Call) -> Reply:
        document, form = _parsed(answer.body)
        complaint = None if form else self._api.complaint(answer.status, document) or _lack(answer, document, call)
        words = f"HTTP {answer.status}"
        if form:
            words += f", {form}"
        elif complaint:
            words += f", {complaint.message}" + (f" ({complaint.code})" if complaint.code else "")
        wait_s = _retry_after_s(answer.headers.get("Retry-After"))
        words = self.hide(words, call.private) + (f"; it asks to wait {wait_s:.0f} s" if wait_s is not None else "")
        outcome = _outcome(answer.status, bool(form), complaint)
        code = self.hide(complaint.code) if complaint else ""
        return Reply(outcome, words, answer.status, code, document, wait_s)


def _lack(answer: exchange.Answer, document: Any, call: Call) -> Complaint | None:
    """The complaint of ours about a good answer that has not what was asked for; None when there is none."""
    if answer.status >= 300 or not call.needs or (isinstance(document, dict) and call.needs in document):
        return None
    return Complaint("", f"an answer without {call.needs}", unclear=True)


def _outcome(status: int, is_formless: bool, complaint: Complaint | None) -> Outcome:
    """What an answer means; by the status alone where bodies are known to come in any form."""
    if status == 429 or (complaint is not None and complaint.limited):
        return "limited"
    if status == 401:
        return "refused"
    if 300 <= status < 400:
        return "moved"
    if is_formless or status == 408 or not 200 <= status < 500:
        return "unclear"
    if complaint is None:
        return "ok" if status < 300 else "unclear"
    return "unclear" if complaint.unclear else "refused"


def _parsed(body: bytes | None) -> tuple[Any, str]:
    """The JSON document of an answer and an empty text, or None and what the answer is instead."""
    if body is None:
        return None, "an answer that is too long or too slow"
    if not body.strip():
        return None, "an empty answer"
    try:
        return json.loads(body, parse_constant=_no_number), ""
    except (ValueError, RecursionError):
        pass
    if b"<html" in body[:4096].lower() or body.lstrip()[:1] == b"<":
        return None, "an HTML page"
    if len(body) > _QUOTED_MAX_BYTES:  # no message; and it is never cut here: half a secret would not be masked
        return None, "no JSON"
    return None, f"no JSON: {body.decode('utf-8', 'replace')}"


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)  # NaN and the infinities are not JSON, and no price


def _forms(value: str) -> set[str]:
    """The forms in which a secret may come back."""
    encoded = {base64.b64encode(text.encode()).decode() for text in (value, f"{value}:")}
    return {value, json.dumps(value)[1:-1], html.escape(value), urllib.parse.quote(value, safe=""), *encoded}


def _retry_after_s(text: str | None) -> float | None:
    """Seconds to wait, from a number or a date; None when there is none that makes sense."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text.strip()):
        return float(text)
    told = _moment(text)
    return None if told is None else max(told - clock.timestamp(), 0.0)


def _moment(text: str | None) -> float | None:
    """Seconds since 1970 of an HTTP date; None when it is none."""
    try:
        return email.utils.parsedate_to_datetime(text or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def _wait_s(state: tenacity.RetryCallState) -> float:
    """How long to wait after an answer: as the provider asks, else ever longer, and never all callers alike."""
    reply: Reply = _last(state)
    doubled = 2.0 ** (state.attempt_number - 1)
    spread = random.uniform(1.0, 1.5)  # noqa: S311 -- no secret
    if reply.retry_after_s is not None:
        return max(reply.retry_after_s, 1.0) + spread - 1
    return min(60.0, 2 * doubled * spread) if reply.outcome == "limited" else min(8.0, doubled / 2 * spread)


def _last(state: tenacity.RetryCallState) -> Reply:
    assert state.outcome is not None
    reply: Reply = state.outcome.result()
    return reply


def _checked(api: Api) -> str:
    """The host of the address; ConfigError when the key must not be sent there."""
    try:
        parts = urllib.parse.urlsplit(api.base)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host, parts = "", urllib.parse.urlsplit("")
    sound = parts.scheme == "https" or (parts.scheme == "http" and host in _LOOPBACK)
    if not host or not sound or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"The address of {api.title} is set to something that is no https:// address. The key was not sent.",
            f"Take it out of the environment: unset GPU_{api.provider.upper()}_URL",
        )
    return host

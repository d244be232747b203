"""The machine this runs on as its provider sees it: found by its marker, never by a guess, and ended by request."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MARKER = re.compile(r"gpu-[0-9]{8}t[0-9]{6}-[0-9a-f]{12}")
"""The form of every marker: a name that nobody gives by chance."""
MARKER_TAG = "gpu-marker"
KEY = re.compile(r"[!-~]{1,1024}")
"""What can be an account key: one word, so that it can stand in a header without an error that shows it."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_CODE = re.compile(r"[a-z0-9/_-]{1,64}")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ANSWER_MAX_BYTES = 8 << 20
_RETRY_AFTER_MAX_S = 600.0
_GONE = ("terminated",)


class Trouble(Exception):
    """What was asked of the provider was not done; the words are ours and hold no secret."""

    def __init__(self, words: str, wait_s: float = 0.0) -> None:
        super().__init__(words)
        self.wait_s = wait_s
        """How long the provider wants to be left alone."""


@dataclass(frozen=True)
class Found:
    """This machine in the provider's list."""

    instance_id: str
    state: str
    at: float | None
    """The provider's own time of the answer, seconds since 1970."""


@dataclass(frozen=True)
class Account:
    """Where the provider is asked, and by what right."""

    api_url: str
    key: str = field(repr=False)
    marker: str
    call_s: float = 60.0
    """A call that takes longer, whatever it does, is given up."""

    def __post_init__(self) -> None:
        """Raise ValueError, without the key, for what must not be used."""
        where = urlsplit(self.api_url)
        if where.scheme != "https" and not (where.scheme == "http" and where.hostname in _LOOPBACK):
            raise ValueError("the API's address must begin with https://")
        if not KEY.fullmatch(self.key):
            raise ValueError("the account key cannot be one: it must be one word of plain signs")
        if not MARKER.fullmatch(self.marker):
            raise ValueError("the marker is none of ours")

    def find(self) -> Found:
        """The one instance that bears the marker; Trouble when none does, or several, or the answer is none."""
        document, at = self._ask("GET", "/instances")
        listed = document.get("data")
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise Trouble("the provider's list of instances is none")
        own = [each for each in listed if each.get("status") not in _GONE and _marker(each) == self.marker]
        if len(own) != 1:
            raise Trouble(f"{len(own)} instances bear this machine's marker {self.marker}: none is ended by a guess")
        instance_id = own[0].get("id")
        if not isinstance(instance_id, str) or not _ID.fullmatch(instance_id):
            raise Trouble("the provider's list names this machine without an id")
        return Found(instance_id, str(own[0].get("status"))[:40], at)

    def terminate(self, found: Found) -> None:
        """Ask for the end of this machine; Trouble when that was not accepted."""
        self._ask("POST", "/instance-operations/terminate", {"instance_ids": [found.instance_id]})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[dict[str, Any], float | None]:
        """The JSON object a call answers with, and the time the provider gives; Trouble for everything else."""
        where = urlsplit(self.api_url)
        kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
        headers = {"Authorization": f"Bearer {self.key}", "Accept": "application/json", "User-Agent": "gpu-guard/1"}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        try:
            with (
                _alarm(self.call_s),
                contextlib.closing(kind(str(where.hostname), where.port, timeout=self.call_s)) as it,
            ):
                it.request(method, where.path.rstrip("/") + path, data, headers)
                answer = it.getresponse()  # redirects are not followed: the key goes nowhere else
                said = answer.read(_ANSWER_MAX_BYTES)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Trouble(f"the provider did not answer ({type(error).__name__})") from None
        document = _object(said)
        if answer.status != 200:
            raise _refusal(answer.status, document, answer.headers.get("Retry-After"))
        if document is None:
            raise Trouble("the provider answered with something else than JSON")
        return document, _date(answer.headers.get("Date"))


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so long: one that is sent a byte now and then never runs into its own."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _object(said: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(said)
        if isinstance(document, dict):
            return document
    return None


def _refusal(status: int, document: dict[str, Any] | None, retry_after: str | None) -> Trouble:
    """A refusal in our words: the status and, if it is a plain one, the code; never text of theirs."""
    error = (document or {}).get("error")
    code = error.get("code") if isinstance(error, dict) else None
    words = f"the provider refused: HTTP {status}"
    if isinstance(code, str) and _CODE.fullmatch(code):
        words += f" {code}"
    if status in (401, 403):
        words += "; with this key the guard cannot end the machine"
    is_number = retry_after is not None and re.fullmatch(r"[0-9]{1,6}", retry_after)
    return Trouble(words, min(float(retry_after or 0), _RETRY_AFTER_MAX_S) if is_number else 0.0)


def _marker(instance: dict[str, Any]) -> str | None:
    """The marker an instance bears: in the tag where there is one, for a name can be changed on a dashboard."""
    tags = instance.get("tags")
    listed = [tag for tag in tags if isinstance(tag, dict)] if isinstance(tags, list) else []
    texts = [tag.get("value") for tag in listed if tag.get("key") == MARKER_TAG] + [instance.get("name")]
    return next((text for text in texts if isinstance(text, str) and MARKER.fullmatch(text)), None)


def _date(text: str | None) -> float | None:
    """The moment an HTTP date names; None when it names none."""
    with contextlib.suppress(TypeError, ValueError, IndexError):
        return email.utils.parsedate_to_datetime(text).timestamp() if text else None
    return None

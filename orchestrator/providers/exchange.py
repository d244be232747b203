"""One HTTP exchange on a connection of its own, and what surely did or did not happen when it fails."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field

import requests
import urllib3

from orchestrator import clock

CONNECT_S = 10.0
_BODY_MAX_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Request:
    """What is sent. Its body may hold secrets, and its key is one."""

    method: str
    url: str
    key: str | None = field(repr=False)
    """None: it is sent as nobody's."""
    headers: dict[str, str] = field(repr=False)
    query: dict[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)
    read_s: float = 30.0
    """How long the answer may take to begin, and again how long it may pause; it may last twice that."""
    direct: bool = False
    """Past any proxy: for this computer."""
    body_max_bytes: int | None = None
    """Of the answer; None: as much as a document may have."""


@dataclass(frozen=True)
class Answer:
    """What came back, whatever it says."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(repr=False)
    """None: it was too long, or came too slowly."""


@dataclass(frozen=True)
class Failure:
    """No whole answer came back."""

    sent: bool
    """False only when surely nothing of the request reached the provider."""
    words: str


class _Session(requests.Session):
    """Never looks where a redirect leads: even a malformed one is just an answer."""

    def get_redirect_target(self, resp: requests.Response) -> None:  # noqa: ARG002 -- as requests calls it
        return None


def exchange(request: Request) -> Answer | Failure:
    """Send a request once and read its answer; nothing is sent again, and no redirect is followed.

    Each has its own connection: one kept open that the provider has closed would make it unclear what was received.
    """
    try:
        return _exchange(request)
    except (OSError, urllib3.exceptions.HTTPError) as error:  # every error of requests is an OSError
        return _failure(error, request.read_s)


def _exchange(request: Request) -> Answer:
    def sign(prepared: requests.PreparedRequest) -> requests.PreparedRequest:
        if request.key is not None:
            prepared.headers["Authorization"] = f"Bearer {request.key}"
        return prepared

    deadline = clock.monotonic() + 2 * request.read_s
    with _Session() as session:
        session.trust_env = not request.direct
        with session.request(
            request.method,
            request.url,
            params=request.query,
            data=request.body,
            headers=request.headers,
            auth=sign,  # always: without one a .netrc would add its own, or replace a mere header
            timeout=(CONNECT_S, request.read_s),
            allow_redirects=False,
            stream=True,
        ) as answer:
            return Answer(
                answer.status_code, answer.headers, _body(answer, deadline, request.body_max_bytes or _BODY_MAX_BYTES)
            )


def _body(answer: requests.Response, deadline: float, max_bytes: int) -> bytes | None:
    """The whole body, read as it comes: waiting for full pieces, a slow one could last for hours."""
    pieces, size = [], 0
    while piece := answer.raw.read1(_CHUNK_BYTES, decode_content=True):
        size += len(piece)
        if size > max_bytes or clock.monotonic() > deadline:
            return None
        pieces.append(piece)
    return b"".join(pieces)


def _failure(error: Exception, read_s: float) -> Failure:
    """What an error of requests means; its own text, which may hold anything, is not used."""
    reason = error.args[0] if error.args else None
    reason = getattr(reason, "reason", None) or reason  # requests wraps what urllib3 wraps
    if words := _why_not_sent(error, reason):
        return Failure(False, words)
    if isinstance(error, requests.ReadTimeout) or isinstance(reason, urllib3.exceptions.ReadTimeoutError):
        return Failure(True, f"no answer within {read_s:g} s")
    return Failure(True, "the connection broke before the answer was whole")


def _why_not_sent(error: Exception, reason: object) -> str | None:
    """Why nothing can have been sent; None when something may have been."""
    known = urllib3.exceptions
    if isinstance(reason, known.NameResolutionError):
        return "its name cannot be looked up"
    if isinstance(reason, known.ProxyError):  # raised only before there is a way through the proxy
        return "the proxy does not lead there"
    if isinstance(reason, known.NewConnectionError):
        number = getattr(reason.__cause__, "errno", None)
        return f"no connection: {os.strerror(number).lower() if number else 'unknown reason'}"
    if isinstance(reason, known.ConnectTimeoutError):
        return f"no connection within {CONNECT_S:g} s"
    if any(isinstance(part, ssl.SSLCertVerificationError) for part in getattr(reason, "args", ())):
        return "its certificate is not one this computer trusts"
    return "its address is not a web address" if isinstance(error, requests.exceptions.InvalidURL) else None

"""The stand-in for `requests` without sockets, for thousands of runs: what a real connection would raise is raised."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import (
    ConnectTimeoutError,
    IncompleteRead,
    MaxRetryError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
)

from tests.cloud.answers import Answer, Closed, CutShort, Hangs, NotSent
from tests.cloud.core import Core


class CloudAdapter(BaseAdapter):
    """For `session.mount(URL, CloudAdapter(core))`: what lies below `/api` or `/results` of any host is the core's."""

    def __init__(self, core: Core, sleep: Callable[[float], None] | None = None) -> None:
        """`sleep` passes the time that a client would wait for an answer which does not come; left out: none passes."""
        super().__init__()
        self.core = core
        self.sleep = sleep or (lambda seconds: None)
        self._pool = urllib3.HTTPConnectionPool("127.0.0.1", 80)

    def send(self, request: requests.PreparedRequest, *_: Any, timeout: Any = None, **__: Any) -> requests.Response:
        """The core's answer; requests.ConnectionError and its kin before or after the effect, as the fault has it."""
        parts = urlsplit(request.url or "")
        began = [at for at in (parts.path.find(word) for word in ("/api/", "/results/")) if at >= 0]
        path = parts.path[min(began, default=0) :] + (f"?{parts.query}" if parts.query else "")
        body = request.body.encode() if isinstance(request.body, str) else bytes(request.body or b"")  # type: ignore[arg-type]
        connect_s, read_s = timeout if isinstance(timeout, tuple) else (timeout, timeout)
        try:
            answer = self.core.handle(request.method or "GET", path, dict(request.headers), body)
        except NotSent as reason:
            raise self._not_sent(connect_s if reason.is_silent else None, request) from None
        except Closed:
            raise requests.ConnectionError(_aborted(), request=request) from None
        except CutShort as short:
            length = len(short.answer.body)
            broken = ProtocolError("Connection broken", IncompleteRead(length // 2, length - length // 2))
            raise requests.exceptions.ChunkedEncodingError(broken, request=request) from None
        except Hangs as hangs:
            raise self._hung(hangs.seconds, read_s, request) from None
        return _response(answer, request, self)

    def close(self) -> None:
        """Nothing is open."""

    def _not_sent(self, silent_s: float | None, request: requests.PreparedRequest) -> requests.ConnectionError:
        """No connection: refused, or after `silent_s` given up."""
        if silent_s is None:
            reason: Exception = NewConnectionError(self._pool, "[Errno 111] Connection refused")  # type: ignore[arg-type]
            return requests.ConnectionError(MaxRetryError(self._pool, request.url or "", reason), request=request)
        self.sleep(silent_s)
        reason = ConnectTimeoutError(self._pool, f"Connection timed out. (connect timeout={silent_s})")
        return requests.ConnectTimeout(MaxRetryError(self._pool, request.url or "", reason), request=request)

    def _hung(
        self, seconds: float, read_s: float | None, request: requests.PreparedRequest
    ) -> requests.RequestException:
        """A read time-out, or where the server gives up first, an end without an answer."""
        if read_s is None or read_s > seconds:
            self.sleep(seconds)
            return requests.ConnectionError(_aborted(), request=request)
        self.sleep(read_s)
        text = f"Read timed out. (read timeout={read_s})"
        return requests.ReadTimeout(ReadTimeoutError(self._pool, request.url or "", text), request=request)


def _aborted() -> ProtocolError:
    from http.client import RemoteDisconnected

    return ProtocolError("Connection aborted.", RemoteDisconnected("Remote end closed connection without response"))


def _response(answer: Answer, request: requests.PreparedRequest, adapter: BaseAdapter) -> requests.Response:
    response = requests.Response()
    response.status_code = answer.status
    response.headers = CaseInsensitiveDict(answer.headers)
    response.encoding = requests.utils.get_encoding_from_headers(response.headers)
    response.raw = urllib3.HTTPResponse(io.BytesIO(answer.body), answer.headers, answer.status, preload_content=False)
    response.reason = response.raw.reason
    response.url = request.url or ""
    response.request = request
    response.connection = adapter  # type: ignore[attr-defined]
    return response

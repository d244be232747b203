"""A server that speaks OpenAI's API, as its client sees it: one request at a time, and what each failure means."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from jobs import engines
from worker.failures import ConfigFailure

ANSWER_MAX_BYTES = 16 << 20
RETRY_AFTER_MAX_S = 300.0
_CONNECT_S = 10.0
_CHUNK_BYTES = 1 << 16
_REASON_CHARACTERS = 300
_AGAIN = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may be sent again."""
_HINTS = {
    401: f"Set {engines.KEY_VARIABLE} to a key of that server, then resume the run.",
    403: f"The key in {engines.KEY_VARIABLE} has no right to this; set another, then resume the run.",
    404: "Check base_url (it mostly ends with /v1) and the name of the model there.",
    405: "Check base_url: what is there does not speak OpenAI's API.",
}
"""Statuses that every request would get, with what to do."""


class Again(Exception):
    """The request may be sent again, not before `after_s`; the message says what happened."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class Refused(Exception):
    """The server will not answer this one request, however often it is asked; the message says why."""


class Endpoint:
    """Where the server is, and the key. Each thread that asks has a connection of its own, which is kept."""

    def __init__(self, base_url: str, key: str, timeout_s: float) -> None:
        self._parts = urlsplit(base_url)
        self._path = self._parts.path.rstrip("/") or "/v1"
        self._key = key
        self._timeout_s = timeout_s
        self._own = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = False
        self._tls = ssl.create_default_context() if self._parts.scheme == "https" else None

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object answered with 200. Raises Again, Refused, or ConfigFailure for what no request can mend.

        A redirect is followed nowhere: the key and the prompts are for this server alone.
        """
        connection = self._connection()
        try:
            status, headers, data = self._exchange(connection, path, json.dumps(body).encode())
        except (OSError, http.client.HTTPException) as error:
            self._drop(connection)
            raise Again(f"{type(error).__name__}: {error}") from None
        if status == http.HTTPStatus.OK:
            return _object(data)
        raise self._failure(status, headers, data)

    def close(self) -> None:
        """Let go of every connection, once nobody asks any more."""
        for connection in self._open:
            connection.close()

    def break_off(self) -> None:
        """End every exchange that goes on, in whatever thread: it raises Again there, and so does any other."""
        self._closed = True
        for connection in list(self._open):
            if connection.sock is not None:
                _shut(connection.sock)

    def _connection(self) -> http.client.HTTPConnection:
        found: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if found is None:
            host, port = self._parts.hostname or "", self._parts.port
            timeout_s = min(_CONNECT_S, self._timeout_s)
            if self._tls is None:
                found = http.client.HTTPConnection(host, port, timeout=timeout_s)
            else:
                found = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._tls)
            self._own.connection = found
            self._open.add(found)
        return found

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        self._open.discard(connection)
        self._own.connection = None

    def _exchange(
        self, connection: http.client.HTTPConnection, path: str, body: bytes
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of one exchange; TimeoutError when the whole of it takes too long."""
        deadline = time.monotonic() + self._timeout_s
        if connection.sock is None:
            connection.connect()
        if self._closed:
            raise OSError("closed here")
        connection.sock.settimeout(self._timeout_s)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.request("POST", f"{self._path}{path}", body, headers)
        answer = connection.getresponse()
        data = b""
        while chunk := answer.read1(_CHUNK_BYTES):
            data += chunk
            if len(data) > ANSWER_MAX_BYTES:
                raise OSError(f"an answer of more than {ANSWER_MAX_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise TimeoutError("timed out")
        answer.read()  # nothing is left; only this says to http.client that the connection is free again
        return answer.status, answer.headers, data

    def _failure(self, status: int, headers: http.client.HTTPMessage, data: bytes) -> Exception:
        reason = f"HTTP {status}: {self._reason(data)}"
        if 300 <= status < 400:
            return ConfigFailure(
                f"The server at {self._where} redirects to somewhere else, which is not followed ({status}).",
                "Set base_url to where it really is.",
            )
        if status >= 500 or status in _AGAIN:
            return Again(reason, _retry_after_s(headers))
        if status in _HINTS:
            return ConfigFailure(
                f"The server at {self._where} refused: {reason}. Rows so far are kept.", _HINTS[status]
            )
        return Refused(reason)

    @property
    def _where(self) -> str:
        return f"{self._parts.scheme}://{self._parts.netloc}{self._path}"

    def _reason(self, data: bytes) -> str:
        """What the server says went wrong, without the key, should it say that."""
        text = data.decode("utf-8", "replace")
        try:
            said = json.loads(text)
            error = said.get("error", said) if isinstance(said, dict) else said
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except ValueError:
            pass
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:_REASON_CHARACTERS] or "no reason given"


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Again("the answer is no JSON object")
    return found


def _retry_after_s(headers: http.client.HTTPMessage) -> float:
    """How long the server asks to be left alone: seconds, or a date (RFC 9110, 10.2.3); 0 when it does not say."""
    said = headers.get("Retry-After", "").strip()
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_S)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)

"""What the stand-in says over HTTP: answers, the table of error codes, and answers that never arrive."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

Json = dict[str, Any]

_TABLE: dict[str, tuple[int, str, str | None]] = {
    "global/invalid-api-key": (
        401,
        "API key was invalid, expired, or deleted.",
        "Check your API key or create a new one, then try again.",
    ),
    "global/account-inactive": (
        403,
        "Your account is inactive.",
        "Make sure you have verified your email address and have a valid payment method. "
        "Contact Support if problems continue.",
    ),
    "global/invalid-address": (
        403,
        "Your billing address is invalid.",
        "Make sure your billing address is valid. Contact Support if problems continue.",
    ),
    "global/forbidden": (403, "You may not do this.", None),
    "global/invalid-parameters": (400, "Invalid request data.", None),
    "global/object-does-not-exist": (404, "Specified instance does not exist.", None),
    "global/not-found": (404, "The requested resource was not found.", None),
    "global/quota-exceeded": (400, "Quota exceeded.", "Contact Support to increase your quota."),
    "global/duplicate": (400, "A filesystem of this name exists already.", None),
    "global/conflict": (409, "The request conflicts with the current state of the resource.", None),
    "global/internal-error": (
        500,
        "An internal server error occurred.",
        "Try again later. Contact Support if the problem persists.",
    ),
    "global/unknown": (400, "An unknown error occurred.", None),
    "instance-operations/launch/insufficient-capacity": (
        400,
        "Not enough capacity to fulfill launch request.",
        "Choose an instance type with more availability, or try again later.",
    ),
    "instance-operations/launch/file-system-in-wrong-region": (400, "The filesystem is in another region.", None),
    "ssh-keys/key-in-use": (400, "The SSH key is in use.", None),
    "filesystems/filesystem-in-use": (400, "The filesystem is in use by an instance.", None),
    "provider/internal-unavailable": (500, "Provider unavailable", "Try again shortly"),
}
"""code: HTTP status, message, suggestion; from the published specification, and from what third parties saw."""
PROXY_PAGE = b"<!DOCTYPE html>\n<html><head><title>%s</title></head><body><h1>%s</h1><hr>cloudflare</body></html>\n"


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes


class Failure(Exception):
    """An error as the provider reports it."""

    def __init__(self, code: str, message: str | None = None, *, status: int | None = None) -> None:
        self.code = code
        usual, text, self.suggestion = _TABLE[code]
        self.status = status or usual
        self.message = message or text
        super().__init__(code, self.message)

    def answer(self) -> Answer:
        """This error in its envelope."""
        error = {"code": self.code, "message": self.message}
        # an error about a launch's objects has a suggestion by the specification, that of an instance need not
        suggestion = self.suggestion or ("Check what you named." if self.message != _TABLE[self.code][1] else None)
        return as_json(self.status, {"error": error | ({"suggestion": suggestion} if suggestion else {})})


class Unanswered(Exception):
    """No answer comes: what the client sees of the connection instead."""


class NotSent(Unanswered):
    """The request never reaches the provider: nothing happens there."""

    def __init__(self, is_silent: bool = False) -> None:
        super().__init__(is_silent)
        self.is_silent = is_silent
        """Whether the connection is not even refused: the client waits for it in vain."""


class Closed(Unanswered):
    """The provider ends the connection without an answer."""


class Hangs(Unanswered):
    """The provider keeps the connection and says nothing for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class CutShort(Unanswered):
    """The answer ends in the middle of its body."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def as_json(status: int, content: Any) -> Answer:
    """An answer of JSON."""
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(content).encode())


def as_page(status: int, title: str) -> Answer:
    """An answer of HTML, as a proxy before the provider gives it."""
    return Answer(status, {"Content-Type": "text/html; charset=UTF-8"}, PROXY_PAGE % ((title.encode(),) * 2))


def parsed(body: bytes) -> Json:
    """The JSON object a request brings; Failure when it is none."""
    try:
        content = json.loads(body)
    except ValueError:
        raise Failure("global/invalid-parameters", "The request body is not JSON.") from None
    if not isinstance(content, dict):
        raise Failure("global/invalid-parameters", "The request body is not an object.")
    return content


def need_text(content: Mapping[str, Any], name: str, pattern: str = r"(?s).+") -> str:
    """A required text of a request; Failure that names it when it is absent or another thing."""
    if name not in content:
        raise Failure("global/invalid-parameters", f"{name}: Field required")
    return checked_text(content[name], name, pattern)


def checked_text(value: Any, name: str, pattern: str) -> str:
    """A text of a request; Failure that names it when it is none or does not match the pattern."""
    if not isinstance(value, str):
        raise Failure("global/invalid-parameters", f"{name}: Input should be a valid string")
    if not re.fullmatch(pattern, value):
        raise Failure("global/invalid-parameters", f"{name}: String should match pattern '{pattern}'")
    return value


def need_list(content: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """A required list of a request; Failure that names it when it is absent or holds other things."""
    if name not in content:
        raise Failure("global/invalid-parameters", f"{name}: Field required")
    found = content[name]
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise Failure("global/invalid-parameters", f"{name}: Input should be a valid list")
    return found

"""What the stand-in for Vast says when it refuses: its error codes, and the forms that its errors come in."""

from __future__ import annotations

import json
from typing import Any

from tests.cloud.answers import Answer, Failure, Json, as_json, as_page
from tests.cloud.faults import Fault

_TABLE: dict[str, tuple[int, str]] = {
    "auth_error": (404, "Invalid user key"),
    "not_authorized": (403, "This key may not do this."),
    "invalid_args": (400, "Invalid args"),
    "invalid_request": (400, "Invalid json body"),
    "invalid_query": (400, "Invalid query"),
    "invalid_token": (400, "Invalid after_token"),
    "invalid_id": (404, "Invalid instance id."),
    "invalid_price": (400, "error 400/3484: invalid_price Your bid is too low."),
    "invalid_container": (400, "Invalid container."),
    "invalid_container_id": (400, "Invalid container id."),
    "no_such_ask": (410, "no_such_ask"),
    "no_such_instance": (404, "Instance with that ID does not exist."),
    "not_found": (404, "Instance not found"),
    "no_such_user": (404, "No such user."),
    "no_such_volume": (404, "Volume with that ID does not exist."),
    "no_ssh_key": (400, "No ssh key provided"),
    "no_such_ssh_key": (404, "SSH key not found."),
    "no_ssh_key_for_vm": (400, "A VM needs an ssh key in the account before it is made."),
    "team_ssh_keys_not_supported": (400, "Team keys cannot add ssh keys to the account."),
    "missing_billing": (403, "Add a way to pay first."),
    "insufficient_credit": (400, "Your account lacks credit; see the billing page."),
    "spend_rate_limit": (400, "New accounts may not spend that much in an hour."),
    "label_too_long": (400, "The label is too long."),
    "rate_limit_exceeded": (429, "API requests too frequent endpoint threshold=3.0"),
    "search_quota_exceeded": (429, "Daily search quota exceeded"),
    "server_error": (500, "Internal server error"),
}
"""code: HTTP status and msg, from the published specification and from what third parties saw."""
UNAVAILABLE = "Required resources are currently unavailable, state change queued."


class Refused(Failure):
    """An error as Vast reports it."""

    def __init__(self, error: str, msg: str | None = None, *, status: int | None = None, **more: Any) -> None:
        usual, text = _TABLE[error]
        self.status = status or usual
        self.content: Json = {"success": False, "error": error, "msg": msg or text, **more}
        Exception.__init__(self, error, msg)

    def answer(self) -> Answer:
        """This error as JSON."""
        return as_json(self.status, self.content)


def limited(threshold_s: float) -> Answer:
    """Too many requests, as most endpoints say it."""
    return as_json(429, {"detail": f"API requests too frequent endpoint threshold={threshold_s}"})


def no_such_ask(ask_id: int, status: int = 404) -> Refused:
    """The offer is gone; with which status depends."""
    words = {
        404: ("invalid_args", f"error 404/3603: no_such_ask Instance type by id {ask_id} is not available."),
        410: ("no_such_ask", f"error 410/3907: no_such_ask Instance type {ask_id} is no longer available."),
        400: ("invalid_args", f"error 400/3603: no_such_ask Instance type by id {ask_id} is not available."),
    }
    return Refused(*words[status], status=status, ask_id=ask_id)


def refusal(fault: Fault, now: float) -> Answer:
    """What Vast says for a fault that has it say something of its own."""
    match fault.what:
        case "rate-limited-json":
            answer = Refused("rate_limit_exceeded").answer()
            return answer._replace(headers=answer.headers | fault.retry_after)
        case "rate-limited-detail":
            answer = limited(4.5)
            return answer._replace(headers=answer.headers | fault.retry_after)
        case "rate-limited-text":
            text = b"API requests too frequent: endpoint threshold=4.5"
            return Answer(429, {"Content-Type": "text/plain"} | fault.retry_after, text)
        case "search-quota":
            answer = Refused("search_quota_exceeded").answer()
            at = int(now + (3600 if fault.detail is None else fault.detail))
            return answer._replace(headers=answer.headers | {"X-RateLimit-Reset": str(at)})
        case "success-false":
            return as_json(200, {"success": False, "msg": fault.detail or "Something went wrong."})
        case "msg-only":
            return as_json(fault.detail or 400, {"msg": "Something went wrong."})
        case "plain-text":
            return Answer(fault.detail or 500, {"Content-Type": "text/plain"}, b"Internal Server Error")
        case "bad-key":
            return bad_key(fault.detail or 404)
        case "no-capacity":
            return no_such_ask(0, fault.detail or 404).answer()
        case "no-copy":
            return Refused("invalid_args", "Copying is not supported by this host.").answer()
    codes = {"inactive": "missing_billing", "quota": "spend_rate_limit", "no-credit": "insufficient_credit"}
    return Refused(codes.get(fault.what) or fault.detail or "server_error").answer()


def bad_key(how: int | str) -> Answer:
    """A key that is not accepted: 404 as third parties saw it, 401 as the documents say, or a page of HTML with 403."""
    if how == "page":
        return as_page(403, "Forbidden")
    return Refused("auth_error", status=int(how)).answer()


def null_data(answer: Answer) -> Answer:
    """The answer with null where its data should be."""
    content = json.loads(answer.body)
    if answer.status == 200 and "new_contract" in content:
        return as_json(200, content | {"new_contract": None})
    return as_json(200, None)

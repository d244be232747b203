"""What a failed call at Vast.ai means, for money first: who may still be paid, and what to type next."""

from __future__ import annotations

from orchestrator.errors import (
    AuthRejected,
    GpuError,
    LaunchUnknown,
    NoCapacity,
    NotReturned,
    ProviderDown,
    RateLimited,
    Refused,
)
from orchestrator.providers import vast_answers
from orchestrator.providers.client import Client, Reply

TITLE = "Vast.ai"
DASHBOARD = "https://cloud.vast.ai/instances/"
KEY_PAGE = "https://cloud.vast.ai/manage-keys/"
NOTHING = "Nothing was rented or changed by this."
_ADD_CREDIT = "Add credit: https://cloud.vast.ai/billing/"
_NEW_KEY = f"Make a new key at {KEY_PAGE}, then: gpu doctor"
_NOT_THE_KEY = (
    *("invalid_args", "invalid_request", "invalid_id", "invalid_query"),
    *(vast_answers.GONE_OFFER, vast_answers.BAD_PRICE, *vast_answers.NO_FUNDS, *vast_answers.ABSENT),
)
"""Codes of a 403 that speak of something else than the account key."""


def is_key_refused(reply: Reply) -> bool:
    """Whether it is the account key that is not accepted, whichever status that comes with: 404 is usual."""
    if reply.outcome != "refused":
        return False
    is_forbidden = reply.status == 403 and reply.code not in _NOT_THE_KEY
    return reply.code in vast_answers.KEY_REFUSED or reply.status == 401 or is_forbidden


def is_absent(reply: Reply) -> bool:
    """Whether it says, in its own form, that there is no such instance; a key it does not know is no such word."""
    return reply.outcome == "refused" and reply.status == 404 and reply.code in vast_answers.ABSENT


def said(reply: Reply) -> str:
    """What an answer says, in lower case, also where it says that all is well."""
    told = reply.document.get("msg") if isinstance(reply.document, dict) else None
    return f"{reply.words} {told if isinstance(told, str) else ''}".lower()


def error(client: Client, reply: Reply, doing: str) -> GpuError:
    """Why something that costs nothing could not be done."""
    words = _could_not(client, reply, doing)
    if is_key_refused(reply):
        text = f"{words} It does not accept the account key. Nothing was rented; what is rented goes on costing."
        return AuthRejected(text, _NEW_KEY)
    if reply.outcome == "refused":
        hint = _ADD_CREDIT if reply.code in vast_answers.NO_FUNDS else f"Look at the account: {DASHBOARD}"
        return Refused(f"{words} {NOTHING}", hint)
    if reply.outcome == "limited":
        is_quota = reply.code == vast_answers.QUOTA
        hint = "Today's searches are used up: again after midnight UTC." if is_quota else "Wait a minute, then again."
        return RateLimited(f"{words} It was asked too often. {NOTHING}", hint)
    if reply.outcome == "moved":
        return ProviderDown(f"{words} It points elsewhere, where the key is not sent. {NOTHING}")
    return ProviderDown(f"{words} {NOTHING}", "Check the network, then type it again.")


def launch_error(client: Client, reply: Reply, doing: str) -> GpuError:
    """Why there is no instance, or why that is not known."""
    if reply.outcome in ("ok", "unclear", "moved"):
        words = "its answer names no instance" if reply.outcome == "ok" else reply.words
        return LaunchUnknown(
            client.hide(f"{TITLE} was asked to {doing}: {words}")
            + ". A machine may have been rented, and cost money. It was asked once, and is not asked again.",
            f"Look for the marker: {DASHBOARD}. Have it mended: gpu audit --fix",
        )
    if reply.outcome == "refused" and (reply.code == vast_answers.GONE_OFFER or vast_answers.QUEUED in said(reply)):
        words = _could_not(client, reply, doing)
        return NoCapacity(f"{words} Somebody else has it. Nothing was rented.", "Others may be free: gpu offers")
    return error(client, reply, doing)


def bid_error(client: Client, reply: Reply, doing: str, floor_usd: float | None) -> Refused:
    """Why a bid was not taken, with the lowest one that is, where that is known."""
    least = (
        "The lowest bid that is taken is not told" if floor_usd is None else f"At least {floor_usd:.3f} USD/h is taken"
    )
    words = f"{_could_not(client, reply, doing)} {least} just now. Nothing was rented."
    return Refused(words, "Bid more, or look what is taken: gpu offers --spot")


def undo_error(client: Client, reply: Reply, doing: str, instance_id: str, why: str) -> LaunchUnknown:
    """An instance came of an answer that says no, and its end was not accepted."""
    words = client.hide(f"{TITLE} was asked to {doing}: {reply.words}")
    return LaunchUnknown(
        f"{words}. It made instance {instance_id} all the same, WHICH MAY COST MONEY: its end was not accepted. {why}",
        f"End it yourself, now: {DASHBOARD}. Or: gpu audit --fix",
    )


def end_error(client: Client, reply: Reply, instance_id: str) -> GpuError:
    """Why an instance may go on costing."""
    words = _could_not(client, reply, f"end instance {instance_id}")
    hint = f"End it yourself, now: {DASHBOARD}"
    if is_key_refused(reply):
        text = f"{words} INSTANCE {instance_id} MAY STILL BE RUNNING AND COSTING MONEY: the key is not accepted."
        return AuthRejected(text, f"{hint}. {_NEW_KEY}")
    if reply.outcome == "not_sent":
        return ProviderDown(f"{words} It was not reached; the instance is as it was and GOES ON COSTING.", hint)
    return NotReturned(f"{words} The instance may still be running and costing money.", hint)


def _could_not(client: Client, reply: Reply, doing: str) -> str:
    return client.hide(f"{TITLE} could not {doing}: {reply.words}").rstrip(".") + "."

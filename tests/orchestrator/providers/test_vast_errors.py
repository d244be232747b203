"""What every form of failure of Vast.ai becomes, for everything that is asked of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.errors import (
    AuthRejected,
    GpuError,
    LaunchUnknown,
    MayCost,
    NotReturned,
    ProviderDown,
    RateLimited,
    Refused,
)
from orchestrator.providers import client
from orchestrator.providers.base import Need
from orchestrator.providers.vast import VastCloud
from tests.orchestrator.providers.loopback import Scripted, Server, Time, closed_port
from tests.orchestrator.providers.playing_vast import (
    BAD_KEY,
    HOST_KEY,
    ID,
    LIMITED,
    MOVED,
    OFFER,
    ORDER,
    REFUSED,
    UNCLEAR,
    complaint,
)

Ask = Callable[[VastCloud], Any]
ASKS: dict[str, Ask] = {
    "offers": lambda cloud: cloud.offers(Need()),
    "get": lambda cloud: cloud.get(ID),
    "instances": lambda cloud: cloud.instances(),
    "storage": lambda cloud: cloud.storage(),
    "credit": lambda cloud: cloud.credit(),
    "check_key": lambda cloud: cloud.check_key(),
    "host_key": lambda cloud: cloud.host_key(ID),
    "stop": lambda cloud: cloud.stop(ID),
    "admit": lambda cloud: cloud.admit(ID, HOST_KEY),
}
"""What costs nothing and may be repeated."""
ABSENT = {
    "not_found": Scripted(404, complaint("not_found", "Instance not found")),
    "no_such_instance": Scripted(404, complaint("no_such_instance")),
    "in words": Scripted(404, complaint("invalid_args", "error 404/3500: no_such_instance 12345678")),
}
OUTCOMES: list[tuple[dict[str, Scripted], type[GpuError], int]] = [
    (BAD_KEY, AuthRejected, 1),
    (REFUSED, Refused, 1),
    (LIMITED, RateLimited, 2),
    (UNCLEAR, ProviderDown, 2),
    (MOVED, ProviderDown, 1),
]


@pytest.fixture
def _soon_tired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TRIES", 2)


@pytest.mark.usefixtures("_soon_tired")
@pytest.mark.parametrize(("forms", "becomes", "asked"), OUTCOMES, ids=["key", "refused", "limited", "unclear", "moved"])
@pytest.mark.parametrize("name", ASKS)
def test_what_fails_is_told_apart(
    vast: VastCloud, server: Server, name: str, forms: dict[str, Scripted], becomes: type[GpuError], asked: int
) -> None:
    """The key, a refusal, the pace and the network each have their error, in any form, and nothing was rented."""
    for form, answer in forms.items():
        if (name, answer.status) in (("storage", 404), ("host_key", 404)) and becomes is not AuthRejected:
            continue  # what has no volumes, or no log, says so with any 404
        server.asked.clear()
        server.usual = lambda _, answer=answer: answer
        with pytest.raises(becomes) as caught:
            ASKS[name](vast)
        assert type(caught.value) is becomes, form
        assert len(server.asked) == (1 if name == "check_key" else asked), form
        assert "othing was rented" in caught.value.message


@pytest.mark.parametrize("answer", BAD_KEY.values(), ids=BAD_KEY)
def test_a_refused_key_is_never_an_absence(vast: VastCloud, server: Server, answer: Scripted) -> None:
    """Vast.ai says 404 to a key it does not know: that is no instance that is gone, no empty list, no success."""
    server.usual = lambda _: answer
    with pytest.raises(AuthRejected):
        vast.get(ID)
    with pytest.raises(AuthRejected, match=f"INSTANCE {ID} MAY STILL BE RUNNING AND COSTING MONEY") as caught:
        vast.terminate(ID)
    assert "https://cloud.vast.ai/instances/" in caught.value.hint
    for ask in (vast.storage, vast.instances, lambda: vast.stop(ID), lambda: vast.host_key(ID)):
        with pytest.raises(AuthRejected):
            ask()


@pytest.mark.parametrize("answer", ABSENT.values(), ids=ABSENT)
def test_what_is_absent_by_its_own_word(vast: VastCloud, server: Server, answer: Scripted) -> None:
    """Its own 404 for an instance means: none, ended, stopped; to be let in or started is refused."""
    server.usual = lambda _: answer
    assert vast.get(ID) is None
    vast.terminate(ID)
    vast.stop(ID)
    assert vast.host_key(ID) is None
    for ask in (lambda: vast.admit(ID, HOST_KEY), lambda: vast.start(ID)):
        with pytest.raises(Refused):
            ask()


@pytest.mark.parametrize("status", [200, 400, 403, 410, 500])
@pytest.mark.parametrize("code", ["not_found", "no_such_instance"])
def test_absent_is_only_a_404(vast: VastCloud, server: Server, status: int, code: str) -> None:
    """The same word with another status proves nothing: it is an error, and an end is not claimed."""
    server.usual = lambda _: Scripted(status, complaint(code))
    with pytest.raises((ProviderDown, Refused)):
        vast.get(ID)
    with pytest.raises(NotReturned):
        vast.terminate(ID)


def test_an_end_that_is_accepted(vast: VastCloud, server: Server) -> None:
    """One DELETE with an empty document is the end of this instance, however it is said."""
    for body in ({"success": True}, {"success": True, "msg": "Instance destroyed successfully"}):
        server.asked.clear()
        server.usual = lambda _, body=body: Scripted(200, body)
        vast.terminate(ID)
        assert server.paths() == [f"DELETE /api/v0/instances/{ID}/"]
        assert server.asked[0].body == {}


@pytest.mark.parametrize(
    "answer", [*UNCLEAR.values(), *LIMITED.values()], ids=[*UNCLEAR, *(f"limited {name}" for name in LIMITED)]
)
def test_an_end_is_asked_for_again(vast: VastCloud, server: Server, answer: Scripted) -> None:
    """An end may be asked for twice: six times at most, three seconds apart; then the instance may still cost."""
    server.script = [answer, answer]
    server.usual = lambda _: Scripted(200, {"success": True})
    vast.terminate(ID)
    moments = [asked.at for asked in server.asked]
    assert len(moments) == 3
    assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(moments))
    server.asked.clear()
    server.usual = lambda _: answer
    with pytest.raises(NotReturned, match="may still be running") as caught:
        vast.terminate(ID)
    assert isinstance(caught.value, MayCost)
    assert ID in caught.value.message
    assert len(server.asked) == client.TRIES


@pytest.mark.parametrize("answer", REFUSED.values(), ids=REFUSED)
def test_an_end_that_is_refused_is_looked_after(vast: VastCloud, server: Server, answer: Scripted) -> None:
    """Refused is no end, unless a look shows that there is no such instance; a look that fails shows nothing."""
    looks: list[tuple[Scripted, bool]] = [
        (Scripted(200, {"instances": None}), True),
        (ABSENT["not_found"], True),
        (Scripted(200, {"instances": {"id": int(ID)}}), False),
        (BAD_KEY["404"], False),
        (Scripted(502, b""), False),
    ]
    for look, is_gone in looks:
        server.usual = lambda asked, look=look: answer if asked.method == "DELETE" else look
        if is_gone:
            vast.terminate(ID)
        else:
            with pytest.raises(NotReturned, match=ID):
                vast.terminate(ID)


def test_what_is_never_reached(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing listens nothing is rented, read or started, and an instance that should end goes on costing."""
    monkeypatch.setenv("GPU_VAST_URL", f"http://127.0.0.1:{closed_port()}")
    away = VastCloud("secret_k3y-Value.0123456789")
    for ask in (lambda: away.launch(OFFER, ORDER), lambda: away.offers(Need()), lambda: away.start(ID)):
        with pytest.raises(ProviderDown, match=r"connection refused.* Nothing was rented"):
            ask()
    with pytest.raises(ProviderDown, match="GOES ON COSTING") as caught:
        away.terminate(ID)
    assert ID in caught.value.message


def test_the_days_searches_are_not_tried_again(vast: VastCloud, server: Server) -> None:
    """When the quota of a day is used up one answer is enough, and it is said until when."""
    server.usual = lambda _: Scripted(429, complaint("search_quota_exceeded"), {"X-RateLimit-Reset": "1800086400"})
    with pytest.raises(RateLimited) as caught:
        vast.offers(Need())
    assert len(server.asked) == 1
    assert "midnight UTC" in caught.value.hint


def test_a_start_is_sent_once(vast: VastCloud, server: Server) -> None:
    """A start spends money: asked again only while surely nothing was done; with no clear answer it may be running."""
    for answer in UNCLEAR.values():
        server.asked.clear()
        server.usual = lambda _, answer=answer: answer
        with pytest.raises(LaunchUnknown, match="may be running"):
            vast.start(ID)
        assert len(server.asked) == 1
    server.asked.clear()
    server.script = [LIMITED["text"], LIMITED["detail"]]
    server.usual = lambda _: Scripted(200, {"success": True})
    vast.start(ID)
    assert [asked.body for asked in server.asked] == [{"state": "running"}] * 3
    assert server.paths()[0] == f"PUT /api/v0/instances/{ID}/"


def test_ids_that_are_none_cost_no_request(vast: VastCloud, server: Server) -> None:
    """What is no number never becomes part of a path."""
    for odd in ("../users/current", "1/../2", "", "0", "-1", "1e3", "1?owner=x", "١٢", "1" * 40):
        for ask in (
            vast.get,
            vast.terminate,
            vast.stop,
            vast.start,
            vast.host_key,
            lambda one: vast.admit(one, HOST_KEY),
        ):
            with pytest.raises(Refused):
                ask(odd)
    assert server.asked == []

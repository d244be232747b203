"""Renting, starting and stopping at Vast.ai: asked once, and what a refusal leaves behind is ended."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import (
    AuthRejected,
    GpuError,
    LaunchUnknown,
    MayCost,
    NoCapacity,
    ProviderDown,
    RateLimited,
    Refused,
)
from orchestrator.providers import images
from orchestrator.providers.vast import VastCloud
from tests.orchestrator.providers.loopback import HTML, Asked, Scripted, Server
from tests.orchestrator.providers.playing_vast import (
    BAD_KEY,
    BID,
    CREATED,
    ID,
    IMAGE,
    INSTANCE_KEY,
    LABEL,
    LIMITED,
    MARKER,
    MOVED,
    NO_ASK,
    OFFER,
    ORDER,
    REFUSED,
    SCRIPT,
    UNCLEAR,
    complaint,
)
from tests.orchestrator.providers.test_secrets_never_shown import shown

GONE: dict[str, Scripted] = {
    "404": Scripted(404, complaint("invalid_args", NO_ASK)),
    "410": Scripted(410, complaint("no_such_ask", "error 410/3907: no_such_ask Instance type 7654321 is no longer …")),
    "400": Scripted(400, complaint("invalid_args", NO_ASK)),
    "400 code": Scripted(400, complaint("no_such_ask")),
    "403": Scripted(403, complaint("invalid_args", NO_ASK)),
    "483": Scripted(483, complaint("invalid_request", NO_ASK)),
    "msg alone": Scripted(404, {"msg": NO_ASK}),
    "200": Scripted(200, complaint("invalid_args", NO_ASK)),
    "resources": Scripted(400, complaint("resources_unavailable", "Required resources are currently unavailable.")),
}
NO_INSTANCE = {
    "missing": {},
    "null": {"new_contract": None},
    "zero": {"new_contract": 0},
    "list": {"new_contract": [1]},
}
NO_INSTANCE |= {"path": {"new_contract": "../x"}, "true": {"new_contract": True}, "real": {"new_contract": 12.5}}


def test_a_launch_asks_for_one_machine_once(vast: VastCloud, server: Server) -> None:
    """It has the pinned image, the disk, its marker and tags as label, both ways in, no variable, and no secret."""
    server.script = [CREATED]
    assert vast.launch(OFFER, ORDER) == ID
    assert server.paths() == ["PUT /api/v0/asks/7654321/"]
    assert server.asked[0].body == {
        "client_id": "me",
        "image": IMAGE,
        "env": {},
        "price": None,
        "disk": 50,
        "label": LABEL,
        "onstart": SCRIPT,
        "runtype": "ssh_direc ssh_proxy",
        "cancel_unavail": True,
        "target_state": "running",
    }
    assert server.asked[0].headers["Authorization"].startswith("Bearer ")


def test_what_a_launch_says_of_disk_and_bid(vast: VastCloud, server: Server) -> None:
    """A disk is what the order says, in whole GB, else what the offer was priced with; only a spot offer is bid for."""
    server.usual = lambda _: CREATED
    vast.launch(BID, replace(ORDER, disk_gb=100.2))
    vast.launch(replace(OFFER, bid_usd_per_hour=0.5), ORDER)
    vast.launch(replace(OFFER, disk_gb=None), ORDER)
    sent = [(asked.body["price"], asked.body["disk"]) for asked in server.asked]
    assert sent == [(0.16, 101), (None, 50), (None, 50)]


def test_the_usual_image_needs_no_registry(vast: VastCloud, server: Server) -> None:
    """Without an image in the order, the usual one is sent, pinned, and nobody is asked what it is."""
    server.usual = lambda _: CREATED
    vast.launch(OFFER, replace(ORDER, image=None))
    assert server.paths() == ["PUT /api/v0/asks/7654321/"]
    assert server.asked[-1].body["image"] == images.USUAL


def test_an_image_by_its_tag_is_pinned_before_the_request(vast: VastCloud, server: Server) -> None:
    """An image named by a tag is looked up in its registry before the request, once, without a key of ours."""
    digest = "sha256:" + "cd" * 32

    def answer(asked: Asked) -> Scripted:
        return Scripted(200, b"", {"Docker-Content-Digest": digest}) if asked.method == "HEAD" else CREATED

    server.usual = answer
    for _ in range(2):
        vast.launch(OFFER, replace(ORDER, image="vastai/base-image:cuda-13"))
    name, tag = "vastai/base-image", "cuda-13"
    assert server.paths() == [f"HEAD /v2/{name}/manifests/{tag}", *["PUT /api/v0/asks/7654321/"] * 2]
    assert server.asked[-1].body["image"] == f"{name}@{digest}"
    assert "Authorization" not in server.asked[0].headers


def test_launches_keep_their_distance(vast: VastCloud, server: Server) -> None:
    """Two launches are never closer than Vast.ai allows."""
    server.usual = lambda _: CREATED
    for _ in range(3):
        vast.launch(OFFER, ORDER)
    moments = [asked.at for asked in server.asked]
    assert all(later - earlier >= 4.5 for earlier, later in itertools.pairwise(moments))


@pytest.mark.parametrize(
    ("offer", "order", "words"),
    [
        (OFFER, replace(ORDER, marker="x" * 61), "label"),
        (OFFER, replace(ORDER, marker="x" * 257), "label"),
        (OFFER, replace(ORDER, start_script="#" * 4100), "start script"),
        (OFFER, replace(ORDER, start_script="é" * 2050), "start script"),
        (OFFER, replace(ORDER, disk_gb=7.9), "8 GB"),
        (replace(OFFER, disk_gb=5.0), ORDER, "8 GB"),
        (replace(BID, bid_usd_per_hour=None), ORDER, "bid"),
        (replace(BID, bid_usd_per_hour=0.0), ORDER, "bid"),
        (replace(OFFER, offer_id="7/../8"), ORDER, "offer"),
        (OFFER, replace(ORDER, image="Not An Image"), "no name of an image"),
    ],
)
def test_what_cannot_be_rented_is_not_asked_for(
    vast: VastCloud, server: Server, offer: Any, order: Any, words: str
) -> None:
    """Too long, too small, without a bid, no id: refused here, with the reason, before anything is sent."""
    with pytest.raises(Refused, match=words) as caught:
        vast.launch(offer, order)
    assert "Nothing was rented" in caught.value.message
    assert server.asked == []


def test_the_longest_script_is_sent(vast: VastCloud, server: Server) -> None:
    """A start script just below the limit, and a label at it, are taken."""
    server.script = [CREATED]
    label = "x" * (60 - len(".1767355200c"))  # no room for a name
    assert vast.launch(OFFER, replace(ORDER, start_script="#" * 3999, marker=label)) == ID
    assert len(server.asked[0].body["label"]) == 60


def test_an_image_that_is_not_there_rents_nothing(vast: VastCloud, server: Server) -> None:
    """An image that its registry does not have is refused before the request, which is not made."""
    server.usual = lambda _: Scripted(404, {"errors": [{"code": "MANIFEST_UNKNOWN"}]})
    with pytest.raises(Refused, match="somebody/nothing:at-all does not exist") as caught:
        vast.launch(OFFER, replace(ORDER, image="somebody/nothing:at-all"))
    assert "Nothing was rented" in caught.value.message
    assert [asked.method for asked in server.asked] == ["HEAD"]


OUTCOMES: list[tuple[dict[str, Scripted], type[GpuError]]] = [
    (GONE, NoCapacity),
    (BAD_KEY, AuthRejected),
    (REFUSED, Refused),
    (LIMITED, RateLimited),
]


@pytest.mark.parametrize(("forms", "becomes"), OUTCOMES, ids=["gone", "key", "refused", "limited"])
def test_a_launch_that_is_refused(
    vast: VastCloud, server: Server, forms: dict[str, Scripted], becomes: type[GpuError]
) -> None:
    """A definite no, in any form, is the error that fits; it says that nothing was rented, after one request."""
    for form, answer in forms.items():
        server.asked.clear()
        server.usual = lambda _, answer=answer: answer
        with pytest.raises(becomes) as caught:
            vast.launch(OFFER, ORDER)
        assert type(caught.value) is becomes, form
        assert "Nothing was rented" in caught.value.message
        assert "7654321" in caught.value.message
        assert len(server.asked) == 1, form


def test_no_funds_say_where_to_add_some(vast: VastCloud, server: Server) -> None:
    """An account without money is told so, in Vast.ai's words, and where to mend it."""
    for code in ("missing_billing", "insufficient_credit", "spend_rate_limit"):
        for status in (400, 402, 403):
            server.usual = lambda _, code=code, status=status: Scripted(status, complaint(code, "You lack credit."))
            with pytest.raises(Refused, match=r"You lack credit\.") as caught:
                vast.launch(OFFER, ORDER)
            assert "billing" in caught.value.hint


@pytest.mark.parametrize(
    "answer",
    [*UNCLEAR.values(), *MOVED.values(), *(Scripted(200, {"success": True, **odd}) for odd in NO_INSTANCE.values())],
    ids=[*UNCLEAR, *(f"moved {name}" for name in MOVED), *(f"no instance {name}" for name in NO_INSTANCE)],
)
def test_a_launch_of_which_nothing_is_known(vast: VastCloud, server: Server, answer: Scripted) -> None:
    """Any other answer, or none, leaves open whether a machine was rented: asked once, told with the marker."""
    server.usual = lambda _: answer
    with pytest.raises(LaunchUnknown) as caught:
        vast.launch(OFFER, ORDER)
    assert len(server.asked) == 1
    assert MARKER in caught.value.message
    assert "may have been rented" in caught.value.message
    assert caught.value.exit_code == 20
    assert VastCloud.dashboard in caught.value.hint


def test_a_launch_without_an_answer(vast: VastCloud, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request without an answer may have been done; it is waited for as long as Vast.ai's own client waits."""
    from orchestrator.providers import vast as module

    assert module._CREATE_READ_S >= 120
    monkeypatch.setattr(module, "_CREATE_READ_S", 0.2)
    server.usual = lambda _: Scripted(fault="hang")
    with pytest.raises(LaunchUnknown, match="no answer within"):
        vast.launch(OFFER, ORDER)
    assert len(server.asked) == 1


WITH_CONTRACT: list[tuple[Scripted, type[GpuError]]] = [
    (Scripted(400, complaint("invalid_price", "bid too low", new_contract=int(ID))), Refused),
    (Scripted(400, complaint("invalid_args", NO_ASK, new_contract=ID)), NoCapacity),
    (Scripted(410, complaint("no_such_ask", new_contract=int(ID))), NoCapacity),
    (Scripted(200, complaint("insufficient_credit", new_contract=int(ID))), Refused),
    (Scripted(429, {"detail": "API requests too frequent", "new_contract": int(ID)}), RateLimited),
    (Scripted(401, complaint("auth_error", new_contract=int(ID))), AuthRejected),
    (Scripted(500, complaint("server_error", new_contract=int(ID))), LaunchUnknown),
]


def failing(answer: Scripted, ends: list[Scripted]) -> Any:
    """A server whose launches fail and whose ends are accepted at last."""
    left = iter(ends)

    def usual(asked: Asked) -> Scripted:
        if "asks" in asked.path:
            return answer
        if asked.method == "DELETE":
            return next(left, Scripted(200, {"success": True}))
        return Scripted(200, {"offers": []})

    return usual


@pytest.mark.parametrize(("answer", "becomes"), WITH_CONTRACT)
def test_an_instance_within_a_failure_is_ended(
    vast: VastCloud, server: Server, answer: Scripted, becomes: type[GpuError]
) -> None:
    """A failed answer may name an instance: its end is asked for until it is accepted, before anything is raised."""
    lags: list[list[Scripted]] = [
        [],
        [Scripted(502, HTML), LIMITED["text"]],
        [Scripted(404, complaint("no_such_instance"))] * 3,  # not listed yet
    ]
    for ends in lags:
        server.asked.clear()
        server.usual = failing(answer, ends)
        with pytest.raises(becomes) as caught:
            vast.launch(OFFER, ORDER)
        assert type(caught.value) is becomes
        paths = [path for path in server.paths() if "bundles" not in path]
        assert paths == ["PUT /api/v0/asks/7654321/", *[f"DELETE /api/v0/instances/{ID}/"] * (len(ends) + 1)]


@pytest.mark.parametrize(("answer", "becomes"), WITH_CONTRACT)
@pytest.mark.parametrize(
    "end",
    [
        BAD_KEY["404"],
        Scripted(502, HTML),
        Scripted(400, complaint("invalid_args")),
        Scripted(404, complaint("not_found")),
    ],
    ids=["key", "502", "refused", "never listed"],
)
def test_an_instance_whose_end_is_not_accepted_may_cost(
    vast: VastCloud, server: Server, answer: Scripted, becomes: type[GpuError], end: Scripted
) -> None:
    """While its end is not accepted, an instance that a failure named may cost money: the error says which, bounded."""
    server.usual = failing(answer, [end] * 100)
    with pytest.raises(LaunchUnknown, match=f"instance {ID}") as caught:
        vast.launch(OFFER, ORDER)
    assert isinstance(caught.value, MayCost)
    assert "MAY COST MONEY" in caught.value.message
    assert len(server.asked) <= 8


def test_a_bid_that_is_too_low_is_told_the_floor(vast: VastCloud, server: Server) -> None:
    """A bid that is not taken is answered with the lowest one that is, looked up once; unknown, that is said."""
    refusal = Scripted(400, complaint("invalid_price", "error 400: bid is too low"))
    floors: list[tuple[Scripted, str]] = [
        (Scripted(200, {"offers": [{"id": 1, "min_bid": 9}, {"id": 7654321, "min_bid": 0.2134}]}), r"0\.213 USD/h"),
        (Scripted(200, {"offers": []}), "not told"),
        (Scripted(200, {"offers": [None, {"id": 7654321}]}), "not told"),
        (Scripted(200, {"offers": 5}), "not told"),
        (Scripted(502, HTML), "not told"),
    ]
    for answer, words in floors:
        server.asked.clear()
        server.usual = lambda asked, answer=answer: refusal if asked.method == "PUT" else answer
        with pytest.raises(Refused, match=words) as caught:
            vast.launch(BID, ORDER)
        assert "Nothing was rented" in caught.value.message
        assert len(server.asked) == 2


def test_the_key_of_an_instance_is_not_kept(vast: VastCloud, server: Server) -> None:
    """The instance's own key, which comes with it, is in nothing that is returned, printed or raised."""
    server.usual = lambda _: CREATED
    assert INSTANCE_KEY not in vast.launch(OFFER, ORDER)
    assert INSTANCE_KEY not in repr(vars(vast)) + repr(vars(vast._client))
    for status in (200, 400, 500):
        body = {"success": False, "msg": f'"instance_api_key": "{INSTANCE_KEY}"', "instance_api_key": INSTANCE_KEY}
        server.usual = lambda _, status=status, body=body: Scripted(status, body)
        with pytest.raises(GpuError) as caught:
            vast.launch(OFFER, ORDER)
        assert INSTANCE_KEY not in shown(caught.value)


def test_without_a_registry_nothing_is_rented(vast: VastCloud, server: Server) -> None:
    """A registry that does not answer is an error of its own, and no request is made."""
    server.usual = lambda _: Scripted(503, b"")
    with pytest.raises(ProviderDown, match="Nothing was rented"):
        vast.launch(OFFER, replace(ORDER, image="somebody/else:1"))
    assert {asked.method for asked in server.asked} == {"HEAD"}

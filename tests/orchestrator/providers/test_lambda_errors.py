"""What every failure of Lambda Cloud becomes: for a launch, a read, and an instance that should end."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from orchestrator.errors import (
    AuthRejected,
    GpuError,
    LaunchUnknown,
    MayCost,
    NoCapacity,
    NotReturned,
    ProviderDown,
    RateLimited,
    Refused,
)
from orchestrator.providers import client, lambda_cloud
from orchestrator.providers.base import Need
from orchestrator.providers.lambda_cloud import LambdaCloud
from tests.orchestrator.providers.loopback import HTML, Scripted, Server, Time, closed_port, error
from tests.orchestrator.providers.test_client import KEY, LIMITED, UNCLEAR
from tests.orchestrator.providers.test_lambda_cloud import ID, MARKER, OFFER, ORDER

INVALID_KEY = Scripted(401, error("global/invalid-api-key", "API key was invalid, expired, or deleted."))
REFUSALS: dict[str, tuple[Scripted, type[GpuError]]] = {
    "capacity": (Scripted(400, error("instance-operations/launch/insufficient-capacity")), NoCapacity),
    "quota": (Scripted(400, error("global/quota-exceeded", "Quota exceeded.")), Refused),
    "invalid": (Scripted(400, error("global/invalid-parameters", "quantity: too many")), Refused),
    "absent 400": (Scripted(400, error("global/object-does-not-exist")), Refused),
    "absent 404": (Scripted(404, error("global/object-does-not-exist")), Refused),
    "wrong region": (Scripted(400, error("instance-operations/launch/file-system-in-wrong-region")), Refused),
    "a new code": (Scripted(400, error("global/something-new")), Refused),
    "conflict": (Scripted(409, error("global/conflict")), Refused),
    "inactive": (Scripted(403, error("global/account-inactive", "Your account is inactive.")), Refused),
    "address": (Scripted(403, error("global/invalid-address")), Refused),
    "forbidden": (Scripted(403, error("global/forbidden")), AuthRejected),
    "key": (INVALID_KEY, AuthRejected),
    "401 in HTML": (Scripted(401, HTML), AuthRejected),
    "401 empty": (Scripted(401, b""), AuthRejected),
}
NO_INSTANCE: dict[str, Any] = {
    "data null": None,
    "a list": [],
    "no ids": {},
    "null": {"instance_ids": None},
    "empty": {"instance_ids": []},
    "two": {"instance_ids": [ID, "f" * 32]},
    "a number": {"instance_ids": [5]},
    "a path": {"instance_ids": ["../x"]},
    "a word": {"instance_ids": ID},
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_cloud, "_LAUNCH_READ_S", 0.3)


@pytest.mark.parametrize(("answer", "becomes"), REFUSALS.values(), ids=REFUSALS)
def test_a_launch_that_is_refused(cloud: LambdaCloud, server: Server, answer: Scripted, becomes: type) -> None:
    """A definite no is the error that fits, says that nothing was rented and what Lambda said, after one request."""
    server.usual = lambda _: answer
    with pytest.raises(becomes) as caught:
        cloud.launch(OFFER, ORDER)
    assert type(caught.value) is becomes
    assert "Nothing was rented" in caught.value.message
    assert "gpu_1x_a10 in us-west-1" in caught.value.message
    if isinstance(answer.body, dict):
        assert answer.body["error"]["message"] in caught.value.message
    assert len(server.asked) == 1


@pytest.mark.parametrize("body", LIMITED.values(), ids=LIMITED)
def test_a_launch_that_is_asked_too_often(cloud: LambdaCloud, server: Server, body: Any) -> None:
    """429 in any form means that nothing was rented; it is not asked again here."""
    server.usual = lambda _: Scripted(429, body, {"Retry-After": "3"})
    with pytest.raises(RateLimited, match="Nothing was rented"):
        cloud.launch(OFFER, ORDER)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        *UNCLEAR.values(),
        *(Scripted(200, {"data": document}) for document in NO_INSTANCE.values()),
        *(Scripted(status, b"", {"Location": "https://elsewhere.invalid/"}) for status in (301, 302, 303, 307, 308)),
        Scripted(500, error("instance-operations/launch/insufficient-capacity")),
        Scripted(400, error("global/unknown")),
    ],
    ids=[*UNCLEAR, *NO_INSTANCE, *"12345", "capacity with 500", "unknown"],
)
def test_a_launch_of_which_nothing_is_known(cloud: LambdaCloud, server: Server, answer: Scripted) -> None:
    """Any other answer, or none, leaves open whether a machine was rented: asked once, told with the marker."""
    server.usual = lambda _: answer
    with pytest.raises(LaunchUnknown) as caught:
        cloud.launch(OFFER, ORDER)
    assert len(server.asked) == 1
    assert MARKER in caught.value.message
    assert "may have been rented" in caught.value.message
    assert caught.value.exit_code == 20
    assert lambda_cloud.LambdaCloud.dashboard in caught.value.hint


def unreachable(monkeypatch: pytest.MonkeyPatch) -> LambdaCloud:
    """The cloud where nothing listens."""
    monkeypatch.setenv("GPU_LAMBDA_URL", f"http://127.0.0.1:{closed_port()}")
    return LambdaCloud(KEY)


def test_what_is_never_reached(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing listens nothing is rented or read, and an instance that should end goes on costing."""
    away = unreachable(monkeypatch)
    with pytest.raises(ProviderDown, match=r"connection refused.* Nothing was rented"):
        away.launch(OFFER, ORDER)
    with pytest.raises(ProviderDown, match=r"connection refused.* Nothing was rented"):
        away.offers(Need())
    with pytest.raises(ProviderDown, match="GOES ON COSTING") as caught:
        away.terminate(ID)
    assert ID in caught.value.message
    assert lambda_cloud.LambdaCloud.dashboard in caught.value.hint


READS = {
    "offers": lambda cloud: cloud.offers(Need()),
    "key_names": lambda cloud: cloud.key_names(),
    "get": lambda cloud: cloud.get(ID),
    "instances": lambda cloud: cloud.instances(),
    "storage": lambda cloud: cloud.storage(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_that_fail(cloud: LambdaCloud, server: Server, read: Any) -> None:
    """Every read says the same of the same failure: the key, the account, the pace, the network."""
    failures: list[tuple[Scripted, type[GpuError], int]] = [
        (INVALID_KEY, AuthRejected, 1),
        (Scripted(403, error("global/forbidden")), AuthRejected, 1),
        (Scripted(403, error("global/account-inactive")), Refused, 1),
        (Scripted(400, error("global/invalid-parameters")), Refused, 1),
        (Scripted(301, b"", {"Location": "https://elsewhere.invalid/"}), ProviderDown, 1),
        (Scripted(429, b"slow down"), RateLimited, client.TRIES),
        (Scripted(403, b"error code: 1010"), ProviderDown, client.TRIES),
        (Scripted(403, error("provider/internal-unavailable")), ProviderDown, client.TRIES),
        (Scripted(502, HTML), ProviderDown, client.TRIES),
        (Scripted(fault="reset"), ProviderDown, client.TRIES),
    ]
    for answer, becomes, asked in failures:
        server.asked.clear()
        server.usual = lambda _, answer=answer: answer
        with pytest.raises(becomes) as caught:
            read(cloud)
        assert type(caught.value) is becomes
        assert len(server.asked) == asked
        assert "othing was rented" in caught.value.message


@pytest.mark.parametrize(
    "answer",
    [
        Scripted(200, {"data": {"terminated_instances": [{"id": ID, "status": "terminating"}]}}),
        Scripted(200, {"data": {"terminated_instances": []}}),
        Scripted(200, {"data": {}}),
        Scripted(404, error("global/object-does-not-exist", "Specified instance does not exist.")),
        Scripted(400, error("global/unknown", "An unknown error occurred.")),
        Scripted(409, error("global/unknown")),
        Scripted(500, error("global/unknown")),
    ],
    ids=["accepted", "accepted, empty", "accepted, bare", "absent", "ending already", "409", "500"],
)
def test_an_end_that_is_accepted(cloud: LambdaCloud, server: Server, answer: Scripted) -> None:
    """Accepted, absent and ending already are all the end that was asked for, of this one instance."""
    server.usual = lambda _: answer
    cloud.terminate(ID)
    assert server.paths() == ["POST /api/v1/instance-operations/terminate"]
    assert server.asked[0].body == {"instance_ids": [ID]}


@pytest.mark.parametrize("answer", [INVALID_KEY, Scripted(403, error("global/forbidden")), Scripted(401, HTML)])
def test_a_key_that_cannot_end_an_instance_is_shouted_about(
    cloud: LambdaCloud, server: Server, answer: Scripted
) -> None:
    """With a key that is not accepted the instance may cost money for ever: said so that nobody overlooks it."""
    server.usual = lambda _: answer
    with pytest.raises(AuthRejected, match=f"INSTANCE {ID} MAY STILL BE RUNNING AND COSTING MONEY") as caught:
        cloud.terminate(ID)
    assert "https://cloud.lambda.ai/instances" in caught.value.hint
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        *(answer for answer in UNCLEAR.values() if answer.fault != "hang"),  # each hang would take a minute
        Scripted(429, b"slow"),
        Scripted(429, error("x")),
    ],
)
def test_an_end_is_asked_for_again(cloud: LambdaCloud, server: Server, answer: Scripted) -> None:
    """An end may be asked for twice: six times at most, three seconds apart; then the instance may still cost."""
    server.script = [answer, answer]
    server.usual = lambda _: Scripted(200, {"data": {"terminated_instances": []}})
    cloud.terminate(ID)
    moments = [asked.at for asked in server.asked]
    assert len(moments) == 3
    assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(moments))
    server.asked.clear()
    server.usual = lambda _: answer
    with pytest.raises(NotReturned, match="may still be running") as caught:
        cloud.terminate(ID)
    assert isinstance(caught.value, MayCost)
    assert ID in caught.value.message
    assert len(server.asked) == client.TRIES


@pytest.mark.parametrize(
    "answer",
    [
        Scripted(404, error("global/not-found")),
        Scripted(404, HTML),
        Scripted(404, {"success": False, "error": "auth_error"}),
        Scripted(400, error("global/object-does-not-exist")),
        Scripted(400, error("global/invalid-parameters")),
        Scripted(301, b"", {"Location": "https://elsewhere.invalid/"}),
    ],
)
def test_an_end_that_is_not_sure_is_not_claimed(cloud: LambdaCloud, server: Server, answer: Scripted) -> None:
    """A 404 that is not Lambda's own word of this instance, a refusal or a redirect is no end."""
    server.usual = lambda _: answer
    with pytest.raises(NotReturned, match=ID):
        cloud.terminate(ID)

"""No error, no log and no printed object about Vast.ai has a key, a token, an environment or a start script in it."""

from __future__ import annotations

import contextlib
import logging
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import GpuError
from orchestrator.providers import client
from orchestrator.providers.base import Need
from orchestrator.providers.vast import VastCloud
from tests.orchestrator.providers.loopback import Scripted, Server, Time
from tests.orchestrator.providers.playing_vast import (
    HOST_KEY,
    ID,
    INSTANCE,
    INSTANCE_KEY,
    OFFER,
    ORDER,
    SCRIPT,
    TOKEN,
    complaint,
)
from tests.orchestrator.providers.test_secrets_never_shown import ECHOES, forms, shown

ASKS: list[Callable[[VastCloud], Any]] = [
    lambda cloud: cloud.offers(Need()),
    lambda cloud: cloud.get(ID),
    lambda cloud: cloud.instances(),
    lambda cloud: cloud.launch(OFFER, ORDER),
    lambda cloud: cloud.terminate(ID),
    lambda cloud: cloud.stop(ID),
    lambda cloud: cloud.start(ID),
    lambda cloud: cloud.admit(ID, HOST_KEY),
    lambda cloud: cloud.host_key(ID),
    lambda cloud: cloud.storage(),
    lambda cloud: cloud.credit(),
    lambda cloud: cloud.check_key(),
]
BODIES: list[Callable[[str], Any]] = [
    lambda echo: {"success": False, "error": "invalid_args", "msg": echo},
    lambda echo: {"success": False, "error": echo, "msg": echo},
    lambda echo: {"success": False, "error": "auth_error", "msg": f"Invalid user key {echo}"},
    lambda echo: {"msg": echo},
    lambda echo: {"detail": echo},
    lambda echo: {"success": False, "error": "invalid_price", "msg": echo, "new_contract": 7},
    lambda echo: {"success": True, "msg": f"Required resources are currently unavailable {echo}"},
    lambda echo: {"success": True, "result_url": echo},
    lambda echo: {"instances": echo, "offers": echo, "volumes": [echo], "id": echo},
    lambda echo: {"instances": [{"id": 1, "status_msg": echo}], "next_token": echo, "total_instances": 9},
    lambda echo: echo.encode(),
    lambda echo: b"<html>" + echo.encode(),
]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=14, max_size=60),
    st.sampled_from([200, 301, 400, 401, 403, 404, 408, 410, 429, 500]),
    st.sampled_from(ASKS),
    st.sampled_from(ECHOES),
    st.sampled_from(BODIES),
)
def test_no_error_shows_the_key(
    server: Server, time: Time, caplog: pytest.LogCaptureFixture, key: str, status: int, ask: Any, echo: Any, body: Any
) -> None:
    """Whatever a server says back, in whatever form: the key is in no error, no object and no log."""
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_VAST_URL", server.url)
        patch.setattr(client, "TRIES", 2)
        headers = {"X-Echo": key, "Retry-After": key, "Location": f"{server.url}/?api_key={urllib.parse.quote(key)}"}
        server.usual = lambda _: Scripted(status, body(echo(key)), headers if status in (301, 429) else {})
        cloud = VastCloud(key)
        texts = [repr(cloud), repr(cloud._client), repr(cloud._client._api)]
        try:
            ask(cloud)
        except GpuError as error:
            texts.append(shown(error))
    everything = "\n".join([*texts, caplog.text])
    for form in forms(key):
        assert form not in everything


def test_no_error_shows_what_a_machine_has(vast: VastCloud, server: Server) -> None:
    """Answers that repeat a start script, a machine's own key, its token or where its log lies show none of them."""
    line = SCRIPT.splitlines()[2]
    secrets = {
        f"onstart {SCRIPT!r} is too long": line,
        f'"instance_api_key": "{INSTANCE_KEY}"': INSTANCE_KEY,
        f"instance_api_key={INSTANCE_KEY}": INSTANCE_KEY,
        f'{{"jupyter_token": "{TOKEN}"}}': TOKEN,
        f"JUPYTER_TOKEN={TOKEN}": TOKEN,
        '"result_url": "https://s3.amazonaws.com/vast.ai/instance_logs/0a1b2c.log"': "0a1b2c",
        '"image_login": "-utoken123456"': "utoken123456",
    }
    for text, secret in secrets.items():
        for answer in (Scripted(400, complaint("invalid_args", f"before {text} after")), Scripted(502, text.encode())):
            server.usual = lambda _, answer=answer: answer
            with pytest.raises(GpuError) as caught:
                vast.launch(OFFER, ORDER)
            assert secret not in shown(caught.value), text


def test_an_instance_has_no_secret(vast: VastCloud, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Neither one instance, nor the list of all, nor an error about them has token, environment or start script."""
    caplog.set_level(logging.DEBUG)
    told = {**INSTANCE, "instance_api_key": INSTANCE_KEY}
    server.usual = lambda asked: Scripted(200, {"instances": told if f"/{ID}/" in asked.path else [told]})
    texts = [repr(vast.get(ID)), repr(vast.instances()), caplog.text]
    server.usual = lambda _: Scripted(200, {"instances": {**told, "id": 9}})
    with pytest.raises(GpuError) as caught:
        vast.get(ID)
    everything = "\n".join([*texts, shown(caught.value)])
    for secret in (TOKEN, INSTANCE_KEY, "hf_secret", SCRIPT.splitlines()[2]):
        assert secret not in everything


def test_the_key_is_sent_to_the_api_alone(vast: VastCloud, server: Server) -> None:
    """The account's key is in the header of every call to the API, and in no address, no body, and no other call."""
    key = "secret_k3y-Value.0123456789"
    server.usual = lambda asked: Scripted(
        200 if asked.method != "HEAD" else 404, {"success": True, "result_url": f"{server.url}/logs/x", "id": 1}
    )
    for ask in ASKS:
        server.asked.clear()
        with contextlib.suppress(GpuError):
            ask(vast)
        for asked in server.asked:
            is_api = asked.path.startswith("/api/")
            assert (asked.headers.get("Authorization") == f"Bearer {key}") == is_api
            assert key not in asked.path + repr(asked.body)

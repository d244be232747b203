"""No error, no log and no printed object has an account key, a login or a start script in it."""

from __future__ import annotations

import base64
import html
import json
import logging
import traceback
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import GpuError
from orchestrator.providers import client, lambda_cloud
from orchestrator.providers.base import Need, Order
from orchestrator.providers.lambda_cloud import LambdaCloud
from tests.orchestrator.providers.loopback import Scripted, Server, Time
from tests.orchestrator.providers.test_lambda_cloud import ID, KEY_LINE, MARKER, OFFER

SECRET_LINE = "login somebody hf_abcdefghijklmnop"
ORDER = Order(MARKER, "k", f"#!/bin/sh\n{SECRET_LINE}\n")
ASK: list[Callable[[LambdaCloud], Any]] = [
    lambda cloud: cloud.offers(Need()),
    lambda cloud: cloud.get(ID),
    lambda cloud: cloud.instances(),
    lambda cloud: cloud.launch(OFFER, ORDER),
    lambda cloud: cloud.terminate(ID),
    lambda cloud: cloud.ensure_key(KEY_LINE, "gpu-cli-x"),
    lambda cloud: cloud.remove_key("x"),
    lambda cloud: cloud.storage(),
]
ECHOES: list[Callable[[str], str]] = [
    lambda key: key,
    lambda key: f"Bearer {key}",
    lambda key: json.dumps(key),
    html.escape,
    lambda key: urllib.parse.quote(key, safe=""),
    lambda key: "Basic " + base64.b64encode(f"{key}:".encode()).decode(),
    lambda key: key[: len(key) // 2] + "\x1b[0m" + key[len(key) // 2 :],
    lambda key: "x" * 280 + key,
]
"""How a server may say the key back."""
BODIES: list[Callable[[str], Any]] = [
    lambda echo: {"error": {"code": "global/invalid-parameters", "message": echo, "suggestion": echo}},
    lambda echo: {"error": {"code": echo, "message": "m"}},
    lambda echo: echo.encode(),
    lambda echo: b"<html>" + echo.encode(),
    lambda echo: {"data": echo},
    lambda echo: {"data": [{"name": echo}]},
    lambda echo: {"detail": echo},
]


def shown(error: BaseException) -> str:
    """Everything of an error that can end up before somebody's eyes, of the errors behind it, too."""
    seen, texts = set(), []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            texts += [str(one), repr(one), repr(vars(one)), repr(one.args), getattr(one, "hint", "")]
            todo += [one.__cause__, one.__context__]
    return "\n".join([*texts, *traceback.format_exception(error)])


def forms(key: str) -> list[str]:
    return [key, *(echo(key) for echo in (ECHOES[2], ECHOES[3], ECHOES[4])), ECHOES[5](key)[6:]]


def _is_no_token(key: str) -> bool:
    """Whether a key cannot be taken for what else stands in an address, such as a page's token of zeros."""
    return len(set(key)) > 3


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=14, max_size=60).filter(_is_no_token),
    st.sampled_from([200, 301, 400, 401, 403, 404, 408, 429, 500]),
    st.sampled_from(ASK),
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
        patch.setenv("GPU_LAMBDA_URL", server.url)
        patch.setattr(client, "TRIES", 2)
        headers = {"X-Echo": key, "Retry-After": key, "Location": f"{server.url}/?api_key={urllib.parse.quote(key)}"}
        server.usual = lambda _: Scripted(status, body(echo(key)), headers if status in (301, 429) else {})
        cloud = LambdaCloud(key)
        texts = [repr(cloud), repr(cloud._client), repr(cloud._client._api)]
        try:
            ask(cloud)
        except GpuError as error:
            texts.append(shown(error))
    everything = "\n".join([*texts, caplog.text])
    for form in forms(key):
        assert form not in everything


def test_no_error_shows_the_start_script(cloud: LambdaCloud, server: Server) -> None:
    """A launch that comes back with what was sent shows no line of the start script."""
    for status, body in [
        (400, {"error": {"code": "global/invalid-parameters", "message": f"user_data: {ORDER.start_script!r} is odd"}}),
        (500, f"user_data: {SECRET_LINE}".encode()),
    ]:
        server.usual = lambda _, status=status, body=body: Scripted(status, body)
        with pytest.raises(GpuError) as caught:
            cloud.launch(OFFER, ORDER)
        assert "hf_abcdefghijklmnop" not in shown(caught.value)
        assert "user_data" in caught.value.message
    assert SECRET_LINE not in repr(ORDER)


@pytest.mark.parametrize(
    "text",
    [
        'jupyter_token: "03b7d30d9d3e4d8fa4"',
        '{"jupyter_token": "03b7d30d9d3e4d8fa4"}',
        "https://jupyter-x.lambdaspaces.com/?token=03b7d30d9d3e4d8fa4&x=1",
        "Authorization: Bearer 03b7d30d9d3e4d8fa4",
        "authorization=Basic 03b7d30d9d3e4d8fa4",
        "sent bearer 03b7d30d9d3e4d8fa4xyz",
        "api_key=03b7d30d9d3e4d8fa4",
        "private_key: '03b7d30d9d3e4d8fa4'",
    ],
)
def test_no_error_shows_somebody_elses_secret(cloud: LambdaCloud, server: Server, text: str) -> None:
    """A token or login that a server tells of, in any usual form, is masked; what stands around it stays."""
    server.usual = lambda _: Scripted(400, {"error": {"code": "global/odd", "message": f"before {text} after"}})
    with pytest.raises(GpuError) as caught:
        cloud.offers(Need())
    assert "03b7d30d" not in shown(caught.value)
    assert "before" in caught.value.message
    assert "after" in caught.value.message


def test_a_dead_connection_leaves_no_request_behind(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's error holds the request with its header: it is not kept behind ours."""
    key = "secret_k3y-Value.0123456789"
    for url in ("http://127.0.0.1:9", "https://127.0.0.1:9"):
        monkeypatch.setenv("GPU_LAMBDA_URL", url)
        with pytest.raises(GpuError) as caught:
            LambdaCloud(key).launch(OFFER, ORDER)
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None
        assert key not in shown(caught.value)
    assert lambda_cloud.TITLE in caught.value.message

"""The host key of a machine at Vast.ai, read from its log through the API: from nobody else, as nobody, checked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ProviderDown
from orchestrator.providers import exchange, vast_answers, vast_log
from orchestrator.providers.exchange import Answer, Failure, Request
from orchestrator.providers.vast import VastCloud
from tests.orchestrator.providers.loopback import Asked, Scripted, Server, Time
from tests.orchestrator.providers.playing_vast import HOST_KEY, ID

LINE = f"gpu-host-key: {HOST_KEY}"
OTHER = "gpu-host-key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "B" * 43


def logs(server: Server, body: bytes, *, missing: int = 0, status: int = 403) -> None:
    """Have the server keep a log that appears after it was looked for so often."""
    left = [missing]

    def answer(asked: Asked) -> Scripted:
        if asked.method == "PUT":
            return Scripted(200, {"success": True, "result_url": f"{server.url}/logs/abc.log", "msg": ""})
        left[0] -= 1
        return Scripted(status, b"<Error>AccessDenied</Error>") if left[0] >= 0 else Scripted(200, body)

    server.usual = answer


def test_the_host_key_is_read_from_the_log(vast: VastCloud, server: Server) -> None:
    """The log is asked for with the account's key, and fetched without it."""
    logs(server, b"sshd starts\n" + LINE.encode() + b"\nready\n", missing=2)
    assert vast.host_key(ID) == HOST_KEY
    first, *rest = server.asked
    assert (first.method, first.path) == ("PUT", f"/api/v0/instances/request_logs/{ID}/")
    assert first.body == {"tail": "1000", "filter": "gpu-host-key:"}
    assert [asked.path for asked in rest] == ["/logs/abc.log"] * 3
    assert not [asked for asked in rest if "Authorization" in asked.headers]


@pytest.mark.parametrize("status", [403, 404, 301, 500])
def test_a_log_that_is_not_there_yet(vast: VastCloud, server: Server, time: Time, status: int) -> None:
    """A log that is not uploaded is looked for some seconds, then it is not known; the next look may find it."""
    logs(server, LINE.encode(), missing=1000, status=status)
    before = time.now
    assert vast.host_key(ID) is None
    assert 5 <= time.now - before <= 40
    assert 5 <= len(server.asked) <= 30
    logs(server, LINE.encode())
    assert vast.host_key(ID) == HOST_KEY


@pytest.mark.parametrize(
    ("log", "key"),
    [
        (LINE, HOST_KEY),
        (f"  {LINE}\r\n", HOST_KEY),
        (f"{LINE} root@C.123", HOST_KEY),
        (f"x\n{LINE}\n{LINE}\ny", HOST_KEY),
        (f"{LINE}\n{OTHER}", None),
        ("", None),
        (f"x {LINE}", None),
        (HOST_KEY, None),
        (f"gpu-host-key:{HOST_KEY}", None),
        (f"gpu-host-key: {HOST_KEY[:-1]}", None),
        (f"gpu-host-key: {HOST_KEY}A", None),
        ("gpu-host-key: ssh-rsa AAAAB3NzaC1yc2EAAA", None),
        (f"{LINE} \x1b[31m", None),
        (f"{LINE}\x00", None),
        ("gpu-host-key: ssh-ed25519 " + "A" * 68, None),
    ],
)
def test_a_key_is_one_whole_line(log: str, key: str | None) -> None:
    """Only a line of exactly that form tells a key; two that differ tell none."""
    assert vast_answers.host_key(log.encode()) == key


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_log_is_read(before: bytes, after: bytes) -> None:
    """Whatever else is in a log, what comes of it is a key or nothing."""
    for log in (before + after, before + b"\n" + LINE.encode() + b"\n" + after):
        found = vast_answers.host_key(log)
        assert found is None or found.startswith("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI")
    clean = before.replace(b"gpu-host-key", b"") + b"\n" + LINE.encode()
    assert vast_answers.host_key(clean) == HOST_KEY


def test_a_log_that_is_too_long_or_binary(vast: VastCloud, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log is read up to a limit, and may hold anything."""
    monkeypatch.setattr(vast_log, "_MAX_BYTES", 1000)
    logs(server, LINE.encode() + b"\n" + b"x" * 1000)
    assert vast.host_key(ID) is None
    logs(server, b"\xff\xfe\n" + LINE.encode())
    assert vast.host_key(ID) == HOST_KEY


OURS = [
    "https://s3.amazonaws.com/vast.ai/instance_logs/abc.log",
    "https://s3.amazonaws.com/public.vast.ai/instance_logs/abc.log",
    "https://s3.amazonaws.com/vast.ai/instance_logs/abc.log?X-Amz-Signature=0",
    "https://public.vast.ai.s3.amazonaws.com/instance_logs/abc.log",
    "https://logs.vast.ai/abc",
    "https://console.vast.ai/logs/abc",
]
OTHERS: list[Any] = [
    "https://s3.amazonaws.com/evil/instance_logs/abc.log",
    "https://s3.amazonaws.com/vast.ai.evil/abc.log",
    "https://s3.amazonaws.com/vast.ai/../evil/abc.log",
    "https://s3.amazonaws.com/",
    "https://s3.amazonaws.com.evil.example/vast.ai/x",
    "https://s3.amazonaws.com@evil.example/vast.ai/x",
    "https://evil.example/vast.ai/x",
    "https://evilvast.ai/x",
    "https://vast.ai.evil.example/x",
    "http://s3.amazonaws.com/vast.ai/x",
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1:9/x",
    "https://console.vast.ai.evil.example/x",
    "file:///etc/passwd",
    "ftp://s3.amazonaws.com/vast.ai/x",
    "",
    None,
    7,
    ["https://s3.amazonaws.com/vast.ai/x"],
]


def test_logs_lie_at_vast_ais_own_places(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address anywhere else is not fetched: who answers for the API could make us ask anything of anybody."""
    sent: list[Request] = []

    def fetch(request: Request) -> Answer | Failure:
        sent.append(request)
        return Answer(200, {}, b"log")

    monkeypatch.setattr(exchange, "exchange", fetch)
    for url in OURS:
        assert vast_log.fetched(url, "https://console.vast.ai") == b"log", url
    assert [request.key for request in sent] == [None] * len(OURS)
    sent.clear()
    for url in OTHERS:
        assert vast_log.fetched(url, "https://console.vast.ai") is None, url
    assert sent == []


def test_an_answer_without_an_address(vast: VastCloud, server: Server) -> None:
    """An address that is none, or somebody else's, tells no key; an answer without one is asked for again."""
    for url in OTHERS:
        server.usual = lambda _, url=url: Scripted(200, {"success": True, "result_url": url})
        server.asked.clear()
        assert vast.host_key(ID) is None
        assert len(server.asked) == 1
    server.usual = lambda _: Scripted(200, {"success": True})
    with pytest.raises(ProviderDown):
        vast.host_key(ID)

"""The JSON client: what a failed call may have done, what is asked again, and what is sent."""

from __future__ import annotations

import email.utils
import gzip
import socket
import ssl
import time as real
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from orchestrator.errors import ConfigError
from orchestrator.providers import exchange, lambda_answers
from orchestrator.providers.client import TRIES, Api, Call, Client, Complaint
from orchestrator.providers.exchange import Failure
from tests.orchestrator.providers.loopback import HTML, Scripted, Server, Time, closed_port, error

KEY = "secret_k3y-Value.0123456789"
GOOD = Scripted(200, {"data": []})
READ = Call("GET", "/x", read_s=0.3)
WRITE = Call("POST", "/x", {"a": 1}, read_s=0.3)
LIMITED = {
    "envelope": error("global/quota-exceeded"),
    "detail": {"detail": "API requests too frequent endpoint threshold=4.5"},
    "text": b"API requests too frequent",
    "html": HTML,
    "empty": b"",
}
UNCLEAR = {
    "500": Scripted(500, error("global/internal-error")),
    "502": Scripted(502, HTML),
    "503": Scripted(503, b""),
    "504": Scripted(504, b"upstream timed out"),
    "520": Scripted(520, HTML),
    "408": Scripted(408, error("global/invalid-parameters")),
    "403 of a gate": Scripted(403, b"error code: 1010"),
    "400 in no known form": Scripted(400, {"detail": "no"}),
    "400 from upstream": Scripted(400, error("provider/internal-unavailable")),
    "409 inner error": Scripted(409, error("global/internal-error")),
    "empty": Scripted(200, b""),
    "html": Scripted(200, HTML),
    "not a number": Scripted(200, b'{"data": NaN}'),
    "deep": Scripted(200, b"[" * 200_000),
    "without data": Scripted(200, {}),
    "null": Scripted(200, b"null"),
    "an error that says all is well": Scripted(200, error("global/invalid-parameters")),
    "no content": Scripted(204, b""),
    "closed": Scripted(fault="close"),
    "reset": Scripted(fault="reset"),
    "hang": Scripted(fault="hang"),
    "half": Scripted(200, {"data": []}, fault="half"),
    "half in chunks": Scripted(200, b'{"data": []} ', fault="half chunked"),
    "not what it says": Scripted(200, b"plain", {"Content-Encoding": "gzip"}),
    "no status": Scripted(999, {"data": []}),
}


def client(url: str, key: str = KEY) -> Client:
    return Client(Api("lambda", "Lambda Cloud", url, key, lambda_answers.complaint, 1.0))


@pytest.mark.parametrize("answer", UNCLEAR.values(), ids=UNCLEAR)
def test_what_may_have_been_done_is_unclear_and_written_once(server: Server, time: Time, answer: Scripted) -> None:
    """After any answer that does not say what is, a write counts as perhaps done, and is not sent again."""
    server.script = [answer]
    server.usual = lambda _: GOOD
    assert client(server.url).until_sent(WRITE).outcome == "unclear"
    assert len(server.asked) == 1


@pytest.mark.parametrize("answer", UNCLEAR.values(), ids=UNCLEAR)
def test_a_read_is_asked_again_and_not_for_ever(server: Server, time: Time, answer: Scripted) -> None:
    """A read outlasts an answer that says nothing, and six of them end it."""
    server.script = [answer]
    server.usual = lambda _: GOOD
    assert client(server.url).repeat(READ).outcome == "ok"
    server.usual = lambda _: answer
    server.asked.clear()
    if answer.fault != "hang":
        assert client(server.url).repeat(READ).outcome == "unclear"
        assert len(server.asked) == TRIES == 6


@pytest.mark.parametrize("body", LIMITED.values(), ids=LIMITED)
@pytest.mark.parametrize("call", [READ, WRITE], ids=["read", "write"])
def test_asked_too_often_is_told_by_the_status_alone(server: Server, time: Time, body: Any, call: Call) -> None:
    """429 in any form means that nothing happened: once is told so, what may be asked again waits and is."""
    server.usual = lambda _: Scripted(429, body)
    assert client(server.url).once(call).outcome == "limited"
    assert len(server.asked) == 1
    server.script = [Scripted(429, body)] * 3
    server.usual = lambda _: GOOD
    before = time.now
    assert client(server.url).until_sent(call).outcome == "ok"
    assert 2 + 4 + 8 <= time.now - before <= 1.5 * (2 + 4 + 8) + 4


def test_being_asked_to_wait_is_heard(server: Server, time: Time) -> None:
    """Retry-After counts, as seconds and as a date; nonsense does not; hours are not waited for."""
    date = email.utils.formatdate(time.now + 41, usegmt=True)
    for text, at_least in [(date, 40), ("40", 40), ("soon", 2), ("-5", 2), ("", 2)]:
        server.script = [Scripted(429, b"", {"Retry-After": text}), GOOD]
        before = time.now
        assert client(server.url).repeat(READ).outcome == "ok"
        assert at_least <= time.now - before <= at_least + 5, text
    server.usual = lambda _: Scripted(429, b"", {"Retry-After": "7200"})
    server.asked.clear()
    reply = client(server.url).repeat(READ)
    assert (reply.outcome, len(server.asked)) == ("limited", 1)
    assert "7200 s" in reply.words


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
@pytest.mark.parametrize("where", ["{}/elsewhere", "http://[", "//\x7f", ""])
def test_no_redirect_is_followed(server: Server, time: Time, status: int, where: str) -> None:
    """A redirect, however malformed, is an error on the first try; the key goes nowhere else."""
    with Server().running() as elsewhere:
        server.usual = lambda _: Scripted(status, b"", {"Location": where.format(elsewhere.url)})
        for call in (READ, WRITE):
            assert client(server.url).repeat(call).outcome == "moved"
        assert len(server.asked) == 2
        assert elsewhere.asked == []


def test_a_refusal_is_final_and_quoted(server: Server, time: Time) -> None:
    """The provider's own no, or any 401, is not asked again; its code and words are there."""
    server.usual = lambda _: Scripted(400, error("global/invalid-parameters", "name: too \x1b[31mlong"))
    reply = client(server.url).repeat(READ)
    assert (reply.outcome, reply.code, len(server.asked)) == ("refused", "global/invalid-parameters", 1)
    assert reply.words == "HTTP 400, name: too long Try something else. (global/invalid-parameters)"
    for body in (HTML, b"", {"error": "no"}):
        server.usual = lambda _, body=body: Scripted(401, body)
        assert client(server.url).repeat(READ).outcome == "refused"
    assert len(server.asked) == 4


def test_a_code_can_be_final_whatever_the_status(server: Server, time: Time) -> None:
    """A code that the caller named ends the repetition at once, with a 429 or 500, too."""
    for status in (429, 500):
        server.asked.clear()
        server.usual = lambda _, status=status: Scripted(status, error("search_quota_exceeded"))
        client(server.url).repeat(Call("GET", "/x", final_codes=("search_quota_exceeded",)))
        assert len(server.asked) == 1


def test_another_clouds_form_fits(server: Server, time: Time) -> None:
    """A cloud that says no with status 200, or answers a bad key with 404, is read by its own file."""

    def said(status: int, document: Any) -> Complaint | None:
        sound = status < 300 and not (isinstance(document, dict) and document.get("success") is False)
        return None if sound else Complaint(str(document.get("error")), str(document.get("msg")))

    vast = Client(Api("vast", "Vast.ai", server.url, KEY, said))
    bodies = [(200, "no_such_ask"), (404, "auth_error")]
    for status, code in bodies:
        server.script = [Scripted(status, {"success": False, "error": code, "msg": "gone", "new_contract": 5})]
        reply = vast.once(WRITE)
        assert (reply.outcome, reply.code, reply.document["new_contract"]) == ("refused", code, 5)
    server.script = [Scripted(200, [1, 2])]
    assert vast.once(READ).document == [1, 2]


def test_what_is_sent(server: Server, time: Time, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The key is in one header only, the agent has our name, and neither .netrc nor a proxy has a say on loopback."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    server.usual = lambda _: GOOD
    client(server.url).once(Call("POST", "/x", {"a": "ü"}, {"q": "a b"}))
    client(server.url).once(READ)
    posted, got = server.asked
    assert posted.headers["Authorization"] == f"Bearer {KEY}"
    assert posted.headers["User-Agent"].startswith("gpu-cli/")
    assert (posted.headers["Content-Type"], posted.headers["Accept"]) == ("application/json", "application/json")
    assert (posted.path, posted.body, got.body) == ("/x?q=a+b", {"a": "ü"}, None)
    monkeypatch.setenv("http_proxy", "")
    asked = exchange.Request("GET", server.url + "/x", KEY, {})
    assert isinstance(exchange.exchange(asked), exchange.Answer)
    assert server.asked[-1].headers["Authorization"] == f"Bearer {KEY}"


def fails(url: str, **how: Any) -> Failure:
    failure = exchange.exchange(exchange.Request("POST", url, KEY, {}, body=b"{}", **how))
    assert isinstance(failure, Failure)
    return failure


def test_what_surely_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection, one that is never made, an unknown name and a dead proxy: nothing was sent."""
    refused = fails(f"http://127.0.0.1:{closed_port()}/x", direct=True)
    assert refused == Failure(False, "no connection: connection refused")
    monkeypatch.setattr(exchange, "CONNECT_S", 0.2)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        late = fails(f"http://127.0.0.1:{full.getsockname()[1]}/x", direct=True)
        for one in waiting:
            one.close()
    assert late == Failure(False, "no connection within 0.2 s")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port()}")
    assert fails("https://cloud.invalid/x") == Failure(False, "the proxy does not lead there")
    monkeypatch.delenv("https_proxy")

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert fails("https://cloud.invalid/x") == Failure(False, "its name cannot be looked up")


def test_a_call_that_was_not_sent_is_made_again(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was surely not sent is tried again, a write too, but six times at most and for less than half a minute."""
    really, made = exchange.exchange, []
    monkeypatch.setattr(exchange, "exchange", lambda request: made.append(request) or really(request))
    for repeated in (Client.until_sent, Client.repeat):
        made.clear()
        assert repeated(client(f"http://127.0.0.1:{closed_port()}"), WRITE).outcome == "not_sent"
        assert len(made) == TRIES
    made.clear()
    assert client(f"http://127.0.0.1:{closed_port()}").once(WRITE).outcome == "not_sent"
    assert len(made) == 1
    assert time.since < 60


def test_a_certificate_of_somebody_else_gets_no_key(tmp_path: Path) -> None:
    """A server that cannot prove who it is gets nothing; a broken handshake leaves it open."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(datetime.now(UTC)).not_valid_after(datetime.now(UTC) + timedelta(1))
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "both").write_bytes(key.private_bytes(*form) + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both")
    secure = Server()
    secure.http.socket = context.wrap_socket(secure.http.socket, server_side=True)
    with secure.running():
        url = secure.url.replace("http:", "https:")
        assert fails(url, direct=True) == Failure(False, "its certificate is not one this computer trusts")
        assert secure.asked == []
    with Server().running() as plain:
        assert fails(plain.url.replace("http:", "https:"), direct=True).sent


def test_an_answer_may_come_in_any_shape(server: Server, time: Time) -> None:
    """An answer in chunks, packed, or with a mark of its byte order is an answer."""
    packed = Scripted(200, gzip.compress(b'{"data": [1]}'), {"Content-Encoding": "gzip"})
    for answer in (Scripted(200, {"data": [1]}, fault="chunked"), packed, Scripted(200, b'\xef\xbb\xbf{"data": [1]}')):
        server.script = [answer]
        assert client(server.url).once(READ).document == {"data": [1]}


def test_an_answer_that_never_ends_is_given_up(server: Server) -> None:
    """An answer of which a byte comes now and then is not waited for until its end."""
    server.script = [Scripted(200, b" " * 2000, fault="drip")]
    began = real.monotonic()
    answer = exchange.exchange(exchange.Request("GET", server.url, KEY, {}, read_s=0.2, direct=True))
    assert isinstance(answer, exchange.Answer)
    assert answer.body is None
    assert real.monotonic() - began < 10


def test_nothing_half_a_secret_is_quoted(server: Server, time: Time) -> None:
    """What is shown is cut after it is masked, never in the middle of a key; control signs hide no key, either."""
    for body in (
        b"x" * 268 + KEY.encode(),
        b"x" * 4060 + KEY.encode(),
        KEY[:9].encode() + b"\x1b[0m" + KEY[9:].encode(),
    ):
        server.script = [Scripted(500, body)]
        reply = client(server.url).once(READ)
        assert KEY[:9] not in reply.words
        assert "no JSON: " in reply.words
    server.script = [Scripted(500, b"x" * 4097)]
    assert client(server.url).once(READ).words == "HTTP 500, no JSON"
    made = client(server.url)
    assert made.hide(f"a {KEY[:9]}\x1b[31m{KEY[9:]} b") == "a *** b"
    assert made.hide("user: 'echo one-two-three\\n'", "#!/bin/sh\necho one-two-three\n") == "user: '***\\n'"
    assert len(made.hide("ü" * 10_000)) == 301


def test_an_answer_that_lacks_what_it_needs(server: Server, time: Time) -> None:
    """A call may name what its answer must have: without it a good answer says nothing, and a bad one is as it was."""
    needing = Call("GET", "/x", needs="offers")
    for body in ({"data": []}, {"data": [], "offer": 1}):
        server.usual = lambda _, body=body: Scripted(200, body)
        reply = client(server.url).once(needing)
        assert (reply.outcome, "without offers" in reply.words) == ("unclear", True)
    server.usual = lambda _: Scripted(200, {"data": [], "offers": None})
    assert client(server.url).once(needing).outcome == "ok"
    server.usual = lambda _: Scripted(404, error("global/not-found"))
    assert client(server.url).once(needing).outcome == "refused"


def test_a_final_status_is_not_asked_again(server: Server, time: Time) -> None:
    """A status that a call names as final ends it, whatever the answer looks like."""
    server.usual = lambda _: Scripted(404, HTML)
    final = Call("GET", "/x", final_statuses=(404,))
    assert (client(server.url).repeat(final).outcome, len(server.asked)) == ("unclear", 1)


def test_too_often_may_be_said_in_words(server: Server, time: Time) -> None:
    """What a provider's own reader calls too often is limited, whatever the status: nothing was done."""
    api = Api("lambda", "L", server.url, KEY, lambda status, document: Complaint("slow", "slow down", limited=True))
    for status in (200, 400, 503):
        server.usual = lambda _, status=status: Scripted(status, {})
        assert Client(api).once(WRITE).outcome == "limited"


def test_nobodys_request_has_no_key(
    server: Server, time: Time, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request without a key has no authorization at all, from a .netrc neither; its answer may be kept short."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password netrc-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server.usual = lambda _: Scripted(200, b"x" * 5000)
    for direct in (True, False):
        answer = exchange.exchange(exchange.Request("GET", server.url, None, {}, direct=direct, body_max_bytes=5000))
        assert isinstance(answer, exchange.Answer)
        assert answer.body == b"x" * 5000
        answer = exchange.exchange(exchange.Request("GET", server.url, None, {}, direct=direct, body_max_bytes=4999))
        assert isinstance(answer, exchange.Answer)
        assert answer.body is None
    assert not [asked for asked in server.asked if "Authorization" in asked.headers]


def test_too_much_is_not_read(server: Server, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless answer ends at a limit, and is no answer."""
    monkeypatch.setattr(exchange, "_BODY_MAX_BYTES", 10_000)
    server.usual = lambda _: Scripted(200, b" " * 20_000 + b'{"data": []}')
    reply = client(server.url).once(READ)
    assert (reply.outcome, "too long" in reply.words) == ("unclear", True)


@pytest.mark.parametrize(
    "address",
    ["http://cloud.lambda.ai", "ftp://127.0.0.1", "cloud.lambda.ai", "https://", "https://user:word@host",
     "https://host?x=1", "http://[::1", "http://127.0.0.1:99999", "http://127.0.0.1.evil.example"],
)  # fmt: skip
def test_the_key_goes_to_no_open_address(address: str) -> None:
    """An address without encryption, but for this computer, or that is none at all, gets no key."""
    with pytest.raises(ConfigError, match="not sent"):
        client(address)

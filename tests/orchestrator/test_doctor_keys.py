"""Account keys in `gpu doctor`: tested at a real server, kept only when they may be, and never shown."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator import config, doctor, keys, providers
from orchestrator.doctor import BAD, OK, WARN, Check
from orchestrator.errors import UsageError
from tests.orchestrator.test_doctor import home, named, run
from tests.waiting import until

__all__ = ["home"]  # a fixture

VALUE = "secret_k3y-Value.0123456789"
URLS = {"lambda": "GPU_LAMBDA_URL", "vast": "GPU_VAST_URL"}
LAMBDA_ERROR = {"error": {"code": "global/invalid-api-key", "message": "API key was invalid, expired, or deleted."}}
VAST_ERROR = {"success": False, "error": "auth_error", "msg": "Invalid user key"}


class Provider:
    """A real server on loopback that plays both providers: answers as told, remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: tuple[int, bytes | dict[str, Any]] | None = None
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.wait = threading.Event()
        self.wait.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked.append((self.path, self.headers["Authorization"]))
                provider.wait.wait(20)
                code, body = provider.answer or provider.usual(self.path, self.headers["Authorization"])
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                for name, value in {"Content-Length": str(len(data)), **provider.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def usual(self, path: str, authorization: str) -> tuple[int, dict[str, Any]]:
        """What the provider of that path says to VALUE, and to any other key."""
        if path == "/lambda/api/v1/ssh-keys":
            return (200, {"data": []}) if authorization == f"Bearer {VALUE}" else (401, LAMBDA_ERROR)
        if path == "/vast/api/v0/users/current/":
            return (200, {"id": 1, "credit": 2.5}) if authorization == f"Bearer {VALUE}" else (404, VAST_ERROR)
        return 404, {}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    """A server to which both providers' addresses lead, in a home without keys."""
    made = Provider()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, variable in URLS.items():
        monkeypatch.setenv(variable, f"{made.url}/{name}")
    yield made
    made.wait.set()
    made.server.shutdown()
    made.server.server_close()
    thread.join(10)


@pytest.mark.parametrize("name", providers.names())
def test_a_key_that_is_found_is_tested(provider: Provider, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One small read with the key decides: taken is ok, refused is bad, and no word of it has the key."""
    monkeypatch.setenv(keys.VARIABLES[name], VALUE)
    good = named(doctor.accounts(True))[f"{name} key"]
    assert good == Check(f"{name} key", OK, f"found in {keys.VARIABLES[name]}; {name} takes it")
    assert len(provider.asked) == 1
    monkeypatch.setenv(keys.VARIABLES[name], f"wrong-{VALUE}")
    bad = named(doctor.accounts(True))[f"{name} key"]
    assert bad.state == BAD
    assert "nvalid" in bad.words
    assert VALUE not in str(bad)


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize(
    ("answer", "refusing"),
    [
        ((401, {}), ["lambda", "vast"]),
        ((401, b"<html>"), ["lambda", "vast"]),
        ((401, LAMBDA_ERROR), ["lambda", "vast"]),
        ((403, {"error": {"code": "global/forbidden", "message": "No."}}), ["lambda"]),
        ((403, {"error": {"code": "global/account-inactive", "message": "Your account is inactive."}}), []),
        ((403, {"success": False, "error": "not_authorized", "msg": "No."}), ["vast"]),
        ((403, b"error code: 1010"), []),
        ((404, VAST_ERROR), ["vast"]),
        ((404, {"success": False, "msg": "Session expired. Please log in again."}), ["vast"]),
        ((404, {"success": False, "error": "not_found"}), []),
        ((404, b""), []),
        ((200, VAST_ERROR), ["vast"]),
        ((200, {}), []),
        ((200, []), []),
        ((200, b"<html>welcome to this hotel's network</html>"), []),
        ((200, b"[" * 100_000), []),
        ((429, b"API requests too frequent"), []),
        ((500, {"error": "server_error"}), []),
        ((503, b"\xff"), []),
        ((302, b""), []),
        ((308, b""), []),
    ],
)
def test_every_answer_means_something(provider: Provider, name: str, answer: Any, refusing: list[str]) -> None:
    """Only a clear no of its own provider counts against a key, and none of these for it; one question is asked."""
    provider.answer = answer
    found = doctor.ask_provider(name, VALUE)
    assert found.accepted is (False if name in refusing else None)
    assert found.words
    assert len(provider.asked) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_carry_the_key_away(provider: Provider, code: int) -> None:
    """No redirect is followed, to whatever host."""
    provider.answer, provider.headers = (code, b""), {"Location": f"{provider.url}/elsewhere"}
    assert doctor.ask_provider("vast", VALUE).accepted is None
    assert [path for path, _ in provider.asked] == ["/vast/api/v0/users/current/"]


def test_an_answer_that_repeats_the_key_is_masked(provider: Provider) -> None:
    """Neither the key nor what is sent for it, nor a terminal's control sequence, is in the words of a refusal."""
    sent = base64.b64encode(f"{VALUE}:".encode()).decode()
    said = f"\x1b[31mno {VALUE}\nno {sent} {'x' * 1000}"
    provider.answer = (401, {"error": {"code": "global/invalid-api-key", "message": said}})
    words = doctor.ask_provider("lambda", VALUE).words
    assert "no *** no *** xxx" in words
    assert len(words) <= 600


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "ftp://127.0.0.1", "file:///etc/passwd", "127.0.0.1:80", "http://[", "http://"]
)
def test_a_provider_that_cannot_be_asked_says_nothing_of_the_key(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """No connection, and an address that is none, leave the key untested, in words."""
    monkeypatch.setenv("GPU_LAMBDA_URL", url)
    found = doctor.ask_provider("lambda", VALUE)
    assert found.accepted is None
    assert found.words


def test_a_provider_that_never_answers_is_not_waited_for(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the question and falls silent leaves the key untested after the deadline."""
    monkeypatch.setattr(doctor, "ANSWER_S", 0.3)
    monkeypatch.setenv("VAST_API_KEY", VALUE)
    provider.wait.clear()
    assert named(doctor.accounts(True))["vast key"].state == WARN


def test_an_untested_key_is_kept_and_a_refused_one_is_not(provider: Provider) -> None:
    """A typed key is kept when it is taken or cannot be tested, which is said, and never when it is refused."""
    taken = doctor.take_key("lambda", VALUE)
    assert taken.state == OK
    assert str(keys.user_config()) in taken.words
    refused = doctor.take_key("vast", "another-key")
    assert refused.state == BAD
    assert keys.stored()["keys"] == {"lambda": VALUE}
    provider.answer = (503, b"")
    untested = doctor.take_key("vast", "another-key")
    assert untested.state == WARN
    assert "not tested" in untested.words
    assert keys.stored()["keys"] == {"lambda": VALUE, "vast": "another-key"}
    with pytest.raises(UsageError):
        doctor.take_key("vast", "two words")


def test_keys_offline_and_where_others_can_read(home: Path, provider: Provider) -> None:
    """Offline a key is found but not tested; a file of it that others can read is warned of; a damaged one is bad."""
    path = home / ".config" / "vastai" / "vast_api_key"
    path.parent.mkdir(parents=True)
    path.write_text(VALUE)
    path.chmod(0o644)
    found = named(doctor.accounts(False))
    assert found["vast key"].state == WARN
    assert "others can read" in found["vast key"].words
    path.chmod(0o600)
    assert named(doctor.accounts(False))["vast key"].state == OK
    path.write_text("two words")
    assert named(doctor.accounts(False))["vast key"].state == BAD
    assert named(doctor.accounts(False))["lambda key"].state == WARN
    assert doctor.lacking() == ["lambda"]
    assert provider.asked == []


def test_the_command_and_its_exit_codes(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 while nothing is bad, 3 else; the document is the list of checks; a key is nowhere in either."""
    monkeypatch.setenv("LAMBDA_API_KEY", VALUE)
    config.state_folder().chmod(0o700)
    monkeypatch.setattr(doctor, "_GB", 1)  # whatever disk the tests run on
    good, document = run(), run("--json")
    assert (good.exit_code, document.exit_code) == (0, 0), good.output
    assert "lambda takes it" in good.stdout
    assert [check["name"] for check in json.loads(document.stdout)] == [c.name for c in doctor.checks(lambda _: None)]
    monkeypatch.setenv("LAMBDA_API_KEY", f"wrong-{VALUE}")
    bad, document = run(), run("--json")
    assert (bad.exit_code, document.exit_code) == (3, 3)
    assert "Make a new one" in bad.stdout
    assert not [done for done in (good, bad, document) if VALUE in done.output]
    asked = len(provider.asked)
    assert run("--offline").exit_code == 0
    assert len(provider.asked) == asked


def in_a_terminal(code: str, answers: list[tuple[bytes, bytes]]) -> tuple[bytes, int]:
    """What a Python program shows in a terminal of its own, given an answer after each prompt; and its exit code."""
    ours, theirs = pty.openpty()
    terminal = os.ttyname(theirs)
    opened = f"import os; os.open({terminal!r}, os.O_RDWR)\n"  # a session without a terminal gets the one it opens
    child = subprocess.Popen(
        [sys.executable, "-c", opened + code], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown = b""

    def more() -> bool:
        nonlocal shown
        if select.select([ours], [], [], 0)[0]:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # the terminal was closed: the program has ended
                return True
        return False

    try:
        seen = 0
        for prompt, answer in answers:
            until(lambda: more() or prompt in shown[seen:], 20)  # noqa: B023 -- called in this turn
            seen = len(shown)
            os.write(ours, answer + b"\n")
        until(lambda: more() or child.poll() is not None, 20)
        more()
        return shown, child.wait(timeout=20)
    finally:
        child.kill()
        child.wait()
        os.close(ours)


def test_a_missing_key_is_asked_for_and_not_shown(provider: Provider) -> None:
    """In a terminal a missing key is asked for, hidden, again when refused, tested, and kept; empty leaves it out."""
    code = "from orchestrator.cli.house import doctor; doctor([])"
    prompt_one, prompt_two = b"key for lambda", b"key for vast"
    answers = [(prompt_one, b"wrong"), (prompt_one, VALUE.encode()), (prompt_two, b"")]
    shown, code_of_exit = in_a_terminal(code, answers)
    assert VALUE.encode() not in shown
    assert b"wrong" not in shown
    assert re.search(rb"lambda key\s+kept in .*config\.json; lambda takes it", shown.replace(b"\r\n", b" "))
    assert keys.stored()["keys"] == {"lambda": VALUE}
    assert code_of_exit == (3 if re.search(rb"(?m)^bad (?!.*refuses)", shown) else 0)


def test_with_y_nothing_is_asked(provider: Provider) -> None:
    """In a terminal, -y asks for no key."""
    shown, _ = in_a_terminal("from orchestrator.cli.house import doctor; doctor(['-y'])", [])
    assert b"Account key" not in shown
    assert b"vast key" in shown

"""Images pinned by digest: what registries say, and what is told before anything is rented."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConfigError, ProviderDown
from orchestrator.providers import images
from tests.orchestrator.providers.loopback import HTML, Asked, Scripted, Server, Time, closed_port

DIGEST = "sha256:" + "0123456789abcdef" * 4
FOUND = Scripted(200, b"", {"Docker-Content-Digest": DIGEST, "Content-Type": "application/vnd.oci.image.index.v1+json"})


@pytest.fixture(autouse=True)
def _registry(server: Server, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_REGISTRY_URL", server.url)


def challenge(server: Server, realm: str | None = None) -> Scripted:
    """What a registry says to somebody without a token."""
    said = f'Bearer realm="{realm or server.url + "/token"}",service="registry.docker.io",scope="repository:x:pull"'
    return Scripted(401, {"errors": [{"code": "UNAUTHORIZED"}]}, {"WWW-Authenticate": said})


def guarded(server: Server, token: Any = None, then: Scripted = FOUND) -> Callable[[Asked], Scripted]:
    """A registry that gives everybody a token, and wants one."""

    def answer(asked: Asked) -> Scripted:
        if asked.path.startswith("/token"):
            return Scripted(200, {"token": "anonymous-token"} if token is None else token)
        return then if asked.headers.get("Authorization") == "Bearer anonymous-token" else challenge(server)

    return answer


@pytest.mark.parametrize(
    ("name", "path", "pinned"),
    [
        ("vastai/base-image:stock-py312", "vastai/base-image/manifests/stock-py312", "vastai/base-image"),
        ("ubuntu:24.04", "library/ubuntu/manifests/24.04", "ubuntu"),
        ("ubuntu", "library/ubuntu/manifests/latest", "ubuntu"),
        ("docker.io/ubuntu:1", "library/ubuntu/manifests/1", "docker.io/ubuntu"),
        ("docker.io/a/b", "a/b/manifests/latest", "docker.io/a/b"),
        ("ghcr.io/owner/name/part:v1.2_3", "owner/name/part/manifests/v1.2_3", "ghcr.io/owner/name/part"),
        ("nvcr.io/nvidia/cuda:13.0.2-base", "nvidia/cuda/manifests/13.0.2-base", "nvcr.io/nvidia/cuda"),
        ("localhost:5000/x:y", "x/manifests/y", "localhost:5000/x"),
        ("registry.example:5000/x/y:z", "x/y/manifests/z", "registry.example:5000/x/y"),
    ],
)
def test_a_name_is_pinned_by_its_registry(server: Server, name: str, path: str, pinned: str) -> None:
    """A name becomes itself with the digest that its registry tells, asked once in a process, as nobody."""
    server.usual = lambda _: FOUND
    for _ in range(3):
        assert images.pinned(name) == f"{pinned}@{DIGEST}"
    assert server.paths() == [f"HEAD /v2/{path}"]
    assert "Authorization" not in server.asked[0].headers
    assert "application/vnd.oci.image.index.v1+json" in server.asked[0].headers["Accept"]


def test_a_registry_that_wants_a_token(server: Server) -> None:
    """A token that everybody is given is fetched for this one image, to read it, and used."""
    server.usual = guarded(server)
    assert images.pinned("vastai/base-image:one") == f"vastai/base-image@{DIGEST}"
    head, token, again = server.asked
    assert token.path == "/token?service=registry.docker.io&scope=repository%3Avastai%2Fbase-image%3Apull"
    assert (head.path, "Authorization" in token.headers) == (again.path, False)
    server.usual = guarded(server, {"access_token": "anonymous-token"})
    assert images.pinned("vastai/base-image:two") == f"vastai/base-image@{DIGEST}"


@pytest.mark.parametrize("name", [f"a/b@{DIGEST}", f"a/b:tag@{DIGEST}", f"ghcr.io/a/b:1@{DIGEST}"])
def test_an_image_with_a_digest_is_not_asked_for(server: Server, name: str) -> None:
    """What is pinned already is taken as it is, its tag left out, and nobody is asked."""
    assert images.pinned(name) == f"{name.partition('@')[0].partition(':')[0]}@{DIGEST}"
    assert server.asked == []


def test_the_usual_image_is_pinned_already(server: Server) -> None:
    """The image that is used when none is named is pinned already: to rent a machine no registry is needed."""
    assert images.pinned(images.USUAL) == images.USUAL
    assert server.asked == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "Ubuntu",
        "ubuntu:",
        "a//b",
        "a/b:c:d",
        "a/b@sha256:12",
        "vastai/base-image:@vastai-automatic-tag",
        "https://ghcr.io/a/b",
        "../../etc",
        "a/../b",
        "a b",
        "a/b:c d",
        "a/b\n",
        "-rm",
        "x" * 600,
        f"a/b@{DIGEST.upper()}",
        "日本/b",
    ],
)
def test_what_is_no_name_of_an_image(server: Server, name: str) -> None:
    """Anything else is named as wrong, and nobody is asked."""
    with pytest.raises(ConfigError, match="no name of an image") as caught:
        images.pinned(name)
    assert "Nothing was rented" in caught.value.message
    assert server.asked == []


def absences(server: Server) -> dict[str, Callable[[Asked], Scripted]]:
    missing = Scripted(404, {"errors": [{"code": "MANIFEST_UNKNOWN"}]})
    return {
        "404": lambda _: missing,
        "404 with a token": guarded(server, then=missing),
        "401 with a token": guarded(server, then=challenge(server)),
        "403 with a token": guarded(server, then=Scripted(403, b"")),
        "401 of a password": lambda _: Scripted(401, b"", {"WWW-Authenticate": 'Basic realm="x"'}),
        "401 alone": lambda _: Scripted(401, b""),
        "no token": lambda asked: Scripted(401, b"") if "token" in asked.path else challenge(server),
        "elsewhere": lambda _: challenge(server, "http://registry.example/token"),
        "no address": lambda _: challenge(server, "file:///etc/passwd"),
        "a login": lambda _: challenge(server, "https://me:word@auth.example/token"),
        "a query": lambda _: challenge(server, "https://auth.example/token?x=1"),
        "odd": lambda _: challenge(server, "https://[::1/token"),
    }


@pytest.mark.parametrize("form", range(12))
def test_an_image_that_cannot_be_had(server: Server, form: int) -> None:
    """One that does not exist, or needs a login, is named, with its registry, before anything is rented."""
    name, answer = list(absences(server).items())[form]
    server.usual = answer
    with pytest.raises(ConfigError, match=r"somebody/thing:v1 does not exist at registry-1\.docker\.io, or needs a"):
        images.pinned("somebody/thing:v1")
    assert len(server.asked) <= 3, name


@pytest.mark.parametrize(
    "answer",
    [
        Scripted(500, b""),
        Scripted(503, HTML),
        Scripted(429, b"toomanyrequests"),
        Scripted(301, b"", {"Location": "https://elsewhere.invalid/"}),
        Scripted(200, b"", {"Docker-Content-Digest": "sha256:x"}),
        Scripted(400, b""),
        Scripted(fault="reset"),
        Scripted(fault="close"),
    ],
)
def test_a_registry_that_does_not_say(server: Server, time: Time, answer: Scripted) -> None:
    """A registry out of order is not an image that is missing: asked three times at most, and told as what it is."""
    server.usual = lambda _: answer
    before = time.now
    with pytest.raises(ProviderDown, match="did not say what somebody/thing:v1 is"):
        images.pinned("somebody/thing:v1")
    assert len(server.asked) <= 3
    assert time.now - before < 10


@pytest.mark.parametrize(
    "token", [{}, {"token": 5}, {"token": "two words"}, {"token": ""}, [], "x", {"token": "x\r\ny"}]
)
def test_a_token_that_is_none(server: Server, token: Any) -> None:
    """What is no token is not sent on."""
    server.usual = guarded(server, token)
    with pytest.raises(ProviderDown, match="without a token"):
        images.pinned("somebody/thing:v1")
    assert not [asked for asked in server.asked if "Authorization" in asked.headers]


def test_a_registry_that_tells_the_digest_by_the_document(server: Server) -> None:
    """Where the short answer lacks the digest, it is made from the document itself."""
    document = b'{"schemaVersion": 2}'
    server.usual = lambda asked: Scripted(200, document if asked.method == "GET" else b"")
    assert images.pinned("a/b:c") == f"a/b@sha256:{hashlib.sha256(document).hexdigest()}"
    assert [asked.method for asked in server.asked] == ["HEAD", "GET"]


def test_a_registry_that_recovers(server: Server) -> None:
    """One failure is outlasted; what failed is not remembered."""
    server.script = [Scripted(502, HTML), FOUND]
    assert images.pinned("a/b:one") == f"a/b@{DIGEST}"
    server.usual = lambda _: Scripted(404, b"")
    with pytest.raises(ConfigError):
        images.pinned("a/b:two")
    server.usual = lambda _: FOUND
    assert images.pinned("a/b:two") == f"a/b@{DIGEST}"


def test_nobody_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing listens, the registry does not answer, which is said."""
    monkeypatch.setenv("GPU_REGISTRY_URL", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ProviderDown, match="connection refused"):
        images.pinned("a/b:c")


def test_threads_ask_once(server: Server) -> None:
    """Several launches at once look the same image up once."""
    server.usual = lambda _: FOUND
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(images.pinned("a/b:shared"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [f"a/b@{DIGEST}"] * 8
    assert len(server.asked) == 1


@given(st.text("abcXYZ019./:@-_ sha256", max_size=60))
def test_a_name_is_read_or_refused(name: str) -> None:
    """Whatever is typed, what is asked of a registry is a plain path, or it is refused."""
    try:
        image = images._parsed(name)
    except ConfigError:
        return
    assert not set(image.path + image.tag) - set("abcdefghijklmnopqrstuvwxyzXYZ0123456789._-/")
    assert ".." not in image.path.split("/")
    assert "/" not in image.tag

"""Which image a name means just now: its digest, asked of its registry before anything is rented."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import urllib.parse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator import clock
from orchestrator.errors import ConfigError, ProviderDown
from orchestrator.plain import plain

if TYPE_CHECKING:
    from orchestrator.providers.exchange import Answer, Failure

USUAL = "vastai/base-image@sha256:bf6bb047dbc1105c89a5ac41b9a32205a2f2e022cb24d632d055c5b14a86f7ec"
"""Made by Vast.ai for its own way of starting sshd: Ubuntu 24.04, CUDA 12.8 and its tools, Python, git, rsync.

By its tag cuda-12.8.1-cudnn-devel-ubuntu24.04-py310, as public projects pin it. The driver comes from the host,
and PyTorch brings the libraries it needs.
"""
_HUB = "docker.io"
_HUB_HOST = "registry-1.docker.io"
_NAME_MAX = 512
_NAME = re.compile(
    r"(?:(?P<host>[a-z0-9-]+(?:\.[a-z0-9-]+)+(?::[0-9]{1,5})?|localhost(?::[0-9]{1,5})?)/)?"
    r"(?P<path>[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_CHALLENGE = re.compile(r'([a-z]+)="([^"]*)"')
_ACCEPT = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "docker.distribution.manifest.list.v2",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.v2",
    )
)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_READ_S = 10.0
_TRIES = 3
_PAUSE_S = 1.0
_KNOWN: dict[tuple[str, str], str] = {}
_LOCK = threading.Lock()


@dataclass(frozen=True)
class _Image:
    """A name in its parts."""

    typed: str
    host: str
    path: str
    """Within its registry."""
    tag: str
    digest: str | None

    @property
    def pinned(self) -> str:
        """By digest alone: a name with a tag and a digest is cut at its colon by some of Vast.ai's own pages."""
        return f"{self.typed}@{self.digest}"


def pinned(name: str) -> str:
    """The image as `name@sha256:…`, which means the same for ever; one that has a digest already is not asked for.

    Raises ConfigError, naming it, for one that is no image name, does not exist or needs a login; ProviderDown when its
    registry does not answer. An answer counts for this process alone. `GPU_REGISTRY_URL` leads tests to another.
    """
    image = _parsed(name)
    if image.digest is not None:
        return image.pinned
    base = (os.environ.get("GPU_REGISTRY_URL") or f"https://{image.host}").rstrip("/")
    with _LOCK:
        if (base, name) not in _KNOWN:
            _KNOWN[base, name] = replace(image, digest=_digest(image, base)).pinned
        return _KNOWN[base, name]


def _parsed(name: str) -> _Image:
    found = _NAME.fullmatch(name) if len(name) <= _NAME_MAX else None
    if found is None:
        raise ConfigError(
            f"{plain(name)[:100]!r} is no name of an image that can be pinned. Nothing was rented.",
            f"Such as {USUAL}, ghcr.io/owner/name:tag, or name@sha256:…",
        )
    host, path = found["host"] or _HUB, found["path"]
    typed = f"{found['host']}/{path}" if found["host"] else path
    if host in (_HUB, "index.docker.io"):
        host, path = _HUB_HOST, path if "/" in path else f"library/{path}"
    return _Image(typed, host, path, found["tag"] or "latest", found["digest"])


def _digest(image: _Image, base: str) -> str:
    """Ask the registry, as nobody."""
    url = f"{base}/v2/{image.path}/manifests/{image.tag}"
    answer = _asked("HEAD", url, None, image)
    token = None
    if answer.status == 401:
        token = _token(answer.headers.get("WWW-Authenticate") or "", base, image)
        answer = _asked("HEAD", url, token, image)
    if answer.status in (401, 403, 404):
        raise _absent(image)
    told = answer.headers.get("Docker-Content-Digest") or ""
    if answer.status == 200 and not _DIGEST.fullmatch(told):  # some tell it only with the document itself
        answer = _asked("GET", url, token, image)
        told = f"sha256:{hashlib.sha256(answer.body or b'').hexdigest()}" if answer.body else ""
    if answer.status != 200 or not _DIGEST.fullmatch(told):
        raise _down(image, f"HTTP {answer.status}, without a digest")
    return told


def _token(challenge: str, base: str, image: _Image) -> str:
    """A token for reading this one image, which registries give to everybody."""
    import json

    told = dict(_CHALLENGE.findall(challenge)) if challenge.lower().startswith("bearer ") else {}
    realm = told.get("realm", "")
    if not _is_sound(realm, base):
        raise _absent(image)
    query = {"service": told.get("service", ""), "scope": f"repository:{image.path}:pull"}
    answer = _asked("GET", f"{realm}?{urllib.parse.urlencode(query)}", None, image)
    try:
        document = json.loads(answer.body or b"")
        found = document.get("token") or document.get("access_token")
    except (ValueError, RecursionError, AttributeError):
        found = None
    if answer.status in (401, 403):
        raise _absent(image)
    if not isinstance(found, str) or not re.fullmatch(r"[!-~]{1,8192}", found):
        raise _down(image, f"HTTP {answer.status}, without a token")
    return found


def _is_sound(realm: str, base: str) -> bool:
    """Whether tokens may be asked for there: over TLS, unless the registry itself is on this computer."""
    try:
        parts, own = urllib.parse.urlsplit(realm), urllib.parse.urlsplit(base)
        near = parts.scheme == "http" and {parts.hostname, own.hostname} <= set(_LOOPBACK)
        return (
            bool(parts.hostname) and "@" not in parts.netloc and not parts.query and (parts.scheme == "https" or near)
        )
    except ValueError:
        return False


def _asked(method: str, url: str, token: str | None, image: _Image) -> Answer:
    """What a registry says, asked some times while it says nothing."""
    from orchestrator.providers import exchange

    answer: Answer | Failure = exchange.Failure(False, "it was not asked")
    direct = urllib.parse.urlsplit(url).hostname in _LOOPBACK
    for attempt in range(_TRIES):
        if attempt:
            clock.sleep(_PAUSE_S * attempt)
        headers = {"Accept": _ACCEPT if "/manifests/" in url else "application/json", "User-Agent": "gpu-cli"}
        answer = exchange.exchange(exchange.Request(method, url, token, headers, read_s=_READ_S, direct=direct))
        if isinstance(answer, exchange.Answer) and answer.status != 429 and answer.status < 500:
            return answer
    words = answer.words if isinstance(answer, exchange.Failure) else f"HTTP {answer.status}"
    raise _down(image, words)


def _absent(image: _Image) -> ConfigError:
    return ConfigError(
        f"The image {image.typed}:{image.tag} does not exist at {image.host}, or needs a login. Nothing was rented.",
        "Look at its name. A machine of somebody else's is given no login.",
    )


def _down(image: _Image, words: str) -> ProviderDown:
    return ProviderDown(
        f"The registry {image.host} did not say what {image.typed}:{image.tag} is: {words}. Nothing was rented.",
        f"Again in a minute. Or name it by its digest: {image.typed}@sha256:…",
    )

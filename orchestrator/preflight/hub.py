"""Small files of a model on the Hugging Face Hub: bounded in size, number and time; weights are never downloaded."""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from orchestrator import clock
from orchestrator.preflight.findings import Fault, error, quoted, unknown
from orchestrator.preflight.shelf import FILE_MAX_BYTES, LISTING_MAX_BYTES, Listing, json_object

if TYPE_CHECKING:
    import requests

ENDPOINT = "https://huggingface.co"
DEADLINE_S = 60.0
"""All reads of one model together: about eight small files, each usually there within half a second."""
_CONNECT_S, _READ_S = 10.0, 10.0
_TRIES, _PAUSE_S, _PAUSE_MAX_S = 3, 1.0, 5.0
_REDIRECTS_MAX = 5
_CHUNK_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUSY = (429, 500, 502, 503, 504)
_OFFLINE = ("1", "ON", "YES", "TRUE")
"""Values of HF_HUB_OFFLINE by which the Hub's own library stays offline."""
_Answered = TypeVar("_Answered")


@dataclass(frozen=True)
class _Answer:
    """A whole answer; header names in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def is_of_hub(self) -> bool:
        """Whether the Hub itself says no, rather than something between, with a page for people."""
        return any(name.startswith("x-error-") for name in self.headers) or "json" in self.headers.get(
            "content-type", ""
        )


class Hub:
    """One repository at one revision (None: `main`). Every method raises Fault, and ends by the deadline."""

    def __init__(self, parameter: str, name: str, revision: str | None = None) -> None:
        self.asked = f"{parameter}={name}"
        self._name = name
        self._revision = revision or "main"
        self._given_revision = revision
        self.endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        self._token = os.environ.get("HF_TOKEN", "").strip()
        self._ends_at = clock.monotonic() + DEADLINE_S
        self._http: requests.Session | None = None

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        """Close its connections."""
        if self._http is not None:
            self._http.close()

    def listing(self) -> Listing:
        """The repository's files with their sizes, as one commit has them; later reads are of that commit."""
        self._check_asked()
        revision = quote(self._revision, safe="")
        answer = self._get(f"/api/models/{quote(self._name)}/revision/{revision}?blobs=true", LISTING_MAX_BYTES)
        if answer.status != 200:
            raise self._refusal(answer)
        document = json_object(answer.body)
        if document is None or not isinstance(document.get("siblings"), list):
            raise self._not_known("answers with something else than a list of files")
        if isinstance(commit := document.get("sha"), str) and _COMMIT.fullmatch(commit):
            self._revision = commit
        return Listing.of_hub(document)

    def read(self, name: str) -> bytes | None:
        """A small file; None when there is none of that name."""
        revision = quote(self._revision, safe="")
        answer = self._get(f"/{quote(self._name)}/resolve/{revision}/{quote(name)}", FILE_MAX_BYTES)
        if answer.status == 200:
            return answer.body
        if answer.status == 404 and answer.headers.get("x-error-code") == "EntryNotFound":
            return None
        raise self._refusal(answer)

    def _check_asked(self) -> None:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in _OFFLINE:
            raise self._not_known("was not asked, because HF_HUB_OFFLINE is set")
        if not _NAME.fullmatch(self._name) or ".." in self._name:
            raise error(
                "no_such_model",
                f"{self.asked} is neither a folder here nor a name that the Hub could have.",
                "Check the spelling: a Hub name is OWNER/NAME; for a folder give a path such as ./my-model.",
            )

        if self._revision in (".", ".."):  # as a word of an address, it would lead to another one
            raise self._no_such_revision()

    def _refusal(self, answer: _Answer) -> Fault:
        """Why there is no answer, as the one who asked can mend it."""
        code = answer.headers.get("x-error-code", "")
        words = answer.headers.get("x-error-message", "")
        if not answer.is_of_hub():
            return self._not_known(f"answered with status {answer.status} and no word of the Hub's own")
        if code == "RevisionNotFound":
            return self._no_such_revision()
        if code == "GatedRepo":
            return self._gated()
        if self._token and answer.status == 401 and "invalid credentials" in words.lower():
            return error(
                "bad_token",
                f"{self.endpoint} does not accept HF_TOKEN, so {self.asked} cannot be read.",
                f"Make a new token on {self.endpoint}/settings/tokens, or unset HF_TOKEN for a public model.",
            )
        if code == "RepoNotFound" or answer.status in (401, 404):
            return self._no_such_model()
        if answer.status == 403:
            return error(
                "no_access",
                f"{self.asked}: the account of HF_TOKEN has no access: {quoted(words or 'forbidden')}",
                f"Look at {self.endpoint}/{self._name}; a fine-grained token must allow reading gated repositories.",
            )
        return self._not_known(f"answered with status {answer.status}")

    def _no_such_revision(self) -> Fault:
        return error(
            "no_such_revision",
            f"{self.asked} has no revision {quoted(self._given_revision or 'main')}.",
            "Use a branch, tag or commit hash of that repository: --set revision=…",
        )

    def _gated(self) -> Fault:
        reason = "the account of HF_TOKEN has no access" if self._token else "HF_TOKEN is not set"
        return error(
            "gated",
            f"{self.asked} is gated, and {reason}.",
            f"Accept its terms on {self.endpoint}/{self._name} and set HF_TOKEN to a token of that account.",
        )

    def _no_such_model(self) -> Fault:
        return error(
            "no_such_model",
            f"{self.asked}: {self.endpoint} has no model of that name (or it is private).",
            "Check the spelling; for a private model set HF_TOKEN; for a folder give a path such as ./my-model.",
        )

    def _not_known(self, what: str) -> Fault:
        return unknown(
            "not_looked_at",
            f"{self.asked} could not be looked at: {self.endpoint} {what}. Whether it exists and fits is not known.",
            "The run may work all the same; a mistake would show on the machine, while it costs money.",
        )

    def _get(self, path: str, max_bytes: int) -> _Answer:
        """The answer to a path, asked again a few times while the Hub is busy or cannot be reached."""
        import requests

        for attempt in range(_TRIES):
            pause_s = _PAUSE_S * 2**attempt
            try:
                answer = within(self._left_s(), lambda: self._follow(self.endpoint + path, max_bytes))
            except TimeoutError:
                raise self._not_known("does not answer") from None
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, ValueError):
                raise self._not_known("is not an address; look at HF_ENDPOINT") from None
            except requests.RequestException as failure:
                trouble = f"cannot be reached ({type(failure).__name__})"
            else:
                if answer.status not in _BUSY:
                    return answer
                trouble = f"is busy (status {answer.status})"
                pause_s = max(pause_s, _seconds(answer.headers.get("retry-after", "")))
            if attempt + 1 < _TRIES:
                clock.sleep(min(pause_s, _PAUSE_MAX_S, self._left_s()))
        raise self._not_known(trouble)

    def _left_s(self) -> float:
        left_s = self._ends_at - clock.monotonic()
        if left_s <= 0:
            raise self._not_known("does not answer in time")
        return left_s

    def _follow(self, url: str, max_bytes: int) -> _Answer:
        """The answer at the end of the redirects. The token goes to the endpoint alone, to no other host."""
        for _ in range(_REDIRECTS_MAX + 1):
            with self._open(url) as response:
                target = response.headers.get("location") if response.is_redirect else None
                if target is None:
                    headers = {name.lower(): value for name, value in response.headers.items()}
                    return _Answer(response.status_code, headers, self._body(response, max_bytes))
                next_url = urljoin(url, target)
            if urlsplit(next_url).scheme not in ("https", urlsplit(self.endpoint).scheme):
                raise self._not_known("sends us on to an address that is not encrypted")
            url = next_url
        raise self._not_known("sends us from one address to the next")

    def _open(self, url: str) -> requests.Response:
        import requests

        self._http = self._http or requests.Session()

        def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
            # A callable, so that requests does not take a password for this host from ~/.netrc in its place.
            if self._token and _origin(url) == _origin(self.endpoint):
                request.headers["Authorization"] = f"Bearer {self._token}"
            return request

        return self._http.get(
            url,
            auth=sign,
            headers={"Accept-Encoding": "identity", "User-Agent": "gpu"},
            allow_redirects=False,
            stream=True,
            timeout=(_CONNECT_S, _READ_S),
        )

    def _body(self, response: requests.Response, max_bytes: int) -> bytes:
        body = bytearray()
        for chunk in response.iter_content(_CHUNK_BYTES):
            body += chunk
            if len(body) > max_bytes:
                raise self._not_known(f"sends more than {max_bytes // 1_000_000} MB for a small file")
        return bytes(body)


def within(seconds: float, work: Callable[[], _Answered]) -> _Answered:
    """What `work` returns or raises; TimeoutError when it is not over by then, and it is left to end by itself.

    The time-outs of sockets begin anew with each byte, so that a server which drips could hold us for hours.
    """
    box: queue.SimpleQueue[Callable[[], _Answered] | None] = queue.SimpleQueue()

    def run() -> None:
        outcome: Callable[[], _Answered] | None = None
        try:
            answered = work()
            outcome = lambda: answered  # noqa: E731 -- what the waiting side calls
        except (Fault, OSError, ValueError) as failure:
            outcome = _raising(failure)
        finally:
            box.put(outcome)

    threading.Thread(target=run, daemon=True).start()
    try:
        outcome = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if outcome is None:
        raise RuntimeError("a read of the Hub ended without an outcome")
    return outcome()


def _raising(failure: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise failure

    return fail


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what must be equal for a token to be sent along."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _seconds(text: str) -> float:
    return float(text) if re.fullmatch(r"[0-9]{1,4}", text) else 0.0

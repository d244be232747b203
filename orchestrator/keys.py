"""Account keys of providers: where they are found, how one is kept, and how secrets are taken out of what is shown."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import durable, engines, locks
from orchestrator import config
from orchestrator.errors import ConfigError, UsageError

VARIABLES = {"lambda": "LAMBDA_API_KEY", "vast": "VAST_API_KEY"}
"""Each provider with the environment variable that holds its key."""
SECRET_VARIABLES = ("HF_TOKEN", engines.KEY_VARIABLE, *VARIABLES.values())
"""Environment variables whose values are never shown."""
_HIDDEN: set[str] = set()
MASK = "***"
_SECRET_MIN = 6
"""Anything shorter would mask parts of ordinary words, and is no secret."""
_KEY = re.compile(r"[!-~]{1,1024}")
_LAMBDA_LINE = re.compile(r"^[ \t]*api_key[ \t]*=[ \t]*(.*?)[ \t]*\r?$", re.MULTILINE)
_FILE_MAX_BYTES = 64 * 1024
_LOCK_WAIT_S = 10.0


@dataclass(frozen=True)
class Key:
    """A provider's key and where it was found; its value is not part of what printing shows."""

    provider: str
    value: str = field(repr=False)
    source: str
    """In words: the variable, or the file."""
    path: Path | None = None
    """The file it stands in, if it does."""


def user_config() -> Path:
    """The user config file, `config.json` in the state folder: {"keys": {"lambda": …, "vast": …}}."""
    return config.state_folder() / "config.json"


def find(provider: str) -> Key | None:
    """The key of a provider, None when there is none: environment, the provider's own file, then the user config file.

    Raises ConfigError naming the place, never the value, when what stands there cannot be a key.
    """
    found = _in_environment(provider) or _in_own_file(provider) or _in_user_config(provider)
    if found is not None and not _KEY.fullmatch(found.value):
        raise ConfigError(f"{found.source} holds something that cannot be an account key.", "Put it there in one line.")
    return found


def is_kept(provider: str) -> bool:
    """Whether the key of a provider stands in a file, where cron finds it, too: that has not this environment."""
    return (_in_own_file(provider) or _in_user_config(provider)) is not None


def check(value: str) -> None:
    """Raise UsageError, without the value, unless it can be an account key: one word of plain signs."""
    if not _KEY.fullmatch(value):
        raise UsageError("That cannot be an account key: it must be one word of plain ASCII letters, digits and signs.")


def store(provider: str, value: str) -> Path:
    """Keep a key in the user config file, readable by this user alone; returns that file. Raises UsageError."""
    check(value)
    merge({"keys": {provider: value}}, replace=True)
    return user_config()


def stored() -> dict[str, Any]:
    """What the user config file says, with no keys when there is none; ConfigError when it is damaged."""
    return parse(_read(user_config()) or "{}", str(user_config()))


def merge(document: dict[str, Any], *, replace: bool) -> list[str]:
    """Add what a user config file says to this user's; returns the providers whose keys are new or replaced.

    What stands there already stays, unless `replace`. Raises ConfigError when it cannot be written.
    """
    try:
        with locks.held(config.state_folder() / "config.lock", _LOCK_WAIT_S):
            here = stored()
            new = {name: word for name, word in document["keys"].items() if replace or name not in here["keys"]}
            merged = {**document, **here, "keys": {**here["keys"], **new}}
            if merged != here:
                durable.save_json(user_config(), merged)
    except OSError as error:
        raise ConfigError(f"{user_config()} cannot be written: {error.strerror or error}. It is as it was.") from None
    return sorted(new)


def change(name: str, value: Any) -> None:
    """Set one setting of the user config file. Raises ConfigError when it cannot be written."""
    try:
        with locks.held(config.state_folder() / "config.lock", _LOCK_WAIT_S):
            durable.save_json(user_config(), {**stored(), name: value})
    except OSError as error:
        raise ConfigError(f"{user_config()} cannot be written: {error.strerror or error}. It is as it was.") from None


def parse(text: str, where: str) -> dict[str, Any]:
    """What the text of a user config file says, `keys` always there; ConfigError, saying where, when it is none."""
    try:
        document: dict[str, Any] = json.loads(text)
        keys = document.setdefault("keys", {})
        sound = all(isinstance(word, str) and _KEY.fullmatch(word) for word in itertools.chain(*keys.items()))
    except (ValueError, RecursionError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise ConfigError(
            f'{where} is damaged: it must be {{"keys": {{"lambda": "…"}}}}, each key one word.',
            f"Mend it, or move it away: {where}",
        )
    return document


def _in_environment(provider: str) -> Key | None:
    name = VARIABLES[provider]
    value = os.environ.get(name, "").strip()
    return Key(provider, value, name) if value else None


def _in_own_file(provider: str) -> Key | None:
    """The key as the provider's own tools keep it."""
    if provider == "lambda":
        paths = [Path.home() / ".lambda_cloud" / "lambda_keys"]
    else:
        folders = [Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"), Path.home() / ".config"]
        paths = [folder / "vastai" / "vast_api_key" for folder in folders]
    for path in paths:
        text = _read(path)
        if text is not None and provider == "lambda":
            line = _LAMBDA_LINE.search(text)
            text = line[1].strip("\"'") if line else ""
        if text and text.strip():
            return Key(provider, text.strip(), str(path), path)
    return None


def _in_user_config(provider: str) -> Key | None:
    value = stored()["keys"].get(provider)
    return Key(provider, value, str(user_config()), user_config()) if value else None


def _read(path: Path) -> str | None:
    """The text of a small file, None when there is none; ConfigError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_FILE_MAX_BYTES).decode("utf-8-sig", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Make it readable, or move it away.") from None


def secrets(names: Iterable[str] = ()) -> list[str]:
    """The secret values in this process's environment: tokens, account keys, and the variables of these names."""
    found = (os.environ.get(name, "").strip() for name in (*SECRET_VARIABLES, *_HIDDEN, *names))
    return [value for value in found if len(value) >= _SECRET_MIN]


def hide(names: Iterable[str]) -> None:
    """Count the variables of these names as secret from now on: a job was or is handed them."""
    _HIDDEN.update(names)


def masked(text: str, names: Iterable[str] = (), more: Iterable[str] = ()) -> str:
    """The text with every secret of the environment, and of `more`, taken out, even where two overlap."""
    masker, data = Masker([*secrets(names), *more]), text.encode("utf-8", "surrogatepass")
    if not masker.is_needed(data):
        return text
    return (masker.feed(data) + masker.flush()).decode("utf-8", "surrogatepass")


class Masker:
    """Takes secrets out of a stream of bytes, wherever it is cut; holds back only what may be the start of one.

    Every byte that belongs to a secret is replaced, and each unbroken stretch of such bytes by one MASK.
    """

    def __init__(self, values: Iterable[str]) -> None:
        encoded = {value.encode("utf-8", "surrogateescape") for value in values if len(value) >= _SECRET_MIN}
        self._values = sorted(encoded)
        self._held = b""
        self._covered = 0
        """How many of the held bytes belong to a secret that began before them."""
        self._in_mask = False

    def is_needed(self, data: bytes) -> bool:
        """Whether a secret stands in the data."""
        return any(value in data for value in self._values)

    def feed(self, chunk: bytes) -> bytes:
        """What can be shown now."""
        data = self._held + chunk
        return self._shown(data, len(data) - self._unsure(data))

    def flush(self) -> bytes:
        """What was held back, at the end of the stream."""
        return self._shown(self._held, len(self._held))

    def _unsure(self, data: bytes) -> int:
        """How many bytes at the end may be the start of a secret that is not over."""
        longest = max((len(value) for value in self._values), default=1) - 1
        for size in range(min(longest, len(data)), 0, -1):
            if any(len(value) > size and data.endswith(value[:size]) for value in self._values):
                return size
        return 0

    def _shown(self, data: bytes, end: int) -> bytes:
        """`data` up to `end`, masked; the rest is held."""
        pieces, at = [], 0
        spans = self._spans(data)
        for start, stop in spans:
            if start >= end:
                break
            pieces.append(data[at:start])
            self._in_mask = self._in_mask and start == at
            if not self._in_mask:
                pieces.append(MASK.encode())
            self._in_mask, at = True, stop
        if at < end:
            pieces.append(data[at:end])
            self._in_mask = False
        self._held = data[end:]
        self._covered = next((stop - end for start, stop in spans if start <= end < stop), 0)
        return b"".join(pieces)

    def _spans(self, data: bytes) -> list[tuple[int, int]]:
        """Where secrets lie in the data: start and stop, in order; what overlaps or touches is one."""
        found = [(0, self._covered)] if self._covered else []
        for value in self._values:
            at = data.find(value)
            while at >= 0:
                found.append((at, at + len(value)))
                at = data.find(value, at + 1)
        spans: list[tuple[int, int]] = []
        for start, stop in sorted(found):
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
            else:
                spans.append((start, stop))
        return spans

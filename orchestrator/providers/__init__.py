"""The clouds that machines are rented from; a new one is a file here and a line in this table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import keys
from orchestrator.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from orchestrator.providers.base import Provider

_WARNED: set[str] = set()


@dataclass(frozen=True)
class Cloud:
    """How a cloud is opened."""

    title: str
    key_page: str
    """Where account keys are made."""
    dashboard: str
    """Where a person looks at what is rented, whatever becomes of a key."""
    kind: Callable[[], Callable[[str], Provider]]
    """What makes an account of a key; imports what it needs only then."""


def _lambda() -> Callable[[str], Provider]:
    from orchestrator.providers.lambda_cloud import LambdaCloud

    return LambdaCloud


def _vast() -> Callable[[str], Provider]:
    from orchestrator.providers.vast import VastCloud

    return VastCloud


PROVIDERS: dict[str, Cloud] = {
    "lambda": Cloud("Lambda Cloud", "https://cloud.lambda.ai/api-keys", "https://cloud.lambda.ai/instances", _lambda),
    "vast": Cloud("Vast.ai", "https://cloud.vast.ai/manage-keys/", "https://cloud.vast.ai/instances/", _vast),
}


def open(name: str) -> Provider:  # noqa: A001 -- always called as providers.open
    """A cloud, with the account key that is found on this computer. Asks it nothing.

    Raises UsageError when there is no such cloud, ConfigError when there is no key, saying where to get one.
    """
    if name not in PROVIDERS:
        raise UsageError(f"No provider is called {name!r}. There is: {', '.join(PROVIDERS)}.")
    cloud, key = PROVIDERS[name], keys.find(name)
    if key is None:
        raise ConfigError(
            f"No account key of {cloud.title} is known on this computer; nothing can be rented there.",
            f"Make one at {cloud.key_page} and give it to: gpu doctor. Or set {keys.VARIABLES[name]}.",
        )
    _warn_of_readers(key)
    return cloud.kind()(key.value)


def names() -> list[str]:
    """Every cloud that machines can be rented from."""
    return list(PROVIDERS)


def open_if_any(name: str) -> Provider | None:
    """A cloud, if an account key for it is found on this computer. ConfigError for one that cannot be a key."""
    return open(name) if keys.find(name) is not None else None


def _warn_of_readers(key: keys.Key) -> None:
    """Say on stderr, once, that other users of this computer can read the file a key stands in."""
    where = str(key.path)
    if key.path is None or where in _WARNED or not _is_open(key.path):
        return
    _WARNED.add(where)
    mend = f"chmod 600 {shlex.quote(where)}"
    print(f"Others can read {where}, and use the account key in it. Type: {mend}", file=sys.stderr)  # noqa: T201


def _is_open(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o077)
    except OSError:  # it was there when the key was read, and is not any more
        return False

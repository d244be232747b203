"""What the guard is told when it is armed: when to end the machine, which one, and by what right; read, never argv."""

from __future__ import annotations

import json
import math
import os
import pwd
import stat
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jobs import durable
from worker.own_instance import Account

_MAX_BYTES = 64 * 1024


@dataclass(frozen=True)
class Spans:
    """How long the guard waits for what, in seconds."""

    tick_s: float = 10.0
    """Between two looks at the clock and at a deadline that was moved."""
    look_s: float = 30.0
    """Between two looks at how idle the machine is."""
    look_within_s: float = 90.0
    """A look that takes longer is given up, and says nothing."""
    call_s: float = 60.0
    again_s: float = 5.0
    """Until the first repetition of a call that failed; doubled each time, with jitter."""
    again_max_s: float = 300.0
    ending_s: float = 60.0
    """Until an end that was accepted is asked for again, should this machine still be there."""
    check_in_s: float = 3600.0
    """Between two calls that only see whether the key is still good and the clock right."""


@dataclass(frozen=True)
class Settings:
    """What the guard is told when it is armed."""

    marker: str
    api_url: str
    key: str = field(repr=False)
    root: str = ""
    """The folder that holds `runs`; empty: `.gpu` in the user's home."""
    user: str = ""
    """Whom the guard becomes once it has its key; empty: it stays who it is."""
    deadline: float | None = None
    """When the machine is ended whatever is on it, seconds since 1970; None: never."""
    deadline_max: float | None = None
    """No deadline is moved beyond this."""
    idle_s: float | None = None
    """After so long without use it is ended, if all is home; None: never."""
    grace_s: float = 60.0
    """How long workers may take to stop cleanly at the deadline."""
    written_at: float = 0.0
    """When the laptop wrote this, seconds since 1970: no clock here is right that shows less."""
    terminals: str = "/dev/pts"
    spans: Spans = Spans()

    @classmethod
    def of(cls, document: dict[str, Any]) -> Settings:
        """The settings in a document, without what newer code has added; ValueError or TypeError when it is none."""
        known = {entry.name for entry in fields(cls)}
        given = {name: value for name, value in document.items() if name in known}
        given["spans"] = Spans(**{name: seconds(value) for name, value in given.get("spans", {}).items()})
        for name in ("deadline", "deadline_max", "idle_s"):
            if given.get(name) is not None:
                given[name] = seconds(given[name])
        return cls(**given)

    def account(self) -> Account:
        """Where and how the provider is asked; ValueError when that cannot be right."""
        return Account(self.api_url, self.key, self.marker, self.spans.call_s)

    def folder(self) -> Path:
        """The folder that holds `runs` on this machine."""
        if self.root:
            return Path(self.root)
        return Path(pwd.getpwnam(self.user).pw_dir if self.user else Path.home()) / ".gpu"


def seconds(value: object) -> float:
    """A number of seconds; ValueError when it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("not a number of seconds")
    return float(value)


def load(path: str) -> Settings:
    """The settings in a file that its owner alone may read, or on standard input (`-`).

    ValueError, TypeError or OSError, never with the key in their words, when they cannot be used.
    """
    if path == "-":
        data = sys.stdin.buffer.read(_MAX_BYTES)
    else:
        with durable.opened(Path(path), os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
            facts = os.fstat(descriptor)
            if facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or facts.st_uid != os.geteuid():
                raise ValueError("the settings hold a key: the file must be its owner's alone (mode 0600)")
            data = os.read(descriptor, _MAX_BYTES)
    try:
        document = json.loads(data)
    except ValueError:
        raise ValueError("the settings are not JSON") from None  # the error would show them
    if not isinstance(document, dict):
        raise ValueError("the settings are not an object")
    return Settings.of(document)

"""What a start asks of the supervisor: where the worker's code and Python are, its environment, its share of GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Order:
    """Handed over by pipe, and only ever in memory."""

    expect_attempt: int
    """The last attempt the asker knows of."""
    python: str
    agent: str
    """Folder that holds `jobs` and `worker`."""
    cwd: str
    env: dict[str, str]
    """Environment of the worker, secrets included."""
    path_first: str = ""
    """Put before the worker's PATH."""
    inherit: bool = False
    """The worker's environment is the supervisor's own with `env` over it, not `env` alone."""
    gpus: int | None = None
    """How many GPUs the run claims; None: all there are."""
    queue: bool = False
    """Wait for GPUs that are in use, instead of failing."""
    restarts: bool = True
    """Whether a worker that crashed is started again."""
    mirror: str = ""
    """Where else the run's files are copied while it goes on: a folder of this machine, or `hf://…`; empty: nowhere."""
    machine: str = "machine"
    """What this machine is called at home: its folder's name in the mirror."""

    @classmethod
    def of(cls, document: dict[str, Any]) -> Order:
        """The order in a document, without what newer code has added. TypeError when it is none."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in document.items() if name in known})

    def environment(self, own: Mapping[str, str]) -> dict[str, str]:
        """The worker's environment, where `own` is the supervisor's."""
        found = {**own, **self.env} if self.inherit else dict(self.env)
        if self.path_first:
            found["PATH"] = os.pathsep.join([self.path_first, found.get("PATH", os.defpath)])
        return found

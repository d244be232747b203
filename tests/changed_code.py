"""Worker code with one passage changed, for tests that need a machine or a story that misbehaves."""

from __future__ import annotations

from orchestrator import agents, config
from tests.conftest import COUNTING


def code_with(path: str, old: str, new: str) -> str:
    """The name of a snapshot of the worker's code, counting story included, with `old` in one file made `new`."""
    files = agents.sources() | {"worker/counting.py": COUNTING.encode()}
    text = files[path].decode()
    assert text.count(old) == 1, f"{path} has changed: {old!r} is not in it once"
    files[path] = text.replace(old, new).encode()
    name = agents.digest(files)
    agents.write(files, config.state_folder() / "agents" / name)
    return name

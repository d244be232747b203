"""The real command in a process of its own, with short waits: minutes between two looks would make tests take hours."""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

WAITS = "GPU_TEST_WAITS"
"""The variable for more waits than the usual ones: a JSON object of `module.NAME` and seconds."""
_USUAL: dict[str, Any] = {
    "orchestrator.providers.lambda_cloud._EVERY_S": 0.01,
    "orchestrator.providers.vast._EVERY_S": 0.01,
    "orchestrator.providers.vast._UNDO_PAUSE_S": 0.2,
    "orchestrator.vanishing._TWICE_S": 0.2,
    "orchestrator.returning._POLL_S": 0.1,
    "orchestrator.returning._TWICE_S": 0.2,
    "orchestrator.returning._ASK_AGAIN_S": 0.5,
    "orchestrator.readiness._POLL_S": (0.1,),
    "orchestrator.outcome._LOOK_EVERY_S": 0.2,
    "orchestrator.outcome.SETTLED_S": 4.0,
    "orchestrator.launching._LIMITED_S": 0.2,
    "orchestrator.outcome._TWICE_S": 0.2,
}
Done = subprocess.CompletedProcess[str]


def words(*arguments: str) -> list[str]:
    """What is run for `gpu ARGUMENTS`."""
    return [sys.executable, str(Path(__file__)), *arguments]


def environment(waits: dict[str, float] | None) -> dict[str, str]:
    """This process's environment, with these waits too, such as `readiness._GPU_S`."""
    return {**os.environ, WAITS: json.dumps({f"orchestrator.{name}": value for name, value in (waits or {}).items()})}


def gpu(*arguments: str, waits: dict[str, float] | None = None, **how: Any) -> Done:
    """What came of `gpu ARGUMENTS`."""
    how = {"env": environment(waits), "timeout": 120, "stdin": subprocess.DEVNULL, **how}
    return subprocess.run(words(*arguments), capture_output=True, text=True, check=False, **how)


def begun(*arguments: str, waits: dict[str, float] | None = None) -> subprocess.Popen[str]:
    """`gpu ARGUMENTS`, running."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words(*arguments), text=True, env=environment(waits), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )


def document(*arguments: str, **how: Any) -> Any:
    """The JSON document of a command that goes well."""
    done = gpu(*arguments, "--json", **how)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shorten() -> None:
    """Have the waits of this process be short."""
    from orchestrator.providers import client, lambda_cloud, pace, vast

    for name, value in {**_USUAL, **json.loads(os.environ.get(WAITS, "{}"))}.items():
        module, _, constant = name.rpartition(".")
        found = pkgutil.resolve_name(module)
        assert hasattr(found, constant), name
        setattr(found, constant, value)
    for cloud in (lambda_cloud, vast):
        for name, value in vars(cloud).items():
            if isinstance(value, pace.Lane):
                setattr(cloud, name, pace.Lane(name, 0.01))
    client._wait_s = lambda _: 0.02


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())  # as `python -m` has it
    with contextlib.suppress(KeyboardInterrupt):  # which is the command's own to answer, from here on
        shorten()
    from orchestrator import cli

    cli.main()

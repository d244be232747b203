"""Runs programs behind walls of every kind: as this user, and as an ordinary one where this is root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from worker import sandbox
from worker.confinement import BARE
from worker.sandbox import Limits, Outcome, SandboxFailed, Walls

ROOT = Path(__file__).parents[2]
NOBODY = 65534
KINDS = ("here", "here, without namespaces", "nobody", "nobody, without namespaces")
"""Whose walls, and which: the strictest there are, or those of a container that allows no namespaces."""
_RUN = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
from worker import sandbox
program, wall_s, walls, limits = json.load(sys.stdin)
try:
    held_by = sandbox.Walls(**walls) if walls else None
    print(json.dumps(dataclasses.asdict(sandbox.run(program, wall_s, held_by, sandbox.Limits(**limits)))))
except sandbox.SandboxFailed as failed:
    print(json.dumps({"failed": str(failed)}))
"""


def run(kind: str, program: str, wall_s: float = 10.0, **limits: int) -> Outcome:
    """What comes of a program behind walls of that kind; skips where this machine has no such walls."""
    if sys.platform != "linux":
        pytest.skip("these walls are Linux's")
    bare = kind.endswith("without namespaces")
    if kind.startswith("nobody"):
        return run_as_nobody(program, wall_s, Walls(BARE, False, True, True) if bare else None, limits)
    walls = Walls(BARE, os.geteuid() == 0, True, True) if bare else sandbox.walls()
    return sandbox.run(program, wall_s, walls, Limits(**limits))


def run_as_nobody(program: str, wall_s: float, walls: Walls | None, limits: dict[str, int]) -> Outcome:
    """The same by a process of an ordinary user."""
    asked = json.dumps([program, wall_s, walls.__dict__ if walls else None, limits])
    words = [python_of_everybody(), "-c", _RUN, str(ROOT)]
    done = subprocess.run(
        words, input=asked, capture_output=True, text=True, timeout=120, user=NOBODY, group=NOBODY, extra_groups=[]
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if "failed" in found:
        raise SandboxFailed(found["failed"])
    return Outcome(**found)


def python_of_everybody() -> str:
    """A Python that any user can run, and with it this tree; skips where there is none, or this is not root."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        words = [str(python), "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import worker.sandbox"]
        with_it = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        try:
            done = subprocess.run(words, cwd="/", capture_output=True, timeout=60, **with_it)  # type: ignore[call-overload]
        except OSError:
            continue
        if done.returncode == 0:
            return str(python)
    pytest.skip("no Python here that another user can run, or the tree lies where another user cannot read")

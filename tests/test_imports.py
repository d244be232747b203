"""The one arrow: orchestrator → jobs ← worker, and who may import what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAPTOP_ONLY = ("click", "tqdm", "jinja2", "platformdirs", "requests", "tenacity", "orchestrator")
MACHINE_ONLY = ("torch", "transformers", "peft", "datasets", "numpy", "worker")
_SCRIPT = """
import importlib, pkgutil, sys
package, *blocked = sys.argv[1:]
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocker())
found = importlib.import_module(package)
for module in pkgutil.walk_packages(found.__path__, package + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def imports(package: str, blocked: tuple[str, ...], python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    words = [python, "-c", _SCRIPT, package, *blocked]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("package", "blocked"),
    [
        ("jobs", (*LAPTOP_ONLY, *MACHINE_ONLY)),
        ("orchestrator", MACHINE_ONLY),
        ("worker", (*LAPTOP_ONLY, *(name for name in MACHINE_ONLY if name != "worker"))),
    ],
)
def test_each_side_imports_without_the_other(package: str, blocked: tuple[str, ...]) -> None:
    """Every module of a package imports in a process where the other side's libraries do not exist."""
    done = imports(package, blocked)
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks() -> None:
    """The check above can fail: blocking what a package does need is noticed."""
    assert imports("orchestrator", ("jobs",)).returncode != 0


def test_the_supervisor_needs_the_standard_library_only() -> None:
    """The supervisor and the agent start where no package is installed at all."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); from worker import agent, supervisor, rescore"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(ROOT)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_little() -> None:
    """`gpu --help` imports neither tqdm nor jinja2 nor any module of a command."""
    script = (
        "import sys; from orchestrator import cli; sys.argv = ['gpu', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name in ('tqdm', 'jinja2', 'orchestrator.advance', 'asyncio')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"

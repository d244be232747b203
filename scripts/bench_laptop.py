"""What the laptop part costs: CPU time of two commands that need no network, and the size of its installation."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from figures import Figure, show

from orchestrator import runs

ROOT = Path(__file__).resolve().parent.parent
TIMES = 11
RUNS = 20
"""As many as `gpu runs` shows."""
INSTALL_DEADLINE_S = 300.0


def main() -> Iterator[Figure | str]:
    """Every figure of this part; without an installation of its own, the commands of the clone's environment."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        folder = Path(scratch) / "laptop"
        trouble = install(folder)
        if trouble is None:
            yield from sizes(folder)
        else:
            yield f"a fresh installation: skipped, pip said: {trouble}"
        yield from commands(folder if trouble is None else Path(sys.prefix))


def install(folder: Path) -> str | None:
    """Install the clone without extras into a fresh environment; the last words of pip when it cannot.

    The environment has no pip or setuptools of its own, so that whatever lies in it is ours or needed by us.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    words = [sys.executable, "-m", "pip", "--quiet", "--python", str(folder / "bin" / "python"), "install", str(ROOT)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"nothing within {INSTALL_DEADLINE_S:.0f} s"
    return None if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]


def sizes(folder: Path) -> Iterator[Figure]:
    """Disk space and number of distributions, beside those of the clone's environment, which has a worker's too."""
    mine, whole = packages(folder), packages(Path(sys.prefix))
    yield Figure("installed size", disk_mb(mine), "MB", f"with [worker,dev]: {disk_mb(whole):.0f} MB", at_most=50)
    count, beside = distributions(mine), f"with [worker,dev]: {distributions(whole)}"
    yield Figure("installed distributions, gpu itself among them", count, "", beside, at_most=27)


def packages(environment: Path) -> Path:
    """The folder of an environment that holds its packages."""
    return next((environment / "lib").glob("python*/site-packages"))


def disk_mb(folder: Path) -> float:
    """What `du` counts, in millions of bytes."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) / 1e6


def distributions(folder: Path) -> int:
    """How many distributions are installed in a folder of packages."""
    return len(list(folder.glob("*.dist-info")))


def commands(environment: Path) -> Iterator[Figure]:
    """Median CPU times, taken in turn."""
    os.environ["GPU_HOME"] = str(Path.cwd() / "state")
    make_runs()
    python, gpu = str(environment / "bin" / "python"), str(environment / "bin" / "gpu")
    words = {
        "pass": [python, "-c", "pass"],
        "click": [python, "-c", "import click"],
        "help": [gpu, "--help"],
        "runs": [gpu, "runs"],
    }
    spent_s: dict[str, list[float]] = {name: [] for name in words}
    for _ in range(TIMES):
        for name, line in words.items():
            spent_s[name].append(cpu_s(line))
    middle_s = {name: statistics.median(several) for name, several in spent_s.items()}
    beside = f"python -c pass {middle_s['pass']:.3f} s, import click {middle_s['click']:.3f} s"
    yield Figure("gpu --help, CPU time", middle_s["help"], "s", beside, at_most=0.10)
    yield Figure(f"gpu runs with {RUNS} runs, CPU time", middle_s["runs"], "s", beside, at_most=0.20)


def make_runs() -> None:
    """Runs that have ended, as `gpu runs` finds them."""
    for _ in range(RUNS):
        run_id = runs.new_run_id("eval-gsm8k", "tiny")
        began = "2026-01-01T00:00:00.000Z"
        record = runs.Record(run_id, "eval-gsm8k", "local", "0" * 16, sys.executable, str(Path.cwd()), began)
        runs.create(record, {"params": {}}).save(state="sealed", attempt=1, started_at=began, rows_total=1, rows_home=1)


def cpu_s(words: list[str]) -> float:
    """User and system time of a command and its children; its output goes nowhere."""
    quiet = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_WRONLY, 0) for descriptor in (1, 2)]
    _, status, used = os.wait4(os.posix_spawn(words[0], words, os.environ, file_actions=quiet), 0)
    if status != 0:
        raise SystemExit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(show(main()))

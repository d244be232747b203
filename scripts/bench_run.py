"""Whole `gpu run eval-gsm8k`, watched: the price of saving, how soon a row can be seen, and what following costs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from figures import Figure, show

from jobs import durable, rows, rundir
from worker import processes, tiny

ROOT = Path(__file__).resolve().parent.parent
READER_S = 0.005
"""How often the reader looks."""
ROUNDS = 5
LOOKS = 10
"""Every so many looks of the reader, the processes are looked at too."""
DEADLINE_S = 600.0

STOPWATCH = '''

import time as _time
from worker.generators import hf as _hf


class _Marked(_hf.HfGenerator):
    def generate(self, prompts, sampling):
        _Clocks.began_s, _Clocks.cpu_began_s = _time.perf_counter(), _time.thread_time()
        return super().generate(prompts, sampling)


class _Clocks:
    """Seconds that the engine waits, for room or for the last rows; seconds of a processor that rows take."""

    began_s = cpu_began_s = held_s = handed_s = saved_s = scored_s = longest_s = 0.0


class _Timed(rows.Appender):
    def __init__(self, path):
        self._path = path
        super().__init__(path)

    def append(self, row):
        cpu_began_s, began_s = _time.thread_time(), _time.perf_counter()
        super().append(row)
        _Clocks.saved_s += _time.thread_time() - cpu_began_s
        _Clocks.longest_s = max(_Clocks.longest_s, _time.perf_counter() - began_s)

    def close(self):
        with _holding():
            super().close()
        took_s, engine_s = _time.perf_counter() - _Clocks.began_s, _time.thread_time() - _Clocks.cpu_began_s
        facts = {
            "held_share": _Clocks.held_s / took_s + _Clocks.handed_s / engine_s,
            "saving_share": _Clocks.saved_s / engine_s,
            "scoring_share": _Clocks.scored_s / engine_s,
            "row_s": _Clocks.saved_s / self.written,
            "longest_s": _Clocks.longest_s,
            "generation_s": took_s,
        }
        durable.save_json(self._path.with_name("stopwatch.json"), facts)


class _Holding(Scoring):
    def put(self, *answer):
        began_s, is_full = _time.thread_time(), self._room.empty()
        with _holding() if is_full else contextlib.nullcontext():
            super().put(*answer)
        _Clocks.handed_s += _time.thread_time() - began_s

    def __exit__(self, *words):
        with _holding():
            super().__exit__(*words)


@contextlib.contextmanager
def _holding():
    began_s = _time.perf_counter()
    yield
    _Clocks.held_s += _time.perf_counter() - began_s


def make_row(*words, _made=make_row):
    began_s = _time.thread_time()
    row = _made(*words)
    _Clocks.scored_s += _time.thread_time() - began_s
    return row


_hf.HfGenerator, rows.Appender, Scoring = _Marked, _Timed, _Holding
'''
"""Goes to the end of the worker's story: the run is the real one in everything but being timed."""


def gpu_with(addition: str) -> None:
    """Be the command `gpu`, whose snapshot of the worker's code has this at the end of the story."""
    from orchestrator import agents, cli

    plain = agents.sources

    def sources() -> dict[str, bytes]:
        files = plain()
        return files | {"worker/evaluate.py": files["worker/evaluate.py"] + addition.encode()}

    agents.sources = sources
    cli.main()


@dataclass
class Reader:
    """Reads a growing file of rows as another program would: the time at which each whole line was first seen."""

    path: Path
    seen: list[tuple[float, bytes]] = field(default_factory=list)
    _offset: int = 0

    def look(self) -> None:
        """Read what is new."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_size > self._offset:
                for offset, line in rows.whole_lines(self.path, self._offset):
                    self.seen.append((time.time(), line))
                    self._offset = offset + len(line) + 1

    def lags_s(self) -> list[float]:
        """For each row, the time from its making, which its `at` gives to the millisecond, until it was seen."""
        return [seen - datetime.fromisoformat(rows.decode(line)["at"]).timestamp() for seen, line in self.seen]


@dataclass
class Watched:
    """A process: its CPU time at each look, and its peak memory. Sees nothing where there is no /proc."""

    pid: int
    looks: list[tuple[float, float]] = field(default_factory=list)
    """Time and CPU time of each look, in seconds."""
    peak_mb: float = 0.0

    def look(self) -> None:
        """Take a look, unless the process is gone."""
        with contextlib.suppress(OSError):
            used = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            ticks = int(used[11]) + int(used[12])  # fields 14 and 15 of proc(5), utime and stime
            self.looks.append((time.time(), ticks / os.sysconf("SC_CLK_TCK")))
            self.peak_mb = max(self.peak_mb, peak_mb(self.pid))

    def used_s(self, began: float, ended: float) -> float:
        """CPU time in a span of time."""
        spent_s = [used_s for at, used_s in self.looks if began <= at <= ended]
        return spent_s[-1] - spent_s[0] if spent_s else 0.0


def peak_mb(pid: int) -> float:
    """The largest resident size of a process so far, in millions of bytes; 0 once it is a zombie."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines.get("VmHWM", "0 kB").split()[0]) * 1024 / 1e6


@dataclass
class Observed:
    """What was seen of a run from outside."""

    run: rundir.Run
    machine: Reader
    home: Reader
    processes: dict[str, Watched]
    """`worker` and `supervisor`; `laptop`, the command; `sender`, the agent it pulls from. Empty without /proc."""
    took_s: float = 0.0

    @property
    def span(self) -> tuple[float, float]:
        """When the first row came home, and when the last."""
        return self.home.seen[0][0], self.home.seen[-1][0]

    @property
    def span_s(self) -> float:
        """The time between the first row at home and the last."""
        return self.span[1] - self.span[0]


def main() -> Iterator[Figure | str]:
    """Every figure of this part; on the disk that the project lies on, as /tmp may be none."""
    trained = tiny.ensure(ROOT / "build" / "models", print)
    with tempfile.TemporaryDirectory(prefix="bench-run-", dir=ROOT / "build") as scratch, contextlib.chdir(scratch):
        machine = Path(scratch) / "state" / "machines" / "local"
        os.environ.update(GPU_HOME=str(Path(scratch) / "state"), TERM="xterm", COLUMNS="100")
        shutil.copytree(trained, machine / "models" / trained.name)
        several = [observe(machine / "runs") for _ in range(ROUNDS)]
        yield from told(several)


def observe(runs: Path) -> Observed:
    """Run the command on a terminal of its own and watch it until it ends; nothing of it stays behind.

    `runs` is the machine's folder of runs.
    """
    began_s = time.monotonic()
    terminal, theirs = os.openpty()
    words = [sys.executable, str(Path(__file__).resolve()), "gpu", "run", "eval-gsm8k"]
    gpu = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    try:
        assert gpu.stdout is not None
        run_id = (gpu.stdout.readline().split() or [b"none"])[0].decode()
        run, home = rundir.Run(runs / run_id), rundir.Home(Path("results", run_id))
        seen = Observed(run, Reader(run.attempt(1).rows), Reader(home.rows), {})
        said = watch(gpu, terminal, seen)
        if gpu.returncode != 0:
            raise SystemExit(f"gpu run ended with {gpu.returncode}: {said}")
        seen.took_s = time.monotonic() - began_s
        return seen
    finally:
        gpu.kill()
        gpu.wait()
        os.close(terminal)
        stop = [sys.executable, "-m", "orchestrator.cli", "stop", "--all", "--grace", "0"]
        subprocess.run(stop, capture_output=True, check=False)


def watch(gpu: subprocess.Popen[bytes], terminal: int, seen: Observed) -> str:
    """Look at rows and processes until the command has ended; the last thing it said."""
    said, count, deadline_s = b"", 0, time.monotonic() + DEADLINE_S
    while gpu.poll() is None and time.monotonic() < deadline_s:
        seen.machine.look()
        seen.home.look()
        if seen.machine.seen and not seen.processes and sys.platform == "linux":
            pids = durable.load_json(seen.run.attempt(1).pids)
            pids |= {"laptop": {"pid": gpu.pid}, "sender": {"pid": processes.descendants(gpu.pid)[0]}}
            seen.processes = {name: Watched(known["pid"]) for name, known in pids.items()}
        count += 1
        for process in seen.processes.values() if count % LOOKS == 0 else ():
            process.look()
        if select.select([terminal], [], [], READER_S)[0]:
            with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
                said = os.read(terminal, 1 << 16) or said
    return said.decode("utf-8", "replace")


def told(several: list[Observed]) -> Iterator[Figure | str]:
    """The figures of all the runs that were watched."""
    rates = [len(one.home.seen) / one.span_s for one in several]
    yield (
        f"gpu run eval-gsm8k {len(several)} times: {len(several[0].home.seen)} rows each, "
        f"{statistics.median(one.took_s for one in several):.1f} s from start to end, "
        f"{statistics.median(rates):.0f} rows/s while rows came home"
    )
    yield from saving(several)
    for where, readers, at_most in (
        ("the machine", [one.machine for one in several], 0.5),
        ("home", [one.home for one in several], None),
    ):
        lags_s = [lag_s for reader in readers for lag_s in reader.lags_s()]
        words = f"median {statistics.median(lags_s):.3f} s; the reader looks every {READER_S:g} s"
        yield Figure(f"row made until seen at {where}, slowest", max(lags_s), "s", words, at_most=at_most)
    if not all(one.processes for one in several):
        yield "CPU time and memory of processes: skipped, there is no /proc here"
        return
    peak = max(one.processes["supervisor"].peak_mb for one in several)
    words = f"an interpreter that does nothing: {idle_mb():.1f} MB"
    yield Figure("supervisor, peak memory", peak, "MB", words, at_most=30)
    for name in ("laptop", "sender", "supervisor"):
        yield processor_time(several, name)


def saving(several: list[Observed]) -> Iterator[Figure]:
    """What rows cost the engine: in its own thread, which hands answers over and may have to wait; and at most, were no
    core free beside it, all processor time of the threads that score and save them. Beside that, saving carelessly.
    """
    told: list[dict[str, Any]] = [durable.load_json(one.run.attempt(1).folder / "stopwatch.json") for one in several]
    middle = {
        name: 100 * statistics.median(one[f"{name}_share"] for one in told) for name in ("held", "saving", "scoring")
    }
    generation_s, row_s = (statistics.median(one[name] for one in told) for name in ("generation_s", "row_s"))
    made = [rows.decode(line) for _, line in several[0].machine.seen]
    began_s = time.perf_counter()
    with Path("careless.jsonl").open("w", encoding="utf-8") as file:
        for row in made:
            file.write(json.dumps(row) + "\n")
    careless = 100 * (time.perf_counter() - began_s) / generation_s
    words = (
        f"json.dumps to a buffered file: {careless:.2f} %; {1e6 * row_s:.0f} us of a processor a row, "
        f"longest {1e3 * max(one['longest_s'] for one in told):.0f} ms"
    )
    yield Figure("saving and scoring, of the engine's thread", middle["held"], "%", at_most=3)
    yield Figure("the same and saving beside it, at most", middle["held"] + middle["saving"], "%", words, at_most=2)
    yield Figure("the same and scoring beside it, at most", sum(middle.values()), "%", at_most=3)


def processor_time(several: list[Observed], name: str) -> Figure:
    """CPU time of a process while rows came home, as a share of that time; beside it, the worker's."""
    took_s = sum(one.span_s for one in several)
    used_s, worker_s = (sum(one.processes[each].used_s(*one.span) for one in several) for each in (name, "worker"))
    words = f"the worker: {100 * worker_s / took_s:.0f} %; {used_s:.2f} s of {took_s:.1f} s"
    return Figure(f"{name}, CPU time while rows come home", 100 * used_s / took_s, "%", words)


def idle_mb() -> float:
    """The peak memory of Python itself, started as the supervisor is."""
    words = [sys.executable, "-I", "-c", "print(flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as idle:
        assert idle.stdout is not None
        idle.stdout.readline()
        found = peak_mb(idle.pid)
        idle.kill()
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"]:
        del sys.argv[0]
        gpu_with(STOPWATCH)
    sys.exit(show(main()))

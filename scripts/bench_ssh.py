"""A machine over SSH (a real sshd on loopback): calls, start, rows home, sync, large files, each beside raw tools."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from figures import Figure, show

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jobs import rows, rundir, spec  # noqa: E402
from orchestrator import (  # noqa: E402  # noqa: E402
    agents,
    cargo,
    config,
    delivery,
    enrolment,
    machines,
    project,
    runs,
    ssh_config,
    syncing,
)
from orchestrator.cargo import Cargo  # noqa: E402
from orchestrator.runs import Record, Run  # noqa: E402
from orchestrator.ssh import SshMachine  # noqa: E402
from tests.conftest import COUNTING  # noqa: E402
from tests.rig import Proxy, Sshd  # noqa: E402

CALLS = 100
ROUNDS = 4
CHECKPOINT_ROUNDS = 6
FILES = 5000
CHECKPOINT_BYTES = 729_000_000
DEADLINE_S = 120.0
MADE_AT = '"2026-01-01T00:00:00.000Z"'
"""What the light story says of every row."""
GPU = [sys.executable, "-m", "orchestrator.cli"]


def main() -> Iterator[Figure | str]:
    """Every figure of this part, on the disk that the project lies on."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-ssh-", dir=ROOT / "build") as scratch, contextlib.chdir(scratch):
        os.environ.update(GPU_HOME=str(Path(scratch) / "state"), HF_HUB_OFFLINE="1")
        with Sshd(Path(scratch) / "box") as server:
            address = ssh_config.Address(server.user, server.address, server.port)
            enrolment.add(enrolment.Asked("box", address, server.key, sys.executable))
            yield tools()
            with machines.at("box") as machine:
                assert isinstance(machine, SshMachine)
                yield from calls(machine)
                yield from unchanged(machine, Path(scratch))
                yield from checkpoint(machine, Path(scratch))
            yield from rows_home(server)
            yield from silence(Path(scratch))


def tools() -> str:
    """The peers, with their versions."""
    rsync = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.strip()
    return f"{' '.join(rsync.split())}; {ssh}"


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def calls(machine: SshMachine) -> Iterator[Figure]:
    """A warm call, beside one over a ControlMaster of OpenSSH, alternating."""
    control = Path(tempfile.mkdtemp(prefix="gpu-", dir="/tmp")) / "c"
    base = ["ssh", "-F", str(machines.folder("box") / "ssh_config"), "-o", f"ControlPath={control}"]
    subprocess.run([*base, "-o", "ControlMaster=yes", "-fN", "gpu-box"], check=True)
    try:
        machine.call(["true"], b"")
        ours, theirs = [], []
        for _ in range(CALLS):
            ours.append(timed(lambda: machine.call(["true"], b"")))
            theirs.append(timed(lambda: subprocess.run([*base, "gpu-box", "true"], check=True)))
    finally:
        subprocess.run([*base, "-O", "exit", "gpu-box"], check=False, capture_output=True)
        shutil.rmtree(control.parent)
    mine, master = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
    yield Figure("warm call", mine, "ms", f"ssh over a ControlMaster: {master:.1f} ms", at_most=15)
    yield Figure("warm call, of a ControlMaster's", mine / master, "times", f"median of {CALLS} each", at_most=3)


def unchanged(machine: SshMachine, scratch: Path) -> Iterator[Figure]:
    """A second sync of an unchanged project, in one process and connected, beside raw rsync of the same tree."""
    root = scratch / "project"
    for index in range(FILES):
        path = root / f"folder{index % 100:02d}" / f"file{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(2000))
    (root / ".gitignore").write_text("*.pt\n__pycache__/\n")
    (root / "ckpt.pt").write_bytes(os.urandom(1 << 20) * (CHECKPOINT_BYTES >> 20))
    target = scratch / "box" / "raw"
    raw = ["rsync", "-a", "-e", f"ssh -F {machines.folder('box') / 'ssh_config'}", f"{root}/", f"gpu-box:{target}"]
    subprocess.run(raw, check=True)

    def ours() -> None:
        found = syncing.looked_at(root, ("ckpt.pt",))
        syncing.push(found, machine, lambda _: None)

    first_s = timed(ours)
    time.sleep(2.5)  # files this young are read again, as git does
    ours()
    mine, theirs = [], []
    for _ in range(ROUNDS + 2):
        mine.append(timed(ours))
        theirs.append(timed(lambda: subprocess.run(raw, check=True)))
    words = (
        f"rsync {statistics.median(theirs):.3f} s; ours {statistics.median(mine):.3f} s, the first time {first_s:.1f}"
    )
    ratio = statistics.median(mine) / statistics.median(theirs)
    yield Figure(f"sync, {FILES} files and a checkpoint, unchanged", ratio, "times", words, at_most=1.15)


def checkpoint(machine: SshMachine, scratch: Path) -> Iterator[Figure]:
    """A large file sent, and sent and verified, beside raw rsync to the same sshd, each in its turn the first."""
    source = scratch / "large.pt"
    store = machine.root / "store"
    target = store / "incoming" / "part"
    raw = ["rsync", "-a", "-e", f"ssh -F {machines.folder('box') / 'ssh_config'}", str(source), f"gpu-box:{target}"]
    agent = delivery.prepared_agent(machine)

    def whole() -> None:
        content = project.tree_of(source, project.hashes())
        cargo.send(Cargo(params={"model": (content, source.name)}), machine, agent, lambda _: None)

    ways: list[Callable[[], object]] = [
        lambda: subprocess.run(raw, check=True),
        lambda: machine.push_files([(source, target.name)], lambda _: None),
        whole,
    ]
    times: list[list[float]] = [[] for _ in ways]
    for index in range(CHECKPOINT_ROUNDS):
        source.write_bytes(os.urandom(1 << 20) * (CHECKPOINT_BYTES >> 20))
        for turn in range(len(ways)):
            which = (index + turn) % len(ways)
            os.sync()
            times[which].append(timed(ways[which]))
            os.sync()
            target.unlink(missing_ok=True)
    rsync, sent, verified = map(min, times)
    words = f"rsync {rsync:.2f} s; the fastest of {CHECKPOINT_ROUNDS} each, as disks and neighbours slow some"
    yield Figure("checkpoint of 729 MB, sent", sent / rsync, "times", words, at_most=1.05)
    yield Figure("the same, verified by its hash", verified / rsync, "times", "hashed here and there", at_most=1.5)


def counting_run(count: int, pace_s: float, on: str = "box") -> Run:
    """A planned run on a machine of the light story that makes rows at a given pace."""
    story = COUNTING.replace("from jobs import", "from jobs import times,").replace(MADE_AT, "times.now()")
    files = agents.sources() | {"worker/counting.py": story.encode()}
    agent = agents.digest(files)
    agents.write(files, config.state_folder() / "agents" / agent)
    run_id = runs.new_run_id("counting", None)
    job = {"schema": spec.SCHEMA, "run_id": run_id, "job": "counting", "story": "counting", "task": "t"}
    job |= {"params": {"count": count, "pace_s": pace_s, "model": "none"}, "limit": None}
    return runs.create(Record(run_id, "counting", on, agent, sys.executable, str(Path.cwd()), "2026-01-01"), job)


def detached(run: Run) -> None:
    """Start a run and leave it to itself."""
    subprocess.run([*GPU, "resume", "-q", "--detach", run.run_id], check=True, stdout=subprocess.DEVNULL)


def rows_home(server: Sshd) -> Iterator[Figure]:
    """From the command to a worker that runs; and how soon a row is seen at home, followed and with `logs -f`."""
    detached(counting_run(1, 0))  # the worker's code is there from now on
    planned = [counting_run(1, 0) for _ in range(ROUNDS)]
    starts = [timed(lambda run=run: detached(run)) for run in planned]
    yield Figure("submit until the worker runs", max(starts), "s", f"slowest of {ROUNDS}", at_most=1.0)
    for name, words, target in (("followed", ["resume", "-q"], 3.0), ("logs -f", ["logs", "-f"], 0.5)):
        run = counting_run(100, 0.1)
        if name == "logs -f":
            detached(run)
        command = subprocess.Popen([*GPU, *words, run.run_id], stdout=subprocess.DEVNULL)
        seen = followed(command, run, server)
        lags = f"median {statistics.median(seen.lags_s):.2f} s"
        yield Figure(f"row made until seen at home, {name}", max(seen.lags_s), "s", lags, at_most=target)
        if name == "followed":
            words = [f"{seen.cpu_s:.2f} s of {seen.span_s:.0f} s; 10 rows/s"]
            yield Figure("following, of a core", seen.cpu_s / seen.span_s * 100, "%", words[0], at_most=1.0)
            yield Figure("following, peak memory", seen.peak_mb, "MB", at_most=60)


@dataclass
class Seen:
    """What was seen of a command that brings a run home."""

    lags_s: list[float]
    """Of each row, from its making until it was seen at home."""
    cpu_s: float
    """Used between the first row at home and the end of the run there."""
    span_s: float
    peak_mb: float


def followed(command: subprocess.Popen[bytes], run: Run, server: Sshd) -> Seen:
    """Watch a command until it ends."""
    there = rundir.Run(server.home / ".gpu" / "runs" / run.run_id).attempt(1)
    seen: dict[str, float] = {}
    offset, peak_mb, first, last = 0, 0.0, (0.0, 0.0), (0.0, 0.0)
    deadline = time.monotonic() + DEADLINE_S
    while command.poll() is None and time.monotonic() < deadline:
        for start, line in rows.whole_lines(run.home.rows, offset) if run.home.rows.exists() else ():
            seen[rows.decode(line)["key"]] = time.time()
            offset = start + len(line) + 1
        with contextlib.suppress(OSError, KeyError):
            cpu_s, peak_mb = usage(command.pid)
            first = first if first[0] or not seen else (time.monotonic(), cpu_s)
            last = last if there.exit.exists() else (time.monotonic(), cpu_s)
        time.sleep(0.02)
    made = {row["key"]: datetime.fromisoformat(row["at"]).timestamp() for row in rows.read([there.rows])}
    lags_s = [seen[key] - at for key, at in made.items() if key in seen]
    return Seen(lags_s, last[1] - first[1], max(last[0] - first[0], 0.1), peak_mb)


def usage(pid: int) -> tuple[float, float]:
    """CPU seconds so far and peak resident MB of a process."""
    used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK"), int(lines["VmHWM"].split()[0]) * 1024 / 1e6


def silence(scratch: Path) -> Iterator[Figure]:
    """How long until a network that swallows everything is said."""
    with Sshd(scratch / "far") as server, Proxy(server) as proxy:
        address = ssh_config.Address(server.user, proxy.address, proxy.port)
        enrolment.add(enrolment.Asked("far", address, server.key, sys.executable))
        run = counting_run(2000, 0.05, "far")
        command = subprocess.Popen([*GPU, "resume", run.run_id], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert command.stderr is not None
        while not (run.home.rows.exists() and run.home.rows.stat().st_size):
            time.sleep(0.05)
        proxy.black_hole()
        began_s = time.monotonic()
        for line in command.stderr:
            if b"Trying again" in line:
                break
        yield Figure("a dead network, until it is said", time.monotonic() - began_s, "s", "black hole", at_most=30)
        command.kill()
        command.communicate()


if __name__ == "__main__":
    sys.exit(show(main()))

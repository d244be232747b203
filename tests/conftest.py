"""What tests share: no network, no real home, and a light story that makes real rows on a real supervisor."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import rundir, spec
from orchestrator import agents, config, enrolment, machines, runs, ssh_config, transport
from orchestrator.runs import Record, Run
from tests import cloud as clouds
from tests import rig
from tests.rig import Reachable, Sshd

for _number in (signal.SIGINT, signal.SIGQUIT):  # ignored in all that a shell starts in the background
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="gpu-tests-")  # before transformers is imported: no real home
machine_room = pytest.fixture(rig.machine_room)
proxies = pytest.fixture(rig.proxies)
wires = pytest.fixture(rig.wires)
cloud = pytest.fixture(clouds.cloud)
light_cloud = pytest.fixture(clouds.light_cloud)
vast_cloud = pytest.fixture(clouds.vast_cloud)
light_vast = pytest.fixture(clouds.light_vast)
both_clouds = pytest.fixture(clouds.both_clouds)
light_both = pytest.fixture(clouds.light_both)
ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
"""Real benchmark files, where a developer has them beside the project."""
COUNTING = '''
"""A story for tests: makes rows at a given pace, and misbehaves as told."""
import os, signal, subprocess, sys, time
from jobs import durable, rows
from worker.failures import ConfigFailure
from worker.progress import Progress

def work(run, attempt, job):
    params = job["params"]
    progress = Progress(attempt.progress)
    done = rows.Index()
    for path in run.row_files():
        rows.index(path, done)
    if params.get("refuse"):
        raise ConfigFailure("the dataset is not one", "take another")
    if params.get("ignore_term"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if params.get("escape"):
        code = ["import os, signal", "if os.fork(): os._exit(0)", "os.setsid()", "if os.fork(): os._exit(0)"]
        subprocess.Popen([sys.executable, "-c", "\\n".join([*code, "signal.pause()"])]).wait()
    todo = [index for index in range(params["count"]) if not done.keys.get(f"t/s/{index}#0")]
    progress.expect(total=params["count"], before=params["count"] - len(todo))
    progress.phase("counting")
    with rows.Appender(attempt.rows) as out:
        for made, index in enumerate(todo):
            if params.get("crash_after") == made:
                sys.exit(7)
            out.append({"key": f"t/s/{index}#0", "error": None, "example_id": str(index), "sample_index": 0,
                        "completion": "x" * params.get("size", 10), "answer": str(index), "target": str(index),
                        "score": 1.0, "answers": {}, "scores": {}, "tokens_in": 1, "tokens_out": 1,
                        "finish_reason": "stop", "subject": None, "seed": index, "at": "2026-01-01T00:00:00.000Z"})
            progress.rows(out.synced)
            print("row", index, flush=True)
            time.sleep(params.get("pace_s", 0))
'''


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `first(n)`, the cases after its first n run with `scripts/test --all`, as slow ones do."""
    seen: Counter[str] = Counter()
    for item in items:
        if marker := item.get_closest_marker("first"):
            name = item.nodeid.partition("[")[0]
            seen[name] += 1
            if seen[name] > marker.args[0]:
                item.add_marker("slow")


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own home, state folder and working folder, and no account keys."""
    for name in ("LAMBDA_API_KEY", "VAST_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a developer's GPU is not claimed by every run of a test
    monkeypatch.setenv("GPU_HOME", str(tmp_path / "state"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder that holds the built-in model, trained once in the clone's `build` folder."""
    from worker import tiny

    folder = ROOT / "build" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    tiny.ensure(folder, print)
    return folder


@pytest.fixture
def trained(models: Path) -> None:
    """Has the built-in model ready on this computer as a machine, so that a run need not train it."""
    free_copy(models, config.state_folder() / "machines" / "local" / "models")


@pytest.fixture
def counting_agent() -> str:
    """A snapshot of the worker's code that has the counting story in it."""
    files = agents.sources() | {"worker/counting.py": COUNTING.encode()}
    name = agents.digest(files)
    agents.write(files, config.state_folder() / "agents" / name)
    return name


@pytest.fixture
def counting_run(counting_agent: str) -> Iterator[Callable[..., Run]]:
    """Makes runs of the counting story; at the end of the test all of them are stopped."""
    made: list[Run] = []

    def make(on: str = machines.LOCAL, **params: Any) -> Run:
        run_id = runs.new_run_id("counting", None)
        job = {"schema": spec.SCHEMA, "run_id": run_id, "job": "counting", "story": "counting", "task": "t"}
        job |= {"params": {"count": 20, "model": "none", **params}, "limit": None}
        record = Record(run_id, "counting", on, counting_agent, sys.executable, str(Path.cwd()), "2026-01-01")
        made.append(runs.create(record, job))
        return made[-1]

    yield make
    for run in made:
        machine = machines.this_computer()
        words = transport.agent_words(machine, run.record.agent, "stop", run.run_id, "0")
        if (machine.root / "agent" / run.record.agent).exists():
            transport.ask(machine, words)


@pytest.fixture
def box(machine_room: Callable[..., Sshd]) -> Callable[..., Sshd]:
    """Makes machines over SSH, a real sshd each, and adds them: `box("box")` is called `box` from then on."""

    def make(name: str = "box", via: Reachable | None = None, python: str | None = sys.executable, **how: Any) -> Sshd:
        machine = machine_room(name, **how)
        where = via or machine
        address = ssh_config.Address(machine.user, where.address, where.port)
        enrolment.add(enrolment.Asked(name, address, machine.key, python))
        return machine

    return make


@pytest.fixture
def on_machine() -> Callable[[Run], rundir.Run]:
    """The folder of a run as its machine (this computer) has it."""
    return lambda run: rundir.Run(machines.this_computer().root / "runs" / run.run_id)


def data_folder(name: str) -> Path:
    """A folder of real benchmark files; the test is skipped, saying so, where there is none."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no benchmark files: {folder.name} is not beside the project")
    return folder


def free_copy(source: Path, target: Path) -> Path:
    """A writable copy of a file or folder."""
    if source.is_dir():
        return Path(shutil.copytree(source, target))
    return Path(shutil.copy(source, target))

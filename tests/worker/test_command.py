"""Any command as a run: its exit code, its signals, its output and its environment are those of the command itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import worker
from jobs import durable, locks, rundir
from orchestrator import advance, follow, machines
from orchestrator.home import Arrivals
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import machine
from worker import processes
from worker.order import Order

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc of Linux")
Make = Callable[..., Run]
PYTHON = sys.executable


@pytest.fixture
def command(counting_agent: str) -> Iterator[Make]:
    """Makes runs of commands; at the end of the test all of them are stopped."""
    made: list[Run] = []

    def make(*words: str, **more: Any) -> Run:
        made.append(machine.make(counting_agent, list(words), **more))
        return made[-1]

    yield make
    for run in made:
        machine.ask(run, "stop", "0")


def failed(run: Run) -> rundir.Seal:
    """The seal of a run that is started, and is to fail at once."""
    machine.start(run)
    seal = machine.ended(run)
    assert (seal.reason, seal.restarting, seal.attempt) == ("failed", False, 1)
    return seal


def test_a_command_that_ends_well_is_done(command: Make) -> None:
    """A command runs in its folder of the project, what it prints is the log, and exit code 0 makes the run done."""
    run = command("sh", "-c", "pwd; echo $0 $1; echo complaint >&2", "a b", "$HOME", folder="some/where")
    machine.start(run)
    seal = machine.ended(run)
    assert (seal.reason, seal.code, seal.kind, seal.message) == ("done", 0, "", "")
    folder = (machine.there(run).work / "some" / "where").resolve()
    assert machine.log(run).splitlines() == [str(folder), "a b $HOME", "complaint"]


def test_the_exit_code_of_a_command_is_the_runs(command: Make) -> None:
    """A command that fails is not started again; the seal has its exit code and its last words."""
    seal = failed(command("sh", "-c", "echo first; echo 'out of luck'; exit 3"))
    assert (seal.code, seal.kind) == (3, "command")
    assert seal.message == "The command ended with exit code 3. Last words: out of luck"


def test_a_command_that_is_killed_is_not_started_again(command: Make) -> None:
    """A command killed by a signal has failed, and the seal names the signal."""
    seal = failed(command("sh", "-c", "echo here; kill -9 $$"))
    assert (seal.code, seal.signal, seal.kind) == (None, signal.SIGKILL, "command")
    assert "was killed by SIGKILL" in seal.message
    assert seal.message.endswith("Last words: here")


@pytest.mark.parametrize("code", [0, 3])
def test_a_stop_is_passed_on_to_the_command(command: Make, code: int) -> None:
    """A stop sends TERM to the command itself, which may tidy up; the run is then stopped, not done."""
    run = command("sh", "-c", f"trap 'echo tidied; exit {code}' TERM; echo ready; while :; do sleep 0.05; done")
    machine.start(run)
    until(lambda: "ready" in machine.log(run))
    assert machine.ask(run, "stop", "10")["seal"]["reason"] == "stopped"
    assert "tidied" in machine.log(run)
    assert not locks.is_held(machine.there(run).run_lock)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-program"], "no program 'no-such-program' on this machine's PATH"),
        (["./missing"], "no program './missing'"),
        (["./plain"], "'./plain' may not be executed"),
        (["./no-first-line"], "'./no-first-line' cannot be executed"),
        (["./no-interpreter"], "its first line names one that is not there"),
        (["."], "may not be executed"),
        ([], "A command is a list of words"),
        (["a\0b"], "A command is a list of words"),
    ],
)
def test_a_program_that_cannot_be_started_is_said(tmp_path: Path, words: list[str], said: str) -> None:
    """A program that is not there, or cannot be executed, is a failure of configuration that names it."""
    for name, text, mode in (
        ("plain", "#!/bin/sh\n", 0o600),
        ("no-first-line", "echo hello\n", 0o700),
        ("no-interpreter", "#!/no/such\n", 0o700),
    ):
        path = tmp_path / "run" / "work" / name
        durable.have_folder(path.parent)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
    failure = worked(tmp_path / "run", words, "")
    assert failure["kind"] == "config"
    assert said in failure["message"]


@pytest.mark.parametrize("folder", ["gone", "a/../../..", "/etc"])
def test_a_folder_that_is_not_there_is_said(tmp_path: Path, folder: str) -> None:
    """A command whose folder is not in the project fails as a matter of configuration, naming the folder."""
    durable.have_folder(tmp_path / "run" / "work" / "a")
    failure = worked(tmp_path / "run", ["true"], folder)
    assert failure["kind"] == "config"
    assert folder in failure["message"]


def worked(folder: Path, words: list[str], below: str) -> dict[str, str]:
    """Why a worker that was to become the command gave up."""
    run = rundir.Run(folder)
    durable.have_folder(run.attempt(1).folder)
    durable.save_json(run.job, {"story": "command", "command": words, "folder": below})
    main = Path(worker.__file__).parent / "__main__.py"
    done = subprocess.run([PYTHON, "-I", str(main), "work", str(folder), "1"], capture_output=True, check=False)
    assert done.returncode != 0
    return dict(durable.load_json(run.attempt(1).failure))


@linux_only
def test_a_command_has_the_signals_of_a_shell(command: Make) -> None:
    """No signal is ignored or blocked in a command, though Python ignores and we handle some."""
    run = command("grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status")
    machine.start(run)
    assert machine.ended(run).reason == "done"
    assert [int(line.split()[1], 16) for line in machine.log(run).splitlines()] == [0, 0]


@linux_only
def test_a_command_dies_with_its_supervisor(command: Make) -> None:
    """After kill -9 of the supervisor the command does not go on unwatched, and the run has died."""
    run = command("sleep", "1000")
    machine.start(run)
    pids = until(lambda: durable.load_json(machine.there(run).attempt(1).pids))
    os.kill(pids["supervisor"]["pid"], signal.SIGKILL)
    until(lambda: machine.ask(run, "state")["state"] == "died")
    assert processes.marked(str(machine.there(run).folder)) == []


def test_a_command_gets_the_environment_that_was_ordered(command: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, the ordered environment is all there is; with `inherit` it lies over the machine's; `path_first` leads."""
    monkeypatch.setenv("OF_THE_MACHINE", "m")
    shows = 'echo "$OF_THE_MACHINE,$ORDERED,$PYTHONUNBUFFERED,$PATH"'
    path = os.environ["PATH"]
    for order, expected in (
        ({"env": {"ORDERED": "o", "PATH": path}}, f",o,1,{path}"),
        ({"env": {"ORDERED": "o", "PATH": path}, "path_first": "/opt/x"}, f",o,1,/opt/x:{path}"),
        ({"env": {"ORDERED": "o"}, "inherit": True, "path_first": "/opt/x"}, f"m,o,1,/opt/x:{path}"),
        ({"env": {"OF_THE_MACHINE": "n", "ORDERED": "o"}, "inherit": True}, f"n,o,1,{path}"),
    ):
        run = command("/bin/sh", "-c", shows)
        machine.start(run, **order)
        assert machine.ended(run).reason == "done"
        assert machine.log(run).strip() == expected


def test_a_command_is_found_on_the_path_it_is_given(command: Make, tmp_path: Path) -> None:
    """A program is looked for in `path_first` before the rest of PATH."""
    tool = tmp_path / "bin" / "sh"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho the first one\n", encoding="utf-8")
    tool.chmod(0o700)
    run = command("sh", "-c", "echo the other")
    machine.start(run, path_first=str(tool.parent))
    assert machine.ended(run).reason == "done"
    assert machine.log(run) == "the first one\n"


def test_what_a_command_makes_is_in_the_seal_and_comes_home(command: Make) -> None:
    """The seal names the files that match, and a pull brings all of them: what the command printed last, too."""
    makes = "mkdir x; echo '{}' > x/log.jsonl; printf 123 > x/a.bin; printf 1 > x/other; echo done"
    run = command("sh", "-c", makes, out=("**/*.jsonl", "x/*.bin"))
    machine.start(run)
    assert machine.ended(run).outs == {}, "which is left out where a seal is only spoken of"
    seal = rundir.Seal.load(machine.there(run).attempt(1).exit)
    assert seal is not None
    assert {name: facts["bytes"] for name, facts in seal.outs.items()} == {"out/x/a.bin": 3, "out/x/log.jsonl": 3}
    arrivals = Arrivals.open(run.home, "local")
    assert arrivals is not None
    with arrivals:
        end = follow.pull(run, machines.this_computer(), arrivals, follow.NOW, lambda *_: None)
        assert arrivals.is_complete(rundir.Seal.of(end["seal"]))
    found = {path.relative_to(run.home.out).as_posix(): path.read_bytes() for path in run.home.out.rglob("*.*")}
    assert found == {"x/a.bin": b"123", "x/log.jsonl": b"{}\n"}


@linux_only
def test_workers_read_and_write_utf8(counting_run: Make) -> None:
    """A worker is started isolated and in UTF-8 mode, whatever the machine's locale is."""
    run = counting_run(count=1000, pace_s=0.05)
    advance.push(run, machines.this_computer(), lambda *_: None)
    machine.start(run)
    pids = until(lambda: durable.load_json(machine.there(run).attempt(1).pids))
    words = Path(f"/proc/{pids['worker']['pid']}/cmdline").read_bytes().split(b"\0")
    assert words[1:4] == [b"-I", b"-X", b"utf8"]


def test_an_order_may_say_more_than_we_know() -> None:
    """What newer code adds to an order is passed over; what is missing has its default."""
    order = Order.of({"expect_attempt": 1, "python": "p", "agent": "a", "cwd": "c", "env": {}, "hue": "green"})
    assert (order.path_first, order.inherit, order.gpus, order.queue, order.restarts) == ("", False, None, False, True)
    assert order.environment({"A": "b"}) == {}

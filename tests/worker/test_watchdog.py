"""A real watchdog, started by the real text, on a machine that is used, idle, stopped or full: it ends in time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import durable, rundir
from orchestrator import machines, on_machine
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker.container import QUICK, Container, contained
from tests.worker.container_cloud import KEY, ContainerCloud, Fault
from tests.worker.guarding import RUN, add_row, aged, home

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a rented machine runs Linux")
HOUR_S = 3600.0


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Container]:
    with contained(tmp_path) as box:
        yield box


@pytest.fixture
def cloud(box: Container) -> ContainerCloud:
    return box.cloud


@pytest.fixture
def agent(box: Container) -> str:
    """The code installed now, on this container."""
    return box.have_agent()


@pytest.fixture
def run(box: Container, agent: str) -> rundir.Run:
    """A run on this container with a row that is not home, made long ago."""
    run = rundir.Run(box.root / "runs" / RUN)
    durable.have_folder(run.attempt(1).folder)
    durable.save_json(run.job, {"story": "command", "out": ["*.txt"], "folder": ""})
    durable.save_json(run.current, {"attempt": 1})
    add_row(run, 1)
    aged(run.folder, 9000)
    return run


def acknowledge(box: Container, run: rundir.Run, agent: str) -> None:
    """The laptop says that it has the run's rows."""
    entry = box.root / "agent" / agent / "worker" / "__main__.py"
    told = json.dumps(home(run, "attempts/0001/rows.jsonl")).encode()
    words = [sys.executable, "-I", str(entry), "acknowledge", str(run.folder)]
    done = subprocess.run(words, input=told, capture_output=True, check=True)
    assert json.loads(done.stdout)["refused"] == []


def wait_for_looks(box: Container, count: int) -> None:
    """Return when the watchdog has written down that often how it stands."""
    for _ in range(count):
        before = (box.root / "guard" / "status.json").stat().st_ino
        until(lambda before=before: (box.root / "guard" / "status.json").stat().st_ino != before)


def test_at_the_deadline_runs_are_sealed_and_then_the_machine_is_ended(
    box: Container, cloud: ContainerCloud, counting_run: Callable[..., Run]
) -> None:
    """The worker is stopped cleanly by the newest agent, and sealed; only then is the machine destroyed."""
    there = box.running(counting_run)
    broken = box.root / "agent" / "older" / "worker" / "__main__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise SystemExit('an agent of the past')")
    os.utime(broken, (1, 1))
    box.start(deadline=time.time() + 0.5, idle_limit_s=HOUR_S)
    until(cloud.ended)
    seal = rundir.Seal.load(there.attempt(1).exit)
    assert seal is not None
    assert seal.reason == "stopped"
    assert seal.files["rows.jsonl"]["bytes"] == there.attempt(1).rows.stat().st_size > 0
    assert there.attempt(1).exit.stat().st_mtime <= cloud.asked("DELETE")[0]
    assert box.seen(lambda view: view["phase"] == "ended")["ended_by"] == "deadline"
    assert cloud.keys == {f"Bearer {KEY}"}


@pytest.mark.slow
def test_a_worker_that_will_not_stop_holds_the_end_up_for_its_grace_only(
    box: Container, cloud: ContainerCloud, counting_run: Callable[..., Run]
) -> None:
    """A stop that takes longer than it may is left to itself; the machine is ended all the same."""
    box.have_machine()
    entry = box.root / "agent" / "newest" / "worker" / "__main__.py"
    box.running(counting_run, ignore_term=True)
    entry.parent.mkdir(parents=True)
    entry.write_text("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()")
    os.utime(entry, (time.time() + 60, time.time() + 60))
    began = time.time()
    box.start(deadline=began, grace_s=1.0, patience_s=0.5)
    until(cloud.ended)
    assert cloud.asked("DELETE")[0] - began >= 1.0


def test_the_deadline_is_moved_by_the_laptops_own_words(box: Container, cloud: ContainerCloud, agent: str) -> None:
    """Read back and moved through the agent as ever: to later, not beyond the latest, durably; and to sooner."""
    this = machines.this_computer()
    assert on_machine.view(this, agent)["alive"] is False
    soon, late = time.time() + 0.5 * HOUR_S, time.time() + HOUR_S
    box.start(deadline=soon, deadline_max=late)
    box.seen(lambda view: view.get("answered_at"))
    told = on_machine.view(this, agent)
    assert (told["alive"], told["phase"], told["deadline"], told["last_error"]) == (True, "armed", soon, None)
    assert on_machine.move_deadline(this, agent, late + 9999)["deadline"] == late
    box.seen(lambda view: view["deadline"] == late)
    box.power_off()
    before = box.view()["pid"]
    box.start(deadline=time.time() - 1)
    box.seen(lambda view: view["pid"] != before and view["deadline"] == late)
    for spoilt in (b"{", b"[]", b"null", b'{"deadline": null}', b'{"deadline": "x"}'):
        durable.replace_whole(box.root / "guard" / "deadline.json", spoilt)
        wait_for_looks(box, 2)
        assert (box.view()["deadline"], cloud.ended()) == (late, [])
    on_machine.move_deadline(this, agent, time.time())
    until(cloud.ended)


def test_an_end_is_called_off_when_the_deadline_moves_while_runs_are_stopped(
    box: Container, cloud: ContainerCloud, counting_run: Callable[..., Run]
) -> None:
    """Somebody who extends the deadline while the runs are being stopped keeps the machine."""
    there = box.running(counting_run, ignore_term=True)
    box.start(deadline=time.time(), grace_s=1.0)
    until(there.attempt(1).stop.exists)
    durable.save_json(box.root / "guard" / "deadline.json", {"deadline": time.time() + HOUR_S})
    until(there.attempt(1).exit.exists)
    box.seen(lambda view: view["phase"] == "armed")
    assert cloud.ended() == []


def test_an_idle_machine_on_which_all_is_home_is_destroyed(box: Container, cloud: ContainerCloud, agent: str) -> None:
    """With nothing on it that is not home, it is destroyed once it was idle for long enough, and not before."""
    began = time.time()
    box.start(idle_limit_s=1.5)
    seen = box.seen(lambda view: view["phase"] == "ended")
    assert (seen["ended_by"], seen["unpulled"], seen["idle_limit_s"], cloud.stopped()) == ("idle", [], 1.5, [])
    assert cloud.asked("DELETE")[0] - began >= 1.5


def test_what_is_not_home_is_stopped_and_never_destroyed_for_being_idle(
    box: Container, cloud: ContainerCloud, agent: str, run: rundir.Run
) -> None:
    """An idle machine with a row that is not home is stopped, as often as it takes; once the row is home, destroyed."""
    box.start(idle_limit_s=0.3, pace=QUICK)
    until(lambda: len(cloud.stopped()) >= 3)
    assert cloud.stopped()[0] == {"state": "stopped"}
    seen = box.seen(lambda view: view["phase"] == "stopped")
    assert (seen["ended_by"], seen["unpulled"], cloud.ended()) == ("idle", [RUN], [])
    acknowledge(box, run, agent)
    until(cloud.ended)


def test_what_is_made_while_the_provider_is_asked_is_seen(
    box: Container, cloud: ContainerCloud, agent: str, run: rundir.Run
) -> None:
    """A row that comes between the look that found all at home and the end keeps the machine from being destroyed."""
    acknowledge(box, run, agent)
    box.start(idle_limit_s=1.0, patience_s=3.0)
    box.seen(lambda view: view.get("answered_at"))
    cloud.faults = [Fault("GET", hang=True)]
    until(lambda: not cloud.faults)
    assert box.view()["unpulled"] == []
    add_row(run, 2)
    until(cloud.stopped)
    assert cloud.ended() == []


def test_the_hard_deadline_destroys_whatever_is_not_home(
    box: Container, cloud: ContainerCloud, agent: str, run: rundir.Run
) -> None:
    """What an idle machine is kept for, it is not kept for beyond its deadline."""
    box.start(idle_limit_s=0.3, deadline=time.time() + HOUR_S)
    until(cloud.stopped)
    assert cloud.ended() == []
    deadline = time.time() + 0.3
    on_machine.move_deadline(machines.this_computer(), agent, deadline)
    until(cloud.ended)
    assert cloud.asked("DELETE")[0] >= deadline


def test_rows_that_come_keep_the_machine_whatever_the_clock_says(
    box: Container, cloud: ContainerCloud, agent: str, run: rundir.Run
) -> None:
    """Progress is use, also where every file looks old because the clock was set ahead."""
    box.start(idle_limit_s=6.0)
    for index in range(3):
        token = box.seen(lambda view: view.get("token"))["token"]
        add_row(run, index)
        acknowledge(box, run, agent)
        aged(run.folder, 90_000)
        box.seen(lambda view, token=token: view.get("token") not in (None, token) and view["idle_s"] < 1.5)
    assert (cloud.ended(), cloud.stopped()) == ([], [])


def test_before_there_is_an_agent_somebody_over_ssh_is_use(box: Container, cloud: ContainerCloud) -> None:
    """With no agent yet, idleness counts from the watchdog's start, or from the last moment of a connection."""
    for number, words in enumerate((b"sshd: /usr/sbin/sshd -D", b"python\0a@b", b"sshd: root@pts/0\0\0")):
        (box.folder / "processes" / str(number)).mkdir()
        (box.folder / "processes" / str(number) / "cmdline").write_bytes(words)
    box.start(idle_limit_s=0.5)
    box.seen(lambda view: cloud.calls and time.time() - cloud.calls[0][0] > 1.3 and view["idle_s"] < 0.5)
    assert cloud.ended() == []
    (box.folder / "processes" / "2" / "cmdline").write_bytes(b"sleep\0")
    left = time.time()
    until(cloud.ended)
    assert cloud.asked("DELETE")[0] - left >= 0.1


def test_what_may_be_a_run_is_not_destroyed_while_no_agent_can_say(box: Container, cloud: ContainerCloud) -> None:
    """Where there are folders of runs and no agent, an idle machine is stopped."""
    (box.root / "runs" / RUN).mkdir(parents=True)
    box.start(idle_limit_s=0.5)
    until(cloud.stopped)
    assert (box.seen(lambda view: view["phase"] == "stopped")["unpulled"], cloud.ended()) == ([RUN], [])


LOOKS = {
    "crashes": "import os; os.abort()",
    "says nothing": "",
    "lies": 'print(\'{"idle_s": 9e9, "unpulled": null, "why": [], "token": "x"}\')',
    "half": 'print(\'{"idle_s": 9e9, "unpulled": []\')',
    "no number": 'print(\'{"idle_s": "9", "unpulled": [], "why": [], "token": "x"}\')',
    "hangs": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()",
}


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(text, id=name, marks=[] if name in ("lies", "hangs") else pytest.mark.slow)
        for name, text in LOOKS.items()
    ],
)
def test_a_look_that_fails_ends_nothing_and_holds_nothing_up(
    box: Container, cloud: ContainerCloud, program: str
) -> None:
    """An agent that crashes, hangs, is killed or lies makes no machine idle; the deadline is kept all the same."""
    entry = box.root / "agent" / "0" / "worker" / "__main__.py"
    entry.parent.mkdir(parents=True)
    entry.write_text(program)
    box.start(idle_limit_s=0.01, deadline=time.time() + 1, pace=QUICK, patience_s=0.5)
    seen = box.seen(lambda view: view.get("why"))
    assert seen["idle_s"] is None
    assert seen["why"][0].endswith(("Error", "Exception"))
    until(cloud.ended)
    assert (cloud.asked("DELETE")[0] >= box.settings["deadline"], cloud.stopped()) == (True, [])


def test_the_key_is_nowhere(box: Container, cloud: ContainerCloud, agent: str, run: rundir.Run) -> None:
    """No child's words or environment, no file and nothing that was printed holds the key; nor do any words of ours."""
    echo = json.dumps({"success": False, "error": KEY, "msg": f"x {KEY}"}).encode()
    cloud.faults = [Fault("GET", 404, echo), Fault("PUT", 200, echo)]
    box.start(idle_limit_s=1.0)
    guard = box.watchdog()
    seen = {}

    def look_round() -> bool:
        for pid in box.pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                seen[words] = Path(f"/proc/{pid}/environ").read_bytes()
        return bool(cloud.stopped())

    until(look_round)
    looks = [environ for words, environ in seen.items() if b"worker/__main__.py" in words]
    assert looks, "the looks of the watchdog were seen"
    assert not [environ for environ in looks if KEY.encode() in environ]
    assert not [words for words in seen if KEY.encode() in words]
    box.seen(lambda view: view["pid"] == guard and "HTTP 200" in (view["last_error"] or ""))
    assert KEY not in json.dumps(on_machine.view(machines.this_computer(), agent)) + box.log()
    for path in [*box.folder.rglob("*"), *machines.this_computer().root.rglob("*")]:
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_one_watchdog_a_machine(box: Container, cloud: ContainerCloud, agent: str) -> None:
    """Started twice, the second ends at once; looks at the lock keep none away; one that is killed is started again."""
    box.start(deadline=time.time() + HOUR_S)
    first = box.watchdog()
    on_machine.view(machines.this_computer(), agent)
    box.start()
    assert box.start_source().wait(30) == 0
    until(lambda: len(box.armed()) == 2)
    assert box.watchdog() == first
    box.power_off()
    box.start()
    second = box.watchdog()
    os.kill(second, signal.SIGHUP)
    looked = box.view()["looked_at"]
    assert box.seen(lambda view: view["looked_at"] > looked)["pid"] == second, "a hang-up is nothing to it"


@pytest.mark.slow  # the loop that starts it again waits for a quarter of a minute
def test_a_watchdog_that_is_killed_is_started_again(box: Container, cloud: ContainerCloud) -> None:
    """Killed by whatever runs out of memory, it comes back by itself and keeps the deadline."""
    box.start(deadline=time.time() + 5)
    first = box.watchdog()
    os.kill(first, signal.SIGKILL)
    until(cloud.ended, 60)
    assert box.watchdog() != first


def test_a_container_that_is_started_again_goes_on_by_its_settings(
    box: Container, cloud: ContainerCloud, agent: str, run: rundir.Run
) -> None:
    """Stopped for being idle and started again, it has its whole idle time once more, and the same deadline."""
    box.start(idle_limit_s=1.2, deadline=time.time() + HOUR_S)
    until(cloud.stopped)
    box.power_off()
    asked, again = len(cloud.stopped()), time.time()
    box.start()
    seen = box.seen(lambda view: view.get("idle_s") is not None and view["idle_s"] < 1)
    assert (seen["phase"], seen["deadline"]) == ("armed", box.settings["deadline"])
    until(lambda: len(cloud.stopped()) > asked)
    assert cloud.asked("PUT")[asked] - again >= 1.2
    box.power_off()
    box.start(deadline=time.time() - 1)
    until(cloud.ended)


@pytest.mark.parametrize("fault", ["full disk", "no home"])
def test_it_guards_though_nothing_can_be_written(box: Container, cloud: ContainerCloud, fault: str) -> None:
    """On a full disk and in a home that takes no file, the deadline is kept."""
    if fault == "full disk":
        box.before = "ulimit -f 0\n"
    else:
        box.root.write_text("a file where the folder should be")
    box.start(deadline=time.time() + 0.5)
    until(cloud.ended)
    assert not (box.root / "guard" / "status.json").is_file()


def test_the_source_does_what_the_text_does(box: Container, cloud: ContainerCloud, agent: str, run: rundir.Run) -> None:
    """Started from its source, it stops an idle machine with rows and ends it at its deadline, as from the text."""
    box.start_source(idle_limit_s=0.3, deadline=time.time() + HOUR_S)
    until(cloud.stopped)
    assert cloud.ended() == []
    on_machine.move_deadline(machines.this_computer(), agent, time.time())
    until(cloud.ended)
    assert (box.log(), box.seen(lambda view: view["phase"] == "ended")["ended_by"]) == ("", "deadline")

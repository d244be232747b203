"""A real watchdog, started by the real text, against a provider that fails in every way: it ends its own machine."""

from __future__ import annotations

import itertools
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
from orchestrator import agents, machines, on_machine
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import container_cloud as clouds
from tests.worker import machine
from tests.worker.container import PACE, Container
from tests.worker.container_cloud import FOREIGN, KEY, OWN, ContainerCloud, Fault
from tests.worker.guarding import RUN, add_row, aged, home

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a rented machine runs Linux")
HOUR_S = 3600.0
QUICK = PACE / 4
"""Where nothing is waited for that takes a while in itself."""


@pytest.fixture
def cloud() -> Iterator[ContainerCloud]:
    with clouds.serving() as cloud:
        yield cloud


@pytest.fixture
def box(tmp_path: Path, cloud: ContainerCloud) -> Iterator[Container]:
    box = Container(tmp_path / "container", cloud)
    yield box
    box.power_off()
    assert cloud.instances[FOREIGN] == "running"
    assert all(path.endswith(f"/{OWN}/") for _, _, path, _ in cloud.calls), "no call was about another machine"


@pytest.fixture
def agent(box: Container) -> str:
    """The code installed now, on this container."""
    box.have_machine(machines.this_computer().root)
    store = Path(os.environ["GPU_HOME"]) / "agents"
    name = agents.keep(store)
    machines.this_computer().push_agent(store, name)
    return name


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


def running(counting_run: Callable[..., Run], **params: object) -> rundir.Run:
    """A real run that goes on, with rows."""
    run = counting_run(count=100_000, pace_s=0.01, **params)
    machines.this_computer().push_agent(Path(os.environ["GPU_HOME"]) / "agents", run.record.agent)
    machine.start(run)
    there = machine.there(run)
    until(lambda: there.attempt(1).rows.exists() and there.attempt(1).rows.stat().st_size)
    return there


def wait_for_looks(box: Container, count: int) -> None:
    """Return when the watchdog has written down that often how it stands."""
    for _ in range(count):
        before = (box.root / "guard" / "status.json").stat().st_ino
        until(lambda before=before: (box.root / "guard" / "status.json").stat().st_ino != before)


def test_at_the_deadline_runs_are_sealed_and_then_the_machine_is_ended(
    box: Container, cloud: ContainerCloud, counting_run: Callable[..., Run]
) -> None:
    """The worker is stopped cleanly by the newest agent, and sealed; only then is the machine destroyed."""
    box.have_machine(machines.this_computer().root)
    there = running(counting_run)
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
    box.have_machine(machines.this_computer().root)
    entry = box.root / "agent" / "newest" / "worker" / "__main__.py"
    running(counting_run, ignore_term=True)
    entry.parent.mkdir(parents=True)
    entry.write_text("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()")
    os.utime(entry, (time.time() + 60, time.time() + 60))
    began = time.time()
    box.start(deadline=began, grace_s=1.0, pace=QUICK)
    until(cloud.ended)
    assert cloud.asked("DELETE")[0] - began >= 1.0


def test_the_deadline_is_moved_by_the_laptops_own_words(box: Container, cloud: ContainerCloud, agent: str) -> None:
    """Read back and moved through the agent as ever: to later, not beyond the latest, durably; and to sooner."""
    this = machines.this_computer()
    assert on_machine.view(this, agent)["alive"] is False
    soon, late = time.time() + 1.2, time.time() + HOUR_S
    box.start(deadline=soon, deadline_max=late)
    box.seen(lambda view: view.get("answered_at"))
    told = on_machine.view(this, agent)
    assert (told["alive"], told["phase"], told["deadline"], told["last_error"]) == (True, "armed", soon, None)
    assert on_machine.move_deadline(this, agent, late + 9999)["deadline"] == late
    box.seen(lambda view: view["deadline"] == late)
    box.seen(lambda view: time.time() > soon + 0.3 and view["phase"] == "armed")
    assert cloud.ended() == []
    box.power_off()
    before = box.view()["pid"]
    box.start()
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
    box.have_machine(machines.this_computer().root)
    there = running(counting_run, ignore_term=True)
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


def test_the_hard_deadline_destroys_whatever_is_not_home(
    box: Container, cloud: ContainerCloud, agent: str, run: rundir.Run
) -> None:
    """What an idle machine is kept for, it is not kept for beyond its deadline."""
    box.start(idle_limit_s=0.3, deadline=time.time() + 2, pace=QUICK)
    until(cloud.stopped)
    assert cloud.ended() == []
    until(cloud.ended)
    assert cloud.asked("DELETE")[0] >= box.settings["deadline"]


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
    box.start(idle_limit_s=0.7)
    box.seen(lambda view: cloud.calls and time.time() - cloud.calls[0][0] > 1.0 and view["idle_s"] < 0.7)
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
    box.start(idle_limit_s=0.01, deadline=time.time() + 1, pace=QUICK)
    seen = box.seen(lambda view: view.get("why"))
    assert seen["idle_s"] is None
    assert seen["why"][0].endswith(("Error", "Exception"))
    until(cloud.ended)
    assert (cloud.asked("DELETE")[0] >= box.settings["deadline"], cloud.stopped()) == (True, [])


AUTH = b'{"success": false, "error": "auth_error", "msg": "Invalid user key"}'
FAULTS = {
    "404-auth": [Fault("DELETE", 404, AUTH), Fault("DELETE", 401, AUTH), Fault("DELETE", 403, b"<html>")],
    "200-but-no": [Fault("DELETE", 200, AUTH), Fault("DELETE", 200, b"[]"), Fault("DELETE", 200, b"<html>")],
    "429": [Fault("DELETE", 429, b"API requests too frequent"), Fault("DELETE", 429, b"", {"Retry-After": "1"})],
    "5xx": [Fault("DELETE", 500), Fault("DELETE", 502), Fault("DELETE", 503, b"{}")],
    "hang": [Fault("GET", hang=True), Fault("DELETE", hang=True)],
    "drip": [Fault("GET", drip=True), Fault("DELETE", drip=True)],
    "late": [Fault("DELETE", 500, late=True)],
    "redirect": [Fault("DELETE", 301, b"", {"Location": "http://127.0.0.1:9/"}), Fault("GET", 308, b"")],
    "odd": [Fault("DELETE", 200, b"[" * 99_999), Fault("DELETE", 400, b'{"error": {}}', {"Date": "soon"})],
    "odd-waits": [Fault("DELETE", 429, b"", {"Retry-After": wait}) for wait in ("nan", "-9", "Sat, 21 Nov 2026")],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_provider_that_fails_is_asked_until_it_does_it(
    box: Container, cloud: ContainerCloud, faults: list[Fault]
) -> None:
    """After each kind of failure it says what was in the way, and asks on, until its machine is ended."""
    cloud.faults = list(faults)
    box.start(deadline=time.time() - 1, pace=QUICK)
    if faults[0].method == "DELETE" and not faults[0].late:
        seen = box.seen(lambda view: view.get("last_error"))
        assert seen["phase"] == "ending", "what was refused has not begun"
        assert "html" not in seen["last_error"]
    until(lambda: not cloud.faults and box.view().get("phase") == "ended")
    at = cloud.asked("DELETE")
    assert cloud.instances[OWN] == "gone"
    if "Retry-After" in faults[-1].headers and faults[-1].headers["Retry-After"] == "1":
        assert at[2] - at[1] >= 0.95, "it waits for as long as it was told to"


def test_an_end_that_does_not_come_is_asked_for_with_growing_pauses(box: Container, cloud: ContainerCloud) -> None:
    """As long as the machine lives, its end is asked for again, each time after a longer pause; gone is no error."""
    box.start(deadline=time.time() - 1)
    until(lambda: len(cloud.ended()) >= 4)
    pauses = [later - sooner for sooner, later in itertools.pairwise(cloud.asked("DELETE"))]
    assert all(longer > shorter > 8 * PACE for shorter, longer in itertools.pairwise(pauses))
    assert box.seen(lambda view: view["phase"] == "ended" and not view["last_error"])


def test_a_key_that_is_refused_is_said_and_never_an_end(box: Container, cloud: ContainerCloud) -> None:
    """`404 auth_error` is no instance that is gone: it stands in what the laptop reads, for as long as it is so."""
    box.env["CONTAINER_API_KEY"] = "0" * 64
    box.start(deadline=time.time() + 1)
    seen = box.seen(lambda view: view.get("last_error"))
    assert (seen["phase"], seen.get("answered_at")) == ("armed", None)
    assert seen["last_error"].endswith("HTTP 404 auth_error")
    until(lambda: len(cloud.ended()) >= 2)
    assert box.view()["phase"] == "ending"
    assert cloud.instances[OWN] == "running"


@pytest.mark.slow
def test_rows_are_sealed_at_the_deadline_though_the_provider_is_silent(
    box: Container, cloud: ContainerCloud, counting_run: Callable[..., Run]
) -> None:
    """When nothing answers at the deadline, runs are stopped in time all the same; then it asks on."""
    box.have_machine(machines.this_computer().root)
    there = running(counting_run)
    cloud.faults = [Fault("GET", hang=True) for _ in range(3)]
    box.start(deadline=time.time() + 0.3, pace=QUICK)
    until(there.attempt(1).exit.exists)
    until(cloud.ended)


def test_a_clock_that_is_set_back_puts_no_deadline_off(box: Container, cloud: ContainerCloud) -> None:
    """Set back by a day while the watchdog runs and the provider is silent: the end is asked for in time."""
    box.set_clock(0)
    deadline = time.time() + 1.5
    box.start(deadline=deadline)
    box.seen(lambda view: view.get("answered_at"))
    box.set_clock(-86_400)
    until(cloud.ended)
    assert deadline <= cloud.asked("DELETE")[0] < deadline + 10


@pytest.mark.parametrize("ahead_s", [-86_400.0, 86_400.0], ids=["behind", "ahead"])
def test_a_clock_that_was_wrong_at_the_start_is_mended(box: Container, cloud: ContainerCloud, ahead_s: float) -> None:
    """Before it ends anything it hears from the provider what time it is: not too soon and not too late."""
    box.set_clock(ahead_s)
    cloud.faults = [Fault("GET", hang=True)]  # and not from the first answer
    deadline = time.time() + 2.5
    box.start(deadline=deadline, epoch=time.time() - 900_000, pace=QUICK)
    box.seen(lambda view: view.get("answered_at") and view["phase"] == "armed")
    assert cloud.ended() == []
    until(cloud.ended)
    assert deadline - 1 <= cloud.asked("DELETE")[0] < deadline + 10


def test_a_wall_clock_ahead_is_a_doubt_that_the_provider_settles(box: Container, cloud: ContainerCloud) -> None:
    """A clock that jumps ahead may have slept with its machine: the provider is asked soon, and what it says counts."""
    box.set_clock(0)
    box.start(deadline=time.time() + HOUR_S, pace=QUICK / 2)
    box.seen(lambda view: view.get("answered_at"))
    box.set_clock(2 * HOUR_S)
    asked = len(cloud.asked("GET"))
    until(lambda: len(cloud.asked("GET")) > asked)
    assert (cloud.ended(), box.view()["phase"]) == ([], "armed")
    cloud.clock_ahead_s = 2 * HOUR_S
    until(cloud.ended)


def test_the_providers_clock_decides(box: Container, cloud: ContainerCloud) -> None:
    """When the provider says that the deadline has passed, it has, whatever the clock here shows."""
    cloud.clock_ahead_s = 2 * HOUR_S
    box.start(deadline=time.time() + HOUR_S)
    until(cloud.ended)


def test_the_key_is_nowhere(box: Container, cloud: ContainerCloud, agent: str, run: rundir.Run) -> None:
    """No child's words or environment, no file and nothing that was printed holds the key; nor do any words of ours."""
    echo = json.dumps({"success": False, "error": KEY, "msg": f"x {KEY}"}).encode()
    cloud.faults = [Fault("GET", 404, echo), Fault("PUT", 200, echo)]
    box.start(idle_limit_s=1.0)
    guard = box.watchdog()
    seen = {}
    while not cloud.stopped():
        for pid in box.pids():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                seen[words] = Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
    looks = [environ for words, environ in seen.items() if b"worker/__main__.py" in words]
    assert looks, "the looks of the watchdog were seen"
    assert not [environ for environ in looks if KEY.encode() in environ]
    assert not [words for words in seen if KEY.encode() in words]
    box.seen(lambda view: view["pid"] == guard and "HTTP 200" in (view["last_error"] or ""))
    assert KEY not in json.dumps(on_machine.view(machines.this_computer(), agent)) + box.log()
    for path in [*box.folder.rglob("*"), *machines.this_computer().root.rglob("*")]:
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "env",
    [{}, {"CONTAINER_ID": OWN}, {"CONTAINER_API_KEY": KEY}]
    + [{"CONTAINER_API_KEY": KEY, "CONTAINER_ID": odd} for odd in ("", f"{OWN}/../{FOREIGN}", f"C.{OWN}")],
    ids=["nothing", "no-key", "no-id", "empty", "path", "label"],
)
def test_nothing_is_ended_by_a_guess(box: Container, cloud: ContainerCloud, env: dict[str, str]) -> None:
    """Without a key and a number of its own there is no watchdog that looks alive, and nobody is asked anything."""
    box.env = env
    box.start_source(deadline=time.time() - 1)
    until(lambda: box.log().count("Error") and not box.pids())
    assert (cloud.calls, (box.root / "guard").exists()) == ([], False)


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
    box.start_source(idle_limit_s=0.3, deadline=time.time() + 2, pace=QUICK)
    until(cloud.stopped)
    assert cloud.ended() == []
    until(cloud.ended)
    assert (box.log(), box.seen(lambda view: view["phase"] == "ended")["ended_by"]) == ("", "deadline")

"""A real guard against a provider that fails in every way: it ends its own machine, in time, and never another."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import durable, locks, rundir
from orchestrator import machines
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import cloud as clouds
from tests.worker import machine
from tests.worker.cloud import KEY, MARKER, Cloud, Fault
from tests.worker.guarding import RUN, SPANS, Guarded, add_row, aged, home

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a rented machine runs Linux")
FOREIGN = "gpu-20261121t120000-ffffffffffff"


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with clouds.serving() as cloud:
        cloud.add("other", FOREIGN, FOREIGN)
        cloud.add("own", "renamed by somebody", MARKER)
        cloud.add("nobodys", None, None)
        yield cloud


@pytest.fixture
def box(tmp_path: Path, cloud: Cloud) -> Iterator[Guarded]:
    box = Guarded(tmp_path, cloud)
    yield box
    box.disarm()


def test_an_idle_machine_on_which_all_is_home_is_ended(box: Guarded, cloud: Cloud) -> None:
    """With nothing on it that is not home, the machine is ended once it was idle for long enough; no other is."""
    box.arm(idle_s=0.4)
    until(cloud.ended)
    box.seen(lambda view: view["phase"] == "ended" and view["ended_by"] == "idle")
    assert set(cloud.ended()) == {"own"}


def test_idleness_never_destroys_what_is_not_home(box: Guarded, cloud: Cloud) -> None:
    """However long it is idle, a machine with a row or a file that is not home is not ended; once they are, it is."""
    run = box.run()
    add_row(run, 1)
    durable.have_folder(run.work)
    (run.work / "best.txt").write_bytes(b"only here")
    aged(box.root, 1000)
    box.arm(idle_s=0.3)
    box.seen(lambda view: (view.get("idle_s") or 0) > 1.5)
    assert box.view()["unpulled"] == [RUN]
    rows = "attempts/0001/rows.jsonl"
    assert acknowledge(box, run, rows)["refused"] == []
    before = box.view()["looked_at"]
    box.seen(lambda view: view["looked_at"] > before and (view.get("idle_s") or 0) > 1.8)
    assert (box.view()["unpulled"], cloud.ended()) == ([RUN], [])
    acknowledge(box, run, "out/best.txt")
    until(cloud.ended)


def acknowledge(box: Guarded, run: rundir.Run, *names: str) -> dict[str, object]:
    """The laptop says that it has all of these files."""
    words = [sys.executable, "-I", str(box.entry), "acknowledge", str(run.folder)]
    done = subprocess.run(words, input=json.dumps(home(run, *names)).encode(), capture_output=True, check=True)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_a_file_that_grows_keeps_the_machine_whatever_the_clock_says(box: Guarded, cloud: Cloud) -> None:
    """Rows that come are use, also where every file looks old because the clock was set ahead."""
    run = box.run()
    aged(box.root, 90_000)
    box.arm(idle_s=1.0)
    for index in range(12):
        box.seen(lambda view, index=index: view["token"] and (index == 0 or view["idle_s"] < 0.9))
        add_row(run, index)
        acknowledge(box, run, "attempts/0001/rows.jsonl")
        aged(run.folder, 90_000)
    assert cloud.ended() == []
    until(cloud.ended)


def test_at_the_deadline_runs_are_stopped_and_sealed_before_the_end(
    box: Guarded, cloud: Cloud, counting_run: Callable[..., Run]
) -> None:
    """The worker is stopped cleanly, its rows synced and sealed; only then is the machine ended, idle or not."""
    run = counting_run(count=100_000, pace_s=0.01)
    machines.this_computer().push_agent(Path(os.environ["GPU_HOME"]) / "agents", run.record.agent)
    machine.start(run)
    there = machine.there(run)
    until(lambda: there.attempt(1).rows.exists() and there.attempt(1).rows.stat().st_size)
    box.arm(root=str(there.folder.parent.parent), deadline=time.time() + 0.5, idle_s=3600.0)
    until(cloud.ended)
    seal = rundir.Seal.load(there.attempt(1).exit)
    assert seal is not None
    assert seal.reason == "stopped"
    assert seal.files["rows.jsonl"]["bytes"] == there.attempt(1).rows.stat().st_size > 0
    ended_at = next(at for at, path, _ in cloud.calls if path.endswith("/terminate"))
    assert there.attempt(1).exit.stat().st_mtime <= ended_at
    assert set(cloud.ended()) == {"own"}


@pytest.mark.slow
def test_rows_are_sealed_at_the_deadline_though_the_provider_is_silent(
    box: Guarded, cloud: Cloud, counting_run: Callable[..., Run]
) -> None:
    """When the provider does not answer at the deadline, runs are stopped in time all the same; then it asks on."""
    cloud.faults = [Fault("/instances", 502) for _ in range(40)]
    run = counting_run(count=100_000, pace_s=0.01)
    machines.this_computer().push_agent(Path(os.environ["GPU_HOME"]) / "agents", run.record.agent)
    machine.start(run)
    there = machine.there(run)
    box.arm(root=str(there.folder.parent.parent), deadline=time.time() + 0.3)
    until(there.attempt(1).exit.exists)
    until(cloud.ended)


FAULTS = [
    [Fault("/terminate", 429, b"slow down", {"Retry-After": "1"})],
    [Fault("/terminate", 500), Fault("/terminate", 502), Fault("/instances", 503)],
    [Fault("/terminate", hang=True), Fault("/instances", hang=True)],
    [Fault("/terminate", drip=True), Fault("/instances", drip=True)],
    [Fault("/terminate", 500, late=True), Fault("/terminate", 400, b'{"error":{"code":"global/unknown"}}')],
    [Fault("/instances", 200, b"<html>"), Fault("/instances", 200, b'{"data": {}}'), Fault("/instances", 200, b"[]")],
    [Fault("/instances", 301, b"", {"Location": "http://127.0.0.1:9/elsewhere"})],
    [Fault("/instances", 401, b'{"error":{"code":"global/invalid-api-key"}}')],
]


@pytest.mark.parametrize("faults", FAULTS, ids=["429", "5xx", "hang", "drip", "late", "nonsense", "redirect", "401"])
@pytest.mark.first(4)
def test_a_provider_that_fails_is_asked_until_it_does_it(box: Guarded, cloud: Cloud, faults: list[Fault]) -> None:
    """After each kind of failure the guard goes on, at a bounded rate, until its machine is ended."""
    cloud.faults = list(faults)
    box.arm(deadline=time.time() - 1)
    until(lambda: not cloud.faults and box.view().get("phase") == "ended")
    assert set(cloud.ended()) == {"own"}
    if "Retry-After" in faults[0].headers:
        at = [at for at, path, _ in cloud.calls if path.endswith("/terminate")]
        assert at[1] - at[0] >= 0.95, "it waits for as long as it was told to"


def test_an_end_that_was_accepted_and_did_not_come_is_asked_for_again(box: Guarded, cloud: Cloud) -> None:
    """As long as the machine lives, its end is asked for again, and not faster than the set span."""
    cloud.ends = False
    box.arm(deadline=time.time() - 1)
    until(lambda: len(cloud.ended()) >= 4)
    at = [at for at, path, _ in cloud.calls if path.endswith("/terminate")]
    assert all(later - sooner >= SPANS["ending_s"] for sooner, later in itertools.pairwise(at))


@pytest.mark.parametrize(
    "listed",
    [
        [("a", None, None)],
        [("a", MARKER, None), ("b", None, MARKER)],
        [("a", MARKER, MARKER), ("b", MARKER, MARKER)],
        [("a", MARKER, FOREIGN)],
        [("a", f"{MARKER} ", None), ("b", MARKER[:-1], None), ("c", MARKER.upper(), None)],
        [],
    ],
    ids=["none", "two", "twins", "tag-says-another", "nearly", "empty"],
)
def test_nothing_is_ended_by_a_guess(box: Guarded, cloud: Cloud, listed: list[tuple[str, str, str]]) -> None:
    """Unless exactly one instance bears the marker, none is ended; it is said why, and the guard asks on."""
    cloud.instances.clear()
    for each in listed:
        cloud.add(*each)
    box.arm(deadline=time.time() - 1, idle_s=0.1)
    box.seen(lambda view: "bear this machine's marker" in (view.get("last_error") or ""))
    asked = len(cloud.calls)
    until(lambda: len(cloud.calls) > asked + 3)
    assert cloud.ended() == []
    cloud.instances.clear()
    cloud.add("own", MARKER)
    until(lambda: cloud.ended() == ["own"])


@pytest.mark.slow
def test_a_guard_that_is_killed_anywhere_is_followed_by_another(box: Guarded, cloud: Cloud) -> None:
    """Killed again and again at random moments, it leaves a sound state behind, and the end comes once it is due."""
    chance, spoilt = random.Random(7), b'{"clock": {"epoch": 1e3'
    cloud.ends = False
    run = box.run()
    add_row(run, 1)
    for _ in range(25):
        guard = box.arm(deadline=time.time() + 3600, idle_s=0.1)
        began = time.monotonic()
        span_s = chance.uniform(0.02, 0.6)
        until(lambda began=began, span_s=span_s: time.monotonic() - began > span_s)
        guard.kill()
        guard.wait()
        status = box.root / "guard" / "status.json"
        if status.exists() and status.read_bytes() != spoilt:
            assert isinstance(durable.load_json(status), dict)
        if status.exists() and chance.random() < 0.2:  # as a power cut may leave it: it is not synced
            status.write_bytes(spoilt)
    assert cloud.ended() == []
    box.ask("deadline", {"deadline": time.time() - 1})
    ended: list[str] = []
    for _ in range(60):
        guard = box.arm()
        began = time.monotonic()
        span_s = chance.uniform(0.1, 1.0)
        until(lambda began=began, span_s=span_s: time.monotonic() - began > span_s)
        guard.kill()
        guard.wait()
        ended = cloud.ended()
        if len(ended) > 2:
            break
    assert set(ended) == {"own"}


def test_one_guard_a_machine(box: Guarded, cloud: Cloud) -> None:
    """Of two guards one ends at once, with 0; when the other dies, the next that is started takes its place."""
    first = box.arm(deadline=time.time() + 3600)
    box.seen(lambda view: view["pid"] == first.pid)
    second = box.arm()
    assert second.wait(20) == 0
    assert first.poll() is None
    first.kill()
    first.wait()
    third = box.arm()
    box.seen(lambda view: view["pid"] == third.pid)
    assert box.ask("guard")["alive"] is True


def test_the_key_is_nowhere(box: Guarded, cloud: Cloud) -> None:
    """No process' words or environment, no file but the settings and nothing that was printed holds the key."""
    cloud.faults = [Fault("/instances", 400, json.dumps({"error": {"code": f"x {KEY}"}}).encode())]
    guard = box.arm(idle_s=0.3, deadline=time.time() + 3600)
    box.run()
    words = set()
    while not cloud.ended():
        for path in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                try:
                    data = (path / name).read_bytes()
                except OSError:
                    continue
                if str(box.root).encode() in data or path.name == str(guard.pid):
                    words.add(data)
    assert len(words) > 1, "the looks of the guard were seen"
    assert not [each for each in words if KEY.encode() in each]
    assert KEY not in box.said()
    for path in box.settings.parent.rglob("*"):
        if path.is_file() and path != box.settings:
            assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in json.dumps(box.ask("guard"))


def test_settings_that_others_may_read_arm_nothing(box: Guarded, cloud: Cloud) -> None:
    """A file with the key that is not its owner's alone is refused, and so is one that is none; without the key."""
    box.write(deadline=time.time() - 1)
    words = [sys.executable, "-I", str(box.entry), "watch", str(box.settings)]
    box.settings.chmod(0o640)
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, "0600" in done.stderr) == (3, True)
    box.settings.chmod(0o600)
    spoilt = [b'{"key": "' + KEY.encode(), b"[]", b"{}", json.dumps({**box.document, "deadline": "soon"}).encode()]
    spoilt.append(json.dumps({**box.document, "api_url": "http://cloud.example/api/v1"}).encode())
    spoilt.append(json.dumps({**box.document, "key": f"two words {KEY}"}).encode())
    spoilt.append(json.dumps({**box.document, "marker": "gpu"}).encode())
    for text in spoilt:
        box.settings.write_bytes(text)
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
        assert (done.returncode, KEY in done.stderr) == (3, False), text
    assert cloud.calls == []


def test_settings_may_come_on_standard_input(box: Guarded, cloud: Cloud) -> None:
    """A guard told through a pipe needs no file with the key."""
    words = [sys.executable, "-I", str(box.entry), "watch", "-"]
    guard = subprocess.Popen(words, stdin=subprocess.PIPE)
    box.guards.append(guard)
    assert guard.stdin is not None
    guard.stdin.write(json.dumps({**box.document, "deadline": time.time() - 1}).encode())
    guard.stdin.close()
    until(lambda: cloud.ended() == ["own"])


def test_the_deadline_can_be_moved(box: Guarded, cloud: Cloud) -> None:
    """It moves to later and to sooner, not beyond the latest, durably; what is no number moves nothing."""
    soon, late = time.time() + 5.0, time.time() + 3600
    box.arm(deadline=soon, deadline_max=late)
    box.seen(lambda view: view["deadline"] == soon)
    assert box.ask("deadline", {"deadline": late + 9999})["deadline"] == late
    box.seen(lambda view: view["deadline"] == late)
    assert box.ask("deadline", {"deadline": "never"}) == {"error": "refused"}
    assert box.ask("deadline", {"deadline": float("inf")}) == {"error": "refused"}
    until(lambda: time.time() > soon + 0.5)
    assert cloud.ended() == []
    box.disarm()
    box.arm()
    seen = box.seen(lambda view: view["pid"] == box.guards[-1].pid)
    assert (seen["deadline"], seen["phase"]) == (late, "armed")
    box.ask("deadline", {"deadline": time.time()})
    until(cloud.ended)


def test_an_end_is_called_off_when_the_deadline_moves_while_runs_are_stopped(
    box: Guarded, cloud: Cloud, counting_run: Callable[..., Run]
) -> None:
    """Somebody who extends the deadline while the runs are being stopped keeps the machine."""
    run = counting_run(count=100_000, pace_s=0.01, ignore_term=True)
    machines.this_computer().push_agent(Path(os.environ["GPU_HOME"]) / "agents", run.record.agent)
    machine.start(run)
    there = machine.there(run)
    until(lambda: there.attempt(1).rows.exists() and there.attempt(1).rows.stat().st_size)
    box.root = there.folder.parent.parent
    box.arm(root=str(box.root), deadline=time.time(), grace_s=2.0)
    until(there.attempt(1).stop.exists)
    box.ask("deadline", {"deadline": time.time() + 3600})
    until(there.attempt(1).exit.exists)
    box.seen(lambda view: view["phase"] == "armed")
    assert cloud.ended() == []


def test_the_laptop_reads_back_what_is_armed(box: Guarded, cloud: Cloud) -> None:
    """The answer says that the guard lives, until when, for which instance, and what last went wrong."""
    assert box.ask("guard") == {"alive": False, "deadline_asked": None}
    until_when = time.time() + 3600
    cloud.faults = [Fault("/instances", 401, b'{"error":{"code":"global/invalid-api-key"}}')]
    guard = box.arm(deadline=until_when)
    box.seen(lambda view: "with this key" in (view["last_error"] or ""))
    box.seen(lambda view: view["instance_id"])
    answer = box.ask("guard")
    assert (answer["alive"], answer["phase"], answer["deadline"]) == (True, "armed", until_when)
    assert (answer["instance_id"], answer["last_error"]) == ("own", None)
    guard.kill()
    guard.wait()
    assert box.ask("guard")["alive"] is False


def test_a_clock_that_is_ahead_ends_nothing_too_soon(box: Guarded, cloud: Cloud) -> None:
    """When only this machine's clock says that the deadline has passed, the provider's word counts."""
    box.arm(written_at=time.time() + 10_000, deadline=time.time() + 5000)
    box.seen(lambda view: view["answered_at"] and view["phase"] == "armed")
    asked = len(cloud.calls)
    until(lambda: len(cloud.calls) > asked + 2)
    assert cloud.ended() == []
    assert box.view()["clock"]["epoch"] < time.time() + 100


def test_a_clock_that_is_behind_ends_nothing_too_late(box: Guarded, cloud: Cloud) -> None:
    """When the provider says that the deadline has passed, it has, whatever the clock here shows."""
    cloud.clock_ahead_s = 6000
    box.arm(deadline=time.time() + 5000)
    until(lambda: cloud.ended() == ["own"])


def test_the_guard_holds_one_lock_and_its_children_none(box: Guarded) -> None:
    """A look or a stop that outlives a killed guard does not keep the next one away."""
    guard = box.arm(idle_s=3600.0, deadline=time.time() + 3600)
    box.seen(lambda view: view["token"])
    guard.kill()
    guard.wait()
    assert not locks.is_held(box.root / "guard" / "guard.lock")

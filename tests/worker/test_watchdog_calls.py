"""A real watchdog against a provider that fails in every way, and wrong clocks: it asks for its end until it comes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import durable
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker.container import PACE, QUICK, Container, contained
from tests.worker.container_cloud import FOREIGN, KEY, OWN, ContainerCloud, Fault

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a rented machine runs Linux")
HOUR_S = 3600.0
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Container]:
    with contained(tmp_path) as box:
        yield box


@pytest.fixture
def cloud(box: Container) -> ContainerCloud:
    return box.cloud


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
@pytest.mark.first(5)
def test_a_provider_that_fails_is_asked_until_it_does_it(
    box: Container, cloud: ContainerCloud, faults: list[Fault]
) -> None:
    """After each kind of failure it says what was in the way, and asks on, until its machine is ended."""
    cloud.faults = list(faults)
    box.start(deadline=time.time() - 1, pace=QUICK, patience_s=0.5)
    if faults[0].method == "DELETE" and not faults[0].late:
        seen = box.seen(lambda view: view.get("last_error"))
        assert seen["phase"] == "ending", "what was refused has not begun"
        assert "html" not in seen["last_error"]
    until(lambda: not cloud.faults and box.view().get("phase") == "ended")
    at = cloud.asked("DELETE")
    assert cloud.instances[OWN] == "gone"
    if "Retry-After" in faults[-1].headers and faults[-1].headers["Retry-After"] == "1":
        assert at[2] - at[1] >= 0.95, "it waits for as long as it was told to"


def test_a_refusal_with_a_good_status_is_a_refusal(box: Container, cloud: ContainerCloud) -> None:
    """`200` with `success: false` has ended nothing: it is said, and asked for again."""
    cloud.faults = [Fault("DELETE", 200, AUTH) for _ in range(1000)]
    box.start(deadline=time.time() - 1, pace=QUICK)
    seen = box.seen(lambda view: view.get("last_error"))
    assert (seen["phase"], seen["last_error"].split(" ", 1)[1]) == ("ending", "HTTP 200 auth_error")
    cloud.faults.clear()
    until(lambda: cloud.instances[OWN] == "gone")


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
    there = box.running(counting_run)
    cloud.faults = [Fault("GET", hang=True) for _ in range(3)]
    box.start(deadline=time.time() + 0.3, pace=QUICK, patience_s=0.5)
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
    box.start(deadline=time.time() + HOUR_S, epoch=time.time() - 900_000, pace=QUICK, patience_s=0.5)
    box.seen(lambda view: view.get("answered_at") and view["phase"] == "armed")
    assert cloud.ended() == []
    deadline = time.time() + 0.3
    durable.save_json(box.root / "guard" / "deadline.json", {"deadline": deadline})
    until(cloud.ended)
    assert deadline - 5 <= cloud.asked("DELETE")[0] < deadline + 20


def test_a_wall_clock_ahead_is_a_doubt_that_the_provider_settles(box: Container, cloud: ContainerCloud) -> None:
    """A clock that jumps ahead may have slept with its machine: the provider is asked soon, and what it says counts."""
    box.set_clock(0)
    box.start(deadline=time.time() + HOUR_S, pace=0.006)
    box.seen(lambda view: view.get("answered_at"))
    box.set_clock(2 * HOUR_S)
    asked = len(cloud.asked("GET"))
    until(lambda: len(cloud.asked("GET")) > asked, 12)
    assert (cloud.ended(), box.view()["phase"]) == ([], "armed")
    cloud.clock_ahead_s = 2 * HOUR_S
    until(cloud.ended)


def test_the_providers_clock_decides(box: Container, cloud: ContainerCloud) -> None:
    """When the provider says that the deadline has passed, it has, whatever the clock here shows."""
    cloud.clock_ahead_s = 2 * HOUR_S
    box.start(deadline=time.time() + HOUR_S)
    until(cloud.ended)


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


STUBBORN = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from worker import watchdog
def work():
    try:
        signal.pause()
    except TimeoutError:
        signal.pause()  # as one waits for a killed child that a driver does not let go
signal.signal(signal.SIGALRM, watchdog.ring)
began = time.monotonic()
print(watchdog.within(0.2, work), time.monotonic() - began < 20)
"""


def test_what_will_not_be_given_up_is_given_up_again() -> None:
    """Work that waits on after its time, as for a child that cannot die, is interrupted once more, and left."""
    words = [sys.executable, "-c", STUBBORN, str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=40)
    assert done.stdout.split() == ["TimeoutError", "True"]

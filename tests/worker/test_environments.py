"""Environments on a machine: made once, by a process that nobody's leaving or dying disturbs, and only when whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from jobs import locks
from tests.waiting import until
from tests.worker import building
from tests.worker.building import TINY, VERSION, asking, builder, is_alive, made_once, place
from worker import environments, interpreters, processes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An environment that three asked for at once: one was killed and one left while it was made, the third stayed."""
    folder = tmp_path_factory.mktemp("machine")
    root, pins = building.machine(folder)
    elsewhere = str(folder / "elsewhere")
    variables = {
        "PATH": building.quick_python(folder / "bin"),
        "PIP_TARGET": elsewhere,
        "PIP_USER": "1",
        "PYTHONPATH": elsewhere,
        "PYTHONUSERBASE": elsewhere,
    }
    before = sorted(path.name for path in Path(os.__file__).parent.joinpath("site-packages").iterdir())
    with contextlib.ExitStack() as stack:
        all_asking = [stack.enter_context(asking(root, pins, **variables)) for _ in range(3)]
        at_work = until(lambda: building.at_work(root))
        starter = next(asked for asked in all_asking if asked.child.pid == building.parent(at_work))
        starter.child.kill()
        leaver, stayer = (asked for asked in all_asking if asked is not starter)
        leaver.leave()
        left = leaver.child.wait(10)
        whole_then = bool(place(root).ready())
        answer = stayer.last()
    after = sorted(path.name for path in Path(os.__file__).parent.joinpath("site-packages").iterdir())
    return {
        "root": root,
        "pins": pins,
        "answer": answer,
        "said": stayer.said,
        "at_work": at_work,
        "left": left,
        "whole_then": whole_then,
        "untouched": before == after and not Path(elsewhere).exists(),
    }


# --- made once -------------------------------------------------------------------------------------------------------


def test_many_who_ask_at_once_get_the_one_that_is_made(made: dict[str, Any]) -> None:
    """Three who ask at once have one process make it, and its log reaches one who only joined."""
    assert made["answer"]["ready"] is True
    assert made_once(place(made["root"])) == made["at_work"]
    assert any("Successfully installed idna-3.10" in line for line in made["said"])


def test_a_build_outlives_those_who_asked(made: dict[str, Any]) -> None:
    """The one who started the build is killed, another leaves: the same process goes on to the end."""
    assert made["left"] == 0
    assert not made["whole_then"]  # or nothing was shown
    assert made_once(place(made["root"])) == made["at_work"]


def test_the_environment_is_isolated(made: dict[str, Any]) -> None:
    """It imports its packages from its own folder, whatever a user's variables say, and nothing else was written."""
    script = "import idna, sys; print(idna.__file__, sys.prefix)"
    python = made["answer"]["python"]
    said = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    folder = str(made["root"] / "environments" / made["answer"]["digest"])
    assert said[0].startswith(f"{folder}/")
    assert said[1] == folder
    assert made["untouched"]


def test_what_is_there_is_found_at_once(made: dict[str, Any]) -> None:
    """A second ask has the same answer within 60 ms, starting no other program."""
    talk = environments.Talk(io.BytesIO(), None)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        answer = environments.environment(made["root"], "train", made["pins"], talk)
        times.append(time.perf_counter() - began)
        assert answer == {**made["answer"], "seconds": answer["seconds"]}
    assert min(times) < 0.06


def test_another_lock_is_another_environment(made: dict[str, Any], tmp_path: Path) -> None:
    """A plan counts only with the same kind, pins, Python and builds: each change gives another digest."""
    known = environments.kept(made["root"] / "environments", "train", made["pins"])
    assert known is not None
    assert known.digest == made["answer"]["digest"]
    (tmp_path / f"train-{VERSION}.txt").write_text(f"{TINY}\n", encoding="utf-8")
    other = environments.kept(made["root"] / "environments", "train", tmp_path)
    assert other is not None
    changes: list[dict[str, Any]] = [{"kind": "serve"}, {"version": "3.99"}, {"builds": ["cpu"]}]
    digests = {interpreters.Plan(**{**known.document(), **change}).digest for change in changes}
    assert len(digests | {known.digest, other.digest}) == 5
    assert environments.kept(made["root"] / "environments", "train", tmp_path / "none") is None


def test_a_machine_that_changed_is_looked_at_anew(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is forgotten when a driver appears, so that a GPU machine does not keep a PyTorch without CUDA."""
    folder = made["root"] / "environments"
    assert environments.kept(folder, "train", made["pins"])
    driver = folder / "driver"
    driver.write_text("NVRM version: 580.1\n", encoding="utf-8")
    monkeypatch.setattr(interpreters, "_DRIVER", driver)
    assert environments.kept(folder, "train", made["pins"]) is None


def test_beats_go_to_those_who_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps the connection open hears a beat when there is no news; a call has one answer and no beat."""
    monkeypatch.setattr(environments, "_BEAT_S", 0.0)
    source, end = os.pipe()
    for listens, said in ((source, b'{"beat":true}\n'), (None, b"")):
        out = io.BytesIO()
        environments.Talk(out, listens).tick()
        assert out.getvalue() == said
    os.close(end)
    with pytest.raises(environments.Gone):
        environments.Talk(io.BytesIO(), source).tick()
    os.close(source)


# --- killed and failed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count",
    [pytest.param(1, id="quick"), pytest.param(12, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_a_killed_build_is_never_used(tmp_path: Path, count: int) -> None:
    """A builder is killed at any moment: that is said, nothing is ready, and the next ask starts from nothing."""
    random = Random(count)
    root, pins = building.machine(tmp_path)
    path = building.quick_python(tmp_path / "bin")
    for _ in range(count):
        delay_s = random.uniform(0.0, 2.0)
        with asking(root, pins, PATH=path) as asked:
            pid = until(lambda: builder(root))
            threading.Timer(delay_s, processes.kill, ([pid],)).start()
            answer = asked.last()
        if "ready" in answer:  # it was done sooner
            shutil.rmtree(place(root).folder)
            continue
        assert "killed by signal 9" in answer["failed"]["message"]
        assert "again" in answer["failed"]["retry"]
        began = any(path.stem != "choosing" for path in (root / "environments").glob("*.lock"))
        assert not began or not place(root).ready()
        until(lambda: not locks.is_held(place(root).lock))
        (place(root).folder / "left").parent.mkdir(exist_ok=True)
        (place(root).folder / "left").touch()
    with asking(root, pins, PATH=path) as asked:
        assert asked.last().get("ready") is True
    assert not (place(root).folder / "left").exists()


def test_a_failed_build_says_why_and_is_tried_again(tmp_path: Path) -> None:
    """A failure names the step, what the installer said and what helps; the next ask tries anew, not the old answer."""
    root, pins = building.machine(tmp_path)
    count = tmp_path / "count"
    path = building.python_that(
        tmp_path / "bin", f"echo x >>{count}; echo 'OSError: [Errno 28] No space left on device'; exit 3"
    )
    for number in (1, 2):
        with asking(root, pins, PATH=path) as asked:
            failed = asked.last()["failed"]
        assert failed["message"] == "Making the environment failed with exit code 3."
        assert "Free some space" in failed["hint"]
        assert "No space left" in failed["tail"][-1]
        assert len(asked.said) == 2  # nothing of the build before
        assert count.read_text(encoding="ascii") == "x\n" * number


def test_too_small_a_disk_is_said_before_anything_is_installed(tmp_path: Path) -> None:
    """What does not fit on the disk is refused at once, with both sizes."""
    root, pins = building.machine(tmp_path, TINY.replace("0.05", "9000000"))
    with asking(root, pins) as asked:
        failed = asked.last()["failed"]
    assert "needs about 13500000 GB" in failed["message"]
    assert not place(root).folder.exists()


def test_what_a_killed_build_left_running_ends_first(tmp_path: Path) -> None:
    """A program of a killed build, and what that started, is gone before the next build begins: no two write there."""
    root, pins = building.machine(tmp_path)
    started = tmp_path / "started"
    path = building.python_that(tmp_path / "bin", f"sleep 300 & echo $$ $! >{started}; wait")

    def kill_at_work() -> list[int]:
        with asking(root, pins, PATH=path) as asked:
            until(lambda: started.exists() and started.read_bytes().endswith(b"\n"))
            pids = [int(word) for word in started.read_text(encoding="ascii").split()]
            started.unlink()
            assert [pid for pid in left if is_alive(pid)] == []
            os.kill(until(lambda: builder(root)), signal.SIGKILL)
            assert "killed" in asked.last()["failed"]["message"]
            return pids

    left: list[int] = []
    for _ in range(2):
        left = kill_at_work()
    until(lambda: not is_alive(left[0]))  # the program itself; what it started, the next build would end
    os.kill(left[1], signal.SIGKILL)


def test_another_root_of_the_same_user_is_left_alone(tmp_path: Path) -> None:
    """A build ends what an earlier one in its own root left running, never the same build in another root."""
    roots = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        roots.append(building.machine(tmp_path / name))
    started = tmp_path / "started"
    path = building.python_that(tmp_path / "bin", f"[ -e {started} ] && exit 3; echo $$ >{started}; exec sleep 300")
    with asking(*roots[0], PATH=path) as first:
        until(lambda: started.exists() and started.read_bytes().endswith(b"\n"))
        with asking(*roots[1], PATH=path) as second:
            assert "exit code 3" in second.last()["failed"]["message"]
        assert place(roots[0][0]).digest == place(roots[1][0]).digest  # or nothing was shown
        assert is_alive(int(started.read_text(encoding="ascii")))
        os.kill(until(lambda: builder(roots[0][0])), signal.SIGKILL)
        first.last()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_train_environment_is_real(tmp_path: Path) -> None:
    """The environment that ships installs, imports together, and is found again."""
    root = tmp_path / "root"
    (root / "environments").mkdir(parents=True)
    (root / "environments" / "no-uv.json").write_text(json.dumps({"at": time.time()}), encoding="utf-8")
    for _ in range(2):
        with asking(root, environments.LOCKS) as asked:
            answer = asked.last()
        assert answer.get("ready") is True, answer
    known = place(root).ready()
    assert known["versions"]["torch"].startswith("2.13.0")
    assert known["versions"]["transformers"] == "5.23.0"
    assert place(root).hub.is_file()

"""A shared run that its user leaves, stops, or divides anew, and a laptop that dies: each row stays, and stays one."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from jobs import durable, rows, rundir
from orchestrator import cli, errors, machines, runs
from tests.journeys import sharers
from tests.journeys.sharers import gpu, shared, started, with_wait
from tests.rig import Sshd
from tests.waiting import until

Box = Callable[..., Sshd]


@pytest.fixture
def boxes(box: Box) -> list[Sshd]:
    """Two machines, `a` and `b`."""
    return [box("a"), box("b")]


@pytest.fixture
def known() -> None:
    """Records of two machines that nobody asks."""
    for name in "ab":
        durable.have_folder(machines.folder(name))
        facts = {"root": "/r", "python": "python3", "worker_python": None, "key": None, "key_in_agent": False}
        record = machines.Record(
            name, "me", "127.0.0.1", 9, **facts, fingerprint="", added_at="", system="", gpu=None, gpus=0
        )
        machines.save(record)


def home(run: runs.Run) -> int:
    return rows.index(run.home.rows).good


def states(box: Sshd, run: runs.Run) -> list[str]:
    """How the shares of a run stand on a machine."""
    folders = (box.home / ".gpu" / "runs").glob(f"{run.run_id}*")
    return [rundir.Run(folder).state().state for folder in sorted(folders)]


def be_calm() -> None:
    Path("calm").touch()


def test_a_laptop_killed_again_and_again_loses_and_doubles_nothing(boxes: list[Sshd]) -> None:
    """The command is killed at seeded moments, the earliest before anything was sent; each resume goes on."""
    run = shared(["a", "b"], 80, pace_s=0.05)
    chance = random.Random(11)
    command = started("resume", run.run_id)
    for longest_s in (0.3, 0.8, 1.5, 2.5):
        with_wait(command, chance.random() * longest_s)
        command.kill()
        command.communicate()
        command = started("resume", run.run_id)
    be_calm()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    sharers.assert_whole(run, 80)
    assert sharers.disjoint(run)
    both = [*sharers.made_on(boxes[0], run), *sharers.made_on(boxes[1], run)]
    assert len(both) == 80, "no machine was lost, so no row was made twice"


@pytest.mark.slow
def test_ctrl_c_leaves_the_machines_at_work(boxes: list[Sshd]) -> None:
    """Interrupted, every machine goes on by itself; what they made meanwhile comes home with the resume."""
    run = shared(["a", "b"], 60, pace_s=0.1)
    command = started("resume", run.run_id)
    until(lambda: min(len(sharers.made_on(each, run)) for each in boxes) >= 2)
    began = time.monotonic()
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert command.returncode == 130, said
    assert "gpu resume" in said
    until(lambda: len({*sharers.made_on(boxes[0], run), *sharers.made_on(boxes[1], run)}) == 60)
    assert home(run) < 60
    listed = json.loads(gpu("runs", "--json").stdout)
    assert [(entry["run_id"], entry["state"]) for entry in listed] == [(run.run_id, "running")]
    assert gpu("resume", run.run_id).returncode == 0
    sharers.assert_whole(run, 60)


@pytest.mark.slow
def test_a_stop_ends_all_of_it_and_a_resume_goes_on(boxes: list[Sshd]) -> None:
    """`gpu stop` stops each machine's share, whoever follows it, and begins no other; a resume does what is missing."""
    run = shared(["a", "b"], 400, pace_s=0.05)
    command = started("resume", run.run_id)
    until(lambda: home(run) >= 8)
    done = gpu("stop", run.run_id)
    assert done.returncode == 0, done.stderr
    assert "is stopped" in done.stdout
    _, said = command.communicate(timeout=60)
    assert command.returncode == 10, said
    assert {*states(boxes[0], run), *states(boxes[1], run)} == {"ended"}
    made = [*sharers.made_on(boxes[0], run), *sharers.made_on(boxes[1], run)]
    assert home(run) == len(made) < 400
    be_calm()
    assert gpu("resume", run.run_id).returncode == 0
    sharers.assert_whole(run, 400)
    assert len(sharers.made_on(boxes[0], run) + sharers.made_on(boxes[1], run)) == 400


@pytest.mark.slow
def test_detached_it_goes_on_by_itself_and_comes_home_by_pulls(boxes: list[Sshd]) -> None:
    """`--detach` returns once all machines are at work; `gpu pull` brings home what there is, until it is all."""
    run = shared(["a", "b"], 400, pace_s=0.05)
    done = gpu("resume", run.run_id, "--detach")
    assert done.returncode == 0, done.stderr
    assert [states(each, run) for each in boxes] == [["running"], ["running"]]
    be_calm()
    until(lambda: [states(each, run) for each in boxes] == [["ended"], ["ended"]])
    assert gpu("pull", run.run_id).returncode == 0
    sharers.assert_whole(run, 400)


@pytest.mark.slow
def test_a_run_is_divided_among_others_and_back(boxes: list[Sshd]) -> None:
    """A run of one machine is gone on with by two, and that by one: each makes only what is missing."""
    run = shared(["a"], 90, pace_s=0.05, samples=2)
    assert gpu("resume", run.run_id, "--detach").returncode == 0
    until(lambda: len(sharers.made_on(boxes[0], run)) >= 9)
    refused = gpu("resume", run.run_id, "--on", "a", "--on", "b")
    assert refused.returncode == 2, refused.stderr
    assert "--take-over" in refused.stderr
    two = gpu("resume", run.run_id, "--on", "a", "--on", "b", "--take-over", "--detach")
    assert two.returncode == 0, two.stderr
    until(lambda: len(sharers.made_on(boxes[1], run)) >= 9)
    assert gpu("stop", run.run_id).returncode == 0
    be_calm()
    one = gpu("resume", run.run_id, "--on", "b")
    assert one.returncode == 0, one.stderr
    sharers.assert_whole(run, 90, 2)
    made = [*sharers.made_on(boxes[0], run), *sharers.made_on(boxes[1], run)]
    assert len(made) == 180, "no row was made twice"


@pytest.mark.slow
def test_a_failure_of_the_job_ends_all_shares(boxes: list[Sshd]) -> None:
    """A job that is refused, or a score that is not as expected, is the run's failure: nobody makes more of it."""
    refused = shared(["a", "b"], 40, refuse=True)
    done = gpu("resume", refused.run_id)
    assert done.returncode == 3, done.stderr
    assert "take another" in done.stderr
    assert runs.find(refused.run_id).record.state == "failed"
    run = shared(["a", "b"], 400, pace_s=0.05, expect="0..0.5", unexpected_after=10)
    stopped = gpu("resume", run.run_id)
    assert stopped.returncode == 10, stopped.stderr
    assert "not what was expected" in stopped.stderr
    assert {*states(boxes[0], run), *states(boxes[1], run)} == {"ended"}
    be_calm()
    assert gpu("resume", run.run_id).returncode == 0
    sharers.assert_whole(run, 400)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--machines", "0"), "range"),
        (("--machines", "-1"), "range"),
        (("--machines", "1000"), "range"),
        (("--machines", "2"), "nothing says what"),
        (("--machines", "2", "--on", "a"), "say one of them"),
        (("--on", "a", "--on", "a"), "said twice"),
        (("--on", "a", "--on", "b", "--gpu", "A100"), "not both"),
        (("--on", "a", "--on", "nowhere"), "no machine"),
    ],
)
def test_bad_input_is_named_and_starts_nothing(known: None, wrong: tuple[str, ...], said: str) -> None:
    """What does not go together, or has no bounds, is wrong usage, and nothing was started."""
    with pytest.raises((errors.UsageError, click.UsageError), match=said):
        cli.gpu.main(["run", "eval-gsm8k", *wrong], standalone_mode=False)
    assert not list(runs.remembered())


def test_what_has_no_examples_is_not_divided(known: None) -> None:
    """A command is refused for several machines; so is a resume by several rented ones of which nothing says what."""
    with pytest.raises(errors.UsageError, match="has none"):
        cli.gpu.main(["run", "--on", "a", "--on", "b", "--", "true"], standalone_mode=False)
    run = shared(["a", "b"], 3)
    with pytest.raises(errors.UsageError, match="runs on machines there are"):
        cli.gpu.main(["resume", run.run_id, "--machines", "2"], standalone_mode=False)


def test_fewer_examples_than_machines(boxes: list[Sshd]) -> None:
    """Where two examples are missing, two of three machines are used, which is said; where one has none, it ends."""
    run = shared(["a"], 5)
    durable.have_folder(run.home.machine("a").folder)
    durable.save_json(run.home.machine("a").examples, {"ids": [f"e{number}" for number in range(5)]})
    made = [{"key": f"t/s/e{number}#0", "error": None, "completion": ""} for number in range(3)]
    durable.replace_whole(run.home.rows, b"".join(map(rows.encode, made)))
    run.save(state="stopped")
    done = gpu("resume", run.run_id, "--on", "a", "--on", "local", "--on", "b")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 machines are used" in done.stderr
    run.reload()
    assert (run.record.state, run.record.rows_home) == ("sealed", 5)
    assert [share.record.machine for share in runs.shares(run)] == ["a", "local"]
    few = shared(["a", "b"], 1)
    assert gpu("resume", few.run_id).returncode == 0
    sharers.assert_whole(few, 1)

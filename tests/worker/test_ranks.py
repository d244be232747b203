"""Trainings in several processes: the steps of one, nothing lost when any of them dies, stops or hangs, none left."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from jobs import rundir
from tests.waiting import until
from tests.worker import schooling
from worker import lora, portions, processes, ranks, train
from worker.failures import ConfigFailure
from worker.portions import Portion

LONG: dict[str, Any] = {"steps": 8, "accumulation": 3, "lr": 0.01, "dropout": 0.1, "save_every": 2, "processes": 2}
"""Two processes that do 2 and 1 micro-batches of each step."""
ROUNDING = 1e-5
"""Of float32 sums in another order; a mean of means, or other rows, is off by percents."""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and death with the parent")


@dataclass
class Attempt:
    """An attempt in a process of its own, which leads a session as a worker does, with its log."""

    pid: int
    log: Path

    def others(self) -> list[int]:
        """The processes that it started."""
        return processes.descendants(self.pid)

    def code(self) -> int:
        """How it ended; no process of it is left then."""
        known = self.others()
        os.kill(self.pid, signal.SIGCONT)
        until(lambda: _state(self.pid) == b"Z", 60)
        until(lambda: not [pid for pid in known if processes.start_time(pid)], 10)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _state(pid: int) -> bytes:
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]


def forked(run: rundir.Run, do: Callable[[], Any]) -> Attempt:
    log = run.folder / "log.txt"
    child = os.fork()
    if child:
        return Attempt(child, log)
    try:
        os.setsid()
        sys.stdout = log.open("a", buffering=1)
        for number in (1, 2):
            os.dup2(sys.stdout.fileno(), number)
        do()
    except SystemExit as exit_:
        os._exit(exit_.code if isinstance(exit_.code, int) else 1)
    except BaseException:  # noqa: BLE001 -- the parent is told by the exit code
        traceback.print_exc(file=sys.stdout)
        os._exit(1)
    os._exit(0)


def halted(run: rundir.Run) -> Attempt:
    """An attempt whose first process halts as it begins its first micro-batch of the fourth step."""

    def attend() -> None:
        left, learn = 3 * 2 + 1, train.Training._learn_micro

        def counted(*words: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            learn(*words)

        train.Training._learn_micro = counted  # type: ignore[method-assign] -- gone with the process
        schooling.attend(run, schooling.job(**LONG))

    attempt = forked(run, attend)
    until(lambda: _state(attempt.pid) == b"T", 120)
    return attempt


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, models: Path) -> rundir.Run:
    """A training of two processes that nobody disturbs."""
    run = schooling.run_in(tmp_path_factory.mktemp("calm") / "run", models)
    schooling.attend(run, schooling.job(**LONG))
    return run


@pytest.fixture
def run(tmp_path: Path, models: Path) -> rundir.Run:
    return schooling.run_in(tmp_path / "run", models)


def same(run: rundir.Run, other: rundir.Run) -> bool:
    """Whether two trainings did bit by bit the same."""
    adapters = [schooling.files(each.folder / "adapter") for each in (run, other)]
    return schooling.essence(run) == schooling.essence(other) and adapters[0] == adapters[1]


def numbers(run: rundir.Run) -> list[tuple[float, ...]]:
    """The essence of each step, but for what it does not have."""
    return [tuple(each for each in step if each is not None) for step in schooling.essence(run)]


def close(run: rundir.Run, other: rundir.Run) -> bool:
    """Whether two trainings learned the same rows to the same end, but for rounding."""
    adapters = [load((each.folder / "adapter" / lora.WEIGHTS).read_bytes()) for each in (run, other)]
    off = max(float((adapters[0][name] - adapters[1][name]).abs().max()) for name in adapters[0])
    largest = max(float(each.abs().max()) for each in adapters[0].values())
    steps = zip(numbers(run), numbers(other), strict=True)
    return off < 1e-3 * largest and all(one == pytest.approx(two, rel=1e-3, abs=1e-6) for one, two in steps)


@pytest.mark.parametrize("settings", [{"eval_rows": 5, "eval_every": 2}])
def test_several_processes_take_the_steps_of_one(tmp_path: Path, models: Path, settings: dict[str, Any]) -> None:
    """Rows of all lengths, dropout too: each token weighs the same whoever learns it; loss, norm and tests agree."""
    runs = [schooling.run_in(tmp_path / str(count), models) for count in (1, 2)]
    for count, run in enumerate(runs, start=1):
        short = {**LONG, "steps": 4, "lr": 0.001, "processes": count, **settings}
        schooling.attend(run, schooling.job(**short))
    alone, together = map(numbers, runs)
    assert alone != together
    for one, two in zip(alone, together, strict=True):
        assert one == pytest.approx(two, rel=ROUNDING)
    assert [line["processes"] for line in schooling.steps(runs[1])] == [2] * 4
    assert close(*runs)


@pytest.mark.parametrize("victim", [pytest.param("first", marks=pytest.mark.slow), "other"])
@pytest.mark.slow
def test_killed_in_the_middle_it_ends_bit_by_bit_the_same(calm: rundir.Run, run: rundir.Run, victim: str) -> None:
    """kill -9 of any one of them ends all at once; the next attempt, of as many, ends as if nobody had been killed."""
    attempt = halted(run)
    [other] = attempt.others()
    os.kill(attempt.pid if victim == "first" else other, signal.SIGKILL)
    assert attempt.code() == -signal.SIGKILL
    if victim == "other":
        assert f"Process 1 of 2 (pid {other}) was killed by SIGKILL" in attempt.log.read_text()
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-2"]
    schooling.attend(run, schooling.job(**LONG))
    assert same(run, calm)


@pytest.mark.parametrize("going_on", [pytest.param(2, marks=pytest.mark.slow), 1])
@pytest.mark.slow
def test_a_term_saves_once_and_is_gone_on_from(
    calm: rundir.Run, run: rundir.Run, capsys: pytest.CaptureFixture[str], going_on: int
) -> None:
    """A TERM to all of them leaves one checkpoint; as many go on bit by bit, another number on the same rows."""
    attempt = halted(run)
    os.killpg(attempt.pid, signal.SIGTERM)
    assert attempt.code() == 128 + signal.SIGTERM
    assert attempt.log.read_text().count("; saved") == 1
    assert [folder.name for folder in run.checkpoints()][1:] in (["checkpoint-3.1"], ["checkpoint-3.2"])
    schooling.attend(run, schooling.job(**{**LONG, "processes": going_on}))
    assert schooling.steps(run)[-1]["processes"] == going_on
    assert ("saved by 2 processes, and 1 go on" in capsys.readouterr().out) is (going_on == 1)
    assert same(run, calm) is (going_on == 2)
    assert close(run, calm)


@pytest.mark.slow
def test_one_that_hangs_is_not_waited_for_without_end(run: rundir.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not come to a meeting in time ends the attempt, with words of what was waited for."""
    monkeypatch.setattr(ranks, "WAIT_S", 2.0)
    attempt = halted(run)
    os.kill(attempt.others()[0], signal.SIGSTOP)
    assert attempt.code() == 1
    assert "Timed out" in attempt.log.read_text()


def test_a_traceback_of_any_process_is_in_the_log(run: rundir.Run) -> None:
    """One that fails ends the others with its own exit code, and its traceback stands before the words about it."""

    def wait() -> None:
        with ranks.gathered(run.attempt(1), {"story": "train", "params": {}}, 2):
            signal.pause()

    attempt = forked(run, wait)
    assert attempt.code() == 1
    said = attempt.log.read_text()
    assert said.index("KeyError: 'mix'") < said.index("ended with exit code 1; the others end with it")


# --- who does what ---------------------------------------------------------------------------------------------------


def test_every_micro_batch_is_done_by_one_process() -> None:
    """Whatever was done before, by whomever: the places are dealt without a gap and without overlap."""
    for size in (1, 2, 3, 5):
        for done in ([], [0], [1, 2], [0, 1, 2, 3, 4, 5, 6]):
            dealt = [place for rank in range(size) for place in portions.places(7, done, rank, size)]
            assert sorted(dealt + done) == [*range(7)]


def test_a_step_begun_by_others_is_taken_over_whole() -> None:
    """As many take over each its own; of another number the first takes all, and gradients are added up."""
    did = [Portion([0, 2], 1.0, 10, 4), Portion([1], 0.5, 7, 3)]
    held = portions.named([{"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(1)}])
    for rank in (0, 1):
        portion, gradients = portions.dealt(did, held, rank, 2)
        assert portion == did[rank]
        assert len(gradients) == rank + 1
    portion, gradients = portions.dealt(did, held, 0, 3)
    assert portion == Portion([0, 1, 2], 1.5, 17, 7)
    assert (gradients["a"].tolist(), gradients["b"].tolist()) == ([2.0, 2.0], [1.0])
    assert portions.dealt(did, held, 1, 3) == (Portion(), {})


def test_processes_that_would_do_nothing_are_refused(run: rundir.Run) -> None:
    """More processes than a step has micro-batches cost money for nothing: refused, with what to type."""
    with pytest.raises(ConfigFailure, match="a step has 3 micro-batches"):
        schooling.attend(run, schooling.job(**{**LONG, "processes": 4}))


@pytest.mark.parametrize(("gpus", "expected"), [(0, 1), (1, 1), (2, 2), (8, 3)])
def test_as_many_processes_as_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, expected: int) -> None:
    """`auto` is one process for each GPU that the run holds, as far as a step has micro-batches; else one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    params = {"processes": "auto", "accumulation": 3}
    assert ranks.count(params, "cuda" if gpus else "cpu") == expected
    assert ranks.count(params, "cuda:1") == 1


def _adding(rank: int, folder: Path) -> None:
    """One of two processes: the first weight has a gradient in both, the second in one, the third in none."""
    together = ranks.Ranks(rank, 2, folder, 60.0)
    together.join(torch.device("cpu"))
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for each in weights[: 2 - rank]:
        each.grad = torch.full((2,), 1.0 + rank)
    together.add_up(weights)
    assert [None if each.grad is None else each.grad.tolist() for each in weights] == [[3.0, 3.0], [1.0, 1.0], None]
    assert together.led(lambda: f"from {rank}") == "from 0"
    assert together.collect(rank) == ([0, 1] if rank == 0 else [])


def test_a_gradient_that_only_one_process_has_is_everybodys(run: rundir.Run) -> None:
    """Sums are the same in both; a weight that nothing reached anywhere keeps no gradient, so its optimizer rests."""
    attempts = [forked(run, lambda rank=rank: _adding(rank, run.folder)) for rank in (0, 1)]
    assert [attempt.code() for attempt in attempts] == [0, 0], attempts[0].log.read_text()

"""A training killed at its every kind of moment: nothing half written is believed, and it ends as if left alone."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, rundir
from tests.worker import schooling
from worker import checkpoints, lora, train

SAVE_EVERY = 3
EFFECTS = (
    (durable, "write_all"),
    (durable, "sync"),
    (durable, "sync_folder"),
    (checkpoints.shutil, "rmtree"),
    (Path, "rename"),
    (train.Training, "_batch"),
    (lora, "update"),
)
"""Before any of these, and after it, a process may die."""


def job(steps: int) -> dict[str, Any]:
    return schooling.job(steps=steps, accumulation=2, lr=0.01, dropout=0.1, save_every=SAVE_EVERY)


def armed(moment: int, after: bool) -> None:
    """Have this process kill itself at its n-th effect, counted from when training begins."""
    left = moment

    def deadly(real: Any) -> Any:
        def effect(*words: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = real(*words, **named)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return effect

    for owner, name in EFFECTS:
        setattr(owner, name, deadly(getattr(owner, name)))


def attempt(run: rundir.Run, document: dict[str, Any], moment: int | None, after: bool = False) -> bool:
    """One attempt in a process of its own, which may be killed; whether it came to its end."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 -- gone with the process
            begin = train.Training.begin
            if moment is not None:
                train.Training.begin = lambda training: (armed(moment, after), begin(training))[1]  # type: ignore[method-assign,assignment]
            schooling.attend(run, document)
        except BaseException:  # noqa: BLE001 -- the parent is told by the exit code
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed"
    return not os.WIFSIGNALED(status)


def storm(folder: Path, models: Path, kills: int, seed: int) -> None:
    """Kill trainings so often in all at random moments; each of them must end as one that nobody killed."""
    chance, document = random.Random(seed), job(steps=9)
    calm, spent = schooling.run_in(folder / "calm", models), 0
    schooling.attend(calm, document)  # here, so that no child has to import anything
    while spent < kills:
        stormy = schooling.run_in(folder / f"stormy-{spent}", models)
        spent += hit(stormy, document, chance, kills - spent)
        assert schooling.essence(stormy) == schooling.essence(calm)
        assert schooling.files(stormy.folder / "adapter") == schooling.files(calm.folder / "adapter")
        assert [path.name for path in stormy.folder.iterdir() if path.name.startswith((".", "checkpoint"))] == []


def hit(run: rundir.Run, document: dict[str, Any], chance: random.Random, most: int) -> int:
    """Kill one training at most so often, looking at what is there each time, and see it to its end; the kills."""
    last = 0
    for killed in range(most):
        if attempt(run, document, chance.randrange(1, 50), chance.random() < 0.5):
            return killed
        whole = [path.name for path in run.checkpoints() if rundir.damage(path) is None]
        assert whole == [path.name for path in run.checkpoints()], "one that can be seen is not whole"
        if not (run.folder / "adapter" / rundir.MANIFEST).is_file():
            reached = max((line["step"] for line in schooling.steps(run)), default=0)
            saved = max((rundir.checkpoint_number(name) or (0, 0) for name in whole), default=(0, 0))[0]
            assert saved >= max(last, (reached // SAVE_EVERY - 1) * SAVE_EVERY), "more than one interval is lost"
            last = saved
    assert attempt(run, document, None)
    return most


def test_a_training_killed_a_few_times_ends_the_same(tmp_path: Path, models: Path) -> None:
    """kill -9 at 4 seeded moments, between and inside writes: at most one interval is done again, nothing differs."""
    storm(tmp_path, models, kills=4, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [*range(2, 22)])
def test_a_training_killed_two_hundred_times_ends_the_same(tmp_path: Path, models: Path, seed: int) -> None:
    """Ten kills with each of 20 seeds, 200 in all: never a bad file, never another end."""
    storm(tmp_path, models, kills=10, seed=seed)

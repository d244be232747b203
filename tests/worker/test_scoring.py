"""Scoring beside the engine: every row once, in the order they are finished; bounded; errors are heard; it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs import rows
from tests.waiting import until
from tests.worker import evaluating
from worker import scoring
from worker.companion import Companion
from worker.failures import EngineDied
from worker.generators import Prompt, Sampling
from worker.generators.hf import HfGenerator
from worker.scoring import ROOM, Scoring, at_once
from worker.tasks import Verdict, gsm8k


def row_of(number: int) -> rows.Row:
    return {"key": str(number), "error": None}


class Held:
    """Makes rows, but for those that are held; tells how many are being made."""

    def __init__(self, *held: int) -> None:
        self.gates = {number: threading.Event() for number in held}
        self.begun: list[int] = []

    def make(self, number: int) -> rows.Row:
        """A row, once its number is not held any more."""
        self.begun.append(number)
        if number in self.gates:
            assert self.gates[number].wait(30)
        return row_of(number)

    def let_go(self) -> None:
        """Hold none any more."""
        for gate in self.gates.values():
            gate.set()


@contextmanager
def putting(scored: Scoring, numbers: range) -> Iterator[list[int]]:
    """A thread that gives these; the list holds those that were taken. It has ended afterwards."""
    taken: list[int] = []

    def give() -> None:
        for number in numbers:
            scored.put(number)
            taken.append(number)

    thread = threading.Thread(target=give)
    thread.start()
    yield taken
    thread.join(30)
    assert not thread.is_alive()


def put_all(scored: Scoring, count: int, end: BaseException) -> None:
    """Give so many answers, then leave by an exception, as an engine does that fails or is stopped."""
    with scored:
        for number in range(count):
            scored.put(number)
        raise end


def threads_left() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "scoring"]


@pytest.mark.parametrize("threads", [1, 4])
def test_every_answer_has_its_row_once(threads: int, tmp_path: Path) -> None:
    """A thousand answers, some of which take longer, are all on the disk, each once, when the block has been left."""
    slow = threading.Event()

    def make(number: int) -> rows.Row:
        if number % 50 == 0:
            slow.wait(0.002)
        return row_of(number)

    with rows.Appender(tmp_path / "rows") as out:
        with Scoring(make, out.append, threads) as scored:
            for number in range(1000):
                scored.put(number)
        assert out.written == 1000
    found = [int(rows.decode(line)["key"]) for _, line in rows.whole_lines(tmp_path / "rows")]
    assert sorted(found) == list(range(1000))
    assert (found == sorted(found)) or threads > 1
    assert not threads_left()


def test_a_slow_answer_holds_up_no_other() -> None:
    """While one answer is being scored, those after it are scored and kept by the other threads."""
    held, kept = Held(0), []
    with Scoring(held.make, lambda row: kept.append(row["key"]), 2) as scored:
        for number in range(10):
            scored.put(number)
        until(lambda: len(kept) == 9)
        held.let_go()
    assert kept == [*map(str, range(1, 10)), "0"]


def test_only_so_many_answers_wait() -> None:
    """The engine is held up once ROOM answers are not scored yet, and goes on as soon as one is."""
    held, kept = Held(0, 1), []
    with Scoring(held.make, kept.append) as scored, putting(scored, range(ROOM + 10)) as taken:
        until(lambda: len(taken) == ROOM)
        assert kept == []
        held.gates[0].set()
        until(lambda: len(taken) == ROOM + 1)
        assert len(kept) == 1
        held.let_go()
    assert len(kept) == ROOM + 10


@pytest.mark.parametrize("where", ["make", "keep"])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_goes_wrong_is_raised_and_what_waits_is_dropped(where: str, threads: int) -> None:
    """An error in a rule or in saving is raised to who gives the next answers, however many; the rest is dropped."""
    kept: list[str] = []

    def make(number: int) -> rows.Row:
        if where == "make" and number == 5:
            raise OSError(28, "No space left on device")
        return row_of(number)

    def keep(row: rows.Row) -> None:
        if where == "keep" and row["key"] == "5":
            raise OSError(28, "No space left on device")
        kept.append(row["key"])

    with pytest.raises(OSError, match="No space"):
        put_all(Scoring(make, keep, threads), 10 * ROOM, AssertionError("nobody heard of it"))
    assert "5" not in kept
    assert len(kept) == 5 if threads == 1 else len(kept) < 10 * ROOM
    assert not threads_left()


def test_what_goes_wrong_with_the_last_answer_is_raised_at_the_end() -> None:
    """No answer follows that could hear of the error: leaving the block raises it."""

    def keep(_: rows.Row) -> None:
        raise ValueError("last")

    with pytest.raises(ValueError, match="last"), Scoring(row_of, keep) as scored:
        scored.put(0)


def test_a_failed_engine_leaves_the_rows_of_what_it_had_finished() -> None:
    """Where the engine fails, what it finished before is scored and kept all the same, and its failure is raised."""
    held, kept = Held(0), []
    threading.Timer(0.1, held.let_go).start()
    with pytest.raises(EngineDied):
        put_all(Scoring(held.make, kept.append), 20, EngineDied("the server is gone"))
    assert len(kept) == 20


def test_a_stop_waits_for_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop drops what waits, does not wait for a rule without end, and keeps no row that comes of it later."""
    monkeypatch.setattr(scoring, "LEAVE_S", 0.05)
    held, kept = Held(0), []
    scored = Scoring(held.make, kept.append)
    scored.put(0)
    until(lambda: held.begun)
    with pytest.raises(SystemExit):
        put_all(scored, 20, SystemExit(143))
    assert (kept, held.begun) == ([], [0])
    held.let_go()
    until(lambda: not threads_left())
    assert (kept, held.begun) == ([], [0])


def test_only_tasks_that_run_programs_are_scored_by_several_threads() -> None:
    """Python's own rules take turns anyway; programs that a model wrote run side by side, a few at most."""
    assert at_once("gsm8k") == at_once("math") == 1
    assert 1 <= at_once("humaneval") <= 4


def test_a_companion_is_started_again_by_another_thread() -> None:
    """A child dies with the thread that started it: after the end of that thread, a question starts the next child."""
    companion = Companion("grade", {"module": "prompts"})
    question = ["word", {"keywords": {"all": ["word"]}}]
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(companion.ask(question, 60.0)))
    thread.start()
    thread.join(60)
    assert not companion.is_there
    assert [companion.ask(question, 60.0)] == found
    companion.end()


def test_the_engine_goes_on_while_a_rule_takes_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an evaluation nothing is scored before the engine has made every text; all rows are there all the same."""
    has_ended, generate, score = threading.Event(), HfGenerator.generate, gsm8k.score

    def to_the_end(self: HfGenerator, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Any]:
        yield from generate(self, prompts, sampling)
        has_ended.set()

    def after_it(completion: str, target: str) -> Verdict:
        assert has_ended.wait(30), "the engine waits for the rule"
        return score(completion, target)

    monkeypatch.setattr(HfGenerator, "generate", to_the_end)
    monkeypatch.setattr(gsm8k, "score", after_it)
    questions = evaluating.save_questions(tmp_path / "questions.jsonl", 12)
    run = evaluating.done_here(evaluating.make(evaluating.save_model(tmp_path / "tiny"), questions))
    assert sum(row["error"] is None for row in evaluating.made(run).values()) == 12


def test_a_rule_that_fails_fails_the_run_and_keeps_the_rows_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bug in a rule ends the evaluation with its own words; rows that were scored before it are on the disk."""
    score, count = gsm8k.score, iter(range(100))

    def broken(completion: str, target: str) -> Verdict:
        if next(count) == 5:
            raise KeyError("a bug")
        return score(completion, target)

    monkeypatch.setattr(gsm8k, "score", broken)
    questions = evaluating.save_questions(tmp_path / "questions.jsonl", 12)
    run = evaluating.make(evaluating.save_model(tmp_path / "tiny"), questions)
    with pytest.raises(KeyError, match="a bug"):
        evaluating.done_here(run)
    assert len(evaluating.made(run)) == 5

"""Every engine keeps the same promises: answers once and as they finish, alike in any batch, errors of their own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.runs import Run
from tests.worker import evaluating
from tests.worker.playing_openai import MODEL, playing
from tests.worker.tiny_models import model, wrapped
from worker.endpoint import Endpoint
from worker.generators import Prompt, Query, Sampling
from worker.generators.hf import HfGenerator
from worker.generators.likelihood import HfWeigher
from worker.generators.openai import OpenAiGenerator, Prices

GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=12)
BAD = 250
"""A token that the model makes no numbers of; the server refuses it by the same name."""
COUNT = 60
RUNS = [
    "hf",
    "openai",
    pytest.param("vllm", marks=pytest.mark.skipif(not evaluating.PYTHON_OF_VLLM, reason="GPU_VLLM_PYTHON is not set")),
]


@dataclass(frozen=True)
class Engine:
    """How an engine is asked, with so many at once, and how a question of these tokens is put to it."""

    ask: Callable[[Iterable[Any], int], Iterator[tuple[Any, Any]]]
    question: Callable[[str, tuple[int, ...]], Any]

    def questions(self) -> list[Any]:
        """Some of different lengths, each with a key of its own."""
        dice = random.Random(7)
        lengths = [dice.randrange(3, 40) for _ in range(COUNT)]
        return [
            self.question(f"k{number}", tuple(dice.randrange(5, BAD) for _ in range(length)))
            for number, length in enumerate(lengths)
        ]

    def answers(self, asked: Iterable[Any], at_once: int) -> dict[str, Any]:
        """The answer of each question by its key; each comes once."""
        pairs = list(self.ask(asked, at_once))
        found = {question.key: answer for question, answer in pairs}
        assert len(found) == len(pairs)
        return found


@contextlib.contextmanager
def _server() -> Iterator[Engine]:
    with playing(refuses=f"token {BAD}.") as (url, _):

        def ask(asked: Iterable[Prompt], at_once: int) -> Iterator[tuple[Prompt, Any]]:
            engine = OpenAiGenerator(Endpoint(url, "", 30.0), MODEL, at_once, Prices(None, None))
            with contextlib.closing(engine.generate(asked, GREEDY)) as made:
                yield from made
            engine.end()

        yield Engine(ask, lambda key, ids: Prompt(key, (), 1, {"prompt": "".join(f" token {one}." for one in ids)}))


@contextlib.contextmanager
def _transformers() -> Iterator[Engine]:
    loaded = wrapped(_with_a_hole())
    yield Engine(
        lambda asked, at_once: HfGenerator(loaded, at_once, [].append).generate(asked, GREEDY),
        lambda key, ids: Prompt(key, ids, 1),
    )


@contextlib.contextmanager
def _weighing() -> Iterator[Engine]:
    loaded = wrapped(_with_a_hole())
    yield Engine(
        lambda asked, at_once: HfWeigher(loaded, at_once, 256, [].append).weigh(asked),
        lambda key, ids: Query(key, ((ids, (7,)), (ids, (8, 9)))),
    )


def _with_a_hole() -> Any:
    made = model("llama")
    with torch.no_grad():
        made.get_input_embeddings().weight[BAD] = float("nan")
    return made


@pytest.fixture(params=[_transformers, _weighing, _server], ids=["hf", "likelihood", "openai"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Each engine in turn."""
    with request.param() as made:
        yield made


def told(answer: Any) -> Any:
    """What must be the same again; likelihoods to a millionth, since they move in their last digits with the batch."""
    return [round(each, 6) for each in answer.logliks] if hasattr(answer, "logliks") else answer


def test_every_question_is_answered_once_and_alike_in_any_batch(engine: Engine) -> None:
    """Greedily, alone or many at once, in any order, each question has one answer and always the same."""
    asked = engine.questions()
    expected = {key: told(answer) for key, answer in engine.answers(asked, 1).items()}
    assert expected.keys() == {question.key for question in asked}
    for at_once in (3, 16):
        assert {key: told(answer) for key, answer in engine.answers(asked[::-1], at_once).items()} == expected


def test_answers_leave_as_they_finish(engine: Engine) -> None:
    """The first answers are there long before the last questions have been looked at."""
    taken: list[Any] = []

    def counted() -> Iterator[Any]:
        for question in engine.questions():
            taken.append(question)
            yield question

    made = engine.ask(counted(), 2)
    question, _ = next(made)
    assert question in taken
    assert len(taken) < COUNT / 2
    assert len(list(made)) == COUNT - 1


def test_nothing_asked_is_nothing_answered(engine: Engine) -> None:
    """Without questions an engine ends at once."""
    assert engine.answers([], 4) == {}


def test_what_cannot_be_answered_is_an_error_of_its_own(engine: Engine) -> None:
    """A question that cannot be answered says why and has no text; those beside it are answered as without it."""
    good = engine.questions()[:8]
    bad = engine.question("bad", (5, 6, BAD, 7))
    found = engine.answers([*good[:4], bad, *good[4:]], 4)
    assert found["bad"].error
    assert not getattr(found["bad"], "text", "")
    assert not getattr(found["bad"], "logliks", ())
    alone = engine.answers(good, 4)
    assert all(told(found[question.key]) == told(alone[question.key]) for question in good)
    assert not any(answer.error for answer in alone.values())


@pytest.mark.parametrize("name", RUNS)
def test_greedy_runs_are_alike(name: str, tmp_path: Path) -> None:
    """Two greedy runs with other batches have the same texts, ends and token counts, row by row."""
    dataset = evaluating.save_questions(tmp_path / "questions.jsonl", 12)
    saved: Path | str = MODEL if name == "openai" else evaluating.save_model(tmp_path / "tiny")
    with contextlib.ExitStack() as stack:
        more = {"base_url": stack.enter_context(playing())[0]} if name == "openai" else {}
        runs = [evaluating.make(saved, dataset, engine=name, batch_size=size, **more) for size in (2, 8)]
        first, second = (evaluating.texts(_done(run, name)) for run in runs)
    assert len(first) == 12
    assert first == second


def _done(run: Run, name: str) -> Run:
    """The run, done: vLLM is in another Python than the tests."""
    if name != "vllm":
        return evaluating.done_here(run)
    assert evaluating.finish(run).reason == "done"
    return run

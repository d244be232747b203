"""The engine behind a server: what it sends, what it does about each failure, and what it never gives away."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, engines
from tests.worker import evaluating, machine
from tests.worker.playing_openai import MODEL, Script, playing
from worker.endpoint import Endpoint
from worker.failures import ConfigFailure, EngineDied, WorkerFailure
from worker.generators import Completion, Prompt, Sampling, openai

KEY = "sk-canary-0123456789"
SAMPLING = Sampling(0.7, 0.9, 64, stop=("Question:",))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "WAIT_S", 0.001)
    monkeypatch.setattr(openai, "WAIT_MAX_S", 0.01)


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"k{number}", (), 2**62 + number, {"messages": [{"role": "user", "content": f"question {number}"}]})
        for number in range(count)
    ]


def ask(url: str, asked: list[Prompt], timeout_s: float = 5.0, **how: Any) -> dict[str, Completion]:
    prices = openai.Prices(how.get("usd_in"), how.get("usd_out"))
    engine = openai.OpenAiGenerator(Endpoint(url, KEY, timeout_s), how.get("model", MODEL), how.get("size", 4), prices)
    try:
        return {prompt.key: completion for prompt, completion in engine.generate(asked, how.get("sampling", SAMPLING))}
    finally:
        engine.end()


def test_a_request_holds_what_was_asked_and_nothing_else() -> None:
    """Messages go as they are, with the way of drawing and a seed of 31 bits; the answer is counted and priced."""
    with playing() as (url, script):
        got = ask(url, prompts(3), usd_in=2.0, usd_out=10.0)
    assert {key: (one.finish_reason, one.tokens_in, one.tokens_out, one.error) for key, one in got.items()} == {
        f"k{number}": ("stop", 2, 5, None) for number in range(3)
    }
    assert [one.usd for one in got.values()] == [pytest.approx((2 * 2.0 + 5 * 10.0) / 1e6)] * 3
    request = next(request for request in script.requests if request["body"]["seed"] == 1)
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    assert request["body"] == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "question 1"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": 1,
        "stop": ["Question:"],
    }


def test_bare_text_goes_to_completions() -> None:
    """Without a chat template the prompt is sent as it is, to the other address."""
    with playing() as (url, script):
        got = ask(url, [Prompt("k", (), 1, {"prompt": "Question: 1 + 1?"})])
    assert script.requests[0]["path"] == "/v1/completions"
    assert script.requests[0]["body"]["prompt"] == "Question: 1 + 1?"
    assert "####" in got["k"].text


def test_no_more_are_asked_at_once_than_was_said() -> None:
    """Requests in flight reach the number that was asked for, and never more."""
    with playing(slow_s=0.02) as (url, script):
        assert len(ask(url, prompts(24), size=5)) == 24
    assert script.at_once_max == 5


@pytest.mark.parametrize("fault", [{"busy": 3}, {"broken": 3}, {"garbage": 3}, {"cuts": 3}])
def test_what_may_pass_is_asked_again(fault: dict[str, int]) -> None:
    """Too many requests, errors of the server, answers that are none and connections that break are tried again."""
    with playing(**fault) as (url, script):
        got = ask(url, prompts(6))
    assert [one.error for one in got.values()] == [None] * 6
    assert len(script.requests) == 9


def test_the_server_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that the server asks for, in seconds, is kept; a date far away is bounded."""
    waited: list[float] = []
    monkeypatch.setattr("tenacity.sleep_using_event.__call__", lambda _, seconds: waited.append(seconds))
    with playing(busy=1, retry_after="7") as (url, _):
        assert ask(url, prompts(1))["k0"].error is None
    with playing(busy=1, retry_after="Fri, 31 Dec 2100 23:59:59 GMT") as (url, _):
        assert ask(url, prompts(1))["k0"].error is None
    assert waited == [7.0, 300.0]


def test_a_slow_answer_is_given_up() -> None:
    """An answer that does not come in time is asked for again, and when none ever comes the engine says so."""
    with playing(slow_s=0.5) as (url, script), pytest.raises(EngineDied, match=r"timed out.*Rows so far are kept"):
        ask(url, prompts(1), timeout_s=0.05)
    assert len(script.requests) == openai.TRIES


def test_an_answer_that_drips_is_given_up() -> None:
    """The time limit is for a whole answer: one that comes byte by byte is given up, too."""
    with playing(drips=True) as (url, script), pytest.raises(EngineDied, match="timed out"):
        ask(url, prompts(1), timeout_s=0.1)
    assert len(script.requests) == openai.TRIES


@pytest.mark.parametrize(("fault", "said"), [("refuses", "HTTP 400: no 3 here"), ("filters", "content filter")])
def test_what_the_server_refuses_is_an_error_of_that_row(fault: str, said: str) -> None:
    """A request refused for what is in it, and an answer withheld, are errors with the reason, never answers."""
    with playing(**{fault: "3"}) as (url, script):
        got = ask(url, [*prompts(3), *prompts(4)[3:]])
    assert said in str(got["k3"].error)
    assert (got["k3"].text, got["k3"].finish_reason) == ("", "error")
    assert [got[f"k{number}"].error for number in range(3)] == [None] * 3
    assert len(script.requests) == 4


def test_one_prompt_that_breaks_the_server_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that always fails while others are answered is an error of its own row."""

    def status(self: Script, body: dict[str, Any], count: int) -> Any:
        return (500, {}, "it broke") if "question 2'" in str(body) else None

    monkeypatch.setattr(Script, "status", status)
    with playing(slow_s=0.005) as (url, _):
        got = ask(url, prompts(40), size=2)
    assert [key for key, one in got.items() if one.error] == ["k2"]
    assert "HTTP 500: it broke" in str(got["k2"].error)


def test_a_server_that_answers_nobody_ends_the_run() -> None:
    """Errors without end, and no server at all, end the engine once it has tried long enough."""
    with playing(broken=10**6) as (url, _), pytest.raises(EngineDied, match="out of order"):
        ask(url, prompts(2))
    with pytest.raises(EngineDied, match="ConnectionRefusedError"):
        ask(url, prompts(2))


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, engines.KEY_VARIABLE),
        (403, engines.KEY_VARIABLE),
        (404, "base_url"),
        (302, "redirects"),
        (308, "redirects"),
    ],
)
def test_what_every_request_would_get_ends_the_run_at_once(status: int, said: str) -> None:
    """A refused key, a model that is not there and a redirect end the run without a second try, and without the key."""
    with playing(status=status, says=f"no: {KEY}") as (url, script), pytest.raises(ConfigFailure) as failure:
        ask(url, prompts(9), size=1)
    assert len(script.requests) == 1
    assert said in failure.value.message + failure.value.hint
    assert KEY not in failure.value.message + failure.value.hint


def test_a_model_that_is_not_there_is_said() -> None:
    """The server's own words about an unknown model reach the user."""
    with playing() as (url, _), pytest.raises(ConfigFailure, match="The model other does not exist"):
        ask(url, prompts(1), model="other")


def test_the_limit_is_sent_under_its_newer_name_where_the_older_is_refused() -> None:
    """A server that takes only max_completion_tokens gets that, from its first refusal on."""
    with playing(limit_name="max_completion_tokens") as (url, script):
        got = ask(url, prompts(5), size=1)
    assert [one.error for one in got.values()] == [None] * 5
    assert len(script.requests) == 6


def test_what_is_under_way_is_broken_off_at_the_end() -> None:
    """Ended in the middle, the engine does not wait for answers that are still to come."""
    began = time.monotonic()
    with playing(slow_s=60.0) as (url, script):
        engine = openai.OpenAiGenerator(Endpoint(url, KEY, 60.0), MODEL, 4, openai.Prices(None, None))
        engine.watch = lambda: _stop_once(script)
        with pytest.raises(WorkerFailure, match="stop here"):
            list(engine.generate(prompts(8), SAMPLING))
        engine.end()
        assert len(script.requests) == 4
    assert time.monotonic() - began < 30


def _stop_once(script: Script) -> None:
    if script.at_once == 4:
        raise WorkerFailure("stop here")


@pytest.mark.slow
def test_a_run_behind_a_server_is_resumed_after_a_kill(tmp_path: Path) -> None:
    """Killed in the middle, a run asks a server only for what is missing, wherever the server is by then; its rows say
    what was sent, and its key is in no file."""
    questions = evaluating.save_questions(tmp_path / "questions.jsonl", 60)
    how = {"engine": "openai", "samples": 2, "temperature": 1, "batch_size": 2, "usd_per_million_out": 1000}
    env = {"env": {"PATH": "/usr/bin:/bin", engines.KEY_VARIABLE: KEY}}
    with playing(slow_s=0.03) as (url, script):
        run = evaluating.make(MODEL, questions, **how, base_url=url)
        evaluating.start(run, **env)
        before = _killed_in_the_middle(run, lambda: script.answered)
    assert 0 < before < 120
    there = machine.there(run)
    with playing() as (url, script):
        job = run.job()
        other = {**job, "params": {**job["params"], "base_url": url}}
        durable.save_json(there.job, other)
        durable.save_json(run.home.job, other)
        assert evaluating.finish(run, **env).reason == "done"
    rows = evaluating.made(run)
    assert (len(rows), len(script.requests)) == (120, 120 - before)
    assert all(row["error"] is None and row["usd"] == pytest.approx(0.005) for row in rows.values())
    assert len({row["completion"] for row in rows.values()}) > 60
    assert durable.load_json(there.resolved)["identity"]["engine"] == "openai"
    assert durable.load_json(there.resolved)["identity"]["model_digest"] == f"name:{MODEL}"
    assert url.encode() not in there.resolved.read_bytes()
    assert "No tokenizer of answers is here" in machine.log(run)
    for path in there.folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def _killed_in_the_middle(run: Any, answered: Callable[[], int]) -> int:
    """Kill supervisor and worker once a few rows are there; how many are."""
    from tests.waiting import until
    from worker import processes

    until(lambda: answered() >= 10)
    pids = durable.load_json(machine.there(run).attempt(1).pids)
    processes.kill([pids["supervisor"]["pid"], pids["worker"]["pid"]])
    until(lambda: machine.there(run).state().state != "running")
    return len(evaluating.made(run))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "needs either base_url"),
        ({"base_url": "http://h/v1", "server": "s {port}"}, "needs either base_url"),
        ({"base_url": "http://10.0.0.7/v1"}, "allow_http"),
        ({"base_url": "http://127.0.0.1.evil.example/v1"}, "allow_http"),
        ({"base_url": "https://user:word@host/v1"}, "no user"),
        ({"base_url": "https://host/v1?key=x"}, "no user, query"),
        ({"base_url": "ftp://host/v1"}, "must begin with https"),
        ({"base_url": "http://127.0.0.1:99999/v1"}, "no URL"),
        ({"base_url": "https://host/v1", "model": "tiny"}, "model=NAME"),
        ({"base_url": "https://host/v1", "adapter": "./a"}, "no adapter"),
        ({"base_url": "https://host/v1", "chat_template": "./t.jinja"}, "no chat template of yours"),
        ({"server": "serve --port 80"}, "must say where the port goes"),
        ({"server": "serve '{port}"}, "no list of words"),
        ({"engine": "vllm", "temperature": 3.0}, "0.01 to 2"),
        ({"engine": "vllm", "dtype": "float64"}, "no float64"),
        ({"engine": "hf", "server": "s {port}"}, "server is for engine=openai"),
    ],
)
def test_settings_that_do_not_belong_together_are_named(params: dict[str, Any], said: str) -> None:
    """What an engine cannot do with its settings is said before anything starts."""
    assert said in " ".join(engines.faults({"engine": "openai", "model": "m", **params}))


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://[::1]:1/v1", "http://127.1.2.3/v1", "https://host"])
def test_good_addresses_are_taken(url: str) -> None:
    """The machine itself may be asked in the clear, every other by TLS."""
    assert engines.faults({"engine": "openai", "model": "m", "base_url": url}) == []

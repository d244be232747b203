"""A user's own prompts: what each expectation finds, in every spelling of a tool call, and rows that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import spec
from worker import tasks
from worker.failures import BadRecord
from worker.tasks import prompts

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = {"tool_call": {"name": "weather", "arguments": SCHEMA}}
ROW = {"id": "a", "category": "c", "prompt": "P", "expect": {"exact": "yes"}}


def score(expect: dict[str, Any], reply: str) -> tasks.Verdict:
    """The verdict of a reply to a row that expects this."""
    (example,) = prompts.examples([{"prompt": "P", "expect": expect}])
    return prompts.score(reply, example.target)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ('{"name": "weather", "arguments": {"city": "Oslo"}}', 1),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', 1),
        ('Let me look.\n```json\n{"name": "weather", "parameters": {"city": "Oslo"}}\n```', 1),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]', 1),
        ('{"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}}', 1),
        ('{"tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}', 1),
        ('{"name": "other", "arguments": {}} {"name": "weather", "arguments": {"city": "Oslo"}}', 1),
        ('{"name": "weather", "arguments": {"city": 7}}', 0),
        ('{"name": "weather", "arguments": {}}', 0),
        ('{"name": "climate", "arguments": {"city": "Oslo"}}', 0),
        ('{"name": "weather", "arguments": {"city": "Oslo"}', 0),
        ("It is warm in Oslo.", 0),
    ],
)
def test_a_tool_call_in_any_form_keeps_to_its_schema_or_not(reply: str, right: int) -> None:
    """Calls are found in the forms of the common models, and are right by name and schema."""
    assert score(CALL, reply).scores["tool_call"] == right


@pytest.mark.parametrize(
    ("expect", "reply", "right"),
    [
        ({"tool_call": False}, "Hello.", 1),
        ({"tool_call": False}, '{"name": "weather", "arguments": {}}', 0),
        ({"keywords": ["Saturn", "uranus"]}, "saturn and Uranus", 1),
        ({"keywords": ["Saturn", "Uranus"]}, "Saturn", 0),
        ({"keywords": {"any": ["a1", "b1"]}}, "b1", 1),
        ({"keywords": {"any": ["a1", "b1"]}}, "c1", 0),
        ({"keywords": {"all": ["x"], "none": ["y"]}}, "x y", 0),
        ({"regex": "^[0-9]{4}$"}, "year:\n1969\n", 1),
        ({"regex": ["a", "b"]}, "a", 0),
        ({"exact": "yes"}, " yes\n", 1),
        ({"exact": ["yes", "Yes"]}, "Yes", 1),
        ({"exact": "yes"}, "yes.", 0),
        ({"exact": "yes", "keywords": ["no"]}, "yes", 0),
    ],
)
def test_every_expectation_is_kept_or_not(expect: dict[str, Any], reply: str, right: int) -> None:
    """Each kind of expectation is right and wrong where it should be; success is all of them together."""
    verdict = score(expect, reply)
    assert verdict.scores["success"] == right
    unused = set(prompts.RULES) - {"success", *expect}
    assert {verdict.scores[rule] for rule in unused} <= {None}


def test_a_pattern_that_never_ends_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catastrophic pattern is ended at the limit; the row has an error and no score, and the next one is scored."""
    monkeypatch.setattr(prompts, "TIMEOUT_S", 1.0)
    verdict = score({"regex": r"^(a+)+$"}, "a" * 60 + "!")
    assert verdict.scores["success"] is None
    assert "more than 1 s" in str(verdict.error)
    monkeypatch.undo()
    assert score({"regex": r"^a+$"}, "aaa").scores["success"] == 1.0


def test_hostile_replies_are_judged_in_time() -> None:
    """Replies of nothing but brackets, and schemas that point elsewhere, neither hang nor fetch."""
    assert score(CALL, '{"a":' * 20_000).scores["tool_call"] in (0.0, None)
    assert score(CALL, "{" * 50_000).scores["tool_call"] == 0.0


def test_without_jsonschema_the_rest_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where jsonschema is not installed, tool calls and success have no score, and the other rules have theirs."""
    (example,) = prompts.examples([{"prompt": "P", "expect": {**CALL, "keywords": ["Oslo"]}}])
    monkeypatch.setitem(tasks.NEEDS, "prompts", {"no_such_module": "jsonschema"})
    scores = prompts.score("Oslo", example.target).scores
    assert (scores["tool_call"], scores["success"], scores["keywords"]) == (None, None, 1.0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt": None}, "either 'prompt' or 'messages'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "either 'prompt' or 'messages'"),
        ({"prompt": None, "messages": []}, "'messages'"),
        ({"prompt": None, "messages": [{"role": "robot", "content": "x"}]}, "message 1 in 'messages'"),
        ({"expect": None}, "'expect'"),
        ({"expect": {}}, "'expect'"),
        ({"expect": {"keyword": ["x"]}}, "did you mean keywords"),
        ({"expect": {"regex": "("}}, "'expect.regex' is no pattern"),
        ({"expect": {"keywords": []}}, "'expect.keywords'"),
        ({"expect": {"keywords": {"some": ["x"]}}}, "'expect.keywords'"),
        ({"expect": {"tool_call": "weather"}}, "'expect.tool_call'"),
        ({"expect": {"tool_call": {"name": "x", "arguments": {"type": "objct"}}}}, "is no JSON Schema"),
        ({"expect": {"tool_call": {"name": "x", "arguments": {"$schema": "http://a.b/c"}}}}, "is not known"),
        ({"expect": {"tool_call": {"name": "x", "arguments": "object"}}}, "must be a JSON Schema"),
        ({"tools": []}, "unknown field 'tools'"),
        ({"id": "a b"}, "'a b'"),
    ],
)
def test_a_bad_row_is_named(changed: dict[str, object], words: str) -> None:
    """A row that cannot be used is refused before the run, by its number and field."""
    row = {name: value for name, value in {**ROW, **changed}.items() if value is not None}
    with pytest.raises(BadRecord) as failed:
        prompts.examples([{**ROW, "id": "first"}, row])
    assert "row 2" in failed.value.message
    assert words in failed.value.message


def test_messages_are_sent_as_they_are() -> None:
    """A row's own messages are the chat; the category is the subject; the target is canonical JSON."""
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    (example,) = prompts.examples([{"category": "c", "messages": chat, "expect": {"exact": "x"}}])
    assert prompts.messages(example, []) == chat
    assert prompts.messages(example, [], instruction="I")[-1]["content"] == "U\nI"
    assert (example.problem, example.subject) == ("U", "c")
    assert example.target == spec.canonical({"exact": ["x"]}).decode()


def test_the_built_in_suite_is_sound() -> None:
    """Every row of the sample suite is an example."""
    records = [json.loads(line) for line in Path(prompts.SAMPLE).read_text().splitlines()]
    assert len(prompts.examples(records)) == len(records)

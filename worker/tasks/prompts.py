"""A prompt suite as data: each row says what it expects of the reply, by tool call, keywords, pattern or exact text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import spec
from worker import grading
from worker.failures import BadRecord
from worker.tasks import GENERATES, Example, Verdict, lacking
from worker.tasks.records import Ids, Record, read

NAME = "prompts"
VERSION = "1"
KIND = GENERATES
DATASET = SAMPLE = str(Path(__file__).with_name("prompts.jsonl"))
STOP: tuple[str, ...] = ()
SHOTS_SPLIT = "train"
COLUMNS: tuple[str, ...] = ()
OPTIONS: tuple[str, ...] = ()
RULES = ("success", "tool_call", "keywords", "regex", "exact")
"""`success` is all the others that the row expects."""
HEADLINE = "success"

TIMEOUT_S = 10.0
"""For one reply: a pattern can take for ever on some texts."""
_CHARACTERS_MAX = 200_000
_ROLES = ("system", "user", "assistant", "tool")
_KEYWORDS = ("all", "any", "none")
_FIELDS = ("id", "category", "prompt", "messages", "expect")
_ANSWER_CHARACTERS = 300
_HOLDS = "A row holds 'prompt' or 'messages', 'expect', and perhaps 'id' and 'category'."
_EXAMPLE = '{"tool_call": {"name": "…", "arguments": {JSON Schema}}, "keywords": ["…"], "regex": "…", "exact": "…"}'


def examples(records: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Every record as an Example, in order; the target is what it expects, as canonical JSON.

    Raises BadRecord naming the row and what is wrong: a pattern or a schema that is none, too.
    """
    return read(records, _HOLDS, _example)


def messages(example: Example, _shots: Sequence[Example], *, instruction: str = "") -> list[dict[str, str]]:
    """The row's own messages, or its prompt alone; the instruction after the last of them."""
    chat = [dict(message) for message in example.chat] or [{"role": "user", "content": example.problem}]
    if instruction:
        chat[-1]["content"] += f"\n{instruction}"
    return chat


def score(completion: str, target: str) -> Verdict:
    """Whether the reply is what each rule expects; None for rules that the row does not use.

    Nothing is scored, with an error, where a pattern does not come to an end; no tool call, and so no success, where
    jsonschema is not installed.
    """
    expected = _expected(target)
    answers: dict[str, str | None] = dict.fromkeys(RULES)
    scores: dict[str, float | None] = dict.fromkeys(RULES)
    unknown = bool(expected.get("tool_call")) and bool(lacking(NAME))
    if unknown:
        del expected["tool_call"]
    try:
        found, right = grading.grade("prompts", [completion[:_CHARACTERS_MAX], expected], TIMEOUT_S)
    except grading.Unfinished as why:
        return Verdict(answers, scores, error=f"not scored: {why}")
    return Verdict({**answers, **found}, {**scores, **right, **({"success": None} if unknown else {})})


def prepare() -> None:
    """In the child that may be killed: import what `judge` needs."""
    if not lacking(NAME):
        judge(["{}", {"tool_call": [{"name": "x", "arguments": {"type": "object"}}]}])


def judge(question: list[Any]) -> tuple[dict[str, str | None], dict[str, float]]:
    """In that child: what each rule that the row uses finds, and whether that is what is expected."""
    text, expected = question
    found = {rule: _JUDGES[rule](text, wanted) for rule, wanted in expected.items()}
    scores = {rule: float(right) for rule, (_, right) in found.items()}
    answers = {rule: None if answer is None else answer[:_ANSWER_CHARACTERS] for rule, (answer, _) in found.items()}
    failed = [rule for rule, value in scores.items() if not value]
    answers["success"] = f"not: {', '.join(failed)}" if failed else "success"
    return answers, {"success": float(not failed), **scores}


def tool_calls(text: str) -> Iterator[tuple[str, Any]]:
    """Every tool call in a text, as name and arguments: a JSON object with a name and arguments, wherever it stands.

    The forms of Hermes and Qwen (`<tool_call>{…}</tool_call>`), Llama (`parameters`), Mistral (a list) and OpenAI
    (`function`, arguments as a JSON text) are all such objects.
    """
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, at = None, at + 1
        call = value.get("function", value) if isinstance(value, dict) else None
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            yield call["name"], _arguments(call.get("arguments", call.get("parameters")))
        elif isinstance(value, dict):
            for inner in value.get("tool_calls", ()) if isinstance(value.get("tool_calls"), list) else ():
                yield from tool_calls(json.dumps(inner))
        at = text.find("{", at)


def _arguments(given: Any) -> Any:
    if not isinstance(given, str):
        return {} if given is None else given
    try:
        return json.loads(given)
    except ValueError:
        return given


def _judge_tool_call(text: str, wanted: list[dict[str, Any]]) -> tuple[str | None, bool]:
    """Whether every call that is wanted is made; none wanted: whether none is made."""
    made = list(tool_calls(text))
    shown = spec.canonical([[name, arguments] for name, arguments in made]).decode() if made else None
    if not wanted:
        return shown, not made
    return shown, all(
        any(name == each["name"] and _keeps_to(each.get("arguments", True), arguments) for name, arguments in made)
        for each in wanted
    )


def _keeps_to(schema: Any, value: Any) -> bool:
    """Whether a value keeps to a schema; no schema elsewhere is ever fetched."""
    import jsonschema
    import referencing

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return bool(kind(schema, registry=referencing.Registry()).is_valid(value))


def _judge_keywords(text: str, wanted: dict[str, list[str]]) -> tuple[str | None, bool]:
    """Whether all, any and none of these stand in the text, whatever their case."""
    plain = text.casefold()
    there = {word for words in wanted.values() for word in words if word.casefold() in plain}
    right = (
        there.issuperset(wanted.get("all", ()))
        and there.isdisjoint(wanted.get("none", ()))
        and ("any" not in wanted or not there.isdisjoint(wanted["any"]))
    )
    return ", ".join(sorted(there)) or None, right


def _judge_regex(text: str, wanted: list[str]) -> tuple[str | None, bool]:
    """Whether every pattern is found in the text; `^` and `$` match at lines."""
    found = [re.search(pattern, text, re.MULTILINE) for pattern in wanted]
    first = next((match[0] for match in found if match), None)
    return first, all(found)


def _judge_exact(text: str, wanted: list[str]) -> tuple[str | None, bool]:
    """Whether the text is one of these, but for spaces around it."""
    return text.strip() or None, text.strip() in [each.strip() for each in wanted]


_JUDGES: dict[str, Callable[[str, Any], tuple[str | None, bool]]] = {
    "tool_call": _judge_tool_call,
    "keywords": _judge_keywords,
    "regex": _judge_regex,
    "exact": _judge_exact,
}


def _example(record: Record, ids: Ids) -> Example:
    for name in record.fields:
        if name not in _FIELDS:
            raise BadRecord(f"row {record.row}: unknown field {name!r}: {spec.nearest(str(name), _FIELDS)}", _HOLDS)
    chat = _chat(record)
    problem = chat[-1]["content"] if chat else record.text("prompt")
    return Example(
        id=ids.take(record, [dict(message) for message in chat] or problem),
        problem=problem,
        target=spec.canonical(_expectation(record)).decode(),
        subject=record.label("category"),
        chat=chat,
    )


def _chat(record: Record) -> tuple[Mapping[str, str], ...]:
    """The messages of a row; empty where it has a prompt."""
    given, prompt = record.fields.get("messages"), record.fields.get("prompt")
    if (given is None) is (prompt is None):
        raise BadRecord(f"row {record.row}: it must have either 'prompt' or 'messages'", _HOLDS)
    if given is None:
        return ()
    if not isinstance(given, list) or not given:
        raise BadRecord(f"row {record.row}: the field 'messages' must be a list of messages", _HOLDS)
    for number, message in enumerate(given, start=1):
        right = isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
        if not right or set(message) != {"role", "content"}:
            raise BadRecord(
                f"row {record.row}: message {number} in 'messages' must be {{role, content}}, both texts",
                f"The roles are {', '.join(_ROLES)}.",
            )
    return tuple(given)


def _expectation(record: Record) -> dict[str, Any]:
    """What a row expects, in one form; BadRecord for what cannot be kept to by any reply."""
    given = record.get("expect")
    if not isinstance(given, dict) or not given:
        raise _bad(record, "expect", "must say what is expected")
    for name in given:
        if name not in _JUDGES:
            raise _bad(record, f"expect.{name}", f"is not known: {spec.nearest(str(name), _JUDGES)}")
    readers = {"tool_call": _wanted_calls, "keywords": _wanted_keywords, "regex": _wanted_patterns, "exact": _texts}
    return {name: readers[name](record, value) for name, value in given.items() if value is not None}


def _wanted_calls(record: Record, given: Any) -> list[dict[str, Any]]:
    calls = [] if given is False else given if isinstance(given, list) else [given]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or set(call) - {"name", "arguments"}:
            raise _bad(record, "expect.tool_call", "must be {name, arguments}, a list of such, or false for none")
        if "arguments" in call:
            _check_schema(record, call["arguments"])
    return calls


def _check_schema(record: Record, schema: Any) -> None:
    """Raise BadRecord for what is no JSON Schema."""
    field = "expect.tool_call.arguments"
    if not isinstance(schema, (dict, bool)):
        raise _bad(record, field, "must be a JSON Schema, an object")
    import jsonschema

    named = schema.get("$schema") if isinstance(schema, dict) else None
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    if named is not None and kind.META_SCHEMA.get("$schema", "").rstrip("#") != str(named).rstrip("#"):
        raise _bad(record, field, f"names a kind of schema that is not known: {named!r}")
    try:
        kind.check_schema(schema)  # type: ignore[arg-type]  # true and false are schemas
    except jsonschema.SchemaError as error:
        raise _bad(record, field, f"is no JSON Schema: {error.message} (at {error.json_path})") from None


def _wanted_keywords(record: Record, given: Any) -> dict[str, list[str]]:
    asked = {"all": given} if isinstance(given, (list, str)) else given
    if not isinstance(asked, dict) or not asked or set(asked) - set(_KEYWORDS):
        raise _bad(record, "expect.keywords", "must be a list of words, or an object of 'all', 'any', 'none'")
    return {name: _texts(record, words, "expect.keywords") for name, words in asked.items()}


def _wanted_patterns(record: Record, given: Any) -> list[str]:
    patterns = _texts(record, given, "expect.regex")
    for pattern in patterns:
        try:
            re.compile(pattern, re.MULTILINE)
        except (re.error, RecursionError, OverflowError) as error:
            raise _bad(record, "expect.regex", f"is no pattern: {pattern!r}: {error}") from None
    return patterns


def _texts(record: Record, given: Any, field: str = "expect.exact") -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise _bad(record, field, "must be a text or a list of texts, none of them empty")
    return texts


def _bad(record: Record, field: str, words: str) -> BadRecord:
    return BadRecord(f"row {record.row}: the field {field!r} {words}", f"For example: {_EXAMPLE}")


def _expected(target: str) -> dict[str, Any]:
    try:
        expected = json.loads(target)
    except ValueError:
        expected = None
    if not isinstance(expected, dict) or not set(expected) <= set(_JUDGES):
        raise BadRecord(f"the target {target[:60]!r} does not say what is expected", f"For example: {_EXAMPLE}")
    return expected

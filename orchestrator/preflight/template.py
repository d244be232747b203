"""Finds what is wrong with a model's chat template by rendering a conversation with it, before money is spent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.preflight import model as models
from orchestrator.preflight.findings import Finding, error, quoted
from orchestrator.preflight.model import Model
from orchestrator.preflight.shelf import json_object

NO_TEMPLATE_HINT = "--set chat_template=none for a base model, or --set chat_template=FILE.jinja"
ANOTHER_HINT = "Use another template: --set chat_template=FILE.jinja, or none for a base model."
DEADLINE_S = 15.0
"""For all renderings together: they take milliseconds, a process on a busy laptop starts within two seconds."""
_TEXT_MAX_BYTES = 1_000_000
_PROBE = "REPLY"
"""Stands for an assistant's reply where the template is asked how it writes one."""
_QUESTION = "Natalia sold clips to 48 friends in April, and then half as many in May. How many in all?"
_SYSTEM = "Answer briefly."
_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "HOME", "LANG", "SYSTEMROOT")
"""All that the rendering process sees of this environment: no token is in it, whatever a template gets at."""
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Rendered:
    """What became of one chat: its text, or, in words, what the template raised."""

    text: str | None
    reason: str = ""


@dataclass(frozen=True)
class _Views:
    """One conversation rendered in the ways that show whether a template is right."""

    asked: Rendered
    """As the worker sends it: ending where a reply begins."""
    closed: Rendered
    """The same without a generation prompt."""
    answered: Rendered
    """The same with a reply."""
    with_system: Rendered


def check(model: Model, params: Mapping[str, Any]) -> list[Finding]:
    """What is wrong or doubtful with the template that a job would use, as far as text shows it; errors first."""
    given = params["chat_template"]
    if given == "none":
        return []
    text = _own(model) if given == "auto" else _given(given)
    if text is None:
        unread = {models.TEMPLATE, models.TOKENIZER_CONFIG} & model.unread.keys()
        return [] if unread else [_no_template(model)]
    variables = special_tokens(model)
    messages = _conversation(bool(params.get("shots")))
    reply = {"role": "assistant", "content": _PROBE}
    chats = [
        {"messages": messages, "add_generation_prompt": True},
        {"messages": messages, "add_generation_prompt": False},
        {"messages": [*messages, reply], "add_generation_prompt": False},
        {"messages": [{"role": "system", "content": _SYSTEM}, *messages], "add_generation_prompt": True},
    ]
    views = _Views(*render(text, chats, variables))
    if views.asked.text is None:
        return [_refusal(views.asked.reason, messages, model)]
    found = [
        *_check_bos(views.asked.text, variables, model),
        *_check_end(views, _end_texts(model, variables)),
        *_check_reply(views.asked.text, views),
        *_check_system(views),
    ]
    return sorted(found, key=lambda finding: finding.level != "error")


def render(template: str, chats: Sequence[dict[str, Any]], variables: Mapping[str, str]) -> list[Rendered]:
    """Each chat's text, rendered by a process of its own that is killed when it takes too long."""
    child = subprocess.Popen(
        [sys.executable, "-B", "-P", "-X", "utf8", str(Path(__file__).with_name("rendering.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
    )
    asked = json.dumps({"template": template, "chats": list(chats), "variables": dict(variables)}).encode()
    reason = "it was stopped for the memory or time it took"
    try:
        output, _ = child.communicate(asked, timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        reason = f"it was not done after {DEADLINE_S:.0f} s"
        child.kill()
        output, _ = child.communicate()
    finally:
        child.kill()  # also when Ctrl-C ends the wait
        child.wait()
    answers = [_answer(line) for line in output.splitlines()[: len(chats)]]
    return answers + [Rendered(None, reason)] * (len(chats) - len(answers))


def special_tokens(model: Model) -> dict[str, str]:
    """The texts of the special tokens that templates may name, by their names; those that are none are left out."""
    found = {}
    for name in _SPECIAL:
        token = next((said[name] for said in (model.tokenizer, model.special_tokens) if said.get(name)), None)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _own(model: Model) -> str | None:
    """The tokenizer's own template: the file's before that of tokenizer_config.json, where the default one counts."""
    if model.template is not None:
        return model.template
    said = model.tokenizer.get("chat_template")
    if isinstance(said, list):
        named = {entry.get("name"): entry.get("template") for entry in said if isinstance(entry, dict)}
        said = named.get("default")
    return said if isinstance(said, str) and said else None


def _given(value: str) -> str:
    """The template that the job was given: a text, or a file of this computer; raises Fault."""
    if "{{" in value or "{%" in value:
        return value
    hint = "Give the path of a .jinja file."
    try:
        with Path(value).expanduser().open("rb") as file:
            content = file.read(_TEXT_MAX_BYTES + 1)
        if len(content) > _TEXT_MAX_BYTES:
            raise error("bad_template", f"chat_template={value} has more than {_TEXT_MAX_BYTES} bytes.", hint)
        return content.decode()
    except (OSError, UnicodeDecodeError) as failure:
        raise error(
            "bad_template",
            f"chat_template={quoted(value)} is neither auto, none, a template nor a file that can be read: {failure}.",
            hint,
        ) from None


def _no_template(model: Model) -> Finding:
    message = "The tokenizer has no chat template, so there is no telling how this model expects its messages."
    if models.PROCESSOR_TEMPLATE in model.listing.files:
        message += f" (Its {models.PROCESSOR_TEMPLATE} is for another part of transformers, which is not used.)"
    return Finding("error", "no_chat_template", message, NO_TEMPLATE_HINT)


def _conversation(shots: bool) -> Messages:
    question = {"role": "user", "content": _QUESTION}
    return [question, {"role": "assistant", "content": "48 + 24 = 72\n#### 72"}, question] if shots else [question]


def _answer(line: bytes) -> Rendered:
    said = json_object(line) or {}
    if isinstance(said.get("text"), str):
        return Rendered(said["text"])
    return Rendered(None, f"{quoted(said.get('error', '?'))} ({quoted(said.get('type', '?'))})")


def _refusal(reason: str, messages: Messages, model: Model) -> Finding:
    """The template cannot render what the job sends; surely so, unless it lacks a token that may be a default."""
    roles = ", ".join(message["role"] for message in messages)
    said = {**model.special_tokens, **model.tokenizer}
    default = any(f"'{name}' is undefined" in reason for name in _SPECIAL if name not in said)
    message = f"The chat template cannot render messages with the roles {roles}: {reason}."
    return Finding("warning" if default else "error", "template_fails", message, ANOTHER_HINT)


def _check_bos(text: str, variables: Mapping[str, str], model: Model) -> list[Finding]:
    """A first token written twice or not at all. With a template the tokenizer adds none, whatever it is told."""
    bos = variables.get("bos_token")
    if not bos:
        return []
    if text.startswith(bos + bos):
        return [
            Finding(
                "error",
                "double_bos",
                f"Every prompt begins with {quoted(bos)} twice.",
                "Write it in one place: leave it out of the messages or the template.",
            )
        ]
    if model.tokenizer.get("add_bos_token") is True and not text.startswith(bos):
        return [
            Finding(
                "warning",
                "missing_bos",
                f"No prompt begins with {quoted(bos)}, which this tokenizer adds to plain text.",
                "If the model was trained with it, use a template that begins with {{ bos_token }}.",
            )
        ]
    return []


def _check_end(views: _Views, ends: set[str]) -> list[Finding]:
    assert views.asked.text is not None
    if views.asked.text.endswith(tuple(ends)):
        return [
            Finding(
                "error",
                "ends_with_eos",
                "Every prompt ends with the end-of-sequence token, so that to the model everything is said.",
                "The template closes the turn and opens none.",
            )
        ]
    return []


def _check_reply(prompt: str, views: _Views) -> list[Finding]:
    """Whether the prompt ends where a reply begins: what stands before a reply must stand at the prompt's end."""
    if prompt != views.closed.text:
        return []
    before, written, _ = (views.answered.text or "").rpartition(_PROBE)
    if not written:
        return [
            Finding(
                "warning",
                "unclear_generation_prompt",
                "The template opens no assistant turn, and cannot be asked whether it should.",
                "Look at the end of the first prompt: a reply must be what comes next.",
            )
        ]
    # Some templates need nothing between a question and its reply; this one does if it writes something there.
    missing = before.strip().removeprefix(prompt.strip()).strip()
    if not missing:
        return []
    return [
        Finding(
            "error",
            "missing_generation_prompt",
            f"The prompts stop before the assistant's turn: the template writes {quoted(missing)!r} before a reply, "
            "but not when add_generation_prompt asks for it.",
            "Add {% if add_generation_prompt %}…{% endif %} to the template.",
        )
    ]


def _check_system(views: _Views) -> list[Finding]:
    if views.with_system.text is not None:
        if _SYSTEM in views.with_system.text:
            return []
        reason = "it leaves the text out"
    else:
        reason = views.with_system.reason
    message = f"The chat template takes no system message: {reason}. This job sends none."
    return [Finding("warning", "no_system_turn", message, "Put instructions into the question: --set instruction=…")]


def _end_texts(model: Model, variables: Mapping[str, str]) -> set[str]:
    """The texts of the tokens that end a completion, as far as the small files tell them."""
    listed = model.generation.get("eos_token_id")
    added = model.tokenizer.get("added_tokens_decoder")
    added = added if isinstance(added, dict) else {}
    entries = [added.get(str(token)) for token in (listed if isinstance(listed, list) else [listed])]
    texts = {entry.get("content") for entry in entries if isinstance(entry, dict)} | {variables.get("eos_token")}
    return {text for text in texts if isinstance(text, str) and text}

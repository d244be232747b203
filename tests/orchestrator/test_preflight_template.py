"""Chat templates are rendered as transformers renders them, judged as the worker judges them, and kept from harm."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest

from orchestrator import preflight
from orchestrator.preflight import model as models
from orchestrator.preflight import template
from orchestrator.preflight.findings import Fault
from orchestrator.preflight.model import Model
from orchestrator.preflight.shelf import Folder, Listing
from tests.orchestrator.playing_hub import CHATML
from tests.orchestrator.test_preflight import codes, job
from tests.worker import tiny_models
from worker import prompts
from worker.generators import Sampling

ASK = [{"role": "user", "content": "How many <b>&amp;</b> 'clips'?\n"}]
REPLIED = [*ASK, {"role": "assistant", "content": "72"}]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *ASK]
GENERATION = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
) + GENERATION
TEMPLATES = {
    "chatml": tiny_models.CHATML,
    "blocks": "\n  {% for m in messages %}\n    {% if m.role == 'user' %}\nQ: {{ m.content }}\n{% else %}\nA: "
    "{{ m.content }}{% endif %}\n  {% endfor %}\n" + GENERATION,
    "gemma": GEMMA,
    "json": "{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(indent=2) }}" + GENERATION,
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}" + GENERATION,
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "date": "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}" + GENERATION,
    "tools": "{% if tools is not none %}T{% endif %}{{ documents is none }}{{ eos_token }}{{ nothing }}",
    "dict": "{{ dict(a=1).a }}{{ messages[0].content }}",
    "double bos": "{{ bos_token }}<s>{% for m in messages %}{{ m.content }}{% endfor %}",
    "no prompt": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}",
    "no prompt needed": "{% for m in messages %}{{ m.content }} {% endfor %}",
    "takes no reply": "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "closes": "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
    "no bos": "{% for m in messages %}{{ m.content }}|{% endfor %}" + GENERATION,
}


def described(text: str | None, **tokenizer: Any) -> Model:
    """A model of which nothing but the tokenizer is known, with the special tokens of the worker's test tokenizers."""
    said = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", **tokenizer}
    return Model("model=m", Listing({}), {}, said, template=text)


def found_codes(model: Model, given: str = "auto", **params: Any) -> list[tuple[str, str]]:
    found = template.check(model, {"chat_template": given, **params})
    assert [finding.level for finding in found] == sorted(finding.level for finding in found)  # errors first
    return [(finding.level, finding.code) for finding in found]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name: str) -> None:
    """A template's text is what transformers makes of it, for every conversation it takes, and it refuses the same."""
    tokenizer = tiny_models.tokenizer(chat_template=TEMPLATES[name])
    chats = [(messages, opened) for messages in (ASK, REPLIED, WITH_SYSTEM) for opened in (True, False)]
    ours = template.render(
        TEMPLATES[name],
        [{"messages": messages, "add_generation_prompt": opened} for messages, opened in chats],
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    )
    for (messages, opened), rendered in zip(chats, ours, strict=True):
        assert rendered.text == theirs(tokenizer, messages, opened), rendered.reason


def theirs(tokenizer: Any, messages: list[dict[str, str]], opened: bool) -> str | None:
    """What transformers makes of a chat; None when the template refuses it."""
    with contextlib.suppress(jinja2.TemplateError):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened))
    return None


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_findings_are_those_of_the_worker(name: str, adds_bos: bool) -> None:
    """What text can show is found before renting at the same level as the worker finds it with the real tokenizer."""
    text = TEMPLATES[name]
    renderer = prompts.Renderer(tiny_models.tokenizer(adds_bos=adds_bos, chat_template=text))
    try:
        rendered = [renderer.render("1", [{"role": "user", "content": template._QUESTION}])]
    except prompts.ConfigFailure:
        assert found_codes(described(text))[0] == ("error", "template_fails")
        return
    facts = prompts.Facts(Sampling(0.7, 0.9, 400), 1, end_ids=frozenset({2}))
    worker = {(finding.level, finding.code): finding for finding in prompts.check(rendered, renderer, facts)}
    worker.pop(("warning", "turn_end_not_eos"), None)  # needs the tokens of a text
    model = described(text, add_bos_token=adds_bos)
    ours = {(one.level, one.code): one for one in template.check(model, {"chat_template": "auto"})}
    ours.pop(("warning", "no_system_turn"), None)  # which no task sends
    assert ours.keys() == worker.keys()
    for key, finding in ours.items():
        if key[1] in ("missing_generation_prompt", "unclear_generation_prompt"):
            assert (finding.message, finding.hint) == (worker[key].message, worker[key].hint)


def test_a_model_without_a_template_stops_a_chat_job() -> None:
    """No template is an error in the worker's words; `none`, or one of the user's own, takes its place."""
    bare = described(None)
    (finding,) = template.check(bare, {"chat_template": "auto"})
    assert finding.__dict__ == prompts._no_chat_template().__dict__
    assert found_codes(bare, "none") == []
    assert found_codes(bare, CHATML) == []
    processor = Model("model=m", Listing({"chat_template.json": 10}), {})
    assert "chat_template.json" in template.check(processor, {"chat_template": "auto"})[0].message


def test_the_templates_are_looked_for_in_order(tmp_path: Path) -> None:
    """The job's before the file's before tokenizer_config.json's, where of several the default one counts."""
    both = described(GEMMA, chat_template=CHATML)
    assert found_codes(both) == [("warning", "no_system_turn")]
    assert found_codes(both, CHATML) == []
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": GEMMA}]
    assert found_codes(described(None, chat_template=several)) == [("warning", "no_system_turn")]
    assert found_codes(described(None, chat_template=several[:1])) == [("error", "no_chat_template")]
    (tmp_path / "own.jinja").write_text(GEMMA)
    assert found_codes(both, str(tmp_path / "own.jinja")) == [("warning", "no_system_turn")]
    for bad in (tmp_path / "none.jinja", tmp_path):
        with pytest.raises(Fault, match="neither auto, none, a template nor a file"):
            template.check(both, {"chat_template": str(bad)})


def test_a_template_that_cannot_be_read_is_not_called_missing(tmp_path: Path) -> None:
    """A file that is there and is not text is one finding, not also a model without a template."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / "tokenizer_config.json").write_text("not JSON")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    model = models.read(Folder("model", tmp_path))
    assert set(model.unread) == {"tokenizer_config.json", "chat_template.jinja"}
    assert found_codes(model) == []
    assert codes(preflight.look(job(model=tmp_path))) == [("warning", "unreadable_file")] * 2


def test_a_token_that_may_have_a_default_is_no_error() -> None:
    """A template that lacks bos_token fails surely only where the tokenizer says that it has none."""
    text = "{{ bos_token + messages[0].content }}" + GENERATION
    silent = Model("model=m", Listing({}), {}, {"eos_token": "</s>"}, template=text)
    assert found_codes(silent) == [("warning", "template_fails")]
    assert found_codes(described(text, bos_token=None)) == [("error", "template_fails")]


def test_shots_are_rendered_as_the_job_sends_them() -> None:
    """A template that takes one question only fails for a job with worked examples."""
    text = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0].content }}"
    assert ("error", "template_fails") not in found_codes(described(text))
    found = template.check(described(text), {"chat_template": "auto", "shots": 2})
    assert found[0].code == "template_fails"
    assert "user, assistant, user" in found[0].message
    assert "one at a time" in found[0].message


HOSTILE = {
    "runs on": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "recurses": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "writes much": "{% for a in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
    "takes memory": "{{ 'x' * 10 ** 11 }}",
    "grows": "{% set ns = namespace(t='x') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "pads": "{{ '%99999999999d' % 1 }}",
    "counts": "{{ 10 ** (9 ** 9) }}",
    "reaches in": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}",
    "reaches out": "{{ cycler.__init__.__globals__.os.environ }}",
    "formats": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "asks for globals": "{{ raise_exception.__globals__.json }}",
    "changes": "{{ messages.append(1) }}",
    "includes": "{% include '/etc/passwd' %}",
    "is none": "{% for %}",
    "nests": "{% if 1 %}" * 3000,
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.first(8)
def test_hostile_templates_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that takes time, memory or liberties ends as an error in words, within the deadline."""
    monkeypatch.setenv("HF_TOKEN", "hf_SecretOfTheUser0123456789")
    monkeypatch.setattr(template, "DEADLINE_S", 3.0)
    began = time.monotonic()
    found = template.check(described(HOSTILE[name]), {"chat_template": "auto"})
    assert time.monotonic() - began < 10
    assert (found[0].level, found[0].code) == ("error", "template_fails")
    assert "hf_Secret" not in found[0].message
    assert len(found[0].message) < 800


def test_the_rendering_process_sees_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a template might reach by breaking out holds neither token nor keys."""
    spy = tmp_path / "python"
    spy.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\n")
    spy.chmod(0o700)
    for name in ("HF_TOKEN", "LAMBDA_API_KEY", "VAST_API_KEY", "MY_OWN"):
        monkeypatch.setenv(name, "SecretOfTheUser0123456789")
    monkeypatch.setattr("sys.executable", str(spy))
    template.render("x", [{"messages": ASK, "add_generation_prompt": True}], {})
    seen = (tmp_path / "seen").read_text()
    assert "PATH=" in seen
    assert "SecretOfTheUser" not in seen


def test_the_rendering_process_cannot_write_or_grow(tmp_path: Path) -> None:
    """Its limits hold: no file gets a byte, no more memory than a gigabyte."""
    script = (
        "import sys, signal, pathlib; sys.path.insert(0, sys.argv[1]); import rendering; rendering.confine()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: pathlib.Path(sys.argv[2]).write_text('x')\n"
        "except OSError: print('no file')\n"
        "try: bytearray(1_100_000_000)\n"
        "except MemoryError: print('no memory')\n"
    )
    words = [sys.executable, "-B", "-c", script, str(Path(template.__file__).parent), str(tmp_path / "f")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["no file", "no memory"]


def test_a_rendering_process_that_dies_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends without an answer is held for a template that cannot be rendered; none is left behind."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    answers = template.render("x", [{"messages": ASK, "add_generation_prompt": True}], {})
    assert [answer.text for answer in answers] == [None]
    assert json.dumps(answers[0].reason)

"""Renders chat templates in a process of its own with little memory, time and environment: they are foreign programs.

Run by path with what is to be rendered on standard input; answers one JSON line a chat. Needs nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

TEXT_MAX_CHARACTERS = 1_000_000
_MEMORY_BYTES = 1 << 30
_CPU_S = 10
Json = dict[str, Any]


def compiled(template: str) -> Any:
    """The template as transformers compiles it (`utils/chat_template_utils.py`): same sandbox, names and filters."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks what a model is trained on; rendered, it is its content."""

        tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            """The content alone."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **how)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    now = datetime.now().astimezone()  # once: two renderings differ by what they are asked alone
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now.strftime(form)
    return environment.from_string(template)


def rendered(compile_once: Callable[[], Any], chat: Json, variables: Json) -> Json:
    """The text of one chat, or what the template raised."""
    try:
        pieces, length = [], 0
        for piece in compile_once().generate(tools=None, documents=None, **chat, **variables):
            pieces.append(piece)
            length += len(piece)
            if length > TEXT_MAX_CHARACTERS:
                return {"error": f"it writes more than {TEXT_MAX_CHARACTERS} characters", "type": "too much"}
        return {"text": "".join(pieces)}
    except Exception as error:  # noqa: BLE001 -- the template is a program of the model's or the user's
        return {"error": str(error)[:1000], "type": type(error).__name__}


def confine() -> None:
    """Take from this process what a template never needs: memory, time, files."""
    import resource

    limits = {
        resource.RLIMIT_AS: _MEMORY_BYTES,
        resource.RLIMIT_CPU: _CPU_S,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # not every system has each of them
            resource.setrlimit(name, (limit, limit))


def main() -> None:
    """Render what standard input asks for."""
    asked = json.load(sys.stdin)
    compiled("")  # everything is imported now
    confine()
    kept: list[Any] = []

    def compile_once() -> Any:
        if not kept:
            kept.append(compiled(asked["template"]))
        return kept[0]

    for chat in asked["chats"]:
        sys.stdout.write(json.dumps(rendered(compile_once, chat, asked["variables"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

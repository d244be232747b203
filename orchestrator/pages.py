"""What every page is made with: templates, our own style and scripts, and texts that nothing in them can break."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

# What a page cannot show is made visible: control characters as their pictures, lone surrogates as U+FFFD.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_ESCAPED = "<>&\u2028\u2029"  # could end <script> early or, to a reader of old, a line in it


@functools.cache
def template(name: str) -> jinja2.Template:
    """A template of ours; whatever it writes is escaped, and null is a dash."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(asset),
        finalize=lambda value: value if isinstance(value, Markup) else "–" if value is None else text(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def asset(name: str) -> str:
    """A file of the folder of templates, as it is."""
    return (resources.files("orchestrator") / "templates" / name).read_text(encoding="utf-8")


def digest(content: str) -> str:
    """What a page's Content-Security-Policy calls a style or script."""
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def text(value: Any) -> str | None:
    """Any value as text a page can show; None stays None."""
    if value is None:
        return None
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _HIDDEN.sub(_visible, words.replace("\r\n", "\n"))


def encode(value: Any) -> str:
    """JSON that can stand inside <script>, whatever is in it."""
    words = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in _ESCAPED:
        words = words.replace(char, f"\\u{ord(char):04x}")
    return words


def _visible(hidden: re.Match[str]) -> str:
    code = ord(hidden[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

"""Text from elsewhere made harmless for a terminal: no escape sequences, no control characters, no secrets."""

from __future__ import annotations

import re

_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def plain(text: str) -> str:
    """The text without what could move a terminal's cursor, change its title or colours, and without known secrets."""
    from orchestrator import keys

    return keys.masked(_CONTROL.sub("", text))

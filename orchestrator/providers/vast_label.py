"""The label of an instance of Vast.ai, which has no tags: marker, deadline, guard and name in sixty signs."""

from __future__ import annotations

import re

LABEL_MAX = 60
"""Signs of a label that are known to be kept."""
_GUARDS = {"c": "container", "l": "laptop", "m": "on-machine", "r": "reaper", "x": ""}
"""Who ends it, in one letter, which also ends the number before it: a label cut short is no earlier deadline."""
_NO_GUARD = "x"
_LABEL = re.compile(
    rf"(gpu-[0-9]{{8}}t[0-9]{{6}}-[0-9a-f]{{12}})\.(none|[0-9]{{1,12}})([{''.join(_GUARDS)}])"
    r"(?:\.([A-Za-z0-9][A-Za-z0-9._-]*))?",
    re.ASCII,
)
"""The whole of it, or it is not ours: what somebody else wrote begins like a marker at most."""


def encode(marker: str, tags: dict[str, str]) -> str:
    """A marker and the tags of an order as one label. A name that has no room in it is left out, never cut short."""
    letters = {word: letter for letter, word in _GUARDS.items()}
    guard = letters.get(tags.get("gpu-guard", ""), _NO_GUARD)
    label, name = f"{marker}.{tags.get('gpu-deadline', 'none')}{guard}", tags.get("gpu-name", "")
    named = f"{label}.{name}"
    return named if len(named) <= LABEL_MAX and _LABEL.fullmatch(named) else label


def decode(label: object) -> tuple[str | None, dict[str, str]]:
    """The name that a label gives an instance, which is its marker where the label is ours, and the tags in it."""
    if not isinstance(label, str):
        return None, {}
    found = _LABEL.fullmatch(label)
    if found is None:
        return label, {}
    tags = {"gpu-deadline": found[2], "gpu-guard": _GUARDS[found[3]], "gpu-name": found[4] or ""}
    return found[1], {key: text for key, text in tags.items() if text}

"""What a training would learn, looked at here before a machine is rented, where its tokenizer is at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator import planning
from orchestrator.errors import ConfigError


def look(document: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say the first rows of a training as they are learned, and what is left out of it; nothing for other jobs.

    Raises ConfigError for what would end it on the machine, too. Reads no network but what the tokenizer's files ask.
    """
    if document["story"] != "train":
        return
    try:
        planning.check_interpreter("train")
    except ConfigError:
        found: dict[str, Any] = {"unseen": "this computer has no tokenizers (pip install 'gpu[worker]')"}
    else:
        found = planning.check({**document, "at_hand": True}, "Nothing was rented.")
    if why := found.get("unseen"):
        say(f"The rows are not looked at here: {why}. The machine looks at them before it loads the weights.")
        return
    say(found["first_prompt"])
    say(f"{found['examples']} rows to learn from, {found['steps_total']} steps.")
    for finding in found["findings"]:
        say(f"{finding['level']}: {finding['message']}")

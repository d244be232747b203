"""What is found before a machine is rented: an `error` stops the run, a `warning` is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.plain import plain

_SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class Finding:
    """One thing to say before the run; `code` names its kind, as the worker's own checks of prompts do."""

    level: Literal["error", "warning"]
    code: str
    message: str
    hint: str = ""

    def document(self) -> dict[str, str]:
        """This finding for --json, harmless for a terminal."""
        return {name: plain(str(value)) for name, value in self.__dict__.items()}


class Fault(Exception):
    """A finding that ends a check: what comes after it cannot be known."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


def error(code: str, message: str, hint: str = "") -> Fault:
    """A fault that must stop the run."""
    return Fault(Finding("error", code, message, hint))


def unknown(code: str, message: str, hint: str = "") -> Fault:
    """A fault after which something is not known, which need not be wrong."""
    return Fault(Finding("warning", code, message, hint))


def quoted(text: object) -> str:
    """Words of a server or a template, on one line and cut short."""
    words = plain(" ".join(str(text).split()))
    return words if len(words) <= _SHOWN_CHARACTERS else words[:_SHOWN_CHARACTERS] + "…"

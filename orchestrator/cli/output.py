"""How commands print: aligned columns for people, one JSON document for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from orchestrator.plain import plain


def document(value: Any) -> None:
    """Print one JSON document and nothing else."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=1))


def columns(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print lines in aligned columns under their titles."""
    table = [[plain(word) for word in line] for line in (titles, *lines)]  # names and counts may be a machine's
    widths = [max(len(line[index]) for line in table) for index in range(len(titles))]
    for line in table:
        click.echo("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table, a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"

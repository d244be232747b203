"""What a dry run finds, printed: the first prompt, how much would be made, by which engine, and what is wrong."""

from __future__ import annotations

from typing import Any

import click

from jobs import engines, suites
from orchestrator import errors, planning
from orchestrator.cli import output
from orchestrator.plain import plain


def engine(asked: planning.Asked, document: dict[str, Any], python: str | None) -> dict[str, str | None] | None:
    """Which engine the run will use on a machine that nobody looks at now."""
    parts = suites.parts(document)
    params = next((part for part in parts if "temperature" in part["params"]), parts[0])["params"]
    return engines.expected(params, asked.environment or engines.environment(params), python)


def engine_words(expected: dict[str, str | None]) -> str:
    """The same in a line."""
    return plain(
        f"The engine will be {expected['name']}: {expected['why']}." if expected["name"] else f"{expected['why']}."
    )


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print what a dry run found; exit code 3 when a finding is an error."""
    if as_json:
        output.document(found)
    else:
        click.echo(f"The first prompt:\n{plain(found['first_prompt'])}\n")
        work = f"{found['steps_total']} steps" if "steps_total" in found else f"{found['rows_total']} rows"
        click.echo(f"{found['examples']} examples, {work} to make.")
        if found.get("engine"):
            click.echo(engine_words(found["engine"]))
        for finding in found["findings"]:
            click.echo(f"{finding['level']}: {plain(finding['message'])}\n  {finding['hint']}")
        if not found["findings"]:
            click.echo("The prompts look right. Nothing was made.")
    if any(finding["level"] == "error" for finding in found["findings"]):
        raise click.exceptions.Exit(errors.ConfigError.exit_code)

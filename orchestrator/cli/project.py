"""`gpu sync` and `gpu exec`: the project on a machine, and commands in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from orchestrator import cargo, errors, machines, plain, syncing
from orchestrator.cli import completion, output
from orchestrator.cli.run import AFTER, Command, size_guard

_SHOWN = 40


@click.command(name="sync")
@click.argument("name", required=False, shell_complete=completion.machine)
@click.option("--plan", is_flag=True, help="Show what would travel, what not, and why; send nothing.")
@click.option("--need", "needs", metavar="PATH", multiple=True, help="A file or folder that travels in any case.")
@click.option("-y", "--yes", is_flag=True, help="Send more than 2 GB without asking.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def sync_(name: str | None, needs: tuple[str, ...], **how: Any) -> None:
    """Send the project to a machine, without what .gitignore and .gpuignore leave out.

    \b
    Example:  gpu sync box --plan
              gpu sync box --need checkpoints/ckpt.pt
    """
    found = syncing.looked_at(Path.cwd(), needs)
    if how["plan"]:
        _show_plan(syncing.plan(found), how["as_json"])
        return
    record = machines.choose_remote(name)
    size_guard(how["yes"])(syncing.new_bytes(found, record.name))
    with machines.at(record.name) as machine:
        answer = syncing.push(found, machine, output.progress(how["quiet"] or how["as_json"]))
    if how["as_json"]:
        output.document({"machine": record.name, **answer})
    else:
        click.echo(f"{record.name}:{plain.plain(answer['path'])} is up to date; {answer['changed']} files changed")


def _show_plan(found: dict[str, Any], as_json: bool) -> None:
    """Print what would travel; exit code 3 when something needed is missing."""
    if as_json:
        output.document(found)
    else:
        lines = [[entry["path"], cargo.size_in_words(entry["bytes"]), ""] for entry in found["sent"]]
        left = [[entry["path"], cargo.size_in_words(entry["bytes"]), entry["rule"]] for entry in found["left_out"]]
        output.columns(["SENT", "SIZE", ""], _some(lines))
        click.echo("")
        output.columns(["LEFT OUT", "SIZE", "BY"], _some(left))
        click.echo(f"\n{len(lines)} files, {cargo.size_in_words(found['bytes_total'])} would travel.")
    if found["needed_missing"]:
        click.echo(f"Needed, and not there: {', '.join(found['needed_missing'])}", err=True)
        raise click.exceptions.Exit(errors.ConfigError.exit_code)


def _some(lines: list[list[str]]) -> list[list[str]]:
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], [f"… and {more} more; --json gives all of them", "", ""]]


@click.command(name="exec", cls=Command)
@click.argument("name", required=False, shell_complete=completion.machine)
@click.option("--env", "env_names", metavar="NAME", multiple=True, help="A variable of yours that the command gets.")
@click.pass_context
def exec_(ctx: click.Context, name: str | None, env_names: tuple[str, ...]) -> None:
    """Run a command in the synced project on a machine; it ends when you leave.

    \b
    Example:  gpu exec box -- nvidia-smi
              gpu exec box -- python -c 'import torch; print(torch.__version__)'
    """
    from orchestrator import execution

    words = ctx.meta[AFTER]
    if not words:
        raise errors.UsageError("Which command? It stands after --.", "For example: gpu exec box -- nvidia-smi")
    chosen = machines.choose(name)
    command = execution.command(chosen, words, env_names)
    if command.cwd is None:
        click.echo(f"{chosen} has no copy of this project (gpu sync {chosen}): running in the home folder.", err=True)
    shown = output.raw(sys.stdout, env_names), output.raw(sys.stderr, env_names)
    with machines.at(chosen) as machine, shown[0] as out, shown[1] as err:
        code = execution.run(machine, command, out, err)
    if code:
        raise errors.JobFailed(f"The command ended with exit code {code} on {chosen}.", "Nothing else was changed.")

"""`gpu doctor`, `gpu setup-ssh` and `gpu state`: what surrounds machines and runs on this laptop."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from orchestrator import doctor as checkup
from orchestrator import errors, machines, transfer, user_ssh
from orchestrator.cli import output
from orchestrator.doctor import Check
from orchestrator.plain import plain

_TRIES = 3


@click.command()
@click.option("--offline", is_flag=True, help="Ask no machine and no provider.")
@click.option("-y", "--yes", is_flag=True, help="Ask me nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document: a list of checks.")
@click.pass_context
def doctor(context: click.Context, offline: bool, yes: bool, as_json: bool) -> None:
    """Look at everything a run needs here, and say how to mend what is not right.

    In a terminal it asks for account keys that are missing, tests them and keeps them. Exit code 3: something is bad.

    \b
    Example:  gpu doctor --offline
    """
    found = []
    for check in checkup.checks(None if offline else _reach):
        found.append(check)
        if not as_json:
            _show(check)
    if as_json:
        output.document([asdict(check) for check in found])
    elif not (offline or yes) and sys.stdin.isatty() and sys.stdout.isatty():
        found += [check for provider in checkup.lacking() for check in _ask_for_key(provider)]
    context.exit(errors.ConfigError.exit_code if any(check.state == checkup.BAD for check in found) else errors.DONE)


def _reach(name: str) -> str | None:
    """Why a machine does not answer, None when it does."""
    try:
        with machines.at(name) as machine:
            machine.call(["true"], b"", checkup.ANSWER_S)
    except errors.GpuError as error:
        return error.message
    return None


def _show(check: Check) -> None:
    click.echo(plain(f"{check.state:<4}  {check.name:<20}  {check.words}".rstrip()))
    if check.mend:
        click.echo(plain(f"{'':28}{check.mend}"))


def _ask_for_key(provider: str) -> list[Check]:
    """Ask for a key until one is taken or none is given; returns what was bad in the end."""
    for _ in range(_TRIES):
        words = f"Account key for {provider} (not shown; empty to leave it out)"
        value = click.prompt(words, default="", hide_input=True, show_default=False).strip()
        if not value:
            return []
        try:
            check = checkup.take_key(provider, value)
        except errors.UsageError as error:
            click.echo(error.message)
            continue
        _show(check)
        if check.state != checkup.BAD:
            return []
    return [Check(f"{provider} key", checkup.BAD, "none was taken")]


@click.command("setup-ssh")
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--undo", is_flag=True, help="Take the machine out again; with the last one the line goes.")
def setup_ssh(name: str | None, undo: bool) -> None:
    """Let ssh, scp and editors find a machine as gpu-NAME, by one line in ~/.ssh/config.

    \b
    Example:  gpu setup-ssh box
    """
    if undo:
        name = name or _only_one()
        was_in = user_ssh.undo(name, Path.home())
        click.echo(f"ssh no longer knows gpu-{name}." if was_in else f"{name} was not set up; nothing was changed.")
        return
    host = user_ssh.set_up(machines.choose_remote(name).name, Path.home())
    click.echo(f"Type: ssh {host}    (scp, rsync and editors take the same name)")


def _only_one() -> str:
    """The one machine that is set up; UsageError when there are several, or none."""
    chosen = user_ssh.chosen()
    if len(chosen) != 1:
        raise errors.UsageError(f"{len(chosen)} machines are set up: {', '.join(chosen) or 'none'}.", "Give its name.")
    return chosen[0]


@click.group()
def state() -> None:
    """Take machines, keys and the list of runs from one laptop to another.

    \b
    Example:  gpu state export mine.tar.gz
    """


@state.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-y", "--yes", is_flag=True, help="Overwrite FILE.")
def export(file: Path, yes: bool) -> None:
    """Write machines with their keys, account keys kept by gpu, and the list of runs to FILE.

    Rows stay where they are: copy results folders yourself. FILE is as secret as the keys in it.

    \b
    Example:  gpu state export mine.tar.gz
    """
    _tell("Written", transfer.export_state(file, yes))


@state.command("import")
@click.argument("file", type=click.Path(path_type=Path))
def import_(file: Path) -> None:
    """Take in what gpu state export wrote on another laptop; nothing that is here is overwritten.

    \b
    Example:  gpu state import mine.tar.gz
    """
    _tell("New here", transfer.import_state(file))


def _tell(what: str, report: transfer.Report) -> None:
    """Print what travelled, then what to know about it."""
    for kind, names in (("machines", report.machines), ("account keys", report.keys)):
        click.echo(f"{what}: {kind} {plain(', '.join(names)) or 'none'}")
    click.echo(f"{what}: {len(report.runs)} entries in the list of runs")
    for note in report.notes:
        click.echo(plain(note), err=True)

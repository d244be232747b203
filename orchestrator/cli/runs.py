"""`gpu runs`, `gpu logs`, `gpu pull` and `gpu stop`: look at runs, and end them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from orchestrator import advance, errors, journey, machines
from orchestrator import logs as logs_at_home
from orchestrator import runs as records
from orchestrator.cli import completion, output
from orchestrator.plain import plain
from orchestrator.runs import Run

_SHOWN = 20


def _seconds(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    """A time span from 0 to a day; not-a-number is none."""
    if not 0.0 <= value <= 86_400.0:
        raise click.BadParameter(f"{value} is not a number of seconds from 0 to 86400")
    return value


@click.command()
@click.option("--all", "everything", is_flag=True, help=f"All of them, not only the last {_SHOWN}.")
@click.option("--refresh", is_flag=True, help="Ask the machines too; else only this computer is looked at.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def runs(everything: bool, refresh: bool, as_json: bool) -> None:
    """Every run and where it stands, as far as is known here.

    \b
    Example:  gpu runs
              gpu runs --refresh
    """
    found = list(records.remembered())
    found = found if everything else found[-_SHOWN:]
    for run in found:
        left = refresh and not records.is_settled(run)
        here = [part for part in records.workers(run) if part.record.machine == machines.LOCAL]
        if left or (run.record.state == "running" and (refresh or here)):
            _refresh(run, everywhere=refresh)
    documents = [advance.document(run) for run in found]
    if as_json:
        output.document(documents)
        return
    output.columns(
        ["RUN", "STATE", "DONE", "SYNCED", "HOME", "TOTAL", "MACHINE", "STARTED"], [_line(entry) for entry in documents]
    )


def _refresh(run: Run, *, everywhere: bool) -> None:
    """Look at a run anew; one that does not answer must not hide the others."""
    try:
        journey.refresh(run, everywhere=everywhere)
    except errors.GpuError as error:
        click.echo(plain(error.message), err=True)


def _line(entry: dict[str, Any]) -> list[str]:
    keys = ("run_id", "state", "rows_done", "rows_synced", "rows_home", "rows_total", "machine", "started_at")
    if entry["steps_total"]:
        entry = {**entry, "rows_done": entry["steps_done"], "rows_total": entry["steps_total"]}
    return ["-" if entry[key] is None else str(entry[key]) for key in keys]


@click.command()
@click.argument("name", metavar="[RUN]", required=False, shell_complete=completion.run)
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows, until the run has ended.")
@click.option("-n", "lines", type=click.IntRange(min=0), default=30, show_default=True, help="Lines to begin with.")
def logs(name: str | None, follow: bool, lines: int) -> None:
    """What a run's worker printed.

    \b
    Example:  gpu logs -f
    """
    run = records.find(name)
    try:
        with output.text(run.record.env_names) as echo:
            tail = logs_at_home.show(run, lines, echo)
            if follow:
                tail.follow()
    except KeyboardInterrupt:
        click.echo(f"\nStopped looking; the run goes on. Look again:  gpu logs -f {run.run_id}", err=True)
        raise click.exceptions.Exit(errors.INTERRUPTED) from None


@click.command()
@click.argument("name", metavar="[RUN]", required=False, shell_complete=completion.run)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def pull(name: str | None, as_json: bool) -> None:
    """Bring home what a run has made so far.

    \b
    Example:  gpu pull
    """
    run = records.find(name)
    journey.refresh(run)
    _show(
        [run],
        as_json,
        lambda run: f"{_made(run)} in {run.home.folder}; it is {run.record.state}",
    )


@click.command()
@click.argument("name", metavar="[RUN]", required=False, shell_complete=completion.run)
@click.option("--all", "everything", is_flag=True, help="Every run that is running.")
@click.option(
    "--grace", "grace_s", callback=_seconds, default=10.0, show_default=True, help="Seconds to sync its rows."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def stop(name: str | None, everything: bool, grace_s: float, as_json: bool) -> None:
    """Stop a run cleanly: its worker syncs what it has, and the rows come home.

    \b
    Example:  gpu stop
    """
    if name and everything:
        raise errors.UsageError("Say which run, or --all, not both. Nothing was stopped.")
    found = _running() if everything else [records.find(name)]
    failures = [failure for run in found if (failure := _stop(run, grace_s))]
    _show(found, as_json, lambda run: f"{run.run_id} is {run.record.state}; {_made(run)}")
    if failures:
        raise failures[0]


def _made(run: Run) -> str:
    """What of a run is home, in words."""
    record = run.record
    steps = f"{record.steps_done} of {record.steps_total} steps are done, what they made is home"
    return steps if record.steps_total else f"{record.rows_home} rows are home"


def _stop(run: Run, grace_s: float) -> errors.GpuError | None:
    """Stop one of several; what went wrong with it is returned, so that the others are stopped too."""
    try:
        journey.stop(run, grace_s)
    except errors.GpuError as error:
        return error
    return None


def _running() -> list[Run]:
    return [run for run in records.remembered() if run.record.state in ("planned", "pushed", "running")]


def _show(found: list[Run], as_json: bool, words: Callable[[Run], str]) -> None:
    """One document for all of them, or a line each."""
    if as_json:
        output.document([advance.document(run) for run in found])
    for run in () if as_json else found:
        click.echo(words(run))

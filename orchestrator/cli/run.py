"""`gpu run` and `gpu resume`: start or carry on, follow, and print how it went."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import click

from orchestrator import advance, errors, journey, planning, runs, view
from orchestrator.cli import output, results
from orchestrator.cli.jobs import load
from orchestrator.plain import plain
from orchestrator.runs import Run

_PATIENCE_S = 10.0
_SETTING = "A parameter of the job; may be given many times."


def _pairs(_ctx: click.Context, _param: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    """Each `key=value` word as key and text (what follows the first `=`); the last word of a key counts."""
    pairs = [word.partition("=") for word in words]
    for key, separator, text in pairs:
        if not separator or not key:
            raise click.BadParameter(f"{key + separator + text!r} is not of the form key=value, such as samples=3")
    return {key: text for key, _, text in pairs}


@click.command()
@click.argument("job")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, callback=_pairs, help=_SETTING)
@click.option("--limit", type=click.IntRange(min=1), help="Take the first N examples only.")
@click.option("--on", "machine", default="local", show_default=True, help="The machine; `local` is this computer.")
@click.option("--detach", is_flag=True, help="Return once it runs; it goes on by itself.")
@click.option("--dry-run", is_flag=True, help="Check dataset and prompts; generate nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def run(job: str, settings: dict[str, str], limit: int | None, machine: str, **how: bool) -> None:
    """Start a job and follow it until every row is home.

    \b
    Example:  gpu run eval-gsm8k --limit 20
              gpu run eval-gsm8k --set model=Qwen/Qwen2.5-0.5B-Instruct --set dataset=openai/gsm8k
    """
    _only_local(machine)
    request = planning.request(planning.Asked(job, settings, limit), load(job))
    if how["dry_run"]:
        _show_check(planning.check(request), how["as_json"])
        return
    started = planning.begin(request)
    _announce(started, how)
    _carry(started, how)


@click.command()
@click.argument("name", metavar="[RUN]", required=False)
@click.option("--on", "machine", default="local", show_default=True, help="The machine; `local` is this computer.")
@click.option("--detach", is_flag=True, help="Return once it runs; it goes on by itself.")
@click.option("--new-code", is_flag=True, help="Go on with the worker code installed now; recorded in run.json.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def resume(name: str | None, machine: str, new_code: bool, **how: bool) -> None:
    """Carry on with a run, whatever ended it: only what is missing is done.

    \b
    Example:  gpu resume
              gpu resume 20261120-eval-gsm8k-tiny-3f9c
    """
    _only_local(machine)
    found = runs.find(name)
    _announce(found, how)
    try:
        with _leaving(found):
            journey.reopen(found, new_code)
    except errors.GpuError:
        _show_outcome(found, how)
        raise
    _carry(found, how)


def _only_local(machine: str) -> None:
    if machine != "local":
        raise errors.UsageError(f"There is no machine {machine!r}: there are: local.", "Use --on local.")


def _announce(run: Run, how: dict[str, bool]) -> None:
    """Say the run's id first of all: with it, everything else can be found."""
    if how["as_json"]:
        return
    click.echo(run.run_id if how["quiet"] else f"{run.run_id}  {run.record.job} on this computer")


def _carry(run: Run, how: dict[str, bool]) -> None:
    """Bring the run home (or, detached, just started) and print how it stands."""
    try:
        with _leaving(run), view.watching(run.record.rows_home, how["quiet"] or how["as_json"]) as news:
            if how["detach"]:
                journey.set_off(run)
            else:
                journey.go(run, news, _waiting(run))
    finally:
        _show_outcome(run, how)
    if run.record.state in runs.ENDED:
        advance.raise_if_not_done(run)


def _show_outcome(run: Run, how: dict[str, bool]) -> None:
    """Print where the run stands now; a script gets its one document whatever happened."""
    ended = run.record.state in runs.ENDED and run.record.rows_home > 0
    if how["as_json"]:
        found = results.load_summary(run) if ended else None
        output.document({**advance.document(run), "folder": str(run.home.folder), "summary": found})
    elif ended:
        results.show(run)
    elif how["detach"] and not how["quiet"]:
        click.echo(f"Follow it:             gpu logs -f {run.run_id}\nBring its rows home:   gpu pull {run.run_id}")


def _waiting(run: Run) -> Callable[[float], None]:
    """Says, once, that another process follows the run and seems to take its time."""
    said: list[str] = []

    def idle(seconds: float) -> None:
        if seconds >= _PATIENCE_S and not said:
            said.append(f"Process {journey.follower(run)} follows this run already; waiting for it.")
            click.echo(said[0], err=True)

    return idle


@contextlib.contextmanager
def _leaving(run: Run) -> Iterator[None]:
    """Ctrl-C leaves the run as it is and says how to carry on."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(
            f"\nLeft {run.run_id} as it is; it may go on by itself.\n"
            f"Carry on:  gpu resume {run.run_id}\nStop it:   gpu stop {run.run_id}",
            err=True,
        )
        raise click.exceptions.Exit(errors.INTERRUPTED) from None


def _show_check(found: dict[str, Any], as_json: bool) -> None:
    """Print what a dry run found; exit code 3 when a finding is an error."""
    if as_json:
        output.document(found)
    else:
        click.echo(f"The first prompt:\n{plain(found['first_prompt'])}\n")
        click.echo(f"{found['examples']} examples, {found['rows_total']} completions to make.")
        for finding in found["findings"]:
            click.echo(f"{finding['level']}: {plain(finding['message'])}\n  {finding['hint']}")
        if not found["findings"]:
            click.echo("The prompts look right. Nothing was generated.")
    if any(finding["level"] == "error" for finding in found["findings"]):
        raise click.exceptions.Exit(errors.ConfigError.exit_code)

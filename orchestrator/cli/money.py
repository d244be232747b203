"""`gpu cost`, `audit`, `guard`, `advance` and `clean`: what machines cost, and that none does unnoticed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from orchestrator import audit as audits
from orchestrator import cleaning, enforcing, errors, guarding, ledger, market, renting
from orchestrator.cli import output
from orchestrator.cli.cloud import agree, choose_guard, enforced
from orchestrator.plain import plain


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def cost(as_json: bool) -> None:
    """What every machine and run has cost, estimated so that it rounds up.

    \b
    Example:  gpu cost
    """
    found = renting.costs()
    if as_json:
        output.document(found)
        return
    output.columns(
        ["MACHINE", "PROVIDER", "HOURS", "USD", "STILL COSTS"], [_machine(entry) for entry in found["machines"]]
    )
    output.columns(
        ["RUN", "USD", "ROWS", "USD PER 1,000 ROWS"], [_run(entry) for entry in found["runs"] if entry["usd"]]
    )
    click.echo(f"Total: {ledger.shown(found['total_usd'])} USD, an estimate that rounds up")


def _machine(entry: dict[str, Any]) -> list[str]:
    price, still = entry["price_now_usd_per_hour"], "no"
    if entry["open"]:
        still = f"its disk, {ledger.shown(price, 4)} USD/h" if entry["stopped"] else f"{ledger.shown(price)} USD/h"
    return [entry["name"], entry["provider"], f"{entry['hours']:.2f}", ledger.shown(entry["usd"]), still]


def _run(entry: dict[str, Any]) -> list[str]:
    per_1000 = entry["usd_per_1000_rows"]
    each = "-" if per_1000 is None else ledger.shown(per_1000, 3)
    return [entry["run_id"], ledger.shown(entry["usd"]), str(entry["rows"]), each]


@click.command()
@click.option("--fix", is_flag=True, help="End what was found.")
@click.option("--past-cap", is_flag=True, help="Only machines past their deadline: for cron and scheduled CI.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def audit(fix: bool, past_cap: bool, **how: Any) -> None:
    """What may cost money without anybody meaning it: requests without an answer, forgotten machines, past caps.

    \b
    Example:  gpu audit
              gpu audit --fix
              gpu audit --fix --past-cap -y
    """
    say = output.progress(how["quiet"])
    enforced(say)
    found = audits.Findings()
    failures: list[errors.GpuError] = []
    for account in market.accounts(None):
        mine = audits.look(account, past_cap_only=past_cap)
        if fix and mine:
            agree("\n".join([*_lines(mine), "End that?"]), how["yes"])
            failures += audits.fix(account, mine, say)
            mine = audits.look(account, past_cap_only=past_cap)
        found.add(mine)
    _say(failures)
    _show(found, how["as_json"])
    if found or failures:
        raise click.exceptions.Exit(errors.MayCost.exit_code)
    if fix and past_cap:
        guarding.note_reaped()


def _say(failures: list[errors.GpuError]) -> None:
    for failure in failures:
        click.echo(plain(f"{failure.message}\n{failure.hint}"), err=True)


def _show(found: audits.Findings, as_json: bool) -> None:
    if as_json:
        output.document(found.document())
        return
    for words in _lines(found):
        click.echo(words)
    if not found:
        click.echo("Nothing costs money that is not remembered here, or that is past its caps.")


def _lines(found: audits.Findings) -> Iterator[str]:
    """A line for each."""
    for what, entries in found.document().items():
        for entry in entries:
            price, ends = entry["price_usd_per_hour"], entry["deadline"] or "none"
            cost = f"{ledger.shown(price)} USD/h" if price is not None else "an unknown price"
            name = f"{entry['name'] or '?'} {entry['marker']} {entry['instance_id']}"
            yield plain(f"{what.replace('_', ' ')}: {name} at {cost}, {entry['state']}; its deadline: {ends}")


@click.group()
def guard() -> None:
    """Who ends a machine while this laptop is closed.

    \b
    Example:  gpu guard setup
    """


@guard.command()
@click.option("--how", type=click.Choice(list(guarding.HOW)), help="Which guard; else you are asked.")
def setup(how: str | None) -> None:
    """Choose who ends machines launched from now on, and write what that guard needs.

    \b
    Example:  gpu guard setup --how reaper
    """
    if how is None and not sys.stdin.isatty():
        raise errors.UsageError("Nobody can be asked here. Nothing was changed.", "Say which: --how")
    choose_guard(how)


@click.command()
@click.option("--all", "everything", is_flag=True, required=True, help="Every machine and run.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def advance(everything: bool, quiet: bool) -> None:
    """One step of everything: caps enforced, rows brought home, runs looked at. For cron; asks nothing.

    \b
    Example:  gpu advance --all
    """
    failures = enforcing.step(output.progress(quiet)) if everything else []
    _say(failures)
    if failures:
        raise click.exceptions.Exit(max(failure.exit_code for failure in failures))


@click.command()
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def clean(yes: bool) -> None:
    """Remove folders of machines that are gone, worker code no run keeps, and keys of ours left in your accounts.

    \b
    Example:  gpu clean
    """
    found = cleaning.look()
    for words in found.words():
        click.echo(words)
    if not found:
        click.echo("There is nothing to clean.")
        return
    agree("Remove that?", yes)
    cleaning.remove(found)
    click.echo("Removed.")

"""`gpu launch`, `wait` and `terminate`: machines that are rented, and given back."""

from __future__ import annotations

import sys
from typing import Any

import click

from orchestrator import (
    enforcing,
    errors,
    guarding,
    inventory,
    keys,
    machines,
    market,
    offers,
    providers,
    rentals,
    renting,
    returning,
)
from orchestrator.cli import completion, output, wishes
from orchestrator.plain import plain
from orchestrator.rentals import Rental


@click.command()
@click.argument("name", required=False)
@wishes.need
@wishes.caps
@click.option("--no-wait", is_flag=True, help="Return once it is rented; gpu wait goes on.")
@click.option("--dry-run", is_flag=True, help="Say what would be rented; rent nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def launch(name: str | None, **how: Any) -> None:
    """Rent a machine and wait until it is ready. It costs money from then on, until its caps or you end it.

    \b
    Example:  gpu launch --gpu A100 --budget 5
              gpu launch box --type gpu_1x_h100_pcie --max-hours 3
    """
    say = output.progress(how["quiet"])
    if name is not None:
        machines.check_name(name)
    enforced(say)
    asked = renting.wish(how)
    account, offer = renting.plan(asked, say)
    for line in renting.in_words(asked, account, offer):
        say(line)
    if how["dry_run"]:
        if how["as_json"]:
            output.document({"dry_run": True, "offer": offers.document(offer)})
        return
    agree_to_rent(how["yes"])
    rental = renting.rent(name or renting.default_name(asked, offer), asked, account)
    go_on(rental, how, wait_capacity=asked.wait_capacity)


def agree_to_rent(yes: bool) -> None:
    """Have the user choose a guard, once, where somebody can be asked; then return when a machine may be rented."""
    if not yes and sys.stdin.isatty() and not guarding.is_chosen():
        click.echo("Who is to end rented machines while this laptop is closed? You are asked this once.", err=True)
        choose_guard(None)
    agree("Rent it?", yes)


def choose_guard(how: str | None) -> None:
    """Have one of the guards chosen, each said in plain words; asked for unless `how` says which."""
    for name, words in guarding.HOW.items():
        click.echo(f"{name}: {words}", err=True)
    if how is None:
        kinds = click.Choice(list(guarding.HOW))
        how = str(click.prompt("Which one", type=kinds, default=guarding.chosen(), err=True))
    files = guarding.choose(how)
    click.echo(f"Machines launched from now on are guarded by: {how}", err=True)
    for path in files:
        click.echo(f"Written: {path}", err=True)
    if files:
        words = "Add the line of the first to your crontab (crontab -e), or the second to a repository of yours."
        click.echo(words, err=True)
        rented = [name for name in providers.names() if keys.find(name) is not None]
        for name in [name for name in rented if not keys.is_kept(name)]:
            words = f"cron does not see {keys.VARIABLES[name]}: give the key to gpu doctor, or nothing is ended by it."
            click.echo(words, err=True)


def agree(question: str, yes: bool) -> None:
    """Return when the answer is yes; refuse where nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise errors.UsageError(f"{question} Nobody can be asked here. Nothing was done.", "Say yes beforehand: -y")
    if not click.confirm(question, err=True):
        raise errors.UsageError("Nothing was done.")


def go_on(rental: Rental, how: dict[str, Any], *, wait_capacity: bool = False) -> None:
    """Go on with a machine until it is ready, or only rented, and print where it stands."""
    say = output.progress(how["quiet"])
    try:
        renting.go_on(rental, say, wait_capacity=wait_capacity, until_rented=how.get("no_wait", False))
    except KeyboardInterrupt:
        rental.reload()
        click.echo(renting.left(rental), err=True)
        raise click.exceptions.Exit(errors.INTERRUPTED) from None
    finally:
        rental.reload()
        if how["as_json"]:
            output.document(inventory.of_rental(rental, []))
    if not how["as_json"]:
        click.echo(f"{rental.name} is {rental.record.state}: {rental.in_words()}")
        click.echo(f"Guard: {guarding.in_words(rental)}")


@click.command()
@click.argument("name", required=False, shell_complete=completion.machine)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def wait(name: str | None, **how: Any) -> None:
    """Go on with a launch, wherever it stands, until the machine is ready.

    \b
    Example:  gpu wait
    """
    rental = rentals.choose(name)
    enforced(output.progress(how["quiet"]), rental.name)
    rental.reload()
    if rental.record.state in rentals.ENDED:
        raise renting.gone(rental)
    go_on(rental, how)


def enforced(say: Any, *spared: str | None) -> None:
    """Give back what is past its caps before anything else; trouble with that is said, and stops nothing.

    `spared`: machines that are about to be used; they may be idle.
    """
    for error in enforcing.enforce(say, *spared):
        click.echo(plain(f"{error.message}\n{error.hint}"), err=True)


@click.command()
@click.argument("name", required=False, shell_complete=completion.machine)
@click.option("--all", "everything", is_flag=True, help="Every rented machine.")
@click.option("--discard", is_flag=True, help="Give up what is there and not home.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def terminate(name: str | None, everything: bool, discard: bool, **how: Any) -> None:
    """Give machines back: rows come home first, then the provider is asked until it says gone, twice.

    \b
    Example:  gpu terminate a100
    """
    if name and everything:
        raise errors.UsageError("Say which machine, or --all, not both. Nothing was given back.")
    found = (
        [rental for rental in rentals.known() if rental.record.state not in rentals.ENDED]
        if everything
        else [_chosen(name)]
    )
    say = output.progress(how["quiet"])
    enforced(say)
    agree(f"Give back {', '.join(rental.name for rental in found) or 'nothing'}?", how["yes"] or not found)
    failures = [failure for rental in found if (failure := _give_back(rental, say, discard=discard))]
    if how["as_json"]:
        output.document([inventory.of_rental(rental, []) for rental in found])
    for rental in () if how["as_json"] else found:
        if rental.record.state in rentals.ENDED:
            click.echo("\n".join(returning.receipt(rental)))
    _say_storage({rental.record.provider for rental in found})
    if failures:
        raise _worst(failures)


def _worst(failures: list[errors.GpuError]) -> errors.GpuError:
    """The worst of several errors; the others are said here."""
    worst = max(failures, key=lambda error: error.exit_code)
    for failure in failures:
        if failure is not worst:
            click.echo(plain(f"{failure.message}\n{failure.hint}"), err=True)
    return worst


def _chosen(name: str | None) -> Rental:
    """The rented machine that is meant; a box of one's own cannot be given back."""
    if name and rentals.find(name) is None and name in [record.name for record in machines.known()]:
        raise errors.UsageError(
            f"{name} is a box of your own; it is not rented here.", f"Undo gpu add: gpu forget {name}"
        )
    return rentals.choose(name)


def _give_back(rental: Rental, say: Any, *, discard: bool) -> errors.GpuError | None:
    """Give one of several back; returns what went wrong with it, so that the others are given back too."""
    try:
        with rental.locked():
            returning.give_back(rental, market.account_of(rental), say, discard=discard)
    except (errors.GpuError, OSError) as error:
        rental.reload()
        return returning.goes_on(rental, error)
    return None


def _say_storage(names: set[str]) -> None:
    """Name what keeps costing money beside machines."""
    for name in sorted(names):
        try:
            left = providers.open(name).storage()
        except errors.GpuError:
            continue
        for words in left:
            click.echo(f"Still costing money at {name}: {words}", err=True)

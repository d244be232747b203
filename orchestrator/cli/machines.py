"""`gpu add`, `forget`, `status` and `ssh`: machines one already has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from orchestrator import errors, inventory, machines
from orchestrator.cli import completion, output
from orchestrator.plain import plain


@click.command()
@click.argument("name")
@click.argument("address", metavar="USER@HOST[:PORT]")
@click.option("--key", type=click.Path(path_type=Path), help="Your private key for it; else one is made and put there.")
@click.option("--python", help="An interpreter there that runs the jobs, as it is.")
@click.option("--fingerprint", metavar="SHA256:…", help="The host key that must be there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def add(name: str, address: str, as_json: bool, **how: Any) -> None:
    """Add a machine you already have; from then on it is called by its name.

    \b
    Example:  gpu add box ubuntu@203.0.113.7
              gpu add box ubuntu@203.0.113.7:2222 --key ~/.ssh/id_ed25519 --python /opt/conda/bin/python
    """
    from orchestrator import enrolment, ssh_config

    asked = enrolment.Asked(name, ssh_config.parse(address), **how)
    record = enrolment.add(asked)
    if as_json:
        output.document(inventory.document(record, []))
        return
    click.echo(f"{name}: {plain(record.system)}, {plain(record.gpu or 'no GPU')}, {plain(record.python)}")
    click.echo(f"Its host key is pinned: {record.fingerprint}")
    if record.key is None:
        click.echo("A key of its own was added to ~/.ssh/authorized_keys there; gpu forget takes it off again.")


@click.command()
@click.argument("name", shell_complete=completion.machine)
@click.option("--discard", is_flag=True, help="Also when rows on it are not home, which are given up.")
def forget(name: str, discard: bool) -> None:
    """Forget a machine: its key there and its folder here; runs at home are kept.

    \b
    Example:  gpu forget box
    """
    from orchestrator import enrolment, inventory, user_ssh

    machines.load(name)
    busy = inventory.not_home(name)
    if busy and not discard:
        raise errors.UsageError(
            f"{', '.join(busy)} may still run on {name}, or have rows there that are not home. Nothing was changed.",
            f"End them first: gpu stop {busy[0]}. To give up what is there: gpu forget {name} --discard",
        )
    user_ssh.undo(name, Path.home())
    left = enrolment.forget(name)
    click.echo(f"{name} is forgotten; runs at home are kept.")
    if left:
        click.echo(plain(left), err=True)


@click.command()
@click.argument("name", required=False, shell_complete=completion.machine)
@click.option("--refresh", is_flag=True, help="Ask the machines; else what is known is shown.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def status(name: str | None, refresh: bool, as_json: bool) -> None:
    """Every machine, what it has, and the runs on it.

    \b
    Example:  gpu status --refresh
    """
    if refresh:
        inventory.refresh(name)
    documents = inventory.documents(name)
    if as_json:
        output.document(documents)
        return
    if not documents:
        click.echo("No machines but this computer. Add one: gpu add NAME USER@HOST, or rent one: gpu launch")
        return
    titles = ["MACHINE", "STATE", "ADDRESS", "GPU", "USD/H", "USD", "ANSWERS", "LAST SEEN", "RUNS"]
    output.columns(titles, [inventory.line(entry) for entry in documents])
    for words in inventory.warnings():
        click.echo(words, err=True)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name", required=False, shell_complete=completion.machine)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def ssh(name: str | None, words: tuple[str, ...]) -> None:
    """A shell on a machine, with its own keys and settings; words after it go to ssh.

    \b
    Example:  gpu ssh box
              gpu ssh box -- -L 8888:localhost:8888
    """
    record = machines.choose_remote(name)
    config = machines.folder(record.name) / "ssh_config"
    try:
        os.execvp("ssh", ["ssh", "-F", str(config), *words, f"gpu-{record.name}"])  # noqa: S606 -- words, no shell
    except FileNotFoundError:
        raise errors.ConfigError("There is no ssh on this computer.", "Install OpenSSH's client.") from None

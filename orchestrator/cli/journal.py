"""`gpu journal` and `gpu note`: every run in one table, and what its user wrote about it."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator import comparing, notes, runs
from orchestrator import journal as table
from orchestrator.cli import completion, output
from orchestrator.plain import plain

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option("--md", "markdown", metavar="FILE", type=_FILE, help="Write it as Markdown there.")
@click.option("--html", metavar="FILE", type=_FILE, help="Write it as one page there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def journal(markdown: Path | None, html: Path | None, as_json: bool) -> None:
    """Every run in one table, with its scores, cost, notes and the command that made it; Markdown, unless said.

    \b
    Example:  gpu journal
              gpu journal --html journal.html
    """
    found = table.read()
    for path, write in ((markdown, table.markdown), (html, table.html)):
        if path:
            comparing.write(path, write(found).encode())
            click.echo(f"Written: {plain(str(path))}", err=True)
    if as_json:
        output.document(found)
    elif not markdown and not html:
        click.echo(table.markdown(found), nl=False)


@click.command(context_settings={"ignore_unknown_options": True})  # a note may begin with a dash
@click.argument("name", metavar="RUN", shell_complete=completion.run)
@click.argument("text", metavar="TEXT")
def note(name: str, text: str) -> None:
    """Write something about a run; it stands in the journal.

    \b
    Example:  gpu note 3f9c "with the new prompt"
    """
    found = runs.find(name)
    notes.add(found, text)
    click.echo(f"Noted about {found.run_id}. See it: gpu journal")

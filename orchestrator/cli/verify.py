"""`gpu verify`: a model evaluated by us and by lm-evaluation-harness, compared item by item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from orchestrator import advance, errors, journey, runs, verifying, view
from orchestrator.cli import completion, output
from orchestrator.cli.run import pairs
from orchestrator.plain import plain
from orchestrator.runs import Run

_SHOWN = 10
_WORDS = {"prompt": "prompts", "answer": "answers", "score": "scores", "loglik": "log-likelihoods", "text": "texts"}


@click.command()
@click.option("--task", type=click.Choice(verifying.TASKS), help="The benchmark.")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, callback=pairs, help="As for gpu run.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="The first N examples.")
@click.option("--harness", metavar="PATH", help=f"A Python with lm_eval {verifying.VERSION}; else GPU_PARITY_PYTHON.")
@click.option("--run", "name", metavar="RUN", shell_complete=completion.run, help="Compare this run, which has ended.")
@click.option("--on", type=click.Choice(["local"]), default="local", help="Where: on this computer.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def verify(name: str | None, harness: str | None, *, quiet: bool, as_json: bool, **how: Any) -> None:
    """Evaluate a model beside lm-evaluation-harness on the same records, and compare item by item.

    \b
    Example:  gpu verify --task arc --set model=./my-model --harness harness/bin/python
    """
    if (name is None) is (how["task"] is None):
        raise errors.UsageError("Say either --task TASK or --run RUN. Nothing was started.")
    python, silent = verifying.python(harness), quiet or as_json
    run = runs.find(name) if name else _made(how, silent)
    output.progress(silent)(f"{run.run_id}  lm-evaluation-harness {verifying.VERSION} evaluates the same")
    found = verifying.compare(run, python)
    output.document(found) if as_json else _show(found)
    if not found["agree"]:
        raise click.exceptions.Exit(errors.JobFailed.exit_code)


def _made(how: Mapping[str, Any], silent: bool) -> Run:
    """A run of ours, home; whatever stops it can be gone on with."""
    run = verifying.begin(how["task"], how["settings"], how["limit"])
    output.progress(silent)(f"{run.run_id}  {run.record.job} on this computer")
    try:
        with view.watching(run.home.rows, silent) as news:
            journey.go(run, news, lambda _: None)
    except KeyboardInterrupt:
        click.echo(f"\nCarry on:  gpu resume {run.run_id}, then gpu verify --run {run.run_id}", err=True)
        raise click.exceptions.Exit(errors.INTERRUPTED) from None
    advance.raise_if_not_done(run)
    return run


def _show(found: Mapping[str, Any]) -> None:
    """Print the counts, and what does not agree."""
    click.echo(f"{found['n']} examples of {found['task']}, by gpu and by lm-evaluation-harness {found['harness']}:\n")
    output.columns(
        ["THE SAME", "OF"], [[f"{count} {_WORDS[name]}", str(found["n"])] for name, count in found["same"].items()]
    )
    if found["max_loglik_difference"] is not None:
        click.echo(f"\nLog-likelihoods lie at most {found['max_loglik_difference']:.2g} nats apart.")
    for each in found["disagreements"][:_SHOWN]:
        click.echo(f"\n{plain(each['example_id'])}: other {', '.join(_WORDS[name] for name in each['differs'])}")
        for side in ("ours", "theirs"):
            click.echo(f"  {side:6}  {plain(_short(each[side]))}")
    if len(found["disagreements"]) > _SHOWN:
        click.echo(f"\n… and {len(found['disagreements']) - _SHOWN} more; --json gives all of them.")
    click.echo("\nThey agree." if found["agree"] else "\nThey do not agree.")


def _short(side: Mapping[str, Any]) -> str:
    said = (f"{name} {value!r}" if isinstance(value, str) else f"{name} {value}" for name, value in side.items())
    return "; ".join(words if len(words) <= 200 else f"{words[:120]} … {words[-60:]}" for words in said)

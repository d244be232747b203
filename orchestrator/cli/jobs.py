"""`gpu jobs`: the catalogue, and one job with its parameters."""

from __future__ import annotations

import click

from jobs import spec
from orchestrator import config, errors
from orchestrator.cli import output


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def jobs(ctx: click.Context, as_json: bool) -> None:
    """The catalogue of jobs; your own ./jobs/*.toml come first.

    \b
    Example:  gpu jobs
              gpu jobs show eval-gsm8k
    """
    if ctx.invoked_subcommand:
        return
    folders = config.job_folders()
    found = [load(name) for name in spec.names(folders)]
    if as_json:
        output.document([document(job) for job in found])
    else:
        output.columns(["JOB", "SUMMARY"], [[job.name, job.summary] for job in found])


@jobs.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def show(name: str, as_json: bool) -> None:
    """What a job does, needs and takes.

    \b
    Example:  gpu jobs show eval-gsm8k
    """
    job = load(name)
    if as_json:
        output.document(document(job))
        return
    click.echo(f"{job.name}: {job.summary}\n")
    lines = [
        [name, "-" if parameter.default is None else str(parameter.default), parameter.expected(), parameter.help]
        for name, parameter in job.parameters.items()
    ]
    output.columns(["PARAMETER", "DEFAULT", "TAKES", "WHAT IT IS"], lines)
    name = f"{job.parts[0].task}.sample" if job.parts else "samples"
    click.echo(f"\nSet them like this:  gpu run {job.name} --set {name}=3 --limit 20")


def load(name: str) -> spec.Job:
    """The job of that name; UsageError naming the nearest one, ConfigError when its file is wrong."""
    try:
        return spec.find(name, config.job_folders())
    except spec.UnknownJob as error:
        raise errors.UsageError(f"{error}", "See what there is: gpu jobs") from None
    except spec.SpecError as error:
        raise errors.ConfigError(f"{error}", "Mend the file, then try again.") from None


def document(job: spec.Job) -> dict[str, object]:
    """A job as `gpu jobs --json` gives it."""
    return {
        "name": job.name,
        "summary": job.summary,
        "task": job.task,
        **({"parts": [part.task for part in job.parts]} if job.parts else {}),
        "parameters": [parameter.document() for parameter in job.parameters.values()],
    }

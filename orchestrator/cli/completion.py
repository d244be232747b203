"""Names that a shell completes: machines, runs and jobs, from records alone."""

from __future__ import annotations

import click

from jobs import spec
from orchestrator import config, machines, runs


def machine(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Machines whose names begin so, this computer among them."""
    names = [*(record.name for record in machines.known()), machines.LOCAL]
    return [name for name in names if name.startswith(begun)]


def run(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Runs whose ids begin so, the newest first."""
    found = [run.run_id for run in runs.remembered() if run.run_id.startswith(begun)]
    return found[::-1]


def job(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    """Jobs whose names begin so."""
    return [name for name in spec.names(config.job_folders()) if name.startswith(begun)]

"""The options by which a machine to be rented is asked for, the same for every command that rents one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from orchestrator import providers


class Limit(click.ParamType[float | None]):
    """A number above zero, or the word `none`, which must be typed to have no limit."""

    name = "number|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """The number; None for `none`."""
        if value is None or value == "none":
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.fail(f"{value!r} is not a number above 0, and not `none`.", param, ctx)
        return number


def _positive(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"{value} is not above 0")
    return value


def _pairs(_ctx: click.Context, _param: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for name, separator, text in pairs:
        if not separator or not name:
            raise click.BadParameter(f"{name + separator + text!r} is not of the form NAME=VALUE")
    return {name: text for name, _, text in pairs}


_NEED = [
    click.option("--gpu", metavar="NAME", help="Which GPU, such as A100, H100 SXM or `A100 80GB`."),
    click.option("--type", "type_name", metavar="TYPE", help="The provider's name of a kind of machine."),
    click.option("--count", type=click.IntRange(min=0), help="How many GPUs it has; to rent, 1 unless said."),
    click.option("--min-vram", type=float, callback=_positive, metavar="GB", help="Memory of each GPU, at least."),
    click.option("--max-price", type=float, callback=_positive, metavar="USD", help="USD per hour, of all of it."),
    click.option("--provider", type=click.Choice(providers.names()), help="Which cloud; else all you have a key for."),
    click.option("--region", help="Where, as the provider calls it."),
    click.option("--disk", type=float, callback=_positive, metavar="GB", help="Disk, at least."),
    click.option("--spot", is_flag=True, help="One that may be taken away for a higher bid."),
    click.option("--bid", type=float, callback=_positive, metavar="USD", help="With --spot: what is bid per hour."),
    click.option(
        "--filter",
        "filters",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_pairs,
        help="What a cloud is asked for besides, such as reliability=0.9; overrides a default that protects.",
    ),
]
_CAPS = [
    click.option(
        "--budget", type=float, callback=_positive, metavar="USD", help="It is given back when that is spent."
    ),
    click.option(
        "--max-hours", type=Limit(), default="12", show_default=True, help="It is given back then, whatever happens."
    ),
    click.option(
        "--idle-minutes", type=Limit(), default="30", show_default=True, help="Given back when idle, all rows home."
    ),
    click.option("--wait-capacity", is_flag=True, help="Look again until there is one."),
    click.option("--python", help="An interpreter there that runs the jobs, as it is."),
]
Command = Callable[..., Any]


def need(command: Command) -> Command:
    """The options that choose among offers."""
    for option in reversed(_NEED):
        command = option(command)
    return command


def caps(command: Command) -> Command:
    """The options that say what it may cost, and how it is launched."""
    for option in reversed(_CAPS):
        command = option(command)
    return command


def typed(context: click.Context) -> list[str]:
    """Those of these options that were typed, as they are typed."""
    names = ["count", "min_vram", "max_price", "provider", "region", "disk", "spot", "bid"]
    names += ["budget", "max_hours", "idle_minutes", "wait_capacity", "python"]
    source = click.core.ParameterSource.COMMANDLINE
    return [f"--{name.replace('_', '-')}" for name in names if context.get_parameter_source(name) is source]

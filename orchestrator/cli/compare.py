"""`gpu compare`: runs side by side, on the same examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from jobs import selection
from orchestrator import comparing, frozen
from orchestrator.cli import completion, output
from orchestrator.plain import plain

_SHOWN = 8
_ALIKE = ("engine", "dtype", "model_digest", "adapter_digest")  # what runs are compared for: no reason to doubt


@click.command()
@click.argument("names", metavar="RUN RUN…", nargs=-1, required=True, shell_complete=completion.run)
@click.option(
    "--by",
    type=click.Choice(list(selection.SELECTORS)),
    default="mean",
    show_default=True,
    help="How one number comes of an example's samples.",
)
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Write each example's scores.")
@click.option("--png", "png_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the scores.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def compare(names: tuple[str, ...], by: str, csv_file: Path | None, png_file: Path | None, as_json: bool) -> None:
    """Compare runs with the first one, on the examples that both scored; a RUN may be a folder.

    \b
    Example:  gpu compare 3f9c 81d0 --csv scores.csv
    """
    loaded = comparing.load(names, by)
    found = comparing.compare(loaded)
    if csv_file:
        comparing.write(csv_file, comparing.table(loaded).encode())
    if png_file:
        comparing.write(png_file, comparing.chart(found))
    if as_json:
        output.document(found)
    else:
        _show(found)


def _show(found: Mapping[str, Any]) -> None:
    several = len(found["tasks"]) > 1
    lines = [
        [
            each["run"],
            *([each["task"], each["measure"].replace("_", " ")] if several else []),
            str(each["model"] or "-"),
            output.number(each["value"]),
            f"{output.number(each['ci95'][0])} to {output.number(each['ci95'][1])}",
            f"{each['scored']}/{each['n_examples']}",
        ]
        for each in found["runs"]
    ]
    measure = found["runs"][0]["measure"].replace("_", " ").upper()
    of_it = ["TASK", "MEASURE", "MODEL", "VALUE"] if several else ["MODEL", measure]
    output.columns(["RUN", *of_it, "95 % INTERVAL", "SCORED"], lines)
    for each in found["comparisons"]:
        _show_one(each, several)
    for label, tasks in found["not_compared"].items():
        click.echo(f"\n{plain(label)}: {plain(', '.join(tasks))} cannot be compared: not both runs have scores of it.")
    for label, known in found["frozen"].items():
        if words := frozen.in_words(label, known):
            click.echo(f"\nWarning: {plain(words)}")


def _show_one(each: Mapping[str, Any], several: bool) -> None:
    low, high = (_signed(end) for end in each["ci95"])
    task = f"{each['task']}: " if several else ""
    click.echo(
        f"\n{plain(task + each['after'])} against {plain(each['before'])}, on {each['n']} examples that both scored:"
    )
    click.echo(f"  {_signed(each['difference'])} (95 % interval {low} to {high}), {_certainty(each)}")
    if each["left_out"]:
        click.echo(f"  {each['left_out']} examples are left out: not both runs scored them")
    for word, names in (("higher", each["gained"]), ("lower", each["lost"])):
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        click.echo(f"  {len(names)} score {word}{': ' if names else ''}{plain(', '.join(names[:_SHOWN]))}{more}")
    told = _unlike(each["differs"])
    if told:
        click.echo(f"  They were not asked alike: {told}")


def _certainty(each: Mapping[str, Any]) -> str:
    tested = {"mcnemar": "exact McNemar test", "sign-flip": "paired permutation test"}[each["test"]]
    adjusted = f", {each['p_adjusted']:.3g} adjusted" if each["p_adjusted"] != each["p_value"] else ""
    floor = f"; noise floor ±{each['noise_floor']:.3f}" if each["noise_floor"] is not None else ""
    verdict = {"noise": "no more than noise", "better": "better", "worse": "worse"}[each["verdict"]]
    return f"{verdict} (p = {each['p_value']:.3g}{adjusted}, {tested}{floor})"


def _unlike(differs: Mapping[str, Any] | None) -> str:
    """What else was not the same than what one compares runs for, in words."""
    found = {name: pair for name, pair in (differs or {}).items() if name not in _ALIKE}
    return plain("; ".join(f"{name} {_short(before)} and {_short(after)}" for name, (before, after) in found.items()))


def _short(value: Any) -> str:
    words = "unset" if value is None else str(value)
    return words if len(words) <= 24 else f"{words[:16]}…"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"

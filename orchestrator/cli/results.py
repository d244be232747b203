"""`gpu report` and `gpu rescore`: the numbers of a run, from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jobs.training_speed import ASSUMED
from orchestrator import comparing, frozen, market, outs, rescoring, runs, side_by_side, speeds, summary
from orchestrator.cli import cloud, completion, output
from orchestrator.plain import plain
from orchestrator.runs import Run

_FILE = click.Path(dir_okay=False, path_type=Path)
_SHOWN = 10
_DOUBTFUL = (
    ("finish_length", 0.05, "of the completions were cut at max_new_tokens; a larger one may score better."),
    ("no_answer", 0.10, "of the completions hold no answer; look at some: the prompt may not ask for one clearly."),
)
"""Shares that make a score doubtful above a limit, with what to think of."""


@click.command()
@click.argument("names", metavar="[RUN]…", nargs=-1, shell_complete=completion.run)
@click.option("--html", metavar="FILE", type=_FILE, default="side-by-side.html", help="Where the page of several goes.")
@click.option("--open", "in_browser", is_flag=True, help="Open the page in a browser.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document: summary.json; of several, as gpu compare.")
def report(names: tuple[str, ...], html: Path, in_browser: bool, as_json: bool) -> None:
    """The numbers of a run, counted anew from its rows, and its page; of several runs one page, side by side.

    \b
    Example:  gpu report --open
              gpu report 3f9c 81d0 --html both.html
    """
    found = [runs.find(name) for name in names or (None,)]
    page = html if len(found) > 1 else found[0].home.report
    if len(found) > 1:
        _side_by_side(found, page, as_json)
    else:
        document = summary.write(found[0])
        output.document(document) if as_json else show(found[0])
    if in_browser:
        click.launch(page.absolute().as_uri())


def _side_by_side(found: list[Run], page: Path, as_json: bool) -> None:
    """Put the page of several runs where it is wanted, and say where that is."""
    for run in found:
        summary.current(run)
    loaded = comparing.load([str(run.home.folder) for run in found])
    compared = comparing.compare(loaded)
    side_by_side.write(page, loaded, compared)
    if as_json:
        output.document(compared)
    click.echo(f"{len(found)} runs side by side: {plain(str(page))}", err=as_json)


@click.command()
@click.argument("what", metavar="RUN|FILE.jsonl")
@click.option("--task", required=True, help="The benchmark whose rules are applied, such as gsm8k.")
@click.option("--completion", default="completion", show_default=True, help="Field that holds the completion.")
@click.option("--target", default="target", show_default=True, help="Field that holds the right answer.")
@click.option("-y", "--yes", is_flag=True, help="Run what the model wrote, where the task does that, without asking.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def rescore(what: str, task: str, completion: str, target: str, *, yes: bool, as_json: bool) -> None:
    """Score completions that exist already, by every rule of a task; no model is needed.

    \b
    Example:  gpu rescore completions.jsonl --task gsm8k --completion text --target answer
    """
    found = rescoring.rescore(what, rescoring.Fields(task, completion, target), lambda words: cloud.agree(words, yes))
    if as_json:
        output.document(found)
        return
    lines = [
        [rule, str(counts["correct"]), str(counts["scored"]), str(counts["unscored"]), _share(counts)]
        for rule, counts in found["rules"].items()
    ]
    output.columns(["RULE", "CORRECT", "SCORED", "UNSCORED", "SHARE"], lines)
    _show_disagreements(found["disagreements"])
    if found["not_installed"]:
        click.echo(f"\nNot every rule could be applied here. Install: {' '.join(found['not_installed'])}", err=True)


def show(run: Run) -> None:
    """Print the headline numbers of a run and where its page is."""
    found = summary.current(run)
    if "speed" in found:
        _show_speed(run, found["speed"])
        return
    if "training" in found:
        _show_training(run, found)
        return
    made = f"{found['tokens_out']} tokens in" if found["tokens_out"] else "made in"
    click.echo(
        f"\n{found['n_rows']} rows of {found['n_examples']} examples, {found['unscored']} without a score; "
        f"{made} {found['seconds']:.1f} s"
    )
    if "parts" in found:
        _show_parts(found["parts"])
    else:
        _show_blocks(found)
    if noise := found.get("noise"):
        click.echo(
            f"\nNoise: of {noise['n']} rows made again at another batch size, {noise['changed']} gave another answer "
            f"and {noise['flips']} another score."
        )
    for warning in _warnings(found):
        click.echo(f"\nWarning: {warning}")
    click.echo(f"\nRows:    {run.home.rows}\nReport:  {run.home.report}")


def _show_parts(found: dict[str, Any]) -> None:
    """Print the headline of each part; the page has all the others."""
    lines = []
    for task, part in found.items():
        entry = part["metrics"].get(part["headline"], {"value": None, "stderr": None, "ci95": [None, None]})
        numbers = [output.number(entry["value"]), output.number(entry["stderr"]), _interval(entry["ci95"])]
        lines.append([task, str(part["headline"] or "-"), *numbers, f"{part['scored']}/{part['n_rows']}"])
    click.echo("")
    output.columns(["PART", "METRIC", "VALUE", "STDERR", "95 % INTERVAL", "SCORED"], lines)


def _show_blocks(found: dict[str, Any]) -> None:
    """Print every way of choosing, and every metric."""
    selection = found["selection"] if found["tokens_out"] or not found["scored"] else {}  # nothing generated: no choice
    for title, block in (("SELECTION", selection), ("METRIC", found["metrics"])):
        lines = [
            [name, output.number(entry["value"]), output.number(entry["stderr"]), _interval(entry["ci95"])]
            for name, entry in block.items()
        ]
        if lines:
            click.echo("")
            output.columns([title, "VALUE", "STDERR", "95 % INTERVAL"], lines)


def _show_speed(run: Run, block: dict[str, Any]) -> None:
    """Print how fast it was, and what the whole training would cost on what is offered, where a key is here."""
    click.echo(f"\n{block['steps_done']} steps\n")
    output.columns(["SPEED", "VALUE"], [list(pair) for pair in speeds.facts(block)])
    if lines := speeds.priced(block, market.seen()):
        click.echo("")
        output.columns(["ON", "FITS", "HOURS", "USD"], lines)
        how = "at this share of its data sheet's peak" if block["on_gpu"] else f"at {ASSUMED:.0%} of its peak, assumed"
        click.echo(f"Each {how}; the cheapest offer of its kind.")
    click.echo(f"\nReport:  {run.home.report}")


def _show_training(run: Run, found: dict[str, Any]) -> None:
    """Print what a training came to, and how its adapter is used."""
    made = found["training"]
    click.echo(
        f"\n{made['steps_done']} of {made['steps_total']} steps; {made['tokens']} tokens, {made['targets']} of them "
        f"learned, in {made['seconds']:.1f} s\n"
    )
    if made.get("best_step"):
        early = ", which had not become better for as long as `patience` says" if made["stopped_early"] else ""
        click.echo(f"The adapter is that of step {made['best_step']}, the best on the rows held out{early}.\n")
    if verified := made.get("verify_resume"):
        click.echo(f"verify_resume: {plain(verified['words'])}\n")
    names = ("first_loss", "final_loss", "eval_loss", "tokens_per_second", "targets_per_second")
    output.columns(["TRAINING", "VALUE"], [[name, output.number(made[name])] for name in names])
    for warning in found["resolved"].get("warnings", []):
        click.echo(f"\nWarning: {plain(warning)}")
    click.echo(f"\nReport:  {run.home.report}")
    if made["adapter"]:
        model = plain(str(found["model"]))
        click.echo(f"Adapter: {made['adapter']}\nTry it:  --set model={model} --set adapter={made['adapter']}")
    if made.get("tensorboard"):
        click.echo(f"Curves:  tensorboard --logdir {made['tensorboard']}")
    if made.get("merged"):
        click.echo(f"Merged:  {made['merged']}  (a whole model: --set model={made['merged']})")


def show_outs(run: Run) -> None:
    """Print what a command brought home."""
    files = [path for _, path in outs.newest(run.home)]
    click.echo(f"\n{len(files)} files are home in {run.home.out}" if files else "\nNo files came home.")
    for path in files[:_SHOWN]:
        click.echo(f"  {plain(path.relative_to(run.home.out).as_posix())}")
    if len(files) > _SHOWN:
        click.echo(f"  … and {len(files) - _SHOWN} more")


def _warnings(found: dict[str, Any]) -> list[str]:
    """What makes the numbers above doubtful, in words."""
    said = [plain(warning) for warning in found["resolved"].get("warnings", [])]
    for name, entry in found["metrics"].items():
        task, _, last = name.rpartition("/")
        for doubtful, most, words in _DOUBTFUL:
            if last == doubtful and (share := entry["value"] or 0.0) > most:
                said.append(f"{task}{': ' if task else ''}{share:.0%} {words}")
    if words := frozen.in_words(found["run_id"], found.get("frozen")):
        said.append(words)
    if found.get("conflicts"):
        said.append(
            f"{len(found['conflicts'])} rows were made twice, differently, by two machines (for example "
            f"{plain(found['conflicts'][0])}). The first that came home counts; the others are kept below machines/."
        )
    if found["unscored"]:
        said.append(f"{found['unscored']} rows have no score; rows.jsonl says why. They are left out of every number.")
    return said


def _interval(ends: list[float | None]) -> str:
    return f"{output.number(ends[0])} to {output.number(ends[1])}"


def _share(counts: dict[str, int]) -> str:
    return output.number(counts["correct"] / counts["scored"] if counts["scored"] else None, 4)


def _show_disagreements(found: list[dict[str, Any]]) -> None:
    if not found:
        click.echo("\nThe rules agree on every completion.")
        return
    click.echo(f"\nThe rules disagree on {len(found)} completions:")
    for item in found[:_SHOWN]:
        words = ", ".join(
            f"{rule}: {plain(str(item['answers'][rule]))} ({item['scores'][rule]})" for rule in item["answers"]
        )
        click.echo(f"  {item['index']}  {words}")
    if len(found) > _SHOWN:
        click.echo(f"  … and {len(found) - _SHOWN} more; --json gives all of them.")

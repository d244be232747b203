"""`gpu run` and `gpu resume`: start or carry on, follow, and print how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from jobs import spec
from orchestrator import advance, errors, journey, machines, planning, rentals, runs, summary, sync, tenancy, view
from orchestrator.cli import checks, completion, output, results, sharing, wishes
from orchestrator.cli.cloud import agree_to_rent, enforced
from orchestrator.cli.jobs import load
from orchestrator.plain import plain
from orchestrator.runs import Run
from orchestrator.view import View

if TYPE_CHECKING:
    from orchestrator.preflight import Preflight

_PATIENCE_S = 10.0
_SETTING = "A parameter of the job; may be given many times."
AFTER = "gpu.after"
"""Where the words after `--` are kept while a command line is parsed."""
_ASKED = ("settings", "limit", "needs", "outs", "env_names", "gpus", "queue", "environment", "mirror")
_AFTERWARDS = ("terminate", "keep_on_failure")
_WISH = ("machine", "take_over", "queue", "new_code")


def pairs(_ctx: click.Context, _param: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    """Each `key=value` word as key and text (what follows the first `=`); the last word of a key counts."""
    pairs = [word.partition("=") for word in words]
    for key, separator, text in pairs:
        if not separator or not key:
            raise click.BadParameter(f"{key + separator + text!r} is not of the form key=value, such as samples=3")
    return {key: text for key, _, text in pairs}


class Command(click.Command):
    """A command that takes everything after `--` as it is, for another command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the words after the first `--` aside."""
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta[AFTER] = tuple(args[cut + 1 :])
        return super().parse_args(ctx, args[:cut])


@click.command(cls=Command)
@click.argument("name", metavar="[JOB | -- COMMAND…]", required=False, shell_complete=completion.job)
@click.option("--on", "machine", multiple=True, shell_complete=completion.machine, help=sharing.ON)
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, callback=pairs, help=_SETTING)
@click.option("--limit", type=click.IntRange(min=1), help="Take the first N examples only.")
@click.option("--need", "needs", metavar="PATH", multiple=True, help="A file or folder that travels in any case.")
@click.option("--out", "outs", metavar="GLOB", multiple=True, help="Files that a command makes, to be brought home.")
@click.option("--env", "env_names", metavar="NAME", multiple=True, help="A variable of yours that the job gets.")
@click.option("--gpus", type=click.IntRange(min=1), help="How many GPUs of the machine it takes; else all.")
@click.option("--queue", is_flag=True, help="Wait while others have the GPUs.")
@click.option("--environment", type=click.Choice(spec.ENVIRONMENTS), help="What Python packages it gets there.")
@wishes.need
@wishes.caps
@click.option("--machines", type=sharing.COUNT, help=sharing.MACHINES)
@click.option("--mirror", metavar="PATH|hf://REPO", default="", help="Where else its rows are kept while it goes on.")
@click.option("--terminate", is_flag=True, help="Give its machine back once all is home, after a failure too.")
@click.option(
    "--keep-on-failure", type=click.FloatRange(0, 1440), default=0.0, metavar="MIN", help="Then keep it so long."
)
@click.option("--detach", is_flag=True, help="Return once it runs; it goes on by itself.")
@click.option("--dry-run", is_flag=True, help="Check dataset and prompts; generate and rent nothing.")
@click.option("-y", "--yes", is_flag=True, help="Rent, or send more than 2 GB, without asking.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def run(ctx: click.Context, /, name: str | None, **how: Any) -> None:
    """Start a job, or any command of your project, and follow it until all it makes is home.

    \b
    Example:  gpu run eval-gsm8k --limit 20
              gpu run eval-gsm8k --on box --set model=Qwen/Qwen2.5-0.5B-Instruct
              gpu run eval-gsm8k --gpu A100 --budget 5 --terminate
              gpu run eval-gsm8k --gpu A100 --machines 4 --budget 20 --terminate
              gpu run eval-gsm8k --on box --on otherbox
              gpu run --on box --out 'results/*.jsonl' -- python scripts/diagnose.py --deep
    """
    job = _job(name, ctx.meta[AFTER])
    boxes, many = sharing.asked(job, how)
    machine = boxes[0] if boxes else machines.LOCAL if sharing.is_rented(how) else machines.choose(None)
    enforced(output.progress(how["quiet"]), machine)
    asked = planning.Asked(machine=machine, **{key: how[key] for key in (*_ASKED, *_AFTERWARDS)})
    document = planning.request(asked, job)
    asked = _looked_at(asked, document, how, many)
    if how["dry_run"]:
        return
    started = planning.begin(document, sharing.divided(asked, boxes, many), job, size_guard(how["yes"]))
    _announce(started, how, started.record.machine)
    _carry(started, how)


def _looked_at(asked: planning.Asked, document: dict[str, Any], how: dict[str, Any], many: int) -> planning.Asked:
    """What was asked, with what is to be rented for it; a dry run says what is found of it."""
    if sharing.is_rented(how):
        from orchestrator import rehearsal

        rehearsal.look(document, output.progress(how["quiet"]))
        return _rented(asked, document, how, many)
    if how["dry_run"]:
        found = planning.check(document)
        if asked.machine != machines.LOCAL:
            found["engine"] = checks.engine(asked, document, machines.load(asked.machine).worker_python)
        checks.show(found, how["as_json"])
    return asked


def _rented(asked: planning.Asked, document: dict[str, Any], how: dict[str, Any], many: int = 1) -> planning.Asked:
    """What was asked, on machines that are to be rented for it: looked at, and agreed to; nothing is rented yet."""
    from orchestrator import fleet, preflight, renting, tenancy

    say = output.progress(how["quiet"])
    looked = preflight.look(document)
    engine = checks.engine(asked, document, how["python"])
    _say_findings(looked, say, how, engine)
    wish = how.get("wish") or renting.wish(how)
    wish = dataclasses.replace(wish, need=looked.need(wish.need))
    part = fleet.part_of(wish, many)
    account, offer = renting.plan_for(looked, part, say)
    _say_findings(looked.against(offer), say, {**how, "as_json": False})
    lines = renting.in_words(part, account, offer)
    for line in [*lines, *sharing.in_words(wish, many, offer.price_usd_per_hour)]:
        say(line)
    if how["dry_run"]:
        return asked
    agree_to_rent(how["yes"])
    name = tenancy.name_for(document["run_id"])
    renting.check_name(name)
    return dataclasses.replace(asked, machine=name, rents=tenancy.document(wish))


def _say_findings(
    looked: Preflight, say: Callable[[str], None], how: dict[str, Any], engine: dict[str, str | None] | None = None
) -> None:
    """Say what was found of the model; a finding that is an error ends here, before anything is rented."""
    if how["dry_run"] and how["as_json"]:
        output.document({**looked.document(), "engine": engine})
    if how["dry_run"] and engine:
        say(checks.engine_words(engine))
    for line in looked.lines():
        say(line)
    if looked.errors:
        worst = looked.errors[0]
        raise errors.ConfigError(f"{worst.message} Nothing was rented.", worst.hint)


def _job(name: str | None, words: tuple[str, ...]) -> spec.Job:
    """The job that is meant: one of the catalogue, or a command."""
    if (name is None) is (not words):
        raise errors.UsageError(
            "Say either a job or a command." if words else "Say which job, or, after --, which command.",
            "See the jobs: gpu jobs. A command: gpu run -- python train.py",
        )
    return load(name) if name else planning.command(words)


def size_guard(yes: bool) -> Callable[[int], None]:
    """Asks before very much is sent; refuses where nobody can answer."""
    return lambda size: sync.guard(size, yes, lambda words: sys.stdin.isatty() and click.confirm(words, err=True))


@click.command()
@click.argument("name", metavar="[RUN]", required=False, shell_complete=completion.run)
@click.option("--on", "machine", multiple=True, shell_complete=completion.machine, help=sharing.ON)
@wishes.need
@wishes.caps
@click.option("--machines", type=sharing.COUNT, help=sharing.MACHINES)
@click.option("--take-over", is_flag=True, help="Also when the old machine does not answer, or still works on it.")
@click.option("--queue/--no-queue", default=None, help="Wait while others have the GPUs.")
@click.option("--detach", is_flag=True, help="Return once it runs; it goes on by itself.")
@click.option("--new-code", is_flag=True, help="Go on with the worker code installed now; recorded in run.json.")
@click.option("--terminate", is_flag=True, default=None, help="Give its machine back once all is home.")
@click.option("-y", "--yes", is_flag=True, help="Rent, or send more than 2 GB, without asking.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def resume(name: str | None, **how: Any) -> None:
    """Carry on with a run, whatever ended it, here or elsewhere: only what is missing is done.

    \b
    Example:  gpu resume
              gpu resume 20261120-eval-gsm8k-tiny-3f9c --on otherbox
              gpu resume --gpu H100 --terminate
              gpu resume --on box --on otherbox
    """
    found, boxes = runs.find(name), sharing.places(how)
    enforced(output.progress(how["quiet"]), how["machine"] or found.record.machine, *sharing.used(found, boxes))
    found.reload()
    is_shared = sharing.is_shared(found, how, boxes)
    if not is_shared and sharing.is_rented(how):
        how["machine"] = _rented_again(found, how)
    _announce(found, how, ", ".join(boxes) or found.record.machine)
    try:
        with _leaving(found):
            _carry_on(found, how, boxes, is_shared=is_shared)
    except (errors.GpuError, click.exceptions.Exit):
        _show_outcome(found, how)
        raise
    _note_wishes(found, how)
    _carry(found, how)


def _carry_on(found: Run, how: dict[str, Any], boxes: list[str], *, is_shared: bool) -> None:
    """Have a run be gone on with as wished, or look where it stands."""
    if is_shared:
        sharing.resume(found, how, boxes, lambda many: _rented_for(found, how, many))
        return
    journey.carry_on(found, journey.Wish(**{key: how[key] for key in _WISH}, guard=size_guard(how["yes"])))


def _rented_for(found: Run, how: dict[str, Any], many: int) -> dict[str, Any]:
    """What is to be rented for a run that so many machines are to share: as typed, or else as it was asked before."""
    kept = None if sharing.is_rented(how) else tenancy.wish(found)
    document = {**found.job(), "run_id": f"again-{tenancy.next_name(found)}"}
    asked = planning.Asked(machine=machines.LOCAL, settings={})
    return _rented(asked, document, {**how, "dry_run": False, "wish": kept}, many).rents


def _note_wishes(found: Run, how: dict[str, Any]) -> None:
    """Keep what was asked of a resumed run's machine: that it goes back, or that the run has left what is rented."""
    if how["machine"] and not found.record.machines and rentals.find(how["machine"]) is None:
        found.save(rents={})
    if how["terminate"] is not None and found.record.state != "sealed":
        found.save(terminate=how["terminate"])


def _rented_again(found: Run, how: dict[str, Any]) -> str:
    """The name of a machine that is to be rented for a run there is already; nobody is asked for it yet."""
    from orchestrator import tenancy

    asked = planning.Asked(machine=machines.LOCAL, settings={})
    document = {**found.job(), "run_id": f"again-{tenancy.next_name(found)}"}
    rented = _rented(asked, document, {**how, "dry_run": False})
    found.save(rents=rented.rents)
    tenancy.begin(found, rented.machine)
    return rented.machine


def _announce(run: Run, how: dict[str, Any], machine: str) -> None:
    """Say the run's id first of all: with it, everything else can be found."""
    if how["as_json"]:
        return
    many = run.record.machines
    where = (
        f"{many} machines"
        if many > 1 and machine == run.record.machine
        else "this computer"
        if machine == machines.LOCAL
        else machine
    )
    click.echo(run.run_id if how["quiet"] else f"{run.run_id}  {run.record.job} on {where}")


def _carry(run: Run, how: dict[str, bool]) -> None:
    """Bring the run home (or, detached, just started) and print how it stands."""
    say = output.progress(how["quiet"] or how["as_json"])
    failure: errors.GpuError | None = None
    try:
        with _leaving(run):
            if run.record.machines:
                _crew(run, how)
            else:
                tenancy.carry(run, lambda: _go(run, how), say)
    except errors.GpuError as error:
        failure = error
    finally:
        _show_outcome(run, how)
    tenancy.tell_end(run)
    if failure or not how["detach"]:
        with _leaving(run):
            _after(run, say, failure)
    _say_left(run)
    if failure:
        raise failure
    for left in sharing.left(run) if run.record.machines else journey.gather(run) if run.record.former else ():
        click.echo(f"{left} did not answer, and may still work on {run.run_id}; ask again: gpu pull", err=True)
    if run.record.state in runs.ENDED:
        advance.raise_if_not_done(run)


def _after(run: Run, say: Callable[[str], None], failure: errors.GpuError | None) -> None:
    """Give back what was rented for it, where that was asked for; should that fail, what came before is said, too."""
    from orchestrator import fleet

    try:
        (fleet if run.record.machines else tenancy).after(run, say, failure)
    except errors.GpuError:
        if failure:
            click.echo(plain(f"Error: {failure.message}\n{failure.hint}"), err=True)
        raise


def _say_left(run: Run) -> None:
    """Say what goes on costing money, however quiet the command is to be."""
    from orchestrator import fleet

    if words := (fleet if run.record.machines else tenancy).left(run):
        click.echo(words, err=True)


def _crew(run: Run, how: dict[str, Any]) -> None:
    """Have several machines bring it home, or only have each set off, with what a person sees meanwhile."""
    from orchestrator import crew

    crew.carry(run, crew.Manner(lambda: _watching(run, how), _waiting(run), how["detach"]))


def _go(run: Run, how: dict[str, bool]) -> None:
    """Bring it home, or only have it set off, with what a person sees meanwhile."""
    meter = tenancy.Meter(run.record.machine)
    with _watching(run, how) as news:

        def watched(frame: dict[str, Any], data: bytes) -> None:
            meter()
            news(frame, data)

        if how["detach"]:
            journey.set_off(run, news)
        else:
            journey.go(run, watched, _waiting(run))


def _show_outcome(run: Run, how: dict[str, bool]) -> None:
    """Print where the run stands now; a script gets its one document whatever happened."""
    is_command = run.job()["story"] == "command"
    ended = run.record.state in runs.ENDED and (run.record.rows_home > 0 or run.record.steps_done > 0 or is_command)
    if how["as_json"]:
        found = summary.current(run) if ended else None
        output.document({**advance.document(run), "folder": str(run.home.folder), "summary": found})
    elif ended and is_command:
        results.show_outs(run)
    elif ended:
        results.show(run)
    elif how["detach"] and not how["quiet"]:
        click.echo(f"Follow it:             gpu logs -f {run.run_id}\nBring its rows home:   gpu pull {run.run_id}")


@contextlib.contextmanager
def _watching(run: Run, how: dict[str, bool]) -> Iterator[View]:
    """What a person sees meanwhile: of a command, what it prints; of a job, how far it is."""
    silent = how["quiet"] or how["as_json"]
    if run.job()["story"] == "command" and not silent:
        with output.text(run.record.env_names) as echo:
            yield view.Listening(echo)
    else:
        with view.watching(run.home.rows, silent) as news:
            yield news


def _waiting(run: Run) -> Callable[[float], None]:
    """Says, once, that another process follows the run and seems to take its time."""
    said: list[str] = []

    def idle(seconds: float) -> None:
        if seconds >= _PATIENCE_S and not said:
            said.append(f"Process {journey.follower(run)} follows this run already; waiting for it.")
            click.echo(said[0], err=True)

    return idle


@contextlib.contextmanager
def _leaving(run: Run) -> Iterator[None]:
    """Ctrl-C leaves the run as it is and says how to carry on."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(
            f"\nLeft {run.run_id} as it is; it may go on by itself.\n"
            f"Carry on:  gpu resume {run.run_id}\nStop it:   gpu stop {run.run_id}",
            err=True,
        )
        _say_left(run)
        raise click.exceptions.Exit(errors.INTERRUPTED) from None

"""Several machines for one run, as they are asked for on the command line: `--machines N`, or `--on` more than once."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from jobs import spec
from orchestrator import errors, fleet, ledger, machines, planning, renting, runs, shares, sharing, tenancy
from orchestrator.cli import output, wishes
from orchestrator.runs import Run

_NOTHING = "Nothing was started."
COUNT = click.IntRange(1, sharing.MACHINES_MAX)
ON = "The machine; `local` is this computer. Several of these share the run."
MACHINES = "How many machines are rented to share the run; 1 unless said."


def places(how: dict[str, Any]) -> list[str]:
    """The machines named by `--on`, each once; `how["machine"]` is the only one, or None, from then on.

    UsageError for what does not go together with them, or where `--machines` says nothing.
    """
    names: tuple[str, ...] = how["machine"]
    boxes = [machines.choose(name) for name in names]
    how["machine"] = boxes[0] if len(boxes) == 1 else None
    if twice := {name for name in boxes if boxes.count(name) > 1}:
        raise errors.UsageError(f"--on {min(twice)} is said twice: each machine has one share. {_NOTHING}")
    if len(boxes) > sharing.MACHINES_MAX:
        raise errors.UsageError(f"At most {sharing.MACHINES_MAX} machines share a run. {_NOTHING}")
    if how["machines"] is not None and boxes:
        raise errors.UsageError(
            f"--machines says how many are rented, and --on names those there are: say one of them. {_NOTHING}",
            "For example: --on a --on b, or: --gpu A100 --machines 2",
        )
    if boxes and is_rented(how):
        raise errors.UsageError("Say either --on NAME or what to rent, not both. Nothing was rented.")
    _refuse_idle_wishes(how)
    return boxes


def _refuse_idle_wishes(how: dict[str, Any]) -> None:
    """Raise UsageError for a cap, or a wish about a machine, that would not be kept, and be believed to hold."""
    typed = [] if is_rented(how) else wishes.typed(click.get_current_context())
    if typed:
        raise errors.UsageError(
            f"{typed[0]} is for a machine that is rented for the run, and none is asked for. Nothing was started.",
            "Say what to rent: --gpu NAME. One that was launched keeps the caps of its launch.",
        )


def is_rented(how: dict[str, Any]) -> bool:
    """Whether a machine, or several, are to be rented."""
    return bool(how["gpu"] or how["type_name"])


def number(how: dict[str, Any], boxes: list[str], most: int | None) -> int:
    """How many machines are to share a run that has `most` examples to make; that there are fewer of these is said."""
    wanted = how["machines"] or max(len(boxes), 1)
    if most is None or wanted <= max(most, 1):
        return wanted
    words = f"{most} examples are missing, so {most} of {wanted} machines are used." if most else "Nothing is missing."
    output.progress(how["quiet"])(words)
    return max(most, 1)


def asked(job: spec.Job, how: dict[str, Any]) -> tuple[list[str], int]:
    """The machines named for a new run, and how many are to share it."""
    boxes = places(how)
    if how["machines"] is not None and not is_rented(how):
        raise errors.UsageError(
            f"--machines says how many are rented, and nothing says what. {_NOTHING}",
            "For example: --gpu A100 --machines 2. Machines there are: --on a --on b",
        )
    many = number(how, boxes, how["limit"])
    if many > 1:
        shares.check_can_share(job)
    return boxes[:many], many


def divided(asked: planning.Asked, boxes: list[str], many: int) -> planning.Asked:
    """The same for several machines: what is to be shared is packed for travelling if any of them is elsewhere."""
    if many < 2:
        return asked
    first = next((name for name in boxes if name != machines.LOCAL), asked.machine)
    return dataclasses.replace(asked, machine=first, boxes=tuple(boxes), machines=many)


def in_words(wish: renting.Wish, many: int, price_usd_per_hour: float) -> list[str]:
    """What several machines mean, in plain words; nothing for one."""
    if many < 2:
        return []
    hours = fleet.part_of(wish, many).caps.hours(price_usd_per_hour)
    cost = "WITHOUT LIMIT" if hours is None else f"at most {ledger.shown(many * hours * price_usd_per_hour)} USD in all"
    return [f"{many} of these at the same time: {ledger.shown(many * price_usd_per_hour)} USD/h, {cost}."]


def resume(run: Run, how: dict[str, Any], boxes: list[str], rent: Any) -> None:
    """Let a run that several machines share, or are to, be gone on with: as it is, or divided anew as was asked.

    `rent`: asks what is to be rented for how many machines, and returns it as the run's record keeps it.
    """
    shares.check_can_share(run.job())
    kept = run.record.rents if how["machines"] is not None and not boxes else {}
    if not boxes and not is_rented(how) and not kept:
        if how["machines"] is not None:
            raise errors.UsageError(
                f"--machines says how many are rented, and {run.run_id} runs on machines there are. {_NOTHING}",
                "Name them: --on a --on b. Or say what to rent: --gpu A100 --machines 2",
            )
        sharing.again(run, new_code=how["new_code"], queue=how["queue"])
        return
    if run.record.state == "sealed":
        return
    many = number(how, boxes, sharing.missing(run))
    changes: dict[str, Any] = {"queue": run.record.queue if how["queue"] is None else how["queue"]}
    if boxes:
        changes |= {"machine": boxes[0], "rents": {}}
        if machines.LOCAL in boxes:
            planning.check_interpreter(run.record.environment or "none")
    else:
        changes |= {"machine": tenancy.name_for(run.run_id), "rents": rent(many)}
    wish = sharing.Division(many, boxes[:many], how["take_over"], how["new_code"], changes)
    sharing.divide(run, wish)


def used(run: Run, boxes: list[str]) -> list[str]:
    """The machines that a resume of a run is about to use, as far as they are known."""
    return [*boxes, *(share.record.machine for share in runs.shares(run)), *(rental.name for rental in fleet.live(run))]


def is_shared(run: Run, how: dict[str, Any], boxes: list[str]) -> bool:
    """Whether a run that is resumed so is one of several machines."""
    return bool(run.record.machines) or len(boxes) > 1 or (how["machines"] or 1) > 1


def left(run: Run) -> list[str]:
    """Machines that may still work on shares which others have had since."""
    parts = [run, *runs.shares(run)]
    return sorted({entry["machine"] for part in parts for entry in part.record.former if not entry["settled"]})

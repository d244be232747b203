"""The story of giving a machine back: rows home first, then the end asked for until the provider says gone, twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from orchestrator import clock, inventory, journey, ledger, machines, market, outcome, providers, rescue, runs, user_ssh
from orchestrator.errors import (
    AuthRejected,
    ConfigError,
    GpuError,
    MayCost,
    NotNoted,
    NotReturned,
    ProviderDown,
    RateLimited,
    Refused,
    UsageError,
)
from orchestrator.plain import plain
from orchestrator.providers.base import Instance, Provider
from orchestrator.rentals import ENDED, Rental

_PATIENCE_S = 900.0
_POLL_S = 5.0
_ASK_AGAIN_S = 30.0
_TWICE_S = 5.0
"""Between the two answers that an instance is gone."""
_GRACE_S = 30.0
_LOOK_S = 30.0
_SHOWN_MAX = 10
Say = Callable[[str], None]


def give_back(rental: Rental, provider: Provider, say: Say, *, discard: bool = False) -> None:
    """Bring home what is on a machine, then end it. Raises UsageError while something there is not home.

    One that was outbid is ended with what can be rescued: it would wake by itself, and bill twice.
    `discard`: what cannot be brought home is given up.
    """
    if rental.record.state in ENDED:
        return
    if not discard and not rescue.is_due(rental, provider):
        _refuse_stopped(rental)
        _bring_home(rental)
    end(rental, provider, say, rescues=not discard)


def _refuse_stopped(rental: Rental) -> None:
    """Raise UsageError when a stopped machine has rows that are not home: nobody can read them before it is started."""
    if rental.record.state == "stopped" and (left := inventory.not_home(rental.name)):
        raise UsageError(
            f"{rental.name} is stopped, and has rows of {', '.join(left)} that are not home. It was not given back, "
            "and its disk goes on costing money.",
            f"Start it again, then give it back: gpu wait {rental.name}. To give up what is there: gpu terminate "
            f"{rental.name} --discard",
        )


def _bring_home(rental: Rental) -> None:
    """Pull every run that may have something on the machine; UsageError naming those that are not home after that."""
    why = ""
    for name in inventory.not_home(rental.name):
        try:
            journey.refresh(runs.find(name))
        except GpuError as error:
            why = f" {error.message}"
    if left := inventory.not_home(rental.name):
        raise UsageError(
            f"{', '.join(left)} may still run on {rental.name}, or have rows there that are not home.{why} "
            "It was not given back, and goes on costing money.",
            f"Stop it first: gpu stop {left[0]}. To give up what is there: gpu terminate {rental.name} --discard",
        )

    if strangers := _strangers(rental):
        raise UsageError(
            f"{', '.join(strangers)} on {rental.name} was not begun from this computer, which cannot bring home what "
            "is there. It was not given back, and goes on costing money.",
            f"Pull it where it was begun. To give up what is there: gpu terminate {rental.name} --discard",
        )


def _strangers(rental: Rental) -> list[str]:
    """The runs on a machine, as far as it can be asked, of which nothing was ever known here."""
    with contextlib.suppress(GpuError), machines.at(rental.name) as machine:
        told = machine.call(["ls", "-1", f"{machine.root}/runs"], b"", _LOOK_S).decode("utf-8", "replace")
        return [plain(name) for name in told.splitlines() if name and not runs.is_remembered(name)][:_SHOWN_MAX]
    return []


def stop_runs(rental: Rental) -> None:
    """Stop what runs on a machine, as far as that can be done; what has left it goes on where it is now."""
    for run in [runs.find(name) for name in inventory.not_home(rental.name)]:
        with contextlib.suppress(GpuError, OSError):
            if run.record.machine != rental.name:
                journey.gather(run)
            elif run.record.state in ("pushed", "running"):
                journey.stop(run, _GRACE_S)


def at_deadline(rental: Rental, provider: Provider, say: Say) -> None:
    """End a machine whose time is over: workers stopped cleanly and rows pulled as far as that can be done."""
    stop_runs(rental)
    for name in inventory.not_home(rental.name):
        say(f"{name} may have rows on {rental.name} that are not home; its hard deadline is over.")
    end(rental, provider, say)


def end(rental: Rental, provider: Provider, say: Say, *, rescues: bool = True) -> None:
    """Ask for the end of the instance until the provider says, twice, that it is gone. Raises NotReturned.

    `rescues`: one that was outbid is copied from first, for a short time, and never again once its end is noted.
    May be repeated at any time. Without an instance there is nothing to end; a request without an answer is looked
    for first, and LaunchUnknown raised while it stays unknown.
    """
    if rental.record.state == "launching" and rental.record.instance_id is None:
        outcome.settle(rental, provider, say)
    if rental.record.state in ENDED:
        return
    if rental.record.instance_id is None:
        rental.save(state="gone")
        return
    is_outbid = rescues and rescue.is_due(rental, provider)
    rental.note(state="stopping")  # first: whoever comes after a crash ends it, and does nothing else
    if is_outbid:
        rescue.fetch(rental, provider, say)
    say(f"giving {rental.name} back")
    _until_gone(rental, provider)
    try:
        rental.is_gone()
        tidy(rental, provider, say)
    except OSError as error:
        raise NotNoted(
            f"{rental.name} is gone, by its provider's own word, and costs nothing more. That cannot be noted here: "
            f"{error.strerror}.",
            f"Free some space, or have {rental.folder} writable, then again: gpu terminate {rental.name}",
        ) from None


def _until_gone(rental: Rental, provider: Provider) -> None:
    """Return once two answers, some seconds apart, say that the instance is gone."""
    deadline = clock.monotonic() + _PATIENCE_S
    asked_at, gone, why = -_ASK_AGAIN_S, 0, ""
    while gone < 2:
        if clock.monotonic() > deadline:
            raise not_returned(rental, provider, why)
        try:
            if gone == 0 and clock.monotonic() >= asked_at + _ASK_AGAIN_S:
                asked_at = clock.monotonic()
                provider.terminate(rental.record.instance_id or "")
            found = provider.get(rental.record.instance_id or "")
        except (AuthRejected, Refused) as error:
            raise not_returned(rental, provider, error.message) from None
        except (ProviderDown, RateLimited, NotReturned) as error:
            gone, why = 0, error.message
        else:
            gone = gone + 1 if _is_gone(rental, found) else 0
            why = f"it is listed as {plain(found.raw_state)}" if found else why
        if gone < 2:
            clock.sleep(_TWICE_S if gone else _POLL_S)


def _is_gone(rental: Rental, found: Instance | None) -> bool:
    """Whether an answer says so. Not to be listed counts for one that was seen before, or that had time to appear.

    That time begins when the paid request was answered: it may have waited long for its turn after it was noted.
    """
    if found is not None:
        if rental.record.raw_state is None:
            rental.note(raw_state=found.raw_state)
        with contextlib.suppress(GpuError, OSError):  # a disk that takes nothing must not keep it from its end
            rental.costs_as(found)
        return found.state == "gone"
    launched_at = clock.parse(rental.record.launched_at).timestamp() if rental.record.launched_at else 0.0
    return rental.record.raw_state is not None or clock.timestamp() > launched_at + outcome.SETTLED_S


def not_returned(rental: Rental, provider: Provider, why: str) -> NotReturned:
    """The error of a machine that may still cost money: which, how much, and where to look."""
    price = rental.price_usd_per_hour
    cost = f"{ledger.shown(price)} USD/h" if price is not None else "an unknown price"
    return NotReturned(
        f"{rental.name} (instance {rental.record.instance_id}, {rental.in_words()}) MAY STILL COST {cost}: its "
        f"provider has not said that it is gone. {why}",
        f"Again: gpu terminate {rental.name}. Or end it by hand: {provider.dashboard}",
    )


def goes_on(rental: Rental, error: GpuError | OSError, hint: str = "") -> GpuError:
    """The error of a command while a machine may cost money: an error of another kind would say that nothing does."""
    known = error if isinstance(error, GpuError) else ConfigError(f"{rental.folder}: {error}.")
    if isinstance(known, (MayCost, NotNoted)) or not rental.may_cost:
        return known
    cloud, price = providers.PROVIDERS.get(rental.record.provider), rental.price_usd_per_hour or 0.0
    what = f"{rental.name} (instance {rental.record.instance_id or 'not known yet'}, {rental.in_words()})"
    look = f"Or look: {cloud.dashboard}" if cloud else ""
    return MayCost(
        f"{known.message} {what} MAY GO ON COSTING {ledger.shown(price)} USD/h.",
        f"{hint or known.hint or f'Again: gpu terminate {rental.name}'} {look}",
    )


def tidy(rental: Rental, provider: Provider, say: Say) -> None:
    """Take away what the machine leaves: its public key in the account, its name in the user's ssh, its keys here."""
    _remove_key(rental, provider)
    with contextlib.suppress(GpuError):
        user_ssh.undo(rental.name, Path.home())
    for left in ("machine.json", "host_key.pub", "host_key", "key.pub", "key"):  # keys are made all, or none
        (rental.folder / left).unlink(missing_ok=True)
    for name in inventory.not_home(rental.name):
        journey.machine_is_gone(runs.find(name), rental.name, say)


def remove_key(rental: Rental) -> None:
    """Take the machine's public key out of the account it was last asked for in, before another one is asked."""
    with contextlib.suppress(GpuError):
        _remove_key(rental, market.account_of(rental))
    rental.save(key_name="")


def take_key_out(rental: Rental) -> None:
    """The same where nothing is rented; a key that cannot be taken out now is remembered, and gpu clean takes it."""
    with contextlib.suppress(GpuError):
        if rental.record.key_name:
            _remove_key(rental, market.account_of(rental))


def _remove_key(rental: Rental, provider: Provider) -> None:
    with contextlib.suppress(GpuError):  # costs nothing; gpu clean takes it away later
        if rental.record.key_name:
            provider.remove_key(rental.record.key_name)
            rental.save(key_name="")


def receipt(rental: Rental) -> list[str]:
    """What the machine was, how long, and what came of it: lines for a person."""
    leases = rental.leases()
    hours = sum(lease.hours() for lease in leases)
    usd = sum(lease.usd() for lease in leases)
    on_it = (run for run in runs.everywhere() if run.record.machine == rental.name and not run.record.machines)
    rows = sum(run.record.rows_home for run in on_it)
    lines = [
        f"{rental.name}: {rental.in_words()}, {hours:.2f} h, about {ledger.shown(usd)} USD (an estimate that rounds up)"
    ]
    if rows:
        lines.append(f"{rows} rows came home from it: {ledger.shown(usd / rows * 1000, 3)} USD per 1,000 rows")
    return lines

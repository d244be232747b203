"""Machines as `gpu status` shows them: from records, asking nobody unless told to."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from jobs import locks
from orchestrator import guarding, ledger, machines, rentals, runs
from orchestrator.errors import ConfigError, GpuError, NotReachable
from orchestrator.machines import Record
from orchestrator.rentals import ENDED, Rental
from orchestrator.runs import Run


def document(record: Record, on_it: list[str]) -> dict[str, Any]:
    """A machine as `gpu status --json` gives it. A machine of one's own has no provider and costs nothing here."""
    known = machines.news(record.name)
    return {
        "name": record.name,
        "provider": None,
        "instance_id": None,
        "state": "ready",
        "raw_state": None,
        "gpu": record.gpu,
        "price_usd_per_hour": None,
        "price_now_usd_per_hour": None,
        "launched_at": None,
        "ssh": {"user": record.user, "host": record.host, "port": record.port},
        "guard": {"armed": False, "deadline": None, "how": None},
        "cost_usd": 0.0,
        "runs": on_it,
        "reachable": known.get("reachable"),
        "last_seen": known.get("last_seen"),
    }


_STATES = {"refused": "gone"}
"""Ours, as `gpu status` has them."""


def of_rental(rental: Rental, on_it: list[str]) -> dict[str, Any]:
    """A rented machine as `gpu status --json` gives it."""
    record, known = rental.record, machines.news(rental.name)
    address = {"user": record.user, "host": record.host, "port": record.port} if record.host else None
    offer = record.offer
    return {
        "name": record.name,
        "provider": record.provider,
        "instance_id": record.instance_id,
        "state": _STATES.get(record.state, record.state),
        "raw_state": record.raw_state,
        "gpu": f"{offer['count']}x {offer['gpu']}" if offer.get("gpu") else None,
        "price_usd_per_hour": rental.price_usd_per_hour,
        "price_now_usd_per_hour": rental.price_now if rental.may_cost else 0.0,
        "launched_at": record.launched_at,
        "ssh": address,
        "guard": guarding.document(rental),
        "cost_usd": rental.usd(),
        "runs": on_it,
        "reachable": known.get("reachable") if record.state not in ENDED else False,
        "last_seen": known.get("last_seen"),
    }


def documents(name: str | None) -> list[dict[str, Any]]:
    """Every machine, or the one named: boxes of one's own, and rented ones."""
    rented = {rental.name: rental for rental in rentals.known()}
    if name:
        records, rented = [], {key: value for key, value in rented.items() if key == name}
        records = [] if rented else [machines.load(name)]
    else:
        records = [record for record in machines.known() if record.name not in rented]
    found = [document(record, runs_on(record.name)) for record in records]
    return [*found, *(of_rental(rental, runs_on(rental.name)) for rental in rented.values())]


def refresh(name: str | None) -> None:
    """Ask every machine, or the one named, whether it answers, and each provider where its instances stand."""
    for record in [machines.load(name)] if name and not rentals.find(name) else machines.known():
        if name in (None, record.name):
            ask(record)
    for rental in rentals.known():
        if name in (None, rental.name) and rental.may_cost and rental.record.instance_id:
            _refresh(rental)


def _refresh(rental: Rental) -> None:
    """Ask where an instance stands, and note it, unless another command is at it: that one's record would be undone."""
    from orchestrator import market, on_machine  # not for a status that asks nobody

    instance_id = rental.record.instance_id or ""
    found = market.account_of(rental).get(instance_id)
    with contextlib.suppress(ConfigError), rental.locked():
        if rental.record.instance_id != instance_id or not rental.may_cost:
            return
        if found is not None or rental.record.raw_state is not None:  # one never seen yet has not ceased to be
            rental.save(raw_state=found.raw_state if found else "not listed")
        if found is not None:
            rental.costs_as(found)
        is_stopped = found is not None and found.state == "stopped" and not rental.offer().spot
        if is_stopped and rental.record.state == "ready":
            rental.save(state="stopped")
        if rental.record.guard in guarding.ON_MACHINE and rental.record.state == "ready":
            with contextlib.suppress(NotReachable):  # not unguarded for that: what it said last stands
                on_machine.read_back(rental)


def warnings() -> list[str]:
    """What a person should know about the money that machines cost just now: who guards each, and what is past."""
    found = []
    for rental in rentals.known():
        if rental.may_cost:
            found.append(f"{rental.name}: {guarding.in_words(rental)}")
        if rental.record.state == "stopped":
            found.append(
                f"{rental.name} is stopped, and GOES ON COSTING {ledger.shown(rental.price_now or 0.0, 4)} USD/h for "
                f"its disk. Go on there: gpu wait {rental.name}. Give it back: gpu terminate {rental.name}"
            )
        if guarding.is_past(rental):
            found.append(
                f"{rental.name} IS PAST ITS DEADLINE and may still cost money. Type: gpu terminate {rental.name}"
            )
    return found


def line(entry: dict[str, Any]) -> list[str]:
    """A machine's line in the table."""
    address = "{user}@{host}:{port}".format(**entry["ssh"]) if entry["ssh"] else "-"
    answers = {True: "yes", False: "no", None: "?"}[entry["reachable"]]
    price = entry["price_usd_per_hour"]
    costs = ["-", "-"] if price is None else [ledger.shown(price), ledger.shown(entry["cost_usd"])]
    words = [entry["name"], entry["state"], address, entry["gpu"] or "-", *costs, answers, entry["last_seen"] or "-"]
    return [*words, " ".join(entry["runs"]) or "-"]


def runs_on(name: str) -> list[str]:
    """The ids of the runs whose record, or that of one of their shares, names that machine."""
    return [run.run_id for run in runs.remembered() if any(part.record.machine == name for part in runs.workers(run))]


def not_home(name: str) -> list[str]:
    """The ids of the runs, and shares, that may still work on that machine, or have something there, not at home."""
    return [run.run_id for run in runs.everywhere() if _is_not_home(run, name)]


def _is_not_home(run: Run, name: str) -> bool:
    if any(entry["machine"] == name and not entry["settled"] for entry in run.record.former):
        return True
    if run.record.machines:  # its shares are there, or not
        return False
    begins = run.record.state == "planned" and locks.is_held(run.home.lock)
    return run.record.machine == name and (begins or run.record.state in ("pushed", "running"))


def ask(record: Record) -> None:
    """Find out whether a machine answers now, by a fresh connection, and remember it."""
    machines.note(record.name, reach(record.name) is None)


def reach(name: str) -> str | None:
    """Why a machine cannot be used now, in words; None when it answers."""
    from orchestrator import ssh

    record = machines.load(name)
    try:
        with ssh.SshMachine(machines.folder(name), Path(record.root), record.python) as machine:
            machine.call(["true"], b"", ssh.CONNECT_S)
    except GpuError as error:
        return error.message
    return None

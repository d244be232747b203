"""Records of rented machines: on the disk before each act, one to a name, and no damage passed over as a machine."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, locks
from orchestrator import clock, enrolment, inventory, ledger, machines, rentals, ssh_config
from orchestrator.enrolment import Asked
from orchestrator.errors import ConfigError, UsageError
from orchestrator.ledger import Lease
from orchestrator.providers.base import Need, Offer
from orchestrator.rentals import ENDED, Caps, Rental, Terms
from tests.cloud import Cloud

OFFER = Offer("lambda", "x@r", "x", "A10 PCIe", 1, 24.0, 1, 1.0, 1.0, "r", price_usd_per_hour=0.6)
TERMS = Terms(Need(gpu="A10"), Caps(2.0, 30.0, 5.0), "reaper", "/opt/python")
STATUS_KEYS = "name provider instance_id state raw_state gpu price_usd_per_hour launched_at ssh guard cost_usd runs"
STATUS_KEYS += " reachable last_seen price_now_usd_per_hour"
_CREATE = """
import sys
from orchestrator import rentals
from orchestrator.errors import UsageError
from orchestrator.providers.base import Need
from orchestrator.rentals import Caps, Terms
try:
    rentals.create("box", sys.argv[1], Terms(Need(), Caps(), "laptop"))
except UsageError:
    sys.exit(2)
"""


def made(name: str = "box", **changes: Any) -> Rental:
    rental = rentals.create(name, "lambda", TERMS)
    if changes:
        rental.save(**changes)
    return rental


def asked(rental: Rental, marker: str = "gpu-1", at: float | None = None) -> None:
    rental.save(state="launching", marker=marker, offer=vars(OFFER), asked_at=at or clock.timestamp())


def again(name: str = "box") -> Rental:
    found = rentals.find(name)
    assert found is not None
    return found


def test_a_record_comes_back_as_it_was() -> None:
    """Another process reads what was asked for, on what terms, and where it stands."""
    rental = made()
    asked(rental)
    found = again()
    assert found.record == rental.record
    assert (found.need(), found.caps(), found.offer()) == (TERMS.need, TERMS.caps, OFFER)
    assert (found.record.guard, found.record.python, found.price_usd_per_hour) == ("reaper", "/opt/python", 0.6)
    assert found.may_cost


def test_what_is_not_on_the_disk_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full, a change did not happen: neither in the file nor for the process that wanted it."""
    rental = made()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(durable, "save_json", full)
        with pytest.raises(OSError, match="No space"):
            asked(rental)
        assert (rental.record.state, rental.may_cost) == ("planned", False)
        with pytest.raises(ConfigError, match=r"cannot be written.*Nothing was rented"):
            made("other")
    assert again().record == rental.record


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"name": "box"}', "\x00" * 500])
def test_a_damaged_record_is_said(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is an error that names the file and warns of money; it hides no other, and its name is not taken over."""
    damaged, sound = made(), made("sound")
    (damaged.folder / "rental.json").write_text(text)
    with pytest.raises(ConfigError, match="may go on costing money"):
        rentals.find("box")
    with pytest.raises(ConfigError):
        made("box")
    assert [rental.name for rental in rentals.known()] == [sound.name]
    assert str(damaged.folder) in capsys.readouterr().err


@pytest.mark.parametrize("field", ["offer", "caps", "need"])
def test_a_part_that_is_none_is_damage_too(field: str) -> None:
    """A record is not read with an offer, caps or a need that could not be one."""
    rental = made()
    asked(rental)
    document = durable.load_json(rental.folder / "rental.json")
    for wrong in ({"surprise": 1}, "text", 5, [1]):
        durable.save_json(rental.folder / "rental.json", {**document, field: wrong})
        with pytest.raises(ConfigError, match="damaged"):
            rentals.find("box")


def test_a_newer_version_may_have_written_more() -> None:
    """Fields nobody knows are passed over."""
    rental = made()
    document = durable.load_json(rental.folder / "rental.json")
    durable.save_json(rental.folder / "rental.json", {**document, "surprise": {"level": 1}})
    assert again().record == rental.record


@pytest.mark.parametrize("state", ["planned", "launching", "booting", "ready", "stopping"])
def test_a_name_is_taken_until_its_machine_is_gone(state: str) -> None:
    """While a machine may be rented, no other has its name, nor is it added over or forgotten."""
    rental = made(state=state)
    with pytest.raises(UsageError, match=f"it is {state}"):
        made()
    with pytest.raises(UsageError, match="box is rented"):
        enrolment.add(Asked("box", ssh_config.Address("someone", "127.0.0.1", 1)))
    durable.save_json(rental.folder / "machine.json", vars(_record()))
    with pytest.raises(UsageError, match="box is rented"):
        enrolment.forget("box")
    assert again().record == rental.record


@pytest.mark.parametrize("state", ENDED)
def test_a_name_is_free_again(state: str) -> None:
    """After its end a name may be used anew, and nothing of the old folder is left in the new one."""
    rental = made(state=state, instance_id="a1")
    (rental.folder / "key").write_text("old")
    new = made()
    assert (new.record.state, new.record.instance_id) == ("planned", None)
    assert [path.name for path in new.folder.iterdir()] == ["rental.json"]


def test_a_box_of_ones_own_is_not_rented_over() -> None:
    """A name of gpu add is taken as well."""
    durable.have_folder(machines.folder("box"))
    machines.save(_record())
    with pytest.raises(UsageError, match="There is a machine box already"):
        made()


def _record() -> machines.Record:
    words = {"system": "", "gpu": None, "gpus": 0, "key": None, "key_in_agent": False, "fingerprint": ""}
    where = {"user": "u", "host": "127.0.0.1", "port": 1, "root": "/r", "python": "p", "worker_python": None}
    return machines.Record(name="box", added_at="", **words, **where)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "local", "../x", "a/b", ".hidden", "-y", "a b", "x" * 64, "ä", "a\n"])
def test_a_name_cannot_lead_elsewhere(name: str) -> None:
    """What cannot be a machine's name makes no folder anywhere."""
    with pytest.raises(UsageError, match="cannot be the name"):
        made(name)


def test_of_two_processes_one_gets_the_name() -> None:
    """Created by several processes at once, a record is of exactly one of them, and whole."""
    words = [sys.executable, "-c", _CREATE]
    processes = [subprocess.Popen([*words, f"cloud-{number}"], cwd=Path.cwd()) for number in range(4)]
    assert sorted(process.wait(60) for process in processes) == [0, 2, 2, 2]
    assert again().record.provider.startswith("cloud-")


def test_one_command_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is at a machine another is told so; it then reads what the first one left."""
    monkeypatch.setattr(rentals, "_LOCK_WAIT_S", 0.05)
    rental, other = made(), again()
    with rental.locked():
        rental.save(state="ready")
        with pytest.raises(ConfigError, match="Another command"), other.locked():
            pass
    with other.locked():
        assert other.record.state == "ready"


def test_a_cost_begins_with_the_request() -> None:
    """The ledger knows of an instance before the record says that it exists, from when it was asked for."""
    rental = made()
    asked(rental, at=1_000_000.0)
    rental.exists("a1")
    (lease,) = ledger.leases()
    assert (lease.opened_at, lease.instance_id, lease.price_usd_per_hour) == (1_000_000.0, "a1", 0.6)
    rental.exists("a1")
    assert len(ledger.leases()) == 1
    rental.is_gone()
    assert ledger.leases()[0].closed_at is not None
    assert (again().record.state, again().may_cost) == ("gone", False)


def test_a_machine_costs_what_it_cost_alone() -> None:
    """Bad machines tried under a record count for it and against its budget; an earlier one of the name does not."""
    ledger.open_lease(Lease("gpu-0", "box", "lambda", 100.0, clock.timestamp() - 7200))
    ledger.close_lease("gpu-0", clock.timestamp() - 3600)
    rental = made()
    assert (rental.usd(), rental.caps_left()) == (0, TERMS.caps)
    for marker in ("gpu-1", "gpu-2"):
        asked(rental, marker, at=clock.timestamp() + 1)
        rental.exists(marker)
        ledger.close_lease(marker, clock.timestamp() + 3600)
    assert rental.usd() == pytest.approx(1.2, abs=0.03)
    hours = pytest.approx((TERMS.caps.max_hours or 0.0) - 2, abs=0.03)
    assert rental.caps_left() == replace(TERMS.caps, budget_usd=pytest.approx(3.8, abs=0.03), max_hours=hours)
    rental.save(caps=vars(Caps(None, None, 1.0)))
    assert rental.caps_left().budget_usd == 0
    assert rental.caps_left().hours(0.6) == 0


def test_a_look_undoes_nothing(light_cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another command did to a record while its provider was asked where it stands is not written over."""
    rental, answer = made(state="booting", instance_id="a1", raw_state="booting"), light_cloud.core.handle

    def handle(*words: Any) -> Any:
        again().save(state="gone", gone_at=5.0)
        return answer(*words)

    monkeypatch.setattr(light_cloud.core, "handle", handle)
    inventory.refresh("box")
    assert light_cloud.core.count("/instances/a1") == 1
    assert (again().record.state, again().record.gone_at, again().record.raw_state) == ("gone", 5.0, "booting")
    assert rental.record.state == "booting"


def test_which_machine_is_meant() -> None:
    """The one named, or the only one that may cost money; else the error says which there are."""
    with pytest.raises(UsageError, match="there are: none"):
        rentals.choose(None)
    made("old", state="gone")
    made("one")
    assert rentals.choose(None).name == "one"
    assert rentals.choose("old").name == "old"
    made("two")
    with pytest.raises(UsageError, match="one, two"):
        rentals.choose(None)
    with pytest.raises(UsageError, match="There is no rented machine 'tow'"):
        rentals.choose("tow")


def test_documents_have_exactly_the_promised_keys() -> None:
    """A rented machine, planned, ready or refused, and a box of one's own have the keys of the contract."""
    planned = made("planned")
    ready = made(
        "ready", offer=vars(OFFER), state="ready", host="198.51.100.1", user="ubuntu", deadline=1_800_000_000.0
    )
    made("no", state="refused")
    durable.have_folder(machines.folder("box"))
    machines.save(_record())
    found = {entry["name"]: entry for entry in inventory.documents(None)}
    assert set(found) == {"planned", "ready", "no", "box"}
    for entry in found.values():
        assert set(entry) == set(STATUS_KEYS.split())
        assert set(entry["guard"]) == {"armed", "deadline", "how"}
    assert found["planned"]["ssh"] is None
    assert found["ready"]["ssh"] == {"user": "ubuntu", "host": "198.51.100.1", "port": 22}
    assert found["ready"]["guard"] == {"armed": True, "deadline": "2027-01-15T08:00:00Z", "how": "reaper"}
    assert found["no"]["state"] == "gone"
    assert (found["box"]["provider"], found["box"]["cost_usd"]) == (None, 0.0)
    assert inventory.documents("ready") == [inventory.of_rental(ready, [])]
    assert planned.record.state == "planned"


def test_a_name_is_taken_until_its_old_machine_is_tidied_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who ends a machine may still be at its folder: no other one takes its place before; and no lock outlives that."""
    monkeypatch.setattr(rentals, "_LOCK_WAIT_S", 0.05)
    old = made(state="gone")
    with old.locked(), pytest.raises(ConfigError, match="Another command"):
        rentals.create("box", "lambda", TERMS)
    late = again()
    waiting = os.open(late.folder / "rental.lock", os.O_RDWR)
    new = made()
    monkeypatch.setattr(locks, "take", lambda *_: waiting)
    with pytest.raises(ConfigError, match="Another command"), late.locked():
        pass
    assert again().record == new.record

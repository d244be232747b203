"""What `gpu clean` takes away, and what it never does: what a run, or any laptop's machine, still needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from orchestrator import agents, cleaning, clock, config, inventory, machines, providers, rentals
from orchestrator.providers.base import Need, Offer, Order, new_marker
from orchestrator.rentals import Caps, Rental, Terms
from orchestrator.runs import Run
from tests.cloud import Cloud, Timings
from tests.orchestrator.providers.loopback import Time

DAY = 86_400.0
SEEN_S, ENDED_S = 5.0, 60.0


@dataclass
class Account:
    """An account, with the clock it is looked at by."""

    cloud: Cloud
    time: Time

    def key(self, age_s: float) -> str:
        """A public key that some laptop has put there so long ago; its name."""
        at = clock.timestamp() - age_s
        marker = new_marker(_iso(at))
        self.cloud.core.account.keys[marker] = {"id": marker, "name": marker, "public_key": f"ssh-ed25519 {marker}"}
        return marker

    def names(self) -> set[str]:
        """Of all keys there."""
        return {str(key["name"]) for key in self.cloud.core.account.keys.values()}


def _iso(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.fixture
def account(light_cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Account:
    time = Time()
    time.install(monkeypatch)
    monkeypatch.setattr(light_cloud.core, "clock", lambda: time.now)
    return Account(light_cloud, time)


def made(name: str, state: str, **changes: object) -> Rental:
    rental = rentals.create(name, "lambda", Terms(Need(), Caps(), "laptop"))
    rental.save(state=state, **changes)
    return rental


def clean() -> list[str]:
    left = cleaning.look()
    cleaning.remove(left)
    return [name for _, name in left.keys]


def test_only_old_keys_of_ours_that_nobody_uses_go(account: Account) -> None:
    """A key goes when it bears a marker from over a day ago and neither an instance nor a record here uses it."""
    forgotten = account.key(2 * DAY)
    fresh = account.key(0.9 * DAY)
    recorded = account.key(3 * DAY)
    made("mine", "planned", key_name=recorded)
    keys = account.cloud.core.account.keys
    for name in ("mine", "gpu-laptop", "gpu-20200101t000000-xyz", f"{forgotten}-2"):
        keys[name] = {"id": name, "name": name, "public_key": "ssh-ed25519 AAAA"}
    kept = account.names() - {forgotten}
    assert clean() == [forgotten]
    assert account.names() == kept >= {fresh, recorded}
    assert not cleaning.look()


def test_the_key_of_a_live_instance_stays(account: Account) -> None:
    """However old, a key that any listed instance was launched with stays until that is gone, whoever launched it."""
    key = account.key(30 * DAY)
    account.cloud.core.timings = Timings(term_s=30.0)
    cloud = providers.open("lambda")
    offer: Offer = next(entry for entry in cloud.offers(Need()) if entry.available and entry.count == 1)
    instance_id = cloud.launch(offer, Order(new_marker(_iso(clock.timestamp())), key, ""))
    account.time.sleep(SEEN_S)
    assert clean() == []
    cloud.terminate(instance_id)
    assert clean() == [], "it is still there, and terminating"
    account.time.sleep(ENDED_S)
    assert clean() == [key]


def test_the_key_of_a_machine_that_is_gone_goes_at_once(account: Account) -> None:
    """However new, a key that a machine recorded here as gone has left behind is of no more use."""
    left, other = account.key(60.0), account.key(61.0)
    made("mine", "gone", key_name=left)
    assert clean() == [left]
    assert account.names() == {other}


def test_worker_code_that_no_run_keeps_goes(account: Account, counting_run: Callable[..., Run]) -> None:
    """Old snapshots go, but not those of a run, the installed one, or what is younger than a day."""
    kept = counting_run().record.agent
    store = config.state_folder() / "agents"
    installed = agents.keep(store)
    for name in ("0123456789abcdef", "fedcba9876543210", ".new-x"):
        (store / name).mkdir()
    for path in store.iterdir():
        os.utime(path, (0, 0) if path.name != "fedcba9876543210" else None)
    clean()
    assert {path.name for path in store.iterdir() if path.is_dir()} == {kept, installed, "fedcba9876543210"}


@pytest.mark.parametrize("fault", ["failed", "bad-key", "null-data", "proxy-page"])
def test_what_cannot_be_asked_is_not_cleaned(account: Account, fault: str) -> None:
    """While the instances cannot be listed, no key is called unused; folders here are cleaned all the same."""
    key = account.key(2 * DAY)
    made("old", "gone")
    account.cloud.fault(fault, when="GET /instances$", times=None)
    left = cleaning.look()
    assert (left.machines, left.keys) == (["old"], [])
    assert account.names() == {key}


def test_folders_of_machines_that_are_gone_go(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder goes once its machine has ended and nothing that was on it is missing at home; others stay."""
    for state in ("planned", "launching", "booting", "ready", "stopping"):
        made(state, state)
    for state in rentals.ENDED:
        made(state, state)
    made("rows", "gone")
    monkeypatch.setattr(inventory, "not_home", lambda name: ["a run"] if name == "rows" else [])
    clean()
    left = {rental.name for rental in rentals.known()}
    assert left == {"planned", "launching", "booting", "ready", "stopping", "rows"}
    assert not machines.folder("gone").exists()


def test_a_key_that_went_meanwhile_is_success(account: Account) -> None:
    """Two laptops may clean at once: what the other has removed is removed."""
    key = account.key(2 * DAY)
    left = cleaning.look()
    account.cloud.core.account.keys.clear()
    cleaning.remove(left)
    assert [name for _, name in left.keys] == [key]
    assert [words for words in left.words() if key in words]


def test_a_machine_rented_since_the_look_stays(account: Account) -> None:
    """Between the look and the yes another machine of that name was rented: its keys and its record stay."""
    made("box", "gone")
    left = cleaning.look()
    assert left.machines == ["box"]
    again = made("box", "booting", instance_id="a1")
    (again.folder / "key").write_text("a key")
    cleaning.remove(left)
    assert (again.folder / "key").exists()
    found = rentals.find("box")
    assert found is not None
    assert found.record.instance_id == "a1"

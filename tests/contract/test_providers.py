"""Every cloud keeps the same promises to whoever rents there: those of orchestrator.providers.base."""

from __future__ import annotations

import re
import typing

import pytest

from orchestrator import guarding, providers
from orchestrator.errors import (
    AuthRejected,
    GpuError,
    LaunchUnknown,
    NoCapacity,
    ProviderDown,
    RateLimited,
    Refused,
)
from orchestrator.providers.base import Instance, Need, Provider, State, marked_at
from tests.contract import clouds
from tests.contract.clouds import ASKING, CHANGING, CLOUDS, KEY, OF_NOBODY, OTHER_KEY, PAID, Rented
from tests.orchestrator.providers.loopback import closed_port

LOST = ["lost-502", "lost-closed", "lost-half", "lost-empty", "null-data"]
BROKEN = ["failed", "error", "closed", "empty", "proxy-page", "redirect"]


def test_every_cloud_is_held_to_this() -> None:
    """The suite runs over each cloud of the table, and asks each method of the interface."""
    assert set(CLOUDS) == set(providers.PROVIDERS)
    methods = {name for name, value in vars(Provider).items() if callable(value) and not name.startswith("_")}
    assert methods - {"launch"} - OF_NOBODY == set(ASKING)


def test_it_says_who_it_is(rented: Rented) -> None:
    """A name as in the table, a page for people, an address that a guard may ask, and how long a boot takes."""
    account = rented.account
    assert providers.PROVIDERS[account.name]
    assert account.dashboard == providers.PROVIDERS[account.name].dashboard
    assert account.dashboard.startswith("https://")
    assert all(60 < seconds < 7200 for seconds in account.active_s)
    assert account.guard in (None, *guarding.OF_CLOUDS)
    assert account.api_url.startswith(rented.cloud.url)
    assert all(0 < minutes < 120 for minutes in account.boot_minutes)
    assert 0 < account.let_in_s < 600
    assert rented.cloud.key not in repr(account) + repr(vars(account))


def test_offers_are_whole(rented: Rented) -> None:
    """Every machine is offered with its price; to ask rents nothing."""
    found = rented.account.offers(Need())
    assert {offer.available for offer in found} == {True, not rented.kind.lists_what_is_taken}
    assert all(offer.provider == rented.account.name and offer.price_usd_per_hour > 0 for offer in found)
    assert all((offer.gpu is None) == (offer.count == 0) for offer in found)
    assert len({offer.offer_id for offer in found}) == len(found)
    assert all(offer.machine_id or offer.region for offer in found if offer.available)
    assert rented.cloud.core.instances == {}


@pytest.mark.parametrize("rented", [name for name, kind in CLOUDS.items() if kind.account_has_keys], indirect=True)
def test_the_same_key_is_one_name(rented: Rented) -> None:
    """A public key is in the account once, whatever it is called and who asks; another one is another."""
    name = rented.account.ensure_key(KEY, "gpu-one")
    assert rented.account.ensure_key(f"{KEY} somebody@laptop", "gpu-two") == name
    other = rented.account.ensure_key(OTHER_KEY, "gpu-two")
    assert sorted(rented.account.key_names()) == sorted([name, other])
    assert name != other


@pytest.mark.parametrize("rented", [name for name, kind in CLOUDS.items() if kind.account_has_keys], indirect=True)
def test_a_key_is_removed_and_may_be_absent(rented: Rented) -> None:
    """What is removed is gone, alone; to remove it again, or what never was, is success."""
    names = [rented.account.ensure_key(KEY, "gpu-one"), rented.account.ensure_key(OTHER_KEY, "gpu-two")]
    for name in (names[0], names[0], "never-there"):
        rented.account.remove_key(name)
    assert rented.account.key_names() == [names[1]]


def test_a_key_is_kept_only_where_it_is_listed(rented: Rented) -> None:
    """The same key has the same name, and is listed if the account has it; removed, no key of ours is left there."""
    name = rented.account.ensure_key(KEY, "gpu-one")
    assert rented.account.ensure_key(KEY, "gpu-one") == name
    assert rented.account.key_names() == ([name] if rented.kind.account_has_keys else [])
    rented.account.remove_key(name)
    assert rented.account.key_names() == []


def test_a_key_is_let_in(rented: Rented) -> None:
    """Named in the order and admitted, as often as one likes, a public key is let into its machine; no other one is."""
    instance_id = rented.rent()
    for _ in range(3):
        rented.account.admit(instance_id, f"{KEY} somebody@laptop")
    rented.time.advance(60)
    (instance,) = rented.cloud.core.ours()
    assert {" ".join(line.split()[:2]) for line in rented.kind.lets_in(instance, rented.time.now)} == {KEY}


def test_a_machine_from_launch_to_gone(rented: Rented) -> None:
    """It bears its marker, its key and its tags; it is asked to end, twice if need be, until nobody knows of it."""
    offer, order = rented.offer(), rented.order()
    instance_id = rented.account.launch(offer, order)
    rented.time.advance(5)
    found = rented.account.get(instance_id)
    assert found is not None
    assert [found] == rented.account.instances()
    assert (found.instance_id, found.marker, found.state) == (instance_id, order.marker, "ready")
    assert (found.type_name, found.region) == (offer.type_name, offer.region)
    assert found.price_usd_per_hour == rented.about(offer.price_usd_per_hour)
    assert found.key_names == ((order.key_name,) if rented.kind.account_has_keys else ())
    assert found.tags.items() >= order.tags.items()
    assert found.host
    assert marked_at(order.marker) == 1_800_000_000.0
    rented.account.terminate(instance_id)
    rented.account.terminate(instance_id)
    ending = rented.account.get(instance_id)
    assert ending is None or ending.state in ("stopping", "gone")
    rented.time.advance(60)
    assert rented.account.get(instance_id) is None
    assert rented.account.instances() == []
    rented.account.terminate(instance_id)
    assert rented.cloud.core.still_billing() == []
    assert rented.paid_calls() == 1


@pytest.mark.parametrize("fault", [*LOST, *BROKEN])
def test_a_launch_without_an_answer_is_never_asked_again(rented: Rented, fault: str) -> None:
    """Exactly one request is sent, and the error says that a machine may cost money: what was made bears the marker."""
    offer, order = rented.offer(), rented.order()
    rented.cloud.fault(fault, when=PAID)
    with pytest.raises(LaunchUnknown) as caught:
        rented.account.launch(offer, order)
    assert rented.paid_calls() == 1
    assert order.marker in caught.value.message
    assert caught.value.exit_code == 20
    rented.time.advance(5)
    made = [order.marker] if fault in LOST else []
    assert [instance.marker for instance in rented.account.instances()] == made


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("no-capacity", NoCapacity),
        ("quota", Refused),
        ("inactive", Refused),
        ("bad-key", AuthRejected),
        ("rate-limited-json", RateLimited),
        ("rate-limited-text", RateLimited),
    ],
)
def test_a_launch_that_is_refused(rented: Rented, fault: str, kind: type[GpuError]) -> None:
    """A no is one request, an error of its own kind that says that nothing was rented, and nothing is."""
    offer, order = rented.offer(), rented.order()
    rented.cloud.fault(fault, when=PAID, times=None)
    with pytest.raises(kind, match="Nothing was rented") as caught:
        rented.account.launch(offer, order)
    assert type(caught.value) is kind
    assert rented.paid_calls() == 1
    assert rented.cloud.core.instances == {}


def test_a_cloud_that_is_not_reached_did_nothing(rented: Rented, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens, nothing was sent: not even a launch is unclear then."""
    offer, order = rented.offer(), rented.order()
    monkeypatch.setenv(rented.kind.address_variable, f"http://127.0.0.1:{closed_port()}/none")
    away = providers.open(rented.account.name)
    for ask in (
        lambda: away.launch(offer, order),
        away.instances,
        lambda: away.terminate(rented.kind.absent_id),
        lambda: away.get(rented.kind.absent_id),
    ):
        with pytest.raises(ProviderDown):
            ask()


@pytest.mark.parametrize(("rented", "what"), clouds.asked(), indirect=["rented"])
@pytest.mark.parametrize("fault", ["failed", "closed", "empty", "proxy-page", "redirect"])
def test_no_trouble_is_an_answer(rented: Rented, what: str, fault: str) -> None:
    """A provider that is out of order has said nothing: no method returns, none says that a machine is gone."""
    rented.rent()
    rented.cloud.fault(fault, times=None)
    with pytest.raises(GpuError) as caught:
        ASKING[what](rented)
    assert type(caught.value) is clouds.trouble(what)
    assert len(rented.cloud.core.still_billing()) == 1


@pytest.mark.parametrize(("rented", "what"), clouds.answered_here(), indirect=["rented"])
def test_what_asks_nobody_cannot_fail(rented: Rented, what: str) -> None:
    """Where a cloud need not be asked it is not, so that its trouble is none; what cannot be done there is Refused."""
    rented.rent()
    rented.cloud.fault("closed", times=None)
    before = len(rented.cloud.core.calls)
    if what in ("stop", "start") and not rented.account.can_stop:
        with pytest.raises(Refused, match="Nothing was rented or changed"):
            ASKING[what](rented)
    else:
        ASKING[what](rented)
    assert len(rented.cloud.core.calls) == before


@pytest.mark.parametrize(("rented", "what"), clouds.asked_with_key(), indirect=["rented"])
def test_a_wrong_key_is_never_gone(rented: Rented, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is not accepted is that error of every method, with no word of the key in it."""
    rented.rent()
    monkeypatch.setenv(rented.kind.key_variable, "wr0ng-Key-0123456789")
    rented.account = providers.open(rented.account.name)
    with pytest.raises(AuthRejected) as caught:
        ASKING[what](rented)
    assert "wr0ng" not in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    ("rented", "what"),
    [pair for pair in clouds.asked() if pair[1] not in ("check_key", "gate")],  # asked once, and say at once
    indirect=["rented"],
)
def test_what_may_be_asked_again_is(rented: Rented, what: str) -> None:
    """Two answers that were lost, and a limit, are not told to the caller of what costs nothing."""
    rented.rent()
    rented.cloud.fault("rate-limited-text", detail=3)
    rented.cloud.fault("failed" if what not in ("ensure_key", "start") else "rate-limited-json", times=2)
    ASKING[what](rented)


def test_none_is_only_for_what_surely_is_not(rented: Rented) -> None:
    """An id that the provider says it does not know is None; a machine that is, is shown, whatever its state."""
    instance_id = rented.rent()
    assert rented.account.get(rented.kind.absent_id) is None
    rented.cloud.core.instances[instance_id].powered_off = True
    found = rented.account.get(instance_id)
    assert found is not None
    assert found.state == rented.kind.powered_off


def test_what_cannot_be_an_id_is_not_asked_for(rented: Rented) -> None:
    """Nothing that could lead elsewhere becomes part of an address, and it is not `gone` either."""
    before = len(rented.cloud.core.calls)
    for wrong in ("", "../ssh-keys", "a/b", "a b", "a\n"):
        for ask in (rented.account.get, rented.account.terminate):
            with pytest.raises(Refused):
                ask(wrong)
    assert len(rented.cloud.core.calls) == before


def test_others_machines_are_listed_without_a_marker(rented: Rented) -> None:
    """Whatever else the account has is shown, and is nobody's of ours: not by a name that is nearly a marker."""
    mine = rented.rent()
    names = [None, "", "training", "gpu-mine", "gpu-20270115t080000-0123456789ab-x", "GPU-20270115T080000-0123456789AB"]
    for name in names:
        rented.cloud.core.add_foreign(name)
    found = rented.account.instances()
    assert len(found) == len(names) + 1
    assert [instance.instance_id for instance in found if instance.marker] == [mine]


@pytest.mark.parametrize("fault", ["unknown-fields", "null-fields", "bare-instances", "clock-skew"])
def test_answers_may_change_in_form(rented: Rented, fault: str) -> None:
    """Fields nobody knows, nulls and missing fields break nothing: what is needed is still there."""
    instance_id = rented.rent()
    rented.cloud.fault(fault, times=None)
    for ask in set(ASKING) - CHANGING:
        ASKING[ask](rented)
    (found,) = rented.account.instances()
    assert rented.offered is not None
    assert found.instance_id == instance_id
    assert found.price_usd_per_hour == rented.about(rented.offered.price_usd_per_hour)
    assert found.state in typing.get_args(State)
    rented.account.terminate(instance_id)
    rented.time.advance(60)
    assert rented.cloud.core.still_billing() == []


def test_a_state_nobody_knows_costs_money(rented: Rented) -> None:
    """A new word of the provider's is `unknown`, shown as it is, and listed like all that may cost."""
    rented.cloud.fault("odd-status", detail="hibernating")
    instance_id = rented.rent()
    (listed,) = rented.account.instances()
    for found in (listed, rented.account.get(instance_id)):
        assert isinstance(found, Instance)
        assert (found.state, found.raw_state) == ("unknown", "hibernating")


@pytest.mark.parametrize("fault", ["terminate-ignored", "nothing-terminated", "terminate-late"])
def test_asking_for_the_end_is_not_the_end(rented: Rented, fault: str) -> None:
    """Terminate returns when the request is taken, whatever its answer lists; only a look tells what came of it."""
    instance_id = rented.rent()
    rented.cloud.fault(fault, seconds=30.0)
    rented.account.terminate(instance_id)
    found = rented.account.get(instance_id)
    assert (found is not None and found.state == "ready") == (fault != "nothing-terminated")
    rented.account.terminate(instance_id)
    rented.time.advance(60)
    assert rented.account.get(instance_id) is None
    assert rented.cloud.core.still_billing() == []


def test_storage_is_in_words(rented: Rented) -> None:
    """What goes on costing beside machines has a line each; nothing, none."""
    assert rented.account.storage() == []
    rented.cloud.core.add_storage("models")
    (line,) = rented.account.storage()
    assert re.search(rented.kind.storage_word, line)

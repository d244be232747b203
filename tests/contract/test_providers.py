"""Every cloud keeps the same promises to whoever rents there: those of orchestrator.providers.base."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from orchestrator import guarding, providers
from orchestrator.errors import (
    AuthRejected,
    GpuError,
    LaunchUnknown,
    NoCapacity,
    NotReturned,
    ProviderDown,
    RateLimited,
    Refused,
)
from orchestrator.providers.base import Instance, Need, Offer, Order, Provider, State, marked_at, new_marker
from tests.cloud import Cloud
from tests.orchestrator.providers.loopback import Time, closed_port

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T"
OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60U"
CLOUDS = {
    "lambda": ("light_cloud", "LAMBDA_API_KEY", "GPU_LAMBDA_URL"),
    "vast": ("light_vast", "VAST_API_KEY", "GPU_VAST_URL"),
}
"""Each cloud with the fixture that plays it, and where its key and its address are given."""
PAID = "launch"
"""Found in the paid call of every cloud, as its stand-in names it."""
LOST = ["lost-502", "lost-closed", "lost-half", "lost-empty", "null-data"]
BROKEN = ["failed", "error", "closed", "empty", "proxy-page", "redirect"]


@dataclass
class Rented:
    """A cloud, and the stand-in that plays it on a clock that only waiting moves."""

    account: Provider
    cloud: Cloud
    time: Time
    key_variable: str
    address_variable: str

    def offer(self) -> Offer:
        """The cheapest machine with one GPU that is free."""
        found = [offer for offer in self.account.offers(Need()) if offer.available and offer.count == 1]
        return min(found, key=lambda offer: offer.price_usd_per_hour)

    def order(self) -> Order:
        """An order with a new marker, and a key that is in the account."""
        name = self.account.ensure_key(KEY, "gpu-tests")
        return Order(new_marker("2027-01-15T08:00:00Z"), name, "#!/bin/sh\n", {"gpu-name": "box"})

    def rent(self) -> str:
        """The id of a machine that is rented now, and has appeared."""
        instance_id = self.account.launch(self.offer(), self.order())
        self.time.advance(5)
        return instance_id

    def paid_calls(self) -> int:
        """How many paid requests came."""
        return self.cloud.core.count(PAID)


@pytest.fixture(params=CLOUDS)
def rented(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rented:
    """Each cloud in turn."""
    fixture, key_variable, address_variable = CLOUDS[request.param]
    cloud: Cloud = request.getfixturevalue(fixture)
    time = Time()
    time.install(monkeypatch)
    monkeypatch.setattr(cloud.core, "clock", lambda: time.now)
    return Rented(providers.open(request.param), cloud, time, key_variable, address_variable)


ASKING: dict[str, Callable[[Rented], object]] = {
    "offers": lambda it: it.account.offers(Need()),
    "ensure_key": lambda it: it.account.ensure_key(OTHER_KEY, "other"),
    "key_names": lambda it: it.account.key_names(),
    "remove_key": lambda it: it.account.remove_key("gpu-tests"),
    "get": lambda it: it.account.get(it.cloud.core.ours()[0].instance_id),
    "instances": lambda it: it.account.instances(),
    "terminate": lambda it: it.account.terminate(it.cloud.core.ours()[0].instance_id),
    "storage": lambda it: it.account.storage(),
    "check_key": lambda it: it.account.check_key(),
}
"""Every method that asks every cloud, but for launch, each asked of an account that has one machine."""
OF_SOME = {"overridden", "start_script", "admit", "host_key", "stop", "start", "credit"}
"""Methods for which some clouds need not be asked."""


def test_every_cloud_is_held_to_this() -> None:
    """The suite runs over each cloud of the table, and asks each method of the interface."""
    assert set(CLOUDS) == set(providers.PROVIDERS)
    methods = {name for name, value in vars(Provider).items() if callable(value) and not name.startswith("_")}
    assert methods - {"launch"} - OF_SOME == set(ASKING)


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
    assert rented.cloud.key not in repr(account) + repr(vars(account))


def test_offers_are_whole(rented: Rented) -> None:
    """Every machine is offered with its price, those that are not free too; to ask rents nothing."""
    found = rented.account.offers(Need())
    assert {offer.available for offer in found} == {True, False}
    assert all(offer.provider == rented.account.name and offer.price_usd_per_hour > 0 for offer in found)
    assert all((offer.gpu is None) == (offer.count == 0) for offer in found)
    assert len({offer.offer_id for offer in found}) == len(found)
    assert all(offer.region for offer in found if offer.available)
    assert rented.cloud.core.instances == {}


def test_the_same_key_is_one_name(rented: Rented) -> None:
    """A public key is in the account once, whatever it is called and who asks; another one is another."""
    name = rented.account.ensure_key(KEY, "gpu-one")
    assert rented.account.ensure_key(f"{KEY} somebody@laptop", "gpu-two") == name
    other = rented.account.ensure_key(OTHER_KEY, "gpu-two")
    assert sorted(rented.account.key_names()) == sorted([name, other])
    assert name != other


def test_a_key_is_removed_and_may_be_absent(rented: Rented) -> None:
    """What is removed is gone, alone; to remove it again, or what never was, is success."""
    names = [rented.account.ensure_key(KEY, "gpu-one"), rented.account.ensure_key(OTHER_KEY, "gpu-two")]
    for name in (names[0], names[0], "never-there"):
        rented.account.remove_key(name)
    assert rented.account.key_names() == [names[1]]


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
    assert found.price_usd_per_hour == offer.price_usd_per_hour
    assert found.key_names == (order.key_name,)
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
    monkeypatch.setenv(rented.address_variable, f"http://127.0.0.1:{closed_port()}/none")
    away = providers.open(rented.account.name)
    for ask in (
        lambda: away.launch(offer, order),
        away.instances,
        lambda: away.terminate("a1"),
        lambda: away.get("a1"),
    ):
        with pytest.raises(ProviderDown):
            ask()


@pytest.mark.parametrize("what", ASKING)
@pytest.mark.parametrize("fault", ["failed", "closed", "empty", "proxy-page", "redirect"])
def test_no_trouble_is_an_answer(rented: Rented, what: str, fault: str) -> None:
    """A provider that is out of order has said nothing: no method returns, none says that a machine is gone."""
    rented.rent()
    rented.cloud.fault(fault, times=None)
    with pytest.raises((ProviderDown, NotReturned)) as caught:
        ASKING[what](rented)
    assert isinstance(caught.value, NotReturned if what == "terminate" else ProviderDown)
    assert len(rented.cloud.core.still_billing()) == 1


@pytest.mark.parametrize("what", ASKING)
def test_a_wrong_key_is_never_gone(rented: Rented, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is not accepted is that error of every method, with no word of the key in it."""
    rented.rent()
    monkeypatch.setenv(rented.key_variable, "wr0ng-Key-0123456789")
    rented.account = providers.open(rented.account.name)
    with pytest.raises(AuthRejected) as caught:
        ASKING[what](rented)
    assert "wr0ng" not in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("what", sorted(set(ASKING) - {"check_key"}))  # which is asked once, and says at once
def test_what_may_be_asked_again_is(rented: Rented, what: str) -> None:
    """Two answers that were lost, and a limit, are not told to the caller of what costs nothing."""
    rented.rent()
    rented.cloud.fault("rate-limited-text", detail=3)
    rented.cloud.fault("failed" if what != "ensure_key" else "rate-limited-json", times=2)
    ASKING[what](rented)


def test_none_is_only_for_what_surely_is_not(rented: Rented) -> None:
    """An id that the provider says it does not know is None; a machine that is, is shown, whatever its state."""
    instance_id = rented.rent()
    assert rented.account.get("0" * 32) is None
    rented.cloud.core.instances[instance_id].powered_off = True
    found = rented.account.get(instance_id)
    assert found is not None
    assert found.state == "unhealthy"


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
    for ask in (name for name in ASKING if name != "terminate"):
        ASKING[ask](rented)
    (found,) = rented.account.instances()
    assert (found.instance_id, found.price_usd_per_hour) == (instance_id, rented.offer().price_usd_per_hour)
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
    rented.cloud.core.account.add_file_system(b'{"name": "models", "region": "us-east-1"}')
    (line,) = rented.account.storage()
    assert "models" in line

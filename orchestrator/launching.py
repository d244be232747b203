"""The story of renting a machine: intent on the disk, one paid request, its outcome found out, then up to ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from orchestrator import (
    clock,
    enrolment,
    guarding,
    inventory,
    market,
    money,
    notices,
    offers,
    outcome,
    readiness,
    returning,
)
from orchestrator.errors import (
    AuthRejected,
    ConfigError,
    GpuError,
    LaunchFailed,
    LaunchUnknown,
    MayCost,
    NoCapacity,
    ProviderDown,
    RateLimited,
    Refused,
    Unusable,
    UsageError,
)
from orchestrator.providers import base
from orchestrator.providers.base import MARKER_TAG, HostKey, Offer, Order, Provider
from orchestrator.rentals import ENDED, Rental

_BAD_MACHINES_MAX = 4
_REQUESTS_MAX = 40
_CAPACITY_EVERY_S = 30.0
_CAPACITY_LOOKS_MAX = 20_000
_LIMITED_S = 45.0
"""Providers have been seen to list a machine only half a minute after they made it."""
_LIMIT = "rate limit"
"""Stands for an offer among what was tried: no offer is excluded by it, but it counts."""
BAD = "bad: "
"""How the reason begins for which an offer is not tried again, ever, for this machine."""
Say = Callable[[str], None]


def launch(rental: Rental, say: Say, *, wait_capacity: bool = False) -> None:
    """Go on with a machine until it is ready, or ended, from wherever it stands. **Spends money**, once a request.

    Raises NoCapacity, Refused, AuthRejected, ProviderDown (nothing is rented), LaunchFailed (it was given back),
    LaunchUnknown and other MayCost (something may cost money; the record says what). Dying anywhere in it leaves a
    record that `launch` goes on with, or `gpu audit --fix` gives back.
    """
    while rental.record.state not in ("ready", *ENDED):
        advance(rental, say, wait_capacity=wait_capacity)


def advance(rental: Rental, say: Say, *, wait_capacity: bool = False) -> None:
    """Do the one next step. Dying anywhere in it is mended by doing it again.

    Whatever goes wrong while something may cost money is a MayCost: an error of another kind says that nothing does.
    """
    try:
        _advance(rental, say, wait_capacity=wait_capacity)
    except (GpuError, OSError) as error:
        if isinstance(error, MayCost) or not rental.may_cost:
            raise
        words = f"Go on with it: gpu wait {rental.name}. Give it back: gpu terminate {rental.name}."
        raise returning.goes_on(rental, error, words) from None


def _advance(rental: Rental, say: Say, *, wait_capacity: bool) -> None:
    if rental.record.state == "planned":
        ask(rental, *_next(rental, say, wait_capacity=wait_capacity), say)
        return
    provider = market.account_of(rental)
    if rental.record.state == "launching":
        outcome.settle(rental, provider, say)
    elif rental.record.state == "booting":
        climb(rental, provider, say)
    elif rental.record.state == "stopped":
        wake(rental, provider, say)
    elif rental.record.state == "stopping":
        returning.end(rental, provider, say)


def wake(rental: Rental, provider: Provider, say: Say) -> None:
    """Have a stopped machine started again, then up to ready as after a launch. **Spends money.**

    Raises NoCapacity, turned into MayCost by who calls it, while others have its GPUs: its disk goes on costing.
    """
    say(f"{rental.name} was stopped; it is started again")
    asked_at = clock.timestamp()
    provider.start(rental.record.instance_id or "")
    rental.wakes(asked_at)
    rental.save(state="booting", raw_state=None, guard_seen={})


def _next(rental: Rental, say: Say, *, wait_capacity: bool) -> tuple[Provider, Offer]:
    """The cheapest offer of any cloud that was not tried in vain, and whose it is. NoCapacity when none is (left)."""
    clouds = {account.name: account for account in market.clouds_of(rental)}
    if len(rental.record.tried) >= _REQUESTS_MAX:
        raise _given_up(rental, NoCapacity(f"{_REQUESTS_MAX} requests came to nothing. Nothing is rented."))
    why: GpuError
    for look in range(_CAPACITY_LOOKS_MAX if wait_capacity else 1):
        try:
            found = offers.suitable(market.listed(list(clouds.values()), rental.need()), rental.need())
            left = [offer for offer in found if not _was_tried(rental, offer)]
            if left:
                if look:
                    notices.tell("capacity_found", machine=rental.name, offer=offers.in_words(left[0]))
                return clouds[left[0].provider], left[0]
            why = NoCapacity(
                f"All {len(found)} offers that fit came to nothing: {_tried(rental)}. Nothing is rented.",
                "Ask for another kind: gpu offers. Or wait for one: gpu launch … --wait-capacity",
            )
            words = f"all {len(found)} that fit came to nothing before"
        except NoCapacity as error:
            why, words = error, "no capacity yet"
        except (AuthRejected, Refused) as error:
            raise _given_up(rental, error) from None
        except (ProviderDown, RateLimited) as error:  # a night's wait outlasts an hour without the provider
            why, words = error, "its provider cannot be asked just now"
        if wait_capacity:
            say(f"\r{words} ({look + 1}); looking again in {_CAPACITY_EVERY_S:.0f} s. Ctrl-C ends it")
            rental.save(tried=[entry for entry in rental.record.tried if entry["why"].startswith(BAD)])
            clock.sleep(_CAPACITY_EVERY_S)
    raise _given_up(rental, why)


def _check(rental: Rental, offer: Offer, provider: Provider) -> None:
    """Raise ConfigError or UsageError, recorded, unless what is left of the budget and all limits allow the offer."""
    try:
        market.check_clock(provider)
        money.check(offer, rental.caps_left(), provider)
    except (ConfigError, UsageError) as error:
        _refused(rental, error.message)
        raise


def _was_tried(rental: Rental, offer: Offer) -> bool:
    """Whether an offer came to nothing, or a machine where it is was no good."""
    return any(
        entry["offer"] == offer.offer_id
        or entry.get("cloud") == offer.provider
        or (entry["why"].startswith(BAD) and entry.get("place") == offer.place())
        for entry in rental.record.tried
    )


def _pass_over(rental: Rental, offer: Offer, error: GpuError, say: Say) -> None:
    """Have the other clouds be asked after one refused, or never answered; where there are none, raise its error."""
    shut = {offer.provider, *(entry.get("cloud") for entry in rental.record.tried)}
    if all(account.name in shut for account in market.clouds_of(rental)):
        raise _given_up(rental, error) from None
    say(f"  {error.message} Another cloud is asked.")
    entry = {"offer": offer.offer_id, "cloud": offer.provider, "why": error.message}
    rental.save(state="planned", tried=[*rental.record.tried, entry])


def _tried(rental: Rental) -> str:
    return "; ".join(f"{entry['offer']}: {entry['why'].rstrip('.')}" for entry in rental.record.tried)


def _given_up(rental: Rental, error: GpuError) -> GpuError:
    """Record that nothing came of it; the name is free again."""
    _refused(rental, error.message)
    return error


def _refused(rental: Rental, why: str) -> None:
    """Record that nothing is rented, and take the public key out of the account again: nobody needs it there."""
    rental.save(state="refused", failure=why)
    returning.take_key_out(rental)


def ask(rental: Rental, provider: Provider, offer: Offer, say: Say) -> None:
    """Send one paid request, its intent on the disk before; take over its outcome if known. **Spends money.**

    A cloud that refuses is passed over where others may be asked.
    """
    try:
        order = _prepared(rental, provider, offer, say)
    except (Refused, AuthRejected, ProviderDown, RateLimited) as error:
        _pass_over(rental, offer, error, say)
        return
    try:
        rental.exists(provider.launch(offer, order))
    except NoCapacity as error:
        say(f"  {offer.offer_id}: {error.message}")
        _came_to_nothing(rental, "no capacity")
    except RateLimited:  # a limit hit around a launch has left machines behind: it is looked for before the next one
        clock.sleep(_LIMITED_S)
        if not outcome.is_found(rental, provider):
            tried = [*rental.record.tried, {"offer": _LIMIT, "why": "asked too often"}]
            rental.save(state="planned", tried=tried)
    except (Refused, AuthRejected, ProviderDown) as error:
        _pass_over(rental, offer, error, say)
    except LaunchUnknown as error:
        say(f"  {error.message} Looking for it by its marker; it is never asked for again.")


def _prepared(rental: Rental, provider: Provider, offer: Offer, say: Say) -> Order:
    """What is to be asked for, every limit looked at, its key in the account and the intent on the disk."""
    _check(rental, offer, provider)
    if not (rental.folder / "host_key.pub").exists():
        enrolment.make_key(rental.folder, rental.name)
        enrolment.make_key(rental.folder, rental.name, "host_key")
    marker = base.new_marker(clock.now())
    if rental.record.account not in ("", provider.account):
        returning.remove_key(rental)
    key_name = rental.record.key_name or marker
    guard = provider.guard or guarding.chosen()
    rental.save(key_name=key_name, provider=provider.name, account=provider.account, guard=guard, guard_seen={})
    key_name = provider.ensure_key((rental.folder / "key.pub").read_text(encoding="ascii").strip(), key_name)
    asked_at = clock.timestamp()
    hours = rental.caps_left().hours(offer.price_usd_per_hour)
    deadline = asked_at + hours * 3600 if hours is not None else None
    rental.save(key_name=key_name, deadline=deadline)
    order = _order(rental, provider, marker)
    say(f"asking for {offers.in_words(offer)}")
    intent = {"marker": marker, "offer": asdict(offer), "asked_at": asked_at, "price_usd_per_hour": None}
    with money.in_turn():
        _check(rental, offer, provider)
        rental.save(state="launching", instance_id=None, host=None, raw_state=None, ready_at=None, **intent)
    return order


def _order(rental: Rental, provider: Provider, marker: str) -> Order:
    record = rental.record
    need = rental.need()
    tags = {MARKER_TAG: marker, "gpu-name": record.name, "gpu-idle-minutes": _tag(rental.caps().idle_minutes)}
    tags |= {"gpu-deadline": _tag(record.deadline), "gpu-guard": record.guard}
    return Order(
        marker, record.key_name, _first_boot(rental, provider, marker), tags, need.disk_gb, need.filters.get("image")
    )


def _first_boot(rental: Rental, provider: Provider, marker: str) -> str:
    """The host key made for the machine, and, where its user chose that, the guard with the account's key."""
    private, public = ((rental.folder / name).read_text(encoding="ascii") for name in ("host_key", "host_key.pub"))
    guard = guarding.order(rental, provider, marker) if rental.record.guard in guarding.ON_MACHINE else None
    return provider.start_script(HostKey(private, public), guard)


def _tag(value: float | None) -> str:
    """A limit as a tag: whole seconds or minutes, rounded down; `none` for no limit."""
    return "none" if value is None else str(int(value))


def _came_to_nothing(rental: Rental, why: str) -> None:
    rental.save(state="planned", tried=[*rental.record.tried, {"offer": rental.record.offer["offer_id"], "why": why}])


def _keep_if_rows(rental: Rental, error: LaunchFailed) -> None:
    """Raise MayCost for a machine that was ready before, and has rows that are not home: it is not given back."""
    if rental.record.ready_at and (left := inventory.not_home(rental.name)):
        raise MayCost(
            f"{error.message} {rental.name} has rows of {', '.join(left)} that are not home, so it is kept, and "
            "GOES ON COSTING money.",
            f"Try again: gpu wait {rental.name}. To give up what is there: gpu terminate {rental.name} --discard",
        )


def climb(rental: Rental, provider: Provider, say: Say) -> None:
    """Up to ready; a machine that is not worth keeping is given back, its offer excluded, and another one tried."""
    try:
        readiness.climb(rental, provider, say)
    except LaunchFailed as error:
        _keep_if_rows(rental, error)
        say(f"  {error.message} It is given back.")
        is_over = guarding.is_past(rental)
        returning.end(rental, provider, say)
        bad = sum(entry["why"].startswith(BAD) for entry in rental.record.tried) + 1
        offer = rental.offer()
        tried = [*rental.record.tried, {"offer": offer.offer_id, "place": offer.place(), "why": BAD + error.message}]
        is_last = is_over or bad >= _BAD_MACHINES_MAX or isinstance(error, Unusable)
        rental.save(tried=tried, state="gone" if is_last else "planned")
        if is_last:
            raise LaunchFailed(
                f"{error.message} {bad} machines were no good; all were given back.", error.hint
            ) from None

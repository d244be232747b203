"""From rented to ready, rung by rung, each with a deadline: a machine that is not what was paid for is not used."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator import admission, clock, enrolment, guarding, on_machine
from orchestrator.admission import CALL_S, Door, called
from orchestrator.errors import AuthRejected, GpuError, LaunchFailed, ProviderDown, RateLimited, Refused, Unusable
from orchestrator.plain import plain
from orchestrator.providers.base import Instance, Offer, Provider
from orchestrator.rentals import Rental

_POLL_S = (1.0, 2.0, 3.0, 5.0, 8.0, 10.0)
"""Between two looks, longer each time: providers ask for no more than one look in five to ten seconds."""
_LISTED_S = 180.0
_SSH_S = 600.0
_PRICE_SLACK = 1.02
"""What a machine may cost more than it was offered at: rounding."""
_CENT_USD = 0.01
_WORDS_MAX = 100
_GPU_S = 240.0
_ADMITTED_S = 60.0
_GUARD_S = 180.0
_VRAM_SHARE = 0.9
"""Of the memory paid for, what nvidia-smi must show at least: it counts in MiB, and the driver keeps some."""
_GPUS = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
_CUDA = r"""
import ctypes
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    print("none")
else:
    print(cuda.cuInit(0))
"""
"""Asks the driver itself, without any package: 0 is well, 802 a fabric that is not up (CUDA driver API, CUresult)."""
_DISK = r'df -Pk "$HOME" | tail -n 1 | tr -s " " | cut -d " " -f 4'
_FREE_MIN_GB = 10.0
Say = Callable[[str], None]


@dataclass
class _Climb:
    """One machine on its way up."""

    rental: Rental
    provider: Provider
    say: Say
    began: float = 0.0
    last: str = ""
    """What the machine said last, where that explains why a rung was not taken."""

    def rung(self, words: str, usual: str, step: Callable[[], str]) -> None:
        """Take one rung; its tick says what was found and how long it took."""
        self.say(f"  … {words} (usually {usual})")
        self.began, self.last = clock.monotonic(), ""
        found = step()
        self.say(f"  ✓ {words}{': ' if found else ''}{plain(found)} · {clock.monotonic() - self.began:.0f} s")

    def tell(self, words: str) -> None:
        """Say how far the machine is, by its provider's word, when that has changed."""
        if words and words != self.last:
            self.last = words
            self.say(f"    {plain(words)[:_WORDS_MAX]}")

    def until(self, look: Callable[[], str | None], limit_s: float, what: str) -> str:
        """What `look` finds, asked again until it finds something; LaunchFailed when the time is over."""
        tries = 0
        while True:
            found = self._looked(look)
            if found is not None:
                return found
            if guarding.is_past(self.rental):
                raise LaunchFailed(f"{self.rental.name}: its time is over before it is ready.")
            if clock.monotonic() > self.began + limit_s:
                last = f" It said last: {plain(self.last)}" if self.last else ""
                raise LaunchFailed(f"{self.rental.name}: {what} within {limit_s / 60:.0f} minutes.{last}")
            if tries:
                self.say(f"\r    waiting, {clock.monotonic() - self.began:.0f} s")
            clock.sleep(_POLL_S[min(tries, len(_POLL_S) - 1)])
            tries += 1

    def _looked(self, look: Callable[[], str | None]) -> str | None:
        """What a look finds; nothing while the machine, or its provider, does not answer: it may well be on its way."""
        try:
            return look()
        except (LaunchFailed, AuthRejected, Refused):
            raise
        except GpuError as error:
            self.last = error.message
            return None


def climb(rental: Rental, provider: Provider, say: Say) -> None:
    """Return once the machine is ready and one of the known ones. Raises LaunchFailed when it is not worth keeping.

    May be begun anew at any time: a rung that was taken is taken again at once.
    """
    up = _Climb(rental, provider, say)
    offer = rental.offer()
    minutes = provider.boot_minutes[offer.count > 1]
    up.rung("listed by the provider", "5 s", lambda: _listed(up))
    up.rung("what was asked for, by its provider's word", "1 s", lambda: _as_asked(up, offer))
    up.rung("active, with an address", f"{minutes:.0f} min", lambda: _active(up, offer))
    up.rung("lets us in over SSH", f"{provider.let_in_s:.0f} s", lambda: _let_in(up, offer))
    up.rung("answers", "1 s", lambda: _answers(up))
    up.rung("shows the GPU that was paid for", "2 s", lambda: _shows_gpus(up, offer))
    up.rung("CUDA initialises", "2 s", lambda: _initialises(up, offer))
    up.rung("has disk space", "1 s", lambda: _has_space(up))
    up.rung("can be used", "2 s", lambda: _is_admitted(up))
    if rental.record.guard in guarding.ON_MACHINE:
        up.rung("its guard is armed", "2 s", lambda: _guarded(up))
    rental.save(state="ready", ready_at=clock.now())


def _listed(up: _Climb) -> str:
    def look() -> str | None:
        return "" if _instance(up) else None

    return up.until(look, _LISTED_S, "its provider does not list it")


def _instance(up: _Climb) -> Instance | None:
    assert up.rental.record.instance_id is not None
    found = up.provider.get(up.rental.record.instance_id)
    if found is not None and found.raw_state != up.rental.record.raw_state:
        up.rental.save(raw_state=found.raw_state)
    if found is not None:
        up.rental.costs_as(found)
    return found


def _as_asked(up: _Climb, offer: Offer) -> str:
    """What was bought is what was asked for, as far as the provider says: another machine or price is not kept."""

    def look() -> str | None:
        found = _instance(up)
        return None if found is None else _compared(up.rental.name, offer, found)

    return up.until(look, _LISTED_S, "its provider does not list it")


def _compared(name: str, offer: Offer, found: Instance) -> str:
    """Empty when an instance is what was asked for; LaunchFailed, naming the difference, when it is not."""
    kinds = {True: "a spot machine", False: "one at a fixed price"}
    price = found.price_usd_per_hour
    differences = [
        (found.type_name not in ("", offer.type_name), f"a {found.type_name}; {offer.type_name} was asked for"),
        (found.spot not in (None, offer.spot), f"{kinds[bool(found.spot)]}; {kinds[offer.spot]} was asked for"),
        (found.count not in (None, offer.count), f"one with {found.count} GPUs; {offer.count} were asked for"),
        (found.gpu not in (None, offer.gpu), f"one with {found.gpu}; {offer.gpu} was asked for"),
        (
            price is not None and price > offer.price_usd_per_hour * _PRICE_SLACK + _CENT_USD,
            f"one at {price or 0:.3f} USD/h; it was offered at {offer.price_usd_per_hour:.3f}",
        ),
    ]
    for is_so, words in differences:
        if is_so:
            raise LaunchFailed(f"{name} is, by its provider's own word, {plain(words)}.")
    return ""


def _active(up: _Climb, offer: Offer) -> str:
    def look() -> str | None:
        found = _on_its_way(up, offer)
        if found is None:
            return None
        up.tell(found.message)
        if found.state != "ready" or not found.host:
            return None
        up.rental.save(user=found.user, host=found.host, port=found.port)
        return found.host

    return up.until(look, up.provider.active_s[offer.count > 1], "its provider does not call it active")


def _on_its_way(up: _Climb, offer: Offer) -> Instance | None:
    """The machine as its provider sees it; None while it is being started again; LaunchFailed when nothing comes."""
    found = _instance(up)
    if found is None or found.state in ("gone", "stopping"):
        raise LaunchFailed(f"{up.rental.name} vanished while it booted.")
    if found.state == "stopped" and up.rental.record.ready_at:  # it was started again, and what is said lags behind
        return None
    if found.failure or found.state in ("unhealthy", "stopped"):
        why = found.failure or found.raw_state
        raise LaunchFailed(f"{up.rental.name}, by its provider's own word: {plain(why)}.")
    _compared(up.rental.name, offer, found)
    return found


def _let_in(up: _Climb, offer: Offer) -> str:
    """One that vanishes now is not waited for; a provider that does not answer just now does not lock us out."""
    door = Door(up.rental, up.provider)

    def look() -> str | None:
        try:
            _on_its_way(up, offer)
        except (ProviderDown, RateLimited) as error:
            up.last = error.message
        return door.look()

    return up.until(look, _SSH_S, "it does not let us in over SSH")


def _answers(up: _Climb) -> str:
    nonce = secrets.token_hex(16)

    def look() -> str | None:
        return "" if called(up.rental, ["echo", nonce]).strip() == nonce else None

    return up.until(look, CALL_S * 2, "it does not answer")


def _shows_gpus(up: _Climb, offer: Offer) -> str:
    if offer.count == 0:
        return "none was paid for"

    def look() -> str | None:
        return _checked(up.rental, offer, called(up.rental, _GPUS))

    return up.until(look, _GPU_S, "nvidia-smi shows no GPU")


def _checked(rental: Rental, offer: Offer, told: str) -> str | None:
    """What GPUs there are, in words; None while there are none; LaunchFailed when they are not what was paid for."""
    gpus = [line.rpartition(",") for line in told.splitlines() if "," in line]
    if not gpus:
        return None
    names = ", ".join(plain(name.strip()) for name, _, _ in gpus)
    if len(gpus) != offer.count:
        raise LaunchFailed(f"{rental.name} shows {len(gpus)} GPUs ({names}); {offer.count} were paid for.")
    wanted = (offer.gpu or "").split()[:1]
    if any(wanted and wanted[0].lower() not in name.lower() for name, _, _ in gpus):
        raise LaunchFailed(f"{rental.name} shows {names}; {offer.gpu} was paid for.")
    memory = [float(size) for _, _, size in gpus if size.strip().replace(".", "", 1).isdigit()]
    if offer.vram_gb and memory and min(memory) < offer.vram_gb * 1024 * _VRAM_SHARE:
        raise LaunchFailed(
            f"{rental.name} shows GPUs with {min(memory) / 1024:.0f} GB; {offer.vram_gb:.0f} GB were paid for."
        )
    return names


def _initialises(up: _Climb, offer: Offer) -> str:
    if offer.count == 0:
        return "no GPU was paid for"

    def look() -> str | None:
        said = called(up.rental, ["python3", "-I", "-c", _CUDA]).strip()
        if said == "none":
            return "not asked: there is no libcuda to ask"
        up.last = f"driver error {said}"
        return "" if said == "0" else None

    return up.until(look, _GPU_S, "CUDA does not initialise")


def _guarded(up: _Climb) -> str:
    """A guard that cannot be read back, or that its provider does not answer, is none: the machine is not kept."""

    def look() -> str | None:
        try:
            seen = on_machine.read_back(up.rental)
        except GpuError as error:
            up.last = error.message
            return None
        up.last = seen["error"]
        is_armed = seen["alive"] and seen["answered"] and not seen["error"]
        return guarding.in_words(up.rental) if is_armed else None

    return up.until(look, _GUARD_S, "its guard is not armed")


def _has_space(up: _Climb) -> str:
    def look() -> str | None:
        free_kb = called(up.rental, ["sh", "-c", _DISK]).strip()
        free_gb = int(free_kb) / 1e6 if free_kb.isdigit() else None
        if free_gb is not None and free_gb < _FREE_MIN_GB:
            raise LaunchFailed(f"{up.rental.name} has only {free_gb:.1f} GB free.")
        return "not known" if free_gb is None else f"{free_gb:.0f} GB free"

    return up.until(look, CALL_S * 2, "it does not say what space it has")


def _is_admitted(up: _Climb) -> str:
    def look() -> str | None:
        enrolment.admit(admission.asked(up.rental), up.rental.folder, admission.fingerprint(up.rental.folder))
        return ""

    try:
        return up.until(look, _ADMITTED_S, "it cannot be used")
    except LaunchFailed as error:
        asked = up.rental.record.python
        if asked and asked in error.message:  # a typing error must not cost one machine after the other
            raise Unusable(error.message, "Check --python.") from None
        raise

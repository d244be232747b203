"""What only some clouds can do is one promise for all: done there, said elsewhere, and never half of either."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import zlib
from pathlib import Path

import pytest

from orchestrator import enrolment
from orchestrator.errors import AuthRejected, ConfigError, GpuError, UsageError
from orchestrator.providers.base import GuardOrder, HostKey, Instance, Need
from tests.contract import clouds
from tests.contract.clouds import ASKING, CHANGING, CLOUDS, KEY, OTHER_KEY, Rented

SECRET = "acc0unt-Key-0123456789abcdef"
MARKER = "gpu-20270115t080000-0123456789ab"
_BLOB = re.compile(rb"[A-Za-z0-9+/]{40,}={0,2}")


@pytest.fixture
def host_key(tmp_path: Path) -> HostKey:
    """A key pair as it is made for a machine."""
    enrolment.make_key(tmp_path, "box", "host_key")
    return HostKey((tmp_path / "host_key").read_text(), (tmp_path / "host_key.pub").read_text())


def everything_in(data: bytes) -> bytes:
    """A text, and all that is packed into it, however often."""
    found = data
    for blob in _BLOB.findall(data):
        try:
            inner = base64.b64decode(blob, validate=True)
        except binascii.Error:
            continue
        with contextlib.suppress(zlib.error):
            inner = zlib.decompress(inner)
        found += inner + (everything_in(inner) if _BLOB.search(inner) else b"")
    return found


def script(rented: Rented, host_key: HostKey, key: str) -> bytes:
    """All that the start script for a guarded machine has in it; `key` is told to the guard."""
    order = GuardOrder(MARKER, rented.account.api_url, key, rented.time.now, deadline=rented.time.now + 3600)
    return everything_in(rented.account.start_script(host_key, order).encode())


def test_a_start_script_has_no_key_that_its_guard_was_not_given(rented: Rented, host_key: HostKey) -> None:
    """The account's own key is never in it; the one told to a guard is, but where each machine has one of its own."""
    own = rented.cloud.key.encode()
    empty, told = script(rented, host_key, ""), script(rented, host_key, SECRET)
    assert b"deadline" in empty, "what is packed into it can be read here"
    assert own not in empty
    assert own not in told
    assert SECRET.encode() not in empty
    assert (SECRET.encode() in told) == (rented.account.guard is None)


def test_a_private_host_key_is_sent_only_to_who_takes_it(rented: Rented, host_key: HostKey) -> None:
    """It is in the start script of a machine that is to have it, and nowhere else."""
    line = json.dumps(host_key.private.splitlines()[2]).strip('"').encode()
    assert (line in script(rented, host_key, "")) == rented.account.takes_host_key


def test_a_machine_is_guarded_where_it_must_be(rented: Rented, host_key: HostKey) -> None:
    """Without a guard there is a start script with no key in it, or, where nobody else would end it, an error."""
    if rented.account.guard is not None:
        with pytest.raises(ConfigError, match="Nothing was rented"):
            rented.account.start_script(host_key, None)
    else:
        assert rented.cloud.key.encode() not in everything_in(rented.account.start_script(host_key, None).encode())
    assert rented.cloud.core.calls == []


def test_a_host_key_is_told_in_one_form_or_not_at_all(rented: Rented) -> None:
    """Type and key once the machine's log says so; None before, where nobody says, and where two are said."""
    instance_id = rented.rent()
    assert rented.account.host_key(instance_id) is None
    instance = rented.cloud.core.instances[instance_id]
    instance.log = f"Welcome\ngpu-host-key: {KEY}\n"
    assert rented.account.host_key(instance_id) == (KEY if rented.kind.tells_host_key else None)
    instance.log += f"gpu-host-key: {OTHER_KEY}\n"
    assert rented.account.host_key(instance_id) is None


def seen(rented: Rented, instance_id: str) -> Instance:
    """A machine that is listed, and shown alike when it is asked for alone."""
    (listed,) = rented.account.instances()
    shown = rented.account.get(instance_id)
    assert shown is not None
    assert (listed.instance_id, listed.state) == (shown.instance_id, shown.state)
    return shown


def only(can_stop: bool) -> list[str]:
    """The clouds where machines can, or cannot, be stopped."""
    return [name for name, kind in CLOUDS.items() if ("stop" not in kind.asks_nobody) == can_stop]


@pytest.mark.parametrize("rented", only(can_stop=True), indirect=True)
def test_a_machine_is_stopped_and_started_again(rented: Rented) -> None:
    """Stopped, twice if need be, it is there, costs less and counts; started it is the same one, at its price again."""
    assert rented.account.can_stop
    instance_id = rented.rent()
    running = seen(rented, instance_id)
    for _ in range(2):
        rented.account.stop(instance_id)
    rented.time.advance(5)
    stopped = seen(rented, instance_id)
    assert (stopped.state, stopped.marker) == ("stopped", running.marker)
    assert stopped.stopped_usd_per_hour is not None
    assert running.price_usd_per_hour is not None
    assert 0 < stopped.stopped_usd_per_hour < running.price_usd_per_hour
    assert len(rented.cloud.core.still_billing()) == 1
    rented.account.start(instance_id)
    rented.time.advance(10)
    again = seen(rented, instance_id)
    assert (again.state, again.price_usd_per_hour) == ("ready", running.price_usd_per_hour)
    rented.account.stop(instance_id)
    rented.account.terminate(instance_id)
    rented.time.advance(60)
    assert rented.account.instances() == []
    assert rented.cloud.core.still_billing() == []
    assert rented.paid_calls() == 1


@pytest.mark.parametrize("rented", only(can_stop=False), indirect=True)
def test_a_machine_that_cannot_be_stopped_goes_on(rented: Rented) -> None:
    """Where nothing can be stopped nothing is: what is refused (see test_providers) leaves the machine as it was."""
    assert not rented.account.can_stop
    instance_id = rented.rent()
    for what in ("stop", "start"):
        with pytest.raises(GpuError):
            ASKING[what](rented)
    found = seen(rented, instance_id)
    assert (found.state, found.stopped_usd_per_hour) == ("ready", None)


@pytest.mark.parametrize("rented", only(can_stop=True), indirect=True)
def test_to_stop_what_is_not_there_is_success(rented: Rented) -> None:
    """Absent is success, as for the end; to start it is not."""
    rented.account.stop(rented.kind.absent_id)
    with pytest.raises(GpuError):
        rented.account.start(rented.kind.absent_id)


def test_credit_is_a_number_where_it_is_paid_before(rented: Rented) -> None:
    """What is left falls by what machines cost; None where bills come afterwards."""
    before = rented.account.credit()
    assert (before is not None) == rented.kind.is_prepaid
    rented.rent()
    rented.time.advance(36_000)
    after = rented.account.credit()
    assert (after is None) == (before is None)
    if before is not None and after is not None:
        spent = float(rented.cloud.core.cents()) / 100
        assert spent > 0
        assert before - after == pytest.approx(spent)


def test_what_a_need_overrides_is_said_and_nonsense_is_none(rented: Rented) -> None:
    """A need without filters overrides nothing; each filter is checked before anything is asked, and said."""
    assert rented.account.overridden(Need()) == []
    for name in rented.account.filters:
        assert re.fullmatch(r"[a-z_]+", name)
        if name != "image":  # any text may be one; whether it is, its registry says
            with pytest.raises(UsageError, match="Nothing was rented"):
                rented.account.overridden(Need(filters={name: "no\nsense"}))
    if "verified" in rented.account.filters:
        (line,) = rented.account.overridden(Need(filters={"verified": "any"}))
        assert line.startswith("verified=any")
    assert rented.cloud.core.calls == []


@pytest.mark.parametrize(
    ("rented", "form"),
    [(cloud, form) for cloud, kind in CLOUDS.items() for form in kind.key_refusals],
    indirect=["rented"],
)
@pytest.mark.parametrize("what", ["get", "terminate", "instances"])
def test_a_refused_key_never_reads_as_gone(rented: Rented, form: object, what: str) -> None:
    """In whichever form and status a key is refused, a machine that is there, or is not, is not said to be absent."""
    rented.rent()
    rented.cloud.fault("bad-key", times=None, detail=form)
    absent = {"get": rented.account.get, "terminate": rented.account.terminate}
    for ask in (lambda: ASKING[what](rented), lambda: absent.get(what, absent["get"])(rented.kind.absent_id)):
        with pytest.raises(GpuError) as caught:
            ask()
        assert isinstance(caught.value, (AuthRejected, clouds.trouble(what)))
        assert form == "page" or type(caught.value) is AuthRejected
    assert len(rented.cloud.core.still_billing()) == 1


def test_what_only_looks_changes_nothing(rented: Rented) -> None:
    """After every method but three there is the same machine, and one paid request."""
    instance_id = rented.rent()
    before = seen(rented, instance_id)
    for what in sorted(set(ASKING) - CHANGING):
        ASKING[what](rented)
    assert seen(rented, instance_id) == before
    assert rented.paid_calls() == 1

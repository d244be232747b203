"""Stopping and starting at Vast.ai, letting keys in, and what its machines run at each start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator import onstart
from orchestrator.errors import ConfigError, LaunchUnknown, NoCapacity, ProviderDown, Refused
from orchestrator.providers import vast_order
from orchestrator.providers.base import Endpoint, GuardOrder, HostKey
from orchestrator.providers.vast import VastCloud
from tests.orchestrator.providers.loopback import HTML, Scripted, Server, Time
from tests.orchestrator.providers.playing_vast import BAD_KEY, HOST_KEY, ID, complaint

QUEUED = "Required resources are currently unavailable, state change queued."


@pytest.mark.parametrize(
    "answer",
    [
        Scripted(200, {"success": True, "msg": QUEUED}),
        Scripted(200, complaint("resources_unavailable", QUEUED)),
        Scripted(200, {"success": False, "msg": QUEUED}),
        Scripted(200, QUEUED.encode()),
        Scripted(400, complaint("resources_unavailable", QUEUED)),
    ],
    ids=["success", "refused", "msg alone", "text", "400"],
)
def test_a_start_that_waits_is_taken_back(vast: VastCloud, server: Server, answer: Scripted) -> None:
    """With its GPUs in other hands a machine would start whenever they are free: that is taken back, and said."""
    server.usual = lambda asked: answer if asked.body == {"state": "running"} else Scripted(200, {"success": True})
    with pytest.raises(NoCapacity, match="in other hands"):
        vast.start(ID)
    assert [asked.body["state"] for asked in server.asked] == ["running", "stopped"]
    server.usual = lambda asked: answer if asked.body == {"state": "running"} else BAD_KEY["401"]
    with pytest.raises(LaunchUnknown, match="starts by itself"):
        vast.start(ID)


def test_stopping_and_starting(vast: VastCloud, server: Server) -> None:
    """A stop may be repeated; what is refused says that it is."""
    server.script = [Scripted(502, HTML), Scripted(fault="reset")]
    server.usual = lambda _: Scripted(200, {"success": True})
    vast.stop(ID)
    assert [asked.body for asked in server.asked] == [{"state": "stopped"}] * 3
    vast.start(ID)
    server.usual = lambda _: Scripted(400, complaint("invalid_args"))
    for ask in (vast.stop, vast.start):
        with pytest.raises(Refused):
            ask(ID)


def test_keys_are_let_into_one_instance(vast: VastCloud, server: Server) -> None:
    """A public key goes to one instance, type and key alone; that it is there already is well; the account has none."""
    assert vast.ensure_key(HOST_KEY, "a-name") == "a-name"
    assert vast.key_names() == []
    vast.remove_key("a-name")
    assert server.asked == []
    server.usual = lambda _: Scripted(200, {"success": True, "msg": "SSH key attached successfully"})
    vast.admit(ID, f"{HOST_KEY} somebody@somewhere\n")
    assert server.paths() == [f"POST /api/v0/instances/{ID}/ssh/"]
    assert server.asked[0].body == {"ssh_key": HOST_KEY}
    for words in ("SSH key already associated with instance.", "Duplicate key", "duplicate"):
        for status in (200, 400, 409):
            server.usual = lambda _, words=words, status=status: Scripted(status, {"success": False, "msg": words})
            vast.admit(ID, HOST_KEY)


@pytest.mark.parametrize("odd", ["", "x", "-----BEGIN OPENSSH PRIVATE KEY-----\nsecret", f"{HOST_KEY}\nssh-rsa AAAA"])
def test_what_is_no_public_key_is_not_sent(vast: VastCloud, server: Server, odd: str) -> None:
    """Anything else than one public key in one line is refused, and not shown: it may be a private one."""
    for ask in (lambda: vast.admit(ID, odd), lambda: vast.ensure_key(odd, "x")):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert "secret" not in caught.value.message
    assert server.asked == []


GUARD = GuardOrder("m", "https://console.vast.ai/api/v0", "an-account-key-0123", 1.8e9, "root", 1.81e9)


def test_a_start_script_never_has_the_accounts_key(vast: VastCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a guard is told, the account's key is not among it; a machine without a guard is not rented."""
    told: list[GuardOrder] = []

    def kept(guard: GuardOrder) -> str:
        told.append(guard)
        return "echo"

    monkeypatch.setattr(onstart, "onstart", kept)
    assert vast.start_script(HostKey("private", "public"), GUARD) == "echo"
    assert told == [replace(GUARD, key="")]
    with pytest.raises(ConfigError, match="guard"):
        vast.start_script(HostKey("private", "public"), None)


def test_the_real_start_script_fits(vast: VastCloud) -> None:
    """The start script that is sent is short enough, has no secret, and tells its host key as it is looked for."""
    text = vast.start_script(HostKey("a-private-host-key", "public"), GUARD)
    assert len(text.encode()) < vast_order.SCRIPT_MAX
    assert onstart.MAX_CHARS < vast_order.SCRIPT_MAX
    assert "an-account-key-0123" not in text
    assert "a-private-host-key" not in text
    assert onstart.HOST_KEY_PREFIX in text


def test_what_the_cloud_says_of_itself(vast: VastCloud, server: Server, time: Time) -> None:
    """The address for a guard on a machine, and what tells this cloud from others."""
    assert vast.api_url == f"{server.url}/api/v0"
    assert (vast.guard, vast.takes_host_key, vast.can_stop) == ("container", False, True)
    assert vast.active_s[0] >= 600
    assert "secret_k3y" not in vast.account
    assert "secret_k3y" not in repr(vast)


def test_a_way_to_a_disk_is_asked_for_once(vast: VastCloud, server: Server) -> None:
    """A folder of one instance's disk is asked for; where it can be read is told, or that it cannot be."""
    server.script = [Scripted(200, {"success": True, "src_addr": "203.0.113.9", "src_port": 2222})]
    found = vast.gate(ID, "/root/.gpu/runs/x")
    assert found is not None
    assert (found.endpoint, found.user, found.module) == (Endpoint("203.0.113.9", 2222), "vastai_kaalia", ID)
    (asked,) = server.asked
    sides = {"src_id": ID, "src_path": "/root/.gpu/runs/x", "dst_id": None}
    assert asked.method == "PUT"
    assert asked.path.endswith("/commands/rsync/")
    assert sides.items() <= asked.body.items()
    server.script = [Scripted(502, HTML)]
    with pytest.raises(ProviderDown):
        vast.gate(ID, "/x")
    assert len(server.asked) == 2


@pytest.mark.parametrize("where", ["-oProxyCommand=x", "evil.example", "", None, "203.0.113.9\nHost *"])
def test_a_way_that_leads_nowhere_is_none(vast: VastCloud, server: Server, where: str | None) -> None:
    """What is no address, and no host of Vast.ai's own, never reaches an ssh_config."""
    server.usual = lambda _: Scripted(200, {"success": True, "src_addr": where, "src_port": 22})
    with pytest.raises(ProviderDown, match="no usable way"):
        vast.gate(ID, "/x")

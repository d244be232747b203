"""Lambda Cloud: rents whole machines by the hour, priced per type, had or not per region."""

from __future__ import annotations

import os
import re
from typing import Any, ClassVar

from orchestrator import first_boot
from orchestrator.errors import (
    AuthRejected,
    ConfigError,
    GpuError,
    LaunchUnknown,
    NoCapacity,
    NotReturned,
    ProviderDown,
    RateLimited,
    Refused,
)
from orchestrator.providers import lambda_answers, pace
from orchestrator.providers.base import MARKER_TAG, Gate, GuardOrder, HostKey, Instance, Need, Offer, Order
from orchestrator.providers.client import Api, Call, Client, Reply
from orchestrator.providers.pace import Lane

TITLE = "Lambda Cloud"
KEY_PAGE = "https://cloud.lambda.ai/api-keys"
_URL = "https://cloud.lambda.ai"
_USER = "ubuntu"
_LAUNCH_READ_S = 180.0
"""A launch may take tens of seconds; a time-out leaves open whether a machine was rented."""
_EVERY_S = 1.05
_LAUNCHES = Lane("launch", 12.5)
"""Its limits are 1 call a second and a launch in 12 s, counted where calls arrive: a little more lets no two meet."""
_TERMINATES = Lane("terminate", 3.0)
_USER_DATA_MAX_BYTES = 1_000_000
_USD_PER_GB_MONTH = 0.20
"""Of a file system's used bytes, an estimate: from Lambda's price list of 2024."""
_PAGES_MAX = 50
_CAPACITY = "instance-operations/launch/insufficient-capacity"
_ACCOUNT_TROUBLE = ("global/account-inactive", "global/invalid-address", "global/quota-exceeded")
_PUBLIC_KEY = re.compile(r"((?:ssh|ecdsa|sk)-[A-Za-z0-9@.-]+) ([A-Za-z0-9+/]+={0,3})(?: .*)?")
_NOTHING = "Nothing was rented or changed by this."


class LambdaCloud:
    """One account at Lambda Cloud. `GPU_LAMBDA_URL` and `GPU_LAMBDA_SSH_PORT` lead tests to another server."""

    name: ClassVar[str] = "lambda"
    dashboard: ClassVar[str] = "https://cloud.lambda.ai/instances"
    boot_minutes: ClassVar[tuple[float, float]] = (5.0, 15.0)
    let_in_s: ClassVar[float] = 30.0
    active_s: ClassVar[tuple[float, float]] = (1500.0, 3000.0)
    guard: ClassVar[str | None] = None
    takes_host_key: ClassVar[bool] = True
    can_stop: ClassVar[bool] = False
    filters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, key: str) -> None:
        self.api_url = (os.environ.get("GPU_LAMBDA_URL") or _URL).rstrip("/") + "/api/v1"
        self.account = pace.account("lambda", key)
        self._client = Client(Api("lambda", TITLE, self.api_url, key, lambda_answers.complaint, _EVERY_S))
        self._port = _ssh_port()

    @property
    def skew_s(self) -> float | None:
        """By how much its clock was ahead of this computer's at its last answer, in seconds; None: it never said."""
        return self._client.skew_s

    def offers(self, need: Need) -> list[Offer]:  # noqa: ARG002 -- there is nothing to ask for but all of them
        """Every type in every region that has it; one that none has is there, too, not available."""
        data = self._read("/instance-types", "list its machines").document["data"]
        if not isinstance(data, dict):
            raise ProviderDown(f"{TITLE} could not list its machines: its answer is no catalogue. {_NOTHING}")
        return lambda_answers.offers(data)

    def overridden(self, need: Need) -> list[str]:  # noqa: ARG002 -- there is nothing to override
        """Nothing: all its machines are its own."""
        return []

    def ensure_key(self, public_key: str, name: str) -> str:
        """Have a public key in the account; returns the name it has there, found by the key itself, not by `name`."""
        found = _PUBLIC_KEY.fullmatch(public_key.strip())
        if not found:  # nothing of it is shown: it may be a private one
            raise ConfigError("That is no public SSH key in one line (ssh-ed25519 AAAA… name). It was not sent.")
        line = f"{found[1]} {found[2]}"
        if (there := self._name_of(line)) is not None:
            return there
        reply = self._client.until_sent(Call("POST", "/ssh-keys", {"name": name, "public_key": line}))
        if reply.outcome == "ok":
            return lambda_answers.name_of_key(reply.document["data"]) or name
        if (there := self._name_of(line)) is not None:  # a lost answer, or another process was first
            return there
        raise self._error(reply, f"take the public key {name}")

    def key_names(self) -> list[str]:
        """The names of all public keys of the account."""
        return [key["name"] for key in self._account_keys()]

    def remove_key(self, name: str) -> None:
        """Take the public keys of this name out of the account; absent is success."""
        for key in self._account_keys():
            if key["name"] == name:
                reply = self._client.repeat(Call("DELETE", f"/ssh-keys/{key['id']}"))
                if reply.outcome != "ok" and not _is_absent(reply):
                    raise self._error(reply, f"remove the public key {name}")

    def launch(self, offer: Offer, order: Order) -> str:
        """Rent a machine, asked once; returns the instance's id. **Spends money.**"""
        what = f"rent {offer.type_name} in {offer.region} (marker {order.marker})"
        if offer.region is None:
            raise NoCapacity(f"{TITLE} has {offer.type_name} free in no region just now. Nothing was rented.")
        if len(order.start_script.encode()) > _USER_DATA_MAX_BYTES:
            raise Refused(f"{TITLE} takes a start script of at most 1 MB; this one is longer. Nothing was rented.")
        call = Call(
            "POST",
            "/instance-operations/launch",
            _launch_body(offer, order),
            read_s=_LAUNCH_READ_S,
            lane=_LAUNCHES,
            private=order.start_script,
        )
        reply = self._client.once(call)
        instance_id = lambda_answers.launched(reply.document["data"]) if reply.outcome == "ok" else None
        if instance_id is None:
            raise self._launch_error(reply, what)
        return instance_id

    def get(self, instance_id: str) -> Instance | None:
        """One instance; None only when Lambda itself says, in its own form, that there is no such thing."""
        reply = self._client.repeat(Call("GET", f"/instances/{_checked(instance_id)}"))
        if _is_absent(reply):
            return None
        if reply.outcome != "ok":
            raise self._error(reply, f"show instance {instance_id}")
        instance = lambda_answers.instance(reply.document["data"], _USER, self._port)
        if instance is None or instance.instance_id != instance_id:
            raise ProviderDown(
                f"{TITLE} was asked for instance {instance_id} and answered with something else. {_NOTHING}"
            )
        return instance

    def instances(self) -> list[Instance]:
        """All that are not terminated. ProviderDown when one entry cannot be read: the list would prove nothing."""
        found = []
        for entry in self._pages("/instances", "list the account's instances"):
            instance = lambda_answers.instance(entry, _USER, self._port)
            if instance is None:
                raise ProviderDown(f"{TITLE} lists an instance without an id; what is rented is not known.", self._look)
            found.append(instance)
        return [instance for instance in found if instance.state != "gone"]

    def terminate(self, instance_id: str) -> None:
        """Ask for the end of an instance, some times if need be; absent, or ending already, is success.

        Raises AuthRejected, ProviderDown (it was never reached) or NotReturned: the instance goes on costing.
        """
        call = Call(
            "POST",
            "/instance-operations/terminate",
            {"instance_ids": [_checked(instance_id)]},
            read_s=60.0,
            lane=_TERMINATES,
            final_codes=(lambda_answers.UNKNOWN,),  # what it says when the instance is being terminated already
        )
        reply = self._client.repeat(call)
        is_absent = reply.status == 404 and reply.code == lambda_answers.ABSENT[0]
        if reply.outcome != "ok" and not is_absent and reply.code != lambda_answers.UNKNOWN:
            raise self._terminate_error(reply, instance_id)

    def start_script(self, host_key: HostKey, guard: GuardOrder | None) -> str:
        """The text for cloud-init."""
        return first_boot.user_data(host_key, guard)

    def admit(self, instance_id: str, public_key: str) -> None:
        """Nothing: the key named in the launch is let in."""

    def host_key(self, instance_id: str) -> str | None:  # noqa: ARG002 -- nobody says; the machine was given one
        """None: Lambda does not say."""
        return None

    def stop(self, instance_id: str) -> None:
        """Refused: a machine that is powered off is billed as before."""
        raise Refused(f"{TITLE} cannot stop instance {instance_id}: powered off, it costs as before. {_NOTHING}")

    def start(self, instance_id: str) -> None:
        """Refused: there is nothing that was stopped."""
        raise Refused(f"{TITLE} cannot start instance {instance_id}: nothing there can be stopped. {_NOTHING}")

    def gate(self, instance_id: str, path: str) -> Gate | None:  # noqa: ARG002 -- there is none to any
        """None: no disk can be read but by its own machine."""
        return None

    def credit(self) -> float | None:
        """None: the account is billed afterwards."""
        return None

    def check_key(self) -> None:
        """One small read that needs the key. Raises AuthRejected when it is not accepted."""
        reply = self._client.once(Call("GET", "/ssh-keys"))
        if reply.outcome != "ok":
            raise self._error(reply, "list the account's public keys")

    def storage(self) -> list[str]:
        """File systems, which cost money by what lies in them, whether a machine uses them or not."""
        entries = self._pages("/file-systems", "list the account's file systems")
        return [lambda_answers.file_system(entry, _USD_PER_GB_MONTH) for entry in entries]

    @property
    def _look(self) -> str:
        return f"Look yourself: {self.dashboard}"

    def _read(self, path: str, doing: str, query: dict[str, str] | None = None) -> Reply:
        """An answer with data; else the error that says why there is none."""
        reply = self._client.repeat(Call("GET", path, query=query or {}))
        if reply.outcome != "ok":
            raise self._error(reply, doing)
        return reply

    def _pages(self, path: str, doing: str) -> list[Any]:
        """The whole list, should it ever come in pages; ProviderDown when it is not whole, or no list."""
        entries: list[Any] = []
        token: Any = None
        query: dict[str, str] = {}
        for _ in range(_PAGES_MAX):
            document = self._read(path, doing, query).document
            if not isinstance(document["data"], list):
                break
            entries += document["data"]
            last, token = token, document.get("page_token")
            if not token:
                return entries
            if token == last or not isinstance(token, str):
                break
            query = {"page_token": token}
        raise ProviderDown(f"{TITLE} could not {doing}: its answer is no whole list. {_NOTHING}", self._look)

    def _account_keys(self) -> list[dict[str, str]]:
        return lambda_answers.account_keys(self._pages("/ssh-keys", "list the account's public keys"))

    def _name_of(self, line: str) -> str | None:
        """The name that stands for this public key (type and key, no comment) alone, None when there is none."""
        known = self._account_keys()
        names = [key["name"] for key in known]
        same = [key["name"] for key in known if " ".join(key["public_key"].split()[:2]) == line]
        return next((name for name in same if names.count(name) == same.count(name)), None)

    def _error(self, reply: Reply, doing: str) -> GpuError:
        """Why something that costs nothing could not be done."""
        said = self._client.hide(f"{TITLE} could not {doing}: {reply.words}") + "."
        if _is_key_refused(reply) and reply.code not in _ACCOUNT_TROUBLE:
            text = f"{said} It does not accept the account key. Nothing was rented; what is rented goes on costing."
            return AuthRejected(text, f"Make a new key at {KEY_PAGE}, then: gpu doctor")
        if reply.outcome == "refused":
            return Refused(f"{said} {_NOTHING}", f"Look at the account: {self.dashboard}")
        if reply.outcome == "limited":
            return RateLimited(f"{said} It was asked too often. {_NOTHING}", "Wait a minute, then type it again.")
        if reply.outcome == "moved":
            return ProviderDown(f"{said} It points elsewhere, where the key is not sent. {_NOTHING}")
        return ProviderDown(f"{said} {_NOTHING}", "Check the network, then type it again.")

    def _launch_error(self, reply: Reply, doing: str) -> GpuError:
        """Why there is no instance, or why that is not known."""
        if reply.outcome in ("ok", "unclear", "moved"):
            said = "its answer names no instance" if reply.outcome == "ok" else reply.words
            return LaunchUnknown(
                self._client.hide(f"{TITLE} was asked to {doing}: {said}")
                + ". A machine may have been rented, and cost money. It was asked once, and is not asked again.",
                f"Look for the marker: {self.dashboard}. Have it mended: gpu audit --fix",
            )
        if reply.code == _CAPACITY and reply.outcome == "refused":
            said = self._client.hide(f"{TITLE} could not {doing}: {reply.words}")
            return NoCapacity(f"{said}. Nothing was rented.", "Another region or type may be free: gpu offers")
        return self._error(reply, doing)

    def _terminate_error(self, reply: Reply, instance_id: str) -> GpuError:
        """Why an instance may go on costing."""
        said = self._client.hide(f"{TITLE} could not terminate instance {instance_id}: {reply.words}") + "."
        hint = f"Terminate it yourself, now: {self.dashboard}"
        if _is_key_refused(reply):
            text = f"{said} INSTANCE {instance_id} MAY STILL BE RUNNING AND COSTING MONEY: the key is not accepted."
            return AuthRejected(text, f"{hint}. Make a new key at {KEY_PAGE}, then: gpu doctor")
        if reply.outcome == "not_sent":
            return ProviderDown(f"{said} It was not reached; the instance is as it was and GOES ON COSTING.", hint)
        return NotReturned(f"{said} The instance may still be running and costing money.", hint)


def _launch_body(offer: Offer, order: Order) -> dict[str, Any]:
    """The request for exactly one machine; a quantity is not sent, newer versions of the API know none."""
    body: dict[str, Any] = {
        "region_name": offer.region,
        "instance_type_name": offer.type_name,
        "ssh_key_names": [order.key_name],
        "file_system_names": [],
        "name": order.marker,
        "tags": [{"key": key, "value": text} for key, text in {**order.tags, MARKER_TAG: order.marker}.items()],
    }
    return {**body, "user_data": order.start_script} if order.start_script else body


def _is_key_refused(reply: Reply) -> bool:
    return reply.outcome == "refused" and reply.status in (401, 403)


def _is_absent(reply: Reply) -> bool:
    return reply.status == 404 and reply.code in lambda_answers.ABSENT


def _checked(instance_id: str) -> str:
    """The id, when it can be one: it becomes part of a path."""
    if not lambda_answers.ID.fullmatch(instance_id):
        raise Refused(f"{instance_id[:80]!r} cannot be the id of an instance at {TITLE}. {_NOTHING}")
    return instance_id


def _ssh_port() -> int:
    text = os.environ.get("GPU_LAMBDA_SSH_PORT") or "22"
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ConfigError("GPU_LAMBDA_SSH_PORT is no port number.", "unset GPU_LAMBDA_SSH_PORT")
    return int(text)

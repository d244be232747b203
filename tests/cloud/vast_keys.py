"""Public keys at the stand-in for Vast: those of the account, and those attached to an instance, which take a while."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tests.cloud.answers import Answer, Json, as_json
from tests.cloud.core import Request
from tests.cloud.vast_answers import Refused
from tests.cloud.vast_contracts import need_object
from tests.cloud.vast_instance import Key

if TYPE_CHECKING:
    from tests.cloud.vast_cloud import VastCloud

USER_ID = 4567
_PUBLIC = re.compile(r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp\d+|sk-\S+) [A-Za-z0-9+/=]+( .*)?")


class Keys:
    """The keys of one account."""

    def __init__(self, cloud: VastCloud) -> None:
        self._cloud = cloud
        self.account: dict[int, Json] = {}
        self._last_id = 700

    def attached(self, public: str) -> Key:
        """A key that is attached to an instance now, by its id in the account where it is there."""
        known = (number for number, key in self.account.items() if _blob(str(key["key"])) == _blob(public))
        number = next(known, 0) or self._new_id()
        return Key(number, public, self._cloud.clock() + self._cloud.timings.key_delay_s)

    def account_publics(self) -> list[str]:
        """The public keys of the account."""
        return [str(key["key"]) for key in self.account.values()]

    def add(self, public: str) -> Json:
        """Have a key in the account; returns it."""
        number = self._new_id()
        at = datetime.fromtimestamp(self._cloud.clock(), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        key = {"id": number, "user_id": USER_ID, "key": public, "created_at": at, "deleted_at": None}
        self.account[number] = key
        return key

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id


def listed(cloud: VastCloud, request: Request) -> Answer:
    """All keys of the account; 404 where there are none, unless `no_keys_status` says otherwise."""
    keys = list(cloud.keys.account.values())
    if not keys and cloud.no_keys_status == 404:
        raise Refused("not_found", "No SSH keys found for the user.")
    return as_json(200, {"ssh_keys": keys} if cloud.keys_in_object else keys)


def add(cloud: VastCloud, request: Request) -> Answer:
    """Have another key in the account: it reaches instances that are made later, and others if `reaches_all`."""
    public = _public(need_object(request))
    if cloud.is_team:
        raise Refused("team_ssh_keys_not_supported")
    if any(_blob(key) == _blob(public) for key in cloud.keys.account_publics()):
        raise Refused("invalid_request", "SSH key already exists.", status=400)
    key = cloud.keys.add(public)
    if cloud.keys_reach_all:
        for one in cloud.living.values():
            one.keys.append(cloud.keys.attached(public))
    told = {name: value for name, value in key.items() if name != "key"} | {"public_key": key["key"]}
    return as_json(200, {"success": True, "key": told})


def update(cloud: VastCloud, request: Request, key_id: str) -> Answer:
    """Replace a key of the account."""
    found = _account_key(cloud, key_id)
    found["key"] = _public(need_object(request))
    return as_json(200, {"success": True, "key": found})


def remove(cloud: VastCloud, request: Request, key_id: str) -> Answer:
    """Forget a key of the account; instances keep it."""
    del cloud.keys.account[_account_key(cloud, key_id)["id"]]
    return as_json(200, {"success": True})


def _account_key(cloud: VastCloud, key_id: str) -> Json:
    if int(key_id) not in cloud.keys.account:
        raise Refused("no_ssh_key")
    return cloud.keys.account[int(key_id)]


def of_instance(cloud: VastCloud, request: Request, number: str) -> Answer:
    """The keys of an instance: JSON as a text inside JSON."""
    keys: list[dict[str, Any]] = [
        {"id": key.key_id, "name": "", "public_key": key.public} for key in cloud.known(number).keys
    ]
    return as_json(200, {"success": True, "ssh_keys": keys if cloud.plain_key_lists else json.dumps(keys)})


def attach(cloud: VastCloud, request: Request, number: str) -> Answer:
    """Have a key let into an instance, after a while."""
    one, public = cloud.known(number), _public(need_object(request))
    if any(_blob(key.public) == _blob(public) for key in one.keys):
        raise Refused("invalid_args", "SSH key already attached to instance.")
    cloud.touch(one)
    one.keys.append(cloud.keys.attached(public))
    return as_json(200, {"success": True, "msg": "SSH key attached successfully"})


def detach(cloud: VastCloud, request: Request, number: str, key_id: str) -> Answer:
    """Have a key no longer let into an instance."""
    one = cloud.known(number)
    if all(key.key_id != int(key_id) for key in one.keys):
        raise Refused("no_such_ssh_key")
    cloud.touch(one)
    one.keys = [key for key in one.keys if key.key_id != int(key_id)]
    return as_json(200, {"success": True, "msg": "SSH key removed from instance."})


def _public(order: Json) -> str:
    public = order.get("ssh_key")
    if not public:
        raise Refused("no_ssh_key")
    if not isinstance(public, str) or not _PUBLIC.fullmatch(public.strip()):
        raise Refused("invalid_args", "Invalid ssh key")
    return public.strip()


def _blob(public: str) -> str:
    return public.split()[1]

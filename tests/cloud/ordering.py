"""What a launch must bring, checked in the provider's order."""

from __future__ import annotations

from typing import Any

from tests.cloud.account import Account
from tests.cloud.answers import Failure, Json, checked_text, need_list, need_text
from tests.cloud.catalogue import REGIONS, Catalogue

USER_DATA_MAX_BYTES = 1 << 20
_MOUNT = r"(?=.{0,256}$)(/home|/lambda/nfs|/data)[/a-zA-Z0-9-]*"


def check(order: Json, account: Account, catalogue: Catalogue, unknown_status: int) -> None:
    """Raises the Failure that a launch ends with, if it ends with one; nothing is created then.

    `unknown_status` is the HTTP status for what does not exist: the documents allow 400 and 404.
    """
    _check_fields(order)
    type_name, at = order["instance_type_name"], order["region_name"]
    for exists, what in (
        (account.public_key(order["ssh_key_names"][0]) is not None, "SSH key"),
        (type_name in catalogue.types, "Instance type"),
        (at in REGIONS, "Region"),
    ):
        if not exists:
            raise Failure("global/object-does-not-exist", f"{what} does not exist.", status=unknown_status)
    if at not in catalogue.capacity.get(type_name, []):
        raise Failure("instance-operations/launch/insufficient-capacity")
    _check_file_systems(order, account, unknown_status)
    _check_image(order, catalogue, unknown_status)


def _check_fields(order: Json) -> None:
    for name in ("region_name", "instance_type_name"):
        need_text(order, name)
    if len(need_list(order, "ssh_key_names", str)) != 1:
        raise Failure("global/invalid-parameters", "ssh_key_names: List should have exactly 1 item")
    need_list({"file_system_names": []} | order, "file_system_names", str)
    for name, pattern in (("name", r"(?s).{0,64}"), ("hostname", r"[a-z0-9][0-9a-z-]{0,62}"), ("user_data", r"(?s).*")):
        if name in order:
            checked_text(order[name], name, pattern)
    if len(order.get("user_data", "").encode()) > USER_DATA_MAX_BYTES:
        raise Failure("global/invalid-parameters", "user_data: String should have at most 1 MB")
    quantity = order.get("quantity", 1)
    if not isinstance(quantity, int) or quantity > 1:
        raise Failure("global/invalid-parameters", "quantity: Input should be less than or equal to 1")
    for tag in need_list({"tags": []} | order, "tags", dict):
        need_text(tag, "key", r"(?!lambda-ai-)(?=.{1,55}$)[a-z][a-z0-9-:]+")
        need_text(tag, "value", r"(?s).{0,128}")
    for mount in need_list({"file_system_mounts": []} | order, "file_system_mounts", dict):
        need_text(mount, "mount_point", _MOUNT)
        need_text(mount, "file_system_id")


def _check_file_systems(order: Json, account: Account, unknown_status: int) -> None:
    wanted: list[Any] = [account.file_system(name) for name in order.get("file_system_names", [])]
    wanted += [account.file_systems.get(one["file_system_id"]) for one in order.get("file_system_mounts", [])]
    for found in wanted:
        if found is None:
            raise Failure("global/object-does-not-exist", "Filesystem was not found.", status=unknown_status)
        if found["region"]["name"] != order["region_name"]:
            raise Failure("instance-operations/launch/file-system-in-wrong-region")


def _check_image(order: Json, catalogue: Catalogue, unknown_status: int) -> None:
    image = order.get("image")
    if image is None:
        return
    if not isinstance(image, dict) or len(image) != 1 or not set(image) <= {"id", "family"}:
        raise Failure("global/invalid-parameters", "image: either an id or a family")
    if not any(image.items() <= one.items() for one in catalogue.images):
        raise Failure("global/object-does-not-exist", "Image does not exist.", status=unknown_status)

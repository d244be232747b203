"""What a create request at Vast must bring, checked before anything is made."""

from __future__ import annotations

import json
from typing import Any

from tests.cloud import vast_search
from tests.cloud.answers import Json
from tests.cloud.vast_answers import Refused

DISK_MIN_GB = 8.0
LABEL_MAX = 256
ONSTART_MAX = 4048
_IMAGE_MAX, _ENV_MAX, _ENV_WHOLE_MAX, _PORTS_MAX = 1024, 256, 32 * 1024, 64
BID_MIN, BID_MAX = 0.001, 128.0
"""USD an hour for the machine."""
_RUNTYPES = {"ssh", "ssh_proxy", "ssh_direct", "ssh_direc", "jupyter", "jupyter_proxy", "jupyter_direct"}
_RUNTYPES |= {"jupyter_direc", "args"}
TEMPLATE = "4e17788f74f075dd9aab7d0d4427968f"
"""The one template there is."""


def check(order: Json) -> None:
    """Raises what a request is refused with for what stands in it; whether the offer is there is another matter."""
    if order.get("template_hash_id") not in (None, TEMPLATE):
        raise _wrong("no such template")
    if order.get("image") is None and order.get("template_hash_id") is None:
        raise _wrong("'image' is required")
    for name, most in (("image", _IMAGE_MAX), ("label", LABEL_MAX), ("onstart", ONSTART_MAX), ("image_login", 1024)):
        _check_text(order.get(name), name, most)
    if disk_gb(order) < DISK_MIN_GB:
        raise _wrong(f"'disk' must be at least {DISK_MIN_GB:g} GB")
    words = str(order.get("runtype") or "ssh").split()
    if unknown := [word for word in words if word not in _RUNTYPES]:
        raise _wrong(f"unknown runtype {unknown[0]!r}")
    if order.get("target_state") not in (None, "running", "stopped"):
        raise _wrong("'target_state' must be running or stopped")
    bid(order)
    _check_env(order.get("env"))


def disk_gb(order: Json) -> float:
    """The disk asked for."""
    return DISK_MIN_GB if order.get("disk") is None else vast_search.number(order["disk"], "disk")


def bid(order: Json) -> float | None:
    """What is bid an hour; None: on demand."""
    if order.get("price") is None:
        return None
    price = vast_search.number(order["price"], "price")
    if not BID_MIN <= price <= BID_MAX:
        raise _wrong(f"'price' must be between {BID_MIN} and {BID_MAX:g}")
    return price


def _check_text(value: Any, name: str, most: int) -> None:
    if value is not None and not isinstance(value, str):
        raise _wrong(f"{name!r} must be a string")
    if value is not None and len(value) > most:
        raise _wrong(f"{name!r} must be at most {most} characters long")


def _check_env(env: Any) -> None:
    """An object; a text in Docker's form is taken, too, and has no effect, as third parties saw it."""
    if env is None or isinstance(env, str):
        return
    if not isinstance(env, dict):
        raise _wrong("'env' must be an object")
    if any(len(str(key)) > _ENV_MAX or len(str(value)) > _ENV_MAX for key, value in env.items()):
        raise _wrong(f"'env': names and values must be at most {_ENV_MAX} characters long")
    if len(json.dumps(env)) > _ENV_WHOLE_MAX:
        raise _wrong("'env' is too large")
    if sum(str(key).startswith("-p ") for key in env) > _PORTS_MAX:
        raise _wrong(f"'env': at most {_PORTS_MAX} ports")


def _wrong(what: str) -> Refused:
    return Refused("invalid_args", f"error 400/3467: Invalid args: {what}")


def image_error(order: Json) -> str:
    """Why the image named cannot be had, in Docker's words; empty when it can.

    `no-such` anywhere in its name: there is none; `private`: it needs `image_login`.
    """
    image = str(order.get("image") or "")
    name = image.partition("@")[0]
    if "no-such" in image:
        return f"Error response from daemon: manifest for {image} not found: manifest unknown: manifest unknown\n"
    if "private" in image and not order.get("image_login"):
        return (
            f"Error response from daemon: pull access denied for {name.partition(':')[0]}, repository does not exist "
            "or may require 'docker login': denied: requested access to the resource is denied\n"
        )
    return ""

"""How the stand-in for Vast writes an instance: its states, its status in words, its ports, a hundred other fields."""

from __future__ import annotations

import hashlib
from typing import Any

from tests.cloud import vast_search
from tests.cloud.answers import Json
from tests.cloud.vast_instance import VastInstance

_NULL_UNTIL, _CREATED_UNTIL = 0.15, 0.3
"""Of the time of a first start."""
_PULL = [
    "Pulling from {image}",
    "a2318d6c47ec: Pulling fs layer",
    "a2318d6c47ec: Downloading [=======>           ]  1.21GB/3.47GB",
    "a2318d6c47ec: Downloading [===============>   ]  2.9GB/3.47GB",
    "a2318d6c47ec: Verifying Checksum",
    "a2318d6c47ec: Extracting [===========>       ]  2.1GB/3.47GB",
    "a2318d6c47ec: Pull complete",
    "Digest: sha256:{digest}",
]
_OCI = (
    "Error response from daemon: failed to create task for container: failed to create shim task: "
    "OCI runtime create failed: runc create failed: unable to start container process: error during container init: "
    "nvidia-container-cli: device error: unknown device id: unknown\n"
)
_OFFERED = """
machine_id host_id bundle_id gpu_ram gpu_frac gpu_arch gpu_lanes gpu_mem_bw bw_nvlink cpu_name cpu_arch cpu_cores
cpu_cores_effective cpu_ram disk_bw disk_name cuda_max_good driver_version compute_cap os_version mobo_name pci_gen
pcie_bw inet_up inet_down inet_up_cost inet_down_cost static_ip geolocation hosting_type min_bid storage_cost
reliability2 verification rentable dlperf score total_flops credit_discount_max webpage logo end_date num_gpus
"""
"""What an instance has of the offer it was made of."""


_PRICES = "dph_base dph_total storage_total_cost vram_costperhour dlperf_per_dphtotal flops_per_dphtotal search"


def states(one: VastInstance, now: float) -> Json:
    """The four words for what it is and what it is to be."""
    actual = _actual(one, now)
    if one.ending_at is not None and now >= one.ending_at:
        words = ("stopped", "unloaded", "unloaded")
    elif one.boot_from is not None:
        words = ("running", "running", "running")
    elif one.wants and not one.lost_by:  # it waits for its GPUs
        words = ("running", "stopped", "running")
    else:
        words = ("stopped", "stopped", "stopped")
    intended, current, coming = words
    return {"actual_status": actual, "intended_status": intended, "cur_state": current, "next_state": coming}


def _actual(one: VastInstance, now: float) -> str | None:
    if one.up_at is not None:
        odd = one.faults.get("odd-status")
        return one.overlay(now) or (str(odd.detail) if odd else "running")
    if one.boot_from is not None:
        return _booting(one, now - one.boot_from)
    if one.first_up_at is None:
        return "created" if one.stopped_at is not None else None
    was_up = one.stopped_at is not None and now < one.stopped_at + one.timings.stop_lag_s
    return "running" if was_up else "stopped"


def _booting(one: VastInstance, for_s: float) -> str | None:
    if one.boot_word != "loading":
        return one.boot_word
    if one.starts:  # what is shown lags behind
        return "stopped" if for_s < one.boot_s / 2 else "loading"
    share = for_s / one.timings.boot_s if one.timings.boot_s else 1.0
    if share < _NULL_UNTIL:
        return None
    return "created" if share < _CREATED_UNTIL or "boot-created" in one.faults else "loading"


def message(one: VastInstance, now: float) -> str | None:
    """`status_msg`: how far the image is, or what went wrong."""
    actual, image = _actual(one, now), str(one.order.get("image"))
    if actual is None:
        return None
    if actual in ("running", "unknown", "offline"):
        return f"success, running {image.replace(':', '_')}/ssh\n"
    if actual == "created" and "boot-created" in one.faults:
        return str(one.faults["boot-created"].detail or _OCI)
    if actual == "loading":
        return _loading(one, now, image)
    return f"{actual} {image.replace(':', '_')}/ssh\n" if one.starts else ""


def _loading(one: VastInstance, now: float, image: str) -> str:
    if "boot-fails" in one.faults or one.image_error:
        usual = f"Error response from daemon: manifest for {image} not found: manifest unknown: manifest unknown\n"
        told = one.faults["boot-fails"].detail if "boot-fails" in one.faults else one.image_error
        return str(told or usual)
    share = (now - (one.boot_from or now)) / one.timings.boot_s if one.timings.boot_s else 1.0
    shown = _PULL[min(len(_PULL) - 1, int(max(0.0, share - _CREATED_UNTIL) / (1 - _CREATED_UNTIL) * len(_PULL)))]
    return shown.format(image=image, digest=hashlib.sha256(image.encode()).hexdigest()) + "\n"


def ports(one: VastInstance, now: float) -> Json:
    """The field `ports`, which is there while the container runs."""
    runtype = str(one.order.get("runtype") or "ssh")
    if one.up_at is None or now < one.up_at + one.timings.ip_delay_s + one.late("no-ip") or "direc" not in runtype:
        return {}
    if "odd-ports" in one.faults:
        odd: dict[Any, Any] = {None: None, "list": [8080], "empty": {}, "value-null": {"22/tcp": None}}
        return {"ports": odd[one.faults["odd-ports"].detail]}
    found = {"22/tcp": one.direct.port} if "no-direct" not in one.faults else {}
    for number, asked in enumerate(asked_ports(one.order), 1):
        found[asked] = one.direct.port + number
    return {"ports": {name: _published(port) for name, port in found.items()}}


def asked_ports(order: Json) -> list[str]:
    """The container's ports that an order asks for: `8000/tcp`."""
    env = order.get("env")
    words = [word[3:] for word in env if word.startswith("-p ")] if isinstance(env, dict) else []
    inner = [word.rpartition(":")[2] for word in words]
    return [word if "/" in word else f"{word}/tcp" for word in inner]


def _published(port: int) -> list[dict[str, str]]:
    return [{"HostIp": host, "HostPort": str(port)} for host in ("0.0.0.0", "::")]


def shown(one: VastInstance, now: float) -> Json:
    """The instance as the API writes it."""
    offered = {name: one.offer[name] for name in _OFFERED.split()}
    if "delivers-gpu" in one.faults:
        offered |= {"gpu_ram": 12288, "compute_cap": 860}
    priced = vast_search.priced(one.offer, one.disk_gb, one.usd_per_hour)
    return {
        "id": one.number,
        "label": one.name,
        **states(one, now),
        "status_msg": message(one, now),
        **offered,
        **{name: priced[name] for name in _PRICES.split()},
        "instance": vast_search.current(priced["search"], one.is_charged(now)),
        "is_bid": one.bid is not None,
        "gpu_name": one.gpu_name,
        "gpu_totalram": offered["gpu_ram"] * offered["num_gpus"],
        "start_date": one.created_at,
        "duration": one.offer["end_date"] - now,
        **_places(one, now),
        **_ordered(one),
        **_measured(one, now),
    }


def _places(one: VastInstance, now: float) -> Json:
    is_known = one.first_up_at is None or now >= one.first_up_at + one.late("no-ip")
    jupyter = "jupyter" in str(one.order.get("runtype"))
    return {
        "ssh_host": one.proxy.host if is_known else None,
        "ssh_idx": "6",
        "ssh_port": one.proxy.port - jupyter if is_known else None,
        "public_ipaddr": f"{one.direct.host} ",
        "local_ipaddrs": "10.0.0.5 172.17.0.2 \n",
        "machine_dir_ssh_port": 21000,
        "direct_port_count": one.offer["direct_port_count"],
        "direct_port_start": -1,
        "direct_port_end": -1,
        **ports(one, now),
    }


def _ordered(one: VastInstance) -> Json:
    env, order = one.order.get("env"), one.order
    return {
        "image_uuid": str(order.get("image")),
        "image_runtype": str(order.get("runtype") or "ssh"),
        "image_args": order.get("args") or [],
        "extra_env": [[str(key), str(value)] for key, value in env.items()] if isinstance(env, dict) else [],
        "onstart": order.get("onstart") or "",
        "jupyter_token": hashlib.sha256(one.api_key.encode()).hexdigest(),
        "template_id": None,
        "template_hash_id": order.get("template_hash_id"),
        "template_name": None,
        "disk_space": one.disk_gb,
    }


def _measured(one: VastInstance, now: float) -> Json:
    runs = one.runs(now)
    return {
        "uptime_mins": None,
        "gpu_util": 0.0 if runs else None,
        "gpu_temp": 38.0 if runs else None,
        "cpu_util": 0.0,
        "mem_limit": 62.9 if runs else None,
        "mem_usage": 0.01 if runs else None,
        "vmem_usage": 0.5 if runs else None,
        "disk_usage": 0.05 if runs else -1.0,
        "disk_util": 0.05 if runs else -1.0,
        "credit_balance": None,
        "credit_discount": None,
        "client_run_time": 1.1,
        "host_run_time": 2592000.0,
        "external": False,
        "time_remaining": "",
        "time_remaining_isbid": "",
        "country_code": None,
        "volume_info": [],
    }


_NEEDED = """
id machine_id label actual_status intended_status cur_state next_state gpu_name num_gpus dph_total is_bid start_date
ssh_host ssh_port public_ipaddr
"""
_OPTIONAL = """
status_msg ports geolocation reliability2 verification cpu_name cpu_cores cpu_ram disk_space inet_up inet_down
cuda_max_good onstart extra_env local_ipaddrs end_date duration gpu_ram hosting_type image_uuid search instance
"""


def is_instance(found: Json) -> bool:
    """Whether an object of an answer is an instance."""
    return "actual_status" in found


def with_nulls(found: Json) -> Json:
    """An instance whose fields are null where they may be."""
    return found | dict.fromkeys(_OPTIONAL.split()) if is_instance(found) else found


def bare(found: Json) -> Json:
    """An instance that has what it needs and nothing else."""
    return {key: found[key] for key in _NEEDED.split() if key in found} if is_instance(found) else found

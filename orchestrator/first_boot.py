"""What a rented machine does at its first boot: it takes the host key we made for it, and arms its guard."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from dataclasses import asdict
from typing import Any

from orchestrator import agents
from orchestrator.errors import ConfigError
from orchestrator.providers.base import GuardOrder, HostKey

MAX_BYTES = 1_000_000
"""Of the whole text; providers take at most a megabyte."""
SETTINGS_PATH = "/etc/gpu-guard/settings.json"
PROGRAM_PATH = "/opt/gpu-guard/guard.pyz"
_UNIT_PATH = "/etc/systemd/system/gpu-guard.service"
_MODULES = (
    "jobs/__init__.py",
    "jobs/durable.py",
    "jobs/locks.py",
    "jobs/rows.py",
    "jobs/rundir.py",
    "jobs/spec.py",
    "jobs/suites.py",
    "jobs/times.py",
    "jobs/trees.py",
    "worker/__init__.py",
    "worker/__main__.py",
    "worker/acknowledged.py",
    "worker/agent.py",
    "worker/devices.py",
    "worker/failures.py",
    "worker/guard.py",
    "worker/guard_settings.py",
    "worker/idle.py",
    "worker/intake.py",
    "worker/mirroring.py",
    "worker/order.py",
    "worker/outs.py",
    "worker/own_instance.py",
    "worker/pace.py",
    "worker/pieces.py",
    "worker/processes.py",
    "worker/puller.py",
    "worker/steady.py",
    "worker/supervisor.py",
)
"""What the guard, its looks and its stops consist of; a test runs them with nothing else there."""
_MAIN = b"import sys\nfrom worker.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
_START = ["python3", "-I", PROGRAM_PATH, "watch", SETTINGS_PATH]
_UNIT = f"""[Unit]
Description=Ends this rented machine at its deadline, or when it is idle
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/bin/{" ".join(_START)}
Restart=always
RestartSec=15
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
"""
_PRIVATE = re.compile(r"-----BEGIN OPENSSH PRIVATE KEY-----\n[A-Za-z0-9+/=\n]+-----END OPENSSH PRIVATE KEY-----\n")
_PUBLIC = re.compile(r"ssh-ed25519 [A-Za-z0-9+/=]+")


def user_data(host_key: HostKey, guard: GuardOrder | None) -> str:
    """The `#cloud-config` text for the request that rents a machine. It holds secrets, and is shown nowhere.

    ConfigError when a key is none, or the text is too long.
    """
    public = _PUBLIC.match(host_key.public)
    private = host_key.private.rstrip("\n") + "\n"
    if not public or not _PRIVATE.fullmatch(private):
        raise ConfigError("The host key made for the machine is not an ed25519 key pair. Nothing was rented.")
    document: dict[str, Any] = {
        "ssh_deletekeys": True,  # an image's own keys, which other machines have too, are not served beside ours
        "ssh_keys": {"ed25519_private": private, "ed25519_public": public[0]},
    }
    if guard:
        document |= {"write_files": _files(guard), "runcmd": _commands()}
    text = f"#cloud-config\n{json.dumps(document)}\n"  # JSON is YAML, as long as it is plain ASCII
    if len(text) > MAX_BYTES or not text.isascii() or not text.replace("\n", "").isprintable():
        raise ConfigError("What the machine is to do at its first boot cannot be sent: too long, or not plain text.")
    return text


def _files(guard: GuardOrder) -> list[dict[str, str]]:
    """The guard's settings, its program and its unit; contents in base64, whatever is in them."""
    settings = json.dumps(asdict(guard)).encode()
    return [
        _file(SETTINGS_PATH, settings, "0600"),
        _file(PROGRAM_PATH, program(), "0644"),  # no secret, and its looks run as the user
        _file(_UNIT_PATH, _UNIT.encode(), "0644"),
    ]


def _file(path: str, data: bytes, mode: str) -> dict[str, str]:
    content = base64.b64encode(data).decode()
    return {"path": path, "owner": "root:root", "permissions": mode, "encoding": "b64", "content": content}


def _commands() -> list[list[str]]:
    """Start the guard so that it comes back after a crash and a reboot; once more by hand, where that fails.

    Two do no harm: the second finds the lock taken and ends, and systemd tries it again should the first die.
    """
    return [
        ["systemctl", "daemon-reload"],
        ["systemctl", "enable", "--now", "gpu-guard.service"],
        ["setsid", "-f", *_START],
    ]


def program() -> bytes:
    """The guard as one file that Python runs, the same bytes for the same code."""
    sources = agents.sources()
    files = {name: sources[name] for name in _MODULES} | {"__main__.py": _MAIN}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return packed.getvalue()

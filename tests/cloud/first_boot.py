"""What `user_data` asks of a machine at its first boot, and where its paths lie on a machine that is a folder."""

from __future__ import annotations

import base64
import email
import gzip
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_BEFORE = r"(^|[^A-Za-z0-9_./-])"
"""A path begins here; as extended regular expressions of sed and of Python have it."""
_SYSTEM = (
    r"/(etc|etc/systemd/system|var/lib|var/log|var/tmp|var/cache|run|opt|srv|usr/local|usr/local/s?bin|usr/local/lib)/"
)
_LOGIN_HOME = "/home/ubuntu"
_GZIP = ("gz", "gzip")


@dataclass(frozen=True)
class File:
    """A file that is to be written."""

    path: str
    content: bytes
    mode: int
    appends: bool


@dataclass
class Plan:
    """All that is to be done."""

    host_key: tuple[str, str] | None = None
    """The private and the public half."""
    authorized_keys: list[str] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    """Each a program with its first line, run one after the other."""
    not_played: list[str] = field(default_factory=list)
    """What the stand-in has no idea of."""


def read(user_data: str) -> Plan:
    """What is asked: cloud-config, a script that begins with #!, or several parts of these in a MIME message."""
    plan = Plan()
    if user_data.startswith(("Content-Type:", "MIME-Version:")):
        for part in email.message_from_string(user_data).walk():
            if not part.is_multipart():
                body = part.get_payload(decode=True)
                _read_part(body.decode() if isinstance(body, bytes) else "", plan)
    elif user_data:
        _read_part(user_data, plan)
    return plan


def _read_part(text: str, plan: Plan) -> None:
    if text.startswith("#!"):
        plan.scripts.append(text)
    elif text.startswith("#cloud-config"):
        _read_config(yaml.safe_load(text) or {}, plan)
    else:
        plan.not_played.append(text.partition("\n")[0])


def _read_config(config: dict[str, Any], plan: Plan) -> None:
    keys = config.get("ssh_keys") or {}
    if "ed25519_private" in keys:
        plan.host_key = keys["ed25519_private"], keys["ed25519_public"]
    plan.authorized_keys += config.get("ssh_authorized_keys") or []
    plan.files += [_file(entry) for entry in config.get("write_files") or []]
    for name in ("bootcmd", "runcmd"):
        if lines := config.get(name):
            words = [line if isinstance(line, str) else shlex.join(map(str, line)) for line in lines]
            plan.scripts.append("\n".join(["#!/bin/sh", *words, ""]))
    known = {"ssh_keys", "ssh_authorized_keys", "write_files", "bootcmd", "runcmd", "ssh_deletekeys", "ssh_genkeytypes"}
    plan.not_played += sorted(set(config) - known)


def _file(entry: dict[str, Any]) -> File:
    content = entry.get("content", "")
    data = content if isinstance(content, bytes) else str(content).encode()
    encodings = str(entry.get("encoding", "")).split("+")
    if {"b64", "base64"} & set(encodings):
        data = base64.b64decode(data)
    if encodings[0] in _GZIP:
        data = gzip.decompress(data)
    return File(entry["path"], data, int(str(entry.get("permissions", "0644")), 8), bool(entry.get("append")))


class Paths:
    """Where a path of the machine lies on this computer.

    Moved are `/home/ubuntu`, what lies below a system folder and begins with `gpu` or `.gpu` (`/var/lib/gpu-guard/x`,
    `/etc/systemd/system/gpu.service`), `/var/lib/cloud`, and what `write_files` names; all else is this computer's own.
    It holds for the text of user_data and of commands over SSH, not inside files sent there by other ways.
    """

    def __init__(self, root: Path, home: Path, named: Iterable[str] = (), login_home: str = _LOGIN_HOME) -> None:
        self.root = root
        # of somebody who is called so and works there: only what is surely ours is moved
        rest = r"/\.(gpu|ssh|no_auto_tmux)" if self._is_here(login_home) else ""
        self.rules = [
            (rf"{_BEFORE}{login_home}({rest}$|{rest}[^A-Za-z0-9_.-])", rf"\1{home}\2"),
            (rf"{_BEFORE}({_SYSTEM}\.?gpu|/var/lib/cloud)", rf"\1{root}\2"),
        ]
        for path in sorted(named, key=len, reverse=True):
            if self.moved(path) == path and not self._is_here(path):
                self.rules.append((rf"{_BEFORE}{re.escape(path)}", rf"\1{root}{path}"))

    def _is_here(self, folder: str) -> bool:
        """Whether a folder of that name on this computer is what the tests run in."""
        return str(self.root).startswith(f"{folder}/") or sys.executable.startswith(f"{folder}/")

    def moved(self, text: str) -> str:
        """The text with every path of the machine as it is here."""
        for pattern, replacement in self.rules:
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        return text

    def sed(self) -> str:
        """The same as a script for `sed -E`."""
        return "".join(f"s\x01{pattern}\x01{text}\x01g\n" for pattern, text in self.rules)

    def at(self, path: str) -> Path:
        """Where a file is to be written: below the machine's root whatever its path."""
        moved = self.moved(path)
        return Path(moved) if moved != path else self.root / path.lstrip("/")

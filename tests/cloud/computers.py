"""A computer of a stand-in: a folder with an sshd that knows its user by name, programs of its own, and its GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import grp
import json
import os
import pwd
import random
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests import rig
from tests.cloud import libcuda, onboard
from tests.cloud.answers import Json
from tests.rig.sshd import MARK, SYSTEM_PATH, Sshd

DEADLINE_S = 10.0
_TRIES = 1000
_PROGRAMS = Path(onboard.__file__)
_LIBRARY_PLACES = ("/usr/lib/*/libnss_wrapper.so", "/usr/lib64/libnss_wrapper.so", "/usr/lib/libnss_wrapper.so")
# SHELL is set back: only this session's command is to be changed, not those of shells that it starts.
_SHELL = """\
#!/bin/sh
export SHELL=/bin/bash LD_LIBRARY_PATH={libraries}
{first}[ "$1" = -c ] || exec /bin/bash "$@"
exec /bin/bash -c "$(printf %s "$2" | sed -E -f {rules})"
"""


def wrapper() -> str | None:
    """The library that gives one process a user database of its own; None when it is not installed."""
    found = [path for place in _LIBRARY_PLACES for path in Path("/").glob(place.lstrip("/"))]
    return str(found[0]) if found else None


def need_computers(user: str) -> None:
    """Skip the test, saying what to type, where no computer can let in such a user."""
    rig.need_sshd()
    if wrapper() is None and pwd.getpwuid(os.getuid()).pw_name != user:
        pytest.skip(f"no way to log in as {user} here. Type: apt-get install libnss-wrapper")


def free_address(port: int) -> str:
    """An address of loopback where nobody listens on the port."""
    for _ in range(_TRIES):
        address = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return address
    raise RuntimeError(f"no loopback address is free on port {port}")


class Computer:
    """A folder with an sshd, programs that stand before those of this computer, and a driver's library."""

    def __init__(self, folder: Path, instance: Any, user: str) -> None:
        self.folder = folder
        self.instance = instance
        self._as_user = as_user(folder, user)
        self.sshd = Sshd(folder, inside=self._as_user)
        self.sshd.user = user
        self._has_changed_key = False

    def install(self, names: Iterable[str], absent: Iterable[str], rules: str, first: str = "") -> None:
        """Put programs before those of this computer, and a shell that moves paths as `rules` for sed say.

        `absent` are programs that are not to be found; `first` is what each session's shell does at first.
        """
        programs, faults = self.folder / "bin", self.instance.faults
        programs.mkdir(exist_ok=True)
        gpus = shown_gpus(self.instance)
        (self.folder / "gpus.json").write_text(json.dumps(gpus))
        absent = {*absent, *(["nvidia-smi"] if not gpus["count"] or "smi-missing" in faults else [])}
        here = {name for name in absent if shutil.which(name, path=SYSTEM_PATH)}  # else it is truly absent
        for name in sorted({*names} - absent | here):
            words = shlex.join([sys.executable, "-I", "-S", str(_PROGRAMS), name, str(self.folder)])
            missing = f'#!/bin/sh\necho "bash: {name}: command not found" >&2\nexit 127\n'
            (programs / name).write_text(missing if name in here else f'#!/bin/sh\nexec {words} "$@"\n')
            (programs / name).chmod(0o755)
        (self.folder / "lib").mkdir(exist_ok=True)
        error = int(faults["cuda-error"].detail or 802) if "cuda-error" in faults else 0
        if gpus["count"]:
            (self.folder / "lib" / "libcuda.so.1").write_bytes(libcuda.library(error, gpus["count"]))
        shell = self.folder / "shell"
        (self.folder / "paths.sed").write_text(rules)
        quoted = {"libraries": self.folder / "lib", "rules": self.folder / "paths.sed"}
        shell.write_text(_SHELL.format(first=first, **{name: shlex.quote(str(it)) for name, it in quoted.items()}))
        shell.chmod(0o755)
        self.sshd.path, self.sshd.shell = self.path, str(shell)

    @property
    def path(self) -> str:
        """Where programs are looked for."""
        return f"{self.folder / 'bin'}:{SYSTEM_PATH}"

    def environment(self, home: Path) -> dict[str, str]:
        """Of a program that the computer itself starts."""
        known = dict(word.split("=", 1) for word in self._as_user[1:])  # its user is known there
        own = {"PATH": self.path, "HOME": str(home), MARK: self.sshd.name, "SHELL": "/bin/sh", "LANG": "C.UTF-8"}
        return own | {"LD_LIBRARY_PATH": str(self.folder / "lib")} | known

    def started(
        self, words: list[str], environment: dict[str, str], log: Path, cwd: str = "/"
    ) -> subprocess.Popen[bytes]:
        """A program that the computer itself starts; what it writes goes to a log."""
        with log.open("ab") as out:
            return subprocess.Popen(
                words,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def change_key_after_login(self) -> None:
        """Have another host key once somebody has logged in, where a fault has it so."""
        if "other-host-key" in self.instance.faults and not self._has_changed_key and self.has_seen_login():
            self._has_changed_key = True
            self.sshd.new_host_key()

    def has_seen_login(self) -> bool:
        """Whether somebody was let in."""
        return self.sshd.log.exists() and b"Accepted publickey" in self.sshd.log.read_bytes()


def shown_gpus(instance: Any) -> Json:
    """What nvidia-smi is to say on an instance's computer."""
    real, faults = instance.gpus, instance.faults
    found: Json = {**dataclasses.asdict(real), "mode": "ok", "seed": instance.instance_id}
    if fault := faults.get("smi-wrong-gpu"):
        found["name"] = fault.detail or "Tesla T4"
    if fault := faults.get("smi-wrong-count"):
        found["count"] = real.count - 1 if fault.detail is None else fault.detail
    if fault := faults.get("smi-wrong-memory"):
        found["memory_mib"] = fault.detail or real.memory_mib // 2
    if "smi-fails" in faults:
        found["mode"] = "fails"
    if fault := faults.get("smi-hangs"):
        found |= {"mode": "hangs", "seconds": fault.seconds}
    return found


def as_user(folder: Path, user: str) -> list[str]:
    """Words before sshd's own, with which it takes whoever runs the tests for `user`; none where he is."""
    library, me = wrapper(), pwd.getpwuid(os.getuid())
    if me.pw_name == user or library is None:
        return []
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    rows = [f"{user}:x:{me.pw_uid}:{me.pw_gid}:{user}:{folder / 'home'}:/bin/bash"]
    rows += [":".join(map(str, row)) for row in pwd.getpwall() if row.pw_name != user]
    groups = [f"{row.gr_name}:x:{row.gr_gid}:" for row in grp.getgrall() if row.gr_name != user]
    (folder / "passwd").write_text("\n".join([*rows, ""]))
    (folder / "group").write_text("\n".join([f"{user}:x:{me.pw_gid}:", *groups, ""]))
    return [
        "env",
        f"LD_PRELOAD={library}",
        f"NSS_WRAPPER_PASSWD={folder / 'passwd'}",
        f"NSS_WRAPPER_GROUP={folder / 'group'}",
    ]

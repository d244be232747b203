"""What stands behind the stand-in's instances: a real sshd each, which lets `ubuntu` in after a first boot."""

from __future__ import annotations

import contextlib
import dataclasses
import grp
import json
import os
import pwd
import random
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import rig
from tests.cloud import first_boot, libcuda, onboard
from tests.cloud.answers import Json
from tests.cloud.instance import Instance
from tests.rig.proxy import free_address
from tests.rig.sshd import MARK, SYSTEM_PATH, Sshd

USER = "ubuntu"
_DEADLINE_S = 10.0
_TRIES = 1000
_PROGRAMS = Path(onboard.__file__)
_LIBRARY_PLACES = ("/usr/lib/*/libnss_wrapper.so", "/usr/lib64/libnss_wrapper.so", "/usr/lib/libnss_wrapper.so")
_PLACES = (
    *("root", "etc/systemd/system", "opt", "run", "srv", "usr/local/bin", "usr/local/lib", "usr/local/sbin"),
    *("var/cache", "var/lib", "var/log", "var/tmp"),
)
"""Folders that every system has."""
# SHELL is set back: only this session's command is to be changed, not those of shells that it starts.
_SHELL = """\
#!/bin/sh
export SHELL=/bin/bash LD_LIBRARY_PATH={libraries}
[ "$1" = -c ] || exec /bin/bash "$@"
exec /bin/bash -c "$(printf %s "$2" | sed -E -f {rules})"
"""
_SCRIPT = """\
#!/bin/sh
cd {root} || exit
for part in {folder}/first-boot/*; do [ ! -x "$part" ] || "$part"; done
mkdir -p {root}/var/lib/cloud/instance && : > {root}/var/lib/cloud/instance/boot-finished
"""


def wrapper() -> str | None:
    """The library that gives one process a user database of its own; None when it is not installed."""
    found = [path for place in _LIBRARY_PLACES for path in Path("/").glob(place.lstrip("/"))]
    return str(found[0]) if found else None


def need_machines() -> None:
    """Skip the test, saying what to type, where no machine can let in `ubuntu`."""
    rig.need_sshd()
    if wrapper() is None and pwd.getpwuid(os.getuid()).pw_name != USER:
        pytest.skip("no way to log in as ubuntu here. Type: apt-get install libnss-wrapper")


class Machine:
    """One instance's computer: a folder with a home, a root, programs of its own, and an sshd."""

    def __init__(self, folder: Path, instance: Instance, port: int) -> None:
        self.instance = instance
        self.folder = folder
        self._as_ubuntu = _as_ubuntu(folder)
        self.sshd = Sshd(folder, inside=self._as_ubuntu)
        self.sshd.user = USER
        self.sshd.address, self.sshd.port = instance.address, port
        self.root = folder / "root"
        plan = first_boot.Plan()
        if "ignores-user-data" not in instance.faults:
            plan = first_boot.read(instance.order.get("user_data", ""))
        self.plan = plan
        self.paths = first_boot.Paths(self.root, self.sshd.home, [file.path for file in plan.files])
        self._boot: subprocess.Popen[bytes] | None = None
        self._changed_key = False
        self._denies = "publickey-denied" in instance.faults

    def boot(self) -> None:
        """Do what a first boot does: keys, files, then the scripts, which go on by themselves."""
        for name in ("first-boot", "services", *(f"root/{place}" for place in _PLACES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._install()
        if self.plan.host_key and "ignores-host-key" not in self.instance.faults:
            self._have_host_key(*self.plan.host_key)
        for file in self.plan.files:
            self._write(file)
        for number, script in enumerate(self.plan.scripts):
            path = self.folder / "first-boot" / f"{number:03}"
            path.write_text(self.paths.moved(script))
            path.chmod(0o700)
        self._authorize()
        script = _SCRIPT.format(root=shlex.quote(str(self.root)), folder=shlex.quote(str(self.folder)))
        self._boot = self._started(script)

    def open(self) -> None:
        """Let people log in."""
        self.sshd.start()

    def power_off(self) -> None:
        """End all processes; it can be opened again."""
        self.sshd.power_off()
        self._reap()

    def reboot(self) -> None:
        """End all processes, and begin again with the services that are enabled; nobody can log in yet."""
        self.power_off()
        (self.folder / "power").unlink(missing_ok=True)
        if enabled := [path.stem for path in (self.folder / "services").glob("*.enabled")]:
            self._boot = self._started(f"#!/bin/sh\nsystemctl start {shlex.join(enabled)}\n")

    def close(self) -> None:
        """End all processes, for good. May be called twice; the folder stays."""
        self.sshd.close()
        self._reap()

    def _reap(self) -> None:
        if self._boot is not None:
            self._boot.wait(_DEADLINE_S)
            self._boot = None

    def look(self, now: float) -> str:
        """Do what is due by now; what the machine asks for: `off`, `reboot`, or nothing."""
        if self._boot is not None:
            self._boot.poll()
        if self._denies and now >= self.instance.sshd_at + self.instance.faults["publickey-denied"].seconds:
            self._denies = False
            self._authorize()
        if "other-host-key" in self.instance.faults and not self._changed_key and self._has_seen_login():
            self._changed_key = True
            self.sshd.new_host_key()
        power = self.folder / "power"
        return power.read_text().strip() if power.exists() else ""

    def _authorize(self) -> None:
        """Have the keys that are let in, or none while they are denied."""
        keys = [] if self._denies else [self.instance.public_key, *self.plan.authorized_keys]
        (self.folder / "authorized_keys").write_text("\n".join([*keys, ""]))

    def _has_seen_login(self) -> bool:
        return b"Accepted publickey" in self.sshd.log.read_bytes()

    def _have_host_key(self, private: str, public: str) -> None:
        key = self.folder / "host_ed25519"
        key.write_text(private if private.endswith("\n") else private + "\n")
        key.with_suffix(".pub").write_text(public)
        self.sshd.pin()

    def _write(self, file: first_boot.File) -> None:
        path = self.paths.at(file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = file.content
        with contextlib.suppress(UnicodeDecodeError):  # a unit file names the program that another entry writes
            content = self.paths.moved(content.decode()).encode()
        with path.open("ab" if file.appends else "wb") as out:
            out.write(content)
        path.chmod(file.mode)

    def _install(self) -> None:
        """Put this machine's programs and library before those of this computer."""
        programs, faults = self.folder / "bin", self.instance.faults
        programs.mkdir(exist_ok=True)
        gpus = _gpus(self.instance)
        (self.folder / "gpus.json").write_text(json.dumps(gpus))
        names = set(onboard.PROGRAMS) - (set() if self.instance.kind.get("architecture") == "arm64" else {"uname"})
        missing = not gpus["count"] or "smi-missing" in faults
        for name in sorted(names):
            words = shlex.join([sys.executable, "-I", "-S", str(_PROGRAMS), name, str(self.folder)])
            text = f'#!/bin/sh\nexec {words} "$@"\n'
            if name == "nvidia-smi" and missing:
                text = f'#!/bin/sh\necho "bash: {name}: command not found" >&2\nexit 127\n'
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        if missing:  # where this computer has none, it is truly absent
            (programs / "nvidia-smi").unlink()
        (self.folder / "lib").mkdir(exist_ok=True)
        error = int(faults["cuda-error"].detail or 802) if "cuda-error" in faults else 0
        if gpus["count"]:
            (self.folder / "lib" / "libcuda.so.1").write_bytes(libcuda.library(error, gpus["count"]))
        shell = self.folder / "shell"
        (self.folder / "paths.sed").write_text(self.paths.sed())
        quoted = {"libraries": self.folder / "lib", "rules": self.folder / "paths.sed"}
        shell.write_text(_SHELL.format(**{name: shlex.quote(str(path)) for name, path in quoted.items()}))
        shell.chmod(0o755)
        self.sshd.path, self.sshd.shell = self._path, str(shell)

    @property
    def _path(self) -> str:
        return f"{self.folder / 'bin'}:{SYSTEM_PATH}"

    def _started(self, script: str) -> subprocess.Popen[bytes]:
        """A program run as the machine's root: its home is /root of the machine, its words go to a log."""
        path = self.folder / "boot-script"
        path.write_text(script)
        path.chmod(0o700)
        environment = {"PATH": self._path, "HOME": str(self.root / "root"), MARK: self.sshd.name, "SHELL": "/bin/sh"}
        environment |= {"LD_LIBRARY_PATH": str(self.folder / "lib"), "LANG": "C.UTF-8"}
        environment |= dict(word.split("=", 1) for word in self._as_ubuntu[1:])  # `ubuntu` is known there
        with (self.root / "var/log/cloud-init-output.log").open("ab") as log:
            return subprocess.Popen(
                [str(path)],
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def _gpus(instance: Instance) -> Json:
    """What nvidia-smi is to say on this machine."""
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


def _as_ubuntu(folder: Path) -> list[str]:
    """Words before sshd's own, with which it takes whoever runs the tests for `ubuntu`; none where he is."""
    library, me = wrapper(), pwd.getpwuid(os.getuid())
    if me.pw_name == USER or library is None:
        return []
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    rows = [f"{USER}:x:{me.pw_uid}:{me.pw_gid}:Ubuntu:{folder / 'home'}:/bin/bash"]
    rows += [":".join(map(str, row)) for row in pwd.getpwall() if row.pw_name != USER]
    groups = [f"{row.gr_name}:x:{row.gr_gid}:" for row in grp.getgrall() if row.gr_name != USER]
    (folder / "passwd").write_text("\n".join([*rows, ""]))
    (folder / "group").write_text("\n".join([f"{USER}:x:{me.pw_gid}:", *groups, ""]))
    return [
        "env",
        f"LD_PRELOAD={library}",
        f"NSS_WRAPPER_PASSWD={folder / 'passwd'}",
        f"NSS_WRAPPER_GROUP={folder / 'group'}",
    ]


class SshMachines:
    """The machines of one stand-in, all on one port; at the end of its block no process of them is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_address()[1]
        self.all: dict[str, Machine] = {}

    def __enter__(self) -> SshMachines:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.all.values():
            machine.close()

    def address(self) -> str:
        """An address of loopback where nobody listens on the port."""
        for _ in range(_TRIES):
            address = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind((address, self.port))
                return address
        raise RuntimeError(f"no loopback address is free on port {self.port}")

    def boot(self, instance: Instance) -> None:
        """Make the instance's machine, and do what its first boot does."""
        machine = Machine(self.folder / instance.instance_id[:8], instance, self.port)
        self.all[instance.instance_id] = machine
        machine.boot()

    def open(self, instance: Instance) -> None:
        """Let people log in."""
        self.all[instance.instance_id].open()

    def reboot(self, instance: Instance) -> None:
        """End all processes and begin again."""
        self.all[instance.instance_id].reboot()

    def end(self, instance: Instance) -> None:
        """End all processes, for good."""
        self.all[instance.instance_id].close()

    def power_off(self, instance: Instance) -> None:
        """End all processes; it may be rebooted."""
        self.all[instance.instance_id].power_off()

    def look(self, instance: Instance, now: float) -> bool:
        """Do what is due by now; whether the machine still runs."""
        machine = self.all[instance.instance_id]
        asked = machine.look(now)
        if asked == "reboot":
            machine.reboot()
            machine.open()
        return asked != "off"

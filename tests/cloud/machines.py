"""What stands behind instances of the stand-in for Lambda: a real sshd each, which lets `ubuntu` in after a boot."""

from __future__ import annotations

import contextlib
import errno
import shlex
import subprocess
import time
from pathlib import Path

from tests.cloud import computers, first_boot, onboard
from tests.cloud.computers import DEADLINE_S, Computer
from tests.cloud.instance import Instance
from tests.rig.proxy import free_address

USER = "ubuntu"
_PLACES = (
    *("root", "etc/systemd/system", "opt", "run", "srv", "usr/local/bin", "usr/local/lib", "usr/local/sbin"),
    *("var/cache", "var/lib", "var/log", "var/tmp"),
)
"""Folders that every system has."""
_BUSY_TRIES, _BUSY_S = 100, 0.05
_SCRIPT = """\
#!/bin/sh
cd {root} || exit
for part in {folder}/first-boot/*; do [ ! -x "$part" ] || "$part"; done
mkdir -p {root}/var/lib/cloud/instance && : > {root}/var/lib/cloud/instance/boot-finished
"""


def need_machines() -> None:
    """Skip the test, saying what to type, where no machine can let in `ubuntu`."""
    computers.need_computers(USER)


class Machine(Computer):
    """One instance's computer: a folder with a home, a root, programs of its own, and an sshd."""

    def __init__(self, folder: Path, instance: Instance, port: int) -> None:
        super().__init__(folder, instance, USER)
        self.sshd.address, self.sshd.port = instance.address, port
        self.root = folder / "root"
        plan = first_boot.Plan()
        if "ignores-user-data" not in instance.faults:
            plan = first_boot.read(instance.order.get("user_data", ""))
        self.plan = plan
        self.paths = first_boot.Paths(self.root, self.sshd.home, [file.path for file in plan.files])
        self._boot: subprocess.Popen[bytes] | None = None
        self._denies = "publickey-denied" in instance.faults

    def boot(self) -> None:
        """Do what a first boot does: keys, files, then the scripts, which go on by themselves."""
        for name in ("first-boot", "services", *(f"root/{place}" for place in _PLACES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        is_arm = self.instance.kind.get("architecture") == "arm64"
        self.install(set(onboard.PROGRAMS) - (set() if is_arm else {"uname"}), (), self.paths.sed())
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
            self._boot.wait(DEADLINE_S)
            self._boot = None

    def look(self, now: float) -> str:
        """Do what is due by now; what the machine asks for: `off`, `reboot`, or nothing."""
        if self._boot is not None:
            self._boot.poll()
        if self._denies and now >= self.instance.sshd_at + self.instance.faults["publickey-denied"].seconds:
            self._denies = False
            self._authorize()
        self.change_key_after_login()
        power = self.folder / "power"
        return power.read_text().strip() if power.exists() else ""

    def _authorize(self) -> None:
        """Have the keys that are let in, or none while they are denied."""
        keys = [] if self._denies else [self.instance.public_key, *self.plan.authorized_keys]
        (self.folder / "authorized_keys").write_text("\n".join([*keys, ""]))

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

    def _started(self, script: str) -> subprocess.Popen[bytes]:
        """A program run as the machine's root: its home is /root of the machine, its words go to a log."""
        path = self.folder / "boot-script"
        path.write_text(script)
        path.chmod(0o700)
        log = self.root / "var/log/cloud-init-output.log"
        environment = self.environment(self.root / "root")
        for _ in range(_BUSY_TRIES):
            try:
                return self.started([str(path)], environment, log)
            except OSError as error:  # a process that another thread forks just now has it open for a moment
                if error.errno != errno.ETXTBSY:
                    raise
            time.sleep(_BUSY_S)
        return self.started([str(path)], environment, log)


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
        return computers.free_address(self.port)

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

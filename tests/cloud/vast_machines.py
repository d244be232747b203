"""What stands behind instances of the stand-in for Vast: containers with a real sshd, their own start, and a disk."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.cloud import computers, first_boot
from tests.cloud.computers import DEADLINE_S, Computer
from tests.cloud.vast_instance import Place, VastInstance
from tests.cloud.vast_shown import asked_ports
from tests.rig.proxy import free_address
from tests.rig.sshd import Sshd

USER, COPIER = "root", "vastai_kaalia"
BANNER = (
    "Welcome to vast.ai. If authentication fails, try again after a few seconds, and double check your ssh key.\n"
    "Have fun!\n"
)
_MOVED = ("/etc/environment", "/etc/ssh", "/proc/1/environ", "/workspace")
_PLACES = """
etc/ssh opt proc/1 root/.ssh run tmp usr/local/bin var/lib var/log workspace
"""
"""Folders that every image has."""
_PLAYED = ("nvidia-smi", "apt-get", "apt", "crontab", "useradd", "usermod", "mount", "at")
_ABSENT = (
    "systemctl",
    "systemd-run",
    "sudo",
    "shutdown",
    "poweroff",
    "halt",
    "reboot",
    "cloud-init",
    "snap",
    "loginctl",
)
"""What no image has, and what must not be asked of the computer that the tests run on."""
_FIRST = """\
if [ -r {file} ]; then
    while IFS= read -r line; do
        case $line in [A-Za-z_]*=*) export "$line" ;; esac
    done < {file}
fi
"""
"""What a login does with /etc/environment."""
_NO_TMUX = '[ -e "$HOME/.no_auto_tmux" ] || { echo "no sessions" >&2; exit 1; }\n'
_RSYNCD = "use chroot = no\nread only = no\nmunge symlinks = no\n{owner}"
_GATE = "#!/bin/sh\necho copying >> {seen}\nexec rsync --server --daemon{slow} --config={config} .\n"


def need_containers() -> None:
    """Skip the test, saying what to type, where no container can let in `root`, or disks cannot be copied."""
    computers.need_computers(USER)
    computers.need_computers(COPIER)


class Container(Computer):
    """One instance's container: its disk is a folder, and whoever logs in is root of it."""

    def __init__(self, folder: Path, instance: VastInstance) -> None:
        super().__init__(folder, instance, USER)
        self.one = instance
        self.disk = folder / "disk"
        self.home = self.sshd.home = self.disk / "root"
        self.log = folder / "container.log"
        self.paths = first_boot.Paths(self.disk, self.home, _MOVED, login_home="/root")
        self.sshd.banner = BANNER
        self.is_over = False
        self._starts = 0
        """Which start of the instance it runs; 0: it does not."""
        self._containers = 1
        self._is_open = False
        self._reached = "running"
        self._keys: list[str] = []
        self._written_at = 0.0
        """When the keys were last written anew."""
        self._process: subprocess.Popen[bytes] | None = None

    def follow(self, now: float) -> None:
        """Be as the instance is now."""
        if self.one.costs_until is not None and now >= min(self.one.costs_until, self.one.ending_at or now):
            self._destroy()
            return
        wanted = self.one.starts if self.one.runs(now) else 0
        if self._starts != wanted:
            if self._starts:
                self._halt()
            if wanted:
                self._boot(now)
            self._starts = wanted
        if not wanted:
            return
        if not self._is_open and now >= self.one.sshd_at and self.one.order.get("runtype") != "args":
            self.sshd.start()
            self._is_open, self._reached = True, "running"
        self._reach(self.one.overlay(now) or "running")
        self._admit(now)
        self.change_key_after_login()
        if self._process is not None:
            self._process.poll()

    def close(self) -> None:
        """End all processes, for good. May be called twice."""
        self._halt()
        self.sshd.close()

    # --- its start and its end ---------------------------------------------------------------------------------------

    def _boot(self, now: float) -> None:
        """Start the container: the keys are let in, then `onstart` runs, as its own first process does."""
        if self._containers != self.one.containers:
            self._containers = self.one.containers
            shutil.rmtree(self.disk)
            self.log.unlink()
            self.sshd.new_host_key()
        for name in _PLACES.split():
            (self.disk / name).mkdir(parents=True, exist_ok=True)
        self._listen()
        self._install()
        for name in ("host_ed25519", "host_ed25519.pub"):
            shutil.copy(
                self.folder / name, self.disk / "etc/ssh" / name.replace("host_ed25519", "ssh_host_ed25519_key")
            )
        self._write_keys(self.one.lets_in(now))
        self._written_at = now
        variables = self._variables()
        whole = self.environment(self.home) | variables
        environ = b"".join(f"{name}={value}\0".encode() for name, value in whole.items())
        (self.disk / "proc/1/environ").write_bytes(environ)
        with self.log.open("a") as log:
            log.write(f"entrypoint: container C.{self.one.number} starts, ssh is set up\n")
        script = self.home / "onstart.sh"
        script.write_text(self.paths.moved(str(self.one.order.get("onstart") or "")) + "\n")
        if "ignores-user-data" not in self.one.faults:
            self._process = self.started(["/bin/sh", str(script)], whole, self.log, str(self.home))

    def _halt(self) -> None:
        """End all processes abruptly, as a host does with whoever is outbid; the disk stays."""
        self.sshd.power_off()
        self._is_open, self._reached = False, "running"
        if self._process is not None:
            self._process.wait(DEADLINE_S)
            self._process = None

    def _destroy(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.close()
            shutil.rmtree(self.disk, ignore_errors=True)

    def _listen(self) -> None:
        """Have sshd listen where this instance is said to be: at its direct port, at its proxy, or at both."""
        faults = self.one.faults
        has_direct = "direc" in str(self.one.order.get("runtype")) and not {"no-direct", "direct-dead"} & set(faults)
        places = [self.one.direct] if has_direct else []
        places += [self.one.proxy] if "proxy-dead" not in faults or not places else []
        self.sshd.address, self.sshd.port = places[0].host, places[0].port
        self.sshd.settings = {"ListenAddress": f"{places[1].host}:{places[1].port}"} if len(places) > 1 else {}

    def _install(self) -> None:
        is_arm = self.one.offer["cpu_arch"] == "arm64"
        first = _FIRST.format(file=shlex.quote(str(self.disk / "etc/environment")))
        first += _NO_TMUX if "tmux" in self.one.faults else ""
        absent = (*_ABSENT, *(["rsync"] if "no-rsync" in self.one.faults else []))
        self.install((*_PLAYED, *(["uname"] if is_arm else [])), absent, self.paths.sed(), first)
        told = json.loads((self.folder / "gpus.json").read_text())
        told |= {"driver": self.one.offer["driver_version"], "cuda": str(self.one.offer["cuda_max_good"])}
        (self.folder / "gpus.json").write_text(json.dumps(told))

    def _variables(self) -> dict[str, str]:
        """What the container's own processes are told; those of a login over SSH are not."""
        one = self.one
        env = one.order.get("env")
        asked = {name: str(value) for name, value in env.items() if name[:1] != "-"} if isinstance(env, dict) else {}
        inner = [name.partition("/")[0] for name in asked_ports(one.order)]
        return {
            "CONTAINER_API_KEY": one.api_key,
            "CONTAINER_ID": str(one.number),
            "VAST_CONTAINERLABEL": f"C.{one.number}",
            "PUBLIC_IPADDR": one.direct.host,
            "SSH_PUBLIC_KEY": one.keys[0].public if one.keys else "",
            "GPU_COUNT": str(one.gpus.count),
            "DATA_DIRECTORY": f"{self.disk / 'workspace'}/",
            "VAST_TCP_PORT_22": str(one.direct.port),
            **{f"VAST_TCP_PORT_{name}": str(one.direct.port + at) for at, name in enumerate(inner, 1)},
            **{name: self.paths.moved(value) for name, value in asked.items()},
        }

    # --- who gets in -------------------------------------------------------------------------------------------------

    @property
    def _refresh_s(self) -> float:
        fault = self.one.faults.get("keys-refreshed")
        return fault.seconds if fault else self.one.timings.key_refresh_s

    def _admit(self, now: float) -> None:
        """Let in what was attached, and now and then nobody else."""
        keys = self.one.lets_in(now)
        if now >= self._written_at + self._refresh_s:
            self._written_at = now
            self._write_keys(keys)
        elif keys != self._keys:
            lost = {key for key in self._keys if key not in keys}
            kept = [line for line in self._authorized.read_text().splitlines() if line not in lost]
            self._write_keys(keys, kept + [key for key in keys if key not in kept])

    def _write_keys(self, keys: list[str], lines: list[str] | None = None) -> None:
        """Have these keys of the API in the file that sshd reads, which may have other lines."""
        self._keys = keys
        self._authorized.parent.mkdir(parents=True, exist_ok=True)
        self._authorized.write_text("".join(f"{line}\n" for line in (keys if lines is None else lines)))
        self._authorized.chmod(0o600)
        known = self.folder / "authorized_keys"
        if not known.is_symlink():
            known.unlink()
            known.symlink_to(self._authorized)

    @property
    def _authorized(self) -> Path:
        return self.home / ".ssh" / "authorized_keys"

    def _reach(self, word: str) -> None:
        """Be out of reach while the host is away, with processes that go on; or stand still while it is frozen."""
        if word != self._reached:
            self.sshd.thaw()
            if word in ("offline", "frozen"):
                self.sshd.freeze(jobs=word == "frozen")
            self._reached = word

    def mirror_paths(self) -> None:
        """Have files on the disk by the paths, too, that programs there know them by: those of this computer."""
        here = self.disk / str(self.disk).strip("/")
        if not here.is_symlink():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.symlink_to(os.path.relpath(self.disk, here.parent))

    def at(self, path: str) -> Path:
        """Where a path of the container lies here; never outside its disk."""
        return self.disk / posixpath.normpath(f"/{path}").strip("/")


class Containers:
    """The containers of one stand-in; at the end of its block no process of them is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: dict[str, Container] = {}
        self.copier: Sshd | None = None
        """The sshd through which disks are copied, once somebody has asked for that."""
        self.copies_kb_per_s: int | None = None
        """How fast disks can be copied; None: as fast as it goes."""

    def __enter__(self) -> Containers:
        return self

    def __exit__(self, *_: object) -> None:
        for container in self.all.values():
            container.close()
        if self.copier is not None:
            self.copier.close()

    def places(self) -> tuple[Place, Place, Callable[[Place], Place]]:
        """Free addresses of loopback."""
        return Place(*free_address()), Place(*free_address()), _other_port

    def follow(self, instance: VastInstance, now: float) -> None:
        """Have the container be as the instance is now."""
        container = self.all.get(instance.instance_id)
        if container is None and instance.runs(now):
            container = self.all[instance.instance_id] = Container(self.folder / instance.instance_id, instance)
        if container is not None and not container.is_over:
            container.follow(now)

    def log_of(self, instance: VastInstance) -> str:
        """What the container has written."""
        container = self.all.get(instance.instance_id)
        return container.log.read_text(errors="replace") if container and container.log.exists() else ""

    def execute(self, instance: VastInstance, words: list[str]) -> str:
        """What a command wrote that was run on the container's disk."""
        container = self.all.get(instance.instance_id)
        if container is None:
            return ""
        moved = [word if word.startswith("-") else str(container.at(word)) for word in words[1:]]
        done = subprocess.run(
            [words[0], *moved], cwd=container.disk, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        return (done.stdout + done.stderr).replace(str(container.disk), "")

    def copy(self, source: VastInstance, source_path: str, target: VastInstance, target_path: str) -> None:
        """Copy from one disk to another, as rsync has it."""
        end = self.all[target.instance_id].at(target_path)
        end.mkdir(parents=True, exist_ok=True)
        begin = f"{self.all[source.instance_id].at(source_path)}{'/' if source_path.endswith('/') else ''}"
        subprocess.run(["rsync", "-a", begin, f"{end}/"], check=True, timeout=DEADLINE_S)

    def gate(self) -> Place:
        """Where every disk can be copied from and to, by whoever has a key of the account or of an instance."""
        folder = self.folder / "gate"
        if self.copier is None:
            self.copier = Sshd(folder, inside=computers.as_user(folder, COPIER))
            self.copier.user, self.copier.shell = COPIER, str(folder / "shell")
            self.copier.start()
        slow = f" --bwlimit={self.copies_kb_per_s}" if self.copies_kb_per_s else ""
        quoted = {name: shlex.quote(str(folder / file)) for name, file in (("config", "rsyncd.conf"), ("seen", "seen"))}
        (folder / "shell").write_text(_GATE.format(slow=slow, **quoted))
        (folder / "shell").chmod(0o755)
        alive = [it for it in self.all.values() if not it.is_over]
        for container in alive:
            container.mirror_paths()
        keys = sorted({key.public for it in alive for key in it.one.keys})
        (folder / "authorized_keys").write_text("".join(f"{key}\n" for key in keys))
        owner = f"uid = {os.getuid()}\ngid = {os.getgid()}\n" if os.getuid() == 0 else ""
        modules = [f"[{name}]\npath = {it.disk}\n" for it in alive for name in (it.one.number, f"C.{it.one.number}")]
        (folder / "rsyncd.conf").write_text("".join([_RSYNCD.format(owner=owner), *modules]))
        return Place(self.copier.address, self.copier.port)

    def copyings(self) -> int:
        """How many copies were begun."""
        seen = self.folder / "gate" / "seen"
        return len(seen.read_text().splitlines()) if seen.exists() else 0


def _other_port(place: Place) -> Place:
    """The same address with another port at which nobody listens."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind((place.host, 0))
        return Place(place.host, int(probe.getsockname()[1]))
    return place

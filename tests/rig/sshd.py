"""A machine over SSH: a real sshd on loopback with a home, keys and faults of its own."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import os
import pwd
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tests.rig.proxy import Reachable, free_address

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MARK = "GPU_RIG"
"""The variable in the environment of whatever was started through a machine of the rig; its value names the machine."""
KeyKind = Literal["ed25519", "rsa"]
_DEADLINE_S = 10.0
_TRIES = 5
_LIBRARIES = ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh", "/usr/libexec")
_CONFIG = """\
ListenAddress {listen}
Port {port}
{host_keys}
PidFile "{folder}/pid"
AuthorizedKeysFile "{folder}/authorized_keys"
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PermitUserRC no
UsePAM no
StrictModes no
UseDNS no
PrintMotd no
PrintLastLog no
MaxSessions {max_sessions}
MaxStartups {max_startups}
Banner {banner}
SetEnv "HOME={folder}/gate" "{mark}={name}"
ForceCommand exec {login}
Subsystem sftp {sftp}
{more}
"""
# sshd changes to the home folder of the account whatever HOME says, and the account's shell reads that HOME's start
# files. So HOME is an empty folder at first, and this script then starts the shell as sshd would have: in the rig's
# home, with the rig's HOME, at shell level 0 (bash reads ~/.bashrc for sshd only there).
_LOGIN = """\
#!/bin/sh
export HOME={home} PATH={path} SHELL={shell}
cd "$HOME" || exit 255
command=$SSH_ORIGINAL_COMMAND
given=${{SSH_ORIGINAL_COMMAND+yes}}
unset SSH_ORIGINAL_COMMAND SHLVL OLDPWD
[ -n "$given" ] && exec "$SHELL" -c "$command"
exec "$SHELL" -l
"""
# The key exchange is the fastest: a call takes 0.18 s with it, 0.33 s with the default.
_CLIENT = """\
Host *
    HostKeyAlias rig
    User {user}
    IdentityFile "{folder}/key"
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile "{folder}/known_hosts"
    GlobalKnownHostsFile none
    StrictHostKeyChecking yes
    BatchMode yes
    KexAlgorithms curve25519-sha256
    ConnectTimeout 10
    LogLevel ERROR
"""


class Process(NamedTuple):
    """A live process as /proc shows it."""

    pid: int
    parent: int
    state: str
    """The letter of `ps`: T when it is stopped."""
    words: list[str]


def sshd_program() -> str | None:
    """Where sshd lies, None when it is not installed."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")


class Sshd:
    """One machine. What is set on it (`banner`, `shell`, `path`, ...) holds from the next start() or restart() on."""

    def __init__(
        self, folder: Path, *, host_keys: Iterable[KeyKind] = ("ed25519",), inside: Iterable[str] = ()
    ) -> None:
        """`inside` are words before sshd's own, to start it in a namespace or under a limit; they must end in exec."""
        self.folder = folder
        self.home = folder / "home"
        self.key = folder / "key"
        self.known_hosts = folder / "known_hosts"
        self.client_config = folder / "client_config"
        self.log = folder / "log"
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.name = secrets.token_hex(8)
        self.address, self.port = free_address()
        self.listen = ""
        """Where sshd listens, `address` when empty."""
        self.banner = ""
        self.shell = "/bin/bash"
        self.path = SYSTEM_PATH
        self.max_sessions = 10
        self.max_startups = "10:30:100"
        self.settings: dict[str, str] = {}
        """Further lines of sshd_config."""
        self._host_keys: tuple[KeyKind, ...] = tuple(host_keys)
        self._inside = list(inside)
        self._program = folder / "sshd"
        self._listener: subprocess.Popen[bytes] | None = None
        self._make_folder()

    def __enter__(self) -> Sshd:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Listen. Does nothing when it listens already; RuntimeError with the end of the log when sshd will not."""
        for _ in range(_TRIES):
            if self._listener is not None or self._listens():
                return
            if "Address already in use" not in self.log.read_text():
                break
        raise RuntimeError(f"sshd does not start: {self.log.read_text()[-500:]}")

    def stop(self) -> None:
        """End the listener, as `systemctl stop ssh` does: open sessions go on, new ones are refused."""
        if self._listener is None:
            return
        self._listener.send_signal(signal.SIGTERM)
        self._listener.send_signal(signal.SIGCONT)
        self._listener.wait(_DEADLINE_S)
        self._listener = None

    def restart(self) -> None:
        """stop(), then start() on the same port with what is set now."""
        self.stop()
        self.start()

    def kill_all(self) -> None:
        """SIGKILL the listener and all sessions; what was started through them lives on, as after a cut line."""
        _signal_all(self.connections, signal.SIGKILL)
        if self._listener is not None:
            self._listener.kill()
            self._listener.wait(_DEADLINE_S)
            self._listener = None

    def reboot(self) -> None:
        """power_off(), then start."""
        self.power_off()
        self.start()

    def power_off(self) -> None:
        """SIGKILL the listener, all sessions and all that was started through them, daemons included."""
        self.kill_all()
        _signal_all(self.processes, signal.SIGKILL)

    def close(self) -> None:
        """power_off(), for good. May be called twice; the folder stays."""
        self.power_off()
        for path in self.folder.glob("sshd*"):
            if path.name != "sshd_config":
                path.unlink()

    def freeze(self, jobs: bool = False) -> None:
        """SIGSTOP sshd (the kernel still accepts connections), and with `jobs` what was started through it as well."""
        _signal_all(lambda: [it for it in self._everything(jobs) if it.state != "T"], signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT whatever freeze() has stopped."""
        _signal_all(lambda: [it for it in self._everything(True) if it.state == "T"], signal.SIGCONT)

    def new_host_key(self) -> None:
        """Become another machine at the same address; `known_hosts` keeps the old key until pin()."""
        listens = self._listener is not None
        self.stop()
        for kind in self._host_keys:
            self._keep_key(f"host_{kind}", _made_key(kind))
        if listens:
            self.start()

    def pin(self) -> None:
        """Have the present host keys in `known_hosts`."""
        self.known_hosts.write_text("".join(f"rig {self.host_key(kind)}\n" for kind in self._host_keys))

    def host_key(self, kind: KeyKind | None = None) -> str:
        """The public host key as known_hosts has it: its type and its base64."""
        text = (self.folder / f"host_{kind or self._host_keys[0]}.pub").read_text()
        return " ".join(text.split()[:2])

    def host_fingerprint(self, kind: KeyKind | None = None) -> str:
        """The host key's fingerprint as OpenSSH writes it, `SHA256:...`."""
        blob = base64.b64decode(self.host_key(kind).split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")

    def write_bashrc(self, text: str) -> None:
        """Let bash read `text` at the beginning of every session from now on."""
        (self.home / ".bashrc").write_text(text)

    def ssh_words(self, *words: str, via: Reachable | None = None) -> list[str]:
        """The words that run `words` there with the system's ssh, through a proxy when `via` is one."""
        end = via or self
        return ["ssh", "-F", str(self.client_config), "-p", str(end.port), end.address, *words]

    def run(
        self, command: str, data: bytes = b"", timeout_s: float = 20.0, via: Reachable | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """What a shell command there wrote and how it ended; subprocess.TimeoutExpired after `timeout_s`."""
        return subprocess.run(self.ssh_words(command, via=via), input=data, capture_output=True, timeout=timeout_s)

    def processes(self) -> list[Process]:
        """What was started through this machine and lives: bearers of its mark and their descendants, sshd aside."""
        alive = {process.pid: process for process in _all_processes()}
        sshd = {process.pid for process in alive.values() if self._is_sshd(process.pid)}
        mark = f"{MARK}={self.name}".encode()
        ours = {pid for pid in alive if pid not in sshd and mark in _read(pid, "environ").split(b"\0")}
        while more := {pid for pid, it in alive.items() if it.parent in ours and pid not in ours | sshd}:
            ours |= more
        return [alive[pid] for pid in sorted(ours)]

    def connections(self) -> list[Process]:
        """The processes of sshd itself: the listener, and one or two for each connection."""
        return [process for process in _all_processes() if self._is_sshd(process.pid)]

    def _everything(self, jobs: bool) -> list[Process]:
        return self.connections() + (self.processes() if jobs else [])

    def _is_sshd(self, pid: int) -> bool:
        """Whether a process runs this machine's own copy of sshd: true of every session, whoever its parent is."""
        try:
            found = Path(f"/proc/{pid}/exe").stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) in self._copies

    def _make_folder(self) -> None:
        program = sshd_program()
        assert program is not None, "no sshd: ask rig.need_sshd() first"
        for path in (self.folder, self.home, self.folder / "gate"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)  # sshd insists on it
        shutil.copy(program, self._program)
        for name in ("sshd-session", "sshd-auth"):  # from OpenSSH 9.8 and 10 on sshd is several programs
            if (found := _library(name)) is not None:
                shutil.copy(found, self.folder / name)
        self._copies = {(it.stat().st_dev, it.stat().st_ino) for it in self.folder.glob("sshd*")}
        for kind in self._host_keys:
            self._keep_key(f"host_{kind}", _cached_rsa_key() if kind == "rsa" else _made_key(kind))
        self._keep_key("key", _made_key("ed25519"))
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        self.client_config.write_text(_CLIENT.format(user=self.user, folder=self.folder))
        self.pin()

    def _keep_key(self, name: str, pair: tuple[str, str]) -> None:
        (self.folder / name).touch(mode=0o600)  # before there is anything in it to read
        (self.folder / name).write_text(pair[0])
        (self.folder / f"{name}.pub").write_text(pair[1])

    def _write_config(self) -> Path:
        login = self.folder / "login"
        login.write_text(
            _LOGIN.format(home=shlex.quote(str(self.home)), path=shlex.quote(self.path), shell=shlex.quote(self.shell))
        )
        login.chmod(0o700)
        (self.folder / "banner").write_text(self.banner)
        more = dict(self.settings)
        if (self.folder / "sshd-session").exists():
            more |= {"SshdSessionPath": f'"{self.folder}/sshd-session"', "PerSourcePenalties": "no"}
        if (self.folder / "sshd-auth").exists():
            more |= {"SshdAuthPath": f'"{self.folder}/sshd-auth"'}
        config = self.folder / "sshd_config"
        config.write_text(
            _CONFIG.format(
                listen=self.listen or self.address,
                port=self.port,
                folder=self.folder,
                host_keys="\n".join(f'HostKey "{self.folder}/host_{kind}"' for kind in self._host_keys),
                max_sessions=self.max_sessions,
                max_startups=self.max_startups,
                banner=f'"{self.folder}/banner"' if self.banner else "none",
                mark=MARK,
                name=self.name,
                login=shlex.quote(str(login)),
                sftp=_library("sftp-server") or "/nonexistent",
                more="\n".join(f"{name} {value}" for name, value in more.items()),
            )
        )
        return config

    def _listens(self) -> bool:
        """Start sshd once; whether it listens, known from its log and so without a connection."""
        words = [*self._inside, str(self._program), "-D", "-e", "-f", str(self._write_config())]
        with self.log.open("ab") as log:
            before = log.tell()
            child = subprocess.Popen(
                words,
                cwd="/",
                env={"PATH": SYSTEM_PATH},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _DEADLINE_S
        while child.poll() is None and time.monotonic() < deadline:
            if b"Server listening on" in self.log.read_bytes()[before:]:
                self._listener = child
                return True
            time.sleep(0.002)
        child.kill()
        child.wait()
        return False


def _made_key(kind: KeyKind) -> tuple[str, str]:
    """A new private key and its public half, as OpenSSH keeps them."""
    with tempfile.TemporaryDirectory(prefix="gpu-rig-") as folder:
        path = Path(folder) / "key"
        words = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "rig", "-f", str(path)]
        subprocess.run(words + (["-b", "2048"] if kind == "rsa" else []), check=True, stdin=subprocess.DEVNULL)
        return path.read_text(), (path.parent / "key.pub").read_text()


_cached_rsa_key = functools.cache(lambda: _made_key("rsa"))  # 0.3 s; an ed25519 key takes 8 ms and is always new


def _library(name: str) -> str | None:
    return next((f"{folder}/{name}" for folder in _LIBRARIES if Path(folder, name).is_file()), None)


def _read(pid: int, name: str) -> bytes:
    """A file of a process in /proc, empty when the process is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _all_processes() -> Iterator[Process]:
    """Every process but zombies."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            pid = int(entry.name)
            state, _, rest = _read(pid, "stat").rpartition(b") ")[2].partition(b" ")
            if state and state not in b"ZX":
                words = _read(pid, "cmdline").rstrip(b"\0").decode("utf-8", "replace").split("\0")
                yield Process(pid, int(rest.split()[0]), state.decode(), words)


def _signal_all(find: Callable[[], list[Process]], number: signal.Signals) -> None:
    """Signal what `find` returns until it returns nothing: a process may fork while its siblings are signalled."""
    deadline = time.monotonic() + _DEADLINE_S
    while found := find():
        assert time.monotonic() < deadline, f"{number.name} has no effect on {found}"
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        time.sleep(0.002)

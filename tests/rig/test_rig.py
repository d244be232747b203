"""The rig itself: what its machines, proxies and wires promise, seen through the system's own ssh and sockets."""

from __future__ import annotations

import hashlib
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random

import paramiko
import pytest

from tests import rig
from tests.conftest import until
from tests.rig.proxy import How, Way, free_address

machine_room = pytest.fixture(rig.machine_room)
proxies = pytest.fixture(rig.proxies)
wires = pytest.fixture(rig.wires)
Room = Callable[..., rig.Sshd]
Proxies = Callable[[rig.Reachable], rig.Proxy]
Wires = Callable[..., rig.Wire]
DAEMON = """
import os
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
for number in range(3): os.close(number)
if os.fork() == 0: os.execve("/bin/sleep", ["sleep", "300"], {})
os.execvp("sleep", ["sleep", "300"])
"""
"""Starts a daemon and a child of its own that has an empty environment."""


@dataclass
class Place:
    """An address to connect to."""

    address: str
    port: int


@pytest.fixture
def machine(machine_room: Room) -> rig.Sshd:
    return machine_room()


def open_to(end: rig.Reachable, timeout_s: float = 10.0) -> socket.socket:
    """A connection to `end`."""
    return socket.create_connection((end.address, end.port), timeout_s)


def read_all(connection: socket.socket) -> tuple[int, str]:
    """How many bytes came, and how it ended: "fin" or "rst"."""
    count = 0
    try:
        while piece := connection.recv(1 << 16):
            count += len(piece)
    except ConnectionResetError:
        return count, "rst"
    return count, "fin"


def has_banner(end: rig.Reachable, timeout_s: float = 10.0) -> bool:
    """Whether an SSH server speaks there; TimeoutError when nothing at all is said."""
    with open_to(end, timeout_s) as connection:
        return connection.recv(64).startswith(b"SSH-")


def start_daemon(machine: rig.Sshd) -> None:
    done = machine.run(shlex.join(["python3", "-c", DAEMON]))
    assert done.returncode == 0, done.stderr
    until(lambda: [it.words for it in machine.processes()] == [["sleep", "300"]] * 2, 5)


# ---- the machine


def test_a_machine_starts_fast(machine_room: Room) -> None:
    """A machine is there within 0.3 s (the best of three)."""
    took_s = []
    for name in "abc":
        began = time.monotonic()
        machine_room(name)
        took_s.append(time.monotonic() - began)
    assert min(took_s) < 0.3


def test_home_is_the_machines_own(machine: rig.Sshd) -> None:
    """A session's HOME, its working folder and what ~ means are the machine's own home."""
    done = machine.run('echo "$HOME"; pwd; echo ~; touch here')
    assert done.stdout.decode().split() == [str(machine.home)] * 3
    assert (machine.home / "here").exists()


def test_relative_paths_of_rsync_and_sftp_lie_in_the_home(machine: rig.Sshd, tmp_path: Path) -> None:
    """What rsync and scp copy to a relative path arrives in the machine's own home."""
    (tmp_path / "file").write_bytes(b"\0bytes\xff")
    words = machine.ssh_words()
    subprocess.run(["rsync", "-e", shlex.join(words[:-1]), "file", f"{words[-1]}:by_rsync"], cwd=tmp_path, check=True)
    scp = ["scp", "-q", "-F", str(machine.client_config), "-P", str(machine.port)]
    subprocess.run([*scp, "file", f"{machine.address}:by_scp"], cwd=tmp_path, check=True)
    for name in ("by_rsync", "by_scp"):
        assert (machine.home / name).read_bytes() == b"\0bytes\xff"


def test_bashrc_is_read_once_from_the_machines_home(machine: rig.Sshd) -> None:
    """What write_bashrc() gives is run once, in the home, before each command."""
    machine.write_bashrc('echo "noise in $PWD"\n')
    assert machine.run("echo word").stdout.decode() == f"noise in {machine.home}\nword\n"


def test_commands_arrive_as_they_were_sent(machine: rig.Sshd) -> None:
    """Words with quotes, line breaks, globs and bytes that are no text reach the program unchanged; so do exit codes."""
    words = ["", "a b", "$HOME `id` $(id)", "'\"\\", "two\nlines", "*", "-n", "é\u2028"]
    done = machine.run(shlex.join(["printf", r"%s\0", *words]))
    assert done.stdout.decode().split("\0")[:-1] == words
    assert machine.run("cat; exit 37", b"\xff\0\n").stdout == b"\xff\0\n"
    assert machine.run("exit 37").returncode == 37


def test_sessions_know_nothing_of_the_test_runner(machine_room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session has the few variables sshd makes and the mark, none of whoever runs the tests."""
    monkeypatch.setenv("RIG_SECRET", "canary")
    machine = machine_room()
    names = {line.split("=")[0] for line in machine.run("env").stdout.decode().splitlines()}
    made = {"HOME", "PATH", "SHELL", "USER", "LOGNAME", "MAIL", "PWD", "SHLVL", "_", "SSH_CLIENT", "SSH_CONNECTION"}
    assert names <= made | {"GPU_RIG", "TZ"}
    assert {"HOME", "PATH", "GPU_RIG"} <= names


def test_path_has_the_system_folders_and_can_be_less(machine: rig.Sshd, tmp_path: Path) -> None:
    """Programs of the system are found, and a machine without python3 is made by setting `path`."""
    assert machine.run("command -v python3 && command -v env").returncode == 0
    machine.path = str(tmp_path)
    machine.restart()
    assert machine.run("command -v python3").returncode == 1


def test_another_shell_can_be_set(machine: rig.Sshd) -> None:
    """With `shell` a session is run by that program, and bash's start file is not read."""
    machine.write_bashrc("echo noise\n")
    machine.shell = "/bin/sh"
    machine.restart()
    assert machine.run('echo "$0" "$SHELL"').stdout == b"/bin/sh /bin/sh\n"
    machine.shell = "/bin/false"
    machine.restart()
    assert machine.run("echo word").returncode == 1


def test_banner_is_shown_before_the_session(machine: rig.Sshd) -> None:
    """A banner comes on standard error, apart from what the command writes."""
    machine.banner = "Authorised use only\n"
    machine.client_config.write_text(machine.client_config.read_text().replace("LogLevel ERROR", "LogLevel INFO"))
    machine.restart()
    done = machine.run("echo word")
    assert b"Authorised use only" in done.stderr
    assert done.stdout == b"word\n"


def test_machines_share_nothing(machine_room: Room) -> None:
    """Two machines differ in address, host key and home, and one's client key opens nothing at the other."""
    first, second = machine_room("first"), machine_room("second")
    assert first.address != second.address
    assert first.host_key() != second.host_key()
    assert first.home != second.home
    second.known_hosts.write_text(f"rig {first.host_key()}\n")
    assert b"Permission denied" in second.run("true", via=first).stderr


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_a_new_host_key_is_refused_until_it_is_pinned(machine_room: Room, kind: str) -> None:
    """After new_host_key() a client that holds the old key refuses, and the fingerprint is the one OpenSSH shows."""
    machine = machine_room(host_keys=[kind])
    old = machine.host_fingerprint()
    assert machine.run("true").returncode == 0
    machine.new_host_key()
    assert machine.run("true").returncode == 255
    machine.pin()
    assert machine.run("true").returncode == 0
    shown = subprocess.run(["ssh-keygen", "-lf", machine.folder / f"host_{kind}.pub"], capture_output=True, text=True)
    assert machine.host_fingerprint() in shown.stdout.split()
    assert old not in shown.stdout.split()


def test_paramiko_is_let_in_with_the_pinned_key(machine: rig.Sshd) -> None:
    """The library the product uses connects with the host key and the client key the rig names."""
    with paramiko.Transport(open_to(machine)) as session:
        session.start_client(timeout=10)
        assert session.get_remote_server_key().get_base64() == machine.host_key().split()[1]
        session.auth_publickey(machine.user, paramiko.Ed25519Key(filename=str(machine.key)))
        assert session.is_authenticated()


def test_max_sessions_limits_the_channels_of_a_connection(machine: rig.Sshd) -> None:
    """With max_sessions 2 the third channel of one connection is refused."""
    machine.max_sessions = 2
    machine.restart()
    with paramiko.Transport(open_to(machine)) as session:
        session.connect(username=machine.user, pkey=paramiko.Ed25519Key(filename=str(machine.key)))
        kept = [session.open_session(timeout=10) for _ in range(2)]
        with pytest.raises(paramiko.ChannelException):
            session.open_session(timeout=10)
        assert len(kept) == 2


def test_max_startups_drops_connections(machine: rig.Sshd) -> None:
    """With max_startups 1:100:1 a second connection is dropped while a first has not said who it is."""
    machine.max_startups = "1:100:1"
    machine.restart()
    with open_to(machine) as first:
        assert first.recv(64).startswith(b"SSH-")
        assert not has_banner(machine)


def test_a_frozen_machine_hangs_and_thaws(machine: rig.Sshd) -> None:
    """While it is frozen a machine accepts connections and says nothing; thawed, the same call comes to its end."""
    with subprocess.Popen(machine.ssh_words("read word; echo $word"), stdin=-1, stdout=-1) as call:
        assert call.stdin is not None
        until(lambda: machine.processes())
        machine.freeze()
        call.stdin.write(b"word\n")
        call.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            call.wait(0.3)
        with pytest.raises(TimeoutError):
            has_banner(machine, timeout_s=0.2)
        machine.thaw()
        assert call.communicate(timeout=10)[0] == b"word\n"


def test_jobs_can_be_frozen_with_the_machine(machine: rig.Sshd) -> None:
    """With `jobs` what was started through the machine stands still as well, and goes on after thaw()."""
    start_daemon(machine)
    machine.freeze()
    assert {it.state for it in machine.processes()} == {"S"}
    machine.freeze(jobs=True)
    assert {it.state for it in machine.processes() + machine.connections()} == {"T"}
    machine.thaw()
    assert "T" not in {it.state for it in machine.processes() + machine.connections()}


def test_stop_ends_the_listener_only(machine: rig.Sshd) -> None:
    """After stop() new connections are refused and an open session goes on; start() takes up the same port."""
    with subprocess.Popen(machine.ssh_words("read word; echo $word"), stdin=-1, stdout=-1) as call:
        until(lambda: machine.processes())
        machine.stop()
        with pytest.raises(ConnectionRefusedError):
            open_to(machine)
        machine.start()
        assert has_banner(machine)
        assert call.communicate(b"word\n", timeout=10)[0] == b"word\n"


def test_kill_all_cuts_sessions_and_spares_jobs(machine: rig.Sshd) -> None:
    """kill_all() ends calls with "connection lost" at once, leaves no sshd, and what was started goes on."""
    start_daemon(machine)
    with subprocess.Popen(machine.ssh_words("exec sleep 299"), stderr=-1) as call:
        until(lambda: len(machine.processes()) == 3)
        machine.kill_all()
        call.communicate(timeout=5)
        assert call.returncode == 255
    assert machine.connections() == []
    assert len(machine.processes()) == 3
    machine.start()
    assert machine.run("true").returncode == 0


def test_reboot_leaves_no_process(machine: rig.Sshd) -> None:
    """reboot() kills daemons in sessions of their own and their children without the mark, then answers again."""
    start_daemon(machine)
    machine.reboot()
    assert machine.processes() == []
    assert machine.run("true").returncode == 0
    until(lambda: not machine.processes())


def test_reboot_leaves_other_machines_alone(machine_room: Room) -> None:
    """What was started through one machine survives the reboot of another."""
    first, second = machine_room("first"), machine_room("second")
    start_daemon(first)
    second.reboot()
    assert len(first.processes()) == 2


def test_nothing_is_alive_after_the_block(tmp_path: Path) -> None:
    """When its block is left a machine has no sshd, no session and no daemon any more, frozen or not."""
    rig.need_sshd()
    with pytest.raises(KeyError), rig.Sshd(tmp_path / "machine") as machine:
        start_daemon(machine)
        listener = machine.connections()[0].pid
        machine.freeze(jobs=True)
        raise KeyError
    assert machine.connections() + machine.processes() == []
    assert not Path(f"/proc/{listener}").exists()


# ---- the proxy


@pytest.fixture
def talker() -> Iterator[Callable[[bytes], Place]]:
    """Makes servers that send `data`, read until the client has ended, send what they read, and end."""
    with closing(_Talkers()) as talkers:
        yield talkers.make


class _Talkers:
    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.listeners: list[socket.socket] = []
        self.heard: list[int] = []

    def make(self, data: bytes) -> Place:
        place = Place(*free_address())
        listener = socket.create_server((place.address, place.port))
        self.listeners.append(listener)
        self.thread(self.accept, listener, data)
        return place

    def thread(self, work: Callable[..., None], *values: object) -> None:
        self.threads.append(threading.Thread(target=work, args=values))
        self.threads[-1].start()

    def accept(self, listener: socket.socket, data: bytes) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.settimeout(10)
            self.thread(self.talk, client, data)

    def talk(self, client: socket.socket, data: bytes) -> None:
        heard = b""
        with client:
            try:
                client.sendall(data)
                while piece := client.recv(1 << 16):
                    heard += piece
                client.sendall(heard)
            except OSError:
                return

    def close(self) -> None:
        for listener in self.listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


def echo(connection: socket.socket, data: bytes) -> bytes:
    """What comes back for `data`, read while it is sent."""
    sender = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
    sender.start()
    answer = b""
    while piece := connection.recv(1 << 16):
        answer += piece
    sender.join(10)
    return answer


def test_bytes_pass_unchanged(proxies: Proxies, talker: Callable[[bytes], Place]) -> None:
    """Without any fault all bytes arrive in order, a half-closed connection stays open, and all is counted."""
    proxy = proxies(talker(b"hello"))
    data = Random(1).randbytes(3_000_001)
    with open_to(proxy) as connection:
        assert echo(connection, data) == b"hello" + data
    until(lambda: proxy.open_now == 0)
    assert (proxy.connections, proxy.bytes_up, proxy.bytes_down, proxy.cuts) == (1, len(data), len(data) + 5, 0)


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("count", [0, 1, 4096, 300_001])
def test_down_is_cut_after_exactly_n_bytes(
    proxies: Proxies, talker: Callable[[bytes], Place], count: int, how: How
) -> None:
    """The client receives exactly n bytes, then a reset or an orderly end."""
    proxy = proxies(talker(b"x" * 1_000_000))
    proxy.cut_after(count, "down", how)
    with open_to(proxy) as connection:
        assert read_all(connection) == (count, how)
    assert (proxy.bytes_down, proxy.cuts) == (count, 1)


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("count", [0, 1, 4096, 300_001])
def test_up_is_cut_after_exactly_n_bytes(proxies: Proxies, count: int, how: How) -> None:
    """The server receives exactly n bytes, then a reset or an orderly end; before the first byte it sees no client."""
    place = Place(*free_address())
    with socket.create_server((place.address, place.port)) as listener:
        listener.settimeout(5)
        proxy = proxies(place)
        proxy.cut_after(count, "up", how)
        with open_to(proxy) as connection:
            sender = threading.Thread(target=lambda: pytest.raises(OSError, connection.sendall, b"x" * 50_000_000))
            if count:
                sender.start()
                server, _ = listener.accept()
                with server:
                    server.settimeout(5)
                    assert read_all(server) == (count, how)
            until(lambda: proxy.cuts == 1)
            proxy.close()
            if count:
                sender.join(10)
                assert not sender.is_alive()
    assert proxy.bytes_up == count


def test_only_the_named_connection_is_cut(proxies: Proxies, talker: Callable[[bytes], Place]) -> None:
    """A budget for the second connection leaves the first and the third whole."""
    proxy = proxies(talker(b"x" * 100_000))
    proxy.cut_after(777, "down", connection=2)
    counts = []
    for _ in range(3):
        with open_to(proxy) as connection:
            connection.shutdown(socket.SHUT_WR)
            counts.append(read_all(connection))
    assert counts == [(100_000, "fin"), (777, "rst"), (100_000, "fin")]


def test_a_budget_of_an_open_connection_counts_from_now(proxies: Proxies, talker: Callable[[bytes], Place]) -> None:
    """cut_after() in the middle of a connection spares what has passed before."""
    proxy = proxies(talker(b"hello"))
    with open_to(proxy) as connection:
        assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
        proxy.cut_after(3, "down")
        connection.sendall(b"abcdef")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == (3, "rst")


@pytest.mark.parametrize("how", ["rst", "fin"])
def test_cut_ends_open_connections(proxies: Proxies, talker: Callable[[bytes], Place], how: How) -> None:
    """cut() ends what is open now, and the next connection is whole."""
    proxy = proxies(talker(b"hello"))
    with open_to(proxy) as connection:
        assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
        proxy.cut(how)
        assert read_all(connection) == (0, how)
    with open_to(proxy) as connection:
        assert echo(connection, b"again") == b"helloagain"
    assert proxy.cuts == 1


def test_a_black_hole_holds_everything_and_heals(proxies: Proxies, talker: Callable[[bytes], Place]) -> None:
    """In a black hole open and new connections stay open and silent, ends too; healed, every byte arrives."""
    proxy = proxies(talker(b"hello"))
    with open_to(proxy) as before, open_to(proxy) as idle:
        assert before.recv(5, socket.MSG_WAITALL) + idle.recv(5, socket.MSG_WAITALL) == b"hellohello"
        proxy.black_hole()
        before.sendall(b"word")
        before.shutdown(socket.SHUT_WR)
        with open_to(proxy) as after:
            for connection in (before, after):
                connection.settimeout(0.15)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            assert (proxy.bytes_up, proxy.bytes_down, proxy.open_now) == (0, 10, 3)
            proxy.heal()
            before.settimeout(5)
            after.settimeout(5)
            assert read_all(before) == (4, "fin")
            assert after.recv(5, socket.MSG_WAITALL) == b"hello"


@pytest.mark.parametrize(("ways", "least_s"), [(["up"], 0.15), (["up", "down"], 0.3)])
def test_latency_is_measured(
    proxies: Proxies, talker: Callable[[bytes], Place], ways: list[Way], least_s: float
) -> None:
    """A byte there and back takes the delay of each direction that has one, and bulk is not slowed by as much."""
    proxy = proxies(talker(b""))
    with open_to(proxy) as connection:
        proxy.delay(0.15, ways)
        began = time.monotonic()
        assert len(echo(connection, b"x" * 2_000_000)) == 2_000_000
        assert least_s <= time.monotonic() - began < least_s + 1.0


def test_throttle_holds_its_rate(proxies: Proxies, talker: Callable[[bytes], Place]) -> None:
    """At 400 kB/s 200 kB take half a second; lifted in mid-way, the rest comes at once."""
    proxy = proxies(talker(b"x" * 200_000))
    proxy.throttle(400_000, ["down"])
    with open_to(proxy) as connection:
        connection.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        assert read_all(connection) == (200_000, "fin")
        assert 0.45 <= time.monotonic() - began < 0.8
    proxy.throttle(1000)
    with open_to(proxy) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1)
        began = time.monotonic()
        proxy.pass_all()
        read_all(connection)
        assert time.monotonic() - began < 1.0


def test_refuse_and_accept(proxies: Proxies, talker: Callable[[bytes], Place]) -> None:
    """While it refuses, new connections fail at once and an open one goes on; then the same port answers again."""
    proxy = proxies(talker(b"hello"))
    with open_to(proxy) as connection:
        assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            open_to(proxy)
        assert echo(connection, b"word") == b"word"
    proxy.accept()
    with open_to(proxy) as connection:
        assert connection.recv(5, socket.MSG_WAITALL) == b"hello"


def test_a_missing_target_is_a_reset(proxies: Proxies) -> None:
    """When nobody listens behind the proxy its client is reset."""
    proxy = proxies(Place(*free_address()))
    with open_to(proxy) as connection:
        assert read_all(connection) == (0, "rst")


def test_a_proxy_leaves_nothing_behind(talker: Callable[[bytes], Place]) -> None:
    """After its block a proxy has no thread, no open file and no connection, whatever state it was in."""
    place = talker(b"x" * 10_000_000)
    descriptors = Path("/proc/self/fd")
    before = threading.active_count(), len(list(descriptors.iterdir()))
    with rig.Proxy(place) as proxy:
        proxy.throttle(1000)
        with open_to(proxy), open_to(proxy) as connection:
            assert connection.recv(1)
            proxy.black_hole()
            proxy.close()
    until(lambda: (threading.active_count(), len(list(descriptors.iterdir()))) == before, 5)
    with pytest.raises(ConnectionRefusedError):
        open_to(proxy)


def test_ssh_through_a_proxy_that_cuts(machine: rig.Sshd, proxies: Proxies) -> None:
    """A call through the proxy works, and one that is cut in the middle ends as "connection lost"."""
    proxy = proxies(machine)
    assert machine.run("echo word", via=proxy).stdout == b"word\n"
    proxy.cut_after(100_000, "down")
    done = machine.run("head -c 1000000 /dev/zero", via=proxy)
    assert done.returncode == 255
    assert len(done.stdout) < 100_000
    assert proxy.cuts == 1


# ---- the wire


def test_a_dropped_wire_is_silent_and_heals(wires: Wires) -> None:
    """With drop() a connect times out and a session hangs; healed, both go on."""
    wire = wires()
    with subprocess.Popen(wire.sshd.ssh_words("read word; echo $word"), stdin=-1, stdout=-1) as call:
        until(lambda: wire.sshd.processes())
        wire.drop()
        with pytest.raises(TimeoutError):
            open_to(wire, timeout_s=0.3)
        assert call.poll() is None
        wire.heal()
        assert has_banner(wire)
        assert call.communicate(b"word\n", timeout=10)[0] == b"word\n"


def test_packets_are_lost_at_random(wires: Wires) -> None:
    """With lose(0.5) about half of 300 packets do not arrive."""
    wire = wires()
    wire.lose(0.5, ["INPUT"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(300):
            sender.sendto(b"x", (wire.address, 9))
    words = ["ip", "netns", "exec", wire.name, "iptables", "-w", "5", "-nvxL", "INPUT"]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert 90 <= int(listed.splitlines()[2].split()[0]) <= 210


def test_a_rejecting_wire_resets(wires: Wires) -> None:
    """With reject_rst() an open connection is reset by its next byte and a new one is refused."""
    wire = wires()
    with open_to(wire) as connection:
        assert connection.recv(64).startswith(b"SSH-")
        wire.reject_rst()
        connection.sendall(b"x")
        assert read_all(connection)[1] == "rst"
    with pytest.raises(ConnectionRefusedError):
        open_to(wire)
    wire.heal()
    assert has_banner(wire)


def test_a_link_goes_down_and_up(wires: Wires) -> None:
    """With its link down the machine cannot be reached; with the link up the same address answers again."""
    wire = wires()
    assert has_banner(wire)
    wire.link_down()
    with pytest.raises(OSError, match="timed out|No route"):
        open_to(wire, timeout_s=0.3)
    wire.link_up()
    assert wire.sshd.run("echo word").stdout == b"word\n"


def test_a_machine_changes_its_address(wires: Wires) -> None:
    """After change_address() the old address is silent and the new one leads to the same machine."""
    wire = wires()
    old = Place(wire.address, wire.port)
    assert wire.change_address() == wire.address != old.address
    assert wire.sshd.run("echo word").stdout == b"word\n"
    with pytest.raises(OSError, match="timed out|No route"):
        open_to(old, timeout_s=0.3)


def test_the_laptop_changes_its_address(wires: Wires) -> None:
    """After change_own_address() an open connection gets no answer any more, and new ones come from the new address."""
    wire = wires()
    with open_to(wire) as connection:
        assert connection.recv(64).startswith(b"SSH-")
        new = wire.change_own_address()
        connection.settimeout(0.3)
        with pytest.raises(OSError, match="timed out|unreachable|Invalid argument"):
            echo(connection, b"SSH-2.0-x\r\n")
    assert wire.sshd.run("echo $SSH_CLIENT").stdout.decode().split()[0] == new


def test_nothing_is_left_of_a_wire(tmp_path: Path) -> None:
    """When its block is left, by an error too, a wire's namespace, cards and processes are gone."""
    rig.need_wires()
    with pytest.raises(KeyError), rig.Wire(tmp_path / "wire") as wire:
        start_daemon(wire.sshd)
        wire.drop()
        raise KeyError
    assert wire.sshd.connections() + wire.sshd.processes() == []
    shown = [subprocess.run(["ip", *words], capture_output=True, text=True) for words in (["netns"], ["link"])]
    assert wire.name not in shown[0].stdout
    assert wire.name.removeprefix("rig-") not in shown[1].stdout


def test_two_wires_at_once(wires: Wires) -> None:
    """Two wires do not disturb each other."""
    first, second = wires("first"), wires("second")
    first.drop()
    assert has_banner(second)
    assert (
        hashlib.sha256(second.sshd.run("head -c 5000000 /dev/zero").stdout).digest()
        == hashlib.sha256(bytes(5_000_000)).digest()
    )


def test_skips_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without sshd a test that asks for machines is skipped with the line that installs it."""
    monkeypatch.setattr(rig.sshd, "sshd_program", lambda: None)
    with pytest.raises(pytest.skip.Exception, match="apt-get install openssh-server"):
        next(rig.machine_room(tmp_path))
    assert os.path.lexists(sys.executable)

"""The rig itself: what its machines, proxies and wires promise, seen through the system's own ssh and sockets."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import paramiko
import pytest

from tests import rig
from tests.rig.proxy import How, Way, free_address
from tests.waiting import until

talkers = pytest.fixture(rig.talkers)
Room = Callable[..., rig.Sshd]
Proxies = Callable[[rig.Reachable], rig.Proxy]
Talkers = Callable[[bytes], rig.Place]
Wires = Callable[..., rig.Wire]
SILENT = r"timed out|No route|unreachable|Invalid argument"


@pytest.fixture
def machine(machine_room: Room) -> rig.Sshd:
    return machine_room()


def test_a_machine_starts_fast(machine_room: Room) -> None:
    """A machine is there within 0.3 s (the best of three)."""
    times = [time.monotonic() for name in "abcd" if machine_room(name)]
    assert min(after - before for before, after in pairwise(times)) < 0.3


def test_home_is_the_machines_own(machine: rig.Sshd, tmp_path: Path) -> None:
    """HOME, the working folder, ~ and relative paths of rsync and scp all mean the machine's own home."""
    assert machine.run('echo "$HOME"; pwd; echo ~').stdout.decode().split() == [str(machine.home)] * 3
    (tmp_path / "file").write_bytes(b"\0bytes\xff")
    *ssh, address = machine.ssh_words()
    scp = ["scp", "-q", "-F", str(machine.client_config), "-P", str(machine.port)]
    for program, *words in (["rsync", "-e", shlex.join(ssh)], scp):
        subprocess.run([program, *words, "file", f"{address}:by_{program}"], cwd=tmp_path, check=True)
        assert (machine.home / f"by_{program}").read_bytes() == b"\0bytes\xff"


def test_bashrc_is_read_and_commands_arrive_as_sent(machine: rig.Sshd) -> None:
    """The start file runs once, in the home; then words, input bytes and exit codes go through unchanged."""
    machine.write_bashrc('echo "noise in $PWD"\n')
    words = ["", "a b", "$HOME `id` $(id)", "'\"\\", "two\nlines", "*", "-n", "é\u2028"]
    done = machine.run(shlex.join(["printf", r"%s\0", *words]) + "; cat; exit 37", b"\xff\0\n")
    assert done.stdout == f"noise in {machine.home}\n".encode() + "\0".join([*words, ""]).encode() + b"\xff\0\n"
    assert done.returncode == 37


def test_sessions_know_nothing_of_the_test_runner(machine_room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session has the few variables sshd makes and the mark, none of whoever runs the tests."""
    monkeypatch.setenv("RIG_SECRET", "canary")
    names = {line.split("=")[0] for line in machine_room().run("env").stdout.decode().splitlines()}
    made = {"SHELL", "USER", "LOGNAME", "MAIL", "PWD", "SHLVL", "TZ", "_", "SSH_CLIENT", "SSH_CONNECTION"}
    assert names - made == {"HOME", "PATH", "GPU_RIG"}


def test_path_shell_and_banner_can_be_set(machine: rig.Sshd, tmp_path: Path) -> None:
    """`path` hides programs, `shell` takes bash's place and start file, `banner` comes apart from the output."""
    assert machine.run("command -v python3 && command -v env").returncode == 0
    machine.write_bashrc("echo noise\n")
    machine.shell, machine.path, machine.banner = "/bin/sh", str(tmp_path), "Authorised use only\n"
    machine.client_config.write_text(machine.client_config.read_text().replace("LogLevel ERROR", "LogLevel INFO"))
    machine.restart()
    done = machine.run('echo "$0" "$SHELL"; command -v python3')
    assert (done.stdout, done.returncode) == (b"/bin/sh /bin/sh\n", 127)
    assert b"Authorised use only" in done.stderr


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_a_new_host_key_is_refused_until_it_is_pinned(machine_room: Room, kind: str) -> None:
    """After new_host_key() a client that holds the old key refuses, and the fingerprint is the one OpenSSH shows."""
    machine = machine_room(host_keys=[kind])
    assert machine.run("true").returncode == 0
    old = machine.host_fingerprint()
    machine.new_host_key()
    assert b"host key" in machine.run("true").stderr.lower()
    machine.pin()
    assert machine.run("true").returncode == 0
    shown = subprocess.run(["ssh-keygen", "-lf", machine.folder / f"host_{kind}.pub"], capture_output=True, text=True)
    assert old != machine.host_fingerprint() == shown.stdout.split()[1]


def test_limits_of_sessions_and_startups(machine: rig.Sshd) -> None:
    """max_sessions refuses one channel more; max_startups drops a second connection that has not said who it is."""
    machine.max_sessions, machine.max_startups = 2, "1:100:1"
    machine.restart()
    with paramiko.Transport(rig.open_to(machine)) as session:
        session.connect(username=machine.user, pkey=paramiko.Ed25519Key(filename=str(machine.key)))
        _kept = [session.open_session(timeout=10) for _ in range(2)]
        with pytest.raises(paramiko.ChannelException):
            session.open_session(timeout=10)
    with rig.open_to(machine) as first:
        assert first.recv(64).startswith(b"SSH-")
        assert not rig.has_banner(machine)


def test_a_frozen_machine_hangs_and_thaws(machine: rig.Sshd) -> None:
    """A frozen machine accepts connections and says nothing, its jobs stand if told so; thawed, the call ends well."""
    with rig.open_call(machine) as child:
        machine.freeze()
        assert child.stdin is not None
        child.stdin.write(b"word\n")
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        with pytest.raises(TimeoutError):
            rig.has_banner(machine, timeout_s=0.2)
        assert {it.state for it in machine.processes()} == {"S"}
        machine.freeze(jobs=True)
        assert {it.state for it in machine.processes() + machine.connections()} == {"T"}
        machine.thaw()
        assert child.communicate(timeout=10)[0] == b"word\n"


def test_stop_ends_the_listener_only(machine: rig.Sshd) -> None:
    """After stop() new connections are refused and an open session goes on; start() takes up the same port."""
    with rig.open_call(machine) as child:
        machine.stop()
        with pytest.raises(ConnectionRefusedError):
            rig.open_to(machine)
        machine.start()
        assert rig.has_banner(machine)
        assert child.communicate(b"word\n", timeout=10)[0] == b"word\n"


def test_kill_all_cuts_sessions_and_spares_jobs(machine: rig.Sshd) -> None:
    """kill_all() ends calls with "connection lost" at once, leaves no sshd, and what was started goes on."""
    rig.start_daemon(machine)
    with rig.open_call(machine, "exec sleep 299") as child:
        machine.kill_all()
        child.communicate(timeout=5)
        assert child.returncode == 255
    assert machine.connections() == []
    assert sorted(it.words[1] for it in machine.processes()) == ["299", "300", "300"]


def test_reboot_leaves_no_process(machine: rig.Sshd) -> None:
    """reboot() kills daemons in sessions of their own, unmarked children too, and the machine answers again."""
    rig.start_daemon(machine)
    machine.reboot()
    assert machine.processes() == []
    assert machine.run("true").returncode == 0
    until(lambda: not machine.processes(), 5)


def test_machines_share_nothing(machine_room: Room) -> None:
    """Two machines differ in address, host key and home; one lets no user of the other in, nor dies with it."""
    first, second = machine_room("first"), machine_room("second")
    assert not {first.address, first.host_key(), first.home} & {second.address, second.host_key(), second.home}
    rig.start_daemon(first)
    second.reboot()
    assert len(first.processes()) == 2
    second.known_hosts.write_text(f"rig {first.host_key()}\n")
    assert b"Permission denied" in second.run("true", via=first).stderr


def test_nothing_is_alive_after_the_block(tmp_path: Path) -> None:
    """When its block is left by an error a machine has no sshd, session or daemon any more, frozen or not."""
    rig.need_sshd()
    with contextlib.suppress(KeyError), rig.Sshd(tmp_path / "machine") as machine:
        rig.start_daemon(machine)
        pids = [it.pid for it in machine.connections() + machine.processes()]
        machine.freeze(jobs=True)
        raise KeyError
    assert len(pids) == 3
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), 5)


def test_bytes_pass_unchanged(proxies: Proxies, talkers: Talkers) -> None:
    """Without any fault all bytes arrive in order, a half-closed connection stays open, and all is counted."""
    proxy, data = proxies(talkers(b"hello")), bytes(range(251)) * 12_000
    with rig.open_to(proxy) as connection:
        assert rig.echo(connection, data) == b"hello" + data
    until(lambda: proxy.open_now == 0, 5)
    assert (proxy.connections, proxy.bytes_up, proxy.bytes_down, proxy.cuts) == (1, len(data), len(data) + 5, 0)


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("count", [1, 4096, 300_001])
def test_a_connection_is_cut_after_exactly_n_bytes(proxies: Proxies, count: int, way: Way, how: How) -> None:
    """The receiver gets exactly n bytes, then a reset or an orderly end."""
    place = rig.Place(*free_address())
    with socket.create_server((place.address, place.port)) as listener:
        proxy = proxies(place)
        proxy.cut_after(count, way, how)
        with rig.open_to(proxy) as client, listener.accept()[0] as server:
            source, sink = (client, server) if way == "up" else (server, client)
            source.sendall(b"x" * (count + 5))
            until(lambda: proxy.bytes_up + proxy.bytes_down == count, 5)  # a receiver may take its time
            assert rig.read_all(sink) == (count, how)
    assert (proxy.bytes_up + proxy.bytes_down, proxy.cuts) == (count, 1)


def test_only_the_named_connection_is_cut(proxies: Proxies, talkers: Talkers) -> None:
    """A budget for the second connection leaves the others whole; set on an open one, it counts from then on."""
    proxy = proxies(talkers(b"x" * 1000))
    proxy.cut_after(777, "down", connection=2)
    for ending in [(1000, "fin"), (777, "rst"), (1000, "fin")]:
        with rig.open_to(proxy) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert rig.read_all(connection) == ending
    with rig.open_to(proxy) as connection, rig.open_to(proxy) as spared:
        assert [len(it.recv(1000, socket.MSG_WAITALL)) for it in (connection, spared)] == [1000] * 2
        proxy.cut_after(3, "down", connection=4)
        rig.push(connection, b"abcdef")
        assert rig.read_all(connection) == (3, "rst")
        assert rig.echo(spared, b"abcdef") == b"abcdef"


@pytest.mark.parametrize("how", ["rst", "fin"])
def test_connections_can_be_ended_at_once(proxies: Proxies, talkers: Talkers, how: How) -> None:
    """cut() ends what is open now; a budget of 0 ends a new connection before the target sees one."""
    target = proxies(talkers(b"hello"))
    proxy = proxies(target)
    with rig.open_to(proxy) as connection:
        assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
        proxy.cut(how)
        assert rig.read_all(connection) == (0, how)
    proxy.cut_after(0, "up", how)
    with contextlib.suppress(ConnectionResetError), rig.open_to(proxy) as connection:
        assert rig.read_all(connection) == (0, how)
    until(lambda: proxy.cuts == 2, 5)
    assert target.connections == 1


def test_a_black_hole_holds_everything_and_heals(proxies: Proxies, talkers: Talkers) -> None:
    """In a black hole open and new connections stay open and silent, ends too; healed, every byte arrives."""
    proxy = proxies(talkers(b"hello"))
    with rig.open_to(proxy) as before:
        assert before.recv(5, socket.MSG_WAITALL) == b"hello"
        proxy.black_hole()
        rig.push(before, b"word")
        with rig.open_to(proxy) as after:
            for connection in (before, after):
                connection.settimeout(0.15)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
                connection.settimeout(5)
            assert (proxy.bytes_up, proxy.bytes_down, proxy.open_now) == (0, 5, 2)
            proxy.heal()
            assert rig.read_all(before) == (4, "fin")
            assert after.recv(5, socket.MSG_WAITALL) == b"hello"


def test_latency_is_measured(proxies: Proxies, talkers: Talkers) -> None:
    """Bytes there and back take the delay of each direction, once and not per piece."""
    proxy = proxies(talkers(b""))
    proxy.delay(0.1, ["up"])
    proxy.delay(0.2, ["down"])
    with rig.open_to(proxy) as connection:
        began = time.monotonic()
        assert len(rig.echo(connection, b"x" * 500_000)) == 500_000
        assert 0.3 <= time.monotonic() - began < 0.9


def test_throttle_holds_its_rate(proxies: Proxies, talkers: Talkers) -> None:
    """At 400 kB/s 200 kB take half a second; lifted in mid-way, the rest comes at once."""
    proxy = proxies(talkers(b"x" * 200_000))
    for bytes_per_s, least_s, most_s in [(400_000, 0.45, 0.9), (1000, 0.0, 0.5)]:
        proxy.throttle(bytes_per_s, ["down"])
        with rig.open_to(proxy) as connection:
            connection.shutdown(socket.SHUT_WR)
            began = time.monotonic()
            count = len(connection.recv(10, socket.MSG_WAITALL))
            if bytes_per_s == 1000:
                proxy.pass_all()
            assert count + rig.read_all(connection)[0] == 200_000
            assert least_s <= time.monotonic() - began < most_s


def test_refuse_and_accept(proxies: Proxies, talkers: Talkers) -> None:
    """While it refuses, new connections fail at once and an open one goes on; then it answers, by a reset if alone."""
    proxy = proxies(talkers(b"hello"))
    with rig.open_to(proxy) as connection:
        assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            rig.open_to(proxy)
        assert rig.echo(connection, b"word") == b"word"
    proxy.accept()
    proxy.target = rig.Place(*free_address())
    with contextlib.suppress(ConnectionResetError), rig.open_to(proxy) as connection:
        assert rig.read_all(connection) == (0, "rst")


def test_a_proxy_leaves_nothing_behind(talkers: Talkers) -> None:
    """After its block a proxy has no thread, no open file and no connection, whatever state it was in."""
    place, descriptors = talkers(b"x" * 10_000_000), Path("/proc/self/fd")
    before = threading.active_count(), len(list(descriptors.iterdir()))
    with rig.Proxy(place) as proxy, rig.open_to(proxy), rig.open_to(proxy) as connection:
        proxy.throttle(1000)
        assert connection.recv(1)
        proxy.black_hole()
        proxy.close()
    until(lambda: (threading.active_count(), len(list(descriptors.iterdir()))) == before, 5)
    with pytest.raises(ConnectionRefusedError):
        rig.open_to(proxy)


def test_ssh_through_a_proxy_that_cuts(machine: rig.Sshd, proxies: Proxies) -> None:
    """A call through the proxy works, and one that is cut in the middle ends as "connection lost"."""
    proxy = proxies(machine)
    assert machine.run("echo word", via=proxy).stdout == b"word\n"
    proxy.cut_after(100_000, "down")
    done = machine.run("head -c 1000000 /dev/zero", via=proxy)
    assert (done.returncode, proxy.cuts) == (255, 1)
    assert len(done.stdout) < 100_000


def test_a_dropped_wire_is_silent_and_heals(wires: Wires) -> None:
    """With drop() a connect times out, a session hangs and another wire is well; healed, both go on."""
    wire, other = wires("dropped"), wires("other")
    with rig.open_call(wire.sshd) as child:
        wire.drop()
        with pytest.raises(TimeoutError):
            rig.open_to(wire, timeout_s=0.3)
        assert rig.has_banner(other)
        assert child.poll() is None
        wire.heal()
        assert rig.has_banner(wire)
        assert child.communicate(b"word\n", timeout=10)[0] == b"word\n"


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


def test_a_wire_rejects_and_its_link_goes_down(wires: Wires) -> None:
    """reject_rst() resets an open connection at its next byte and refuses new ones; a link that is down is silent."""
    wire = wires()
    with rig.open_to(wire) as connection:
        assert connection.recv(64).startswith(b"SSH-")
        wire.reject_rst()
        connection.sendall(b"x")
        assert rig.read_all(connection) == (0, "rst")
    with pytest.raises(ConnectionRefusedError):
        rig.open_to(wire)
    wire.heal()
    wire.link_down()
    with pytest.raises(OSError, match=SILENT):
        rig.open_to(wire, timeout_s=0.3)
    wire.link_up()
    assert rig.has_banner(wire)


def test_either_end_changes_its_address(wires: Wires) -> None:
    """A changed address is silent at once, for open connections too; the new one leads to the same machine."""
    wire = wires()
    old = rig.Place(wire.address, wire.port)
    assert wire.change_address() == wire.address != old.address
    with pytest.raises(OSError, match=SILENT):
        rig.open_to(old, timeout_s=0.3)
    with rig.open_to(wire) as connection:
        assert connection.recv(64).startswith(b"SSH-")
        new = wire.change_own_address()
        connection.settimeout(0.3)
        with pytest.raises(OSError, match=SILENT):
            rig.echo(connection, b"SSH-2.0-x\r\n")
    assert wire.sshd.run("echo $SSH_CLIENT").stdout.decode().split()[0] == new


def test_nothing_is_left_of_a_wire(tmp_path: Path) -> None:
    """When its block is left by an error a wire's namespace, cards and processes are gone."""
    rig.need_wires()
    with contextlib.suppress(KeyError), rig.Wire(tmp_path / "wire") as wire:
        rig.start_daemon(wire.sshd)
        wire.drop()
        raise KeyError
    assert wire.sshd.processes() == []
    for what in ("netns", "link"):
        shown = subprocess.run(["ip", what], capture_output=True, text=True, check=True).stdout
        assert wire.name.removeprefix("rig-") not in shown


def test_skips_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without sshd a test that asks for machines is skipped with the line that installs it."""
    monkeypatch.setattr("tests.rig.sshd.sshd_program", lambda: None)
    with pytest.raises(pytest.skip.Exception, match="apt-get install openssh-server"):
        next(rig.machine_room(tmp_path))

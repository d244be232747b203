"""The sandbox: what hostile programs try, each behind every kind of walls, comes to nothing and leaves nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.waiting import until
from tests.worker.confined import KINDS, ROOT, python_of_everybody, run, run_as_nobody
from worker import processes, sandbox
from worker.confinement import BARE, NAMESPACES
from worker.sandbox import SandboxFailed, Walls

every_kind = pytest.mark.parametrize("kind", KINDS)
HANG = "import signal\nsignal.pause()"
DEAF = "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile 1: signal.pause()"
ESCAPE = """
import os, signal
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execv("/bin/sleep", ["{mark}", "1000"])
    os._exit(0)
os.wait()
{then}
"""


def alive(mark: str) -> bool:
    """Whether a process bears that name."""
    return any(words[:1] == [mark] for words in processes.commands().values())


@every_kind
@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", True),
        ("import subprocess\nassert subprocess.run(['/bin/echo', 'x'], capture_output=True).stdout == b'x\\n'", True),
        ("open('a', 'w').write('x'); assert open('a').read() == 'x'", True),
        ("assert False", False),
        ("this is not Python", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("raise KeyboardInterrupt", False),
        ("input()", False),
    ],
)
@pytest.mark.first(15)
def test_only_a_program_that_runs_to_its_last_line_passes(kind: str, program: str, passed: bool) -> None:
    """A program passes when its last line is reached: not by failing, nor by ending itself early with code 0."""
    outcome = run(kind, program)
    assert (outcome.passed, outcome.ended) == (passed, "by itself"), outcome.output


@every_kind
@pytest.mark.parametrize("program", [HANG, "while True: pass", DEAF])
@pytest.mark.first(4)
def test_a_program_that_does_not_end_is_ended_in_time(kind: str, program: str) -> None:
    """Sleeping, turning and ignoring signals all end at the time limit."""
    began = time.monotonic()
    outcome = run(kind, program, 1.0)
    assert (outcome.passed, outcome.ended) == (False, "time")
    assert 1.0 <= outcome.seconds < 3.0
    assert time.monotonic() - began < 10


@every_kind
@pytest.mark.first(2)
def test_a_fork_bomb_is_bounded_and_gone(kind: str) -> None:
    """A program that forks as fast as it can gets its number of processes and no more, and all of them die."""
    bomb = "import os, signal\nwhile True:\n  try: os.fork()\n  except OSError: signal.alarm(0)"
    before = len(processes.commands())
    outcome = run(kind, bomb, 1.0)
    assert (outcome.passed, outcome.ended) == (False, "time")
    until(lambda: len(processes.commands()) < before + 20, 20)
    count = "import os\nr, w = os.pipe()\nfor _ in range(500):\n  if os.fork() == 0: os.read(r, 1)"
    assert "BlockingIOError" in run(kind, count, 5.0).output


@every_kind
@pytest.mark.first(1)
def test_what_leaves_its_session_dies_too(kind: str) -> None:
    """A grandchild in a session of its own, deaf to signals, is dead when the program's run has ended."""
    mark = f"escaped-{os.getpid()}-{KINDS.index(kind)}"
    for then in ("", HANG):
        text = ESCAPE.format(mark=mark, then=then)
        if not then:
            assert run(kind, text).passed
        else:
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(run, kind, text, 4.0)
                until(lambda: alive(mark), 4)
                assert running.result().ended == "time"
        assert not alive(mark)


@every_kind
@pytest.mark.parametrize(
    "program",
    [
        "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))",
        "n = 0\nwhile True:\n  n += 1\n  open(str(n), 'wb').write(bytes(1 << 20))",
    ],
)
def test_the_disk_cannot_be_filled(kind: str, program: str) -> None:
    """One endless file and endlessly many files both end the program."""
    outcome = run(kind, program, disk_bytes=8 << 20)
    assert not outcome.passed
    assert outcome.ended in ("by itself", "disk"), outcome.output
    assert outcome.seconds < 9


@every_kind
def test_memory_is_limited_of_one_process_and_of_all(kind: str) -> None:
    """One process gets its address space, all together their memory."""
    one = run(kind, "bytearray(1 << 30)", address_bytes=512 << 20)
    assert "MemoryError" in one.output
    many = "import os\nfor _ in range(6):\n  if os.fork() == 0: break\nx = bytearray(b'x') * (100 << 20)\n" + HANG
    assert run(kind, many, memory_bytes=300 << 20).ended == "memory"


@every_kind
@pytest.mark.first(1)
def test_endless_output_is_cut(kind: str) -> None:
    """A gigabyte of output is read and dropped but for its beginning, and does not decide the verdict."""
    outcome = run(kind, "for _ in range(1 << 10): print('x' * (1 << 20))", 60.0, output_bytes=1000)
    assert outcome.passed
    assert outcome.output == "x" * 1000


@every_kind
@pytest.mark.first(2)
def test_nobodys_files_are_read(kind: str) -> None:
    """Neither a file that everybody may read nor the system's list of users can be opened."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # so that it is not the way there that protects it
        secret = Path(folder, "secret")
        secret.write_text("a secret")
        secret.chmod(0o644)
        for path in (secret, "/etc/passwd", ROOT / "README.md"):
            outcome = run(kind, f"open({str(path)!r}).read()")
            assert not outcome.passed
            assert "PermissionError" in outcome.output or "FileNotFoundError" in outcome.output, outcome.output


@every_kind
def test_nothing_is_left_on_the_disk(kind: str) -> None:
    """Folders nested deeply, and ones that nobody may enter, are gone when the run has ended."""
    before = set(Path(tempfile.gettempdir()).glob("sandbox-*"))
    deep = "import os\nfor n in range(1500): os.mkdir('d'); os.chdir('d')\nopen('f', 'w')\nos.chmod('.', 0)"
    assert run(kind, deep, 20.0).ended in ("by itself", "disk")
    until(lambda: set(Path(tempfile.gettempdir()).glob("sandbox-*")) <= before, 10)


@every_kind
def test_no_environment_can_be_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret in the caller's environment is neither in the program's nor to be found under /proc."""
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    look = (
        "import os, glob\nprint(dict(os.environ))\n"
        "for place in glob.glob('/proc/*/environ') + [f'/proc/{n}/environ' for n in range(1, 70000)]:\n"
        "  try: print(open(place).read())\n  except OSError: pass"
    )
    outcome = run(kind, look, 30.0, output_bytes=1 << 20)
    assert outcome.passed, outcome.output
    assert "hf_very_secret" not in outcome.output
    assert "'HOME'" in outcome.output


@every_kind
def test_the_network_cannot_be_reached(kind: str) -> None:
    """A program can reach neither a server on this computer nor open a socket at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        outcome = run(kind, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
        assert not outcome.passed
        with pytest.raises(TimeoutError):
            server.accept()


@every_kind
@pytest.mark.parametrize(
    "call", ["socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "assert ctypes.CDLL(None).unshare(0x10000000) == 0"]
)
def test_calls_of_the_kernel_are_refused(kind: str, call: str) -> None:
    """Not even a socket that is never used can be had, nor a user namespace, in which a program would be root."""
    outcome = run(kind, f"import ctypes, socket\n{call}")
    assert not outcome.passed
    assert "PermissionError" in outcome.output or "AssertionError" in outcome.output


@every_kind
@pytest.mark.parametrize("call", ["os.setuid(0)", "os.kill({parent}, 0)", "os.mkdir('/usr/x')", "os.chroot('/')"])
def test_a_program_has_no_rights(kind: str, call: str) -> None:
    """It cannot become root, signal who called it, write into the system, or change its root."""
    outcome = run(kind, "import os\n" + call.format(parent=os.getpid()))
    assert not outcome.passed
    assert "Error" in outcome.output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give each program a user of its own")
@pytest.mark.parametrize("kind", KINDS[:2])
def test_programs_at_the_same_time_are_different_users(kind: str) -> None:
    """As root, two programs that run side by side are two users, and neither is one that somebody else is."""
    meet = threading.Barrier(2)

    def one(_: int) -> str:
        meet.wait(20)
        return run(kind, "import os, time\nprint(os.getuid())\ntime.sleep(1 / 2)").output

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, range(2))
    assert first != second
    assert all(int(uid) in range(61184, 65000) for uid in (first, second))


def test_what_called_may_be_killed_at_any_time() -> None:
    """When the calling process is killed, what it ran is dead soon after, a grandchild in its own session too."""
    mark = f"orphan-{os.getpid()}"
    text = ESCAPE.format(mark=mark, then=HANG)
    call = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from worker import sandbox; sandbox.run({text!r}, 60.0)"
    with subprocess.Popen([sys.executable, "-c", call]) as child:
        until(lambda: alive(mark), 20)
        child.kill()
    until(lambda: not alive(mark), 10)


def test_walls_that_cannot_be_built_say_nothing_about_the_program() -> None:
    """Where walls are refused, SandboxFailed is raised instead of an outcome."""
    python_of_everybody()
    with pytest.raises(SandboxFailed, match="not permitted"):
        run_as_nobody("pass", 5.0, Walls(NAMESPACES, False, False, True), {})


def test_weak_walls_are_told_of() -> None:
    """What does not hold on a machine is said in words; where all holds, nothing is."""
    assert "can reach the network" in Walls(BARE, False, False, False).described()
    assert Walls(NAMESPACES, True, False, True).missing() == []
    assert sandbox.NOT_PROTECTED in sandbox.walls().described()

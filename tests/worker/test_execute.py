"""A command of the laptop's on a machine: its own exit code, its secrets unseen, and nothing of it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from tests.worker import pushing
from worker import execute

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and the subreaper of Linux")
Process = subprocess.Popen[bytes]
Start = Callable[..., Process]
ESCAPE = [
    "import os, signal, sys",
    "if os.fork(): sys.exit()",
    "os.setsid()",
    "if os.fork(): os._exit(0)",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "open(sys.argv[1], 'w').write(str(os.getpid()))",
    "signal.pause()",
]
"""A daemon: in a session of its own, orphaned on purpose, deaf to TERM."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command; its standard input stays open. What is left at the end is killed, with its group."""
    started: list[Process] = []

    def begin(*words: object, **order: Any) -> Process:
        process = subprocess.Popen(
            pushing.words("exec", tmp_path), stdin=-1, stdout=-1, stderr=-1, bufsize=0, process_group=0
        )
        started.append(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps({"words": [str(word) for word in words], **order}).encode() + b"\n")
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        with process:  # closes its pipes and waits for it
            pass


def ended(process: Process) -> tuple[int, bytes, bytes]:
    """Exit code, output and complaints of a command that ends by itself, our end of its input still open."""
    assert process.stdout is not None
    assert process.stderr is not None
    out, said = process.stdout.read(), process.stderr.read()
    return process.wait(30), out, said


def python(code: list[str] | str, *words: object) -> list[object]:
    return [sys.executable, "-I", "-S", "-c", code if isinstance(code, str) else "\n".join(code), *words]


def pid_in(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text()))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


@pytest.mark.parametrize("code", [0, 1, 42, 125, 255])
def test_the_exit_code_is_the_commands_own(start: Start, code: int) -> None:
    """What a command exits with is what the laptop gets, at once, though the laptop still listens."""
    began = time.monotonic()
    assert ended(start("sh", "-c", f"exit {code}")) == (code, b"", b"")
    assert time.monotonic() - began < 10


def test_a_signal_is_told_as_a_shell_does(start: Start) -> None:
    """A command that died of a signal exits with 128 and its number."""
    assert ended(start("sh", "-c", "kill -9 $$"))[0] == 137
    assert ended(start("sh", "-c", "kill -SEGV $$"))[0] == 139


def test_words_and_bytes_pass_as_they_are(start: Start) -> None:
    """Words reach the command unchanged, through no shell, and what it writes comes back byte for byte."""
    words = ["$HOME", "a b", "*", "", "ü\n漢", ";exit 3", "'"]
    code = "import os, sys; os.write(1, b'\\0\\xff'.join(map(os.fsencode, sys.argv[1:]))); os.write(2, b'\\xfe')"
    assert ended(start(*python(code, *words))) == (0, b"\0\xff".join(word.encode() for word in words), b"\xfe")


def test_the_command_reads_nothing_and_leads_a_session(start: Start) -> None:
    """Its standard input is empty, and it is in a session and a process group of its own."""
    code = "import os, sys; print(len(sys.stdin.read()), os.getsid(0) == os.getpgid(0) == os.getpid())"
    assert ended(start(*python(code)))[1] == b"0 True\n"


def test_folder_and_path_are_as_ordered(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the folder named, below the root when relative, else at home; `path_first` is searched first."""
    home, tools, work = (tmp_path / name for name in ("home", "tools", "work"))
    for folder in (home, tools, work):
        folder.mkdir()
    (tools / "tool").write_text("#!/bin/sh\npwd -P\n")
    (tools / "tool").chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    for cwd, folder in ((None, home), (str(work), work), ("work", work)):
        assert ended(start("tool", cwd=cwd, path_first=str(tools)))[1].decode() == f"{folder.resolve()}\n"
    assert ended(start("tool"))[0] == 127
    assert ended(start("sh", "-c", "echo $PATH", path_first="/first", env={"PATH": "/bin"}))[1] == b"/first:/bin\n"


@linux_only
def test_secrets_stand_in_no_argument(start: Start, tmp_path: Path) -> None:
    """A value of the environment reaches the command, over that of the machine, and no process has it as a word."""
    secret, path = "s3cr3t-canary", tmp_path / "pid"
    process = start(
        "sh", "-c", 'echo $$ >"$0.new"; mv "$0.new" "$0"; echo "$TOKEN"; exec sleep 600', path, env={"TOKEN": secret}
    )
    assert process.stdout is not None
    pid_in(path)
    assert process.stdout.readline().decode() == f"{secret}\n"
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert secret.encode() not in entry.read_bytes()
        except OSError:  # it ended meanwhile
            continue


FAILING: dict[str, tuple[int, str, list[str], dict[str, Any]]] = {
    "unknown": (127, "there is no command 'no-such-command'", ["no-such-command"], {}),
    "below a file": (127, "there is no command", ["./plain/x"], {}),
    "no interpreter": (127, "no interpreter", ["./lost"], {}),
    "not executable": (126, "Permission denied", ["./plain"], {}),
    "a folder": (126, "Permission denied", ["./folder"], {}),
    "rubbish": (126, "Exec format error", ["./rubbish"], {}),
    "no folder": (125, "there is no folder", ["true"], {"cwd": "gone"}),
    "a file as folder": (125, "there is no folder", ["true"], {"cwd": "plain"}),
    "no words": (125, "the order is none", [], {}),
    "a number": (125, "the order is none", ["true"], {"env": {"A": 3}}),
    "a list": (125, "the order is none", ["true"], {"env": ["s3cr3t"]}),
    "half a character": (125, "cannot be started", ["true"], {"env": {"A": "s3cr3t\ud800"}}),
    "a zero": (125, "cannot be started", ["true\0"], {"env": {"A": "s3cr3t"}}),
    "no name": (125, "cannot be started", ["true"], {"env": {"A=B": "s3cr3t"}}),
}
"""What is wrong → exit code, words of the complaint, the command, more of the order."""


@pytest.fixture
def unfit(tmp_path: Path) -> None:
    """Files that cannot be run, in the root."""
    (tmp_path / "folder").mkdir()
    for name, content, mode in (
        ("plain", "text\n", 0o644),
        ("rubbish", "\1\2\3", 0o755),
        ("lost", "#!/no/such/interpreter\n", 0o755),
    ):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(mode)


@pytest.mark.parametrize("case", FAILING)
def test_what_cannot_be_run_is_said_in_one_line(start: Start, unfit: None, case: str) -> None:
    """Not found is 127, not executable 126, anything else 125; one line says why, without the value of a variable."""
    code, words, command, order = FAILING[case]
    done, out, said = ended(start(*command, **{"cwd": ".", **order}))
    assert (done, out) == (code, b"")
    assert words in said.decode()
    assert said.startswith(b"gpu: ")
    assert said.count(b"\n") == 1
    assert b"s3cr3t" not in said


@pytest.mark.parametrize("data", [b"", b"\n", b"[]\n", b"7\n", b'{"words": "true"}\n', b"\xff\n", b"[" * 9999 + b"\n"])
def test_an_order_that_is_none_runs_nothing(data: bytes, tmp_path: Path) -> None:
    """A first line that is no order, or none at all, ends with 125."""
    done = subprocess.run(pushing.words("exec", tmp_path), input=data, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (125, b"", b"gpu: the order is none\n")


@linux_only
@pytest.mark.parametrize("escaped", [False, True])
def test_the_command_is_ended_when_the_laptop_is_gone(start: Start, escaped: bool) -> None:
    """At the end of its input a command, and all it started, gets TERM, once, and may end by itself in time."""
    code = [
        "import os, signal, sys",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])",
        "print(os.getpid(), flush=True)",
        "signal.sigwait([signal.SIGTERM])",
        "again = signal.sigtimedwait([signal.SIGTERM], 0.5)",
        "print('told twice' if again else 'saved')",
        "sys.exit(7)",
    ]
    around = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    process = start(*python(around, "\n".join(code))) if escaped else start(*python(code))
    assert process.stdin is not None
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.stdin.write(b"what else comes is passed over\n")
    assert is_alive(pid)
    process.stdin.close()
    assert (process.stdout.read(), process.wait(30)) == (b"saved\n", 143 if escaped else 7)


@linux_only
def test_what_escaped_and_is_deaf_is_killed_with_it(start: Start, tmp_path: Path) -> None:
    """Two seconds after the laptop is gone neither a command that ignores TERM is left, nor a daemon of its."""
    pids = [tmp_path / "daemon", tmp_path / "command"]
    deaf = ["import os, signal, subprocess, sys", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"]
    deaf += ["subprocess.run([sys.executable, '-c', sys.argv[3], sys.argv[1]])"]
    deaf += ["open(sys.argv[2], 'w').write(str(os.getpid()))", "signal.pause()"]
    process = start(*python(deaf, *pids, "\n".join(ESCAPE)))
    assert process.stdin is not None
    alive = [pid_in(path) for path in pids]
    began = time.monotonic()
    process.stdin.close()
    assert process.wait(30) == 137
    assert time.monotonic() - began >= execute.GRACE_S
    assert not any(is_alive(pid) for pid in alive)


@linux_only
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_whoever_kills_what_the_laptop_started_ends_the_command(start: Start, tmp_path: Path, number: int) -> None:
    """Killed with its whole group, as a connection that is given up does, `exec` leaves neither command nor daemon."""
    pids = [tmp_path / "daemon", tmp_path / "command"]
    code = ["import os, signal, subprocess, sys", "subprocess.run([sys.executable, '-c', sys.argv[3], sys.argv[1]])"]
    code += ["open(sys.argv[2], 'w').write(str(os.getpid()))", "signal.pause()"]
    process = start(*python(code, *pids, "\n".join([line for line in ESCAPE if "IGN" not in line])))
    alive = [pid_in(path) for path in pids]
    os.killpg(process.pid, number)
    until(lambda: not any(is_alive(pid) for pid in alive))


@linux_only
def test_the_command_dies_with_its_watcher(start: Start, tmp_path: Path) -> None:
    """When the process that watches it is killed, the kernel kills the command, and that is told."""
    process = start(*python("import os, signal; print(os.getppid(), os.getpid(), flush=True); signal.pause()"))
    assert process.stdout is not None
    watcher, command = map(int, process.stdout.readline().split())
    assert watcher != process.pid
    os.kill(watcher, signal.SIGKILL)
    assert process.wait(30) == 137
    until(lambda: not is_alive(command))


@linux_only
def test_nothing_outlives_the_command(start: Start, tmp_path: Path) -> None:
    """What a command leaves in the background is ended with it, which is said; its exit code stays its own."""
    process = start("sh", "-c", "sleep 600 & echo $!; exit 5")
    code, out, said = ended(process)
    assert code == 5
    assert not is_alive(int(out))
    assert said == b"gpu: processes that the command left behind were ended with it: 1\n"

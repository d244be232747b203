"""The child side of the sandbox: builds the walls, runs one program behind them, and leaves nothing of it alive."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from worker import processes, syscalls
from worker.companion import serve

NAMESPACES, USER_NAMESPACES, BARE = "namespaces", "user-namespaces", "bare"
"""How a program is walled in: by namespaces that root makes, by those an ordinary user may make, or by neither."""
FAILED = 97
"""Exit code of a process of ours that could not build its wall; why stands in its complaint."""
_NOBODY = 65534
_TICK_S = 0.02
_FOLDERS_MAX = 4096
_PATH_MAX = 2000  # characters, half of what the kernel takes
_ENTRY_BYTES = 4096
_TOO_MUCH = 1 << 62
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
Pipes = tuple[int, int, int, int]
"""Program in; its output, its runner's verdict, and complaints of ours out."""
_VERDICT = 3  # the descriptor on which the program's runner says that it came to its end


def main(stdin: BinaryIO, stdout: BinaryIO) -> int:
    """Answer each order with what came of its program: `{"failed": why}` where its walls could not be built."""
    return serve(stdin, stdout, lambda _: _watched)


def _watched(order: dict[str, Any]) -> Any:
    """What came of one order, from a process that only this program's walls are around."""
    answer, said = os.pipe()
    caller = os.getpid()
    watch = _forked(lambda: _answer(order, caller, said), said)
    os.close(said)
    heard = select.poll()
    heard.register(answer, select.POLLIN)
    heard.register(0, 0)  # tells when who ordered is gone
    text = b""
    while not text.endswith(b"\n"):
        ready = dict(heard.poll())
        if 0 in ready:
            os.kill(watch, signal.SIGKILL)
            os._exit(1)
        chunk = os.read(answer, 1 << 16)
        if not chunk:
            break
        text += chunk
    os.close(answer)
    os.waitpid(watch, 0)
    return json.loads(text) if text.startswith(b"{") else {"failed": text.decode(errors="replace") or "its watch died"}


def _answer(order: dict[str, Any], caller: int, said: int) -> None:
    if sys.platform == "linux":
        processes.die_with_parent(caller)
        processes.become_subreaper()
    with os.fdopen(said, "wb") as out:
        try:
            found = _Watch(order).run()
        except OSError as error:
            found = {"failed": f"{error.strerror or error}"}
        out.write(json.dumps(found).encode() + b"\n")


class _Watch:
    """Watches one program from outside of its walls, and ends it."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._limits = order["limits"]
        self._output = bytearray()
        self._said = bytearray()
        self._complaint = bytearray()

    def run(self) -> dict[str, Any]:
        _own_namespaces(self._order)
        program, output, verdict, complaint = (os.pipe() for _ in range(4))
        theirs = (program[0], output[1], verdict[1], complaint[1])
        ours = (program[1], output[0], verdict[0], complaint[0])
        keeper = _forked(lambda: _keep(self._order, theirs, ours), complaint[1])
        _close(theirs)
        began = time.monotonic()
        try:
            readers = {output[0]: self._output, verdict[0]: self._said, complaint[0]: self._complaint}
            ended = self._follow(keeper, program[1], readers, began)
        finally:
            seconds = time.monotonic() - began
            status = _end(keeper, self._order)
        if self._complaint or os.waitstatus_to_exitcode(status) == FAILED:
            return {"failed": self._complaint.decode(errors="replace") or "no reason was given"}
        return {
            "passed": ended is None and bytes(self._said) == self._order["token"].encode(),
            "ended": ended or "by itself",
            "seconds": round(seconds, 4),
            "output": self._output.decode(errors="replace"),
        }

    def _follow(self, keeper: int, program: int, readers: dict[int, bytearray], began: float) -> str | None:
        """Feed the program and hear it until it has ended; what ended it, None when that was itself."""
        text = memoryview(self._order["program"].encode("utf-8", "surrogatepass"))
        os.set_blocking(program, False)
        open_to_write = [program]
        next_look = began
        while readers:
            if time.monotonic() - began > self._order["wall_s"]:
                return "time"
            if time.monotonic() >= next_look:
                if over := self._over(keeper):
                    return over
                next_look = time.monotonic() + 5 * _TICK_S
            ready, writable, _ = select.select([*readers], open_to_write, [], _TICK_S)
            for pipe in ready:
                self._hear(pipe, readers)
            if writable:
                with contextlib.suppress(BlockingIOError):
                    text = text[_written(program, text) :]
                if not text:
                    os.close(program)
                    open_to_write = []
            if _has_ended(keeper):  # what it left running may hold the pipes open
                for pipe in select.select([*readers], [], [], 0)[0]:
                    self._hear(pipe, readers)
                break
        return None

    def _hear(self, pipe: int, readers: dict[int, bytearray]) -> None:
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            os.close(pipe)
            del readers[pipe]
            return
        room = self._limits["output_bytes"] - len(readers[pipe])
        readers[pipe] += chunk[: max(room, 0)]  # the rest is let run out: nobody waits for a reader

    def _over(self, keeper: int) -> str | None:
        """Which limit on all of its processes together the program has passed, if any."""
        page = resource.getpagesize()
        total = 0
        for pid in processes.descendants(keeper):
            with contextlib.suppress(OSError, ValueError, IndexError):
                total += int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * page
        if total > self._limits["memory_bytes"]:
            return "memory"
        if self._order["way"] == BARE and _size(self._order["folder"]) > self._limits["disk_bytes"]:
            return "disk"
        return None


def _written(pipe: int, text: memoryview) -> int:
    try:
        return os.write(pipe, text)
    except BrokenPipeError:  # it does not want the rest
        return len(text)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it is not reaped."""
    if not hasattr(os, "waitid"):
        return False
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _size(folder: str) -> int:
    """Bytes below a folder; what has gone meanwhile counts nothing, too many or too deep folders do."""
    total = 0
    places = [folder]
    for _ in range(_FOLDERS_MAX):
        if not places:
            return total
        place = places.pop()
        with contextlib.suppress(FileNotFoundError, PermissionError), os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    places.append(entry.path)
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512 + _ENTRY_BYTES
        if len(place) > _PATH_MAX:
            break
    return _TOO_MUCH


def _own_namespaces(order: dict[str, Any]) -> None:
    """Have what is forked from here in namespaces of its own."""
    if order["way"] == BARE:
        return
    flags = syscalls.NEW_NAMESPACE_PROCESSES | syscalls.NEW_NAMESPACE_NETWORK
    flags |= syscalls.NEW_NAMESPACE_IPC | syscalls.NEW_NAMESPACE_HOST
    user, group = os.getuid(), os.getgid()
    if order["way"] == USER_NAMESPACES:
        flags |= syscalls.NEW_NAMESPACE_USER
    syscalls.unshare(flags)
    if order["way"] == USER_NAMESPACES:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{_NOBODY} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{_NOBODY} {group} 1", encoding="ascii")


def _forked(act: Callable[[], None], complaint: int) -> int:
    """The pid of a child that does this and nothing else; what it cannot do, it says on that pipe."""
    child = os.fork()
    if child:
        return child
    code = FAILED
    try:
        act()
        code = 0
    except BaseException as error:  # noqa: BLE001 -- nothing may go back into the code that called
        with contextlib.suppress(OSError):
            os.write(complaint, f"{type(error).__name__}: {error}".encode())
    os._exit(code)


def _keep(order: dict[str, Any], theirs: Pipes, ours: Pipes) -> None:
    """The keeper: the first process of the program's namespace, whose death ends all others in it."""
    _close(ours)
    if sys.platform == "linux":
        processes.die_with_parent(os.getppid())
        processes.become_subreaper()
        heard = select.poll()
        heard.register(theirs[1], 0)
        if heard.poll(0):  # nobody reads any more: the watch died before it could be noticed
            return
    if order["way"] != BARE:
        _build_root(order)
    program = _forked(lambda: _become(order, theirs), theirs[3])
    _close(theirs)
    while os.waitpid(-1, 0)[0] != program:
        pass


def _close(pipes: Pipes) -> None:
    for pipe in pipes:
        os.close(pipe)


def _build_root(order: dict[str, Any]) -> None:
    """A root in memory that holds nothing but the folders of the interpreter, read-only, and an empty one to write."""
    syscalls.unshare(syscalls.NEW_NAMESPACE_MOUNTS)
    syscalls.mount("none", "/", None, syscalls.MOUNT_RECURSIVE | syscalls.MOUNT_PRIVATE)
    root = order["folder"]
    size = f"size={order['limits']['disk_bytes']},nr_inodes=4096,mode=755"
    syscalls.mount("sandbox", root, "tmpfs", syscalls.MOUNT_NO_SETUID | syscalls.MOUNT_NO_DEVICES, size)
    for path in order["readable"]:
        _show(path, root)
    for path in _DEVICES:
        place = Path(root + path)
        place.parent.mkdir(exist_ok=True)
        place.touch()
        syscalls.mount(path, str(place), None, syscalls.MOUNT_BIND)
    for name in ("home", "tmp"):
        Path(root, name).mkdir(exist_ok=True)
        Path(root, name).chmod(0o777)
    syscalls.enter_root(root)


def _show(path: str, root: str) -> None:
    """The same path in the new root, read-only; a link stays a link."""
    place, shown = Path(root + path), Path(path)
    if place.exists() or not os.path.lexists(path):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if shown.is_symlink():
        place.symlink_to(shown.readlink())
        return
    if shown.is_dir():
        place.mkdir()
    else:
        place.touch()
    syscalls.mount(path, str(place), None, syscalls.MOUNT_BIND | syscalls.MOUNT_RECURSIVE)
    flags = syscalls.MOUNT_BIND | syscalls.MOUNT_AGAIN | syscalls.MOUNT_READ_ONLY
    flags |= syscalls.MOUNT_NO_SETUID | syscalls.MOUNT_NO_DEVICES
    if os.statvfs(path).f_flag & os.ST_NOEXEC:  # an ordinary user may take no such flag away
        flags |= syscalls.MOUNT_NO_PROGRAMS
    syscalls.mount("none", str(place), None, flags)


def _become(order: dict[str, Any], pipes: Pipes) -> None:
    """Put on every limit and become the program; raises OSError where one cannot be put on."""
    program, output, verdict, complaint = pipes
    os.setsid()
    for place, pipe in enumerate((program, output, output)):
        os.dup2(pipe, place)
    os.dup2(verdict, _VERDICT)
    os.closerange(_VERDICT + 1, complaint)
    os.closerange(complaint + 1, 1024)
    inside = order["way"] != BARE
    home, temporary = ("/home", "/tmp") if inside else (order["folder"],) * 2  # noqa: S108 -- one of its own
    os.chdir(home)
    os.umask(0o077)
    _limit(order)
    if order["uid"] is not None:
        os.setgroups([])
        os.setresgid(order["uid"], order["uid"], order["uid"])
        os.setresuid(order["uid"], order["uid"], order["uid"])
    if sys.platform == "linux":
        processes.die_with_parent(os.getppid())
        syscalls.renounce_privileges()
    if order["landlock"] and not syscalls.restrict_files([*order["readable"], *_DEVICES], [home, "/dev/null"]):
        raise OSError("Landlock was refused")
    if order["filter"] and not syscalls.refuse_calls():
        raise OSError("the filter of system calls was refused")
    environment = {**order["env"], "HOME": home, "TMPDIR": temporary}
    os.execve(order["words"][0], order["words"], environment)  # noqa: S606 -- no shell is wanted


def _limit(order: dict[str, Any]) -> None:
    """Limits of the kernel on each process; on their number for all of this user's, who may have others."""
    limits = order["limits"]
    seconds = int(order["wall_s"]) + 2
    wanted = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": limits["address_bytes"],
        "RLIMIT_FSIZE": limits["disk_bytes"],
        "RLIMIT_NOFILE": 256,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NPROC": limits["processes"] + order["processes_before"],
    }
    for name, value in wanted.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            with contextlib.suppress(ValueError):  # macOS takes no limit on address space
                resource.setrlimit(kind, (value, value))


def _end(keeper: int, order: dict[str, Any]) -> int:
    """Kill the keeper with all that came of the program, until nothing is left; returns how the keeper had ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(keeper, signal.SIGKILL)
    status = os.waitpid(keeper, 0)[1]
    if order["way"] == BARE:
        if order["uid"] is not None:
            _kill_user(order["uid"])
        elif left := processes.sweep():
            raise OSError(f"processes {left} of the program could not be killed")
    return status


def _kill_user(uid: int) -> None:
    """Kill every process of a user whom only this program is; what forks faster than one counts dies, too."""
    deadline = time.monotonic() + 10
    while True:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(OSError):
                os.setresuid(uid, uid, uid)
                os.kill(-1, signal.SIGKILL)  # all that this user may signal, at one moment
            os._exit(0)
        os.waitpid(child, 0)
        processes.reap()
        if uid not in processes.owners():
            return
        if time.monotonic() > deadline:
            raise OSError(f"processes of user {uid} could not be killed")
        time.sleep(_TICK_S)

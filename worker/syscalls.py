"""Calls of the Linux kernel that Python 3.10 has no name for: namespaces, mounts, a filter of calls, Landlock."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

NEW_NAMESPACE_MOUNTS = 0x00020000  # linux/sched.h: CLONE_NEW*
NEW_NAMESPACE_HOST = 0x04000000
NEW_NAMESPACE_IPC = 0x08000000
NEW_NAMESPACE_USER = 0x10000000
NEW_NAMESPACE_PROCESSES = 0x20000000
NEW_NAMESPACE_NETWORK = 0x40000000

MOUNT_READ_ONLY = 1  # linux/mount.h: MS_*
MOUNT_NO_SETUID = 2
MOUNT_NO_DEVICES = 4
MOUNT_NO_PROGRAMS = 8
MOUNT_AGAIN = 32
MOUNT_BIND = 4096
MOUNT_RECURSIVE = 16384
MOUNT_PRIVATE = 1 << 18
_DETACH = 2  # MNT_DETACH

_SET_NO_NEW_PRIVILEGES = 38  # linux/prctl.h
_SET_SECCOMP = 22
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, AUDIT_ARCH_* of linux/audit.h
_NUMBERS = {  # asm/unistd_64.h of x86-64, asm-generic/unistd.h
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "socket": (41, 198),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
"""Calls that no program under test needs: the network, other processes, the kernel itself, what outlives a process."""
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_X32 = 0x40000000  # calls of x86-64 with 32-bit pointers, under other numbers

# linux/bpf_common.h and linux/seccomp.h
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_AT_NUMBER, _AT_MACHINE, _AT_FIRST_ARGUMENT = 0, 4, 16  # struct seccomp_data

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # linux/landlock.h
_RIGHT_EXECUTE, _RIGHT_READ_FILE, _RIGHT_READ_FOLDER = 1, 4, 8
_RIGHTS_TO_READ = _RIGHT_EXECUTE | _RIGHT_READ_FILE | _RIGHT_READ_FOLDER
_RIGHTS_OF_FILES = _RIGHT_EXECUTE | 2 | _RIGHT_READ_FILE | 1 << 14 | 1 << 15


def unshare(flags: int) -> None:
    """Have this process (or, for processes, its children) in namespaces of its own; OSError where that is refused."""
    _check(_libc().unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount; OSError where that is refused."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    _check(_libc().mount(*words, ctypes.c_ulong(flags), data and data.encode()), f"mount {target}")


def enter_root(folder: str) -> None:
    """Make a mounted folder the root of everything in this namespace, and forget the root that was."""
    os.chdir(folder)
    number = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    _check(_libc().syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    _check(_libc().umount2(b".", _DETACH), "umount")  # the old root lies on top of the new one
    os.chdir("/")


def renounce_privileges() -> None:
    """Let no program that is started from here gain rights by its file."""
    _check(_libc().prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")


def refuse_calls() -> bool:
    """Have the kernel refuse the calls above to this process and all it starts; False where it has no such filter.

    New user namespaces are refused, too: they are where most holes of the kernel were.
    """
    machine = _MACHINES.get(platform.machine()) if sys.platform == "linux" else None
    if machine is None:
        return False
    program = _filter(*machine)
    instructions = ctypes.create_string_buffer(program, len(program))
    packed = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    return bool(_libc().prctl(_SET_SECCOMP, 2, ctypes.create_string_buffer(packed, len(packed)), 0, 0) == 0)


def _filter(column: int, machine: int) -> bytes:
    """The filter as struct sock_filter: what it jumps to stands at the end."""
    refused = sorted(numbers[column] for numbers in _NUMBERS.values())
    tests: list[tuple[int, int, str | None, str | None]] = [  # code, value, where to when true, when false
        (_LOAD, _AT_MACHINE, None, None),
        (_JUMP_EQUAL, machine, None, "refuse"),
        (_LOAD, _AT_NUMBER, None, None),
        (_JUMP_AT_LEAST, _X32, "refuse", None),
        *((_JUMP_EQUAL, number, "refuse", None) for number in refused),
        (_JUMP_EQUAL, _CLONE3[column], "unknown", None),  # its flags lie where no filter sees: libc then takes clone
        (_JUMP_EQUAL, _CLONE[column], None, "allow"),
        (_LOAD, _AT_FIRST_ARGUMENT, None, None),
        (_JUMP_ANY_BIT, NEW_NAMESPACE_USER, "refuse", "allow"),
    ]
    ends = {"allow": _ALLOW, "refuse": _ERRNO | errno.EPERM, "unknown": _ERRNO | errno.ENOSYS}
    place = {name: len(tests) + index for index, name in enumerate(ends)}
    lines = [
        struct.pack("@HBBI", code, *(place[to] - at - 1 if to else 0 for to in targets), value)
        for at, (code, value, *targets) in enumerate(tests)
    ]
    return b"".join([*lines, *(struct.pack("@HBBI", _RETURN, 0, 0, value) for value in ends.values())])


def landlock_version() -> int:
    """Which version of Landlock the kernel has; 0 without."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc().syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def restrict_files(readable: Iterable[str], writable: Iterable[str]) -> bool:
    """Leave this process and all it starts nothing but these files and folders; False where the kernel cannot.

    Needs `renounce_privileges` first. From version 6 on, processes outside can be neither signalled nor spoken to.
    """
    version = landlock_version()
    if not version:
        return False
    rights = next(_RIGHTS_BY_VERSION[known] for known in sorted(_RIGHTS_BY_VERSION, reverse=True) if known <= version)
    fields = [rights, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]  # files, TCP, scopes
    asked = struct.pack(f"@{len(fields)}Q", *fields)
    ruleset = _landlock(_LANDLOCK_CREATE, asked, ctypes.c_size_t(len(asked)), ctypes.c_uint32(0))
    try:
        for path, wanted in [*((path, _RIGHTS_TO_READ) for path in readable), *((path, rights) for path in writable)]:
            _allow(ruleset, path, wanted & rights)
        _landlock(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return True


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # what is not there needs no leave
        return
    try:
        rights &= -1 if Path(path).is_dir() else _RIGHTS_OF_FILES
        rule = struct.pack("=Qi", rights, place)
        _landlock(_LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    finally:
        os.close(place)


def _landlock(number: int, *arguments: object) -> int:
    return _check(int(_libc().syscall(ctypes.c_long(number), *arguments)), "landlock")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result

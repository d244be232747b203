"""A stand-in for the driver's CUDA library: a shared object of a few instructions, made without a compiler."""

from __future__ import annotations

import os
import struct

_PAGE = 0x1000
_HEADER, _PROGRAM, _SYMBOL = 64, 56, 24
_MACHINES = {"x86_64": 62, "aarch64": 183}


def library(error: int, count: int, architecture: str | None = None) -> bytes:
    """The bytes of a `libcuda.so.1` whose `cuInit` returns `error`; without one there are `count` devices.

    It has `cuInit`, `cuDeviceGetCount` and `cuDriverGetVersion`, for this computer unless another is named.
    """
    machine = architecture or os.uname().machine
    if machine not in _MACHINES:
        return b""
    values = {"cuInit": None, "cuDeviceGetCount": count, "cuDriverGetVersion": 12080}
    return _object(machine, {name: _code(machine, error, value) for name, value in values.items()})


def _code(machine: str, result: int, stored: int | None) -> bytes:
    """A function that stores a number where its first argument points, if one is given, and returns `result`."""
    if machine == "x86_64":
        store = b"" if stored is None or result else b"\xc7\x07" + struct.pack("<I", stored)  # mov dword [rdi], stored
        return store + b"\xb8" + struct.pack("<I", result) + b"\xc3"  # mov eax, result; ret
    store = (
        b"" if stored is None or result else struct.pack("<II", 0x52800001 | stored << 5, 0xB9000001)
    )  # str w1, [x0]
    return store + struct.pack("<II", 0x52800000 | result << 5, 0xD65F03C0)  # mov w0, result; ret


def _object(machine: str, functions: dict[str, bytes]) -> bytes:
    """An ELF shared object: one segment to read and run, one to write with what the loader asks for."""
    names = b"\0libcuda.so.1\0" + b"".join(name.encode() + b"\0" for name in functions)
    symbols, code = bytes(_SYMBOL), b""
    at = _HEADER + 4 * _PROGRAM
    size = _SYMBOL * (len(functions) + 1)
    code_at = (at + size + len(names) + 4 * (4 + len(functions)) + 31) & ~15
    for name, text in functions.items():
        place = names.index(b"\0" + name.encode() + b"\0") + 1
        symbols += struct.pack("<IBBHQQ", place, 0x12, 0, 1, code_at + len(code), len(text))
        code += text + bytes(-len(text) % 16)
    # a hash table of one bucket: a chain through all symbols
    count = len(functions) + 1
    chain = struct.pack(f"<{3 + count + 1}I", 1, count, 1, 0, *range(2, count), 0, 0)[: 4 * (3 + count)]
    hash_at = (at + size + len(names) + 3) & ~3
    body = symbols + names
    body += bytes(hash_at - at - len(body)) + chain
    body += bytes(code_at - at - len(body)) + code
    entries = [(14, 1), (4, hash_at), (5, at + size), (6, at), (10, len(names)), (11, _SYMBOL), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    end = at + len(body)
    programs = [
        (1, 5, 0, 0, end, _PAGE),
        (1, 6, _PAGE, _PAGE, len(dynamic), _PAGE),
        (2, 6, _PAGE, _PAGE, len(dynamic), 8),
        (0x6474E551, 6, 0, 0, 0, 16),  # the stack is not to be run
    ]
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, _MACHINES[machine], 1, 0, _HEADER, 0, 0, _HEADER, _PROGRAM, 4, 64, 0, 0)
    table = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, place, place, length, length, align)
        for kind, flags, offset, place, length, align in programs
    )
    whole = header + table + body
    return whole + bytes(_PAGE - len(whole)) + dynamic

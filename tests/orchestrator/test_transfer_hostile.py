"""Files that pretend to be exported state: refused whole, whatever is wrong with them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator import config, machines, transfer
from orchestrator.errors import ConfigError
from tests.orchestrator.test_transfer import Switch, everything, exported, laptop, machine

__all__ = ["exported", "laptop"]  # fixtures


def packed(entries: list[tuple[tarfile.TarInfo, bytes]], contents: Any = None) -> bytes:
    """An archive with these entries and right digests, unless other contents are given."""
    if contents is None:
        digests = {member.name: hashlib.sha256(data).hexdigest() for member, data in entries}
        contents = {"format": 1, "files": digests}
    first = json.dumps(contents).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        head = tarfile.TarInfo("contents.json")
        head.size = len(first)
        tar.addfile(head, io.BytesIO(first))
        for member, data in entries:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def entry(name: str, data: bytes = b"{}", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    for fact, value in facts.items():
        setattr(member, fact, value)
    return member, data


RUN = b'{"path": "/x"}'
HOSTILE = {
    "parent": [entry("../evil.json", RUN)],
    "inner parent": [entry("runs/../../evil.json", RUN)],
    "absolute": [entry("/tmp/evil.json", RUN)],
    "dot": [entry("./runs/a.json", RUN)],
    "hidden": [entry("machines/.evil/key")],
    "local": [entry("machines/local/machine.json", b'{"name": "local", "key": null}')],
    "elsewhere": [entry("agents/x/worker/agent.py")],
    "ssh config": [entry("machines/box/ssh_config", b"Host *\n ProxyCommand evil\n")],
    "newline": [entry("runs/a.json\n", RUN)],
    "dash": [entry("machines/-oX/key")],
    "long name": [entry(f"runs/{'a' * 200}.json", RUN)],
    "symbolic link": [entry("runs/a.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "hard link": [entry("runs/a.json", b"", type=tarfile.LNKTYPE, linkname="contents.json")],
    "folder": [entry("runs/a.json", b"", type=tarfile.DIRTYPE)],
    "pipe": [entry("runs/a.json", b"", type=tarfile.FIFOTYPE)],
    "device": [entry("runs/a.json", b"", type=tarfile.CHRTYPE)],
    "sparse": [entry("runs/a.json", RUN, type=tarfile.GNUTYPE_SPARSE)],
    "contiguous": [entry("runs/a.json", RUN, type=tarfile.CONTTYPE)],
    "twice": [entry("runs/a.json", RUN), entry("runs/a.json", RUN)],
    "too large": [entry("runs/a.json", RUN + b" " * (1 << 20))],
    "no path": [entry("runs/a.json", b'{"path": 1}')],
    "no json": [entry("runs/a.json", b"\xff")],
    "deep json": [entry("runs/a.json", b"[" * 100_000)],
    "key alone": [entry("machines/box/key", b"k")],
    "another's record": [entry("machines/box/machine.json", b'{"name": "other", "key": null}')],
    "key of no type": [entry("machines/box/machine.json", b'{"name": "box", "key": 7}')],
}


def wants_nothing(data: bytes, folder: Path) -> str:
    """Import of these bytes is refused, and leaves nothing in the folder the state lies in; returns the words."""
    path = folder / "given"
    path.write_bytes(data)
    before = everything(folder)
    with pytest.raises(ConfigError) as caught:
        transfer.import_state(path)
    after = everything(folder)
    after.pop("state/machines", None)  # the folder of the lock
    before.pop("state/machines", None)
    assert after == before
    return caught.value.message


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_whole(tmp_path: Path, case: str) -> None:
    """A name, a type, a size or a content that does not belong there refuses the whole file, good entries too."""
    config.state_folder()
    words = wants_nothing(packed([entry("runs/good.json", RUN), *HOSTILE[case]]), tmp_path)
    assert "Nothing was changed" in words


def test_the_hostile_archives_are_refused_for_their_fault_alone(tmp_path: Path) -> None:
    """The same archive without the fault is taken in: the cases above test what they say."""
    path = tmp_path / "good"
    path.write_bytes(packed([entry("runs/good.json", RUN), entry("runs/a.json", RUN)]))
    assert transfer.import_state(path).runs == ["a", "good"]


@pytest.mark.parametrize(
    "contents",
    [
        [],
        {"format": 1},
        {"format": 1, "files": {}},
        {"format": 1, "files": {"runs/a.json": ""}},
        {"format": 2, "files": {"runs/a.json": hashlib.sha256(RUN).hexdigest()}},
    ],
)
def test_contents_that_do_not_match_are_refused(tmp_path: Path, contents: Any) -> None:
    """An archive whose list of files is of another version, incomplete or wrong is refused."""
    config.state_folder()
    wants_nothing(packed([entry("runs/a.json", RUN)], contents), tmp_path)


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    """A small file that unpacks to very much is refused before it fills the memory."""
    config.state_folder()
    assert "too large" in wants_nothing(gzip.compress(bytes(65 << 20), 1), tmp_path)


def test_a_record_that_leads_nowhere_is_taken_back(tmp_path: Path, laptop: Switch) -> None:
    """A machine whose address ssh cannot be given is refused after the fact, and nothing stays."""
    laptop("state")
    machine("box")
    record = asdict(machines.load("box")) | {"host": "-oProxyCommand=evil"}
    laptop("state").rename(tmp_path / "away")
    laptop("state")
    data = packed([entry("machines/box/machine.json", json.dumps(record).encode())])
    assert "host" in wants_nothing(data, tmp_path)


def unpacked(data: bytes) -> transfer.Files | None:
    """The files of an archive, None when it is refused in words."""
    try:
        return transfer._unpacked(data)
    except ConfigError:
        return None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(exported: Path, data: st.DataObject) -> None:
    """Whatever bytes of the unpacked archive are changed or lacking, the answer is words, never a crash."""
    plain = bytearray(gzip.decompress(exported.read_bytes()))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 600), st.integers(0, len(plain) - 1)))
        some = data.draw(
            st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([b"\xff" * 12, b"x", b"g", b"L"]))
        )
        plain[at : at + len(some)] = some
    del plain[data.draw(st.integers(0, len(plain))) if data.draw(st.booleans()) else len(plain) :]
    files = unpacked(gzip.compress(bytes(plain), 1)) or {}
    assert all(transfer._NAME.fullmatch(name) for name in files)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.floats(0, 0.999), flip=st.integers(0, 7))
def test_a_copy_that_was_cut_or_hurt_is_refused(exported: Path, cut: float, flip: int) -> None:
    """A file that was copied in part, or with a wrong bit, is refused, or gives what it should all the same."""
    whole = exported.read_bytes()
    at = int(len(whole) * cut)
    with pytest.raises(ConfigError):
        transfer._unpacked(whole[:at])
    if at >= 10:  # the head of gzip holds a time and other news
        hurt = bytearray(whole)
        hurt[at] ^= 1 << flip
        assert unpacked(bytes(hurt)) in (None, unpacked(whole))  # some bits of a deflated file make no difference


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_said(tmp_path: Path, kind: str) -> None:
    """A missing file, a folder and a pipe are errors in words, at once."""
    path = tmp_path / "given"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ConfigError):
        transfer.import_state(path)

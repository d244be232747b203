"""What a rented machine does at its first boot: valid cloud-init, our host key, and a guard that runs from it alone."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import first_boot
from orchestrator.errors import ConfigError
from orchestrator.providers.base import GuardOrder, HostKey
from tests.waiting import until
from tests.worker import cloud as clouds
from tests.worker.cloud import KEY, MARKER, Cloud
from tests.worker.guarding import Guarded, add_row

ORDER = GuardOrder(MARKER, "https://cloud.example/api/v1", KEY, 1.0, deadline=5.0, idle_s=1800.0)
OLD_PYTHON = Path.home() / ".pyenv/versions/3.10.13/bin/python3.10"
"""A Python as a rented machine has it, where a developer has one."""
SYSTEM_PYTHON = Path("/usr/bin/python3")


@pytest.fixture(scope="module")
def host_key(tmp_path_factory: pytest.TempPathFactory) -> HostKey:
    path = tmp_path_factory.mktemp("key") / "host"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "a comment", "-f", path], check=True)
    return HostKey(path.read_text("ascii"), path.with_suffix(".pub").read_text("ascii"))


def parsed(text: str) -> dict[str, Any]:
    """The document, as cloud-init reads it."""
    assert text.startswith("#cloud-config\n")
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def files(document: dict[str, Any]) -> dict[str, tuple[str, bytes]]:
    """Mode and content of each file that is written."""
    assert all((each["owner"], each["encoding"]) == ("root:root", "b64") for each in document["write_files"])
    found = {each["path"]: each for each in document["write_files"]}
    return {path: (each["permissions"], base64.b64decode(each["content"])) for path, each in found.items()}


def test_without_a_guard_only_the_host_key_travels(host_key: HostKey) -> None:
    """A machine without a guard gets its host key, unchanged, and nothing else; the image's own keys are dropped."""
    document = parsed(first_boot.user_data(host_key, None))
    assert document.keys() == {"ssh_keys", "ssh_deletekeys"}
    assert document["ssh_deletekeys"] is True
    assert document["ssh_keys"]["ed25519_private"] == host_key.private
    assert document["ssh_keys"]["ed25519_public"] == " ".join(host_key.public.split()[:2])


def test_the_guard_is_armed_with_its_settings_for_root_alone(host_key: HostKey) -> None:
    """The key stands in one file of mode 0600, in no command; whatever is in the settings, they arrive as they are."""
    odd = replace(ORDER, user='u"\n- [x]: &a \u2028 \x7f 😀')
    text = first_boot.user_data(host_key, odd)
    document = parsed(text)
    written = files(document)
    mode, data = written[first_boot.SETTINGS_PATH]
    assert mode == "0600"
    assert json.loads(data) == {**vars(odd)}
    assert [path for path, (mode, _) in written.items() if mode != "0644"] == [first_boot.SETTINGS_PATH]
    assert KEY not in json.dumps(document["runcmd"])
    assert all(isinstance(word, str) for words in document["runcmd"] for word in words)
    assert not [
        data for path, (_, data) in written.items() if path != first_boot.SETTINGS_PATH and KEY.encode() in data
    ]
    assert len(text) < 300_000, "far below a megabyte"


def test_the_same_code_is_the_same_program() -> None:
    """The program's bytes do not depend on when or where it was packed."""
    assert first_boot.program() == first_boot.program()


def test_keys_are_not_shown() -> None:
    """Neither the account key nor the private host key stands in what printing shows."""
    shown = repr(ORDER) + repr(HostKey("-----SECRET", "ssh-ed25519 AAAA"))
    assert KEY not in shown
    assert "SECRET" not in shown


@pytest.mark.parametrize(
    ("private", "public"),
    [("", None), ("-----BEGIN RSA PRIVATE KEY-----\nAAAA\n", None), (None, "ssh-rsa AAAA"), (None, "x\nssh-ed25519 A")],
)
def test_only_an_ed25519_pair_is_sent(host_key: HostKey, private: str | None, public: str | None) -> None:
    """What is no such key pair is refused before anything is rented, and not shown."""
    wrong = HostKey(host_key.private if private is None else private, host_key.public if public is None else public)
    with pytest.raises(ConfigError) as raised:
        first_boot.user_data(wrong, None)
    assert "PRIVATE" not in str(raised.value)


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with clouds.serving() as cloud:
        cloud.add("other", "gpu-20261121t120000-ffffffffffff")
        cloud.add("own", MARKER)
        yield cloud


@pytest.mark.parametrize("python", [sys.executable, str(OLD_PYTHON)], ids=["here", "3.10"])
def test_the_guard_runs_from_what_was_sent(tmp_path: Path, host_key: HostKey, cloud: Cloud, python: str) -> None:
    """The program alone, in isolated mode, looks, keeps the machine for its rows, and ends it at the deadline."""
    if not Path(python).exists():
        pytest.skip("no Python 3.10 here")
    box = Guarded(tmp_path, cloud)
    order = replace(ORDER, user="", api_url=cloud.url, written_at=time.time(), idle_s=0.3, deadline=time.time() + 4)
    written = files(parsed(first_boot.user_data(host_key, order)))
    box.entry = tmp_path / "guard.pyz"
    box.entry.write_bytes(written[first_boot.PROGRAM_PATH][1])
    sent = json.loads(written[first_boot.SETTINGS_PATH][1])
    add_row(box.run(), 1)
    words = [python, "-I", str(box.entry), "watch", str(box.settings)]
    box.write(**sent, root=str(box.root))
    box.guards.append(subprocess.Popen(words, cwd="/", env={"PATH": os.environ["PATH"]}, start_new_session=True))
    try:
        seen = box.seen(lambda view: (view.get("idle_s") or 0) > 1)
        assert seen["unpulled"]
        assert cloud.ended() == []
        until(lambda: cloud.ended() == ["own"])
        assert box.view()["ended_by"] == "deadline"
    finally:
        box.disarm()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="needs a Python that every user may run")
def test_the_guard_gives_up_being_root(cloud: Cloud) -> None:
    """Started by root for a user, it reads its settings, becomes that user, and all it writes is the user's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        box = Guarded(folder, cloud)
        box.entry = folder / "guard.pyz"
        box.entry.write_bytes(first_boot.program())
        box.root.mkdir()
        os.chown(box.root, 65534, 65534)
        box.write(user="nobody", deadline=time.time() + 3600, idle_s=3600.0)
        words = [str(SYSTEM_PYTHON), "-I", str(box.entry), "watch", str(box.settings)]
        guard = subprocess.Popen(words, cwd="/")
        box.guards.append(guard)
        try:
            box.seen(lambda view: view["token"] and view["instance_id"])
            assert (box.root / "guard" / "status.json").stat().st_uid == 65534
            assert "Uid:\t65534\t65534\t65534\t65534" in Path(f"/proc/{guard.pid}/status").read_text("utf-8")
        finally:
            box.disarm()

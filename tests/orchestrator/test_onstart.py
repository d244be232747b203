"""What a container does at its start: a text that is short, holds no secret, and does in a real shell what it says."""

from __future__ import annotations

import ast
import base64
import json
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import agents, onstart
from orchestrator.errors import ConfigError
from orchestrator.providers.base import GuardOrder
from tests.waiting import until
from tests.worker.container import HOST_KEY, MARKER, Container, contained, words
from tests.worker.container_cloud import KEY, ContainerCloud

ACCOUNT_KEY = "account_key_canary_51c0ffee"
ORDER = GuardOrder(MARKER, "https://cloud.example/api/v0", ACCOUNT_KEY, 1.0, "root", deadline=5.0, idle_s=1800.0)
OLDEST = Path.home() / ".pyenv/versions/3.8.18/bin/python3.8"
"""The oldest Python that the watchdog is to run on, where a developer has one."""


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Container]:
    with contained(tmp_path) as box:
        yield box


@pytest.fixture
def cloud(box: Container) -> ContainerCloud:
    return box.cloud


def unpacked(text: str) -> tuple[dict[str, object], str]:
    """The settings and the program in a text, as the container's Python finds them."""
    packed = max(re.findall(r"[A-Za-z0-9+/=]{100,}", text), key=len)
    told, _, program = zlib.decompress(base64.b64decode(packed)).partition(b"#")
    return json.loads(told), program.decode()


def test_the_longest_settings_fit() -> None:
    """With numbers as long as they get and an address of a hundred signs, the text is below the limit; plain ASCII."""
    number = 1_795_348_620.123456789
    host = "https://" + "a-host-with-a-name-of-its-own." * 3 + "example:65535"
    order = GuardOrder(MARKER, host, "", number, "root", number + 0.1, number + 0.2, 86_399.999, 3_599.999)
    text = onstart.onstart(order)
    assert len(text) < 3_990
    assert text.isascii()
    assert re.fullmatch(r"[ -~\n]+", text), "nothing that a document in JSON or a shell would change"
    assert "\r" not in text


def test_a_text_that_is_too_long_is_refused() -> None:
    """What cannot be sent is an error before anything is rented, and says so."""
    noise = random.Random(7).randbytes(400).hex()
    with pytest.raises(ConfigError, match="characters"):
        onstart.onstart(replace(ORDER, api_url=f"https://{noise}.example"))


@pytest.mark.parametrize(
    "address", ["http://cloud.example", "ftp://cloud.example", "cloud.example", "", "https://user:word@cloud.example"]
)
def test_only_a_safe_address_is_asked(address: str) -> None:
    """The container's key travels over TLS alone, to a host that is one."""
    with pytest.raises(ConfigError, match="https://"):
        onstart.onstart(replace(ORDER, api_url=address))


@pytest.mark.parametrize("path", ["", "/", "/api/v0", "/api/v0/"])
def test_the_api_is_asked_wherever_it_is(path: str) -> None:
    """An address with and without the API's version leads to the same place."""
    told = onstart.settings(replace(ORDER, api_url=f"https://cloud.example:8443/vast{path}"))
    assert (told["tls"], told["host"], told["path"]) == (True, "cloud.example:8443", "/vast/api/v0/instances/")


def test_no_secret_is_in_the_text() -> None:
    """Neither the account's key nor the marker is in it, packed or not; only what the watchdog must know."""
    text = onstart.onstart(replace(ORDER, deadline=9.0, deadline_max=7.0))
    told, program = unpacked(text)
    for secret in (ACCOUNT_KEY, MARKER):
        assert secret not in text + program + json.dumps(told)
    assert told == {
        "tls": True,
        "host": "cloud.example",
        "path": "/api/v0/instances/",
        "epoch": 1.0,
        "deadline": 7.0,
        "deadline_max": 7.0,
        "idle_limit_s": 1800.0,
        "grace_s": 60.0,
    }


def test_without_limits_nothing_is_said_of_them() -> None:
    """A machine with neither deadline nor idle limit is told of none."""
    told = onstart.settings(replace(ORDER, deadline=None, idle_s=None))
    assert set(told) == {"tls", "host", "path", "epoch", "grace_s"}


def test_what_is_sent_is_the_watchdog(box: Container) -> None:
    """The program in the text is the squeezed source, the same for the same code, and written for Python 3.8."""
    told, program = unpacked(box.text(deadline=5.0, host="a#b"))
    assert told == {**box.settings}
    assert program == onstart.program() == onstart.program()
    source = agents.sources()["worker/watchdog.py"].decode()
    for text in (source, program):
        tree = ast.parse(text, feature_version=(3, 8))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert names <= sys.stdlib_module_names | {"email.utils", "http.client"}
        assert not [
            node for node in ast.walk(tree) if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr)
        ]


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_a_start_arms_the_watchdog_and_says_the_host_key(box: Container, cloud: ContainerCloud, shell: str) -> None:
    """Run by either shell, it turns tmux off, prints the host key, and leaves a watchdog that no one waits for."""
    began = time.monotonic()
    box.start(shell, deadline=time.time() + 3600)
    assert time.monotonic() - began < 10
    assert (box.home / ".no_auto_tmux").exists()
    until(lambda: box.log() == f"{onstart.HOST_KEY_PREFIX}{HOST_KEY}\n")
    seen = box.seen(lambda view: view.get("answered_at"))
    assert (seen["phase"], seen["last_error"]) == ("armed", None)
    assert (box.root / "guard").stat().st_mode & 0o077 == 0
    assert cloud.keys == {f"Bearer {KEY}"}


def test_a_host_key_that_is_made_later_is_said_then(box: Container) -> None:
    """The watchdog is armed while sshd has no key yet; the line comes once it has."""
    box.host_key.unlink()
    box.start(deadline=time.time() + 3600)
    box.watchdog()
    assert box.log() == ""
    box.host_key.write_text(f"{HOST_KEY}\n", encoding="ascii")
    until(lambda: box.log() == f"{onstart.HOST_KEY_PREFIX}{HOST_KEY}\n")


def test_keys_that_sshd_would_pass_over_are_put_right(box: Container) -> None:
    """Folder and keys of another owner, or that others may write, are made root's alone, however late they come."""
    box.start(deadline=time.time() + 3600)
    until(lambda: box.log() != "")
    keys = box.home / ".ssh" / "authorized_keys"
    keys.parent.mkdir()
    keys.write_text("")
    for path in (box.home, keys.parent, keys):
        path.chmod(0o777)
    if os.getuid() == 0:
        os.chown(keys.parent, 1234, 1234)
        os.chown(keys, 1234, 1234)
    until(lambda: not any(path.stat().st_mode & 0o022 for path in (box.home, keys.parent, keys)))
    until(lambda: {keys.stat().st_uid, keys.parent.stat().st_uid} == {os.getuid()})
    assert box.log().count(onstart.HOST_KEY_PREFIX) == 1


@pytest.fixture
def bare(box: Container, tmp_path: Path) -> Container:
    """A container that has a shell and a Python that is too old, and nothing else on its PATH or in usual places."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sleep", "seq", "touch", "setsid", "sh"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    (programs / "python3").write_text("#!/bin/sh\necho 'I am too old'\nexit 1\n")
    (programs / "python3").chmod(0o755)
    box.path = [str(programs)]
    box.places |= {place: str(programs) for place in ("/usr/local/bin", "/usr/bin", "/opt/conda/bin", "/venv/main/bin")}
    return box


def test_a_container_without_a_python_says_so(bare: Container) -> None:
    """Where no Python is found, or none that is new enough, the log says that nobody guards; no more is printed."""
    bare.start()
    until(lambda: bare.log().count("\n") == 2)
    assert sorted(bare.log().splitlines()) == [
        f"{onstart.TROUBLE_PREFIX}no Python 3.8 here",
        f"{onstart.HOST_KEY_PREFIX}{HOST_KEY}",
    ]
    assert not bare.armed()


def test_a_python_in_the_usual_places_is_found(bare: Container, tmp_path: Path, cloud: ContainerCloud) -> None:
    """A Python off the PATH is found, also one that has only its whole name; one too old is passed over."""
    (tmp_path / "conda").mkdir()
    (tmp_path / "conda" / "python3.11").symlink_to(sys.executable)
    bare.places["/opt/conda/bin"] = str(tmp_path / "conda")
    bare.start(deadline=1.0)
    until(cloud.ended)


def test_a_python_that_runs_the_agent_is_preferred(bare: Container, tmp_path: Path) -> None:
    """One that can only run the watchdog is passed over while there is another that looks and stops as well."""
    old, new = tmp_path / "programs" / "python3", tmp_path / "conda" / "python3"
    old.write_text(f'#!/bin/sh\ncase "$2" in *"(3,10)"*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    bare.start(deadline=time.time() + 3600)
    bare.watchdog()
    assert any(str(old).encode() in words(pid) for pid in bare.armed())
    bare.power_off()
    new.parent.mkdir()
    new.symlink_to(sys.executable)
    bare.places["/opt/conda/bin"] = str(new.parent)
    before = bare.view()["pid"]
    bare.start(deadline=time.time() + 3600)
    bare.seen(lambda view: view["pid"] != before)
    assert all(str(new).encode() in words(pid) for pid in bare.armed())


@pytest.mark.skipif(not OLDEST.exists(), reason="no Python 3.8 here")
@pytest.mark.parametrize("squeezed", [True, False], ids=["squeezed", "source"])
def test_it_runs_on_the_oldest_python(box: Container, cloud: ContainerCloud, squeezed: bool) -> None:
    """On Python 3.8 it stops an idle machine with runs, is told another deadline, and ends it then."""
    (box.root / "runs" / "a-run").mkdir(parents=True)
    told = {"idle_limit_s": 0.3, "deadline": time.time() + 3600}
    box.start_source(str(OLDEST), onstart.program() if squeezed else None, **told)
    until(cloud.stopped)
    (box.root / "guard" / "deadline.json").write_text('{"deadline": 5}')
    until(cloud.ended)
    assert box.log() == ""

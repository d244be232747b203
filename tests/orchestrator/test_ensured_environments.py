"""What the laptop makes of environments on a machine: joined, waited for, and told apart when they cannot be."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import agents, config, environments, transport
from orchestrator.environments import Model
from orchestrator.errors import BadAnswer, ConfigError, NotReachable
from orchestrator.transport import LocalMachine
from tests.waiting import until
from tests.worker import building
from tests.worker.building import TINY, VERSION, builder, made_once, place, quick_python

Make = Callable[..., tuple[LocalMachine, str]]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes this computer a machine whose agent has a lock of its own; it is known there that uv cannot be had."""

    def make(lock: str = TINY) -> tuple[LocalMachine, str]:
        root = tmp_path / "machine"
        (root / "environments").mkdir(parents=True)
        memory = root / "environments" / "no-uv.json"
        memory.write_text(json.dumps({"at": time.time()}), encoding="utf-8")
        files = {name: data for name, data in agents.sources().items() if not name.startswith("worker/locks/")}
        files[f"worker/locks/train-{VERSION}.txt"] = lock.encode()
        name = agents.digest(files)
        agents.write(files, root / "agent" / name)
        monkeypatch.setenv("PATH", quick_python(tmp_path / "bin"))
        return LocalMachine(root), name

    return make


def saying(tmp_path: Path, script: str) -> LocalMachine:
    """A machine whose Python is a shell script, whatever it is asked."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    python.chmod(0o755)
    return LocalMachine(tmp_path, str(python))


# --- ensure ----------------------------------------------------------------------------------------------------------


def test_an_environment_is_made_and_found_again(machine: Make) -> None:
    """The first ask tells how it is made, the second finds it; a connection that breaks off leaves it being made."""
    there, agent = machine()
    heard: list[str] = []

    class Cut(Exception):
        """The connection breaks."""

    def hear(text: str) -> None:
        heard.append(text)
        if text.startswith("making"):
            raise Cut

    with pytest.raises(Cut):
        environments.ensure(there, agent, "train", hear)
    at_work = until(lambda: building.at_work(there.root))
    python = environments.ensure(there, agent, "train", heard.append)
    assert made_once(place(there.root)) == at_work
    assert any("Successfully installed idna" in line for line in heard)
    heard.clear()
    assert environments.ensure(there, agent, "train", heard.append) == python
    assert heard == []
    assert environments.check(there, agent, python, ["idna"])["versions"] == {"idna": "3.10"}


def test_what_cannot_be_made_is_an_error_of_the_machine(machine: Make) -> None:
    """A failed installation is a ConfigError that names the machine, and says what to do and that nothing started."""
    there, agent = machine(TINY.replace("0.05", "9000000"))
    with pytest.raises(ConfigError) as caught:
        environments.ensure(there, agent, "train", print)
    assert caught.value.message.startswith("local: ")
    assert "Nothing was started." in caught.value.message
    assert "Free some space there" in caught.value.hint
    assert "Type the same command again" in caught.value.hint
    until(lambda: builder(there.root) is None)


def test_the_last_lines_are_shown_harmless(tmp_path: Path) -> None:
    """What the installer said last stands in the error, without what could take over a terminal."""
    failed = {
        "message": "Installing PyTorch failed.\x1b[2J",
        "hint": "h",
        "retry": "r",
        "tail": ["one", "\x1b]0;x\x07two"],
    }
    there = saying(tmp_path, f"cat <<'END'\n{json.dumps({'failed': failed})}\nEND")
    with pytest.raises(ConfigError) as caught:
        environments.ensure(there, "a", "train", print)
    assert caught.value.message.endswith("The last lines of the installation:\n  one\n  two")
    assert "\x1b" not in caught.value.message
    assert caught.value.hint == "h r"


def test_a_machine_that_falls_silent_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without news or a beat for some time, the machine counts as not reachable; beats keep it so far waited for."""
    monkeypatch.setattr(transport, "SILENCE_S", 0.5)
    there = saying(tmp_path, "for i in 1 2 3 4; do echo '{\"beat\":true}'; sleep 0.2; done; exec sleep 60")
    began = time.monotonic()
    with pytest.raises(NotReachable):
        environments.ensure(there, "a", "train", print)
    assert 1.0 < time.monotonic() - began < 10.0


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("", NotReachable),
        ('{"progress": "x"}', NotReachable),
        ("no frame", BadAnswer),
        ('{"ready": true}', BadAnswer),
        ('{"ready": true, "python": 7}', BadAnswer),
        ('{"ready": true, "python": "relative/python"}', BadAnswer),
        ('{"failed": 7}', ConfigError),
        ('{"failed": {"message": 7, "tail": 7}}', ConfigError),
    ],
)
def test_whatever_a_machine_says_is_data(tmp_path: Path, said: str, error: type[Exception]) -> None:
    """An answer that is none, half of one or of other types is an error with words, never a crash."""
    there = saying(tmp_path, f"cat <<'END'\n{said}\nEND")
    with pytest.raises(error):
        environments.ensure(there, "a", "train", lambda _text: None)


# --- check and fetch -------------------------------------------------------------------------------------------------


def test_a_python_of_the_user_is_refused_in_words(machine: Make) -> None:
    """A Python that lacks a module is a ConfigError that names both and what to do."""
    there, agent = machine()
    with pytest.raises(ConfigError, match="cannot import nothing_of_the_kind") as caught:
        environments.check(there, agent, sys.executable, ["json", "nothing_of_the_kind"])
    assert "Leave out --python" in caught.value.hint


def test_a_fetch_never_stops_a_run(machine: Make, tmp_path: Path) -> None:
    """A model that cannot be fetched ahead, and a machine that does not answer, are words, not errors."""
    there, agent = machine()
    secret = "hf_" + "x" * 30
    variables = {"HF_TOKEN": secret, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    model = Model("somebody/none", "train", python=sys.executable, env=variables)
    why = environments.fetch(there, agent, model, print)
    assert why.startswith("somebody/none could not be fetched ahead")
    assert secret not in f"{why}{model!r}"
    assert environments.fetch(saying(tmp_path, "exit 3"), agent, model, print) != ""


def test_the_token_goes_by_standard_input(tmp_path: Path) -> None:
    """Neither the words of the command nor the variables of the process that is asked hold the token."""
    there = saying(
        tmp_path, f'echo "$@" >{tmp_path}/words; env >{tmp_path}/env; head -n 1 >{tmp_path}/input; echo "{{}}"'
    )
    model = Model("a/b", "train", python="/p", env={"HF_TOKEN": "hf_secret"})
    environments.fetch(there, "agent", model, print)
    assert "hf_secret" not in (tmp_path / "words").read_text(encoding="utf-8")
    assert "hf_secret" not in (tmp_path / "env").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "input").read_text(encoding="utf-8"))["env"] == {"HF_TOKEN": "hf_secret"}
    assert os.environ.get("HF_TOKEN") is None
    assert not (config.state_folder() / "hf_secret").exists()

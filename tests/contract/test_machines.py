"""Every machine, over SSH or this computer, keeps the same promises to whoever speaks to it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator import agents, bulk, clock, config, machines
from orchestrator.errors import BadAnswer, NotReachable
from orchestrator.transport import Machine
from tests.rig import Sshd

WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
HOSTILE = [
    "a b",
    "'",
    '"',
    "$(touch pwned)",
    "`touch pwned`",
    "a\nb",
    ";ls",
    "-n",
    "--help",
    "ü€😀",
    "*",
    "~",
    "",
    "\\",
]
SAY = "import json,sys; sys.stdout.write(json.dumps(sys.argv[1:]))"


@pytest.fixture(params=["local", "ssh", "noisy"])
def machine(request: pytest.FixtureRequest, box: Callable[..., Sshd]) -> Iterator[Machine]:
    """This computer, a machine over SSH, and one whose login files print."""
    if request.param == "local":
        yield machines.this_computer()
        return
    there = box("box")
    if request.param == "noisy":
        there.write_bashrc("echo Welcome; printf 'no newline'; echo oops >&2\n")
    with machines.at("box") as found:
        yield found


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.one_of(
            st.sampled_from(HOSTILE),
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
        ),
        max_size=5,
    )
)
def test_words_arrive_as_they_are(machine: Machine, words: list[str]) -> None:
    """A command there gets exactly the words that were given here, whatever is in them."""
    said = machine.call([machine.python, "-X", "utf8", "-c", SAY, *words], b"")
    assert json.loads(said) == words


def test_bytes_go_both_ways_unchanged(machine: Machine) -> None:
    """What is sent to a command comes back through it byte for byte, also when it is much."""
    data = os.urandom(3_000_000) + b"\r\n\0\xff"
    assert machine.call(["cat"], data) == data


def test_pieces_are_sent_in_order_from_the_beginning(machine: Machine) -> None:
    """Data that is read piece by piece arrives whole."""
    assert machine.call(["cat"], lambda: iter([b"one,", b"two,", b"three"])) == b"one,two,three"


def test_a_command_that_fails_is_said_with_its_last_words(machine: Machine) -> None:
    """An exit code other than 0 is an error that names it and what the command complained of last."""
    with pytest.raises(BadAnswer, match=r"exit code 7.*it went wrong"):
        machine.call(["sh", "-c", "echo first >&2; echo it went wrong >&2; exit 7"], b"")


def test_a_command_that_says_nothing_is_given_up_at_its_deadline(machine: Machine) -> None:
    """A call returns by its deadline, whatever the command does."""
    began = clock.monotonic()
    with pytest.raises(NotReachable):
        machine.call(["sleep", "60"], b"", 0.5)
    assert clock.monotonic() - began < 5


def test_a_stream_is_read_as_it_comes(machine: Machine) -> None:
    """What a running command says can be read before it ends."""
    with machine.open(["sh", "-c", "echo one; read line; echo $line"], b"") as stream:
        assert stream.read(100, clock.monotonic() + 10) == b"one\n"


def test_a_running_command_sees_the_end_of_its_input_when_left(machine: Machine, tmp_path: Path) -> None:
    """A command whose stream is left is not left behind: its input ends."""
    gone = tmp_path / "gone"
    with machine.open(["sh", "-c", 'echo up; cat >/dev/null; echo gone > "$1"', "sh", str(gone)], b"") as stream:
        assert stream.read(3, clock.monotonic() + 10) == b"up\n"
        alive = not gone.exists()
    assert alive
    if machine.name != "local":  # there the whole group is killed, which is an end as well
        deadline = clock.monotonic() + 10
        while not gone.exists():
            assert clock.monotonic() < deadline


def test_output_errors_and_exit_code_of_a_stream_are_told_apart(machine: Machine) -> None:
    """A stream gives output, complaints and exit code each by itself."""
    with machine.open(["sh", "-c", "echo out; echo err >&2; exit 3"], b"") as stream:
        out = b"".join(iter(lambda: stream.read(100, math.inf), b""))
        code = stream.code(math.inf)
        err = b"".join(iter(lambda: stream.read_error(100), b""))
    assert (out, code) == (b"out\n", 3)
    assert err.endswith(b"err\n")


def test_threads_may_call_at_the_same_time(machine: Machine) -> None:
    """Calls from several threads do not mix."""
    answers: dict[int, bytes] = {}

    def call(number: int) -> None:
        answers[number] = machine.call(["cat"], str(number).encode() * 100_000)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number).encode() * 100_000 for number in range(4)}


def test_the_worker_code_arrives_once_and_is_mended_when_damaged(machine: Machine) -> None:
    """A snapshot of the code is put there whole, stays when it is asked for again, and is made anew when damaged."""
    store = config.state_folder() / "agents"
    name = agents.keep(store)
    machine.push_agent(store, name)
    entry = machine.root / "agent" / name / "worker" / "__main__.py"
    first = entry.stat().st_ino
    machine.push_agent(store, name)
    assert entry.stat().st_ino == first
    entry.write_text("damaged")
    machine.push_agent(store, name)
    assert entry.read_bytes() == agents.kept(store, name)["worker/__main__.py"]


@pytest.mark.parametrize("tool", ["rsync", "none"])
def test_large_files_arrive_and_a_part_is_carried_on_with(
    machine: Machine, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files arrive byte for byte, with rsync and without, also when a part of one is there already."""
    if tool == "none":
        monkeypatch.setattr(bulk, "can_rsync", lambda _: False)
    files = {f"{index}" * 8: os.urandom(5_000_000 + index) for index in range(2)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    incoming = machine.root / "store" / "incoming"
    incoming.mkdir(parents=True)
    (incoming / ("0" * 8)).write_bytes(files["0" * 8][:2_000_000])
    seen: list[int] = []
    machine.push_files([(tmp_path / name, name) for name in files], seen.append)
    for name, data in files.items():
        assert hashlib.sha256((incoming / name).read_bytes()).digest() == hashlib.sha256(data).digest()
    assert seen == sorted(seen)

"""What comes from a machine is data: garbage, lies, other names and control codes change nothing that is home."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, locks, rows, rundir
from orchestrator import advance, follow, journey, machines, runs, transport
from orchestrator.errors import ConfigError, NotReachable
from orchestrator.home import Arrivals
from orchestrator.runs import Run
from tests.changed_code import code_with
from tests.waiting import until

Folder = Callable[[Run], rundir.Run]
Make = Callable[..., Run]
GPU = [sys.executable, "-m", "orchestrator.cli"]
ROWS = "attempts/0001/rows.jsonl"
EXIT = "attempts/0001/exit.json"
LINE = rows.encode({"key": "t/s/0#0", "error": None})
PULLS = '    if verb == "pull":\n'
SEAL = {
    "attempt": 1,
    "code": 0,
    "signal": None,
    "reason": "done",
    "kind": "",
    "message": "",
    "hint": "",
    "restarting": False,
    "files": {},
    "ended_at": "2026-01-01T00:00:00.000Z",
}


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=120)


def go(run: Run) -> None:
    journey.go(run, lambda _frame, _data: None, lambda _: None)


def piece(data: bytes, **more: Any) -> dict[str, Any]:
    """The header of a frame that carries `data`, as an honest machine sends it."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **more}


@pytest.fixture
def arrivals(counting_run: Make) -> Iterator[Arrivals]:
    """The folder at home of a run, open for what comes, with one row of an attempt in it."""
    opened = Arrivals.open(counting_run().home, "local")
    assert opened is not None
    with opened:
        opened.take(piece(LINE, file=ROWS, offset=0), LINE)
        yield opened


def here(arrivals: Arrivals) -> dict[str, bytes]:
    """Every file of the run at home but its lock."""
    folder = arrivals.home.folder
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def frames(said: bytes) -> list[dict[str, Any]]:
    """What is understood of the output of a command on this computer as a machine."""
    Path("said").write_bytes(said)
    with machines.this_computer().open(["cat", "said"], b"") as stream:
        return [frame for frame, _ in transport.frames(stream)]


@pytest.mark.parametrize(
    "said",
    [
        b"garbage\n",
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"bytes":"x"}\n',
        b'{"bytes":-1}\n',
        b'{"bytes":true}\n',
        b'{"bytes":1e3}\n',
        b'{"bytes":268435457}\n',
        b'{"whole":5}\n',
        b'{"file":["x"]}\n',
        b'{"diverged":null}\n',
        b'{"file":"x","offset":"0"}\n',
        b'{"end":true}\n',
        b'{"end":true,"state":7,"attempt":1}\n',
        b'{"end":true,"state":"ended","attempt":"1"}\n',
    ],
)
def test_a_line_that_is_no_frame_is_said_to_be_none(said: bytes) -> None:
    """A line that is not a frame with fields of the right types ends the pull, and the error shows how it began."""
    with pytest.raises(NotReachable, match="no frame"):
        frames(said)


def test_an_endless_line_is_not_kept() -> None:
    """A line that does not end is given up long before it fills the memory."""
    with pytest.raises(NotReachable, match="endless line"):
        frames(b"x" * (1 << 20))


@pytest.mark.parametrize("cut", [b'{"beat":tr', b'{"whole":"x","bytes":5}\n', b'{"whole":"x","bytes":5}\nfour'])
def test_a_frame_that_is_cut_is_not_given(cut: bytes) -> None:
    """Of a stream that ends inside a frame, what came before that frame is given and nothing of it."""
    assert frames(b'{"beat":true}\n' + cut) == [{"beat": True}]


def test_an_answer_that_is_none_is_said() -> None:
    """A command that answers with something else than JSON is an error that shows what it said."""
    with pytest.raises(NotReachable, match="Welcome"):
        transport.ask(machines.this_computer(), ["echo", "Welcome to the machine"])


@pytest.mark.parametrize(
    "said",
    [
        b"garbage\n",
        b'{"diverged":"attempts/0001/log.txt"}\n',
        b'{"end":true,"state":"ended","attempt":1,"seal":{"x":1}}\n',
        b'{"end":true,"state":"ended","attempt":1,"seal":"x"}\n',
        b"",
    ],
)
@pytest.mark.first(2)
def test_a_machine_that_talks_nonsense_is_not_reachable(
    counting_run: Make, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """Whatever a pull is answered with, the run is neither called done nor dead, and nothing is written at home."""
    monkeypatch.setattr(follow, "_BACK_OFF_S", (0.0,))
    run = counting_run(count=3)
    run.save(agent=code_with("worker/agent.py", PULLS, f"{PULLS}        out.write({said!r})\n        return 0\n"))
    with pytest.raises(NotReachable):
        go(run)
    assert run.record.state == "running"
    assert not run.home.rows.exists()


@pytest.mark.parametrize("verb", ["whole", "file", "diverged"])
@pytest.mark.parametrize("name", ["../job.json", "/etc/passwd", "attempts/0001/pids.json", "\x1b]0;owned\x07", "", "."])
def test_a_name_that_is_not_a_runs_is_refused_in_every_frame(arrivals: Arrivals, verb: str, name: str) -> None:
    """A file is taken, grown or set aside only under one of the names that a run's machine may send."""
    before = here(arrivals)
    with pytest.raises(NotReachable, match="not one of a run's"):
        arrivals.take(piece(b"x", **{verb: name, "offset": 0}), b"x")
    assert here(arrivals) == before


@pytest.mark.parametrize(
    "frame", [{"whole": ROWS}, {"file": EXIT, "offset": 0}, {"file": "resolved.json", "offset": 0}, {"diverged": EXIT}]
)
def test_whole_files_and_growing_ones_are_not_confused(arrivals: Arrivals, frame: dict[str, Any]) -> None:
    """Rows cannot be replaced as a whole, nor a seal be appended to or set aside: what is home stays."""
    seal = json.dumps(SEAL).encode()
    arrivals.take(piece(seal, whole=EXIT), seal)
    before = here(arrivals)
    with pytest.raises(NotReachable, match="not one of a run's"):
        arrivals.take(piece(b"x\n", **frame), b"x\n")
    assert here(arrivals) == before


@pytest.mark.parametrize(
    "frame",
    [
        {"offset": 0},
        {"offset": len(LINE) + 1},
        {"offset": len(LINE), "sha256": hashlib.sha256(b"other").hexdigest()},
        {"offset": len(LINE), "bytes": 1},
    ],
    ids=["again", "a-gap", "other-bytes", "other-size"],
)
def test_a_piece_that_does_not_fit_is_refused(arrivals: Arrivals, frame: dict[str, Any]) -> None:
    """Growth that is damaged, or does not begin where the copy ends, leaves copy and rows as they were."""
    before = here(arrivals)
    line = rows.encode({"key": "t/s/1#0", "error": None})
    with pytest.raises(NotReachable, match=r"damaged|was sent for offset"):
        arrivals.take(piece(line, file=ROWS) | frame, line)
    assert here(arrivals) == before


def test_another_seal_does_not_overwrite_the_first(arrivals: Arrivals) -> None:
    """A file that is written once and comes with another content is kept beside the one that was there."""
    for content in (b"first", b"second", b"third"):
        arrivals.take(piece(content, whole=EXIT), content)
    kept = {path.name: path.read_bytes() for path in arrivals.copy.attempt(1).folder.glob("exit.json*")}
    assert kept == {"exit.json": b"third", "exit.json.diverged-1": b"first", "exit.json.diverged-2": b"second"}


def test_rows_that_diverged_are_kept_and_stay_merged(arrivals: Arrivals) -> None:
    """A copy that is no beginning of the machine's file any more is set aside; a key's first good row stays final."""
    arrivals.take({"diverged": ROWS}, b"")
    other = rows.encode({"key": "t/s/0#0", "error": None, "score": 0.0})
    arrivals.take(piece(other, file=ROWS, offset=0), other)
    found = here(arrivals)
    assert found["rows.jsonl"] == LINE
    assert found[f"machines/local/{ROWS}"] == other
    assert found[f"machines/local/{ROWS}.diverged-1"] == LINE


def test_control_codes_do_not_reach_the_terminal(counting_run: Make) -> None:
    """On a terminal, a phase and a failure's words are shown without their escape sequences, brackets as they are."""
    hostile = "\\x1b]0;owned\\x07[/x]red"
    refuses = 'raise ConfigFailure("the dataset is not one", "take another")'
    says = f'Progress(attempt.progress).phase("{hostile}"); raise ConfigFailure("{hostile}", "{hostile}")'
    run = counting_run(refuse=True)
    run.save(agent=code_with("worker/counting.py", refuses, says))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*GPU, "resume", run.run_id])
    shown = b"".join(iter(lambda: read(terminal), b""))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == ConfigError.exit_code
    assert b"owned" not in shown
    assert shown.count(b"[/x]red") >= 3, "the phase, the message and the hint"


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end was closed
        return b""


def test_long_words_of_a_failure_are_cut(counting_run: Make) -> None:
    """A failure with a message of megabytes ends the run like any other, and its beginning is shown."""
    run = counting_run(refuse=True)
    run.save(agent=code_with("worker/counting.py", '"the dataset is not one"', '"the prompt: " + "漢" * 1_000_000'))
    go(run)
    assert run.record.state == "failed"
    with pytest.raises(ConfigError, match="the prompt: 漢漢漢") as said:
        advance.raise_if_not_done(run)
    assert len(said.value.message) < 5000


def test_a_seal_may_say_more_than_we_know(counting_run: Make, on_machine: Folder) -> None:
    """A seal with fields that newer code has added is read like any other, on both sides."""
    run = counting_run(count=3)
    journey.set_off(run, lambda _frame, _data: None)
    seal = on_machine(run).attempt(1).exit
    until(lambda: seal.exists() and not locks.is_held(on_machine(run).run_lock))
    durable.save_json(seal, {**durable.load_json(seal), "energy_wh": 3})
    go(run)
    assert run.record.state == "sealed"
    assert durable.load_json(run.home.machine("local").attempt(1).exit)["energy_wh"] == 3


def test_a_seal_that_is_not_borne_out_by_rows_seals_nothing(counting_run: Make, arrivals: Arrivals) -> None:
    """A seal whose digest is not that of the rows at home leaves the run running: the next pull may bring the rest."""
    run = runs.open_folder(arrivals.home.folder)
    run.save(state="running", attempt=1)
    right = {"rows.jsonl": {"bytes": len(LINE), "sha256": hashlib.sha256(LINE).hexdigest()}}
    wrong = {"rows.jsonl": {**right["rows.jsonl"], "sha256": hashlib.sha256(b"").hexdigest()}}
    advance.settle(run, arrivals, {"state": "ended", "attempt": 1, "seal": SEAL | {"files": wrong}})
    assert run.record.state == "running"
    assert arrivals.is_complete(rundir.Seal.of(SEAL | {"files": right}))


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[1]", b"{}", b'{"run_id": "x"}', {"run_id": "../x"}, {"machine": "../../x"}, {"agent": "/bin"}],
)
def test_a_damaged_record_hides_no_other_run(
    counting_run: Make, capsys: pytest.CaptureFixture[str], damage: bytes | dict[str, str]
) -> None:
    """A run.json that is no record, or names a path, is passed over with words; asked for, it is a clear error."""
    good, bad = counting_run(), counting_run()
    record = durable.load_json(bad.home.record)
    bad.home.record.write_bytes(damage if isinstance(damage, bytes) else json.dumps(record | damage).encode())
    assert [run.run_id for run in runs.remembered()] == [good.run_id]
    assert f"{bad.run_id}/run.json is damaged" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="damaged"):
        runs.open_folder(bad.home.folder)


@pytest.mark.parametrize("data", [b"", b"\0\0\0", b'{"rows_done": 5', b"[1]", b'{"rows_done": "many"}'])
def test_a_damaged_status_is_no_news(arrivals: Arrivals, data: bytes) -> None:
    """A status.json that a power cut tore, or a machine made up, does not keep rows from being counted."""
    run = runs.open_folder(arrivals.home.folder)
    arrivals.take(piece(data, whole="attempts/0001/status.json"), data)
    follow.note(run, arrivals)
    assert run.record.rows_home == 1
    assert run.record.rows_done in (0, 1)


def test_a_machine_that_does_not_answer_hides_nothing(counting_run: Make) -> None:
    """With a machine that does not answer, a pull says so, and `runs` and `logs` show what is known and home."""
    run = counting_run(count=3)
    go(run)
    code = run.record.agent
    run.save(state="running", agent="0" * 16)
    pulled, listed, shown = gpu("pull", run.run_id), gpu("runs", "--json"), gpu("logs", run.run_id)
    run.save(agent=code)
    assert pulled.returncode == NotReachable.exit_code
    assert (listed.returncode, shown.returncode) == (0, 0)
    assert [entry["rows_home"] for entry in json.loads(listed.stdout)] == [3]
    assert shown.stdout.splitlines()[-1] == "row 2"


def test_a_log_may_grow_after_the_seal(counting_run: Make, on_machine: Folder) -> None:
    """What a leftover process prints after the seal comes home and does not keep the run from being sealed."""
    run = counting_run(count=3)
    journey.set_off(run, lambda _frame, _data: None)
    attempt = on_machine(run).attempt(1)
    until(attempt.exit.exists)
    with attempt.log.open("ab") as log:
        log.write(b"leaked semaphore objects\n")
    go(run)
    assert run.record.state == "sealed"
    assert run.home.machine("local").attempt(1).log.read_bytes().endswith(b"leaked semaphore objects\n")

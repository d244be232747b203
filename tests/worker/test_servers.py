"""A server started for a run: waited for, watched, its words kept within bounds, and ended with all it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import durable, engines
from orchestrator.runs import Run
from tests.waiting import until
from tests.worker import evaluating, machine
from tests.worker.playing_openai import MODEL, command
from worker import devices, processes, servers
from worker.failures import ConfigFailure, EngineDied
from worker.servers import Command, Server

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
GREEDY = {"engine": "openai", "batch_size": 2}


def started(tmp_path: Path, timeout_s: float = 30.0, text: str = "", **how: Any) -> Server:
    said: list[str] = []
    return Server(Command(text or command(**how), {"model": MODEL}, timeout_s), tmp_path / "server.log", said.append)


def pids(server: Server) -> list[int]:
    return server._offspring.pids()


def served(tmp_path: Path, questions: int = 40, **how: Any) -> Run:
    dataset = evaluating.save_questions(tmp_path / f"{questions}.jsonl", questions)
    return evaluating.make(MODEL, dataset, **GREEDY, server=command(**how))


def test_a_server_answers_where_it_is_said_to(tmp_path: Path) -> None:
    """Inside the context the server answers on a port of this machine alone, and afterwards nothing of it is left."""
    with started(tmp_path) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert pids(server)
        server.check()
    assert not pids(server)
    assert (tmp_path / "server.log").read_text() == "loading the weights\n"


def test_words_are_filled_and_never_read_by_a_shell() -> None:
    """Places are filled within words: what a name holds can neither add a word nor be run."""
    text = "serve {model} --port={port} '$(touch x)' ';' \"a b\""
    words = Command(text, {"model": "a b; rm -rf {port}"}, 1.0).words(80)
    assert words == ["serve", "a b; rm -rf 80", "--port=80", "$(touch x)", ";", "a b"]


def test_a_server_that_never_gets_healthy_is_ended(tmp_path: Path) -> None:
    """Past its deadline a server that does not answer well is ended, and what it said is shown."""
    server = started(tmp_path, timeout_s=1.0, never_healthy=True)
    with pytest.raises(EngineDied, match=r"did not answer within 1 s.*\nloading the weights"), server:
        pass
    assert not pids(server)


@pytest.mark.parametrize(
    ("text", "how", "said"),
    [
        ("", {"dies_at_once": True}, "exit code 1.*there is no such model"),
        ("sh -c 'kill -9 $$' {port}", {}, "SIGKILL"),
    ],
)
def test_a_server_that_dies_while_it_loads_is_noticed(tmp_path: Path, text: str, how: Any, said: str) -> None:
    """A server that ends before it answers is a failure at once, with how it ended and its last words."""
    with pytest.raises(EngineDied, match=f"(?s){said}"), started(tmp_path, timeout_s=600, text=text, **how):
        pass


def test_a_server_that_is_none_is_said(tmp_path: Path) -> None:
    """A program that is not there is a mistake in the settings."""
    with pytest.raises(ConfigFailure, match="'no-such-server' cannot be started"):
        started(tmp_path, text="no-such-server {port}").__enter__()


@linux_only
def test_all_that_a_server_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not heed TERM, and children of it in sessions of their own, are killed."""
    monkeypatch.setattr(servers, "GRACE_S", 0.2)
    with started(tmp_path, deaf=True, children=3) as server:
        assert len(until(lambda: len(found := pids(server)) == 4 and found)) == 4
    assert not pids(server)


def test_a_server_is_first_asked_to_end(tmp_path: Path) -> None:
    """TERM comes before KILL: a server that heeds it ends by itself."""
    with started(tmp_path) as server:
        pass
    assert server._offspring.process.returncode == -signal.SIGTERM


def test_a_log_is_bounded(tmp_path: Path) -> None:
    """Of a server that talks without end the beginning and the end are kept, with how much lies between."""
    with started(tmp_path, talks=5000):
        pass
    said = (tmp_path / "server.log").read_bytes()
    assert len(said) < servers.LOG_MAX_BYTES + servers.TAIL_BYTES + 70_000
    assert said.startswith(b"loading the weights\n")
    assert said.endswith(b"that was all\n")
    assert b"bytes left out]" in said


def test_the_key_of_another_server_is_not_given_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is started gets the job's variables but for the key of servers elsewhere."""
    monkeypatch.setenv(engines.KEY_VARIABLE, "sk-canary")
    monkeypatch.setenv("HF_TOKEN", "hf-kept")
    with started(tmp_path) as server:
        environ = Path(f"/proc/{server._offspring.process.pid}/environ").read_bytes()
    assert b"sk-canary" not in environ
    assert b"hf-kept" in environ


def test_gpu_memory_is_seen_to_be_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its end the GPUs are asked until they hold no more than before; what stays is said."""
    used = iter([{"0": 100}, {"0": 9000}, {"0": 150}])
    monkeypatch.setattr(devices, "visible", lambda: ["0"])
    monkeypatch.setattr(devices, "memory_used", lambda: next(used))
    monkeypatch.setattr(devices, "_PAUSE_S", 0.01)
    with started(tmp_path):
        pass
    assert next(used, None) is None
    held = iter([{"0": 100}] + [{"0": 9000}] * 10**4)
    monkeypatch.setattr(devices, "memory_used", lambda: next(held))
    monkeypatch.setattr(devices, "FREED_WITHIN_S", 0.05)
    server = started(tmp_path)
    with server:
        pass
    assert "GPU 0 still holds 9000 MiB" in server.stop()


def test_a_run_starts_its_server_and_ends_it(tmp_path: Path) -> None:
    """A run with a server of its own makes its rows, keeps the server's words and leaves nothing running."""
    run = served(tmp_path)
    seal = evaluating.finish(run)
    assert (seal.reason, seal.message) == ("done", "")
    there = machine.there(run)
    assert len(evaluating.made(run)) == 40
    assert there.attempt(1).server_log.read_text() == "loading the weights\n"
    assert seal.files["server.log"]["bytes"] == len("loading the weights\n")
    assert not processes.marked(str(there.folder))


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_fails_the_run_and_a_resume_carries_on(tmp_path: Path) -> None:
    """Its death ends the run at once, with its last words; rows are kept, and a resume makes exactly the others."""
    run = served(tmp_path, dies_after=15)
    seal = evaluating.finish(run)
    assert (seal.reason, seal.kind) == ("failed", "engine")
    assert "The server ended with exit code 7" in seal.message
    assert "the card has fallen off the bus" in seal.message
    assert "resume" in seal.hint
    before = evaluating.made(run)
    assert 13 <= len(before) <= 15
    evaluating.finish(run)
    evaluating.finish(run)
    after = evaluating.made(run)
    assert len(after) == 40
    assert {key: after[key] for key in before} == before
    lines = [path.read_bytes().count(b"\n") for path in machine.there(run).row_files() if path.exists()]
    assert sum(lines) == 40


@linux_only
@pytest.mark.parametrize("victims", [["worker"], ["supervisor", "worker"]])
@pytest.mark.slow
def test_a_server_does_not_outlive_a_killed_worker(tmp_path: Path, victims: list[str]) -> None:
    """Whoever of a run is killed, its server and what that started are gone, and the rows so far are there."""
    run = served(tmp_path, slow_s=0.05, children=1)
    evaluating.start(run)
    until(lambda: len(evaluating.made(run)) >= 3)
    there = machine.there(run)
    known = durable.load_json(there.attempt(1).pids)
    server = next(pid for pid, words in processes.commands().items() if str(there.folder) in mark_of(pid, words))
    processes.kill([known[name]["pid"] for name in victims])
    until(lambda: not Path(f"/proc/{server}").exists() or is_dead(server))
    assert machine.ended(run) if victims == ["worker"] else evaluating.finish(run)
    assert not processes.marked(str(there.folder))
    assert len(evaluating.made(run)) == 40


def test_a_stopped_run_ends_its_server(tmp_path: Path) -> None:
    """A stop breaks off what is under way, keeps the rows and ends the server by itself, well within its grace."""
    run = served(tmp_path, slow_s=0.5)
    evaluating.start(run)
    until(lambda: len(evaluating.made(run)) >= 2)
    machine.ask(run, "stop", "20")
    seal = machine.ended(run)
    assert (seal.reason, seal.signal) == ("stopped", None)
    assert 2 <= len(evaluating.made(run)) < 40
    assert not processes.marked(str(machine.there(run).folder))


def mark_of(pid: int, words: list[str]) -> str:
    """The run's folder where that process is a server of ours; empty elsewhere."""
    if not any(word.endswith("playing_openai.py") for word in words):
        return ""
    return Path(f"/proc/{pid}/environ").read_bytes().decode()


def is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return True


GPU = [sys.executable, "-m", "orchestrator.cli"]


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (["engine=openai"], 2, "needs either base_url"),
        (["engine=openai", "model=m", "base_url=http://203.0.113.7/v1"], 2, "allow_http"),
        (["engine=vllm"], 3, "vllm"),
    ],
)
def test_a_bad_choice_of_engine_is_refused_before_anything_starts(settings: list[str], code: int, said: str) -> None:
    """What the settings or this computer cannot do ends with its exit code, and no run is made."""
    done = gpu("run", "eval-gsm8k", *(word for setting in settings for word in ("--set", setting)))
    assert (done.returncode, Path("results").exists()) == (code, False), done.stderr
    assert said in done.stderr


def test_a_server_that_never_gets_healthy_ends_the_command(tmp_path: Path) -> None:
    """`gpu run` ends with the job's exit code, the reason and what to look at; the server is gone."""
    questions = evaluating.save_questions(tmp_path / "questions.jsonl", 3)
    settings = {"engine": "openai", "model": MODEL, "dataset": str(questions), "server_timeout_s": "1"}
    settings["server"] = command(never_healthy=True)
    done = gpu("run", "eval-gsm8k", "-q", *(word for item in settings.items() for word in ("--set", "=".join(item))))
    assert done.returncode == 10, done.stderr
    assert "did not answer within 1 s" in done.stderr
    assert "loading the weights" in done.stderr
    run_id = done.stdout.split()[0]
    assert not processes.marked(str(Path(os.environ["GPU_HOME"], "machines/local/runs", run_id)))
    assert Path("results", run_id, "machines/local/attempts/0001/server.log").read_text() == "loading the weights\n"


@pytest.mark.slow
def test_what_servers_were_paid_is_in_the_summary(tmp_path: Path) -> None:
    """With prices given, the summary's cost counts what each answer cost."""
    questions = evaluating.save_questions(tmp_path / "questions.jsonl", 3)
    settings = {"engine": "openai", "model": MODEL, "dataset": str(questions), "samples": "1"}
    settings |= {"server": command(), "usd_per_million_out": "1000000", "usd_per_million_in": "0"}
    done = gpu("run", "eval-gsm8k", "-q", *(word for item in settings.items() for word in ("--set", "=".join(item))))
    assert done.returncode == 0, done.stderr
    folder = Path("results", done.stdout.split()[0])
    assert json.loads((folder / "summary.json").read_text())["cost_usd"] == 15.0

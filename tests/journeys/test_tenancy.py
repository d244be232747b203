"""A run that rents its own machine: rented, used, replaced when it vanishes, given back; nothing goes on costing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import clock, keys, rentals, runs
from tests.cloud import Cloud, Fault, Timings
from tests.journeys.hurried import begun, document, gpu
from tests.waiting import until

A10 = ("--gpu", "A10", "-y", "--environment", "none", "--out", "out/*.jsonl")
_COUNT = """
import os, sys, time
os.makedirs("out", exist_ok=True)
with open("out/rows.jsonl", "a") as file:
    for index in range(int(sys.argv[1])):
        file.write('{"index": %d}\\n' % index)
        file.flush()
        time.sleep(0.05)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def quick(cloud: Cloud) -> Cloud:
    """A stand-in whose machines boot at once, and a project with a program that makes a row every 50 ms."""
    cloud.core.timings = Timings(boot_s=0.1, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
    Path("count.py").write_text(_COUNT)
    return cloud


def count(number: int, code: int = 0) -> tuple[str, ...]:
    return ("--", sys.executable, "count.py", str(number), str(code))


def billing(cloud: Cloud) -> list[str]:
    return [instance.instance_id for instance in cloud.core.still_billing()]


def lines_home(run_id: str) -> int:
    path = runs.find(run_id).home.folder / "out" / "out" / "rows.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def newest() -> runs.Run:
    return runs.find(None)


def told(folder: Path) -> list[dict[str, Any]]:
    path = folder / "told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def listen(folder: Path) -> None:
    """Have the notify command write down what it is told."""
    script = folder / "listen.sh"
    script.write_text(f'#!/bin/sh\ncat >> "{folder}/told.jsonl"\n')
    script.chmod(0o700)
    keys.user_config().write_text(json.dumps({"notify": str(script)}))


def test_a_run_rents_uses_and_gives_back(quick: Cloud, tmp_path: Path) -> None:
    """One command from nothing to rows at home and a machine that is gone; what it cost stands in the ledger."""
    listen(tmp_path)
    done = gpu("run", *A10, "--budget", "2", "--terminate", *count(10))
    assert done.returncode == 0, done.stderr
    run = newest()
    assert run.record.state == "sealed"
    assert lines_home(run.run_id) == 10
    assert billing(quick) == []
    assert quick.core.account.keys == {}
    assert f"giving {run.record.machine} back" in done.stderr
    costs = document("cost")
    assert costs["runs"][0]["usd"] > 0
    assert not costs["machines"][0]["open"]
    assert [entry["event"] for entry in told(tmp_path)] == ["run_done"]


def test_a_failed_run_gives_its_machine_back_too(quick: Cloud, tmp_path: Path) -> None:
    """--terminate holds after a failure, once what there is is home, and after the minutes that were asked for."""
    listen(tmp_path)
    done = gpu("run", *A10, "--terminate", "--keep-on-failure", "0.03", *count(5, 3))
    assert done.returncode == 10, done.stderr
    assert "is kept until" in done.stderr
    assert lines_home(newest().run_id) == 5
    assert billing(quick) == []
    assert [entry["event"] for entry in told(tmp_path)] == ["run_failed"]


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_when_its_machine_vanishes(quick: Cloud, tmp_path: Path) -> None:
    """A machine that its provider calls gone is replaced, and the run ends well; both are in the ledger."""
    listen(tmp_path)
    quick.fault("vanishes", seconds=8.0)
    done = gpu("run", *A10, "--terminate", *count(200))
    assert done.returncode == 0, done.stderr
    assert "Going on on another machine" in done.stderr
    assert len(quick.core.ours()) == 2
    assert billing(quick) == []
    assert lines_home(newest().run_id) >= 200
    machines = document("cost")["machines"]
    assert len(machines) == 2
    assert not any(entry["open"] for entry in machines)
    assert [entry["event"] for entry in told(tmp_path)] == ["machine_lost", "run_done"]


@pytest.mark.slow
def test_a_run_is_ended_in_time(quick: Cloud, tmp_path: Path) -> None:
    """At its deadline a run that is followed is stopped cleanly, its rows come home, and its machine is gone."""
    listen(tmp_path)
    done = gpu("run", *A10, "--max-hours", "0.004", "--terminate", *count(2000))
    assert done.returncode == 10, done.stderr
    assert "past its deadline" in done.stderr
    assert newest().record.state == "stopped"
    assert 0 < lines_home(newest().run_id) < 2000
    assert billing(quick) == []
    assert [entry["event"] for entry in told(tmp_path)] == ["budget_80", "guard_fired", "run_failed"]


def test_cron_tells_that_most_of_a_budget_is_spent(quick: Cloud, tmp_path: Path) -> None:
    """Where nobody follows, `gpu advance --all` tells it, once; before most of the time is over it tells nothing."""
    listen(tmp_path)
    assert gpu("launch", "box", "--gpu", "A10", "-y").returncode == 0
    assert gpu("advance", "--all").returncode == 0
    assert told(tmp_path) == []
    machine, now = rentals.choose("box"), clock.timestamp()
    machine.save(asked_at=now - 900.0, deadline=now + 200.0)
    for _ in range(2):
        assert gpu("advance", "--all").returncode == 0
    (entry,) = told(tmp_path)
    assert (entry["event"], entry["machine"]) == ("budget_80", "box")
    assert gpu("terminate", "box", "-y").returncode == 0


@pytest.mark.slow
def test_ctrl_c_leaves_the_machine_and_says_so(quick: Cloud) -> None:
    """Interrupted, the run goes on and its machine stays, bounded by its caps; a resume follows it to the end."""
    command = begun("run", *A10, "--terminate", *count(100))
    until(lambda: any(run.record.state == "running" for run in runs.remembered()), 60)
    command.send_signal(2)
    _, said = command.communicate(timeout=60)
    assert command.returncode == 130, said
    assert len(billing(quick)) == 1
    done = gpu("resume")
    assert done.returncode == 0, done.stderr
    assert lines_home(newest().run_id) == 100
    assert billing(quick) == []


@pytest.mark.slow
def test_a_mirror_keeps_what_a_vanished_machine_had(quick: Cloud, tmp_path: Path) -> None:
    """With nobody following, rows that a mirror has come home from there when the machine is gone."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    quick.fault("vanishes", seconds=14.0)
    done = gpu("run", *A10, "--mirror", str(mirror), "--detach", *count(4000))
    assert done.returncode == 0, done.stderr
    until(lambda: any(path.stat().st_size for path in mirror.rglob("rows.jsonl")), 30)
    (instance,) = quick.core.ours()
    until(lambda: instance.instance_id not in billing(quick), 60)
    assert gpu("pull").returncode == 0
    assert newest().record.state == "lost"
    assert lines_home(newest().run_id) > 0


def test_nothing_is_rented_for_a_job_that_cannot_work(quick: Cloud, tmp_path: Path) -> None:
    """A model without a chat template, or one that fits no GPU, is refused before anything costs."""
    model = tmp_path / "model"
    model.mkdir()
    facts = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64}
    facts |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "torch_dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(facts))
    (model / "tokenizer_config.json").write_text("{}")
    done = gpu("run", "eval-gsm8k", "--gpu", "A10", "-y", "--set", f"model={model}", "--set", "dataset=generated")
    assert done.returncode == 3, done.stderr
    assert "Nothing was rented" in done.stderr
    assert quick.core.count("/instance-operations/launch") == 0
    both = gpu("run", "--on", "local", *A10, *count(1))
    assert both.returncode == 2
    unsaid = gpu("run", "--gpu", "A10", "--environment", "none", *count(1))
    assert unsaid.returncode == 2
    assert "-y" in unsaid.stderr
    assert quick.core.count("/instance-operations/launch") == 0


SHORT = {"ssh.SshMachine.patience_s": 0.5, "tenancy._SURE_S": 2.0, "tenancy._LOOK_S": 0.2, "vanishing._TWICE_S": 0.2}


def followed(quick: Cloud, number: int, *more: str) -> Any:
    """A command that follows its run, which makes rows; and its instance."""
    before = len(list(runs.remembered()))
    command = begun("run", *A10, *more, *count(number), waits=SHORT)
    until(lambda: len(list(runs.remembered())) > before and lines_home(newest().run_id) > 3, 60)
    return command, quick.core.ours()[-1]


@pytest.mark.slow
def test_a_computer_that_is_cut_off_ends_no_machine(quick: Cloud) -> None:
    """Neither machine nor provider answer, so it may be this computer: nothing is ended, and the run goes on there."""
    command, instance = followed(quick, 300, "--terminate")
    server = quick.machine(instance.instance_id).sshd
    quick.fault("not-sent", times=None)
    server.kill_all()
    _, said = command.communicate(timeout=60)
    assert command.returncode == 5, said
    assert "0.75 USD/h" in said
    quick.core.faults.clear()
    server.start()
    done = gpu("resume")
    assert done.returncode == 0, done.stderr
    assert len(quick.core.ours()) == 1
    assert lines_home(newest().run_id) == 300
    assert billing(quick) == []


@pytest.mark.slow
def test_a_machine_that_comes_back_is_kept(quick: Cloud) -> None:
    """A machine that does not answer for longer than is waited for, but then does, goes on with its run."""
    command, instance = followed(quick, 200, "--terminate")
    server = quick.machine(instance.instance_id).sshd
    server.kill_all()
    path = f"/instances/{instance.instance_id}"
    asked = quick.core.count(path)
    until(lambda: quick.core.count(path) >= asked + 4)
    server.start()
    _, said = command.communicate(timeout=60)
    assert command.returncode == 0, said
    assert len(quick.core.ours()) == 1
    assert billing(quick) == []


@pytest.mark.slow
def test_a_machine_that_never_answers_again_is_replaced(quick: Cloud, tmp_path: Path) -> None:
    """While its provider answers and the machine does not, for minutes, it is ended, and the run goes on elsewhere."""
    listen(tmp_path)
    command, instance = followed(quick, 100, "--terminate")
    quick.machine(instance.instance_id).sshd.kill_all()
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    assert len(quick.core.ours()) == 2
    assert billing(quick) == []
    assert [entry["event"] for entry in told(tmp_path)] == ["machine_lost", "run_done"]


@pytest.mark.slow
def test_a_machine_that_vanishes_while_it_is_sent_its_files_is_replaced(quick: Cloud) -> None:
    """Gone before the run began there: it begins on the next one."""
    Path("big.bin").write_bytes(bytes(range(256)) * 1_600_000)
    command = begun("run", *A10, "--terminate", "--need", "big.bin", *count(5), waits=SHORT)
    until(lambda: rentals.known() and rentals.known()[0].record.state == "ready", 60)
    (instance,) = quick.core.ours()
    instance.faults["vanishes"] = Fault("vanishes", seconds=clock.timestamp() - instance.active_at)
    _, said = command.communicate(timeout=90)
    assert command.returncode == 0, said
    assert len(quick.core.ours()) == 2
    assert billing(quick) == []


@pytest.mark.slow
def test_further_machines_share_hours_and_budget(quick: Cloud) -> None:
    """What the first machine took is taken off for the next; what is typed with a resume counts from then on."""
    quick.fault("vanishes", seconds=8.0)
    done = gpu("run", *A10, "--max-hours", "2", "--budget", "5", *count(240), waits=SHORT)
    assert done.returncode == 0, done.stderr
    first, second = sorted(rentals.known(), key=lambda rental: rental.record.made_at)
    caps, left = first.caps(), second.caps()
    assert (caps.max_hours, caps.budget_usd) == (2, 5)
    assert 1.98 < (left.max_hours or 0) < 2 - 5 / 3600
    assert left.budget_usd == pytest.approx(5 - 0.0125)
    assert gpu("terminate", second.name, "-y").returncode == 0
    run = newest()
    run.save(state="lost")
    again = gpu("resume", *A10[:3], "--max-hours", "1", "--budget", "3", "--detach")
    assert again.returncode == 0, again.stderr
    third = rentals.choose(newest().record.machine).caps()
    assert (third.max_hours, third.budget_usd) == (1, 3)
    assert gpu("terminate", "--all", "--discard", "-y").returncode == 0


@pytest.mark.slow
def test_machines_are_not_replaced_without_end(quick: Cloud) -> None:
    """When one after the other vanishes, the run ends as lost, which its exit code says, and nothing is rented."""
    quick.fault("vanishes", seconds=5.0, times=None)
    done = gpu("run", *A10, "--terminate", *count(4000), waits={**SHORT, "tenancy._MACHINES_MAX": 2})
    assert done.returncode == 5, done.stderr
    assert len(quick.core.ours()) == 2
    assert billing(quick) == []
    assert newest().record.state in ("lost", "planned")  # where the last one vanished before the run had begun there


@pytest.mark.slow
def test_a_machine_that_was_ended_on_purpose_is_not_replaced(quick: Cloud) -> None:
    """Given back by hand, or by its guard at the deadline, while its run is followed: nothing more is rented."""
    command, _ = followed(quick, 4000)
    assert gpu("terminate", newest().record.machine, "--discard", "-y").returncode == 0
    _, said = command.communicate(timeout=60)
    assert command.returncode == 5, said
    command, instance = followed(quick, 4000, "--max-hours", "5")
    rental = rentals.choose(newest().record.machine)
    rental.save(deadline=clock.timestamp() - 1)
    instance.faults["vanishes"] = Fault("vanishes", seconds=clock.timestamp() - instance.active_at)
    _, said = command.communicate(timeout=60)
    assert command.returncode in (5, 10), said
    assert len(quick.core.ours()) == 2
    assert billing(quick) == []

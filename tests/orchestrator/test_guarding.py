"""Who ends a machine: the choice, what it means in words, and what cron and scheduled CI are given."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import config, guarding, keys, rentals
from orchestrator.errors import ConfigError
from orchestrator.providers.base import Need
from orchestrator.rentals import Caps, Rental, Terms

ODD = [
    "with space",
    "it's",
    "100%",
    "$(touch pwned)",
    "`id`",
    'a"b',
    "a;b&c|d",
    "ä日",
    "back\\slash",
    "%%\\%",
    "#x",
    "*",
]
PATHS = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1)


def rental(**changes: object) -> Rental:
    made = rentals.create("box", "lambda", Terms(Need(), Caps(), guarding.chosen()))
    made.save(**changes)
    return made


def as_cron_runs(line: str) -> str:
    """The command that cron hands to the shell: what is after the five fields, with `\\%` as `%`."""
    fields = line.split(" ", 5)
    assert fields[:5] == ["*/10", "*", "*", "*", "*"]
    assert not re.search(r"(?<!\\)%", fields[5]), "cron ends the command there"
    return fields[5].replace(r"\%", "%")


@pytest.mark.parametrize("odd", ODD)
def test_a_crontab_line_survives_any_path(odd: str, tmp_path: Path) -> None:
    """Run as cron runs it, the line starts exactly this program with exactly this state folder, and nothing else."""
    home, program = tmp_path / odd, tmp_path / f"bin {odd}" / "gpu"
    (home / "guard").mkdir(parents=True)
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$GPU_HOME" "$@"\n')
    program.chmod(0o755)
    line = guarding.crontab_line([str(program), "audit", "--fix", "--past-cap", "-y"], home)
    assert line.count("\n") == 1
    done = subprocess.run(["sh", "-c", as_cron_runs(line.rstrip("\n"))], capture_output=True, cwd=tmp_path, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    said = (home / "guard" / "log").read_text().splitlines()
    assert said == [str(home), "audit", "--fix", "--past-cap", "-y"]
    assert not (tmp_path / "pwned").exists()


@given(PATHS, PATHS)
def test_a_crontab_line_is_one_line(home: str, program: str) -> None:
    """Whatever is in a path, there is one line, and every percent sign in it is escaped."""
    line = guarding.crontab_line([f"/{program}/gpu"], Path("/", home))
    assert len(line.splitlines()) == 1
    as_cron_runs(line)


@pytest.mark.parametrize("name", ["a\nb", "a\r* * * * * id", "a\u2028b"])
def test_a_path_of_two_lines_is_refused(name: str) -> None:
    """What no crontab can hold is an error, not a second line."""
    with pytest.raises(ConfigError, match="crontab"):
        guarding.crontab_line(["gpu"], Path("/", name))


def test_what_is_written_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that is written runs this very program, from any folder and with cron's short PATH."""
    crontab, workflow = guarding.write_reaper()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("LAMBDA_API_KEY", "")
    subprocess.run(["sh", "-c", as_cron_runs(crontab.read_text().rstrip("\n"))], cwd="/", check=False, timeout=60)
    log = (config.state_folder() / "guard" / "log").read_text()
    assert "No account key of Lambda Cloud" in log, log
    for path in (crontab, workflow):
        assert path.stat().st_mode & 0o077 == 0


def test_the_workflow_is_one() -> None:
    """The file for scheduled CI is YAML that runs every ten minutes, installs this, and ends what is past its cap."""
    _, path = guarding.write_reaper()
    found = yaml.safe_load(path.read_text())
    assert found[True]["schedule"] == [{"cron": "*/10 * * * *"}], "YAML reads `on` as true"
    (job,) = found["jobs"].values()
    assert job["timeout-minutes"] <= 30
    assert job["env"] == {"LAMBDA_API_KEY": "${{ secrets.LAMBDA_API_KEY }}"}
    steps = [step.get("uses", step.get("run", "")) for step in job["steps"]]
    assert [step.partition("@")[0] for step in steps[:2]] == ["actions/checkout", "actions/setup-python"]
    assert steps[2:] == ["pip install .", "gpu audit --fix --past-cap -y"]
    assert float(job["steps"][1]["with"]["python-version"]) >= 3.11


def test_the_choice_is_kept_beside_the_keys() -> None:
    """A guard once chosen holds for later launches; keys and limits in the same file stay, and stay private."""
    assert guarding.chosen() == "laptop"
    keys.store("lambda", "secret-Key-0123456789")
    config_file = keys.user_config()
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "limits": {"usd_per_hour": 5}}))
    for how in guarding.HOW:
        guarding.choose(how)
        assert guarding.chosen() == how
    kept = json.loads(config_file.read_text())
    assert kept["keys"] == {"lambda": "secret-Key-0123456789"}
    assert kept["limits"] == {"usd_per_hour": 5}
    assert config_file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("how", ["nobody", "", None, 5, ["laptop"], {"a": 1}])
def test_a_guard_that_is_none_is_an_error(how: object) -> None:
    """A word in the config file that means no guard stops a launch: it is not taken for the weakest one."""
    keys.user_config().write_text(json.dumps({"guard": how}))
    with pytest.raises(ConfigError, match="guard"):
        guarding.chosen()


def test_what_is_armed_is_said_plainly() -> None:
    """With a deadline, when and by whom; where only this laptop ends it, that nobody does while it is closed."""
    box = rental(state="ready", deadline=1_800_000_000.0)
    words = guarding.in_words(box)
    assert "2027-01-15T08:00:00Z" in words
    assert "NOBODY does" in words
    assert guarding.document(box) == {"armed": True, "deadline": "2027-01-15T08:00:00Z", "how": "laptop"}
    box.save(guard="reaper")
    assert "gpu audit --fix --past-cap -y" in guarding.in_words(box)
    box.save(deadline=None)
    assert "nobody ends it but you" in guarding.in_words(box)
    assert guarding.document(box)["armed"] is False
    box.save(deadline=1_800_000_000.0, state="gone")
    assert guarding.document(box)["armed"] is False


def test_past_is_from_the_second_of_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that may cost money is past its deadline when that comes; one that is gone, or has none, never is."""
    box = rental(state="ready", deadline=1_000.0)
    for now, past in ((999.9, False), (1_000.0, True)):
        monkeypatch.setattr(guarding.clock, "timestamp", lambda now=now: now)
        assert guarding.is_past(box) is past
    for changes in ({"state": "gone"}, {"state": "planned"}, {"state": "booting", "deadline": None}):
        box.save(**changes)
        assert not guarding.is_past(box)

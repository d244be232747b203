"""Full disks on either side, runs that begin at once, hostile file names and words: all over SSH, nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import rows, rundir
from orchestrator.errors import HomeDiskFull, JobFailed
from orchestrator.runs import Run
from tests.journeys.test_bad_machines import GPU, gpu, mounted
from tests.rig import Sshd

HOSTILE = [
    "two words",
    "quo'te\"s",
    "$(touch pwned)",
    "`id`",
    "new\nline",
    "-n",
    "--",
    "",
    "größer 数",
    "*",
    "~",
    "a\\nb",
]
SAY_WORDS = "import json, sys; print(json.dumps(sys.argv[1:]))"
FILES = {
    "plain.txt": "plain",
    "two words.txt": "spaces",
    "-rf": "a dash",
    "größer 数.txt": "unicode",
    "new\nline.txt": "a newline",
    "folder/..two": "dots that lead nowhere",
    "folder/$(touch pwned)": "a shell's words",
    "folder/ends with space ": "a space at the end",
}
MAKE_FILES = """
import json, os, pathlib, sys
for name, text in json.loads(pathlib.Path("files.json").read_text(encoding="utf-8")).items():
    path = pathlib.Path("made") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
os.symlink("/etc", "made/etc")
os.symlink("../../..", "made/up")
os.symlink("/etc/passwd", "made/passwd")
os.symlink("plain.txt", "made/link")
os.mkfifo("made/fifo")
pathlib.Path(os.fsdecode(b"made/\\xff.bin")).write_text("no UTF-8")
"""
Make = Callable[..., Run]
Box = Callable[..., Sshd]


def fill(folder: Path, leave_bytes: int) -> Path:
    """Fill a disk but for some bytes."""
    path = folder / "filler"
    space = os.statvfs(folder)
    path.write_bytes(b"\0" * (space.f_bavail * space.f_frsize - leave_bytes))
    return path


def assert_home(run: Run, count: int) -> None:
    run.reload()
    assert run.record.state == "sealed", run.record
    keys = [row["key"] for row in (rows.decode(line) for _, line in rows.whole_lines(run.home.rows))]
    assert sorted(keys) == sorted(f"t/s/{index}#0" for index in range(count))


def test_a_full_disk_here_during_a_follow(
    box: Box, counting_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the disk here full, the command says so and ends; the run goes on there, and comes home once, later."""
    server = box()
    with mounted(tmp_path / "small", "2m") as disk:
        monkeypatch.chdir(disk)
        run = counting_run(on="box", count=60, pace_s=0.02, size=20_000)
        filler = fill(disk, 400_000)
        done = gpu("resume", run.run_id)
        assert done.returncode == HomeDiskFull.exit_code, done.stderr
        assert "No space is left" in done.stderr
        assert "gpu resume" in done.stderr
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        again = gpu("resume", run.run_id)
        assert again.returncode == 0, again.stderr
        assert_home(run, 60)
        assert len(rundir.Run(server.home / ".gpu" / "runs" / run.run_id).attempts()) == 1


def test_a_full_disk_there_during_a_run(box: Box, counting_run: Make) -> None:
    """With the machine's disk full, the run ends with words that name it; with space again, what is missing is made."""
    server = box()
    with mounted(server.home / ".gpu" / "runs", "2m") as disk:
        filler = fill(disk, 400_000)
        run = counting_run(on="box", count=60, size=20_000)
        done = gpu("resume", run.run_id)
        assert done.returncode == JobFailed.exit_code, done.stderr
        assert "No space is left" in done.stderr
        assert "box" in done.stderr or str(disk) in done.stderr
        assert 0 < rows.index(run.home.rows).good < 60
        filler.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        again = gpu("resume", run.run_id)
        assert again.returncode == 0, again.stderr
        assert_home(run, 60)


def test_two_runs_begin_at_once(box: Box) -> None:
    """Two first runs that begin on a machine at the same moment both push, make and bring home their own."""
    box()
    Path("say.py").write_text("import sys; open('said.txt', 'w').write(sys.argv[1])\n", encoding="utf-8")
    asked = ["run", "--on", "box", "--environment", "none", "--need", "say.py", "--out", "said.txt", "-q", "--json"]
    commands = [
        subprocess.Popen([*GPU, *asked, "--", "python", "say.py", word], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for word in ("one", "two")
    ]
    for command in commands:
        _, said = command.communicate(timeout=120)
        assert command.returncode == 0, said
    found = sorted(path.read_text() for path in Path("results").glob("*/out/said.txt"))
    assert found == ["one", "two"]


def test_hostile_names_stay_in_the_run_folder(box: Box, tmp_path: Path) -> None:
    """Files of any name come home under it, links and pipes do not, and nothing is written outside the run's folder."""
    box()
    Path("files.json").write_text(json.dumps(FILES), encoding="utf-8")
    Path("make_files.py").write_text(MAKE_FILES, encoding="utf-8")

    def outside() -> set[str]:
        found = {str(path) for path in tmp_path.rglob("*")}
        return {path for path in found if not any(part in path for part in ("/results", "/machines/", "/state/"))}

    before = outside()
    asked = ["--on", "box", "--environment", "none", "--need", "files.json", "--need", "make_files.py"]
    done = gpu("run", *asked, "--out", "**/*", "--", "python", "make_files.py")
    assert done.returncode == 0, done.stderr
    assert outside() == before
    [folder] = Path("results").iterdir()
    made = folder / "out" / "made"
    assert not [path for path in (folder / "out").rglob("*") if path.is_symlink()]
    home = {path.relative_to(made).as_posix(): path.read_text() for path in made.rglob("*") if path.is_file()}
    refused = {name for name in FILES if name not in home}
    assert {name: text for name, text in FILES.items() if name not in refused} == home
    assert refused == {"new\nline.txt"}
    for name in refused | {"etc", "up", "passwd"}:
        assert name.replace("\n", "\\n") in done.stderr, "what does not come home is named"


def test_words_arrive_as_they_are(box: Box) -> None:
    """Every word of a command is one argument there, the same bytes, for `gpu exec` and for `gpu run`."""
    box()
    done = gpu("exec", "box", "--", "python", "-c", SAY_WORDS, *HOSTILE)
    assert json.loads(done.stdout) == HOSTILE, done.stderr
    asked = ["--on", "box", "--environment", "none", "--", "python", "-c", SAY_WORDS, *HOSTILE]
    ran = gpu("run", "-q", *asked)
    assert ran.returncode == 0, ran.stderr
    [folder] = Path("results").iterdir()
    log = folder / "machines" / "box" / "attempts" / "0001" / "log.txt"
    assert json.loads(log.read_text(encoding="utf-8").splitlines()[-1]) == HOSTILE
    assert not list(Path.cwd().rglob("pwned"))
